//! A peer that breaks the rules: memory stays bounded, and the connection is the price (WP-1).

use replication_core::control::Command;
use replication_core::state::Conn;
use replication_core::units::{Span, VolumeNr};
use replication_core::wire::{self, BarrierToken, HeaderKind, Packet};
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

/// Puts packets into a stream from A to B that A's core knows nothing of.
fn inject(w: &mut World, stream: u32, packets: impl Iterator<Item = Packet>) -> usize {
    let agreed = w.nodes[A].resource.as_ref().expect("it runs").agreed();
    let mut bytes = Vec::new();
    for packet in packets {
        wire::encode(&packet, VolumeNr(0), &agreed, HeaderKind::H100, &mut bytes);
    }
    let count = bytes.len();
    w.net.send(w.now, stream, A, 0, bytes);
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
    let bytes = inject(&mut w, data, barriers) as u64;
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
    inject(&mut w, meta, (0..60_000).map(|_| Packet::Ping));
    w.run_until("the loss", Span::from_ms(1_500), |w| w.conn(B) < Conn::Connected);
    assert!(w.has_logged(B, "P_PING"), "for the right reason");
    w.heal();
    w.wait_synced();
    w.must(A, Command::Secondary { holder: None });
}
