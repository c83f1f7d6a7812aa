//! Scripted runs with faults of nodes and of the link.

use replication_core::action::Handler;
use replication_core::control::Command;
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::{SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn hot_areas() -> Vec<SectorRange> {
    vec![area(0, 200), area(3 * MIB, 300), area(5 * MIB + 17, 99)]
}

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

/// The link is cut silently under load: the host waits no longer than the ping allows (WP-6),
/// goes on alone, and after the cut only what was written meanwhile is copied (RS-1).
#[test]
fn a_cut_link_costs_a_bounded_pause_and_a_small_resync() {
    let mut w = World::new(101, Setup::default());
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_ms(300));
    w.cut();
    w.run_for(Span::from_secs(6));
    assert!(w.conn(A) < Conn::Connected && w.conn(B) < Conn::Connected);
    let net = w.nodes[A].setup.config.net.clone();
    let bound = net.ping_int.0 + net.ping_timeout.0 + Span::from_ms(200).0;
    let slowest = w.nodes[A].host.slowest;
    assert!(slowest.0 <= bound, "a request took {} ms", slowest.as_ms());
    w.drain(A);
    w.settle();
    w.check_quiet();
    let changed = w.status(A).volumes[0].out_of_sync_kib;
    assert!(changed > 0, "something was written alone");
    let before = w.status(B).volumes[0].received_kib;
    w.heal();
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib - before;
    assert_eq!(copied, changed, "no more and no less is copied");
    w.read_all(A, 0);
}

/// The peer's disk hangs while its pings are answered: `timeout` x `ko-count` bounds the host.
#[test]
fn a_hanging_peer_is_given_up() {
    let setup = Setup::with(|s| {
        s.net(|net| {
            net.timeout = Span::from_ms(500);
            net.ko_count = 4;
        });
    });
    let mut w = World::new(102, setup);
    w.start_synced();
    let stuck = Fault { kind: Kind::Write, range: None, times: None, trouble: Trouble::Stick };
    w.nodes[B].backing[0].data.add_fault(stuck);
    w.start_load(A, Load::writes(hot_areas()));
    w.run_for(Span::from_secs(5));
    let slowest = w.nodes[A].host.slowest;
    assert!(slowest >= Span::from_secs(2), "{} ms", slowest.as_ms());
    assert!(slowest <= Span::from_ms(2_600), "{} ms", slowest.as_ms());
    w.drain(A);
    w.heal_disks(B);
    w.wait_synced();
    w.read_all(A, 0);
}

fn secondary_returns(seed: u64, power: Option<Cut>) {
    let mut w = World::new(seed, Setup::default());
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_ms(400));
    match power {
        Some(cut) => w.power_cut(B, cut),
        None => w.kill(B),
    }
    w.run_for(Span::from_secs(5));
    w.restart(B);
    w.run_for(Span::from_secs(3));
    w.drain(A);
    w.wait_synced();
    assert_eq!(w.nodes[A].host.errors, 0, "the host has seen nothing of it");
    w.read_all(A, 0);
}

/// The Secondary dies under load and comes back.
#[test]
fn a_killed_secondary_returns() {
    secondary_returns(103, None);
}

/// The same with what its disk had not flushed lost.
#[test]
fn a_secondary_without_power_returns() {
    secondary_returns(104, Some(Cut::LoseAll));
    secondary_returns(105, Some(Cut::Mixed));
}

fn primary_returns(seed: u64, protocol: ReplicationProtocol, power: Option<Cut>) {
    let mut w = World::new(seed, Setup::with(|s| s.protocol(protocol)));
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_ms(400));
    match power {
        Some(cut) => w.power_cut(A, cut),
        None => w.kill(A),
    }
    wait_alone(&mut w, B);
    w.settle();
    if protocol == ReplicationProtocol::C {
        w.check_contents(B, 0);
    } else {
        w.ledger.doubt_unsettled(0);
    }
    w.must(B, Command::Primary { force: false });
    w.read_all(B, 0);
    w.start_load(B, Load::mixed(hot_areas()));
    w.run_for(Span::from_secs(1));
    w.restart(A);
    w.run_for(Span::from_secs(3));
    w.drain(B);
    w.wait_synced();
    assert_eq!((w.state(A, 0).role, w.state(B, 0).role), (Role::Secondary, Role::Primary));
    w.read_all(B, 0);
    assert!(w.has_logged(A, "based on AL"), "the activity log was applied (AL-5)");
}

