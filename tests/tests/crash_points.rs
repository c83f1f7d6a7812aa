//! Crash points of scripted histories: every moment, every subset of what is not durable.

#[path = "mutants/histories.rs"]
mod histories;

use replication_core::control::Command;
use replication_core::state::Conn;
use tests::crash::explore::{Counts, Part};
use tests::crash::history::{History, extents, setup};
use tests::sim::Setup;

const A: usize = 0;
const B: usize = 1;
const EXTENT: u64 = 8192;

fn report(name: &str, history: &History) -> Counts {
    let counts = history.counts();
    eprintln!("{name}: {counts:?}");
    counts
}

const fn resize(assume_peer_has_space: bool) -> Command {
    Command::Resize { volume: None, size: None, assume_clean: false, assume_peer_has_space }
}

/// Writes walk over more extents than the log has slots, so that the ring wraps.
fn wrap(name: &str, seed: u64, setup: &Setup) {
    let mut h = History::synced(seed, setup);
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    for round in 0..16 {
        h.write(A, (round * 5 % 8) * EXTENT + round * 8, 8, round % 5 == 4);
        if round % 3 == 2 {
            h.steps(4);
        }
        if round % 4 == 3 {
            h.flush(A);
        }
    }
    h.settle();
    let counts = report(name, &h);
    assert!(counts.states > 300 && counts.differing > 20, "{counts:?}");
}

#[test]
fn writes_across_activity_log_wraps() {
    for seed in 0..2 {
        wrap("writes", seed, &setup(extents(8)));
    }
}

/// The same with metadata on another device: a flush of one is no flush of the other (AL-3).
#[test]
fn writes_with_external_metadata() {
    let mut setup = setup(extents(8));
    setup.external_meta(2048);
    wrap("external", 7, &setup);
}

/// The same without the peer: nothing is equal on both nodes after the first write.
#[test]
fn writes_alone_across_activity_log_wraps() {
    for external in [false, true] {
        let mut setup = setup(extents(8));
        if external {
            setup.external_meta(2048);
        }
        let mut h = History::synced(3, &setup);
        h.link(false);
        h.watch(&[(A, Part::Writer)]);
        for round in 0..16 {
            h.write(A, (round * 3 % 8) * EXTENT + round * 8, 8, round % 5 == 4);
            h.steps(2);
        }
        h.flush(A);
        h.must(A, Command::Secondary { holder: None });
        h.must(A, Command::Detach { volume: None, force: false });
        let counts = report("alone", &h);
        assert!(counts.states > 500 && counts.differing > 200, "{counts:?}");
    }
}

/// Writes without the peer; it comes back, and the resync ends.
#[test]
fn rotation_and_resync() {
    let mut h = History::synced(1, &setup(extents(5)));
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    h.write(A, 0, 16, false);
    h.steps(5);
    h.link(false);
    for round in 0..6 {
        h.write(A, (round % 4) * EXTENT + round * 8, 8, false);
        h.steps(3);
    }
    h.flush(A);
    h.settle();
    h.link(true);
    h.wait_synced();
    h.write_and_wait(A, 8, 16);
    h.must(A, Command::Secondary { holder: None });
    let counts = report("resync", &h);
    assert!(counts.states > 300 && counts.differing > 20, "{counts:?}");
}

/// A resync is broken off again and again while the host writes.
#[test]
fn interrupted_resync() {
    let mut h = History::synced(0, &setup(extents(3)));
    h.link(false);
    for round in 0..24 {
        h.write(A, (round % 3) * EXTENT + round * 80, 24, false);
        h.settle();
    }
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    for round in 0..3 {
        h.link(true);
        h.until("a resync", |pair| pair.nodes[B].state().conn == Conn::SyncTarget);
        h.write(A, round * EXTENT, 8, false);
        h.steps(60);
        h.link(false);
        h.write(A, round * EXTENT + 64, 8, false);
        h.settle();
    }
    h.link(true);
    h.wait_synced();
    let counts = report("interrupted", &h);
    assert!(counts.states > 500 && counts.differing > 200, "{counts:?}");
}

/// A resync is broken off with a part of it done: what is cleared is on the disk (BM-1).
#[test]
fn broken_resync() {
    for seed in 0..2 {
        let counts = histories::broken_resync(seed, |_| {});
        eprintln!("broken: {counts:?}");
        assert!(counts.states > 500 && counts.differing > 200, "{counts:?}");
    }
}

/// Every block is copied anew, to the Secondary and then to the other one.
#[test]
fn full_sync_on_request() {
    let mut h = History::synced(5, &setup(4096));
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    h.write_and_wait(A, 0, 64);
    h.must(B, Command::Invalidate(None));
    h.until("a resync", |pair| pair.nodes[B].state().conn == Conn::SyncTarget);
    h.write(A, 512, 8, false);
    h.wait_synced();
    h.must(A, Command::InvalidateRemote(None));
    h.steps(60);
    h.link(false);
    h.write_and_wait(A, 1024, 8);
    h.link(true);
    h.wait_synced();
    let counts = report("full sync", &h);
    assert!(counts.states > 200, "{counts:?}");
}

