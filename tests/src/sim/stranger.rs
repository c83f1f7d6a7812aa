//! Somebody who is not the peer, and connects to a node all the same.
//!
//! A stranger's end of a stream is the other node's end as far as the network is concerned, but no
//! driver reads it: what it says and hears is up to whoever holds the [`Call`]. It vanishes with
//! the process of the other node, and the cut link cuts it off as well.
//!
//! Nothing but the first packets of a handshake is ever said to a stranger (WP-2).

use replication_core::event::{Event, SockId};
use replication_core::wire::Packet;

use super::coverage::Family;
use super::net::Readable;
use super::world::World;

/// A connection of a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The node that it reached.
    pub node: usize,
    stream: u32,
    sock: SockId,
    said: u64,
}

impl World {
    /// A stranger connects to a node, if that one listens.
    pub fn call(&mut self, n: usize) -> Option<Call> {
        let node = &self.nodes[n];
        let hears = node.resource.is_some() && node.is_listening && node.frozen_until.is_none();
        if !hears || self.net.is_cut() {
            return None;
        }
        let (stream, socks) = self.net.open_stream();
        let sock = socks[n];
        self.strangers.insert(sock);
        self.adopt(n, sock, stream);
        self.handle(n, Event::Accepted { sock });
        Some(Call { node: n, stream, sock, said: 0 })
    }

    /// A stranger says something. Nothing happens if the node, or the network, has hung up.
    pub fn say(&mut self, call: &mut Call, bytes: Vec<u8>) {
        let end = 1 - call.node;
        if self.net.knows(call.stream) && self.net.is_open_at(call.stream, end) {
            call.said += 1;
            self.net.send(self.now, call.stream, end, call.said, bytes);
        }
    }

    /// What a stranger has heard since it listened last.
    pub fn hear(&mut self, call: &Call) -> Vec<u8> {
        let end = 1 - call.node;
        if !self.net.knows(call.stream) || !self.net.is_open_at(call.stream, end) {
            return Vec::new();
        }
        match self.net.readable(call.stream, end) {
            Readable::Bytes(count) => self.net.read(self.now, call.stream, end, count),
            Readable::End | Readable::Reset => Vec::new(),
        }
    }

    /// Whether the node still holds its end of the connection.
    #[must_use]
    pub fn is_kept(&self, call: &Call) -> bool {
        self.nodes[call.node].readers.contains_key(&call.sock)
    }

    /// A stranger hangs up.
    pub fn hang_up(&mut self, call: &Call) {
        let end = 1 - call.node;
        if self.net.knows(call.stream) && self.net.is_open_at(call.stream, end) {
            self.net.close(self.now, call.stream, end);
        }
    }

    /// WP-2: a packet is about to be sent on this socket.
    pub(crate) fn watch_stranger(&mut self, n: usize, sock: SockId, packet: &Packet) {
        if !self.strangers.contains(&sock) {
            return;
        }
        let is_early = matches!(
            packet,
            Packet::InitialData
                | Packet::InitialMeta
                | Packet::ConnectionFeatures(_)
                | Packet::AuthChallenge(_)
                | Packet::AuthResponse(_)
        );
        assert!(is_early, "WP-2: node {n} says {} to a stranger", packet.name());
        self.coverage.add(Family::Check, "WP-2");
    }
}

#[cfg(test)]
mod tests {
    use replication_core::control::Command;
    use replication_core::units::{Span, VolumeNr};
    use replication_core::wire::{Agreed, HeaderKind, encode};

    use super::super::disk::Cut;
    use super::super::setup::Setup;
    use super::super::{A, B};
    use super::*;

    fn early(packet: &Packet) -> Vec<u8> {
        let mut out = Vec::new();
        encode(packet, VolumeNr(0), &Agreed::NOTHING, HeaderKind::H80, &mut out);
        out
    }

    /// A stranger who begins as the peer would is offered versions, and no more; when he is silent
    /// the node gives up on him, and the peer still gets through.
    #[test]
    fn a_silent_stranger_is_left() {
        let mut w = World::new(1, Setup::default());
        w.boot(A);
        w.must(A, Command::Up);
        let mut calls = [w.call(A).unwrap(), w.call(A).unwrap()];
        w.say(&mut calls[0], early(&Packet::InitialData));
        w.say(&mut calls[1], early(&Packet::InitialMeta));
        w.run_for(Span::from_secs(1));
        assert!(!w.hear(&calls[0]).is_empty(), "versions are offered");
        assert_eq!(w.coverage.count(Family::Check, "WP-2"), 1);
        w.run_for(Span::from_secs(60));
        assert!(calls.iter().all(|call| !w.is_kept(call)));
        w.boot(B);
        w.must(B, Command::Up);
        w.wait_connected();
    }

    /// A stranger waits where the peer's second socket is expected, at either node in turn, and the
    /// peer dies in between, with its half of the handshake said: he hears nothing.
    #[test]
    fn a_stranger_beside_a_dead_peer_hears_nothing() {
        let mut w = World::new(4, Setup::default());
        w.boot(A);
        w.must(A, Command::Up);
        let mut first = w.call(A).unwrap();
        w.say(&mut first, early(&Packet::InitialMeta));
        w.boot(B);
        w.must(B, Command::Up);
        let limit = Span::from_secs(10);
        w.run_until("A's half of the handshake", limit, |w| {
            w.packets_sent("P_CONNECTION_FEATURES") == 1
        });
        w.run_for(Span::from_ms(1));
        w.power_cut(A, Cut::KeepAll);
        let mut second = w.call(B).unwrap();
        w.say(&mut second, early(&Packet::InitialMeta));
        w.run_until("B's half", limit, |w| w.packets_sent("P_PROTOCOL") == 1);
        w.run_until("the end", limit, |w| !w.is_kept(&second));
        assert!(w.hear(&second).is_empty());
        w.restart(A);
        w.wait_connected();
    }

    /// Nobody is heard by a node that does not listen.
    #[test]
    fn connected_nodes_do_not_listen() {
        let mut w = World::new(2, Setup::default());
        w.up_both();
        assert_eq!([A, B].map(|n| w.call(n)), [None, None]);
    }

    /// The check is not idle: data that is sent on the socket of a stranger is noticed.
    #[test]
    #[should_panic(expected = "WP-2: node 0 says P_DATA to a stranger")]
    fn data_for_a_stranger_is_noticed() {
        let mut w = World::new(3, Setup::default());
        w.start_synced();
        w.strangers.extend(w.nodes[A].readers.keys().copied());
        w.write(A, 0, 0, 8);
    }
}
