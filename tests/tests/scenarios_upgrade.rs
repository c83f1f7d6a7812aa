//! `upgrade`: an engine makes way for another one in mid-service. What it leaves must be what a
//! crash could have left, and yet leave nothing to be recovered.

use replication_core::control::Command;
use replication_core::meta::MetaFlags;
use replication_core::state::{Conn, Role};
use replication_core::units::{SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::disk::Cut;
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn load() -> Load {
    Load::mixed(vec![area(0, 200), area(3 * MIB, 500), area(6 * MIB, 200)])
}

/// The metadata that a process has left says: Primary, and nothing may differ but what is marked.
fn left_clean(w: &World, n: usize) {
    let on_disk = w.on_disk(n, 0).expect("it has a disk");
    let flags = on_disk.superblock.flags;
    assert!(flags.contains(MetaFlags::PRIMARY_IND), "the role is remembered (AL-10)");
    assert!(!on_disk.whole, "no full sync is wanted");
    assert!(on_disk.extents.is_empty(), "the activity log is empty: {:?}", on_disk.extents);
}

/// A Primary is replaced again and again under load: its successor finds nothing to recover, and
/// the peer gets next to nothing.
#[test]
fn a_primary_is_replaced_under_load() {
    for (seed, protocol) in
        [(1, ReplicationProtocol::C), (2, ReplicationProtocol::B), (3, ReplicationProtocol::A)]
    {
        let mut w = World::new(seed, Setup::with(|s| s.protocol(protocol)));
        w.start_synced();
        for _ in 0..2 {
            w.start_load(A, load());
            w.run_for(Span::from_secs(1));
            let before = w.status(B).volumes[0].received_kib;
            w.must(A, Command::Upgrade);
            assert!(!w.is_alive(A), "the answer is its last word");
            left_clean(&w, A);
            assert!(w.on_disk(A, 0).is_some_and(|d| d.bits.is_empty()), "nothing was missed");
            w.restart(A);
            w.must(A, Command::Primary { force: false });
            w.wait_synced();
            assert_eq!(w.state(A, 0).role, Role::Primary);
            // What the host had begun and got answered has come before the goodbye.
            let resynced = w.status(B).volumes[0].received_kib - before;
            assert!(resynced <= 8 * 32, "{resynced} KiB after the upgrade");
            w.read_all(A, 0);
        }
        w.check_equal(0);
        assert!(!w.has_logged(A, "based on AL"), "no extent was marked");
    }
}

/// Everything that was acknowledged is durable before the log is emptied: even if the power goes
/// on both nodes at that moment, nothing that was flushed is lost and nothing differs unseen.
#[test]
fn the_power_goes_between_two_engines() {
    for seed in 10..14 {
        let external = seed < 12;
        let setup = |s: &mut Setup| {
            if external {
                s.external_meta(MIB);
            }
        };
        let mut w = World::new(seed, Setup::with(setup));
        w.start_synced();
        w.start_load(A, load());
        w.run_for(Span::from_secs(1));
        w.must(A, Command::Upgrade);
        w.power_cut(A, Cut::LoseAll);
        if seed % 2 == 0 {
            w.power_cut(B, Cut::LoseAll);
            w.restart(B);
        }
        w.restart(A);
        w.must(A, Command::Primary { force: false });
        w.wait_synced();
        w.read_all(A, 0);
        w.check_equal(0);
    }
}

/// A Primary that is alone keeps its marks: the peer gets what changed, and no more.
#[test]
fn a_lone_primary_keeps_its_marks() {
    let mut w = World::new(20, Setup::default());
    w.start_synced();
    w.kill(B);
    w.run_until("A is alone", Span::from_secs(20), |w| w.conn(A) < Conn::Connected);
    w.write(A, 0, 0, 64);
    w.must(A, Command::Upgrade);
    left_clean(&w, A);
    w.restart(A);
    w.must(A, Command::Primary { force: false });
    w.write(A, 0, 64, 64);
    w.restart(B);
    w.wait_synced();
    assert_eq!(w.status(B).volumes[0].received_kib, 64, "two writes of 32 KiB");
    w.read_all(A, 0);
}

/// A Secondary is replaced while the other node writes: it gets what it has missed.
#[test]
fn a_secondary_is_replaced_under_load() {
    let mut w = World::new(21, Setup::default());
    w.start_synced();
    w.start_load(A, load());
    for _ in 0..3 {
        w.run_for(Span::from_secs(1));
        w.must(B, Command::Upgrade);
        w.run_for(Span::from_secs(1));
        w.restart(B);
        w.run_until("connected", Span::from_secs(60), |w| w.all(|s| s.conn >= Conn::Connected));
    }
    w.drain(A);
    w.wait_synced();
    assert_eq!(w.state(B, 0).role, Role::Secondary);
    w.check_equal(0);
}

/// Either side of a resync is replaced in the middle of it: it goes on with what is left.
#[test]
fn a_resync_goes_on_after_an_upgrade() {
    for n in [A, B] {
        let mut w = World::new(22, Setup::with(|s| s.size(32 * MIB)));
        w.up_both();
        w.must(A, Command::Primary { force: true });
        w.start_load(A, load());
        let total = w.status(A).volumes[0].out_of_sync_kib;
        let limit = Span::from_secs(600);
        w.run_until("half of it", limit, |w| w.status(B).volumes[0].received_kib > total / 2);
        w.must(n, Command::Upgrade);
        let left = w.status(1 - n).volumes[0].out_of_sync_kib;
        assert!(left < total, "{left} of {total} KiB");
        w.restart(n);
        if n == A {
            w.must(A, Command::Primary { force: false });
        }
        w.drain(A);
        w.wait_synced();
        w.check_equal(0);
    }
}

/// A peer that says nothing holds nobody up for long: the process leaves as if killed, its log
/// still covers what may differ, and a forced command does not keep it.
#[test]
fn a_silent_peer_does_not_hold_it_up() {
    for is_forced in [false, true] {
        let mut w =
            World::new(23, Setup::with(|s| s.net(|net| net.ping_int = Span::from_secs(60))));
        w.start_synced();
        w.start_load(A, Load::writes(vec![area(0, 500)]));
        w.run_for(Span::from_secs(1));
        w.cut();
        w.run_for(Span::from_ms(100));
        let began = w.now;
        let id = w.tell(A, Command::Upgrade);
        if is_forced {
            w.tell(A, Command::Disconnect { force: true });
        }
        w.run_until("it leaves", Span::from_secs(11), |w| !w.is_alive(A));
        assert!(w.now.since(began) <= Span::from_secs(11));
        assert!(matches!(w.reply(A, id), Some(Ok(_))));
        assert!(w.has_logged(A, "leaving as if killed"));
        let on_disk = w.on_disk(A, 0).expect("it has a disk");
        assert!(!on_disk.extents.is_empty(), "what was under way is covered (AL-1)");
        w.heal();
        w.restart(A);
        w.must(A, Command::Primary { force: false });
        w.wait_synced();
        w.read_all(A, 0);
        w.check_equal(0);
    }
}

/// A Primary that lives on the peer's disk would come back without its role: refused, and it goes
/// on as before (ST-7).
#[test]
fn a_diskless_primary_stays() {
    let mut w = World::new(24, Setup::default());
    w.start_synced();
    w.must(A, Command::Detach { volume: None, force: false });
    let refusal = w.must_not(A, Command::Upgrade);
    assert!(refusal.text.contains("without its disk"), "{refusal:?}");
    w.write(A, 0, 0, 8);
    w.read(A, 0, 0, 8);
    assert_eq!(w.state(A, 0).role, Role::Primary);
}
