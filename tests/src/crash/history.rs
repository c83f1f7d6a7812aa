//! How a history is written: two nodes in sync, commands, writes, an explorer that looks on.

use replication_core::control::{Command, Reply};
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk};

use super::explore::{Counts, Explorer, Part};
use super::medium::Image;
use super::pair::Pair;
use crate::sim::disk::Disk as SimDisk;
use crate::sim::node::Node as SimNode;
use crate::sim::rng::Rng;
use crate::sim::setup::{MIB, NodeSetup, Setup};

/// Steps within which whatever a history waits for happens.
const STEPS: usize = 400_000;
/// Sectors of an activity-log extent.
const EXTENT: u64 = 8192;

/// A history under way.
#[derive(Debug)]
pub struct History {
    /// The nodes.
    pub pair: Pair,
    /// Who looks on, from [`History::watch`] on.
    pub explorer: Option<Explorer>,
    seed: u64,
}

/// The options of the histories: few slots in the log, so that it wraps at once; a fast resync.
#[must_use]
pub fn setup(data_sectors: u64) -> Setup {
    Setup::with(|s| {
        s.size(data_sectors);
        s.disk(|disk| {
            disk.al_extents = 3;
            disk.rate.resync_rate_kib = 100_000;
            disk.rate.plan_ahead = 0;
            disk.rate.min_rate_kib = 0;
        });
        s.net(|net| net.max_epoch_size = 8);
    })
}

/// Sectors of a device with so many activity-log extents.
#[must_use]
pub const fn extents(count: u64) -> u64 {
    count * EXTENT + MIB
}

/// The disks of a node with fresh metadata.
#[must_use]
pub fn fresh(setup: &NodeSetup) -> Image {
    let node = SimNode::new(setup.clone(), Rng::new(1));
    let mut image = Image::new();
    let mut add = |device, disk: &SimDisk| {
        for page in disk.used_pages() {
            for sector in page * 8..(page * 8 + 8).min(disk.sectors()) {
                let mut bytes = [0; super::medium::SECTOR];
                bytes.copy_from_slice(disk.sector(sector));
                image.insert((device, sector), bytes.into());
            }
        }
    };
    add(super::medium::Device::Data, &node.backing[0].data);
    if let Some(meta) = &node.backing[0].meta {
        add(super::medium::Device::Meta, meta);
    }
    image
}

impl History {
    /// Two nodes with fresh disks that are not started.
    #[must_use]
    pub fn new(seed: u64, setup: &Setup) -> Self {
        let nodes = setup.nodes.iter().map(|node| (node.clone(), fresh(node)));
        Self { pair: Pair::new(seed, nodes.collect()), explorer: None, seed }
    }

    /// Two nodes in sync, the first one Primary, nobody looking on yet.
    #[must_use]
    pub fn synced(seed: u64, setup: &Setup) -> Self {
        let mut history = Self::new(seed, setup);
        for n in [0, 1] {
            history.must(n, Command::Up);
        }
        history.until("connected", |pair| pair.nodes[0].state().conn == Conn::Connected);
        history.must(0, Command::NewCurrentUuid { volume: None, clear_bitmap: true });
        history.wait_synced();
        history.must(0, Command::Primary { force: false });
        history.settle();
        history
    }

    /// From here on every step is looked at.
    pub fn watch(&mut self, watched: &[(usize, Part)]) {
        self.explorer = Some(Explorer::new(self.seed, watched.to_vec()));
    }

    /// From here on the nodes have other parts.
    ///
    /// # Panics
    /// If nobody looks on.
    pub fn parts(&mut self, watched: &[(usize, Part)]) {
        self.explorer.as_mut().expect("somebody looks on").watched = watched.to_vec();
    }

    /// The data device of a node grows.
    pub fn grow(&mut self, n: usize, sectors: u64) {
        let old = std::mem::replace(&mut self.pair.nodes[n].data_sectors, sectors);
        if let Some(explorer) = &mut self.explorer {
            explorer.grown_from = Some(old);
        }
    }

