//! Both nodes, virtual time, and the queue of what happens next.
//!
//! One thread, one seed: the queue is ordered by time and then by the order of planning, all
//! chance comes from the seed, so a seed gives the same run everywhere (LV-4). A failure prints
//! the seed, the state of both nodes and the last events in words.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use replication_core::action::Action;
use replication_core::event::{DialId, Event, SockGone, SockId};
use replication_core::units::{Errno, Span, Time};
use replication_core::wire::{Packet, ReplicationProtocol};

use super::ledger::Ledger;
use super::net::{ECONNREFUSED, ETIMEDOUT, Net, Wire};
use super::node::Node;
use super::rng::Rng;
use super::setup::Setup;
use super::trace::Trace;

/// What is planned to happen.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A deadline of the core.
    Tick { node: usize, incarnation: u32 },
    /// A disk operation ends.
    DiskReady { node: usize, incarnation: u32, job: u64 },
    /// Nothing of a socket is left.
    Gone { node: usize, incarnation: u32, sock: SockId, why: SockGone },
    /// An attempt to connect ends: with the socket and its stream, or without.
    Dialed { node: usize, incarnation: u32, dial: u32, result: Result<(SockId, u32), Errno> },
    /// The network.
    Net(Wire),
    /// The next random request.
    Load { node: usize },
}

/// Everything.
#[derive(Debug)]
pub struct World {
    /// The seed of this run.
    pub seed: u64,
    /// The time.
    pub now: Time,
    /// The nodes.
    pub nodes: [Node; 2],
    /// The network between them.
    pub net: Net,
    /// What was written.
    pub ledger: Ledger,
    /// What happened.
    pub trace: Trace,
    /// Chance, for hosts and scripts.
    pub rng: Rng,
    /// Bytes that each node has sent.
    pub sent: [u64; 2],
    /// How many packets of each name were sent.
    pub packets: BTreeMap<&'static str, u64>,
    /// Blocks that differ, for each volume: the truth.
    pub differing: Vec<BTreeSet<u64>>,
    /// The node may lack acknowledged writes of the volume.
    pub stale: [Vec<bool>; 2],
    pub(crate) sizes: Vec<u64>,
    /// What happened since both disks were last equal.
    pub since_sync: Vec<super::check::SinceSync>,
    pub(crate) actions: Vec<Action>,
    pub(crate) next_command: u64,
    queue: BTreeMap<(Time, u64), Happening>,
    planned: u64,
    moments: u64,
    same_time: u32,
}

impl World {
    /// Two nodes with fresh metadata and no process.
    #[must_use]
    pub fn new(seed: u64, setup: Setup) -> Self {
        let mut rng = Rng::new(seed);
        let net = Net::new(rng.split(), setup.speed);
        let volumes = setup.nodes[0].config.volumes.len();
        let protocol = setup.nodes[0].config.net.protocol;
        let keeps_unsettled = protocol != ReplicationProtocol::C;
        let nodes = setup.nodes.map(|node| Node::new(node, rng.split()));
        Self {
            seed,
            now: Time::ZERO,
            nodes,
            net,
            ledger: Ledger::new(keeps_unsettled),
            trace: Trace::default(),
            rng,
            sent: [0; 2],
            packets: BTreeMap::new(),
            differing: vec![BTreeSet::new(); volumes],
            stale: [vec![false; volumes], vec![false; volumes]],
            sizes: vec![0; volumes],
            since_sync: vec![super::check::SinceSync::default(); volumes],
            actions: Vec::new(),
            next_command: 0,
            queue: BTreeMap::new(),
            planned: 0,
            moments: 0,
            same_time: 0,
        }
    }

