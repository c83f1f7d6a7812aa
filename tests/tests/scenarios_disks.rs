//! Scripted runs with failing, missing and growing disks.

use replication_core::action::Handler;
use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::meta::al_journal::encode_initialised;
use replication_core::meta::{Page, Superblock};
use replication_core::state::{Conn, Disk, OnNoData, Role};
use replication_core::units::{Errno, Sector, SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::control::RESIZE;
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn hot_areas() -> Vec<SectorRange> {
    vec![area(0, 200), area(3 * MIB, 300), area(5 * MIB + 17, 99)]
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

/// The Secondary is detached and attached again: only what was missed is copied.
#[test]
fn a_detached_secondary_attaches_again() {
    let mut w = World::new(301, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(B, Command::Detach { volume: None, force: false });
    w.disk_failed(B, 0);
    assert_eq!(w.state(B, 0).disk, Disk::Diskless);
    w.run_until("A knows", Span::from_secs(5), |w| w.state(A, 0).pdsk == Disk::Diskless);
    w.write(A, 0, 640, 24);
    let before = w.status(B).volumes[0].received_kib;
    w.must(B, Command::Attach(None));
    w.wait_synced();
    assert_eq!(w.status(B).volumes[0].received_kib - before, 12);
    w.read_all(A, 0);
}

/// A Primary works on its peer's disk while its own is away.
#[test]
fn a_primary_without_disk_works_through_the_peer() {
    for protocol in [ReplicationProtocol::A, ReplicationProtocol::B, ReplicationProtocol::C] {
        let mut w = World::new(302, Setup::with(|s| s.protocol(protocol)));
        w.start_synced();
        w.start_load(A, Load::mixed(hot_areas()));
        w.run_for(Span::from_ms(300));
        w.must(A, Command::Detach { volume: None, force: false });
        w.disk_failed(A, 0);
        w.run_for(Span::from_ms(500));
        w.drain(A);
        assert_eq!(w.nodes[A].host.errors, 0, "the host has seen nothing of it");
        w.read_all(A, 0);
        w.must(A, Command::Attach(None));
        w.start_load(A, Load::mixed(hot_areas()));
        w.run_for(Span::from_secs(2));
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A node that never had a disk is Primary on the peer's.
#[test]
fn a_node_without_any_disk_is_primary() {
    let mut w = World::new(303, Setup::with(|s| s.diskless(A)));
    w.up_both();
    w.must(B, Command::Primary { force: true });
    w.must(B, Command::Secondary { holder: None });
    w.must(A, Command::Primary { force: false });
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_secs(1));
    w.drain(A);
    assert_eq!(w.nodes[A].host.errors, 0);
    w.read_all(A, 0);
    w.check_contents(B, 0);
}

/// Without a disk and without the peer requests fail, or wait if so configured (ACK-2).
#[test]
fn without_any_copy_requests_fail_or_wait() {
    for policy in [OnNoData::IoError, OnNoData::SuspendIo] {
        let setup = Setup::with(|s| {
            for node in &mut s.nodes {
                node.config.on_no_data = policy;
            }
        });
        let mut w = World::new(304, setup);
        w.start_synced();
        w.must(A, Command::Detach { volume: None, force: false });
        w.disk_failed(A, 0);
        w.write(A, 0, 0, 8);
        w.cut();
        w.run_until("the loss is noticed", Span::from_secs(10), |w| w.conn(A) < Conn::Connected);
        let write = w.submit(A, 0, HostOp::Write { fua: false }, area(8, 8)).unwrap();
        let read = w.submit(A, 0, HostOp::Read, area(0, 8)).unwrap();
        w.run_for(Span::from_secs(3));
        match policy {
            OnNoData::IoError => {
                assert_eq!(w.answer(A, write), Some(Err(Errno::EIO)));
                assert_eq!(w.answer(A, read), Some(Err(Errno::EIO)));
                w.heal();
                w.wait_connected();
            }
            OnNoData::SuspendIo => {
                assert_eq!((w.answer(A, write), w.answer(A, read)), (None, None));
                w.heal();
                w.wait_connected();
                w.drain(A);
                assert_eq!(w.answer(A, write), Some(Ok(())));
                assert_eq!(w.answer(A, read), Some(Ok(())));
            }
        }
        w.read_all(A, 0);
    }
}

/// A read error here is served by the peer, under all policies (RD-3).
#[test]
fn a_local_read_error_is_served_by_the_peer() {
    for policy in [OnIoError::Detach, OnIoError::PassOn, OnIoError::CallLocalIoError] {
        let mut w = World::new(305, Setup::with(|s| s.disk(|disk| disk.on_io_error = policy)));
        w.start_synced();
        w.write(A, 0, 0, 64);
        fail_once(&mut w, A, Kind::Read);
        w.read(A, 0, 0, 64);
        let found = w.state(A, 0).disk;
        match policy {
            OnIoError::Detach | OnIoError::CallLocalIoError => {
                assert!(found <= Disk::Failed, "{found}");
            }
            OnIoError::PassOn => assert!(found >= Disk::Inconsistent, "{found}"),
        }
        w.read_all(A, 0);
    }
}

/// An error on the way to any part of either disk is never seen by the host, and heals after a
/// new attach (ACK-1, DUR-4, MD-4, BM-5).
#[test]
fn one_disk_error_is_survived() {
    let kinds = [Kind::Read, Kind::Write, Kind::Flush, Kind::MetaWrite];
    for (seed, n) in [(310, A), (320, B)] {
        for (index, kind) in kinds.into_iter().enumerate() {
            let mut w = World::new(seed + index as u64, Setup::default());
            w.start_synced();
            w.start_load(A, Load::mixed(hot_areas()));
            w.run_for(Span::from_ms(100));
            fail_once(&mut w, n, kind);
            w.run_for(Span::from_secs(1));
            w.drain(A);
            assert_eq!(w.nodes[A].host.errors, 0, "{kind:?} of node {n}");
            w.heal_disks(n);
            w.read_all(A, 0);
            if w.state(n, 0).disk == Disk::Diskless {
                w.must(n, Command::Attach(None));
            }
            w.wait_synced();
            w.read_all(A, 0);
        }
    }
}

/// An error of any part of the disk runs the handler, once and on its own node, if so configured;
/// an operator who detaches does not.
#[test]
fn a_disk_error_runs_the_handler() {
    let handled = |policy: OnIoError, n: usize, kind: Option<Kind>| {
        let mut w = World::new(325, Setup::with(|s| s.disk(|disk| disk.on_io_error = policy)));
        w.start_synced();
        // The load begins with an empty activity log: that is metadata to write.
        match kind {
            Some(kind) => fail_once(&mut w, n, kind),
            None => w.must(n, Command::Detach { volume: None, force: false }),
        }
        w.start_load(A, Load::mixed(hot_areas()));
        w.run_for(Span::from_secs(1));
        w.drain(A);
        assert_eq!(w.nodes[A].host.errors, 0, "{policy:?} {kind:?} of node {n}");
        assert_eq!(w.nodes[1 - n].handlers, []);
        assert_eq!(w.state(n, 0).disk, Disk::Diskless, "{policy:?} {kind:?} of node {n}");
        std::mem::take(&mut w.nodes[n].handlers)
    };
    // A connected Secondary writes no metadata for the writes of its peer.
    let data = [Kind::Write, Kind::Flush];
    let all = [Kind::Write, Kind::Flush, Kind::MetaWrite];
    for (n, kinds) in [(A, &all[..]), (B, &data[..])] {
        for &kind in kinds {
            let ran = handled(OnIoError::CallLocalIoError, n, Some(kind));
            assert_eq!(ran, [Handler::LocalIoError], "{kind:?} of node {n}");
            assert_eq!(handled(OnIoError::Detach, n, Some(kind)), []);
        }
        assert_eq!(handled(OnIoError::CallLocalIoError, n, None), []);
    }
}

/// A write error that is passed on marks the block, and nothing is forgotten (ACK-1, BM-5).
#[test]
fn a_passed_on_write_error_marks_the_block() {
    for n in [A, B] {
        let policy = OnIoError::PassOn;
        let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = policy));
        let mut w = World::new(330, setup);
        w.start_synced();
        fail_once(&mut w, n, Kind::Write);
        w.write(A, 0, 40, 16);
        w.settle();
        w.read_all(A, 0);
        w.must(B, Command::Disconnect { force: false });
        w.run_until("A has noticed", Span::from_secs(5), |w| w.conn(A) < Conn::Connected);
        w.must(B, Command::Connect { discard_my_data: false });
        w.run_until("equal", Span::from_secs(60), |w| {
            w.is_synced() && w.is_quiet() && w.differing[0].is_empty()
        });
        w.read_all(A, 0);
    }
}

/// Both devices grow while in use; the new area is usable and synced (BM-8).
#[test]
fn devices_grow_online() {
    for external in [false, true] {
        let setup = Setup::with(|s| {
            if external {
                s.external_meta(2048);
            }
        });
        let mut w = World::new(332, setup);
        w.start_synced();
        w.write(A, 0, 0, 64);
        let before = w.nodes[A].sizes[0];
        for n in [A, B] {
            w.nodes[n].backing[0].data.grow(12 * MIB);
        }
        w.start_load(A, Load::mixed(hot_areas()));
        w.run_for(Span::from_ms(200));
        w.must(A, RESIZE);
        w.run_until("the new size", Span::from_secs(30), |w| {
            w.nodes[A].sizes[0] > before && w.nodes[B].sizes[0] > before
        });
        w.drain(A);
        let size = w.nodes[A].sizes[0];
        assert!(size >= 12 * MIB - 200 && size == w.nodes[B].sizes[0], "{size}");
        w.write(A, 0, size - 8, 8);
        w.wait_synced();
        w.read_all(A, 0);
        w.kill(B);
        w.kill(A);
        w.restart(A);
        w.restart(B);
        w.wait_synced();
        assert_eq!(w.nodes[B].sizes[0], size);
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

/// A peer without room for the new size keeps the size where it is, until it has room.
#[test]
fn one_grown_device_changes_nothing_until_both_have_grown() {
    let mut w = World::new(333, Setup::default());
    w.start_synced();
    let before = w.nodes[A].sizes[0];
    w.nodes[A].backing[0].data.grow(12 * MIB);
    // Whether it is refused or does nothing: the size stays.
    drop(w.ask(A, RESIZE));
    w.run_for(Span::from_secs(2));
    assert_eq!((w.nodes[A].sizes[0], w.nodes[B].sizes[0]), (before, before));
    w.write(A, 0, before - 8, 8);
    w.nodes[B].backing[0].data.grow(12 * MIB);
    w.must(A, RESIZE);
    w.run_until("the new size", Span::from_secs(30), |w| {
        w.nodes[A].sizes[0] > before && w.nodes[B].sizes[0] > before
    });
    w.wait_synced();
    w.read_all(A, 0);
}

/// Metadata that is torn, missing or foreign is refused, and nothing is written (MD-2).
#[test]
fn bad_metadata_is_refused() {
    let mut w = World::new(334, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    w.check_synced();
    for n in [A, B] {
        w.must(n, Command::Down { holder: None, force: false });
    }
    let geometry = w.nodes[B].setup.geometry(0, 8 * MIB, None).unwrap();
    let mut old = [0; 4096];
    w.nodes[B].backing[0].data.read(geometry.superblock.0, &mut old);
    w.nodes[B].backing[0].data.write(geometry.superblock.0, &[0x5a; 4096], true);
    let before = w.nodes[B].backing[0].data.flush_point();
    w.boot(B);
    let refusal = w.must_not(B, Command::Up);
    assert_eq!(refusal.code, 119, "{refusal:?}");
    assert_eq!(w.nodes[B].backing[0].data.flush_point(), before, "nothing was written");
    assert!(w.is_alive(B), "the engine goes on");
    w.nodes[B].backing[0].data.write(geometry.superblock.0, &old, true);
    w.must(B, Command::Up);
    w.restart(A);
    w.wait_synced();
}

/// A log with one damaged block beside the torn newest one cannot be trusted: everything is
/// resynced rather than something forgotten (AL-6).
#[test]
fn a_damaged_activity_log_leads_to_a_full_sync() {
    let mut w = World::new(335, Setup::with(|s| s.disk(|disk| disk.al_extents = 2)));
    w.start_synced();
    for extent in [0, 1, 0, 1] {
        w.write(A, 0, extent * 8192, 8);
    }
    w.kill(A);
    let geometry = w.nodes[A].setup.geometry(0, 8 * MIB, None).unwrap();
    let disk = &mut w.nodes[A].backing[0].data;
    let mut page = Page::zeroed();
    encode_initialised(&mut page);
    page.0[100] ^= 1;
    for block in 0..geometry.al_blocks() {
        disk.write(geometry.al_block_sector(block).0, &page.0, true);
    }
    w.restart(A);
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib + w.status(A).volumes[0].received_kib;
    assert!(copied >= 8000, "{copied} KiB");
}

/// A node with an activity log switched off resyncs everything after a crash (AL-9).
#[test]
fn without_activity_log_a_crash_costs_a_full_sync() {
    let mut w = World::new(336, Setup::with(|s| s.disk(|disk| disk.al_updates = false)));
    w.start_synced();
    w.start_load(A, Load::writes(hot_areas()));
    w.run_for(Span::from_ms(200));
    w.power_cut(A, Cut::Mixed);
    w.restart(A);
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib;
    assert!(copied >= 8000, "{copied} KiB");
}

/// Power is cut at every few disk operations of an attach that recovers from a crash; recovery
/// begun anew gives the same (MD-5, AL-5).
#[test]
fn a_crash_during_recovery_changes_nothing() {
    for step in 1..14 {
        let mut w = World::new(337, Setup::default());
        w.start_synced();
        w.start_load(A, Load::writes(hot_areas()));
        w.run_for(Span::from_ms(300));
        w.power_cut(A, Cut::LoseAll);
        w.run_until("B is alone", Span::from_secs(10), |w| w.conn(B) < Conn::Connected);
        w.settle();
        w.boot(A);
        w.tell(A, Command::Up);
        w.run_for(Span(step * 250_000));
        w.power_cut(A, Cut::Mixed);
        let on_disk = w.on_disk(A, 0).expect("metadata is readable at any time (MD-1)");
        let forgotten: Vec<u64> =
            w.differing[0].iter().copied().filter(|block| !on_disk.covers(*block)).collect();
        assert!(forgotten.is_empty(), "step {step}: {forgotten:?} would be forgotten");
        w.restart(A);
        w.wait_synced();
    }
}

/// A superblock is never torn into something else: at any power cut the old or the new one is
/// there, and it can be attached (MD-1).
#[test]
fn superblocks_survive_power_cuts() {
    for seed in 340..360 {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.tell(A, Command::Secondary { holder: None });
        let time = w.rng.between(10_000, 3_000_000);
        w.run_for(Span(time));
        w.power_cut(A, Cut::Mixed);
        let geometry = w.nodes[A].setup.geometry(0, 8 * MIB, None).unwrap();
        let mut page = Page([0; 4096]);
        w.nodes[A].backing[0].data.read(geometry.superblock.0, &mut page.0);
        let superblock = Superblock::decode(&page).expect("the mark is there");
        superblock.check(&geometry, None).expect("the fields fit");
        assert_ne!(superblock.la_size, Sector(0));
        w.restart(A);
        w.wait_synced();
        assert_eq!(w.state(A, 0).role, Role::Secondary);
    }
}

/// Invalidate throws the local data away and copies all of the peer's; the node goes on serving.
#[test]
fn invalidate_copies_everything() {
    let mut w = World::new(361, Setup::default());
    w.start_synced();
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_ms(200));
    w.must(A, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_for(Span::from_secs(2));
    w.drain(A);
    assert_eq!(w.nodes[A].host.errors, 0);
    w.wait_synced();
    assert!(w.status(A).volumes[0].received_kib >= 8000);
    w.must(A, Command::InvalidateRemote(None));
    w.since_sync[0].troubled = true;
    w.start_load(A, Load::mixed(hot_areas()));
    w.run_for(Span::from_secs(2));
    w.drain(A);
    w.wait_synced();
    assert!(w.status(B).volumes[0].received_kib >= 8000);
    w.read_all(A, 0);
}