    /// One step; false if there is none.
    pub fn step(&mut self, timers: bool) -> bool {
        let went_on = self.pair.step(timers);
        self.look();
        went_on
    }

    fn look(&mut self) {
        assert!(self.pair.garbage == 0, "the two understand each other");
        if let Some(explorer) = &mut self.explorer {
            explorer.look(&self.pair);
        }
    }

    /// Runs until nothing is under way.
    pub fn settle(&mut self) {
        while self.step(false) {}
    }

    /// Runs so many steps.
    pub fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step(true);
        }
    }

    /// Runs until the condition holds, with timers.
    ///
    /// # Panics
    /// If it does not.
    pub fn until(&mut self, what: &str, mut cond: impl FnMut(&Pair) -> bool) {
        for _ in 0..STEPS {
            if cond(&self.pair) {
                return;
            }
            self.step(true);
        }
        let states: Vec<String> =
            self.pair.nodes.iter().map(|node| node.state().to_string()).collect();
        let last: Vec<_> = self.pair.trace.iter().rev().take(60).rev().cloned().collect();
        panic!("{}\n{states:?}: {what} never came", last.join("\n"));
    }

    /// Runs until both nodes are connected and up to date, and nothing is under way.
    pub fn wait_synced(&mut self) {
        self.until("in sync", |pair| {
            pair.nodes.iter().all(|node| {
                let state = node.state();
                let is_good = state.disk == Disk::UpToDate && state.pdsk == Disk::UpToDate;
                is_good && state.conn == Conn::Connected
            })
        });
        self.settle();
    }

    /// Gives a command that has to be carried out.
    ///
    /// # Panics
    /// If it is refused.
    pub fn must(&mut self, n: usize, command: Command) {
        let words = format!("{command:?}");
        if let Err(refusal) = self.ask(n, command) {
            panic!("{words} on node {n} is refused: {refusal:?}");
        }
    }

    /// Gives a command and waits for the answer.
    ///
    /// # Errors
    /// The refusal.
    pub fn ask(
        &mut self,
        n: usize,
        command: Command,
    ) -> Result<Reply, replication_core::control::Refusal> {
        let words = format!("answer to {command:?}");
        let id = self.pair.tell(n, command);
        self.look();
        let mut answer = None;
        for _ in 0..STEPS {
            answer = self.pair.reply(n, id);
            if answer.is_some() {
                break;
            }
            self.step(true);
        }
        answer.unwrap_or_else(|| panic!("{words} never came: {:#?}", self.pair.trace))
    }

    /// A write of the host that is under way afterwards, as soon as a slot is free.
    pub fn write(&mut self, n: usize, start: u64, sectors: u64, fua: bool) {
        self.free_slot(n);
        self.pair.host(n, HostOp::Write { fua }, start, sectors);
        self.look();
    }

    /// A write that is answered afterwards.
    pub fn write_and_wait(&mut self, n: usize, start: u64, sectors: u64) {
        self.write(n, start, sectors, false);
        self.settle();
    }

    /// A flush that is answered afterwards.
    pub fn flush(&mut self, n: usize) {
        self.free_slot(n);
        let number = self.pair.host(n, HostOp::Flush, 0, 0);
        self.look();
        self.until("flush", |pair| {
            !pair.nodes[n].asked.iter().flatten().any(|asked| asked.number == number)
        });
    }

    fn free_slot(&mut self, n: usize) {
        self.until("a free slot", |pair| pair.nodes[n].asked.iter().any(Option::is_none));
    }

    /// Breaks the connection, or lets it come about again.
    pub fn link(&mut self, up: bool) {
        if up {
            self.pair.link_up = true;
        } else {
            self.pair.cut();
        }
        self.look();
    }

    /// What was tried, as a line for the test's output.
    ///
    /// # Panics
    /// If nobody looked on.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.explorer.as_ref().expect("somebody looked on").counts
    }
}
