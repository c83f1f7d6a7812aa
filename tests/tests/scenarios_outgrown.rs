//! Scripted runs with devices that grow below nodes which cannot move their internal metadata: they
//! are down, or a resize was refused. The operator's tool moves it before the next attach.

use replication_core::control::Command;
use replication_core::meta::KnownSizes;
use replication_core::state::{Conn, Disk};
use replication_core::units::{SectorRange, Span};
use tests::sim::control::RESIZE;
use tests::sim::disk::Cut;
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

/// Sectors of the metadata of the disks here.
const METADATA: u64 = 80;

fn grow(w: &mut World, n: usize, more: u64) {
    let disk = &mut w.nodes[n].backing[0].data;
    let sectors = disk.sectors() + more;
    disk.grow(sectors);
}

/// A Secondary that was down is attached as it was, and gets what it missed and nothing else. Only
/// a move of a few blocks that was cut off may cost more.
#[test]
fn a_device_that_grew_while_its_node_was_down() {
    for (seed, more) in (0..30).flat_map(|seed| [(seed, 4 * MIB), (seed, 8), (seed, METADATA)]) {
        let mut w = World::new(700 + seed, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        w.kill(B);
        grow(&mut w, B, more);
        w.write(A, 0, 640, 24);
        w.restart(B);
        w.wait_synced();
        let is_certain = more >= METADATA;
        let received = w.status(B).volumes[0].received_kib;
        assert!(received == 12 || !is_certain, "{received} KiB received after {more} sectors");
        w.read_all(A, 0);
    }
}

/// A Primary that lost power finds its activity log at the new end of its disk, and what may differ
/// is copied (AL-5, GI-10).
#[test]
fn a_device_that_grew_below_a_crashed_primary() {
    for more in [4 * MIB, METADATA / 2] {
        let mut w = World::new(730, Setup::default());
        w.start_synced();
        w.start_load(A, Load::mixed(vec![SectorRange { start: 0, end: 4000 }]));
        w.run_for(Span::from_ms(300));
        w.power_cut(A, Cut::Mixed);
        w.ledger.doubt_unflushed(0);
        grow(&mut w, A, more);
        w.restart(A);
        w.wait_synced();
        let is_found = w.has_logged(A, "as out-of-sync based on AL");
        assert!(is_found || more < METADATA, "the log counts");
        w.check_equal(0);
    }
}

/// Both devices have grown, the resize is refused because a resync runs, and both nodes start
/// again: they have their disks, the resync goes on, and then the devices grow.
#[test]
fn a_resize_that_was_refused_before_a_restart() {
    let mut w = World::new(731, Setup::default());
    w.start_synced();
    w.cut();
    w.run_until("the loss is noticed", Span::from_secs(60), |w| w.conn(A) < Conn::Connected);
    for start in (0..4 * MIB).step_by(64) {
        w.write(A, 0, start, 64);
    }
    w.settle();
    w.heal();
    w.run_until("a resync", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
    let before = w.nodes[A].sizes[0];
    for n in [A, B] {
        grow(&mut w, n, 4 * MIB);
    }
    w.must_not(A, RESIZE);
    assert_eq!(w.conn(B), Conn::SyncTarget);
    for n in [A, B] {
        w.kill(n);
    }
    w.restart(A);
    w.restart(B);
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.must(A, RESIZE);
    w.run_until("the new size", Span::from_secs(30), |w| {
        w.nodes[A].sizes[0] > before && w.nodes[B].sizes[0] > before
    });
    w.wait_synced();
    w.read_all(A, 0);
}

/// A device that has grown by too little is attached in vain, which forgets nothing: when it has
/// grown by enough, its metadata moves, and the peer sends what was missed and nothing else.
#[test]
fn a_device_that_grew_too_little_at_first() {
    let mut w = World::new(733, Setup::with(|s| s.size(128 * MIB)));
    w.start_synced();
    w.kill(B);
    grow(&mut w, B, 1);
    w.boot(B);
    w.check_resize(B);
    let refusal = w.must_not(B, Command::Up);
    assert_eq!(refusal.code, 119, "{refusal:?}");
    w.kill(B);
    grow(&mut w, B, 7);
    w.write(A, 0, 640, 24);
    w.restart(B);
    w.wait_synced();
    assert_eq!(w.status(B).volumes[0].received_kib, 12);
}

/// Nobody guesses: without a size that is known, the disk stays away, as it is.
#[test]
fn a_device_whose_size_nobody_remembers() {
    let mut w = World::new(732, Setup::default());
    w.start_synced();
    w.kill(B);
    grow(&mut w, B, 4 * MIB);
    let known = std::mem::take(&mut w.nodes[B].backing[0].known);
    let before = w.nodes[B].backing[0].data.flush_point();
    w.boot(B);
    w.check_resize(B);
    let refusal = w.must_not(B, Command::Up);
    assert_eq!(refusal.code, 119, "{refusal:?}");
    assert_eq!(w.nodes[B].backing[0].data.flush_point(), before, "nothing was written");
    assert_eq!(w.state(B, 0).disk, Disk::Diskless);
    assert_eq!(w.nodes[B].backing[0].known, KnownSizes::default());
    w.nodes[B].backing[0].known = known;
    w.check_resize(B);
    w.must(B, Command::Up);
    w.wait_synced();
}
