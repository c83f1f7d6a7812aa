//! A peer that breaks the rules: memory stays bounded, and the connection is the price (WP-1).

use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk, Role, State};
use replication_core::units::{Errno, Sector, SectorRange, Span, VolumeNr};
use replication_core::wire::{self, BarrierToken, BlockAck, BlockId, HeaderKind, Packet};
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::setup::Setup;
use tests::sim::{A, B, World};

/// The streams for data and for acknowledgements, as they are opened.
fn streams(w: &World) -> [u32; 2] {
    let mut found: Vec<u32> =
        w.net.open_socks(A).iter().filter_map(|s| w.net.find(A, *s)).collect();
    found.sort_unstable();
    found.try_into().expect("one pair of sockets")
}

/// Puts packets into a stream from a node to the other that its core knows nothing of.
fn inject(w: &mut World, from: usize, stream: u32, packets: impl Iterator<Item = Packet>) -> usize {
    let agreed = w.nodes[from].resource.as_ref().expect("it runs").agreed();
    let mut bytes = Vec::new();
    for packet in packets {
        wire::encode(&packet, VolumeNr(0), &agreed, HeaderKind::H100, &mut bytes);
    }
    let count = bytes.len();
    w.forges(from);
    w.net.send(w.now, stream, from, 0, bytes);
    count
}

/// Barriers without writes, while the disk is busy with an earlier epoch: they are left in the
/// socket once there are too many, and acknowledged when the disk is done.
#[test]
fn barriers_without_writes_are_not_collected() {
    let mut w = World::new(1301, Setup::default());
    w.start_synced();
    let trouble = Trouble::Stick;
    let fault = Fault { kind: Kind::Flush, range: None, times: Some(1), trouble };
    w.nodes[B].backing[0].data.add_fault(fault);
    w.write(A, 0, 0, 8);
    w.run_for(Span::from_ms(20));
    let [data, _] = streams(&w);
    let before = w.net.delivered[B];
    let barriers = (1000..21_000).map(|n| Packet::Barrier { barrier: BarrierToken(n) });
    let bytes = inject(&mut w, A, data, barriers) as u64;
    w.run_for(Span::from_ms(500));
    let read = w.net.delivered[B] - before;
    assert!(read > 0 && read < bytes / 4, "{read} of {bytes} bytes were read");
    assert_eq!(w.conn(B), Conn::Connected);
    w.heal_disks(B);
    w.run_until("A refuses what it did not ask", Span::from_secs(5), |w| {
        w.has_logged(A, "P_BARRIER_ACK") || w.conn(A) < Conn::Connected
    });
    w.wait_synced();
}

/// Pings without end of a peer that reads no answer: it is dropped.
#[test]
fn pings_of_a_peer_that_reads_nothing_end_the_connection() {
    let mut w = World::new(1302, Setup::default());
    w.start_synced();
    let [_, meta] = streams(&w);
    w.note(A, "=== A reads nothing");
    w.net.cut_towards(A);
    inject(&mut w, A, meta, (0..60_000).map(|_| Packet::Ping));
    w.run_until("the loss", Span::from_ms(1_500), |w| w.conn(B) < Conn::Connected);
    assert!(w.has_logged(B, "P_PING"), "for the right reason");
    w.heal();
    w.wait_synced();
    w.must(A, Command::Secondary { holder: None });
}

/// The number by which the last read from the peer goes.
fn last_read(w: &World) -> BlockId {
    let line = w.trace.lines().filter(|line| line.contains("> P_DATA_REQUEST")).last();
    let line = line.expect("a read from the peer");
    let id = line.split("id=0x").nth(1).and_then(|rest| rest.split(' ').next());
    BlockId(u64::from_str_radix(id.expect("an id"), 16).expect("a number"))
}

/// A refusal in the middle of the answer to a read: the host would have its memory back while the
/// peer's bytes are being written into it. It costs the connection, and nothing else (ORD-6).
#[test]
fn a_read_is_not_refused_in_the_middle_of_its_answer() {
    let setup = Setup::with(|s| {
        s.speed.window = 4096;
        s.speed.latency = Span::from_ms(2);
    });
    let mut w = World::new(1303, setup);
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.settle();
    let [_, meta] = streams(&w);
    let before = w.net.delivered[A];
    let range = SectorRange { start: 0, end: 128 };
    let read = w.submit(A, 0, HostOp::Read, range).expect("a free slot");
    w.run_until("half of it", Span::from_secs(5), |w| w.net.delivered[A] > before + 20_000);
    let ack = BlockAck { sector: Sector(0), block_id: last_read(&w), size: 65_536, seq: 0 };
    inject(&mut w, B, meta, std::iter::once(Packet::NegDReply(ack)));
    w.run_until("the loss", Span::from_secs(5), |w| w.conn(A) < Conn::Connected);
    assert!(w.has_logged(A, "P_NEG_DREPLY"), "for the right reason");
    w.run_until("the answer", Span::from_secs(5), |w| w.answer(A, read).is_some());
    assert_eq!(w.answer(A, read), Some(Err(Errno::EIO)), "no good copy is in reach");
    w.wait_connected();
    w.read(A, 0, 0, 128);
}

