//! Failures that replication drivers are known to have had, each as a scenario.

use replication_core::config::{EngineConfig, Frontend, NbdAddress, OnIoError};
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk, OnNoData};
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

/// A Primary that is the target of a resync and loses its source must not go on alone: its own
/// disk is no good copy (ACK-2, RD-2).
#[test]
fn a_primary_target_that_loses_its_source_stops() {
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
fn a_failed_write_of_the_peer_is_marked() {
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

/// Requests that wait for a good copy fail once the policy is changed to errors (ACK-3).
#[test]
fn frozen_requests_fail_when_the_policy_changes() {
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
    let config = EngineConfig {
        resource,
        node: String::from("alpha"),
        backing: Vec::new(),
        local: "127.0.0.1:7788".parse().unwrap(),
        remote: "127.0.0.1:7789".parse().unwrap(),
        frontend: Frontend::Nbd(NbdAddress::Unix(String::from("nbd"))),
        queue_depth: 8,
        max_io_size: 1 << 17,
        run_dir: String::new(),
    };
    w.must(A, Command::Adjust(Box::new(config)));
    w.run_for(Span::from_secs(1));
    for request in [write, read, flush] {
        assert_eq!(w.answer(A, request), Some(Err(Errno::EIO)));
    }
}

/// The link is cut at many moments around the end of a resync: the next handshake puts right what
/// the last messages did not say, without forgetting a difference (GI-7).
#[test]
fn the_last_message_of_a_resync_may_be_lost() {
    for step in 0..30 {
        let mut w = World::new(504, Setup::default());
        w.start_synced();
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.write(A, 0, 0, 64);
        w.settle();
        w.heal();
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        w.run_for(Span(step * 150_000));
        w.cut();
        w.run_for(Span::from_secs(5));
        w.check_quiet();
        w.write(A, 0, 1000, 8);
        w.settle();
        w.heal();
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The device grows while the peer's disk is away: when it is back, the new part and what was
/// missed are synced, no less (BM-8).
#[test]
fn a_device_grown_while_a_disk_was_away() {
    let mut w = World::new(505, Setup::with(|s| s.external_meta(2048)));
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(B, Command::Disconnect { force: false });
    wait_alone(&mut w, A);
    for n in [A, B] {
        w.nodes[n].backing[0].data.grow(12 * MIB);
    }
    w.must(B, Command::Detach { volume: None, force: false });
    w.disk_failed(B, 0);
    let resize = Command::Resize {
        volume: None,
        size: None,
        assume_clean: false,
        assume_peer_has_space: true,
    };
    w.must(A, resize);
    let size = w.nodes[A].sizes[0];
    assert_eq!(size, 12 * MIB);
    w.write(A, 0, size - 64, 64);
    w.must(B, Command::Attach(None));
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_synced();
    assert_eq!(w.nodes[B].sizes[0], size);
    w.check_equal(0);
    w.read_all(A, 0);
}

/// Protocol A: what an idle Primary has sent reaches the disk of the other, and extents leave the
/// log although no further write comes (AL-8).
#[test]
fn an_idle_primary_leaves_nothing_open() {
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

/// A Primary loses its peer under load and then its power: no write was acknowledged before the
/// new generation was on disk (GI-1), or both nodes would take themselves for equal.
#[test]
fn a_new_generation_is_durable_before_lone_writes_are_acknowledged() {
    for step in 0..16 {
        let mut w = World::new(530 + step, Setup::default());
        w.start_synced();
        w.start_load(A, Load { think: Span(50_000), ..Load::writes(vec![area(0, 2048)]) });
        w.run_for(Span::from_ms(50));
        w.kill(B);
        wait_alone(&mut w, A);
        w.run_for(Span(step * 50_000));
        // The check of the crash holds this down.
        w.power_cut(A, Cut::LoseAll);
        w.restart(A);
        w.restart(B);
        w.wait_synced();
    }
}

/// Writes overtake a running resync in both directions of time: the newer data stays (RS-2).
#[test]
fn writes_during_resync_stay() {
    for seed in 510..512 {
        let mut w = World::new(seed, slow());
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        for at in 0..32 {
            w.write(A, 0, at * 64, 64);
        }
        w.restart(B);
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(A) == Conn::SyncSource);
        let load = Load { think: Span(1_000_000), depth: 8, ..Load::mixed(vec![area(0, 2048)]) };
        w.start_load(A, load);
        w.run_for(Span::from_secs(2));
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A resync that is paused by hand tracks what is written meanwhile (BM-1, RS-4).
#[test]
fn a_paused_resync_tracks_writes() {
    let mut w = World::new(520, slow());
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    for at in 0..32 {
        w.write(A, 0, at * 64, 64);
    }
    w.restart(B);
    w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
    w.must(B, Command::PauseSync(true));
    w.run_until("the pause", Span::from_secs(5), |w| w.conn(A) == Conn::PausedSyncS);
    w.write(A, 0, 0, 128);
    w.write(A, 0, 5 * MIB, 128);
    w.run_for(Span::from_secs(5));
    assert_eq!(w.conn(B), Conn::PausedSyncT);
    w.must(B, Command::PauseSync(false));
    w.wait_synced();
    w.read_all(A, 0);
}
