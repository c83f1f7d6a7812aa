//! Recorded failures 7 to 9, 15 to 21 and 23: resync, split brain, sizes and what is received.
//!
//! tests/README.md has the list.

use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::{Event, HostOp};
use replication_core::meta::{MetaFlags, Page, Superblock};
use replication_core::state::{Conn, Disk};
use replication_core::units::{Errno, Sector, SectorRange, Span, VolumeNr};
use replication_core::wire::{
    self, Agreed, BlockId, BlockRequest, CompressedBitmap, DataHeader, Packet,
};
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

/// Rewrites the superblock of a node without a process.
fn edit_superblock(w: &mut World, n: usize, edit: impl FnOnce(&mut Superblock)) {
    let node = &mut w.nodes[n];
    let sectors = node.backing[0].data.sectors();
    let geometry = node.setup.geometry(0, sectors, None).expect("it has a disk");
    let mut page = Page([0; 4096]);
    node.backing[0].data.read(geometry.superblock.0, &mut page.0);
    let mut superblock = Superblock::decode(&page).expect("our own");
    edit(&mut superblock);
    superblock.encode(&mut page);
    node.backing[0].data.write(geometry.superblock.0, &page.0, true);
}

/// A resync of a few blocks begins while the host writes: the notices of what was written
/// meanwhile arrive before its end, so it does not end too early (RS-4, BM-4).
#[test]
fn recorded_07_a_short_resync_waits_for_late_notices() {
    let mut announced = 0;
    for seed in 600..615 {
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
        w.run_until("the bitmaps", Span::from_secs(60), |w| w.conn(A) == Conn::WFBitMapS);
        let load = Load::writes(vec![area(0, 4 * MIB)]);
        w.start_load(A, Load { think: Span(50_000), depth: 8, ..load });
        w.run_until("its end", Span::from_secs(60), |w| w.is_synced());
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
        announced += w.packets_sent("P_OUT_OF_SYNC");
    }
    assert!(announced > 0, "there were late notices");
}

/// Split brain with a common ancestor only in the histories, resolved by hand: the bitmaps belong
/// to other generations, so everything is copied (GI-4).
#[test]
fn recorded_08_a_split_brain_found_in_history_costs_a_full_sync() {
    let mut w = World::new(640, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    for n in [A, B] {
        w.must(n, Command::Down { holder: None, force: false });
    }
    // Both went through two generations alone, and their bitmaps know nothing of each other.
    for n in [A, B] {
        let mut number = || w.rng.next() & !1;
        let (current, bitmap) = (number(), number());
        edit_superblock(&mut w, n, |superblock| {
            superblock.uuids.history = [superblock.uuids.current & !1, 0];
            superblock.uuids.current = current;
            superblock.uuids.bitmap = bitmap;
        });
    }
    w.nodes[B].backing[0].data.write(2 * MIB, &[0x77; 4096], true);
    w.since_sync[0].troubled = true;
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    w.run_until("both stand alone", Span::from_secs(60), |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, "Split-Brain detected"), "node {n} says so");
    }
    w.must(B, Command::Connect { discard_my_data: true });
    w.must(A, Command::Connect { discard_my_data: false });
    w.wait_synced();
    let status = w.status(B);
    let (copied, size) = (status.volumes[0].received_kib, status.volumes[0].size_kib);
    assert!(copied >= size, "{copied} of {size} KiB");
    w.check_equal(0);
}

