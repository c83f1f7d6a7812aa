//! Metadata that several things change at once, and sizes that were asked for.

use replication_core::control::Command;
use replication_core::meta::MetaFlags;
use replication_core::state::Conn;
use replication_core::units::{Sector, Span};
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, World};

fn resize(size: Option<u64>, assume_clean: bool) -> Command {
    let size = size.map(Sector);
    Command::Resize { volume: None, size, assume_clean, assume_peer_has_space: false }
}

/// A full sync begins while the bitmap of a new size is being written. Before its bits are on the
/// disk, the superblock says that all of them count as set: the end of the resize does not take
/// that away (BM-8, RS-3).
#[test]
fn a_resize_does_not_cancel_the_intent_of_a_full_sync() {
    for delay in 0..20 {
        let setup = Setup::with(|s| {
            s.external_meta(2048);
            s.nodes[B].devices[0].data = 12 * MIB;
            s.nodes[B].disk_time = (Span::from_ms(4), Span::from_ms(4));
        });
        let mut w = World::new(1200 + delay, setup);
        w.start_synced();
        w.nodes[A].backing[0].data.grow(12 * MIB);
        w.tell(A, resize(None, true));
        w.run_until("the peer's new size", Span::from_secs(1), |w| w.nodes[B].sizes[0] > 8 * MIB);
        w.run_for(Span(delay * 500_000));
        w.tell(B, Command::Invalidate(None));
        w.since_sync[0].troubled = true;
        w.run_until("the intent", Span::from_secs(5), |w| w.conn(B) == Conn::StartingSyncT);
        let mut is_announced = false;
        w.run_until("the full sync", Span::from_secs(5), |w| {
            let on_disk = w.on_disk(B, 0).expect("a disk");
            let all = (0..12 * MIB / 8).all(|block| on_disk.covers(block));
            assert!(
                !all || is_announced || on_disk.superblock.flags.contains(MetaFlags::FULL_SYNC)
            );
            is_announced = all;
            w.conn(B) == Conn::SyncTarget
        });
    }
}

/// A full sync is begun anew while the bits of an earlier one, given up with its connection, are
/// still being written: one start comes of it, with one identifier (GI-7).
#[test]
fn a_full_sync_begun_twice_starts_once() {
    let mut w = World::new(1231, Setup::with(|s| s.external_meta(2048)));
    w.start_synced();
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    let limit = Span::from_secs(20);
    let geometry = w.nodes[A].setup.geometry(0, 8 * MIB, Some(2048)).unwrap();
    let start = geometry.bitmap.0;
    let range = Some(replication_core::units::SectorRange { start, end: start + 8 });
    let fault = Fault { kind: Kind::MetaWrite, range, times: Some(1), trouble: Trouble::Stick };
    w.nodes[A].backing[0].meta_disk_mut().add_fault(fault);
    let before = w.status(A).volumes[0].uuids;
    w.must(B, Command::Invalidate(None));
    w.disk_failed(B, 0);
    w.run_for(Span::from_ms(50));
    assert_eq!(w.conn(A), Conn::StartingSyncS, "its bitmap is stuck");
    w.net.reset_all(w.now);
    w.run_until("lost", limit, |w| w.conn(A) < Conn::Connected);
    w.run_until("back", limit, |w| w.conn(A) >= Conn::Connected && w.conn(B) >= Conn::Connected);
    w.run_for(Span::from_ms(50));
    // What was given up is synced without being asked for again.
    assert_eq!(w.must_not(B, Command::Invalidate(None)).code, -8);
    assert_eq!(w.conn(A), Conn::WFBitMapS);
    w.heal_disks(A);
    w.run_until("the resync", limit, |w| w.conn(A) == Conn::SyncSource);
    assert_eq!(w.packets_sent("P_SYNC_UUID"), 1);
    let after = w.status(A).volumes[0].uuids;
    let history = [before[0], before[2]];
    assert_eq!(history, after[2..], "one generation is begun: {before:x?} {after:x?}");
    w.wait_synced();
}

/// A device made smaller than its disks with `resize --size` has that size on both nodes, and
/// keeps it over reconnects and restarts of either, whoever was asked (FE-1).
#[test]
fn a_size_asked_for_is_known_on_both_nodes() {
    let small = 4 * MIB;
    let mut w = World::new(1241, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(A, resize(Some(small), false));
    w.wait_synced();
    assert_eq!(w.nodes[A].sizes[0], small);
    assert_eq!(w.nodes[B].sizes[0], small);
    w.write(A, 0, small - 8, 8);
    for n in [B, A] {
        w.must(n, Command::Disconnect { force: false });
        w.run_for(Span::from_secs(1));
        w.must(n, Command::Connect { discard_my_data: false });
        w.wait_synced();
        assert_eq!([w.nodes[A].sizes[0], w.nodes[B].sizes[0]], [small; 2], "node {n} was away");
    }
    for n in [B, A] {
        w.kill(n);
        w.restart(n);
        w.wait_connected();
        w.wait_synced();
        assert_eq!([w.nodes[A].sizes[0], w.nodes[B].sizes[0]], [small; 2], "node {n} restarted");
    }
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
}

/// The same while a disk is away: when it is back, the device does not grow under its user.
#[test]
fn a_size_asked_for_is_known_without_a_disk() {
    let small = 4 * MIB;
    let mut w = World::new(1242, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.must(B, Command::Detach { volume: None, force: false });
    w.disk_failed(B, 0);
    w.must(A, resize(Some(small), false));
    w.settle();
    assert_eq!([w.nodes[A].sizes[0], w.nodes[B].sizes[0]], [small; 2]);
    w.must(B, Command::Attach(None));
    w.wait_synced();
    assert_eq!([w.nodes[A].sizes[0], w.nodes[B].sizes[0]], [small; 2]);
    w.read_all(A, 0);
}
