//! The network between the two nodes: streams of bytes with finite buffers, and what TCP does to
//! them.
//!
//! A stream delivers its bytes in order and whole, or not at all. It can be slow, it can stand
//! still while the link is cut (what was accepted arrives when the link is healed, as after a
//! retransmission), and it can be reset. A closed end still delivers what the system had accepted,
//! unless it left bytes unread: then the peer sees a reset. A node without power answers nothing;
//! once it is back, it answers old streams with a reset.
//!
//! This room knows bytes and times only. The world delivers its [`Wire`] events.

use std::collections::{BTreeMap, VecDeque};

use replication_core::event::SockId;
use replication_core::units::{Errno, Span, Time};

use super::rng::Rng;

/// Connection refused.
pub const ECONNREFUSED: Errno = Errno(111);
/// Connection timed out.
pub const ETIMEDOUT: Errno = Errno(110);
/// Connection reset by peer.
pub const ECONNRESET: Errno = Errno(104);

/// Something on its way through the network, or from the system to the driver.
#[derive(Clone, Debug)]
pub enum Wire {
    /// Something arrives at an end of a stream.
    Arrive {
        /// The stream.
        stream: u32,
        /// The receiving end.
        end: usize,
        /// Counts what was sent in this direction.
        number: u64,
        /// What.
        what: Segment,
    },
    /// The system has accepted packets of this end.
    Accepted {
        /// The stream.
        stream: u32,
        /// The sending end.
        end: usize,
    },
    /// An attempt to connect reaches the other node.
    Knock {
        /// The node that connects.
        from: usize,
        /// Its process.
        incarnation: u32,
        /// Its attempt.
        dial: u32,
    },
}

/// A piece of a stream.
#[derive(Clone, Debug)]
pub enum Segment {
    /// Bytes.
    Bytes(Vec<u8>),
    /// No more bytes will come.
    End,
    /// The stream is void.
    Reset,
}

/// How the ends of a stream stand to their drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndState {
    Open,
    /// The driver or its process is gone; the system answers with a reset.
    Closed,
    /// The node lost power with the stream open.
    Vanished,
}

/// One end: what it sends, and what has arrived here.
#[derive(Debug)]
struct End {
    sock: SockId,
    state: EndState,
    /// Given by the driver, not yet accepted: packet number, its bytes, and how many of them the
    /// system has taken.
    unsent: VecDeque<(u64, Vec<u8>, usize)>,
    accepted: u64,
    reported: u64,
    report_under_way: bool,
    /// Accepted and not yet consumed at the other end.
    in_flight: usize,
    last_arrival: Time,
    /// Counts what was sent from here.
    sent: u64,
    /// Waits for the link to be healed, by number: what was under way when the link was cut comes
    /// before what was sent later.
    held: BTreeMap<u64, Segment>,
    /// Number of the last piece that was taken in here.
    taken: u64,
    /// Arrived here before what comes first.
    early: BTreeMap<u64, Segment>,
    received: VecDeque<u8>,
    at_end: bool,
    reset: bool,
}

impl End {
    fn new(sock: SockId) -> Self {
        Self {
            sock,
            state: EndState::Open,
            unsent: VecDeque::new(),
            accepted: 0,
            reported: 0,
            report_under_way: false,
            in_flight: 0,
            last_arrival: Time::ZERO,
            sent: 0,
            held: BTreeMap::new(),
            taken: 0,
            early: BTreeMap::new(),
            received: VecDeque::new(),
            at_end: false,
            reset: false,
        }
    }

    /// Takes in what has arrived, in the order in which it was sent: what comes too early waits. A
    /// reset makes the stream void at once.
    fn arrived(&mut self, number: u64, what: Segment) {
        if matches!(what, Segment::Reset) {
            self.reset = true;
            self.received.clear();
            self.early.clear();
            self.unsent.clear();
            return;
        }
        self.early.insert(number, what);
        while let Some(next) = self.early.remove(&(self.taken + 1)) {
            self.taken += 1;
            match next {
                Segment::Bytes(bytes) if !self.reset && !self.at_end => self.received.extend(bytes),
                Segment::Bytes(_) => {}
                Segment::End => self.at_end = true,
                Segment::Reset => unreachable!("a reset does not wait"),
            }
        }
    }
}