/// Both nodes wrote alone: at whatever moment they meet again, both see the split brain, say so,
/// and stay alone (GI-6).
#[test]
fn recorded_09_both_sides_see_the_split_brain() {
    for seed in 641..651 {
        let setup = Setup::with(|s| s.speed.jitter = Span(3_000_000));
        let mut w = World::new(seed, setup);
        w.start_synced();
        w.write(A, 0, 0, 32);
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.write(A, 0, 8, 8);
        w.must(B, Command::Primary { force: false });
        w.stale = [vec![true], vec![true]];
        w.write(B, 0, 800, 8);
        if seed % 2 == 0 {
            w.must(A, Command::Secondary { holder: None });
        }
        w.heal();
        let limit = Span::from_secs(60);
        w.run_until("both stand alone", limit, |w| {
            [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
        });
        for n in [A, B] {
            assert!(w.has_logged(n, "Split-Brain detected"), "seed {seed}: node {n} says so");
            assert!(w.status(n).split_brain, "seed {seed}: node {n} shows it");
            assert_eq!(w.status(n).volumes[0].received_kib % 4, 0);
        }
    }
}

/// The link is cut at many moments around the end of a resync: the next handshake puts right what
/// the last messages did not say, without forgetting a difference (GI-7).
#[test]
fn recorded_15_the_last_message_of_a_resync_may_be_lost() {
    for step in 0..30 {
        let mut w = World::new(504, Setup::default());
        w.start_synced();
        w.cut();
        wait_alone(&mut w, A);
        wait_alone(&mut w, B);
        w.write(A, 0, 0, 64);
        w.settle();
        w.heal();
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        w.run_for(Span(step * 150_000));
        w.cut();
        w.run_for(Span::from_secs(5));
        w.check_quiet();
        w.write(A, 0, 1000, 8);
        w.settle();
        w.heal();
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// Two Inconsistent nodes meet, again and again, with different data on their disks: nobody
/// declares them equal, and the first Primary copies everything (BM-3).
#[test]
fn recorded_16_two_inconsistent_nodes_stay_different() {
    let mut w = World::new(652, Setup::default());
    for n in [A, B] {
        let byte = u8::try_from(n).unwrap() + 1;
        for at in 0..16 {
            w.nodes[n].backing[0].data.write(at * 800, &[byte; 512], true);
        }
    }
    w.up_both();
    for round in 0..6 {
        let n = round % 2;
        if round < 4 {
            w.net.reset_all(w.now);
            w.run_for(Span::from_secs(1));
        } else {
            w.kill(n);
            w.restart(n);
        }
        w.wait_connected();
        w.settle();
        for n in [A, B] {
            assert_eq!(w.state(n, 0).disk, Disk::Inconsistent, "round {round}");
        }
    }
    w.must(A, Command::Primary { force: true });
    w.run_until("both are UpToDate", Span::from_secs(600), |w| w.is_synced() && w.is_quiet());
    let status = w.status(B);
    assert!(status.volumes[0].received_kib >= status.volumes[0].size_kib);
    w.check_equal(0);
}

/// The device grows while the peer's disk is away: when it is back, the new part and what was
/// missed are synced, no less (BM-8).
#[test]
fn recorded_17_a_device_grown_while_a_disk_was_away() {
    let mut w = World::new(505, Setup::with(|s| s.external_meta(2048)));
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(B, Command::Disconnect { force: false });
    wait_alone(&mut w, A);
    for n in [A, B] {
        w.nodes[n].backing[0].data.grow(12 * MIB);
    }
    w.must(B, Command::Detach { volume: None, force: false });
    w.disk_failed(B, 0);
    let resize = Command::Resize {
        volume: None,
        size: None,
        assume_clean: false,
        assume_peer_has_space: true,
    };
    w.must(A, resize);
    let size = w.nodes[A].sizes[0];
    assert_eq!(size, 12 * MIB);
    w.write(A, 0, size - 64, 64);
    w.must(B, Command::Attach(None));
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_synced();
    assert_eq!(w.nodes[B].sizes[0], size);
    w.check_equal(0);
    w.read_all(A, 0);
}

/// Both nodes are Outdated and one is made Primary by force: the other does not wait for a bitmap
/// that never comes (ST-3, LV-1).
#[test]
fn recorded_18_forced_promotion_of_outdated_nodes_ends() {
    for connect_first in [true, false] {
        let mut w = World::new(653, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.must(A, Command::Secondary { holder: None });
        w.settle();
        for n in [A, B] {
            w.must(n, Command::Disconnect { force: true });
        }
        for n in [A, B] {
            w.must(n, Command::Outdate);
            assert_eq!(w.state(n, 0).disk, Disk::Outdated);
        }
        if !connect_first {
            w.must(A, Command::Primary { force: true });
        }
        for n in [A, B] {
            w.must(n, Command::Connect { discard_my_data: false });
        }
        w.wait_connected();
        if connect_first {
            w.settle();
            w.must(A, Command::Primary { force: true });
        }
        w.wait_synced();
        w.write(A, 0, 8, 8);
        w.read_all(A, 0);
        w.settle();
        w.check_synced();
    }
}

/// A Primary without a disk works on its peer's data. The peer goes, comes back without a disk,
/// and then attaches another data set: that is not taken for the one in use (GI-5, ST-7).
#[test]
fn recorded_19_another_data_set_is_not_accepted_after_connecting() {
    let mut w = World::new(654, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.read(A, 0, 0, 64);
    w.kill(B);
    wait_alone(&mut w, A);
    let current = w.rng.next() & !1;
    edit_superblock(&mut w, B, |superblock| {
        superblock.uuids.current = current;
        superblock.uuids.bitmap = 0;
        superblock.uuids.history = [0, 0];
        superblock.flags.insert(MetaFlags::CONSISTENT);
        superblock.flags.insert(MetaFlags::WAS_UP_TO_DATE);
    });
    w.nodes[B].backing[0].data.write(0, &[0x55; 4096], true);
    w.boot(B);
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_connected();
    let before = w.state(A, 0);
    assert_eq!(before.pdsk, Disk::Diskless);
    drop(w.ask(B, Command::Attach(None)));
    w.run_for(Span::from_secs(5));
    assert_ne!(w.state(A, 0).pdsk, Disk::UpToDate, "unknown data counts as a good copy");
    let read = w.request(A, 0, HostOp::Read, area(0, 8));
    assert!(read.is_err(), "a read was served from another data set");
}

/// The length in a header is big endian in every kind of header: a payload whose length reads
/// differently backwards is framed rightly, with each generation of the protocol (WP-1).
#[test]
fn recorded_20_lengths_are_big_endian_in_every_header() {
    for version in [86, 94, 95, 99, 100, 101] {
        let agreed = Agreed { version, ..Agreed::NOTHING };
        let kind = agreed.header_kind();
        for len in [512, 4096, 0x5e00] {
            let header = DataHeader { sector: Sector(8), len, ..DataHeader::default() };
            let mut bytes = Vec::new();
            wire::encode(&Packet::Data(header), VolumeNr(0), &agreed, kind, &mut bytes);
            let found = wire::decode_header(kind, &bytes[..kind.size()]).unwrap();
            let fixed = bytes.len() - kind.size();
            let expected = u32::try_from(fixed).unwrap() + len;
            assert_eq!(found.length, expected, "version {version}, {len} bytes");
            let field = if kind.size() == 16 { &bytes[8..12] } else { &bytes[4..8] };
            let backwards = u32::from_le_bytes(field.try_into().unwrap());
            assert_ne!(backwards, expected, "the test can tell the two apart");
        }
    }
}

/// A compressed bitmap whose runs go beyond the end, or whose padding is longer than its code, is
/// an error of the protocol: nothing is marked beyond the end, the connection is made anew, and
/// the resync is complete (BM-9, WP-4).
#[test]
fn recorded_21_lengths_in_a_compressed_bitmap_are_not_trusted() {
    let forged = [
        CompressedBitmap { first_run_set: true, unused_bits: 7, code: vec![0xff; 4000] },
        CompressedBitmap { first_run_set: false, unused_bits: 7, code: vec![0x00; 1] },
        CompressedBitmap { first_run_set: true, unused_bits: 0, code: Vec::new() },
    ];
    for bitmap in forged {
        let mut w = World::new(655, Setup::default());
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        w.write(A, 0, 0, 64);
        w.restart(B);
        w.run_until("it waits for the bitmap", Span::from_secs(60), |w| {
            w.conn(B) == Conn::WFBitMapT
        });
        let socks = w.net.open_socks(B);
        let packet = Packet::CompressedBitmap(bitmap);
        let volume = VolumeNr(0);
        // One of the two is the data socket; on the other one the packet is wrong as well.
        w.handle(B, Event::Packet { sock: socks[0], volume, packet, payload: None });
        w.run_until("the connection is dropped", Span::from_secs(5), |w| {
            w.conn(B) < Conn::Connected
        });
        assert!(w.has_logged(B, "broke the protocol"));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A request for a block with a length that no block has is an error of the protocol, too (WP-4).
#[test]
fn recorded_21_lengths_in_a_resync_request_are_not_trusted() {
    for (sector, size) in [(0, u32::MAX), (u64::MAX - 7, 4096), (16 * MIB, 4096), (3, 512)] {
        let mut w = World::new(656, Setup::default());
        w.start_synced();
        let block = BlockRequest { sector: Sector(sector), block_id: BlockId::SYNCER, size };
        for sock in w.net.open_socks(A) {
            if w.conn(A) < Conn::Connected {
                break;
            }
            let packet = Packet::RsDataRequest(block);
            w.handle(A, Event::Packet { sock, volume: VolumeNr(0), packet, payload: None });
        }
        assert!(w.conn(A) < Conn::Connected, "sector {sector}, {size} bytes");
        assert!(w.has_logged(A, "broke the protocol"));
        w.wait_synced();
    }
}

/// A survivor keeps the marks for a peer that missed acknowledged writes until the peer has them:
/// the peer comes back, and the handshake and the resync break off at many moments, in several
/// ways (BM-1, BM-3). Reported against DRBD 9 in 2026.
#[test]
fn recorded_23_a_survivor_keeps_its_marks() {
    for step in 0..30 {
        let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 2_000));
        let mut w = World::new(660 + step, setup);
        w.start_synced();
        let load = Load::writes(vec![area(0, 2048)]);
        w.start_load(A, Load { think: Span(50_000), depth: 8, ..load });
        w.run_for(Span::from_ms(10));
        w.power_cut(B, Cut::LoseAll);
        w.run_for(Span::from_ms(10));
        w.drain(A);
        wait_alone(&mut w, A);
        w.settle();
        let missed: Vec<u64> = w.differing[0].iter().copied().collect();
        assert!(!missed.is_empty(), "the peer missed something");
        for round in 0..3 {
            survivor_knows(&mut w, step);
            w.restart(B);
            w.run_until("they meet", Span::from_secs(60), |w| w.conn(A) >= Conn::WFReportParams);
            w.run_for(Span(step * (round + 1) * 900_000));
            // Only a process dies: with power the peer keeps what it says that it has written.
            if (step + round) % 2 == 0 {
                w.kill(B);
            } else {
                w.cut();
                wait_alone(&mut w, B);
                w.kill(B);
                w.heal();
            }
            wait_alone(&mut w, A);
            w.settle();
        }
        survivor_knows(&mut w, step);
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The same with a peer that loses its power in the resync: what it had said to have written, and
/// lost, is still marked on its own disk, and nothing else is forgotten by the survivor.
#[test]
fn recorded_23_what_a_target_loses_is_marked_on_its_disk() {
    for step in 0..24 {
        let setup = Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 2_000));
        let mut w = World::new(710 + step, setup);
        w.start_synced();
        w.power_cut(B, Cut::LoseAll);
        wait_alone(&mut w, A);
        for at in 0..16 {
            w.write(A, 0, at * 64, 64);
        }
        w.restart(B);
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
        w.run_for(Span(step * 30_000_000));
        let acknowledged = 128 - w.status(A).volumes[0].out_of_sync_kib / 4;
        w.power_cut(B, if step % 2 == 0 { Cut::LoseAll } else { Cut::Mixed });
        wait_alone(&mut w, A);
        w.settle();
        w.compare_all(0);
        let on_disk = w.on_disk(B, 0).unwrap();
        let only_there = |w: &World| {
            let differing = w.differing[0].iter();
            differing.filter(|block| !w.is_marked(A, 0, **block)).copied().collect::<Vec<_>>()
        };
        let there = only_there(&w);
        assert!(there.len() as u64 <= acknowledged, "step {step}: {there:?}");
        assert!(there.iter().all(|block| on_disk.covers(*block)), "step {step}: {there:?}");
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A peer that could not write says that it is Inconsistent, and loses its power before its own
/// disk knows that: it comes back and calls its data good. The survivor begins a generation when
/// it loses such a peer, and so does not believe it (GI-1, BM-5).
#[test]
fn recorded_23_a_peer_that_forgot_to_be_inconsistent_is_resynced() {
    for step in 0..10 {
        let setup = Setup::with(|s| s.disk(|disk| disk.on_io_error = OnIoError::PassOn));
        let mut w = World::new(740 + step, setup);
        w.start_synced();
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
        w.nodes[B].backing[0].data.add_fault(fault);
        w.submit(A, 0, HostOp::Write { fua: false }, area(40, 16)).expect("a slot is free");
        let limit = Span::from_secs(5);
        w.run_until("A knows", limit, |w| w.state(A, 0).pdsk == Disk::Inconsistent);
        w.run_for(Span(step * 100_000));
        w.power_cut(B, Cut::LoseAll);
        wait_alone(&mut w, A);
        w.drain(A);
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// Every block that differs is marked by the survivor, whatever its peer says.
fn survivor_knows(w: &mut World, step: u64) {
    w.compare_all(0);
    let unknown: Vec<u64> =
        w.differing[0].iter().copied().filter(|block| !w.is_marked(A, 0, *block)).collect();
    assert!(unknown.is_empty(), "step {step}: blocks {unknown:?} differ unmarked");
}
