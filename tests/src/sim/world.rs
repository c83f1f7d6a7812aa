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

use super::coverage::{Coverage, Family};
use super::ledger::Ledger;
use super::net::{ECONNREFUSED, ETIMEDOUT, Net, Wire};
use super::node::Node;
use super::rng::Rng;
use super::setup::Setup;
use super::trace::Trace;
use super::watch::Watch;

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
    /// A stopped process goes on.
    Thaw { node: usize },
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
    /// What happened, counted.
    pub coverage: Coverage,
    /// What the checks of single events remember.
    pub(crate) watch: Watch,
    /// Blocks that differ, for each volume: the truth.
    pub differing: Vec<BTreeSet<u64>>,
    /// Sockets behind which is not the peer.
    pub(crate) strangers: BTreeSet<SockId>,
    /// The node may lack acknowledged writes of the volume.
    pub stale: [Vec<bool>; 2],
    /// When each node lost power last, as a moment of the ledger.
    pub(crate) lost_power_at: [u64; 2],
    /// By node and volume: when its last connection began, and when it ended if it has, as moments
    /// of the ledger.
    pub(crate) connected: [Vec<(u64, Option<u64>)>; 2],
    pub(crate) sizes: Vec<u64>,
    /// What happened since both disks were last equal.
    pub since_sync: Vec<super::check::SinceSync>,
    pub(crate) actions: Vec<Action>,
    pub(crate) next_command: u64,
    /// The line of trace at which the command under way in the core was given.
    pub(crate) command_began: u64,
    /// By volume: whether what the event under way lets the core answer was mirrored.
    pub(crate) was_mirrored: Vec<bool>,
    /// Things that have happened.
    pub steps: u64,
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
            coverage: Coverage::default(),
            watch: Watch::default(),
            differing: vec![BTreeSet::new(); volumes],
            strangers: BTreeSet::new(),
            stale: [vec![false; volumes], vec![false; volumes]],
            lost_power_at: [0; 2],
            connected: [vec![(0, Some(0)); volumes], vec![(0, Some(0)); volumes]],
            sizes: vec![0; volumes],
            since_sync: vec![super::check::SinceSync::default(); volumes],
            actions: Vec::new(),
            next_command: 0,
            command_began: 0,
            was_mirrored: Vec::new(),
            steps: 0,
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

    /// The time by the clock of a node.
    #[must_use]
    pub fn local(&self, n: usize) -> Time {
        self.now + self.nodes[n].clock
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
        self.coverage.add(Family::Packet, packet.name());
    }

    /// How many packets of this name were sent so far.
    #[must_use]
    pub fn packets_sent(&self, name: &str) -> u64 {
        self.coverage.count(Family::Packet, name)
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
        // Of what a healed link lets through, each byte may come by itself; that ends.
        let may_crowd = matches!(what, Happening::Net(Wire::Arrive { .. }));
        self.same_time = if at > self.now { 0 } else { self.same_time + u32::from(!may_crowd) };
        assert!(self.same_time < 100_000, "time stands still");
        self.now = self.now.max(at);
        self.steps += 1;
        super::replay::on_step(self);
        self.happen(what);
        for n in 0..2 {
            if self.nodes[n].resource.is_some() && self.nodes[n].frozen_until.is_none() {
                self.pump(n);
            }
        }
        self.drain_net();
        self.after_step();
        true
    }

    fn lives(&self, n: usize, incarnation: u32) -> bool {
        let node = &self.nodes[n];
        node.incarnation == incarnation && node.resource.is_some()
    }

    /// When the node concerned goes on, if its process is stopped.
    fn frozen_until(&self, what: &Happening) -> Option<Time> {
        let node = match what {
            Happening::Tick { node, .. }
            | Happening::DiskReady { node, .. }
            | Happening::Gone { node, .. }
            | Happening::Dialed { node, .. }
            | Happening::Load { node } => *node,
            Happening::Net(Wire::Accepted { end, .. }) => *end,
            Happening::Net(Wire::Knock { from, .. }) => 1 - *from,
            Happening::Net(Wire::Arrive { .. }) | Happening::Thaw { .. } => return None,
        };
        self.nodes[node].frozen_until
    }

    fn happen(&mut self, what: Happening) {
        if let Some(until) = self.frozen_until(&what) {
            // Later than what is planned for the thaw itself; the order stays.
            self.schedule(until + Span(1), what);
            return;
        }
        match what {
            Happening::Thaw { node } => {
                if self.nodes[node].frozen_until.is_some_and(|until| until <= self.now) {
                    self.nodes[node].frozen_until = None;
                    self.note(node, "=== goes on");
                }
            }
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
                    self.check_lent_of_gone(node, sock);
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
            Wire::Arrive { stream, end, number, what } => {
                if self.net.knows(stream) {
                    let has_power = self.nodes[end].has_power;
                    self.net.arrive(self.now, stream, end, (number, what), has_power);
                }
            }
            Wire::Accepted { stream, end } => {
                if self.net.knows(stream)
                    && let Some((sock, upto)) = self.net.take_accepted(stream, end)
                    && self.nodes[end].readers.contains_key(&sock)
                {
                    self.check_lent(end, sock, upto);
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

    /// The last lines of the trace and the state of everything, in words.
    #[must_use]
    pub fn report(&self) -> String {
        let mut out = String::new();
        for line in self.trace.lines() {
            out.push_str(line);
            out.push('\n');
        }
        out.push_str(&self.states());
        out
    }

    /// The state of everything, in words.
    #[must_use]
    pub fn states(&self) -> String {
        let now = self.now.0 / 1_000_000;
        let mut out = format!("seed {} at {now} ms, after {} steps\n", self.seed, self.steps);
        for (n, node) in self.nodes.iter().enumerate() {
            let name = ["A", "B"][n];
            out.push_str(&format!("node {name}: power {}, ", node.has_power));
            let words = node.resource.as_ref().map_or_else(
                || String::from("no process"),
                |resource| {
                    let now = self.local(n);
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