/// How fast the network is.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Least time of a segment on its way.
    pub latency: Span,
    /// At most this much more, by chance.
    pub jitter: Span,
    /// Bytes that a stream holds between the two drivers.
    pub window: usize,
    /// Largest segment.
    pub segment: usize,
    /// Time of a byte.
    pub per_byte: Span,
}

impl Default for Speed {
    fn default() -> Self {
        Self {
            latency: Span(50_000),
            jitter: Span(100_000),
            window: 256 << 10,
            segment: 64 << 10,
            per_byte: Span(1),
        }
    }
}

/// The network.
#[derive(Debug)]
pub struct Net {
    rng: Rng,
    /// Its speed.
    pub speed: Speed,
    /// Nothing gets through to the node with this number.
    cut_towards: [bool; 2],
    streams: BTreeMap<u32, [End; 2]>,
    next_stream: u32,
    next_sock: u32,
    /// What is to happen when.
    pub due: Vec<(Time, Wire)>,
    /// Bytes that arrived at each node.
    pub delivered: [u64; 2],
}

/// What a driver reads from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// This many bytes are there, and the stream goes on.
    Bytes(usize),
    /// Nothing is left and nothing will come.
    End,
    /// The stream is void.
    Reset,
}

impl Net {
    /// A network without streams.
    #[must_use]
    pub const fn new(rng: Rng, speed: Speed) -> Self {
        Self {
            rng,
            speed,
            cut_towards: [false; 2],
            streams: BTreeMap::new(),
            next_stream: 0,
            next_sock: 1,
            due: Vec::new(),
            delivered: [0; 2],
        }
    }

