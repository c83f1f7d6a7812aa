//! More of the recorded failures of replication drivers, step by step: the same moment met at every
//! fraction of a millisecond, and forms that differ from the record in one circumstance. The number
//! in a name is that of the record.

use replication_core::control::Command;
use replication_core::event::{HostOp, VolumeIx};
use replication_core::state::{Conn, Disk, OnNoData};
use replication_core::units::{BlockRange, Errno, Sector, SectorRange, Span, VolumeNr};
use replication_core::wire::{
    BarrierToken, BlockAck, BlockId, BlockRequest, HeaderKind, Packet, encode,
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

/// Resyncs take long enough for something to happen to them.
fn slow() -> Setup {
    Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400))
}

/// The next operations of this kind in this area fail.
fn fail(w: &mut World, n: usize, kind: Kind, range: SectorRange, times: Option<u32>) {
    let fault = Fault { kind, range: Some(range), times, trouble: Trouble::Fail(Errno::EIO) };
    let backing = &mut w.nodes[n].backing[0];
    match kind {
        Kind::Read | Kind::Write | Kind::Flush => backing.data.add_fault(fault),
        Kind::MetaRead | Kind::MetaWrite => backing.meta_disk_mut().add_fault(fault),
    }
}

/// Writes to these addresses, four at most, all at once, and waits for their answers.
fn write_at_once(w: &mut World, n: usize, addresses: &[u64]) {
    let op = HostOp::Write { fua: false };
    let submit = |w: &mut World, at: &u64| w.submit(n, 0, op, area(*at, 8)).expect("a free slot");
    let requests: Vec<u64> = addresses.iter().map(|at| submit(w, at)).collect();
    w.run_until("the answers", Span::from_secs(60), |w| {
        requests.iter().all(|request| w.answer(n, *request).is_some())
    });
    for request in requests {
        assert_eq!(w.answer(n, request), Some(Ok(())));
    }
}

/// Whether a living node has the block marked in memory.
fn is_marked(w: &World, n: usize, block: u64) -> bool {
    let range = BlockRange { start: block, end: block + 1 };
    let resource = w.nodes[n].resource.as_ref();
    resource.is_some_and(|resource| resource.out_of_sync_in(VolumeIx(0), range) > 0)
}

/// The pair of streams between the nodes, the older one first.
fn streams(w: &World) -> [u32; 2] {
    let mut found: Vec<u32> =
        w.net.open_socks(A).iter().filter_map(|sock| w.net.find(A, *sock)).collect();
    found.sort_unstable();
    found.try_into().expect("one pair of sockets")
}

/// The bytes of a packet as node A would send it.
fn bytes_of(w: &World, packet: &Packet) -> Vec<u8> {
    let agreed = w.nodes[A].resource.as_ref().expect("it runs").agreed();
    let mut bytes = Vec::new();
    encode(packet, VolumeNr(0), &agreed, HeaderKind::H100, &mut bytes);
    bytes
}

/// The bitmap of an extent that is to leave the log cannot be written: no log entry for the new
/// extent, no data there, and what was written before is not forgotten (AL-3, AL-4).
#[test]
fn recorded_03_no_data_is_written_after_a_failed_bitmap_write() {
    let setup = Setup::with(|s| {
        s.size(16 * MIB);
        s.disk(|disk| disk.al_extents = 2);
    });
    let mut w = World::new(613, setup);
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    w.write(A, 0, 0, 8);
    w.write(A, 0, 8192, 8);
    w.flush(A, 0);
    w.settle();
    let data = w.nodes[A].backing[0].data.sectors();
    let geometry = w.nodes[A].setup.geometry(0, data, None).expect("a node with a disk");
    let bitmap = area(geometry.bitmap.0, geometry.bitmap_sectors);
    let before = w.nodes[A].backing[0].data.sector(2 * 8192).to_vec();
    fail(&mut w, A, Kind::MetaWrite, bitmap, Some(1));
    let write = HostOp::Write { fua: false };
    assert_eq!(w.request(A, 0, write, area(2 * 8192, 8)), Err(Errno::EIO));
    assert_eq!(w.nodes[A].backing[0].data.sector(2 * 8192).to_vec(), before, "no entry, no data");
    assert!(w.state(A, 0).disk <= Disk::Failed);
    w.run_for(Span::from_secs(1));
    w.must(A, Command::Attach(None));
    w.restart(B);
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib;
    assert!(copied >= 8, "{copied} KiB");
    w.read_all(A, 0);
}

