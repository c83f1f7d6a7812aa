//! Commands over several volumes, and questions to the peer: done as a whole or not at all.

use replication_core::control::{Command, Reply};
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk, OnNoData, Role};
use replication_core::units::{SectorRange, Span, VolumeNr};
use tests::sim::control::RESIZE;
use tests::sim::disk::{Fault, Kind, Trouble};
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

/// The peer agreed to a promotion, and its word that the only disk is gone overtakes its answer:
/// the promotion is refused here, and the peer does not take this node for a Primary (ST-3, ST-4).
#[test]
fn a_promotion_refused_after_the_peer_agreed_is_taken_back() {
    let mut overtaken = 0;
    for seed in 1110..1140 {
        let mut w = World::new(seed, Setup::with(|s| s.speed.jitter = Span::from_ms(5)));
        w.start_synced();
        w.must(A, Command::Secondary { holder: None });
        w.must(A, Command::Detach { volume: None, force: false });
        w.disk_failed(A, 0);
        w.settle();
        let answers = w.packets_sent("P_STATE_CHG_REPLY");
        let promotion = w.tell(A, Command::Primary { force: false });
        w.run_until("the peer answers", Span::from_secs(1), |w| {
            w.packets_sent("P_STATE_CHG_REPLY") > answers
        });
        assert_eq!(w.state(B, 0).peer, Role::Primary, "it agreed");
        w.disk_failed(B, 0);
        w.must(B, Command::Detach { volume: None, force: true });
        w.run_until("an answer", Span::from_secs(5), |w| w.reply(A, promotion).is_some());
        if w.reply(A, promotion).unwrap().is_ok() {
            continue;
        }
        overtaken += 1;
        w.settle();
        assert_eq!(w.state(A, 0).role, Role::Secondary);
        assert_eq!(w.state(B, 0).peer, Role::Secondary, "seed {seed}");
    }
    assert!(overtaken > 0, "no seed shows it");
}

/// A forced command breaks off a promotion of two volumes while the peer is being asked: what it
/// had agreed to, and what it agrees to later, is taken back (ST-3, ST-4).
#[test]
fn a_promotion_given_up_is_taken_back() {
    let mut w = World::new(1105, Setup::with(Setup::second_volume));
    w.start_synced();
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    let promotion = w.tell(A, Command::Primary { force: false });
    w.run_until("the peer agrees to the first", Span::from_secs(1), |w| {
        w.state(B, 0).peer == Role::Primary
    });
    w.run_until("the second is asked for", Span::from_secs(1), |w| {
        w.state(B, 1).peer == Role::Primary
    });
    assert!(w.reply(A, promotion).is_none(), "the answer is on its way");
    w.disk_failed(A, 1);
    w.must(A, Command::Detach { volume: Some(VolumeNr(1)), force: true });
    assert!(w.reply(A, promotion).unwrap().unwrap_err().text.contains("forced"));
    w.settle();
    for volume in 0..2 {
        assert_eq!(w.state(A, volume).role, Role::Secondary);
        assert_eq!(w.state(B, volume).peer, Role::Secondary, "volume {volume}");
    }
    w.must(A, Command::Primary { force: false });
    w.settle();
    assert_eq!(w.state(B, 0).peer, Role::Primary);
}

/// A detach is forced while the peer is being asked for its consent: the Primary, now without a
/// disk, keeps the connection that it needs.
#[test]
fn a_detach_forced_in_the_middle_keeps_the_connection() {
    let mut w = World::new(1107, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 8);
    let detach = w.tell(A, Command::Detach { volume: None, force: false });
    assert!(w.reply(A, detach).is_none(), "the peer is being asked");
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: true });
    w.settle();
    assert_eq!((w.conn(A), w.state(A, 0).disk), (Conn::Connected, Disk::Diskless));
    w.read(A, 0, 0, 8);
    w.write(A, 0, 8, 8);
}

/// A forced command breaks off a resize: the volume goes on (LV-1).
#[test]
fn a_resize_given_up_does_not_hold_the_volume() {
    let mut w = World::new(1106, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 8);
    let write = w.submit(A, 0, HostOp::Write { fua: false }, SectorRange { start: 0, end: 8 });
    let resize = w.tell(A, RESIZE);
    assert!(w.reply(A, resize).is_none(), "it waits for the write");
    w.must(A, Command::Disconnect { force: true });
    assert!(w.reply(A, resize).unwrap().unwrap_err().text.contains("forced"));
    let write = write.unwrap();
    w.run_until("the write", Span::from_secs(5), |w| w.answer(A, write).is_some());
    w.write(A, 0, 64, 8);
}

