//! Failures that seeds of the simulator have found, each as a scenario.

use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk, OnNoData, Role};
use replication_core::units::{Errno, SectorRange, Span, VolumeNr};
use replication_core::wire::ReplicationProtocol;
use tests::sim::control::RESIZE;
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::Setup;
use tests::sim::{A, B, Load, World};

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

/// A node that is alone begins a generation by command.
fn begin_generation(w: &mut World, n: usize) {
    w.must(n, Command::Disconnect { force: false });
    w.must(n, Command::NewCurrentUuid { volume: None, clear_bitmap: false });
    w.must(n, Command::Connect { discard_my_data: false });
}

/// Two volumes, connected and in sync; then node B is Secondary and alone.
fn two_volumes(seed: u64) -> World {
    let mut w = World::new(seed, Setup::with(Setup::second_volume));
    w.start_synced();
    w
}

/// A promotion that one volume refuses leaves the other one as it was: no new generation, no role
/// (ST-7). It left the first volume with a new generation.
#[test]
fn a_refused_promotion_leaves_every_volume_alone() {
    let mut w = two_volumes(701);
    w.must(A, Command::Secondary { holder: None });
    w.cut();
    wait_alone(&mut w, A);
    w.disk_failed(A, 1);
    w.must(A, Command::Detach { volume: Some(VolumeNr(1)), force: false });
    let before = w.status(A).volumes[0].uuids;
    w.must_not(A, Command::Primary { force: false });
    assert_eq!(w.status(A).volumes[0].uuids, before);
    assert_eq!(w.state(A, 0).role, Role::Secondary);
    w.must(A, Command::Attach(Some(VolumeNr(1))));
    w.heal();
    w.wait_synced();
}

/// A promotion that waits for the peer's consent to one volume and is cut short by a forced
/// command leaves no volume Primary, and the peer knows (ST-3, ST-7).
#[test]
fn a_promotion_cut_short_leaves_no_role_behind() {
    for step in 0..60 {
        let mut w = two_volumes(702);
        w.must(A, Command::Secondary { holder: None });
        w.settle();
        let promotion = w.tell(A, Command::Primary { force: false });
        for _ in 0..step {
            w.step();
        }
        w.disk_failed(A, 1);
        w.must(A, Command::Detach { volume: Some(VolumeNr(1)), force: true });
        assert!(w.reply(A, promotion).is_some(), "cut short, if not done");
        let role = w.state(A, 0).role;
        assert_eq!(w.state(A, 1).role, role, "after {step} steps");
        w.settle();
        for volume in 0..2 {
            assert_eq!(w.state(B, volume).peer, role, "after {step} steps");
        }
    }
}

/// Outdating is carried out or refused as a whole (ST-7): it outdated the volumes before the first
/// one that refused.
#[test]
fn a_refused_outdate_leaves_every_volume_alone() {
    let mut w = two_volumes(703);
    w.disk_failed(B, 1);
    w.must(B, Command::Detach { volume: Some(VolumeNr(1)), force: false });
    w.cut();
    wait_alone(&mut w, B);
    let is_refused = w.ask(B, Command::Outdate).is_err();
    assert_eq!(w.state(B, 0).disk == Disk::UpToDate, is_refused);
    w.must(B, Command::Attach(Some(VolumeNr(1))));
    w.heal();
    w.wait_synced();
}

/// A command that waits behind `down` is refused: it opened the disks of an engine that had put
/// everything away.
#[test]
fn nothing_follows_the_end() {
    let mut w = two_volumes(705);
    let down = w.tell(B, Command::Down { holder: None, force: false });
    let up = w.tell(B, Command::Up);
    w.run_until("the end", Span::from_secs(30), |w| !w.is_alive(B));
    w.reply(B, down).expect("answered").unwrap();
    w.reply(B, up).expect("answered").unwrap_err();
    w.restart(B);
    w.wait_synced();
}