    /// Whether something is cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut_towards.contains(&true)
    }

    /// Whether nothing reaches the node with this number.
    #[must_use]
    pub fn is_cut_towards(&self, node: usize) -> bool {
        self.cut_towards[node]
    }

    /// Silently stops everything towards a node.
    pub fn cut_towards(&mut self, node: usize) {
        self.cut_towards[node] = true;
    }

    /// Lets everything through again, what was held included.
    pub fn heal(&mut self, now: Time) {
        self.cut_towards = [false; 2];
        let streams: Vec<u32> = self.streams.keys().copied().collect();
        for stream in streams {
            for end in 0..2 {
                // A retransmission timer has to run out first.
                let wait = Span::from_ms(self.rng.between(1, 200));
                let from = self.end_mut(stream, 1 - end);
                from.last_arrival = from.last_arrival.max(now + wait);
                for (number, what) in std::mem::take(&mut from.held) {
                    self.travel(now, stream, 1 - end, number, what);
                }
            }
        }
    }

    /// A new socket number.
    fn new_sock(&mut self) -> SockId {
        self.next_sock += 1;
        SockId(self.next_sock)
    }

    /// Makes a stream between the nodes; end 0 is node 0's.
    pub fn open_stream(&mut self) -> (u32, [SockId; 2]) {
        let socks = [self.new_sock(), self.new_sock()];
        let stream = self.next_stream;
        self.next_stream += 1;
        self.streams.insert(stream, [End::new(socks[0]), End::new(socks[1])]);
        (stream, socks)
    }

    /// The time a first packet takes.
    pub fn delay(&mut self) -> Span {
        let Speed { latency, jitter, .. } = self.speed;
        Span(latency.0 + self.rng.below(jitter.0.max(1)))
    }

    /// Whether an end of a stream is in use.
    #[must_use]
    pub fn is_open_at(&self, stream: u32, end: usize) -> bool {
        self.streams.get(&stream).is_some_and(|ends| ends[end].state == EndState::Open)
    }

    /// The stream and end of an open socket of a node.
    #[must_use]
    pub fn find(&self, node: usize, sock: SockId) -> Option<u32> {
        let is_it = |ends: &[End; 2]| ends[node].sock == sock && ends[node].state == EndState::Open;
        self.streams.iter().find(|(_, ends)| is_it(ends)).map(|(stream, _)| *stream)
    }

    /// Open sockets of a node.
    #[must_use]
    pub fn open_socks(&self, node: usize) -> Vec<SockId> {
        let open = self.streams.values().filter(|ends| ends[node].state == EndState::Open);
        open.map(|ends| ends[node].sock).collect()
    }

    fn end_mut(&mut self, stream: u32, end: usize) -> &mut End {
        &mut self.streams.get_mut(&stream).expect("streams are kept")[end]
    }

    fn end(&self, stream: u32, end: usize) -> &End {
        &self.streams[&stream][end]
    }

    /// A driver sends a packet.
    pub fn send(&mut self, now: Time, stream: u32, end: usize, number: u64, bytes: Vec<u8>) {
        self.end_mut(stream, end).unsent.push_back((number, bytes, 0));
        self.push(now, stream, end);
    }

    /// Lets the system accept what it has room for.
    fn push(&mut self, now: Time, stream: u32, end: usize) {
        let Speed { window, segment, .. } = self.speed;
        loop {
            let limit = usize::try_from(self.rng.between(1, segment as u64)).expect("a size");
            let own = self.end_mut(stream, end);
            let room = window.saturating_sub(own.in_flight).min(limit);
            let mut bytes = Vec::new();
            while bytes.len() < room
                && let Some((number, packet, taken)) = own.unsent.front_mut()
            {
                let end = packet.len().min(*taken + room - bytes.len());
                bytes.extend_from_slice(&packet[*taken..end]);
                *taken = end;
                if end == packet.len() {
                    own.accepted = *number;
                    own.unsent.pop_front();
                }
            }
            if bytes.is_empty() {
                break;
            }
            own.in_flight += bytes.len();
            self.give(now, stream, end, Segment::Bytes(bytes));
        }
        let own = self.end_mut(stream, end);
        if own.accepted > own.reported && !own.report_under_way && own.state == EndState::Open {
            own.report_under_way = true;
            let soon = now + Span(self.rng.between(500, 20_000));
            self.due.push((soon, Wire::Accepted { stream, end }));
        }
    }

    /// Something is sent.
    fn give(&mut self, now: Time, stream: u32, from: usize, what: Segment) {
        let own = self.end_mut(stream, from);
        own.sent += 1;
        let number = own.sent;
        self.travel(now, stream, from, number, what);
    }

    fn travel(&mut self, now: Time, stream: u32, from: usize, number: u64, what: Segment) {
        if self.cut_towards[1 - from] {
            self.end_mut(stream, from).held.insert(number, what);
            return;
        }
        let size = match &what {
            Segment::Bytes(bytes) => bytes.len() as u64,
            Segment::End | Segment::Reset => 0,
        };
        let wait = Span(self.delay().0 + self.speed.per_byte.0 * size);
        let own = self.end_mut(stream, from);
        own.last_arrival = own.last_arrival.max(now + wait);
        let at = own.last_arrival;
        self.due.push((at, Wire::Arrive { stream, end: 1 - from, number, what }));
    }

    /// Something arrives. Returns whether the driver of that end should look.
    pub fn arrive(
        &mut self,
        now: Time,
        stream: u32,
        end: usize,
        (number, what): (u64, Segment),
        has_power: bool,
    ) -> bool {
        if self.cut_towards[end] {
            self.end_mut(stream, 1 - end).held.insert(number, what);
            return false;
        }
        let is_reset = matches!(what, Segment::Reset);
        let own = self.end_mut(stream, end);
        match own.state {
            EndState::Open => {
                own.arrived(number, what);
                true
            }
            EndState::Closed | EndState::Vanished if has_power && !is_reset => {
                self.give(now, stream, end, Segment::Reset);
                false
            }
            EndState::Closed | EndState::Vanished => false,
        }
    }

    /// What there is to read for a driver.
    #[must_use]
    pub fn readable(&self, stream: u32, end: usize) -> Readable {
        let own = self.end(stream, end);
        if own.reset {
            Readable::Reset
        } else if own.received.is_empty() && own.at_end {
            Readable::End
        } else {
            Readable::Bytes(own.received.len())
        }
    }

    /// Whether the peer ended the stream, so that a partial packet stays partial.
    #[must_use]
    pub fn has_ended(&self, stream: u32, end: usize) -> bool {
        self.end(stream, end).at_end
    }

    /// Takes bytes out of the stream, as many as there are up to `most`.
    pub fn read(&mut self, now: Time, stream: u32, end: usize, most: usize) -> Vec<u8> {
        let own = self.end_mut(stream, end);
        let count = own.received.len().min(most);
        let mut bytes = Vec::with_capacity(count);
        let (front, back) = own.received.as_slices();
        let from_front = count.min(front.len());
        bytes.extend_from_slice(&front[..from_front]);
        bytes.extend_from_slice(&back[..count - from_front]);
        own.received.drain(..count);
        self.delivered[end] += count as u64;
        let sender = self.end_mut(stream, 1 - end);
        sender.in_flight -= count;
        if count > 0 && sender.state == EndState::Open && !sender.reset {
            self.push(now, stream, 1 - end);
        }
        bytes
    }

    /// The number of the last packet that the system has accepted, for the driver's report.
    pub fn take_accepted(&mut self, stream: u32, end: usize) -> Option<(SockId, u64)> {
        let own = self.end_mut(stream, end);
        own.report_under_way = false;
        if own.state != EndState::Open || own.accepted == own.reported {
            return None;
        }
        own.reported = own.accepted;
        Some((own.sock, own.accepted))
    }

    /// A driver closes its end.
    pub fn close(&mut self, now: Time, stream: u32, end: usize) {
        let own = self.end_mut(stream, end);
        own.state = EndState::Closed;
        own.unsent.clear();
        let was_reset = own.reset;
        let left_unread = !own.received.is_empty();
        own.received.clear();
        if !was_reset {
            let last = if left_unread { Segment::Reset } else { Segment::End };
            self.give(now, stream, end, last);
        }
        self.forget_dead_streams();
    }

    /// The process of a node is gone: its system closes all ends.
    pub fn close_all(&mut self, now: Time, node: usize) {
        let open: Vec<u32> = self.open_streams(node);
        for stream in open {
            self.close(now, stream, node);
        }
    }

    /// A node lost power: nobody is told.
    pub fn vanish(&mut self, node: usize) {
        for stream in self.open_streams(node) {
            let own = self.end_mut(stream, node);
            own.state = EndState::Vanished;
            own.unsent.clear();
            own.received.clear();
            // What the system had accepted is lost with it.
            own.held.clear();
        }
    }

    /// A node is back: what the other end still sends is answered with a reset.
    pub fn revive(&mut self, now: Time, node: usize) {
        let gone = self.streams.iter().filter(|(_, ends)| {
            ends[node].state == EndState::Vanished && ends[1 - node].in_flight > 0
        });
        let gone: Vec<u32> = gone.map(|(stream, _)| *stream).collect();
        for stream in gone {
            self.give(now, stream, node, Segment::Reset);
        }
    }

    /// One direction of a stream ends although its driver did not close it: the other end sees the
    /// end of the stream behind what was accepted before. `which` chooses among the open ones.
    pub fn half_close(&mut self, now: Time, node: usize, which: u64) {
        let open = self.open_streams(node);
        if open.is_empty() {
            return;
        }
        let at = usize::try_from(which % open.len() as u64).expect("an index");
        self.give(now, open[at], node, Segment::End);
    }

    /// Resets every stream at both ends.
    pub fn reset_all(&mut self, now: Time) {
        let streams: Vec<u32> = self.streams.keys().copied().collect();
        for stream in streams {
            for end in 0..2 {
                if self.end(stream, end).state == EndState::Open {
                    let at = now + self.delay();
                    let own = self.end_mut(stream, 1 - end);
                    own.sent += 1;
                    let (number, what) = (own.sent, Segment::Reset);
                    self.due.push((at, Wire::Arrive { stream, end, number, what }));
                }
            }
        }
    }

    fn open_streams(&self, node: usize) -> Vec<u32> {
        let open = self.streams.iter().filter(|(_, ends)| ends[node].state == EndState::Open);
        open.map(|(stream, _)| *stream).collect()
    }

    fn forget_dead_streams(&mut self) {
        // Segments may still be on their way to a closed end; they need the entry.
        const KEPT: usize = 64;
        while self.streams.len() > KEPT {
            let dead = self.streams.iter().find(|(_, ends)| {
                ends.iter().all(|end| end.state != EndState::Open && end.held.is_empty())
            });
            let Some((&stream, _)) = dead else { return };
            let used = |wire: &Wire| match wire {
                Wire::Arrive { stream: other, .. } | Wire::Accepted { stream: other, .. } => {
                    *other == stream
                }
                Wire::Knock { .. } => false,
            };
            if self.due.iter().any(|(_, wire)| used(wire)) {
                return;
            }
            self.streams.remove(&stream);
        }
    }

    /// Whether the stream is still known.
    #[must_use]
    pub fn knows(&self, stream: u32) -> bool {
        self.streams.contains_key(&stream)
    }

    /// Bytes that were accepted and not yet read, of streams that are open at both ends.
    #[must_use]
    pub fn bytes_on_the_way(&self) -> usize {
        let is_open = |ends: &&[End; 2]| ends.iter().all(|end| end.state == EndState::Open);
        self.streams.values().filter(is_open).flatten().map(|end| end.in_flight).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net() -> (Net, u32) {
        let mut net = Net::new(Rng::new(1), Speed { window: 100, ..Speed::default() });
        let (stream, _) = net.open_stream();
        (net, stream)
    }

    fn run(net: &mut Net) -> Time {
        let mut now = Time::ZERO;
        while !net.due.is_empty() {
            net.due.sort_by_key(|(at, _)| *at);
            let (at, wire) = net.due.remove(0);
            now = at;
            if let Wire::Arrive { stream, end, number, what } = wire {
                net.arrive(at, stream, end, (number, what), true);
            }
        }
        now
    }

    /// Bytes arrive in order; a full window stops the sender until the other end reads.
    #[test]
    fn the_window_holds_the_sender_back() {
        let (mut net, stream) = net();
        net.send(Time::ZERO, stream, 0, 1, (0..80).collect());
        net.send(Time::ZERO, stream, 0, 2, (80..160).collect());
        let now = run(&mut net);
        assert_eq!(net.readable(stream, 1), Readable::Bytes(100));
        assert_eq!(net.take_accepted(stream, 0).map(|(_, upto)| upto), Some(1));
        let mut all = net.read(now, stream, 1, 1000);
        let now = run(&mut net);
        all.extend(net.read(now, stream, 1, 1000));
        assert_eq!(all, (0..160).collect::<Vec<u8>>());
        assert_eq!(net.take_accepted(stream, 0).map(|(_, upto)| upto), Some(2));
    }

    /// A cut holds everything back, also the end; healing delivers it.
    #[test]
    fn a_cut_holds_and_healing_delivers() {
        let (mut net, stream) = net();
        net.cut_towards(1);
        net.send(Time::ZERO, stream, 0, 1, vec![7; 10]);
        net.close(Time::ZERO, stream, 0);
        run(&mut net);
        assert_eq!(net.readable(stream, 1), Readable::Bytes(0));
        net.heal(Time(5));
        let now = run(&mut net);
        assert_eq!(net.read(now, stream, 1, 100), vec![7; 10]);
        assert_eq!(net.readable(stream, 1), Readable::End);
    }

    /// What was under way when the link was cut arrives before what was sent later.
    #[test]
    fn a_cut_keeps_the_order() {
        let (mut net, stream) = net();
        net.send(Time::ZERO, stream, 0, 1, vec![1; 10]);
        net.cut_towards(1);
        net.send(Time::ZERO, stream, 0, 2, vec![2; 10]);
        run(&mut net);
        net.heal(Time(5));
        let now = run(&mut net);
        assert_eq!(net.read(now, stream, 1, 100), [vec![1; 10], vec![2; 10]].concat());
    }

    /// What the cut link has held back still comes before what was behind it on the way, also if
    /// the link is healed between their arrivals.
    #[test]
    fn a_short_cut_keeps_the_order() {
        let (mut net, stream) = net();
        net.send(Time::ZERO, stream, 0, 1, vec![1; 10]);
        net.send(Time::ZERO, stream, 0, 2, vec![2; 10]);
        net.due.sort_by_key(|(at, _)| *at);
        net.cut_towards(1);
        let first =
            net.due.iter().position(|(_, wire)| matches!(wire, Wire::Arrive { .. })).unwrap();
        let (at, wire) = net.due.remove(first);
        let Wire::Arrive { stream, end, number, what } = wire else { unreachable!() };
        assert!(!net.arrive(at, stream, end, (number, what), true), "the link is cut");
        net.heal(at);
        let now = run(&mut net);
        assert_eq!(net.read(now, stream, 1, 100), [vec![1; 10], vec![2; 10]].concat());
    }

    /// Bytes left unread at a close reach the sender as a reset.
    #[test]
    fn unread_bytes_reset_the_stream() {
        let (mut net, stream) = net();
        net.send(Time::ZERO, stream, 0, 1, vec![7; 10]);
        let now = run(&mut net);
        net.close(now, stream, 1);
        run(&mut net);
        assert_eq!(net.readable(stream, 0), Readable::Reset);
    }
}
