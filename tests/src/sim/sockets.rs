//! The sockets of a node as its driver sees them: sending, connecting, and reading packet by
//! packet as far as the core allows.
//!
//! A packet is read in the three steps of the core's contract, also when its bytes arrive one by
//! one: header, fixed part, payload into memory of the core.

use replication_core::event::{Event, SockGone, SockId};
use replication_core::units::{Buf, Span, VolumeNr};
use replication_core::wire::{self, BodyPlan, Header, Packet, Stream};

use super::lent::Lent;
use super::net::Readable;
use super::node::{arena_range, sum};
use super::world::{Happening, World};
use crate::disturb::frames::{Head, is_checked};

/// The receiving side of a socket.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: u32,
    reading: Reading,
    sent: u64,
    pub(crate) lent: Lent,
}

#[derive(Debug)]
enum Reading {
    Header,
    Fixed { header: Header, plan: BodyPlan },
    Payload { volume: VolumeNr, packet: Packet, buf: Option<Buf>, done: u32 },
}

/// A bit of a packet whose change is noticed or means nothing, if there is one behind a place that
/// follows from `chance`.
fn checked_bit(packet: &[u8], chance: u64) -> Option<(usize, u8)> {
    let head = Head::parse(packet)?;
    let on: Vec<Stream> = [Stream::Data, Stream::Meta]
        .into_iter()
        .filter(|stream| head.kind().is_some_and(|kind| kind.is_on(*stream)))
        .collect();
    let bit = u8::try_from(chance % 8).expect("below eight");
    // Payload is never covered.
    let most = packet.len().min(64);
    let first = usize::try_from(chance / 8 % 64).expect("a small number").min(most);
    (first..most)
        .find(|at| on.iter().all(|stream| is_checked(*stream, &head, *at as u64, bit)))
        .map(|at| (at, bit))
}

impl World {
    pub(crate) fn send(
        &mut self,
        n: usize,
        sock: SockId,
        volume: VolumeNr,
        packet: &Packet,
        payload: Option<Buf>,
        kind: wire::HeaderKind,
    ) {
        let node = &mut self.nodes[n];
        let Some(reader) = node.readers.get_mut(&sock) else { return };
        reader.sent += 1;
        let (number, stream) = (reader.sent, reader.stream);
        let mut bytes = Vec::new();
        let agreed = node.resource.as_ref().expect("it just spoke").agreed();
        wire::encode(packet, volume, &agreed, kind, &mut bytes);
        let length = packet.payload_len();
        assert!((length > 0) == payload.is_some(), "payload memory fits the packet");
        if let Some(buf) = payload {
            let payload = &node.arena[arena_range(buf, u64::from(length))];
            reader.lent.add(number, buf, length, sum(payload));
            bytes.extend_from_slice(payload);
        }
        if std::mem::take(&mut self.nodes[n].damages_header) {
            // A bit of the magic number: recognised by every version of the header.
            bytes[1] ^= 0x10;
        }
        if let Some(chance) = self.nodes[n].flips
            && let Some((at, bit)) = checked_bit(&bytes, chance)
        {
            self.nodes[n].flips = None;
            bytes[at] ^= 1 << bit;
            self.note(n, &format!("=== bit {bit} of byte {at} of this packet turns over"));
            self.forges(n);
        }
        self.watch_stranger(n, sock, packet);
        self.sent[n] += bytes.len() as u64;
        self.count_packet(packet);
        self.watch_sent(n, stream, volume, packet);
        self.net.send(self.now, stream, n, number, bytes);
    }

    pub(crate) fn dial(&mut self, n: usize, dial: u32) {
        let at = self.now + self.net.delay();
        let incarnation = self.nodes[n].incarnation;
        self.net.due.push((at, super::net::Wire::Knock { from: n, incarnation, dial }));
    }

    /// The driver of a node takes a new socket into use.
    pub(crate) fn adopt(&mut self, n: usize, sock: SockId, stream: u32) {
        let reader = Reader { stream, reading: Reading::Header, sent: 0, lent: Lent::default() };
        self.nodes[n].readers.insert(sock, reader);
    }

    /// A socket ends, for the driver: exactly one event tells the core.
    pub(crate) fn sock_gone(&mut self, n: usize, sock: SockId, why: SockGone) {
        let Some(reader) = self.nodes[n].readers.remove(&sock) else { return };
        self.nodes[n].lent.insert(sock, reader.lent);
        if let Reading::Payload { buf: Some(buf), .. } = reader.reading {
            let resource = self.nodes[n].resource.as_mut().expect("its sockets are open");
            resource.return_buffer(buf);
        }
        self.net.close(self.now, reader.stream, n);
        let at = self.now + Span(self.nodes[n].rng.between(1_000, 50_000));
        let incarnation = self.nodes[n].incarnation;
        self.schedule(at, Happening::Gone { node: n, incarnation, sock, why });
    }

    /// Reads whatever may be read on all sockets of a node.
    pub(crate) fn pump(&mut self, n: usize) {
        loop {
            let socks: Vec<SockId> = self.nodes[n].readers.keys().copied().collect();
            let mut progress = false;
            for sock in socks {
                progress |= self.pump_sock(n, sock);
            }
            if !progress {
                return;
            }
        }
    }

