//! Scripted runs without faults: attach, connect, first sync, writes, roles, end.

use replication_core::control::{Command, Reply};
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::{Errno, SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

/// Fresh disks attach as Inconsistent, connect, and refuse to become Primary without force.
#[test]
fn fresh_nodes_connect_and_wait_for_the_operator() {
    let mut w = World::new(1, Setup::default());
    w.up_both();
    w.settle();
    for n in [A, B] {
        let state = w.state(n, 0);
        assert_eq!(state.conn, Conn::Connected);
        assert_eq!((state.disk, state.pdsk), (Disk::Inconsistent, Disk::Inconsistent));
        assert_eq!((state.role, state.peer), (Role::Secondary, Role::Secondary));
    }
    let refusal = w.must_not(A, Command::Primary { force: false });
    assert_eq!(refusal.code, -2, "{refusal:?}");
    assert_eq!(w.state(A, 0).role, Role::Secondary, "a refused command changes nothing (ST-7)");
}

/// `primary --force` on one of two fresh nodes syncs everything to the other.
#[test]
fn the_first_sync_copies_everything() {
    let mut w = World::new(2, Setup::default());
    w.up_both();
    w.must(A, Command::Primary { force: true });
    w.write(A, 0, 0, 8);
    w.wait_synced();
    let status = w.status(B);
    let kib = status.volumes[0].size_kib;
    assert!(status.volumes[0].received_kib >= kib, "{} of {kib}", status.volumes[0].received_kib);
    w.check_equal(0);
}

/// The first sync under load: what the host writes meanwhile is never overwritten (RS-2).
#[test]
fn the_first_sync_runs_under_load() {
    let mut w = World::new(3, Setup::default());
    w.up_both();
    w.must(A, Command::Primary { force: true });
    w.start_load(A, Load::mixed(vec![area(0, 2 * MIB), area(4 * MIB, 2 * MIB)]));
    w.run_for(Span::from_secs(20));
    w.drain(A);
    w.wait_synced();
    w.read_all(A, 0);
    w.check_equal(0);
}

/// Two fresh nodes are declared equal: nothing is copied, both are good.
#[test]
fn the_first_sync_can_be_skipped() {
    let mut w = World::new(4, Setup::default());
    w.start_synced();
    let status = w.status(B);
    assert_eq!(status.volumes[0].received_kib, 0, "nothing was copied");
    w.write(A, 0, 100, 24);
    w.settle();
    w.check_synced();
}

fn mirrors(protocol: ReplicationProtocol, seed: u64) {
    let mut w = World::new(seed, Setup::with(|s| s.protocol(protocol)));
    w.start_synced();
    w.start_load(A, Load::mixed(vec![area(0, 200), area(3 * MIB, 500)]));
    w.run_for(Span::from_secs(3));
    w.drain(A);
    w.settle();
    w.check_synced();
    w.read_all(A, 0);
    assert!(w.nodes[A].host.successes > 300, "{} requests", w.nodes[A].host.successes);
    assert_eq!(w.nodes[A].host.errors, 0);
    assert!(w.packets_sent("P_DATA") > 100);
}

#[test]
fn protocol_a_mirrors() {
    mirrors(ReplicationProtocol::A, 5);
}

#[test]
fn protocol_b_mirrors() {
    mirrors(ReplicationProtocol::B, 6);
}

#[test]
fn protocol_c_mirrors() {
    mirrors(ReplicationProtocol::C, 7);
}

/// A Secondary refuses the host.
#[test]
fn a_secondary_fails_requests() {
    let mut w = World::new(8, Setup::default());
    w.start_synced();
    let write = HostOp::Write { fua: false };
    assert_eq!(w.request(B, 0, write, area(0, 8)), Err(Errno::EIO));
    assert_eq!(w.request(B, 0, HostOp::Read, area(0, 8)), Err(Errno::EIO));
    w.settle();
    w.check_synced();
}

/// The role moves to the other node and back; two Primaries are refused (ST-1).
#[test]
fn the_role_moves() {
    let mut w = World::new(9, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 16);
    let refusal = w.must_not(B, Command::Primary { force: false });
    assert_eq!(w.state(B, 0).role, Role::Secondary, "{refusal:?}");
    w.must(A, Command::Secondary { holder: None });
    w.must(B, Command::Primary { force: false });
    w.read_all(B, 0);
    w.write(B, 0, 8, 16);
    w.must(B, Command::Secondary { holder: None });
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
    w.settle();
    w.check_synced();
}

/// A node that is in use is not demoted, and says who uses it.
#[test]
fn a_used_node_is_not_demoted() {
    let mut w = World::new(10, Setup::default());
    w.start_synced();
    let holder = Some(String::from("mount, pid 17"));
    let refusal = w.must_not(A, Command::Secondary { holder });
    assert!(refusal.text.contains("pid 17"), "{refusal:?}");
    assert_eq!(w.state(A, 0).role, Role::Primary);
}

/// A command that asks for what is already so changes nothing.
#[test]
fn commands_are_repeatable() {
    let mut w = World::new(11, Setup::default());
    w.start_synced();
    w.must(A, Command::Primary { force: false });
    w.must(B, Command::Secondary { holder: None });
    w.must_not(A, Command::Connect { discard_my_data: false });
    w.must_not(A, Command::Attach(None));
    w.settle();
    w.check_synced();
}

/// `down` answers on both nodes, the second one alone, and nothing has to be resynced afterwards.
#[test]
fn down_answers_and_up_again_needs_no_resync() {
    let mut w = World::new(12, Setup::default());
    w.start_synced();
    w.write(A, 0, 64, 64);
    for n in [A, B] {
        w.must(n, Command::Down { holder: None, force: false });
        assert!(w.nodes[n].is_stopped, "node {n} has ended");
    }
    w.up_both();
    w.wait_synced();
    for n in [A, B] {
        assert_eq!(w.status(n).volumes[0].received_kib, 0, "node {n} resynced something");
    }
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
}

/// Disconnect and connect again by the operator, with writes in between.
#[test]
fn disconnect_write_connect_syncs_the_difference() {
    let mut w = World::new(13, Setup::default());
    w.start_synced();
    w.must(B, Command::Disconnect { force: false });
    w.run_until("A has noticed", Span::from_secs(5), |w| w.conn(A) < Conn::Connected);
    w.write(A, 0, 800, 16);
    w.settle();
    w.check_quiet();
    w.must(A, Command::Disconnect { force: false });
    assert_eq!(w.conn(A), Conn::StandAlone);
    for n in [A, B] {
        w.must(n, Command::Connect { discard_my_data: false });
    }
    w.wait_synced();
    assert_eq!(w.status(B).volumes[0].received_kib, 8);
}

/// Discards and zeroes leave the same bytes on both sides, also at odd addresses (ORD-8).
#[test]
fn discards_and_zeroes_are_mirrored() {
    let mut w = World::new(14, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.write(A, 0, 128, 128);
    for op in
        [HostOp::Discard, HostOp::WriteZeroes { unmap: true }, HostOp::WriteZeroes { unmap: false }]
    {
        assert_eq!(w.request(A, 0, op, area(3, 30)), Ok(()));
        assert_eq!(w.request(A, 0, op, area(120, 16)), Ok(()));
    }
    w.read_all(A, 0);
    w.settle();
    w.check_synced();
    assert!(w.packets_sent("P_TRIM") + w.packets_sent("P_ZEROES") >= 6);
}

/// Two volumes of one resource share the connection and nothing else.
#[test]
fn two_volumes_are_mirrored() {
    let mut w = World::new(15, Setup::with(Setup::second_volume));
    w.start_synced();
    let load = Load { volumes: 2, ..Load::mixed(vec![area(0, 400)]) };
    w.start_load(A, load);
    w.run_for(Span::from_secs(2));
    w.drain(A);
    w.settle();
    w.check_synced();
    w.read_all(A, 0);
    w.read_all(A, 1);
    w.must(A, Command::Secondary { holder: None });
    w.must(B, Command::Primary { force: false });
    w.read_all(B, 0);
    w.read_all(B, 1);
}

/// More extents in use than the activity log holds (AL-8), and external metadata.
#[test]
fn a_small_activity_log_serves_many_extents() {
    let setup = Setup::with(|s| {
        s.size(160 * MIB);
        s.external_meta(4096);
        s.disk(|disk| disk.al_extents = 4);
    });
    let mut w = World::new(16, setup);
    w.start_synced();
    let areas = (0..40).map(|extent| area(extent * 8192, 64)).collect();
    w.start_load(A, Load { depth: 8, ..Load::mixed(areas) });
    w.run_for(Span::from_secs(4));
    w.drain(A);
    w.settle();
    w.check_synced();
    assert!(w.status(A).volumes[0].al_writes > 100, "the log was turned over");
}

/// A write across the border of two extents with a log of two slots.
#[test]
fn a_write_across_extents_fits_into_two_slots() {
    let setup = Setup::with(|s| s.disk(|disk| disk.al_extents = 2));
    let mut w = World::new(17, setup);
    w.start_synced();
    w.write(A, 0, 8192 - 8, 16);
    w.write(A, 0, 0, 8);
    w.write(A, 0, 8192 - 3, 7);
    w.settle();
    w.check_synced();
}

/// A flush in protocol C waits until the peer is durable too (DUR-1): nothing of what was
/// acknowledged before it is lost when both nodes lose power.
#[test]
fn a_flush_makes_both_nodes_durable() {
    let mut w = World::new(18, Setup::default());
    w.start_synced();
    for at in 0..10 {
        w.write(A, 0, at * 8, 8);
    }
    w.flush(A, 0);
    let volatile = |w: &World, n: usize| {
        let sectors = 0..80;
        let disk = &w.nodes[n].backing[0].data;
        sectors.filter(|sector| !disk.is_durable(*sector)).count()
    };
    assert_eq!((volatile(&w, A), volatile(&w, B)), (0, 0));
}

/// The same run twice gives the same trace, another seed another one (LV-4).
#[test]
fn the_seed_decides_everything() {
    let run = |seed| {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.start_load(A, Load::mixed(vec![area(0, 400)]));
        w.run_for(Span::from_ms(500));
        (w.trace.hash(), w.trace.count())
    };
    assert_eq!(run(19), run(19));
    assert_ne!(run(19), run(20));
}

/// The status command answers at once and names both nodes' states.
#[test]
fn status_tells_the_state() {
    let mut w = World::new(21, Setup::default());
    w.start_synced();
    let reply = w.ask(A, Command::Status).unwrap();
    let Reply::Status(status) = reply else { panic!("{reply:?}") };
    assert_eq!(status.role, "Primary");
    assert_eq!(status.peer_role, "Secondary");
    assert_eq!(status.connection, "Connected");
    assert_eq!(status.volumes[0].disk, "UpToDate");
    assert_eq!(status.volumes[0].peer_disk, "UpToDate");
    assert_eq!(status.agreed_version, 101);
}

/// A Primary that went down without its peer says so when it is up again, until they meet; one
/// that went down connected does not: the limits of a wait depend on it.
#[test]
fn a_node_knows_that_it_was_degraded() {
    let degraded = |w: &World, n| w.status(n).volumes[0].was_degraded;
    let mut w = World::new(31, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.kill(A);
    w.cut();
    w.restart(A);
    assert!(!degraded(&w, A), "the peer was there");
    w.heal();
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.kill(B);
    w.run_until("A is alone", Span::from_secs(20), |w| w.conn(A) < Conn::Connected);
    w.write(A, 0, 100, 8);
    w.kill(A);
    w.restart(A);
    assert!(degraded(&w, A), "it was Primary alone");
    w.restart(B);
    w.wait_synced();
    assert!(!degraded(&w, A) && !degraded(&w, B), "they have met");
}

/// The target of a resync tells the speed that it asks for; the source follows.
#[test]
fn the_wanted_speed_is_told() {
    let mut w = World::new(32, Setup::with(|s| s.size(64 * MIB)));
    w.up_both();
    w.must(A, Command::Primary { force: true });
    let want = |w: &World, n: usize| w.status(n).volumes[0].resync.as_ref().map(|r| r.want_kib);
    let is_under_way = |w: &mut World| want(w, B).is_some_and(|kib| kib > 0);
    w.run_until("the target asks for blocks", Span::from_secs(20), is_under_way);
    assert!(want(&w, B).is_some_and(|kib| kib <= 102_400), "c-max-rate: {:?}", want(&w, B));
    assert_eq!(want(&w, A), Some(0), "the target sets the pace");
    w.wait_synced();
}
