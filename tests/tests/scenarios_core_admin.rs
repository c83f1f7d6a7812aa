//! Commands over several volumes, and questions to the peer: done as a whole or not at all.

use replication_core::control::{Command, Reply};
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::Span;
use tests::sim::setup::Setup;
use tests::sim::{A, B, World};

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

/// Two volumes on A, the second one without good data; B is gone.
fn half_good(seed: u64) -> World {
    let mut w = World::new(seed, Setup::with(Setup::second_volume));
    w.start_synced();
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    w.kill(B);
    w.must(A, Command::Down { holder: None, force: false });
    w.nodes[A].create_metadata(1);
    for volume in 0..2 {
        w.since_sync[volume].troubled = true;
    }
    w.restart(A);
    assert_eq!(w.state(A, 0).disk, Disk::UpToDate);
    assert_eq!(w.state(A, 1).disk, Disk::Inconsistent);
    w
}

/// A promotion that one volume refuses leaves the others as they were: no role, and no new
/// generation (ST-7).
#[test]
fn a_refused_promotion_changes_no_volume() {
    let mut w = half_good(1101);
    let before = w.status(A).volumes[0].uuids;
    let refusal = w.must_not(A, Command::Primary { force: false });
    assert_eq!(refusal.code, -2, "{refusal:?}");
    w.settle();
    assert_eq!(w.state(A, 0).role, Role::Secondary);
    assert_eq!(w.status(A).volumes[0].uuids, before);
    assert!(!w.has_logged(A, "promotion of another volume failed"));
}

/// Outdating reaches every volume that can be: one that is worse already is none that refuses.
#[test]
fn a_worse_volume_does_not_keep_the_others_from_being_outdated() {
    let mut w = half_good(1102);
    assert!(matches!(w.ask(A, Command::Outdate), Ok(Reply::Done)));
    assert_eq!(w.state(A, 0).disk, Disk::Outdated);
    assert_eq!(w.state(A, 1).disk, Disk::Inconsistent);
    let again = w.ask(A, Command::Outdate);
    assert!(matches!(again, Ok(Reply::Done)), "{again:?}");
}

/// Force is for the want of good data. The target of a resync, promoted with force, uses its
/// source's data and begins no generation of its own: the resync goes on, also after an
/// interruption (GI-4, RS-3).
#[test]
fn a_forced_promotion_of_a_target_keeps_the_resync() {
    let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 1_000));
    let mut w = World::new(1103, setup);
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.must(A, Command::Secondary { holder: None });
    w.must(B, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_until("the resync runs", Span::from_secs(5), |w| w.conn(B) == Conn::SyncTarget);
    let before = w.status(B).volumes[0].uuids;
    w.must(B, Command::Primary { force: true });
    assert_eq!(w.state(B, 0).disk, Disk::Inconsistent);
    let after = w.status(B).volumes[0].uuids;
    assert_eq!((before[0] | 1, before[1]), (after[0] | 1, after[1]), "no new generation");
    w.read(B, 0, 0, 64);
    w.cut();
    wait_alone(&mut w, B);
    w.heal();
    w.wait_synced();
    w.read_all(B, 0);
}

/// Two fresh nodes with two volumes, promoted with force: both volumes become good, and are
/// copied.
#[test]
fn a_forced_promotion_takes_all_volumes() {
    let mut w = World::new(1104, Setup::with(Setup::second_volume));
    w.up_both();
    w.must(A, Command::Primary { force: true });
    w.wait_synced();
    for volume in 0..2 {
        assert_eq!(w.state(A, volume).role, Role::Primary);
        w.check_equal(volume);
    }
}
