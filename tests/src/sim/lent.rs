//! Does the core leave the memory of a packet alone until the driver is done with it? (ORD-6)
//!
//! The driver may look at a payload until the packet was accepted by the system, or until nothing
//! is left of its socket.

use std::collections::VecDeque;

use replication_core::event::SockId;
use replication_core::units::Buf;

use super::node::{arena_range, sum};
use super::world::World;

#[derive(Debug)]
struct Payload {
    number: u64,
    buf: Buf,
    bytes: u32,
    sum: u64,
}

/// Memory that packets of one socket are read from, in the order of sending.
#[derive(Debug, Default)]
pub(crate) struct Lent(VecDeque<Payload>);

impl Lent {
    pub(crate) fn add(&mut self, number: u64, buf: Buf, bytes: u32, sum: u64) {
        self.0.push_back(Payload { number, buf, bytes, sum });
    }

    fn returned(&mut self, upto: u64, arena: &[u8]) {
        while self.0.front().is_some_and(|payload| payload.number <= upto) {
            let payload = self.0.pop_front().expect("it was just seen");
            let now = sum(&arena[arena_range(payload.buf, u64::from(payload.bytes))]);
            assert!(now == payload.sum, "ORD-6: memory of a packet changed before it was sent");
        }
    }
}

impl World {
    /// Packets of a socket were accepted by the system.
    pub(crate) fn check_lent(&mut self, n: usize, sock: SockId, upto: u64) {
        let node = &mut self.nodes[n];
        let open = node.readers.get_mut(&sock).map(|reader| &mut reader.lent);
        if let Some(lent) = open.or_else(|| node.lent.get_mut(&sock)) {
            lent.returned(upto, &node.arena);
        }
    }

    /// Nothing is left of a socket.
    pub(crate) fn check_lent_of_gone(&mut self, n: usize, sock: SockId) {
        let node = &mut self.nodes[n];
        if let Some(mut lent) = node.lent.remove(&sock) {
            lent.returned(u64::MAX, &node.arena);
        }
    }
}