/// The Primary dies under load; the other node takes over with everything that was acknowledged
/// (DUR-5), and the old one comes back as target (GI-10).
#[test]
fn a_killed_primary_returns_as_target() {
    primary_returns(106, ReplicationProtocol::C, None);
    primary_returns(107, ReplicationProtocol::B, None);
    primary_returns(108, ReplicationProtocol::A, None);
}

/// The same with what its disk had not flushed lost (AL-3, AL-7).
#[test]
fn a_primary_without_power_returns_as_target() {
    primary_returns(109, ReplicationProtocol::C, Some(Cut::LoseAll));
    primary_returns(110, ReplicationProtocol::C, Some(Cut::Mixed));
}

/// A crashed Primary becomes Primary again, with the peer still there.
#[test]
fn a_killed_primary_goes_on_as_primary() {
    let mut w = World::new(111, Setup::default());
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_ms(400));
    w.kill(A);
    w.restart(A);
    w.wait_connected();
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
    w.write(A, 0, 0, 8);
    w.settle();
    w.check_synced();
}

/// Both nodes lose power: what was flushed is there (DUR-1, T3).
#[test]
fn both_nodes_lose_power() {
    for seed in 112..120 {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.start_load(A, Load { flushes: 20, ..Load::mixed(hot_areas()) });
        w.run_for(Span::from_ms(400));
        w.power_cut(A, Cut::Mixed);
        w.power_cut(B, Cut::Mixed);
        w.ledger.doubt_unflushed(0);
        w.restart(A);
        w.restart(B);
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

/// A resync that is cut off goes on with what is left (RS-3).
#[test]
fn an_interrupted_resync_goes_on() {
    let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400));
    let mut w = World::new(121, setup);
    w.start_synced();
    w.cut();
    wait_alone(&mut w, A);
    for at in 0..128 {
        w.write(A, 0, at * 32, 16);
    }
    w.settle();
    let changed = w.status(A).volumes[0].out_of_sync_kib;
    assert_eq!(changed, 128 * 8);
    w.heal();
    let limit = Span::from_secs(60);
    let left = |w: &World| w.status(B).volumes[0].out_of_sync_kib;
    w.run_until("half of it is copied", limit, |w| {
        w.conn(B) == Conn::SyncTarget && left(w) < changed / 2
    });
    let received = w.status(B).volumes[0].received_kib;
    w.cut();
    wait_alone(&mut w, A);
    wait_alone(&mut w, B);
    w.settle();
    w.check_quiet();
    assert_eq!(w.state(B, 0).disk, Disk::Inconsistent);
    w.heal();
    w.wait_synced();
    let total = w.status(B).volumes[0].received_kib;
    let again = total - received;
    assert!(again <= changed / 2 + 256, "{again} KiB were copied after the cut");
}