/// The peer's write waits for its extent in the log when the operator looks for a grown disk: the
/// write gives its place up and takes it again later, instead of both for ever in turn.
#[test]
fn a_resize_meets_a_write_that_waits_for_the_log() {
    for step in 0..12 {
        let mut w = World::new(706, Setup::default());
        w.start_synced();
        w.disk_failed(A, 0);
        w.must(A, Command::Detach { volume: None, force: false });
        let range = SectorRange { start: 8192, end: 8200 };
        w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
        for _ in 0..step {
            w.step();
        }
        w.must(B, RESIZE);
        w.drain(A);
        w.must(A, Command::Attach(None));
        w.wait_synced();
    }
}

/// A Primary that was served by its peer attaches its old disk, and the peer is lost before that is
/// done: the old data must not be taken for the data in use (RD-1).
#[test]
fn an_attach_that_loses_its_peer_serves_no_old_data() {
    let mut refused = 0;
    for step in 0..30 {
        let mut w = World::new(708, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 8);
        w.disk_failed(A, 0);
        w.must(A, Command::Detach { volume: None, force: false });
        w.write(A, 0, 0, 8);
        let attach = w.tell(A, Command::Attach(None));
        for _ in 0..step {
            w.step();
        }
        w.kill(B);
        w.run_until("the answer", Span::from_secs(30), |w| w.reply(A, attach).is_some());
        refused += u32::from(w.reply(A, attach).expect("it was just seen").is_err());
        // What is read is checked against what was acknowledged; an error is right as well.
        if let Err(e) = w.request(A, 0, HostOp::Read, SectorRange { start: 0, end: 8 }) {
            assert_eq!(e, Errno::EIO);
        }
        w.must(A, Command::Secondary { holder: None });
    }
    assert!(refused > 0, "the peer was lost in time at least once");
}