    /// One step on a socket; false if nothing can be done now.
    fn pump_sock(&mut self, n: usize, sock: SockId) -> bool {
        let Some(reader) = self.nodes[n].readers.get_mut(&sock) else { return false };
        let stream = reader.stream;
        let there = match self.net.readable(stream, n) {
            Readable::Reset => {
                self.sock_gone(n, sock, SockGone::Error(super::net::ECONNRESET));
                return true;
            }
            Readable::End => {
                self.sock_gone(n, sock, SockGone::EndOfFile);
                return true;
            }
            Readable::Bytes(there) => there,
        };
        let resource = self.nodes[n].resource.as_mut().expect("its sockets are open");
        match std::mem::replace(&mut reader.reading, Reading::Header) {
            Reading::Header => {
                let wanted = resource.header_size(sock);
                if !resource.may_receive(sock) {
                    return false;
                }
                if there < wanted {
                    return self.cut_short(n, sock, there);
                }
                let bytes = self.net.read(self.now, stream, n, wanted);
                self.on_header(n, sock, &bytes)
            }
            Reading::Fixed { header, plan } => {
                if there < plan.fixed {
                    reader.reading = Reading::Fixed { header, plan };
                    return self.cut_short(n, sock, there);
                }
                let bytes = self.net.read(self.now, stream, n, plan.fixed);
                self.on_fixed(n, sock, &header, &bytes)
            }
            Reading::Payload { volume, packet, buf, done } => {
                self.on_payload(n, sock, volume, packet, buf, done)
            }
        }
    }

    /// Too few bytes: more may come, unless the stream has ended.
    fn cut_short(&mut self, n: usize, sock: SockId, there: usize) -> bool {
        let stream = self.nodes[n].readers[&sock].stream;
        let ended = there > 0 && self.net.has_ended(stream, n);
        if ended {
            self.sock_gone(n, sock, SockGone::EndOfFile);
        }
        ended
    }

    fn on_header(&mut self, n: usize, sock: SockId, bytes: &[u8]) -> bool {
        let resource = self.nodes[n].resource.as_ref().expect("its sockets are open");
        match resource.plan(sock, bytes) {
            Ok((header, plan)) => {
                let reader = self.nodes[n].readers.get_mut(&sock).expect("it is being read");
                reader.reading = Reading::Fixed { header, plan };
            }
            Err(e) => self.sock_gone(n, sock, SockGone::Garbage(e)),
        }
        true
    }

    fn on_fixed(&mut self, n: usize, sock: SockId, header: &Header, bytes: &[u8]) -> bool {
        let resource = self.nodes[n].resource.as_ref().expect("its sockets are open");
        let packet = match resource.decode(sock, header, bytes) {
            Ok(packet) => packet,
            Err(e) => {
                self.sock_gone(n, sock, SockGone::Garbage(e));
                return true;
            }
        };
        if packet.payload_len() > 0 {
            let reader = self.nodes[n].readers.get_mut(&sock).expect("it is being read");
            let volume = header.volume;
            reader.reading = Reading::Payload { volume, packet, buf: None, done: 0 };
            return true;
        }
        self.handle(n, Event::Packet { sock, volume: header.volume, packet, payload: None });
        true
    }

    fn on_payload(
        &mut self,
        n: usize,
        sock: SockId,
        volume: VolumeNr,
        packet: Packet,
        buf: Option<Buf>,
        done: u32,
    ) -> bool {
        let node = &mut self.nodes[n];
        let resource = node.resource.as_mut().expect("its sockets are open");
        let buf = buf.or_else(|| resource.payload_buffer(&packet));
        let stream = node.readers[&sock].stream;
        let Some(buf) = buf else {
            let reader = node.readers.get_mut(&sock).expect("it is being read");
            reader.reading = Reading::Payload { volume, packet, buf: None, done };
            return false;
        };
        let wanted = usize::try_from(packet.payload_len() - done).expect("a payload fits");
        let bytes = self.net.read(self.now, stream, n, wanted);
        let count = u32::try_from(bytes.len()).expect("no more than wanted");
        let start = arena_range(buf, 0).start + usize::try_from(done).expect("a payload fits");
        self.nodes[n].arena[start..start + bytes.len()].copy_from_slice(&bytes);
        let done = done + count;
        if done == packet.payload_len() {
            self.handle(n, Event::Packet { sock, volume, packet, payload: Some(buf) });
            return true;
        }
        let reader = self.nodes[n].readers.get_mut(&sock).expect("it is being read");
        reader.reading = Reading::Payload { volume, packet, buf: Some(buf), done };
        if count == 0 { self.cut_short(n, sock, 1) } else { true }
    }
}

#[cfg(test)]
mod tests {
    use replication_core::wire::{Agreed, BarrierToken, HeaderKind};

    use super::*;

    /// Whatever the chance, a bit is chosen that a check covers, and never one of the payload.
    #[test]
    fn only_covered_bits_turn_over() {
        let mut packet = Vec::new();
        let barrier = Packet::Barrier { barrier: BarrierToken(7) };
        wire::encode(&barrier, VolumeNr(0), &Agreed::NOTHING, HeaderKind::H80, &mut packet);
        let mut found = std::collections::BTreeSet::new();
        for chance in 0..512 {
            if let Some((at, bit)) = checked_bit(&packet, chance) {
                let head = Head::parse(&packet).expect("a packet");
                assert!(is_checked(Stream::Data, &head, at as u64, bit));
                found.insert(at);
            }
        }
        assert!(found.contains(&0) && found.contains(&8), "magic and token: {found:?}");
        assert_eq!(checked_bit(&[0; 600], 9), None, "no packet");
    }
}