/// One block differs, a resync of it begins, and at this time after the connection is there the
/// host writes elsewhere. Returns how many of the writes were announced.
fn writes_while_a_resync_begins(seed: u64, latency: Span, later: Span) -> u64 {
    let mut w = World::new(seed, Setup::with(|s| s.speed.latency = latency));
    w.start_synced();
    w.cut();
    wait_alone(&mut w, A);
    wait_alone(&mut w, B);
    w.write(A, 0, 0, 8);
    w.settle();
    w.heal();
    let limit = Span::from_secs(60);
    w.run_until("the handshake", limit, |w| w.conn(A) >= Conn::WFReportParams);
    w.run_for(later);
    write_at_once(&mut w, A, &[1024, 1088, 1152, 8192]);
    w.wait_synced();
    for n in [A, B] {
        assert_eq!(w.status(n).volumes[0].out_of_sync_kib, 0, "node {n}");
    }
    w.read_all(A, 0);
    w.packets_sent("P_OUT_OF_SYNC")
}

/// The host writes at every moment of the beginning of a resync: each write is mirrored, or marked
/// and announced (BM-6).
#[test]
fn recorded_04_no_write_slips_through_the_beginning_of_a_resync() {
    let announced: u64 = (0..80)
        .map(|step| writes_while_a_resync_begins(604, Span(50_000), Span(step * 50_000)))
        .sum();
    assert!(announced > 0, "the moment in question was never met");
}

/// The same on a long way, so that announcements are still under way when the only block known at
/// first has been copied: the resync does not end before they have arrived (RS-4, BM-4).
#[test]
fn recorded_07_a_resync_does_not_end_before_the_announcements_arrived() {
    let announced: u64 = (0..40)
        .map(|step| writes_while_a_resync_begins(607, Span::from_ms(10), Span(step * 2_500_000)))
        .sum();
    assert!(announced > 0, "the moment in question was never met");
}

/// Packets of features that are not offered, two Primaries (numbers 5 and 9) and online verify
/// (number 21): the connection is dropped with the reason, and comes back.
#[test]
fn recorded_05_packets_of_refused_features_are_refused() {
    let ack = BlockAck { sector: Sector(0), block_id: BlockId(1), size: 4096, seq: 1 };
    let request = BlockRequest { sector: Sector(0), block_id: BlockId(1), size: 4096 };
    let cases = [
        (1, Packet::Superseded(ack), "a conflict of two Primaries"),
        (1, Packet::RetryWrite(ack), "a conflict of two Primaries"),
        (0, Packet::OvRequest(request), "a feature that this node did not offer"),
    ];
    for (stream, packet, reason) in cases {
        let mut w = World::new(615, Setup::default());
        w.start_synced();
        let bytes = bytes_of(&w, &packet);
        let stream = streams(&w)[stream];
        w.net.send(w.now, stream, A, 0, bytes);
        w.run_until("B drops it", Span::from_ms(500), |w| w.conn(B) < Conn::Connected);
        assert!(w.has_logged(B, reason), "{}", packet.name());
        w.wait_synced();
    }
}

fn suspending() -> Setup {
    Setup::with(|s| {
        for node in &mut s.nodes {
            node.config.on_no_data = OnNoData::SuspendIo;
        }
    })
}

