//! Failures that seeds of the simulator have found with disks that are lost, come back, grow, or
//! are of different sizes, each as a scenario.

use replication_core::control::Command;
use replication_core::state::{Conn, Disk};
use replication_core::units::{Errno, Sector, Span, VolumeNr};
use replication_core::wire::{HeaderKind, Packet, Sizes, encode};
use tests::sim::control::RESIZE;
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, World};

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

/// The device of a Primary without a disk grows with its peer's: its old disk is too small then,
/// and is not attached (FE-1). The device in use shrank to it.
#[test]
fn a_served_device_does_not_shrink_to_an_old_disk() {
    let mut w = World::new(790, Setup::with(|s| s.nodes[B].devices[0].data = 12 * MIB));
    w.start_synced();
    let old = w.nodes[A].sizes[0];
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.kill(B);
    w.boot(B);
    w.must(B, Command::Attach(None));
    let resize = Command::Resize {
        volume: None,
        size: None,
        assume_clean: false,
        assume_peer_has_space: true,
    };
    w.must(B, resize);
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_connected();
    w.settle();
    let grown = w.nodes[A].sizes[0];
    assert!(grown > old, "the Primary serves what its peer has");
    w.write(A, 0, grown - 8, 8);
    let refusal = w.must_not(A, Command::Attach(None));
    assert_eq!(refusal.code, 111, "{refusal:?}");
    assert_eq!(w.nodes[A].sizes[0], grown);
    w.read(A, 0, grown - 8, 8);
}

