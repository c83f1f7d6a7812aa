//! A Primary without a disk that serves its peer's data, and what becomes of the generations
//! (GI-1). When it takes its own disk back, that follows the data in use, whatever its superblock
//! says (DUR-5, RD-1).

use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::meta::MetaFlags;
use replication_core::state::{Conn, Disk, OnNoData};
use replication_core::units::{Errno, SectorRange, Span, VolumeNr};
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::Setup;
use tests::sim::{A, B, World};

/// The first volume's current generation on the disk of a node, without the role.
fn on_disk(w: &World, n: usize) -> u64 {
    w.on_disk(n, 0).expect("the superblock is whole").superblock.uuids.current & !1
}

/// The next operation of this kind on A's disk fails, where its metadata is, too.
fn fails(w: &mut World, kind: Kind) {
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind, range: None, times: Some(1), trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
}

/// A write of A's metadata fails, which may have got to the disk all the same, after `pass` writes
/// that succeed; B goes away for it, so that the write is the one of a new generation.
fn begins_a_generation_that_fails(w: &mut World) -> bool {
    let shared = on_disk(w, A);
    fails(w, Kind::MetaWrite);
    w.disk_failed(B, 0);
    w.must(B, Command::Detach { volume: None, force: true });
    w.disk_failed(A, 0);
    let limit = Span::from_secs(10);
    w.run_until("A's disk fails", limit, |w| w.state(A, 0).disk == Disk::Diskless);
    on_disk(w, A) != shared
}

/// A generation was begun on the Primary's disk, and failed with it; nothing was acknowledged in
/// it. The data in use went on at the peer. The old disk was taken for newer, and overwrote it.
#[test]
fn a_generation_that_failed_is_not_newer() {
    let mut reached_the_disk = 0;
    for seed in 800..820 {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        reached_the_disk += u32::from(begins_a_generation_that_fails(&mut w));
        w.must(B, Command::Attach(None));
        let limit = Span::from_secs(10);
        w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        w.write(A, 0, 32, 64);
        w.must(A, Command::Attach(None));
        w.wait_synced();
        w.check_equal(0);
        w.read_all(A, 0);
    }
    assert!((1..20).contains(&reached_the_disk), "{reached_the_disk} of 20");
}

/// A Secondary that was away connects to a Primary which has lost its disk and goes on to refuse
/// the old data there. The Secondary begins no generation for it: when the disk is back, it gets
/// what it has missed. It took the Primary for one that writes to it, and that ended as a split
/// brain.
#[test]
fn a_secondary_that_is_refused_begins_no_generation() {
    let mut w = World::new(880, Setup::default());
    w.start_synced();
    w.cut();
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(A) < Conn::Connected);
    w.write(A, 0, 0, 8);
    w.settle();
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: true });
    let before = w.status(B).volumes[0].uuids;
    w.heal();
    w.run_until("the old data is refused", limit, |w| w.conn(A) == Conn::StandAlone);
    w.settle();
    assert_eq!(w.status(B).volumes[0].uuids, before, "nothing was written there");
    w.must(A, Command::Attach(None));
    for n in [A, B] {
        let connect = Command::Connect { discard_my_data: false };
        w.tell(n, connect);
    }
    w.wait_synced();
    w.read_all(A, 0);
}