/// Both roles change hands, and each node is alone for a while.
#[test]
fn roles_change_hands() {
    let mut h = History::synced(2, &setup(extents(4)));
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    h.write_and_wait(A, 0, 16);
    h.must(A, Command::Secondary { holder: None });
    h.settle();
    h.parts(&[(B, Part::Writer), (A, Part::Follower)]);
    h.must(B, Command::Primary { force: false });
    h.write_and_wait(B, EXTENT, 16);
    h.link(false);
    for round in 0..4 {
        h.write(B, round * EXTENT + 128, 8, round == 2);
        h.steps(2);
    }
    h.flush(B);
    h.must(B, Command::Secondary { holder: None });
    h.link(true);
    h.wait_synced();
    h.parts(&[(A, Part::Writer), (B, Part::Follower)]);
    h.must(A, Command::Primary { force: false });
    h.write_and_wait(A, 2 * EXTENT, 16);
    let counts = report("roles", &h);
    assert!(counts.states > 300, "{counts:?}");
}

/// With the activity log switched off, a crash marks everything (AL-9).
#[test]
fn without_activity_log() {
    let mut setup = setup(extents(3));
    setup.disk(|disk| disk.al_updates = false);
    let mut h = History::synced(4, &setup);
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    for round in 0..8 {
        h.write(A, (round % 3) * EXTENT + round * 8, 8, false);
        h.steps(3);
    }
    h.flush(A);
    h.must(A, Command::Secondary { holder: None });
    h.must(A, Command::Primary { force: false });
    h.write_and_wait(A, 64, 8);
    h.link(false);
    h.write_and_wait(A, 128, 8);
    let counts = report("log off", &h);
    assert!(counts.states > 100 && counts.differing > 20, "{counts:?}");
}

/// The first attach of new metadata: whatever is left of it, nothing counts as equal (BM-8).
#[test]
fn first_attach() {
    let mut h = History::new(6, &setup(extents(3)));
    h.watch(&[(A, Part::Writer)]);
    h.explorer.as_mut().unwrap().marked_from = Some(0);
    h.must(A, Command::Attach(None));
    h.settle();
    h.must(A, Command::Detach { volume: None, force: false });
    h.must(A, Command::Attach(None));
    h.must(A, Command::Primary { force: true });
    h.write_and_wait(A, 0, 8);
    let counts = report("first attach", &h);
    assert!(counts.states > 100, "{counts:?}");
}

/// A node puts its disk away and takes it up again, as Secondary and as Primary.
#[test]
fn detach_and_attach() {
    let mut h = History::synced(8, &setup(extents(4)));
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    h.write_and_wait(A, 0, 16);
    h.must(B, Command::Detach { volume: None, force: false });
    h.write_and_wait(A, EXTENT, 16);
    h.must(B, Command::Attach(None));
    h.wait_synced();
    h.must(A, Command::Detach { volume: None, force: false });
    h.parts(&[(A, Part::Follower), (B, Part::Writer)]);
    for round in 0..4 {
        h.write_and_wait(A, round * EXTENT + 64, 8);
    }
    h.must(A, Command::Attach(None));
    h.wait_synced();
    let counts = report("detach", &h);
    assert!(counts.states > 300 && counts.differing > 20, "{counts:?}");
}

/// The devices grow, by much and by next to nothing: internal metadata moves (BM-8).
#[test]
fn resize_with_moving_metadata() {
    for (seed, more) in [(0, EXTENT), (1, 8), (2, 24), (3, 1), (4, 70)] {
        let old = extents(3);
        let mut h = History::synced(seed, &setup(old));
        h.write_and_wait(A, 0, 16);
        h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
        for n in [A, B] {
            h.grow(n, old + more);
        }
        h.must(A, resize(false));
        h.wait_synced();
        h.write_and_wait(A, EXTENT, 16);
        let counts = report(&format!("grow by {more}"), &h);
        assert!(counts.states > 20, "{counts:?}");
    }
}

/// The same without the peer: the new part is marked, and later copied.
#[test]
fn resize_alone() {
    for (seed, more) in [(0, EXTENT), (1, 24)] {
        let old = extents(3);
        let mut h = History::synced(seed, &setup(old));
        h.link(false);
        h.write_and_wait(A, 0, 16);
        h.watch(&[(A, Part::Writer)]);
        h.explorer.as_mut().unwrap().marked_from = Some(old);
        h.grow(A, old + more);
        h.must(A, resize(true));
        h.write_and_wait(A, EXTENT, 16);
        h.must(A, Command::Secondary { holder: None });
        let counts = report(&format!("grow alone by {more}"), &h);
        assert!(counts.states > 50 && counts.differing > 20, "{counts:?}");
    }
}