/// A forced command ends the one under way, but not when it names a volume that does not exist: a
/// slip of the operator changes nothing (ST-7).
#[test]
fn a_forced_command_for_an_unknown_volume_ends_nothing() {
    let mut w = World::new(1120, Setup::default());
    w.start_synced();
    let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble: Trouble::Stick };
    w.nodes[A].backing[0].data.add_fault(fault);
    let range = SectorRange { start: 0, end: 8 };
    w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
    let detach = w.tell(A, Command::Detach { volume: None, force: false });
    assert!(w.reply(A, detach).is_none(), "it waits for the disk");
    let refusal = w.must_not(A, Command::Detach { volume: Some(VolumeNr(77)), force: true });
    assert_eq!(refusal.code, 127, "{refusal:?}");
    assert!(w.reply(A, detach).is_none(), "it still waits");
    w.heal_disks(A);
    w.run_until("its end", Span::from_secs(30), |w| w.reply(A, detach).is_some());
    assert!(matches!(w.reply(A, detach), Some(Ok(Reply::Done))));
}

/// A node does not wait for requests that are suspended until it may be Secondary, or go down: the
/// operator is told, and may give it its disk back with the next command (LV-1). That one, and the
/// change of the policy, waited behind the first for ever.
#[test]
fn suspended_requests_are_not_waited_for() {
    let mut w =
        World::new(1121, Setup::with(|s| s.nodes[A].config.on_no_data = OnNoData::SuspendIo));
    w.start_synced();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.cut();
    wait_alone(&mut w, A);
    let range = SectorRange { start: 0, end: 8 };
    let write = w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
    let down = Command::Down { holder: None, force: false };
    for command in [Command::Secondary { holder: None }, down] {
        let refusal = w.must_not(A, command);
        assert_eq!(refusal.text, "requests wait: I/O is suspended (no-data)");
    }
    assert_eq!(w.state(A, 0).role, Role::Primary);
    w.heal();
    w.run_until("the answer", Span::from_secs(60), |w| w.answer(A, write).is_some());
    assert_eq!(w.answer(A, write), Some(Ok(())));
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// A forced `down` meets a write that waits for one to the same place, which only the peer was to
/// take: both fail, and only then the process may end (ACK-3). The second one was answered after
/// the word that everything is put away.
#[test]
fn the_end_is_the_last_word() {
    let mut w = World::new(1124, Setup::default());
    w.start_synced();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.settle();
    let range = SectorRange { start: 0, end: 8 };
    for _ in 0..2 {
        w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
    }
    // The system has taken the first one, and gives its memory back.
    w.run_for(Span(100_000));
    let errors = w.nodes[A].host.errors;
    let down = w.tell(A, Command::Down { holder: None, force: true });
    assert!(!w.is_alive(A), "nothing has to be waited for");
    assert_eq!(w.reply(A, down), Some(Ok(Reply::Done)));
    assert_eq!(w.nodes[A].host.errors, errors + 2);
}

/// A Primary without good data freezes at once when the policy is changed to that, and says so. Its
/// requests waited, but the status did not show it.
#[test]
fn a_changed_policy_suspends_io() {
    let mut w = World::new(1122, Setup::default());
    w.start_synced();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.cut();
    wait_alone(&mut w, A);
    let mut resource = w.nodes[A].setup.config.clone();
    resource.on_no_data = OnNoData::SuspendIo;
    let command = w.adjust(A, resource);
    w.must(A, command);
    assert!(w.status(A).suspended_no_data);
    let range = SectorRange { start: 0, end: 8 };
    let write = w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
    w.heal();
    w.run_until("the answer", Span::from_secs(60), |w| w.answer(A, write).is_some());
    assert_eq!(w.answer(A, write), Some(Ok(())));
}

/// A connection is given up while a dial is under way, and wanted again while the socket that it
/// led to is closing: the node waits for that. It ended with an assertion.
#[test]
fn a_late_socket_does_not_disturb_the_next_connection() {
    for (before, after) in (0..12).flat_map(|before| (0..5).map(move |after| (before, after))) {
        let mut w = World::new(1301, Setup::default());
        w.start_synced();
        w.must(B, Command::Disconnect { force: true });
        w.run_until("the loss", Span::from_secs(30), |w| w.conn(A) < Conn::Connected);
        w.must(B, Command::Connect { discard_my_data: false });
        for _ in 0..before {
            w.step();
        }
        w.must(B, Command::Disconnect { force: true });
        for _ in 0..after {
            w.step();
        }
        w.must(B, Command::Connect { discard_my_data: false });
        if w.conn(A) == Conn::StandAlone {
            w.must(A, Command::Connect { discard_my_data: false });
        }
        w.wait_synced();
    }
}
