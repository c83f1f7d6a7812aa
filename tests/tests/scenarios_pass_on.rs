//! Disks whose errors are passed on: they stay attached, and what they could not do is marked.

use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::state::Disk;
use replication_core::units::{Errno, Span};
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::Setup;
use tests::sim::{A, B, World};

/// The next operation of this kind on a node's disk fails, where its metadata is, too.
fn fails(w: &mut World, n: usize, kind: Kind) {
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind, range: None, times: Some(1), trouble };
    w.nodes[n].backing[0].data.add_fault(fault);
}

/// No metadata gets to a node's disk any more.
fn stick(w: &mut World, n: usize) {
    let trouble = Trouble::Stick;
    let fault = Fault { kind: Kind::MetaWrite, range: None, times: None, trouble };
    w.nodes[n].backing[0].data.add_fault(fault);
}

/// The current generation on the disk of a node, without the role.
fn current(w: &World, n: usize) -> u64 {
    w.on_disk(n, 0).expect("the superblock is whole").superblock.uuids.current & !1
}

/// Two nodes in sync whose disks stay attached, of which this one is Primary.
fn start(seed: u64, primary: usize) -> World {
    let mut w = World::new(seed, Setup::with(|s| s.disk(|d| d.on_io_error = OnIoError::PassOn)));
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    if primary == B {
        w.must(A, Command::Secondary { holder: None });
        w.must(B, Command::Primary { force: false });
    }
    w
}

/// The peer cannot do a write, and cannot even note that its disk is bad. The Primary becomes
/// Secondary.
fn a_write_that_the_peer_cannot_do(w: &mut World, primary: usize) {
    let peer = 1 - primary;
    w.disk_failed(peer, 0);
    fails(w, peer, Kind::Write);
    stick(w, peer);
    w.write(primary, 0, 16, 8);
    w.must(primary, Command::Secondary { holder: None });
}

/// The peer is killed, or both are, and its disk comes back as one of the common generation. It
/// gets what it lacks: if nothing else, the marks tell who has that. Both were taken for equal, or
/// the old disk was copied over the other one (GI-1, DUR-5).
#[test]
fn a_write_that_the_peer_could_not_do_is_not_forgotten() {
    for (seed, primary) in (1900..1906).flat_map(|seed| [(seed, A), (seed, B)]) {
        for kills_both in [false, true] {
            let mut w = start(seed, primary);
            a_write_that_the_peer_cannot_do(&mut w, primary);
            let peer = 1 - primary;
            w.kill(peer);
            w.nodes[peer].backing[0].data.heal();
            if kills_both {
                w.kill(primary);
                w.restart(primary);
            }
            w.restart(peer);
            w.wait_synced();
            w.must(primary, Command::Primary { force: false });
            w.read_all(primary, 0);
        }
    }
}

/// The peer loses power over it before anyone hears that its disk is bad, the Primary becomes
/// Secondary, and the peer goes on by itself: a split brain, and no silent resync over what was
/// acknowledged (GI-1, GI-6).
#[test]
fn a_write_that_the_peer_could_not_do_is_not_overwritten() {
    let mut unheard = 0;
    for seed in 1910..1950 {
        let setup = Setup::with(|s| {
            s.disk(|d| d.on_io_error = OnIoError::PassOn);
            s.speed.jitter = Span(20_000_000);
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        w.disk_failed(B, 0);
        fails(&mut w, B, Kind::Write);
        stick(&mut w, B);
        let shared = current(&w, A);
        w.write(A, 0, 16, 8);
        assert_ne!(current(&w, A), shared, "only one has it");
        unheard += u32::from(w.state(A, 0).pdsk == Disk::UpToDate);
        w.tell(A, Command::Secondary { holder: None });
        w.power_cut(B, Cut::LoseAll);
        w.cut();
        w.nodes[B].backing[0].data.heal();
        w.run_for(Span::from_secs(30));
        w.restart(B);
        w.must(B, Command::Primary { force: false });
        w.write(B, 0, 64, 8);
        w.heal();
        w.wait_log(A, "Split-Brain detected");
    }
    assert!((5..40).contains(&unheard), "{unheard} of 40");
}

/// What cannot be read here is read from the peer, and nothing is marked: a mark would have it
/// copied from here when the nodes meet again (RD-3, RD-5).
#[test]
fn a_read_that_fails_marks_nothing() {
    let mut w = start(1920, A);
    fails(&mut w, A, Kind::Read);
    w.read(A, 0, 0, 8);
    w.settle();
    assert_eq!(w.status(A).volumes[0].out_of_sync_kib, 0);
    w.cut();
    w.run_for(Span::from_secs(20));
    w.heal();
    w.wait_synced();
    w.read_all(A, 0);
}