/// A resize on the only node with a disk changes nothing when the other disk, which is away, has
/// no room for more: the bare Primary is told so. It took all that the peer's disk holds for its
/// device, and the peer refused what was written there (FE-1, WP-4).
#[test]
fn a_bare_primary_takes_the_size_of_the_device_not_of_the_disk() {
    let mut w = World::new(794, Setup::with(|s| s.nodes[B].devices[0].data = 12 * MIB));
    w.start_synced();
    let old = w.nodes[A].sizes[0];
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.settle();
    let told = w.packets_sent("P_SIZES");
    w.must(B, RESIZE);
    w.settle();
    assert_eq!([w.nodes[A].sizes[0], w.nodes[B].sizes[0]], [old; 2]);
    assert_eq!(w.packets_sent("P_SIZES"), told + 1, "the peer has nothing to ask for");
    w.write(A, 0, old - 8, 8);
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// A peer that asks for the sizes, because it takes this node's disk to be there still, or is the
/// in-kernel driver, does not say how large its device is: that is in its answer (FE-1).
#[test]
fn a_question_for_sizes_is_no_size() {
    let mut w = World::new(795, Setup::with(|s| s.nodes[B].devices[0].data = 12 * MIB));
    w.start_synced();
    let old = w.nodes[A].sizes[0];
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.settle();
    let disk_sectors = w.nodes[B].backing[0].data.sectors() - 80;
    let question = Packet::Sizes(Sizes { disk_sectors, limits: None, ..Sizes::default() });
    let agreed = w.nodes[B].resource.as_ref().expect("it runs").agreed();
    let mut bytes = Vec::new();
    encode(&question, VolumeNr(0), &agreed, HeaderKind::H100, &mut bytes);
    let streams = w.net.open_socks(B).iter().filter_map(|sock| w.net.find(B, *sock)).min();
    let asked = w.packets_sent("P_SIZES");
    w.net.send(w.now, streams.expect("a connection"), B, 0, bytes);
    w.run_for(Span::from_ms(50));
    assert_eq!(w.nodes[A].sizes[0], old);
    assert_eq!(w.packets_sent("P_SIZES"), asked + 1, "it is answered");
    w.must(A, Command::Attach(None));
    w.wait_synced();
}

/// The connection is lost when the old disk of a Primary without one has just been read, and waits
/// for the peer's word: it is given back, and what the peer has stays the data in use (RD-1). The
/// generation of the old disk counted as the one in use from then on, so that the old data was
/// served and the peer's was refused.
#[test]
fn a_disk_that_waits_for_the_peer_is_not_in_use() {
    let mut w = World::new(791, Setup::default());
    w.start_synced();
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.settle();
    w.write(A, 0, 0, 8);
    w.settle();
    w.tell(A, Command::Attach(None));
    let limit = Span::from_secs(10);
    w.run_until("the disk is read", limit, |w| w.state(A, 0).disk == Disk::Negotiating);
    w.kill(B);
    wait_alone(&mut w, A);
    w.settle();
    assert_eq!(w.state(A, 0).disk, Disk::Diskless);
    w.must_not(A, Command::Attach(None));
    w.restart(B);
    w.wait_connected();
    w.read(A, 0, 0, 8);
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// The disk of a Primary fails with the write of its new generation, which may be there all the
/// same, and its peer, which had no disk at that moment, attaches one and serves it: that begins a
/// generation, because from then on the Primary's disk lacks what is written (GI-1). Both disks
/// counted as equal otherwise, or the one that had failed as the newer one, and its old data
/// replaced what had been acknowledged (DUR-5).
#[test]
fn a_disk_that_begins_to_serve_a_bare_primary_begins_a_generation() {
    let mut ahead = 0;
    let seeds = 870..878;
    for seed in seeds.clone() {
        let mut w = World::new(seed, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 8);
        w.settle();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::MetaWrite, range: None, times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
        w.cut();
        let limit = Span::from_secs(30);
        w.run_until("a lost disk", limit, |w| w.state(A, 0).disk == Disk::Diskless);
        wait_alone(&mut w, B);
        w.disk_failed(B, 0);
        w.must(B, Command::Detach { volume: None, force: false });
        w.heal();
        w.wait_connected();
        w.must(B, Command::Attach(None));
        w.run_until("a good copy", limit, |w| w.state(A, 0).pdsk == Disk::UpToDate);
        w.write(A, 0, 0, 8);
        w.settle();
        w.kill(A);
        let [own, peer] = [A, B].map(|n| w.on_disk(n, 0).expect("a disk").superblock.uuids);
        w.restart(A);
        let has_begun = own.bitmap != 0;
        if has_begun {
            ahead += 1;
            w.run_until("the split brain is seen", limit, |w| {
                [A, B].iter().all(|n| w.status(*n).split_brain && w.conn(*n) == Conn::StandAlone)
            });
            w.must(A, Command::Connect { discard_my_data: true });
            w.must(B, Command::Connect { discard_my_data: false });
        }
        w.wait_synced();
        assert!(own.current | 1 != peer.current | 1, "the generation is not a common one");
    }
    let all = seeds.count();
    assert!(0 < ahead && ahead < all, "the failed write was kept in {ahead} of {all} runs");
}

/// A size that only one of the disks has is refused with the size that both have.
#[test]
fn a_size_that_does_not_fit_is_refused_with_the_one_that_does() {
    let mut w = World::new(792, Setup::with(|s| s.nodes[A].devices[0].data = 12 * MIB));
    w.start_synced();
    let fits = w.nodes[A].sizes[0];
    let resize = Command::Resize {
        volume: None,
        size: Some(Sector(fits + 8)),
        assume_clean: false,
        assume_peer_has_space: false,
    };
    let refusal = w.must_not(A, resize);
    assert!(refusal.text.contains(&format!("too large, {fits}s fit")), "{refusal:?}");
}

/// A node whose peer's device grows may grow at once, because its disk was the larger one, and
/// copies the new part then; it still takes up what its own disk has gained, and its metadata moves
/// to the new end (BM-8). It kept it at the old end, where it was not found at the next start.
#[test]
fn a_grown_disk_is_looked_at_after_the_resync() {
    let mut w = World::new(793, Setup::with(|s| s.nodes[B].devices[0].data = 9 * MIB));
    w.start_synced();
    let old = w.nodes[A].sizes[0];
    for n in [A, B] {
        w.nodes[n].backing[0].data.grow(16 * MIB);
    }
    w.must(A, RESIZE);
    w.run_until("the resync begins", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
    w.wait_synced();
    w.settle();
    assert!(w.nodes[A].sizes[0] > old + 6 * MIB, "all of the new space is in use");
    w.kill(B);
    w.restart(B);
    w.wait_synced();
}

/// A node whose disk has room enough for what its peer's has gained looks at it all the same when a
/// resize is asked for: it may have grown, too, and then its metadata moves to the new end (BM-8).
/// It stayed at the old end, where it was not found at the next start. The roles are of no concern.
#[test]
fn a_grown_disk_with_room_enough_is_looked_at() {
    for is_used in [true, false] {
        let mut w = World::new(794, Setup::with(|s| s.nodes[B].devices[0].data = 20 * MIB));
        w.start_synced();
        let old = w.nodes[A].sizes[0];
        for (n, size) in [(A, 16), (B, 24)] {
            w.nodes[n].backing[0].data.grow(size * MIB);
        }
        w.must(A, RESIZE);
        w.run_until("the resync begins", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        if !is_used {
            w.must(A, Command::Secondary { holder: None });
        }
        w.wait_synced();
        w.settle();
        assert!(w.nodes[A].sizes[0] > old + 7 * MIB, "all of the new space is in use");
        w.kill(B);
        w.restart(B);
        w.wait_synced();
        assert!(w.packets_sent("P_SIZES") < 30, "the nodes come to rest");
    }
}

/// Two Secondaries of 8 MiB whose disks have grown while both were down, by parts that differ.
fn begin_apart_and_grown(w: &mut World) {
    w.start_synced();
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    for n in [A, B] {
        w.kill(n);
        w.nodes[n].backing[0].data.grow(12 * MIB);
    }
    w.nodes[A].backing[0].data.write(10 * MIB, &[0x77; 4096], true);
    w.since_sync[0].troubled = true;
    for n in [A, B] {
        w.restart(n);
    }
}

/// Both devices have grown while the nodes were apart, and nodes die at any point of the connection
/// on which they find out: the new part, which differs, is copied with the next one (BM-8, RS-1).
/// Both had it marked, but met as equal if neither had begun the resync; or one of them, which had
/// not grown before, waited for ever for the other one to begin it.
#[test]
fn a_part_that_grew_while_apart_is_not_forgotten() {
    let points = (0..12).flat_map(|step| [(step, A), (step, B)]);
    let deaths = |(step, slow)| [&[A, B][..], &[A], &[B]].map(|dying| (step, slow, dying));
    for (step, slow, dying) in points.flat_map(deaths) {
        let setup = Setup::with(|s| {
            s.external_meta(2048);
            s.nodes[slow].disk_time = (Span::from_ms(4), Span::from_ms(4));
        });
        let mut w = World::new(900 + step, setup);
        begin_apart_and_grown(&mut w);
        let limit = Span::from_secs(60);
        w.run_until("a node grows", limit, |w| w.nodes.iter().any(|n| n.sizes[0] > 8 * MIB));
        for _ in 0..step {
            w.step();
        }
        for n in dying {
            w.kill(*n);
        }
        for n in dying {
            w.restart(*n);
        }
        w.wait_synced();
        w.compare_all(0);
        w.check_equal(0);
    }
}

/// The same, if both die when only one of them has written down that it grew: the other one, which
/// grows on the next connection, waited for ever for a resync that was not begun.
#[test]
fn a_node_that_grew_alone_gives_what_it_grew_by() {
    for (seed, stuck) in (960..966).flat_map(|seed| [(seed, A), (seed, B)]) {
        let mut w = World::new(seed, Setup::with(|s| s.external_meta(2048)));
        begin_apart_and_grown(&mut w);
        w.run_until("both meet", Span::from_secs(60), |w| w.conn(stuck) == Conn::WFReportParams);
        let fault =
            Fault { kind: Kind::MetaWrite, range: None, times: Some(1), trouble: Trouble::Stick };
        w.nodes[stuck].backing[0].meta_disk_mut().add_fault(fault);
        let size = |w: &World, n: usize| w.on_disk(n, 0).map(|on_disk| on_disk.superblock.la_size);
        let old = size(&w, stuck);
        w.run_until("one grows", Span::from_secs(60), |w| size(w, 1 - stuck) > old);
        assert_eq!(size(&w, stuck), old);
        w.kill(A);
        w.kill(B);
        w.nodes[stuck].backing[0].meta_disk_mut().heal();
        // The later one decides ties: it would be the source.
        w.restart(stuck);
        w.run_for(Span::from_ms(100));
        w.restart(1 - stuck);
        w.wait_synced();
        w.compare_all(0);
        w.check_equal(0);
    }
}

/// A node whose data is given up is Inconsistent until a resync from the peer has ended, although
/// the connection is lost before that begins and both are of the same generation. It was taken for
/// equal after the next handshake, with other data than its peer (BM-1, RS-1).
#[test]
fn data_that_was_given_up_is_not_equal() {
    let mut lost_before = 0;
    for (seed, dies) in (840..870).flat_map(|seed| [(seed, false), (seed, true)]) {
        let setup = Setup::with(|s| s.speed.jitter = Span(3_000_000));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.since_sync[0].troubled = true;
        w.tell(B, Command::InvalidateRemote(None));
        let limit = Span::from_secs(60);
        w.run_until("it is given up", limit, |w| w.state(A, 0).disk < Disk::UpToDate);
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        let generation = |n: usize| w.status(n).volumes[0].uuids[0] | 1;
        lost_before += usize::from(generation(A) == generation(B));
        // Refused, but written to the disk that is no good copy.
        w.nodes[A].backing[0].data.write(0, &[0x77; 4096], true);
        if dies {
            w.kill(A);
            w.restart(A);
        }
        w.heal();
        w.wait_synced();
        w.check_equal(0);
    }
    assert!(lost_before > 0, "some resyncs had not begun");
}