/// A peer that leaves and calls the data of a Primary old: refused, the device stays in use. A
/// Secondary's data is old from then on, and so is the peer's if it says so of itself (protocol
/// notes, 6.2 and 17.1).
#[test]
fn who_is_outdated_by_a_parting() {
    let mut w = World::new(1304, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 8);
    let [data, _] = streams(&w);
    let request = Packet::ConnStChgReq { mask: 0x1_e1f0, value: 5 << 13 | 1 << 4 };
    let answers = w.packets_sent("P_CONN_ST_CHG_REPLY");
    inject(&mut w, B, data, std::iter::once(request.clone()));
    w.run_until("the answer", Span::from_secs(1), |w| {
        w.packets_sent("P_CONN_ST_CHG_REPLY") > answers
    });
    assert_eq!(w.state(A, 0).disk, Disk::UpToDate);
    w.write(A, 0, 8, 8);
    inject(&mut w, A, data, std::iter::once(request));
    w.run_until("the other answer", Span::from_secs(1), |w| {
        w.packets_sent("P_CONN_ST_CHG_REPLY") > answers + 1
    });
    let limit = Span::from_secs(5);
    w.run_until("the parting", limit, |w| w.conn(B) < Conn::Connected);
    assert_eq!(w.state(B, 0).disk, Disk::Outdated);
    w.wait_synced();
    // The other way round: it outdates itself, and a Primary takes note.
    let [data, _] = streams(&w);
    let request = Packet::ConnStChgReq { mask: 0x1ff0, value: 5 << 9 | 1 << 4 };
    inject(&mut w, B, data, std::iter::once(request));
    w.run_until("the parting", limit, |w| w.conn(A) < Conn::Connected);
    assert_eq!(w.state(A, 0).pdsk, Disk::Outdated);
    w.write(A, 0, 16, 8);
    w.wait_synced();
}

/// A peer that claims to be ahead of a Primary, and then to bring it up to date: a Primary's data
/// does not become old by the word of its peer. It costs the connection, and nothing else.
#[test]
fn a_primary_does_not_fall_behind_its_peer() {
    let mut w = World::new(1305, Setup::default());
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.settle();
    let [data, _] = streams(&w);
    let (role, peer, disk) = (Role::Secondary, Role::Primary, Disk::UpToDate);
    let ahead = State { role, peer, conn: Conn::Ahead, disk, ..State::initial() };
    let packets = [Packet::State(ahead.word()), Packet::SyncUuid(0x1234_5678_9abc)];
    inject(&mut w, B, data, packets.into_iter());
    w.run_until("the loss", Span::from_secs(5), |w| w.conn(A) < Conn::Connected);
    assert_eq!(w.state(A, 0).disk, Disk::UpToDate);
    assert!(w.has_logged(A, "P_STATE"), "for the right reason");
    w.wait_synced();
    w.read(A, 0, 0, 128);
}

/// A source that refuses what its target did not ask for, as when a bit of the question has turned
/// over: the answer to the right one would be waited for without end. The resync starts again.
#[test]
fn a_refusal_that_fits_no_question_ends_the_connection() {
    let mut w = World::new(1306, Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400)));
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.must(A, Command::InvalidateRemote(None));
    w.run_until("a resync", Span::from_secs(5), |w| w.conn(B) == Conn::SyncTarget);
    let [_, meta] = streams(&w);
    let end = w.nodes[B].sizes[0];
    let (sector, block_id) = (Sector(end - 8), BlockId::SYNCER);
    let ack = BlockAck { sector, block_id, size: 4096, seq: 0 };
    inject(&mut w, A, meta, std::iter::once(Packet::NegRsDReply(ack)));
    w.run_until("the loss", Span::from_secs(5), |w| w.conn(B) < Conn::Connected);
    assert!(w.has_logged(B, "P_NEG_RS_DREPLY"), "for the right reason");
    w.wait_synced();
    w.check_equal(0);
}