/// The source has missed the end of a resync, and its peer comes back without its disk and attaches
/// it then: both compare the same identifiers (GI-3). The source announced the corrected ones, and
/// waited for a bitmap for ever while its peer took both for equal.
#[test]
fn an_attach_after_a_missed_end_is_judged_alike() {
    let mut w = World::new(709, Setup::default());
    w.start_synced();
    w.cut();
    wait_alone(&mut w, A);
    wait_alone(&mut w, B);
    w.write(A, 0, 0, 64);
    w.settle();
    w.heal();
    w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
    let limit = Span::from_secs(60);
    w.run_until("the target is done", limit, |w| w.state(B, 0).disk == Disk::UpToDate);
    w.cut();
    wait_alone(&mut w, A);
    wait_alone(&mut w, B);
    w.disk_failed(B, 0);
    w.must(B, Command::Detach { volume: None, force: false });
    w.heal();
    w.wait_connected();
    w.must(B, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// The disk of a Primary takes no writes while it is the source of a resync, and passes the errors
/// on: what its peer has got and it has not stays marked (BM-1). The answer to a resync of the same
/// block, read before the write, cleared the mark.
#[test]
fn a_source_that_takes_no_writes_keeps_its_marks() {
    for seed in 710..730 {
        let setup = Setup::with(|s| {
            s.disk(|disk| {
                disk.on_io_error = OnIoError::PassOn;
                disk.rate.max_rate_kib = 4_000;
            });
            s.speed.jitter = Span::from_ms(3);
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        for at in 0..16 {
            w.write(A, 0, at * 128, 128);
        }
        w.restart(B);
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(A) == Conn::SyncSource);
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: None, trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        let area = SectorRange { start: 0, end: 2048 };
        let small = Load { think: Span(400_000), most_sectors: 12, ..Load::writes(vec![area]) };
        w.start_load(A, small);
        w.run_for(Span::from_ms(700));
        w.heal_disks(A);
        w.drain(A);
        w.wait_synced();
    }
}

/// A new generation by hand, while the peer is away in the middle of a resync, forgets none that
/// the peer may be of (GI-2): both took each other for strangers.
#[test]
fn a_new_generation_by_hand_keeps_the_past() {
    let mut w = World::new(707, Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400)));
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    w.write(A, 0, 0, 256);
    w.write(A, 0, 4096, 256);
    w.restart(B);
    for _ in 0..3 {
        w.heal();
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
    }
    begin_generation(&mut w, A);
    w.heal();
    w.wait_synced();
    w.read_all(A, 0);
}

/// A resync is begun again and again, and each time the connection is lost before the target hears
/// of it: the generation that the target is of stays in the history of the source (GI-2). After the
/// third time both took each other for strangers.
#[test]
fn a_start_that_is_never_heard_of_keeps_the_past() {
    let mut w = World::new(731, Setup::default());
    w.start_synced();
    w.cut();
    wait_alone(&mut w, A);
    wait_alone(&mut w, B);
    w.write(A, 0, 0, 256);
    begin_generation(&mut w, A);
    for _ in 0..4 {
        w.heal();
        w.run_until("the start", Span::from_secs(60), |w| w.conn(A) == Conn::SyncSource);
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
    }
    w.heal();
    w.wait_synced();
    w.read_all(A, 0);
    // The history is the same on both nodes, except for the roles that it notes.
    let [a, b] = [A, B].map(|n| w.status(n).volumes[0].uuids.map(|uuid| uuid & !1));
    assert_eq!(a, b);
}

/// A block that the source of a resync could not read is written by the host, on both nodes, and
/// then cannot be read again: only the source marks it. It took the target, which ended the resync
/// as UpToDate, for Inconsistent for ever (ST-3).
#[test]
fn marks_that_only_the_source_has_do_not_outlive_the_resync() {
    let setup = Setup::with(|s| {
        s.disk(|disk| {
            disk.on_io_error = OnIoError::PassOn;
            disk.rate.max_rate_kib = 400;
        });
    });
    let mut w = World::new(732, setup);
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    let bad = SectorRange { start: 0, end: 8 };
    w.write(A, 0, bad.start, bad.sectors());
    for at in 16..24 {
        w.write(A, 0, at * 256, 256);
    }
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Read, range: Some(bad), times: None, trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
    w.restart(B);
    w.wait_log(A, "failed, the blocks stay marked");
    w.write(A, 0, bad.start, bad.sectors());
    assert_eq!(w.request(A, 0, HostOp::Read, bad), Err(Errno::EIO));
    w.heal_disks(A);
    assert_eq!(w.conn(A), Conn::SyncSource);
    w.wait_synced();
}

/// The disk of a Primary is full, so its peer has the only copy of what is written, and loses power
/// between its acknowledgement and the answer to the host: that a write which was not flushed is
/// lost with both faults is no finding (DUR-5).
#[test]
fn an_acknowledgement_does_not_outlive_the_power_of_its_sender() {
    let mut answered = 0;
    for step in 0..24 {
        let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = OnIoError::PassOn));
        let mut w = World::new(733 + step, setup);
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: None, trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        let range = SectorRange { start: 0, end: 8 };
        let number = w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
        for _ in 0..step {
            w.step();
        }
        let is_early = w.answer(A, number).is_none();
        w.power_cut(B, Cut::LoseAll);
        w.drain(A);
        answered += u32::from(is_early && w.answer(A, number) == Some(Ok(())));
        w.heal_disks(A);
        w.restart(B);
        w.wait_synced();
    }
    assert!(answered > 0, "the acknowledgement came in after the power cut at least once");
}