/// No disk is left, and requests wait. The disk that was lost last comes back and they go on, with
/// a peer that still has none: what they write belongs to a generation that the peer lacks (GI-1).
#[test]
fn recorded_13_going_on_with_a_peer_without_disk_keeps_the_new_generation() {
    let mut w = World::new(643, suspending());
    w.start_synced();
    w.must(B, Command::Detach { volume: None, force: false });
    w.disk_failed(B, 0);
    w.must(A, Command::Detach { volume: None, force: true });
    w.disk_failed(A, 0);
    let write = w.submit(A, 0, HostOp::Write { fua: false }, area(800, 8)).unwrap();
    w.run_for(Span::from_secs(1));
    assert_eq!(w.answer(A, write), None, "it waits");
    w.must(A, Command::Attach(None));
    w.drain(A);
    assert_eq!(w.answer(A, write), Some(Ok(())));
    let [_, bitmap, ..] = w.status(A).volumes[0].uuids;
    assert_ne!(bitmap, 0, "the new generation began where the peer's data ends");
    w.must(B, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// The other order: the peer's disk was lost last, so its data is what was in use. This node's
/// older disk is refused, and requests wait for the peer's (GI-1, GI-5).
#[test]
fn recorded_13_an_older_disk_does_not_let_requests_go_on() {
    let mut w = World::new(653, suspending());
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.settle();
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.write(A, 0, 400, 8);
    w.must(B, Command::Detach { volume: None, force: true });
    w.disk_failed(B, 0);
    let read = w.submit(A, 0, HostOp::Read, area(0, 8)).unwrap();
    let write = w.submit(A, 0, HostOp::Write { fua: false }, area(800, 8)).unwrap();
    let refusal = w.must_not(A, Command::Attach(None));
    assert_eq!(refusal.code, 150, "{refusal:?}");
    assert_eq!((w.answer(A, read), w.answer(A, write)), (None, None), "they wait");
    w.must(B, Command::Attach(None));
    w.drain(A);
    assert_eq!((w.answer(A, read), w.answer(A, write)), (Some(Ok(())), Some(Ok(()))));
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// The source of a half-done resync gets a new disk: the target keeps its marks, and neither is
/// taken for a good copy (BM-3, RS-4).
#[test]
fn recorded_16_a_half_copied_target_and_a_new_disk_keep_all_marks() {
    let mut w = World::new(626, slow());
    w.up_both();
    w.must(A, Command::Primary { force: true });
    w.write(A, 0, 0, 64);
    let all = w.status(A).volumes[0].size_kib;
    let left = |w: &World| w.status(B).volumes[0].out_of_sync_kib;
    w.run_until("half of it is copied", Span::from_secs(60), |w| left(w) < all / 2);
    w.kill(A);
    wait_alone(&mut w, B);
    w.settle();
    let before = left(&w);
    w.nodes[A].create_metadata(0);
    w.restart(A);
    w.run_for(Span::from_secs(30));
    for n in [A, B] {
        assert_eq!(w.state(n, 0).disk, Disk::Inconsistent, "node {n}");
        w.must_not(n, Command::Primary { force: false });
    }
    assert!(left(&w) >= before, "{} KiB are marked, {before} were", left(&w));
}

/// Two nodes that were parted and told that their data is Outdated; `alone`: after A wrote alone.
fn outdated(alone: bool) -> World {
    let mut w = World::new(618, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    w.must(B, Command::Disconnect { force: false });
    wait_alone(&mut w, A);
    if alone {
        w.write(A, 0, 64, 64);
    }
    w.must(A, Command::Disconnect { force: false });
    w.must(A, Command::Secondary { holder: None });
    for n in [A, B] {
        w.must(n, Command::Outdate);
        assert_eq!(w.state(n, 0).disk, Disk::Outdated);
        w.must_not(n, Command::Primary { force: false });
    }
    w
}

fn connect_both(w: &mut World) {
    for n in [A, B] {
        w.must(n, Command::Connect { discard_my_data: false });
    }
    w.wait_connected();
}

/// Both nodes are Outdated, one is promoted with force, before or after they meet: both end in the
/// same state, and equal; neither waits for what the other does not send (ST-3, LV-1).
#[test]
fn recorded_18_a_forced_promotion_of_two_outdated_nodes_ends_well() {
    for (alone, connected) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut w = outdated(alone);
        if connected {
            connect_both(&mut w);
            w.run_for(Span::from_secs(2));
        }
        w.must(A, Command::Primary { force: true });
        if !connected {
            connect_both(&mut w);
        }
        w.write(A, 0, 800, 8);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// Packets whose length is in the wrong byte order, on both streams: the connection is dropped at
/// once, nothing of them is applied, and a new connection works (WP-1). That all our own packets
/// have the right order is held by the recorded traffic in `replication-core/tests/golden_wire.rs`.
#[test]
fn recorded_20_a_length_in_the_wrong_byte_order_drops_the_connection() {
    for which in [0, 1] {
        let mut w = World::new(628 + which, Setup::default());
        w.start_synced();
        w.write(A, 0, 0, 64);
        w.settle();
        let on_data = Packet::Barrier { barrier: BarrierToken(7) };
        let ack = BlockAck { sector: Sector(0), block_id: BlockId(1), size: 4096, seq: 1 };
        let on_meta = Packet::WriteAck(ack);
        for (stream, packet) in streams(&w).into_iter().zip([on_data, on_meta]) {
            if packet.name() == ["P_BARRIER", "P_WRITE_ACK"][usize::try_from(which).unwrap()] {
                let mut bytes = bytes_of(&w, &packet);
                bytes[8..12].reverse();
                w.net.send(w.now, stream, A, 0, bytes);
            }
        }
        let limit = Span::from_ms(300);
        w.run_until("B drops it", limit, |w| w.conn(B) < Conn::Connected);
        assert!(w.is_alive(A) && w.is_alive(B));
        w.wait_connected();
        w.wait_synced();
        assert_eq!(w.status(B).volumes[0].received_kib, 32, "nothing was copied again");
        w.read_all(A, 0);
    }
}

/// Runs for this time; at every event each block that differs is marked by the survivor A, or by
/// the peer itself, which then knows what it lacks.
fn run_marked(w: &mut World, time: Span) {
    let end = w.now + time;
    while w.now < end && w.step() {
        if w.differing[0].is_empty() {
            continue;
        }
        let peer = w.on_disk(B, 0).expect("metadata is readable");
        for block in w.differing[0].iter().copied() {
            let is_known = is_marked(w, A, block) || is_marked(w, B, block) || peer.covers(block);
            assert!(is_known, "block {block} differs, and neither node would copy it");
        }
    }
}

/// The peer loses power with writes in its cache that the host was told about, comes back, is lost
/// again in the middle of everything: the survivor never clears a mark towards it before it has
/// what it missed (BM-1, BM-3, GI-10).
#[test]
fn recorded_23_a_survivor_keeps_its_marks_until_the_peer_has_the_data() {
    for step in 0..24 {
        let mut w = World::new(650 + step, Setup::default());
        w.start_synced();
        w.start_load(A, Load { think: Span(50_000), ..Load::writes(vec![area(0, 4096)]) });
        w.run_for(Span::from_ms(20));
        w.power_cut(B, Cut::LoseAll);
        wait_alone(&mut w, A);
        w.drain(A);
        w.write(A, 0, 6000, 8);
        w.settle();
        let forgotten: Vec<u64> =
            w.differing[0].iter().copied().filter(|block| !is_marked(&w, A, *block)).collect();
        assert!(forgotten.is_empty(), "{forgotten:?} differ and are not marked by the survivor");
        w.restart(B);
        let limit = Span::from_secs(60);
        w.run_until("they talk", limit, |w| w.conn(A) >= Conn::WFReportParams);
        run_marked(&mut w, Span(step * 300_000));
        match step % 3 {
            0 => w.net.reset_all(w.now),
            1 => w.kill(B),
            _ => w.power_cut(B, Cut::LoseAll),
        }
        run_marked(&mut w, Span::from_secs(6));
        if !w.is_alive(B) {
            w.restart(B);
        }
        run_marked(&mut w, Span::from_secs(6));
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// The survivor itself dies before the peer is back: its disk tells what the peer missed, and the
/// peer, which comes first, does not go on without it (AL-5, GI-10).
#[test]
fn recorded_23_a_survivor_that_dies_remembers_what_the_peer_missed() {
    for step in 0..12 {
        let mut w = World::new(680 + step, Setup::default());
        w.start_synced();
        w.start_load(A, Load { think: Span(50_000), ..Load::writes(vec![area(0, 4096)]) });
        w.run_for(Span::from_ms(10));
        w.power_cut(B, Cut::LoseAll);
        w.run_for(Span(step * 250_000_000));
        w.drain(A);
        w.flush(A, 0);
        w.kill(A);
        w.restart(B);
        w.run_for(Span::from_secs(1));
        w.restart(A);
        w.wait_connected();
        run_marked(&mut w, Span::from_secs(2));
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.read_all(A, 0);
    }
}