/// The target of a resync dies in the middle (RS-3).
#[test]
fn a_resync_survives_the_targets_death() {
    for (seed, cut) in [(122, None), (123, Some(Cut::LoseAll)), (124, Some(Cut::Mixed))] {
        let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        for at in 0..64 {
            w.write(A, 0, at * 64, 32);
        }
        w.restart(B);
        let limit = Span::from_secs(60);
        w.run_until("half of it is copied", limit, |w| {
            w.conn(B) == Conn::SyncTarget && w.status(B).volumes[0].out_of_sync_kib < 512
        });
        match cut {
            Some(cut) => w.power_cut(B, cut),
            None => w.kill(B),
        }
        wait_alone(&mut w, A);
        w.settle();
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The source of a resync dies in the middle (RS-3).
#[test]
fn a_resync_survives_the_sources_death() {
    for (seed, cut) in [(125, None), (126, Some(Cut::LoseAll)), (127, Some(Cut::Mixed))] {
        let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        for at in 0..64 {
            w.write(A, 0, at * 64, 32);
        }
        w.flush(A, 0);
        w.restart(B);
        let limit = Span::from_secs(60);
        w.run_until("half of it is copied", limit, |w| {
            w.conn(B) == Conn::SyncTarget && w.status(B).volumes[0].out_of_sync_kib < 512
        });
        match cut {
            Some(cut) => w.power_cut(A, cut),
            None => w.kill(A),
        }
        wait_alone(&mut w, B);
        w.settle();
        w.must_not(B, Command::Primary { force: false });
        w.restart(A);
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

fn split_brain(w: &mut World) {
    w.start_synced();
    w.write(A, 0, 0, 32);
    w.cut();
    wait_alone(w, A);
    wait_alone(w, B);
    w.write(A, 0, 8, 8);
    w.must(B, Command::Primary { force: false });
    w.stale[A][0] = true;
    w.stale[B][0] = true;
    w.must(A, Command::Secondary { holder: None });
    w.heal();
}

/// Both nodes wrote alone: both find the split brain, say so and stay alone (GI-6); the operator
/// chooses the victim, and afterwards both are equal.
#[test]
fn split_brain_is_found_on_both_sides_and_healed_by_hand() {
    let mut w = World::new(128, Setup::default());
    split_brain(&mut w);
    w.write(B, 0, 1000, 8);
    let limit = Span::from_secs(60);
    w.run_until("both stand alone", limit, |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, "Split-Brain detected"), "node {n} says so");
        assert!(w.status(n).split_brain, "node {n} shows it");
        let told = std::mem::take(&mut w.nodes[n].handlers);
        assert_eq!(told, [Handler::InitialSplitBrain, Handler::SplitBrain], "node {n} tells it");
    }
    w.must_not(B, Command::Connect { discard_my_data: true });
    w.must(A, Command::Connect { discard_my_data: true });
    w.must(B, Command::Connect { discard_my_data: false });
    // What A wrote alone is thrown away with the operator's consent.
    w.ledger.forget(0, area(8, 8));
    w.wait_synced();
    assert_eq!(w.nodes[A].handlers, [Handler::InitialSplitBrain, Handler::AfterResyncTarget]);
    assert_eq!(w.nodes[B].handlers, [Handler::InitialSplitBrain]);
    assert!(!w.status(A).split_brain && !w.status(B).split_brain);
    w.read_all(B, 0);
}

/// Bytes of a connection that is reset in the middle of everything are never half applied.
#[test]
fn resets_in_the_middle_of_everything() {
    let mut w = World::new(129, Setup::default());
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    for _ in 0..12 {
        let time = w.rng.between(20, 2_500);
        w.run_for(Span::from_ms(time));
        w.net.reset_all(w.now);
    }
    w.drain(A);
    w.wait_synced();
    w.read_all(A, 0);
}

/// One direction dies: both sides notice.
#[test]
fn one_dead_direction_is_noticed() {
    for towards in [A, B] {
        let mut w = World::new(130, Setup::default());
        w.start_synced();
        w.start_load(A, Load::mixed(hot_areas()));
        w.run_for(Span::from_ms(200));
        w.net.cut_towards(towards);
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.run_for(Span::from_secs(10));
        w.heal();
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The Primary dies at many points of a load: each time its disk knows every difference (BM-2,
/// AL-1 to AL-7), and the other node has everything.
#[test]
fn a_primary_may_die_at_any_point() {
    for point in 0..40 {
        let setup = Setup::with(|s| {
            s.size(64 * MIB);
            s.disk(|disk| disk.al_extents = 3);
        });
        let mut w = World::new(200 + point, setup);
        w.start_synced();
        let areas = (0..15).map(|extent| area(extent * 8192, 40)).collect();
        w.start_load(A, Load { most_sectors: 16, ..Load::mixed(areas) });
        w.run_for(Span(20_000_000 + point * 3_777_777));
        match point % 4 {
            0 => w.kill(A),
            1 => w.power_cut(A, Cut::LoseAll),
            _ => w.power_cut(A, Cut::Mixed),
        }
        wait_alone(&mut w, B);
        w.settle();
        w.check_contents(B, 0);
        w.restart(A);
        w.wait_synced();
    }
}