/// The disk of a Primary fails when everything is about to be copied to it, from a peer that was of
/// the same generation: what the peer alone is written from then on is of another one (GI-1). The
/// old disk was attached again, without the peer, and taken for the data in use (RD-1).
#[test]
fn a_full_sync_that_never_begins_ends_the_common_generation() {
    for seed in 760..772 {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::MetaWrite, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        w.tell(A, Command::Invalidate(None));
        let limit = Span::from_secs(30);
        w.run_until("the disk is gone", limit, |w| w.state(A, 0).disk == Disk::Diskless);
        w.settle();
        w.write(A, 0, 0, 8);
        w.cut();
        wait_alone(&mut w, A);
        w.must_not(A, Command::Attach(None));
        w.heal();
        w.wait_connected();
        w.must(A, Command::Attach(None));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// With protocols A and B a write counts as sent before the peer has it on its disk. When the
/// connection is lost and the local write fails after that, nobody may have it, and the host is
/// told so (ACK-2).
#[test]
fn what_was_only_sent_is_no_copy() {
    for protocol in [ReplicationProtocol::A, ReplicationProtocol::B] {
        let setup = Setup::with(|s| s.protocol(protocol));
        let mut w = World::new(777, setup);
        w.start_synced();
        w.write(A, 0, 0, 8);
        w.nodes[A].slowness = 1000;
        w.nodes[B].slowness = 1000;
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        let range = SectorRange { start: 0, end: 8 };
        let number = w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
        w.run_for(Span::from_ms(20));
        assert!(w.answer(A, number).is_none(), "the local disk is slow");
        w.kill(B);
        w.run_until("the loss", Span::from_secs(1), |w| w.conn(A) < Conn::Connected);
        assert!(w.answer(A, number).is_none(), "the disk is slower than that");
        w.run_until("the answer", Span::from_secs(60), |w| w.answer(A, number).is_some());
        assert_eq!(w.answer(A, number), Some(Err(Errno::EIO)), "{protocol:?}");
    }
}

/// A Primary that gets its disk back while it is alone begins a generation before it answers a
/// write (GI-1). Its peer may have begun one when that disk failed, which the Primary never heard
/// of: what it wrote alone was taken for the past of the peer's, and overwritten (DUR-5).
#[test]
fn a_lone_primary_with_its_disk_back_begins_a_generation() {
    for is_peer_ahead in [false, true] {
        let mut w = World::new(775, Setup::default());
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        let range = SectorRange { start: 0, end: 8 };
        w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
        w.run_until("the cut", Span::from_secs(10), |w| {
            let is_gone = w.state(A, 0).disk == Disk::Diskless;
            is_gone && (!is_peer_ahead || w.has_logged(B, "new current UUID:"))
        });
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.must(A, Command::Attach(None));
        w.write(A, 0, 64, 8);
        w.heal();
        if is_peer_ahead {
            let limit = Span::from_secs(60);
            w.run_until("the split brain is seen", limit, |w| w.conn(B) == Conn::StandAlone);
            assert!(w.has_logged(B, "Split-Brain detected"));
            w.run_until("both see it", limit, |w| w.conn(A) == Conn::StandAlone);
            w.must(B, Command::Connect { discard_my_data: true });
            w.must(A, Command::Connect { discard_my_data: false });
        }
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A peer whose disk is all that a Primary has cannot write a block, and passes the error on: the
/// write fails, but the disk stays the good copy that it is (DUR-5). It was called Inconsistent, so
/// nothing could be read any more, and the Primary's old disk was the better one from then on.
#[test]
fn the_only_copy_is_not_given_up_for_one_block() {
    let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = OnIoError::PassOn));
    let mut w = World::new(780, setup);
    w.start_synced();
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.write(A, 0, 0, 8);
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
    w.nodes[B].backing[0].data.add_fault(fault);
    let range = SectorRange { start: 64, end: 72 };
    assert_eq!(w.request(A, 0, HostOp::Write { fua: false }, range), Err(Errno::EIO));
    assert_eq!(w.state(B, 0).disk, Disk::UpToDate);
    w.read(A, 0, 0, 8);
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// A disk that fails while a resize waits for it to be quiet: the resize is refused, and nobody
/// asks for the size of a disk that was put away.
#[test]
fn a_resize_ends_with_its_disk() {
    let mut before_the_probe = 0;
    for seed in 705..721 {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Flush, range: None, times: Some(1), trouble };
        w.nodes[B].backing[0].data.add_fault(fault);
        w.nodes[B].slowness = 1000;
        w.write(A, 0, 0, 8);
        w.run_for(Span::from_ms(5));
        w.must(B, Command::Disconnect { force: true });
        let resize = Command::Resize {
            volume: None,
            size: None,
            assume_clean: false,
            assume_peer_has_space: true,
        };
        // Its turn may come before the disk fails, or between that and the answer of the probe.
        let answer = w.ask(B, resize);
        before_the_probe += usize::from(answer.is_err_and(|refusal| refusal.code == -11));
        w.heal_disks(B);
        w.run_until("the disk is put away", Span::from_secs(60), |w| {
            w.state(B, 0).disk == Disk::Diskless
        });
        w.must(B, Command::Attach(None));
        w.must(B, Command::Connect { discard_my_data: false });
        w.wait_synced();
    }
    assert!(before_the_probe > 0);
}

/// A resize that is cut short by a forced command lets the host's writes go on (LV-1): they were
/// held back for ever.
#[test]
fn a_resize_cut_short_holds_nothing_back() {
    for step in 0..12 {
        let mut w = World::new(704, Setup::default());
        w.start_synced();
        w.tell(A, RESIZE);
        for _ in 0..step {
            w.step();
        }
        w.must(A, Command::Disconnect { force: true });
        w.write(A, 0, 0, 8);
        w.must(A, Command::Connect { discard_my_data: false });
        w.wait_synced();
    }
}

/// A Primary that is taken down by force while the peer has not confirmed everything ends like one
/// that crashed: what is marked on its disk is copied when it is back (ACK-1, AL-10). It ended
/// cleanly, in the same generation as its peer, and the marks were not looked at again.
#[test]
fn a_forced_down_with_unconfirmed_writes_is_no_clean_end() {
    let setup = Setup::with(|s| s.protocol(ReplicationProtocol::A));
    let mut w = World::new(704, setup);
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.settle();
    w.cut();
    w.write(A, 0, 64, 8);
    w.must(A, Command::Down { holder: None, force: true });
    w.heal();
    w.restart(A);
    w.wait_synced();
    assert!(w.differing[0].is_empty(), "{:?}", w.differing[0]);
}

/// A write that its receiver refuses for want of a disk is over: what is written in later epochs,
/// when the disk is back and the connection is the same, does not wait for it (ORD-2).
#[test]
fn a_refused_write_holds_no_epoch_open() {
    let mut w = World::new(711, Setup::with(|s| s.speed.jitter = Span::from_ms(20)));
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.settle();
    // No resync asks for a part of a block: it cannot be taken for this write.
    w.submit(A, 0, HostOp::Write { fua: false }, SectorRange { start: 1, end: 4 }).unwrap();
    w.disk_failed(B, 0);
    w.must(B, Command::Detach { volume: None, force: true });
    w.drain(A);
    assert_eq!(w.packets_sent("P_NEG_ACK"), 1, "the write came when the disk was gone");
    w.must(B, Command::Attach(None));
    w.wait_synced();
    w.write(A, 0, 64, 8);
    w.wait_synced();
}

/// The source of a resync dies when its target has ended it and is of the same generation, before
/// the source has heard of it: no write is alone then (GI-1, GI-8).
#[test]
fn a_source_may_die_before_it_hears_of_the_end() {
    let setup = Setup::with(|s| s.speed.jitter = Span::from_ms(20));
    let mut w = World::new(712, setup);
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    w.write(A, 0, 0, 64);
    w.restart(B);
    let of = |w: &World, n: usize| w.on_disk(n, 0).expect("a disk").superblock.uuids.current | 1;
    let limit = Span::from_secs(60);
    w.run_until("the target is of the source's generation", limit, |w| of(w, A) == of(w, B));
    assert_eq!(w.conn(A), Conn::SyncSource);
    w.kill(A);
    w.restart(A);
    w.wait_synced();
}

/// A node takes the protocol over that its peer was told of, and answers the host as that one says
/// (ACK-A), whatever its own configuration is.
#[test]
fn a_node_writes_by_the_protocol_of_its_peer() {
    let mut w = World::new(713, Setup::default());
    w.start_synced();
    let mut resource = w.nodes[B].setup.config.clone();
    resource.net.protocol = ReplicationProtocol::A;
    let command = w.adjust(B, resource);
    w.must(B, command);
    w.wait_log(A, "peer changed the settings: protocol A");
    w.nodes[B].slowness = 100;
    for at in 0..8 {
        w.write(A, 0, at * 8, 8);
    }
    assert!(!w.differing[0].is_empty(), "no write was answered before the peer had it");
    w.heal_disks(B);
    w.wait_synced();
}

/// A block that is announced between the exchange of bitmaps and the start of the resync is marked
/// on the disk of the target before its copy is confirmed: the source forgets it then, and a power
/// cut of the target would leave it unmarked on both nodes (BM-1, BM-4).
#[test]
fn a_late_notice_is_on_disk_before_its_copy_is_confirmed() {
    let mut announced = 0;
    for seed in 800..840 {
        let setup = Setup::with(|s| {
            s.speed.jitter = Span(3_000_000);
            s.nodes[A].disk_time = (Span(20_000), Span(3_000_000));
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.write(A, 0, 0, 8);
        w.settle();
        w.heal();
        let limit = Span::from_secs(60);
        w.run_until("the bitmaps", limit, |w| w.conn(A) == Conn::WFBitMapS);
        for at in 1..8 {
            let range = SectorRange { start: at * 64, end: at * 64 + 8 };
            w.submit(A, 0, HostOp::Write { fua: false }, range).unwrap();
        }
        w.run_until("a copy", limit, |w| w.packets_sent("P_RS_WRITE_ACK") > 0);
        announced += w.packets_sent("P_OUT_OF_SYNC");
        for _ in 0..seed % 40 {
            w.step();
        }
        w.power_cut(B, Cut::LoseAll);
        w.drain(A);
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
    assert!(announced > 0, "there were late notices");
}

/// The source of a resync loses the target when that one has ended it and is of the same
/// generation, before the source has heard of it. What it writes from then on is in a generation of
/// its own: the target may be promoted, and the source come back (GI-1, GI-6).
#[test]
fn a_source_alone_after_an_unheard_end_begins_a_generation() {
    let setup = Setup::with(|s| s.speed.jitter = Span::from_ms(20));
    let mut w = World::new(712, setup);
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    w.write(A, 0, 0, 64);
    w.restart(B);
    let of = |w: &World, n: usize| w.on_disk(n, 0).expect("a disk").superblock.uuids.current | 1;
    let limit = Span::from_secs(60);
    w.run_until("the target is of the source's generation", limit, |w| of(w, A) == of(w, B));
    assert_eq!(w.conn(A), Conn::SyncSource);
    w.cut();
    wait_alone(&mut w, A);
    w.write(A, 0, 0, 8);
    assert_ne!(of(&w, A), of(&w, B));
    w.kill(A);
    wait_alone(&mut w, B);
    w.must(B, Command::Primary { force: false });
    w.write(B, 0, 64, 8);
    w.heal();
    w.restart(A);
    w.run_until("the split brain is seen", limit, |w| w.has_logged(B, "Split-Brain detected"));
}

/// The marks of a resync that has ended are gone from the disk before the metadata says that it
/// has: after a power cut they came back, and were shown as out of sync for ever (RS-1).
#[test]
fn the_marks_of_an_ended_resync_do_not_come_back() {
    for (victim, steps) in [A, B].into_iter().flat_map(|n| (0..16).map(move |steps| (n, steps))) {
        let mut w = World::new(721, Setup::default());
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        w.write(A, 0, 0, 64);
        w.must(A, Command::Secondary { holder: None });
        w.settle();
        w.restart(B);
        let limit = Span::from_secs(60);
        w.run_until("the start", limit, |w| w.conn(victim) > Conn::Connected);
        w.run_until("the end", limit, |w| w.conn(victim) == Conn::Connected);
        for _ in 0..steps {
            w.step();
        }
        w.power_cut(victim, Cut::LoseAll);
        wait_alone(&mut w, 1 - victim);
        w.restart(victim);
        w.wait_synced();
        for n in [A, B] {
            assert_eq!(w.status(n).volumes[0].out_of_sync_kib, 0, "{n} after {steps} steps");
        }
    }
}

/// A generation is begun by command on a node that stands alone only. On a connected Primary it
/// left the peer behind; when the Primary's disk was lost then, the peer went on from the common
/// generation, and the Primary took its old disk back for the data in use (DUR-5).
#[test]
fn a_connected_node_begins_no_generation_of_its_own() {
    let mut w = World::new(722, Setup::default());
    w.start_synced();
    let begin = Command::NewCurrentUuid { volume: None, clear_bitmap: false };
    let refusal = w.must_not(A, begin);
    assert_eq!(refusal.code, 151, "{refusal:?}");
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.write(A, 0, 0, 8);
    w.cut();
    wait_alone(&mut w, A);
    w.must_not(A, Command::Attach(None));
    w.heal();
    w.wait_connected();
    w.must(A, Command::Attach(None));
    w.wait_synced();
}

/// A write is mirrored to the target of a resync when the source's disk, the only good copy, fails:
/// it waits for a good copy and goes on when there is one again, although its epoch was open and
/// nothing would have closed it (LV-1).
#[test]
fn a_write_that_lost_its_good_copy_goes_on_with_the_next() {
    for seed in 760..776 {
        let setup = Setup::with(|s| {
            s.nodes[A].config.on_no_data = OnNoData::SuspendIo;
            s.disk(|disk| disk.rate.max_rate_kib = 400);
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        w.write(A, 0, 0, 256);
        w.restart(B);
        let limit = Span::from_secs(60);
        w.run_until("the resync", limit, |w| w.conn(A) == Conn::SyncSource);
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Read, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        let mut numbers = Vec::new();
        while w.state(A, 0).disk != Disk::Diskless {
            let range = SectorRange { start: 4096, end: 4104 };
            numbers.extend(w.submit(A, 0, HostOp::Write { fua: false }, range));
            w.run_for(Span(300_000));
        }
        w.run_for(Span::from_ms(100));
        w.must(A, Command::Attach(None));
        w.run_until("the answers", limit, |w| {
            numbers.iter().all(|number| w.answer(A, *number).is_some())
        });
        assert!(numbers.iter().all(|number| w.answer(A, *number) == Some(Ok(()))));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The disk of a source fails while its target is about to take part in the resync: the target's
/// word that it is Outdated, sent before it heard of that, does not make its data good (ACK-2,
/// DUR-5). What was written to it then was overwritten by the source's disk later.
#[test]
fn a_target_to_be_is_no_good_copy() {
    for seed in 790..830 {
        let setup = Setup::with(|s| s.speed.jitter = Span(3_000_000));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.cut();
        wait_alone(&mut w, A);
        w.write(A, 0, 0, 64);
        w.settle();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::MetaWrite, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        w.heal();
        let limit = Span::from_secs(60);
        w.run_until("the failure", limit, |w| w.state(A, 0).disk == Disk::Diskless);
        let mut numbers = Vec::new();
        for at in 0..20 {
            let range = SectorRange { start: at * 64, end: at * 64 + 8 };
            numbers.extend(w.submit(A, 0, HostOp::Write { fua: false }, range));
            w.run_for(Span(300_000));
        }
        w.run_for(Span::from_secs(1));
        for number in numbers {
            assert_eq!(w.answer(A, number), Some(Err(Errno::EIO)), "seed {seed}");
        }
        w.must(A, Command::Attach(None));
        w.wait_synced();
        w.read_all(A, 0);
    }
}
