//! Recorded failures 1 to 6, 10 to 14 and 22: requests, order, marks and generations.
//!
//! The history of the in-tree driver is the best list of tests there is. Each failure that was
//! recorded there is replayed here under its number; tests/README.md has the list.

use replication_core::action::Handler;
use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::resource::ConfigError;
use replication_core::state::{Conn, Disk, Fencing, OnNoData, Role};
use replication_core::units::{Errno, SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

fn slow() -> Setup {
    Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400))
}

fn fail_once(w: &mut World, n: usize, kind: Kind) {
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind, range: None, times: Some(1), trouble };
    let backing = &mut w.nodes[n].backing[0];
    match kind {
        Kind::Read | Kind::Write | Kind::Flush => backing.data.add_fault(fault),
        Kind::MetaRead | Kind::MetaWrite => backing.meta_disk_mut().add_fault(fault),
    }
}

fn is_zero(w: &World, n: usize, range: SectorRange) -> bool {
    let disk = &w.nodes[n].backing[0].data;
    (range.start..range.end).all(|sector| disk.sector(sector).iter().all(|byte| *byte == 0))
}

/// A Primary that is the target of a resync and loses its source must not go on alone: its own
/// disk is no good copy (ACK-2, RD-2).
#[test]
fn recorded_01_a_primary_target_that_loses_its_source_stops() {
    let mut w = World::new(501, slow());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.must(A, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_until("the resync runs", Span::from_secs(5), |w| w.conn(A) == Conn::SyncTarget);
    w.read(A, 0, 8 * 1024, 8);
    w.cut();
    let write = w.submit(A, 0, HostOp::Write { fua: false }, area(8, 8)).unwrap();
    wait_alone(&mut w, A);
    assert_eq!(w.nodes[A].handlers, [Handler::PriOnInconDegr]);
    w.run_until("the answer", Span::from_secs(5), |w| w.answer(A, write).is_some());
    assert_eq!(w.answer(A, write), Some(Err(Errno::EIO)));
    assert_eq!(w.request(A, 0, HostOp::Read, area(8 * 1024, 8)), Err(Errno::EIO));
    assert_eq!(w.request(A, 0, HostOp::Flush, area(0, 0)), Err(Errno::EIO));
    let generation = w.status(A).volumes[0].uuids;
    w.heal();
    w.wait_synced();
    assert_eq!(generation[1], 0, "no generation was begun");
    w.read_all(A, 0);
}

/// A write that fails on the peer is marked in every protocol (BM-5).
#[test]
fn recorded_02_a_failed_write_of_the_peer_is_marked() {
    for protocol in [ReplicationProtocol::A, ReplicationProtocol::B, ReplicationProtocol::C] {
        let setup = Setup::with(|s| {
            s.protocol(protocol);
            s.disk(|disk| disk.on_io_error = OnIoError::PassOn);
        });
        let mut w = World::new(502, setup);
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
        w.nodes[B].backing[0].data.add_fault(fault);
        w.write(A, 0, 40, 16);
        w.settle();
        assert_eq!(w.status(A).volumes[0].out_of_sync_kib, 8, "protocol {protocol:?}");
        assert_ne!(w.state(A, 0).pdsk, Disk::UpToDate, "it is no good copy any more");
        w.kill(B);
        wait_alone(&mut w, A);
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The activity log, or a bitmap page of what leaves it, cannot be written: no data write follows,
/// the disk is given up under either policy, and a new attach forgets nothing (AL-4, MD-4).
#[test]
fn recorded_03_no_data_is_written_after_failed_metadata() {
    for policy in [OnIoError::PassOn, OnIoError::Detach] {
        let setup = Setup::with(|s| {
            s.disk(|disk| {
                disk.on_io_error = policy;
                disk.al_extents = 2;
            });
            s.size(40 * MIB);
        });
        let mut w = World::new(540, setup);
        w.start_synced();
        // Two extents fill the log; the third needs a transaction that evicts one.
        w.write(A, 0, 0, 8);
        w.write(A, 0, 8192, 8);
        w.settle();
        fail_once(&mut w, A, Kind::MetaWrite);
        let third = area(2 * 8192, 8);
        w.write(A, 0, third.start, third.sectors());
        assert!(is_zero(&w, A, third), "nothing went to the disk of a failed log");
        assert!(!is_zero(&w, B, third), "the peer has it");
        assert_eq!(w.state(A, 0).disk, Disk::Diskless);
        w.must(A, Command::Attach(None));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The same without a peer: the write is an error, and nothing of it is on the disk (AL-4, ACK-2).
#[test]
fn recorded_03_alone_a_failed_log_is_an_error() {
    let mut w = World::new(541, Setup::default());
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    w.settle();
    fail_once(&mut w, A, Kind::MetaWrite);
    let write = HostOp::Write { fua: false };
    assert_eq!(w.request(A, 0, write, area(8192, 8)), Err(Errno::EIO));
    assert!(is_zero(&w, A, area(8192, 8)));
    w.must(A, Command::Attach(None));
    w.restart(B);
    w.wait_synced();
}

/// Writes go on while a resync begins: whether each of them is mirrored or marked is decided once,
/// so none is neither (BM-6).
#[test]
fn recorded_04_no_write_slips_between_marked_and_mirrored() {
    let mut announced = 0;
    for seed in 550..560 {
        let setup = Setup::with(|s| {
            s.speed.jitter = Span(2_000_000);
            s.nodes[A].disk_time = (Span(20_000), Span(2_000_000));
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        let load = Load::writes(vec![area(0, 2 * MIB)]);
        let load = Load { think: Span(100_000), depth: 8, ..load };
        w.start_load(A, load.clone());
        w.run_for(Span::from_ms(10));
        w.drain(A);
        w.heal();
        let limit = Span::from_secs(60);
        w.run_until("they meet", limit, |w| w.conn(A) >= Conn::WFReportParams);
        w.start_load(A, load);
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
        announced += w.packets_sent("P_OUT_OF_SYNC");
    }
    assert!(announced > 0, "some writes came between the bitmaps and the resync");
}

/// A mirrored write that has to wait for a resync write of the same block is unfinished: its
/// barrier is not acknowledged and nothing of the next epoch is written (ORD-2).
#[test]
fn recorded_05_a_parked_write_holds_its_epoch_open() {
    let setup = Setup::with(|s| {
        s.protocol(ReplicationProtocol::A);
        s.disk(|disk| disk.rate.max_rate_kib = 4_000);
        s.net(|net| net.ko_count = 0);
    });
    let mut w = World::new(542, setup);
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    for at in 0..32 {
        w.write(A, 0, at * 64, 64);
    }
    let trouble = Trouble::Stick;
    let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
    w.nodes[B].backing[0].data.add_fault(fault);
    w.restart(B);
    let stuck = |w: &mut World| w.nodes[B].writes_under_way(0).next();
    w.run_until("a resync write", Span::from_secs(60), |w| stuck(w).is_some());
    w.run_for(Span::from_ms(20));
    let parked = stuck(&mut w).expect("it hangs");
    w.run_for(Span::from_ms(100));
    let acks = w.packets_sent("P_BARRIER_ACK");
    w.write(A, 0, parked.start, parked.sectors().min(8));
    let later = area(6 * MIB, 8);
    w.write(A, 0, later.start, later.sectors());
    w.run_for(Span::from_secs(2));
    assert_eq!(w.packets_sent("P_BARRIER_ACK"), acks, "the epoch is not finished");
    assert!(is_zero(&w, B, later), "a later epoch overtook a parked write");
    w.heal_disks(B);
    w.wait_synced();
    assert!(!is_zero(&w, B, later));
    w.read_all(A, 0);
}

/// What begins and ends being mirrored in the middle of an epoch is never counted wrongly, and no
/// barrier of a lost connection reaches the next one (ORD-3, ORD-7).
#[test]
fn recorded_06_epochs_are_counted_rightly_across_connections() {
    for protocol in [ReplicationProtocol::A, ReplicationProtocol::C] {
        let mut w = World::new(543, Setup::with(|s| s.protocol(protocol)));
        w.start_synced();
        let load = Load { think: Span(100_000), ..Load::mixed(vec![area(0, MIB)]) };
        let load = Load { flushes: 20, ..load };
        for round in 0..9 {
            w.start_load(A, load.clone());
            w.run_for(Span(7_000_000 + round * 1_300_000));
            match round % 3 {
                0 => w.net.reset_all(w.now),
                1 => w.must(B, Command::Disconnect { force: false }),
                _ => {
                    w.must(B, Command::Detach { volume: None, force: false });
                    w.disk_failed(B, 0);
                    w.run_for(Span::from_ms(20));
                    w.must(B, Command::Attach(None));
                }
            }
            w.run_for(Span::from_ms(50));
            w.stop_load(A);
            if w.conn(B) == Conn::StandAlone {
                w.must(B, Command::Connect { discard_my_data: false });
            }
            if w.conn(A) == Conn::StandAlone {
                w.must(A, Command::Connect { discard_my_data: false });
            }
            w.wait_connected();
        }
        w.drain(A);
        w.wait_synced();
        for n in [A, B] {
            assert!(!w.has_logged(n, "barrier ack"), "node {n} met a wrong barrier");
            assert!(!w.has_logged(n, "broke the protocol"), "node {n}");
        }
        w.read_all(A, 0);
    }
}

/// A read of many blocks of which one cannot be read is an error as a whole: what could be read
/// does not hide it (ACK-4). With a good peer the whole of it comes from there (RD-3).
#[test]
fn recorded_10_an_error_in_a_part_is_an_error_of_the_whole() {
    let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = OnIoError::PassOn));
    let mut w = World::new(544, setup);
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.settle();
    for bad in [0, 64, 127] {
        let trouble = Trouble::Fail(Errno::EIO);
        let range = Some(area(bad, 1));
        let fault = Fault { kind: Kind::Read, range, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        w.read(A, 0, 0, 128);
    }
    w.kill(B);
    wait_alone(&mut w, A);
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Read, range: Some(area(64, 1)), times: Some(1), trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
    assert_eq!(w.request(A, 0, HostOp::Read, area(0, 128)), Err(Errno::EIO));
}

/// Discards at odd addresses and lengths leave zeroes in all that they cover and touch nothing
/// else, on both nodes, whatever granule the backends have (ORD-8).
#[test]
fn recorded_11_discards_leave_the_same_on_both_sides() {
    let mut w = World::new(545, Setup::default());
    w.start_synced();
    for (start, sectors) in [(0, 8), (1, 1), (7, 2), (9, 30), (63, 129), (200, 56)] {
        w.write(A, 0, 0, 256);
        assert_eq!(w.request(A, 0, HostOp::Discard, area(start, sectors)), Ok(()));
        w.settle();
        for n in [A, B] {
            assert!(is_zero(&w, n, area(start, sectors)), "node {n}: {start}+{sectors}");
            for edge in [start.checked_sub(1), Some(start + sectors)].into_iter().flatten() {
                let is_inside = edge < 256;
                assert!(!is_inside || !is_zero(&w, n, area(edge, 1)), "node {n}: sector {edge}");
            }
        }
        w.check_equal(0);
    }
    w.read_all(A, 0);
    w.check_synced();
}

/// Requests that wait for a good copy fail once the policy is changed to errors (ACK-3).
#[test]
fn recorded_12_frozen_requests_fail_when_the_policy_changes() {
    let setup = Setup::with(|s| {
        for node in &mut s.nodes {
            node.config.on_no_data = OnNoData::SuspendIo;
        }
    });
    let mut w = World::new(503, setup);
    w.start_synced();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.cut();
    wait_alone(&mut w, A);
    let write = w.submit(A, 0, HostOp::Write { fua: false }, area(8, 8)).unwrap();
    let read = w.submit(A, 0, HostOp::Read, area(0, 8)).unwrap();
    let flush = w.submit(A, 0, HostOp::Flush, area(0, 0)).unwrap();
    w.run_for(Span::from_secs(3));
    assert_eq!(w.nodes[A].host.outstanding(), 3);
    let mut resource = w.nodes[A].setup.config.clone();
    resource.on_no_data = OnNoData::IoError;
    let command = w.adjust(A, resource);
    w.must(A, command);
    w.run_for(Span::from_secs(1));
    for request in [write, read, flush] {
        assert_eq!(w.answer(A, request), Some(Err(Errno::EIO)));
    }
}

/// The peer comes back without its disk: what is written now has a generation of its own, which is
/// durable before anything of it is acknowledged (GI-1).
#[test]
fn recorded_13_a_peer_that_lost_its_disk_begins_a_generation() {
    for connected in [true, false] {
        let mut w = World::new(546, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 8);
        w.settle();
        let before = w.status(A).volumes[0].uuids;
        if !connected {
            w.must(B, Command::Disconnect { force: false });
            w.must(B, Command::Detach { volume: None, force: false });
            w.disk_failed(B, 0);
            w.must(B, Command::Connect { discard_my_data: false });
            if w.conn(A) == Conn::StandAlone {
                w.must(A, Command::Connect { discard_my_data: false });
            }
            w.wait_connected();
        } else {
            w.must(B, Command::Detach { volume: None, force: false });
            w.disk_failed(B, 0);
        }
        w.run_until("A knows", Span::from_secs(5), |w| w.state(A, 0).pdsk == Disk::Diskless);
        w.write(A, 0, 80, 8);
        let after = w.status(A).volumes[0].uuids;
        assert_ne!(after[0] | 1, before[0] | 1, "a new generation");
        assert_eq!(after[1] | 1, before[0] | 1, "it begins at the one that both have");
        // Durable: a crash at once does not forget it.
        w.power_cut(A, Cut::LoseAll);
        let on_disk = w.on_disk(A, 0).unwrap().superblock.uuids;
        assert_eq!(on_disk.current | 1, after[0] | 1);
        wait_alone(&mut w, B);
        w.restart(A);
        w.wait_connected();
        w.must(B, Command::Attach(None));
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

/// What needs a fence-peer handler refuses to run rather than to go on unfenced (ST-6): freezing
/// until the handler answers, the rest of this record, cannot be configured.
#[test]
fn recorded_13_fencing_is_refused() {
    let world = World::new(547, Setup::default());
    for found in [Fencing::ResourceOnly, Fencing::ResourceAndStonith] {
        let mut config = world.nodes[A].setup.config.clone();
        config.net.fencing = found;
        let memory = replication_core::resource::Memory {
            first_pool_page: 256,
            pool_pages: 1024,
            queue_depth: 8,
        };
        let entropy = Box::new(tests::sim::rng::Rng::new(1));
        let refusal = replication_core::resource::Resource::new(config, memory, entropy);
        assert_eq!(refusal.err(), Some(ConfigError::Fencing { found }));
    }
}

/// The flag that asks for recovery is there as long as a crash needs it: a Primary that is being
/// demoted dies at many moments (AL-10).
#[test]
fn recorded_14_the_crash_flag_outlives_every_write() {
    for step in 0..24 {
        let protocol = if step % 2 == 0 { ReplicationProtocol::A } else { ReplicationProtocol::C };
        let setup = Setup::with(|s| {
            s.protocol(protocol);
            s.nodes[B].disk_time = (Span(20_000), Span(5_000_000));
        });
        let mut w = World::new(580 + step, setup);
        w.start_synced();
        let load = Load::writes(vec![area(0, 400), area(3 * MIB, 400)]);
        w.start_load(A, Load { think: Span(100_000), depth: 8, ..load });
        w.run_for(Span::from_ms(20));
        w.drain(A);
        w.tell(A, Command::Secondary { holder: None });
        w.run_for(Span(step * 300_000));
        // The check of the crash holds down that its disk knows every difference (BM-2).
        w.power_cut(A, Cut::LoseAll);
        w.restart(A);
        w.wait_synced();
    }
}

/// With the activity log switched off, the window of a crash is everything (AL-9).
#[test]
fn recorded_14_without_a_log_a_crash_marks_everything() {
    let mut w = World::new(548, Setup::with(|s| s.disk(|disk| disk.al_updates = false)));
    w.start_synced();
    w.start_load(A, Load::writes(vec![area(0, 400)]));
    w.run_for(Span::from_ms(200));
    w.kill(A);
    let on_disk = w.on_disk(A, 0).unwrap();
    assert!(on_disk.covers(0) && on_disk.covers(1000), "every block counts as different");
    w.restart(A);
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib;
    assert!(copied >= 8000, "{copied} KiB");
}

/// Two Primaries are refused (ST-1): conflicts of two writers, which several of the records are
/// about, cannot happen.
#[test]
fn recorded_05_two_primaries_are_refused() {
    let mut w = World::new(549, Setup::default());
    w.start_synced();
    let refusal = w.must_not(B, Command::Primary { force: false });
    assert!(refusal.code < 0, "{refusal:?}");
    w.must_not(B, Command::Primary { force: true });
    assert_eq!((w.state(A, 0).role, w.state(B, 0).role), (Role::Primary, Role::Secondary));
}

/// Protocol A: what an idle Primary has sent reaches the disk of the other, and extents leave the
/// log although no further write comes (AL-8).
#[test]
fn recorded_22_an_idle_primary_leaves_nothing_open() {
    let setup = Setup::with(|s| {
        s.protocol(ReplicationProtocol::A);
        s.disk(|disk| disk.al_extents = 2);
    });
    let mut w = World::new(506, setup);
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.write(A, 0, 8192, 8);
    w.settle();
    w.power_cut(B, Cut::LoseAll);
    wait_alone(&mut w, A);
    let marked = w.status(A).volumes[0].out_of_sync_kib;
    assert_eq!(marked, 0, "both writes were durable on the peer");
    w.restart(B);
    w.wait_synced();
    w.write(A, 0, 100, 8);
    w.settle();
    w.check_synced();
}