/// The Primary's disk is taken away while its new generation is on the way to it, and it gets
/// there: nothing was acknowledged in it, and the disk is given up as one of the generation before.
/// It counted as the new one when it came back, beside the one in which the peer had gone on.
#[test]
fn a_generation_that_came_too_late_is_not_begun() {
    let mut w = World::new(821, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    let shared = on_disk(&w, A);
    w.disk_failed(B, 0);
    w.tell(B, Command::Detach { volume: None, force: true });
    let limit = Span::from_secs(10);
    w.run_until("B's disk is gone", limit, |w| w.state(A, 0).pdsk < Disk::Inconsistent);
    assert_eq!(on_disk(&w, A), shared, "it is on the way");
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: true });
    w.settle();
    assert_ne!(on_disk(&w, A), shared, "it has got there");
    w.must(B, Command::Attach(None));
    w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
    w.write(A, 0, 32, 64);
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// The peer of a Primary that has lost its disk begins a generation, says so, and its disk fails
/// over it. Nothing was acknowledged in it: the Primary goes on with the data of the generation
/// before, on either disk. It asked for the one that was not begun, and refused both.
#[test]
fn a_generation_that_the_peer_failed_to_begin_is_not_asked_for() {
    for first in [A, B] {
        let mut w = World::new(822, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        let backing = &w.nodes[B].backing[0];
        let geometry = w.nodes[B].setup.geometry(0, backing.data.sectors(), None);
        let superblock = geometry.expect("it has metadata").superblock.0;
        let range = Some(SectorRange { start: superblock, end: superblock + 8 });
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::MetaWrite, range, times: Some(1), trouble };
        w.nodes[B].backing[0].data.add_fault(fault);
        w.disk_failed(A, 0);
        w.disk_failed(B, 0);
        w.must(A, Command::Detach { volume: None, force: true });
        let limit = Span::from_secs(10);
        w.run_until("no disk is left", limit, |w| w.all(|state| state.disk == Disk::Diskless));
        w.settle();
        if first == A {
            w.must(A, Command::Disconnect { force: true });
        }
        w.must(first, Command::Attach(None));
        w.run_until("a good copy", limit, |w| {
            let state = w.state(A, 0);
            state.disk == Disk::UpToDate || state.pdsk == Disk::UpToDate
        });
        w.write(A, 0, 64, 8);
        w.must(1 - first, Command::Attach(None));
        w.tell(A, Command::Connect { discard_my_data: false });
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A Primary loses its disk over a request and cannot tell its peer, then it crashes. That disk
/// comes back in the generation of both as the one that was written to last, without what it has
/// lost. So nothing is told done that only the peer has, as long as the peer may not know that: a
/// flush and a write were.
#[test]
fn what_only_the_peer_has_is_not_done_before_the_peer_knows() {
    let block = SectorRange { start: 0, end: 8 };
    let write = (HostOp::Write { fua: false }, block, Kind::Write);
    let flush = (HostOp::Flush, SectorRange::default(), Kind::Flush);
    for (seed, (op, range, kind)) in (830..840).flat_map(|seed| [(seed, write), (seed, flush)]) {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        fails(&mut w, kind);
        let number = w.submit(A, 0, op, range).expect("a slot is free");
        if range == block {
            let is_there = |w: &mut World| w.nodes[B].writes_under_way(0).next().is_some();
            w.run_until("the write at B", Span::from_secs(1), is_there);
        }
        w.net.cut_towards(B);
        w.run_for(Span::from_ms(200));
        assert_eq!(w.state(A, 0).disk, Disk::Diskless);
        assert_eq!(w.answer(A, number), None, "B does not know");
        w.power_cut(A, Cut::LoseAll);
        w.heal();
        w.restart(A);
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

/// The link is lost before the peer knows, and the host hears nothing until it does: then a flush
/// and a write are done, although nothing else is written.
#[test]
fn what_waits_for_the_peer_to_know_is_done_when_it_does() {
    for policy in [OnNoData::SuspendIo, OnNoData::IoError] {
        let setup = Setup::with(|s| s.nodes[A].config.on_no_data = policy);
        let mut w = World::new(841, setup);
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        fails(&mut w, Kind::Flush);
        w.net.cut_towards(B);
        let flush = w.submit(A, 0, HostOp::Flush, SectorRange::default()).expect("a slot is free");
        let limit = Span::from_secs(60);
        w.run_until("the loss is noticed", limit, |w| w.conn(A) < Conn::Connected);
        let expected = (policy == OnNoData::IoError).then_some(Err(Errno::EIO));
        assert_eq!(w.answer(A, flush), expected);
        w.heal();
        w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        w.run_until("an answer", limit, |w| w.answer(A, flush).is_some());
        assert_eq!(w.answer(A, flush), Some(expected.unwrap_or(Ok(()))));
        w.flush(A, 0);
        w.must(A, Command::Attach(None));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A Primary's disk fails over a flush, and the peer says so with a generation. The flush is done
/// when that is on the peer's disk, also if the own one is attached again meanwhile: both lose power
/// before, and meet in the old one.
#[test]
fn the_peer_knows_when_its_disk_does() {
    for (seed, attaches) in (850..870).flat_map(|seed| [(seed, false), (seed, true)]) {
        let setup = Setup::with(|s| {
            s.speed.latency = Span::from_ms(1);
            s.nodes[B].disk_time = (Span::from_ms(20), Span::from_ms(21));
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.flush(A, 0);
        w.settle();
        fails(&mut w, Kind::Flush);
        w.write(A, 0, 0, 8);
        let flush = w.submit(A, 0, HostOp::Flush, SectorRange::default()).expect("a slot is free");
        let limit = Span::from_secs(5);
        if attaches {
            w.run_until("A is bare", limit, |w| w.state(A, 0).disk == Disk::Diskless);
            w.tell(A, Command::Attach(None));
        }
        w.run_until("an answer", limit, |w| w.answer(A, flush).is_some());
        for n in [A, B] {
            w.power_cut(n, Cut::LoseAll);
        }
        for n in [A, B] {
            w.restart(n);
        }
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}

/// A write that fails here is passed on to the peer, and the superblock that was to say that this
/// disk is not good any more cannot be written either. It is what a crash finds: the write is not
/// done before the peer knows.
#[test]
fn a_disk_that_cannot_even_say_that_it_is_bad() {
    for seed in 870..880 {
        let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = OnIoError::PassOn));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        [Kind::Write, Kind::MetaWrite].into_iter().for_each(|kind| fails(&mut w, kind));
        let range = SectorRange { start: 0, end: 8 };
        let op = HostOp::Write { fua: false };
        let number = w.submit(A, 0, op, range).expect("a slot is free");
        let is_there = |w: &mut World| w.nodes[B].writes_under_way(0).next().is_some();
        w.run_until("the write at B", Span::from_secs(1), is_there);
        w.net.cut_towards(B);
        w.run_for(Span::from_ms(200));
        let is_good = |w: &World| {
            let flags = w.on_disk(A, 0).expect("the superblock is whole").superblock.flags;
            flags.contains(MetaFlags::CONSISTENT)
        };
        assert!(w.answer(A, number).is_none() || !is_good(&w), "A's disk says that it is good");
    }
}

/// The Primary's disk is taken away at any moment while a peer with older data comes back, and
/// returns when that is over.
fn loses_its_disk_while_old_data_comes(w: &mut World, steps: usize) {
    for _ in 0..steps {
        w.step();
    }
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: true });
    w.run_for(Span::from_secs(3));
    for n in [A, B] {
        if w.state(n, 0).disk == Disk::Diskless {
            w.must(n, Command::Attach(None));
        }
        if w.conn(n) == Conn::StandAlone {
            w.tell(n, Command::Connect { discard_my_data: false });
        }
    }
    w.wait_synced();
    w.read_all(A, 0);
}

/// Between the identifiers of a peer that attaches its disk and its state the Primary lost its own
/// disk. It had compared the older data there with its own and went on with them, and the peer
/// began a generation of them: what was acknowledged was gone, or a split brain.
#[test]
fn old_data_that_attaches_is_not_served() {
    for steps in 0..60 {
        let mut w = World::new(930, Setup::default());
        w.start_synced();
        w.must(B, Command::Detach { volume: None, force: false });
        w.write(A, 0, 0, 64);
        w.settle();
        w.tell(B, Command::Attach(None));
        loses_its_disk_while_old_data_comes(&mut w, steps);
    }
}

/// The same with a peer that connects.
#[test]
fn old_data_that_connects_is_not_served() {
    for steps in 0..120 {
        let mut w = World::new(931, Setup::default());
        w.start_synced();
        w.cut();
        let limit = Span::from_secs(30);
        w.run_until("the loss is noticed", limit, |w| w.conn(A) < Conn::Connected);
        w.write(A, 0, 0, 64);
        w.settle();
        w.heal();
        w.run_until("they meet", limit, |w| w.conn(A) == Conn::WFReportParams);
        loses_its_disk_while_old_data_comes(&mut w, steps);
    }
}

/// The Primary goes on without its disk, which comes back and is being brought up to date.
fn becomes_a_target(w: &mut World) {
    w.must(A, Command::Detach { volume: None, force: false });
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(A, Command::Attach(None));
    let limit = Span::from_secs(20);
    w.run_until("A is a target", limit, |w| w.conn(A) == Conn::SyncTarget);
}

/// A Primary whose disk is just in sync again loses it while the superblock that says so is on the
/// way, and cannot tell its peer. That superblock may get there, so this disk comes back as the one
/// that was written to last: what only the peer has is not done before the peer knows.
#[test]
fn a_disk_that_is_lost_as_it_becomes_good() {
    let mut unanswered = 0;
    for seed in 940..960 {
        let setup = Setup::with(|s| {
            s.speed.latency = Span::from_ms(1);
            s.nodes[A].disk_time = (Span::from_ms(20), Span::from_ms(21));
        });
        let mut w = World::new(seed, setup);
        w.start_synced();
        let limit = Span::from_secs(20);
        becomes_a_target(&mut w);
        w.write(A, 0, 128, 8);
        w.run_until("A is in sync", limit, |w| w.state(A, 0).disk == Disk::UpToDate);
        w.run_for(Span::from_ms(4 * (seed - 940)));
        fails(&mut w, Kind::Write);
        let (op, range) = (HostOp::Write { fua: true }, SectorRange { start: 0, end: 8 });
        let number = w.submit(A, 0, op, range).expect("a slot is free");
        let is_there = |w: &mut World| w.nodes[B].writes_under_way(0).next().is_some();
        w.run_until("the write at B", Span::from_secs(1), is_there);
        w.net.cut_towards(B);
        w.disk_failed(A, 0);
        w.run_for(Span::from_ms(200));
        assert_eq!(w.state(A, 0).disk, Disk::Diskless);
        unanswered += u32::from(w.answer(A, number).is_none());
        w.power_cut(A, Cut::LoseAll);
        w.heal();
        w.restart(A);
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
    assert!((3..17).contains(&unanswered), "{unanswered} of 20");
}

/// A Primary that is being brought up to date loses its disk and the link, in either order, before
/// its peer hears of that: it goes on with the peer's data, which it has been reading. It asked for
/// a generation that nobody has, and was locked out.
#[test]
fn a_target_that_loses_its_disk_and_the_link() {
    for link_first in [false, true] {
        let mut w = World::new(970, Setup::default());
        w.start_synced();
        let limit = Span::from_secs(60);
        becomes_a_target(&mut w);
        w.run_for(Span::from_ms(50));
        w.cut();
        let is_alone = |w: &mut World| w.conn(A) < Conn::Connected;
        if link_first {
            w.run_until("the loss is noticed", limit, is_alone);
        }
        w.must(A, Command::Detach { volume: None, force: true });
        w.run_until("the loss is noticed", limit, is_alone);
        w.heal();
        w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        w.read_all(A, 0);
        w.must(A, Command::Attach(None));
        w.wait_synced();
    }
}

/// A Primary that is served by its peer attaches its old disk, and the peer loses its own before
/// that is decided: the old data is not taken for the data in use.
#[test]
fn an_attach_whose_peer_loses_its_disk_serves_no_old_data() {
    let mut refused = 0;
    for step in 0..60 {
        let mut w = World::new(972, Setup::with(|s| s.speed.latency = Span::from_ms(1)));
        w.start_synced();
        w.write(A, 0, 0, 8);
        w.disk_failed(A, 0);
        w.must(A, Command::Detach { volume: None, force: false });
        w.write(A, 0, 0, 8);
        w.settle();
        w.tell(A, Command::Attach(None));
        for _ in 0..step {
            w.step();
        }
        w.disk_failed(B, 0);
        w.must(B, Command::Detach { volume: None, force: true });
        w.run_for(Span::from_secs(1));
        refused += u32::from(w.state(A, 0).disk == Disk::Diskless);
        w.must(B, Command::Attach(None));
        let limit = Span::from_secs(60);
        w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        if w.state(A, 0).disk == Disk::Diskless {
            w.must(A, Command::Attach(None));
        }
        w.wait_synced();
        w.read_all(A, 0);
    }
    assert!(refused > 10, "{refused} of 60");
}

/// The same with a new disk, before the resync begins: the bitmaps are still being exchanged.
#[test]
fn a_new_disk_that_is_lost_before_its_resync() {
    for steps in 0..40 {
        let mut w = World::new(973, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        w.disk_failed(A, 0);
        w.must(A, Command::Detach { volume: None, force: true });
        w.settle();
        w.nodes[A].create_metadata(0);
        w.must(A, Command::Attach(None));
        let limit = Span::from_secs(60);
        w.run_until("A is to be a target", limit, |w| w.conn(A) > Conn::Connected);
        for _ in 0..steps {
            w.step();
        }
        w.must(A, Command::Detach { volume: None, force: true });
        // What the peer has to say to that gets here.
        w.run_for(Span::from_ms(50));
        w.cut();
        w.run_until("the loss is noticed", limit, |w| w.conn(A) < Conn::Connected);
        w.heal();
        w.run_until("B is back", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        w.read_all(A, 0);
    }
}

/// The disk of a Primary is lost while its bitmap waits for the new generation to get to it. That
/// costs the connection nothing: another volume is served by the peer.
#[test]
fn a_source_that_loses_its_disk_before_the_bitmap_goes_out() {
    let mut w = World::new(974, Setup::with(Setup::second_volume));
    w.start_synced();
    w.write(A, 1, 0, 64);
    w.settle();
    w.disk_failed(A, 1);
    w.must(A, Command::Detach { volume: Some(VolumeNr(1)), force: true });
    w.settle();
    let trouble = Trouble::Stick;
    let fault = Fault { kind: Kind::MetaWrite, range: None, times: None, trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
    w.cut();
    let limit = Span::from_secs(60);
    w.run_until("the loss is noticed", limit, |w| w.conn(A) < Conn::Connected);
    w.heal();
    w.run_until("A is to be the source", limit, |w| w.conn(A) == Conn::WFBitMapS);
    w.disk_failed(A, 0);
    w.tell(A, Command::Detach { volume: Some(VolumeNr(0)), force: true });
    w.run_for(Span::from_ms(100));
    w.heal_disks(A);
    w.run_for(Span::from_secs(1));
    assert_eq!(w.state(A, 0).disk, Disk::Diskless);
    assert_eq!(w.state(A, 1).pdsk, Disk::UpToDate);
    assert!(!w.has_logged(A, "in the middle of a bitmap transfer"));
    w.read_all(A, 1);
}

/// A target's disk goes and comes back before it hears that the resync begins: it waits for the
/// next one. The connection was dropped.
#[test]
fn a_start_of_a_resync_that_comes_too_late() {
    let mut late = 0;
    for steps in 0..60 {
        let mut w = World::new(975, Setup::with(|s| s.speed.latency = Span::from_ms(20)));
        w.start_synced();
        w.must(B, Command::Detach { volume: None, force: false });
        w.write(A, 0, 0, 64);
        w.settle();
        w.must(B, Command::Attach(None));
        let limit = Span::from_secs(60);
        w.run_until("B is to be a target", limit, |w| w.state(B, 0).conn == Conn::WFBitMapT);
        for _ in 0..steps {
            w.step();
        }
        late += u32::from(w.state(B, 0).conn == Conn::WFSyncUUID);
        w.disk_failed(B, 0);
        w.must(B, Command::Detach { volume: None, force: true });
        w.must(B, Command::Attach(None));
        w.wait_synced();
        assert!(!w.has_logged(B, "peer broke the protocol"));
    }
    assert!(late > 0, "B was waiting for the start");
}