    /// Number of volumes.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.differing.len()
    }

    /// A moment of its own, for the ledger.
    pub(crate) fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.moments
    }

    /// Adds a line to the trace.
    pub fn note(&mut self, n: usize, what: &str) {
        let who = ["A", "B"][n];
        self.trace.add(self.now, who, what);
    }

    pub(crate) fn count_packet(&mut self, packet: &Packet) {
        *self.packets.entry(packet.name()).or_default() += 1;
    }

    /// How many packets of this name were sent so far.
    #[must_use]
    pub fn packets_sent(&self, name: &str) -> u64 {
        self.packets.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn schedule(&mut self, at: Time, what: Happening) {
        self.planned += 1;
        self.queue.insert((at, self.planned), what);
    }

    fn drain_net(&mut self) {
        for (at, wire) in std::mem::take(&mut self.net.due) {
            self.schedule(at, Happening::Net(wire));
        }
    }

    /// Lets the next thing happen; false if nothing is planned.
    pub fn step(&mut self) -> bool {
        self.drain_net();
        let Some(((at, _), what)) = self.queue.pop_first() else { return false };
        self.same_time = if at > self.now { 0 } else { self.same_time + 1 };
        assert!(self.same_time < 100_000, "time stands still");
        self.now = self.now.max(at);
        self.happen(what);
        for n in 0..2 {
            if self.nodes[n].resource.is_some() {
                self.pump(n);
            }
        }
        self.drain_net();
        if self.since_sync.iter().any(|since| !since.alone.is_empty()) && self.is_synced() {
            for since in &mut self.since_sync {
                since.alone.clear();
            }
        }
        true
    }

    fn lives(&self, n: usize, incarnation: u32) -> bool {
        let node = &self.nodes[n];
        node.incarnation == incarnation && node.resource.is_some()
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Tick { node, incarnation } => {
                let is_current = self.nodes[node].tick_at.is_some_and(|at| at <= self.now);
                if self.lives(node, incarnation) && is_current {
                    self.nodes[node].tick_at = None;
                    self.handle(node, Event::Tick);
                }
            }
            Happening::DiskReady { node, incarnation, job } => {
                if self.lives(node, incarnation) {
                    self.disk_ready(node, job);
                }
            }
            Happening::Gone { node, incarnation, sock, why } => {
                if self.lives(node, incarnation) {
                    self.handle(node, Event::SockGone { sock, why });
                }
            }
            Happening::Dialed { node, incarnation, dial, result } => {
                if self.lives(node, incarnation) {
                    let dial = DialId(dial);
                    let result = result.map(|(sock, stream)| {
                        self.adopt(node, sock, stream);
                        sock
                    });
                    self.handle(node, Event::DialDone { dial, result });
                }
            }
            Happening::Net(wire) => self.on_wire(wire),
            Happening::Load { node } => self.load_tick(node),
        }
    }

    fn on_wire(&mut self, wire: Wire) {
        match wire {
            Wire::Arrive { stream, end, what } => {
                if self.net.knows(stream) {
                    let has_power = self.nodes[end].has_power;
                    self.net.arrive(self.now, stream, end, what, has_power);
                }
            }
            Wire::Accepted { stream, end } => {
                if self.net.knows(stream)
                    && let Some((sock, upto)) = self.net.take_accepted(stream, end)
                    && self.nodes[end].resource.is_some()
                {
                    self.handle(end, Event::Sent { sock, upto });
                }
            }
            Wire::Knock { from, incarnation, dial } => self.knock(from, incarnation, dial),
        }
    }

    fn knock(&mut self, from: usize, incarnation: u32, dial: u32) {
        let to = 1 - from;
        if !self.lives(from, incarnation) {
            return;
        }
        let delay = self.net.delay();
        let listens = self.nodes[to].resource.is_some() && self.nodes[to].is_listening;
        if self.net.is_cut() || !self.nodes[to].has_power {
            let wait = Span::from_ms(self.rng.between(1_000, 3_000));
            let result = Err(ETIMEDOUT);
            let what = Happening::Dialed { node: from, incarnation, dial, result };
            self.schedule(self.now + wait, what);
        } else if listens {
            let (stream, socks) = self.net.open_stream();
            self.adopt(to, socks[to], stream);
            let result = Ok((socks[from], stream));
            let what = Happening::Dialed { node: from, incarnation, dial, result };
            self.schedule(self.now + delay, what);
            self.handle(to, Event::Accepted { sock: socks[to] });
        } else {
            let result = Err(ECONNREFUSED);
            let what = Happening::Dialed { node: from, incarnation, dial, result };
            self.schedule(self.now + delay, what);
        }
    }

    /// Runs until the condition holds.
    ///
    /// # Panics
    /// If it does not within this time.
    pub fn run_until(&mut self, what: &str, limit: Span, mut cond: impl FnMut(&mut Self) -> bool) {
        let end = self.now + limit;
        while !cond(self) {
            let in_time = self.now <= end;
            assert!(in_time, "not within {} ms: {what}", limit.as_ms());
            let goes_on = self.step();
            assert!(goes_on, "nothing more will happen, still missing: {what}");
        }
    }

    /// Runs for this time.
    pub fn run_for(&mut self, span: Span) {
        let end = self.now + span;
        loop {
            self.drain_net();
            match self.queue.first_key_value() {
                Some(((at, _), _)) if *at <= end => {
                    self.step();
                }
                Some(_) | None => break,
            }
        }
        self.now = end;
    }

    /// The state of everything, in words.
    #[must_use]
    pub fn report(&self) -> String {
        let mut out = format!("seed {} at {} ms\n", self.seed, self.now.0 / 1_000_000);
        for line in self.trace.lines() {
            out.push_str(line);
            out.push('\n');
        }
        for (n, node) in self.nodes.iter().enumerate() {
            let name = ["A", "B"][n];
            out.push_str(&format!("node {name}: power {}, ", node.has_power));
            let words = node.resource.as_ref().map_or_else(
                || String::from("no process"),
                |resource| {
                    let now = self.now;
                    let seen = catch_unwind(AssertUnwindSafe(|| {
                        format!("{:#?}\n{resource:?}", resource.status(now))
                    }));
                    seen.unwrap_or_else(|_| format!("no status to be had: {resource:?}"))
                },
            );
            out.push_str(&words);
            out.push_str(&format!("\nnode {name} waits for {:?}\n", node.host.words(self.now)));
        }
        for (volume, blocks) in self.differing.iter().enumerate() {
            let first: Vec<u64> = blocks.iter().copied().take(20).collect();
            out.push_str(&format!("volume {volume}: {} blocks differ {first:?}\n", blocks.len()));
        }
        out.push_str(&format!("stale: {:?}, cut: {}\n", self.stale, self.net.is_cut()));
        out
    }
}

impl Drop for World {
    /// A test that fails shows what happened.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
    }
}
