//! Seeded runs: a phase of faults, then healing, after which both nodes have to agree.
//!
//! Everything is drawn from the seed ([`plan()`]): sizes, options, which kinds of faults there are,
//! what happens when. In the first phase (`act`) nodes are killed and lose power, the link is cut
//! and reset, disks fail, and an operator types commands, none of them with force over data. The
//! operator is a careful one: a node is promoted only if it has every acknowledged write, as a
//! cluster manager with fencing would see to. With [`Kind::Careless`] he is not: then contents are
//! held only to have been written once, and what has to be true is that nobody merges two histories
//! in silence (GI-6). In the second phase (`heal`) everything is repaired; both nodes must become
//! equal within bounded time and hold what was acknowledged (RS-1, LV-1, DUR-5).

mod act;
mod heal;
mod operate;
mod plan;
mod silent;
mod strangers;

use replication_core::state::{OnNoData, Role};
use replication_core::units::{Span, Time};
use replication_core::wire::ReplicationProtocol;

use crate::sim::coverage::{Coverage, Family};
use crate::sim::rng::{Rng, mix};
use crate::sim::{A, B, World};
pub use plan::{Case, Kind, Kinds, Plan, Theme, plan};

/// The longest that a request may wait in the first phase while nothing holds it back (WP-6).
const PATIENCE: Span = Span::from_secs(90);

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The hash of its trace.
    pub hash: u64,
    /// Things that happened.
    pub steps: u64,
    /// Requests that were answered with success.
    pub requests: u64,
    /// Virtual time in milliseconds.
    pub time_ms: u64,
    /// Rounds of the first phase.
    pub rounds: u32,
    /// What it was about.
    pub theme: Theme,
    /// Kinds that it had.
    pub kinds: Kinds,
    /// What it met.
    pub coverage: Coverage,
}

/// Every kind of fault, for the table of what happened.
#[must_use]
pub fn fault_names() -> Vec<String> {
    Kind::ALL.iter().map(|kind| String::from(kind.name())).collect()
}

/// Runs a case.
///
/// # Panics
/// If something is wrong: the report goes to the standard error.
pub fn run(case: &Case) -> Outcome {
    let plan = plan(case);
    let careless = plan.kinds.has(Kind::Careless);
    let size = plan.setup.nodes[0].devices[0].data;
    let mut world = World::new(case.seed, plan.setup.clone());
    world.ledger.keep_unsettled(plan.protocol != ReplicationProtocol::C);
    if careless {
        world.ledger.be_lenient();
    }
    for (node, clock) in world.nodes.iter_mut().zip(plan.clocks) {
        node.clock = clock;
        if plan.theme == Theme::LyingDisk {
            node.backing.iter_mut().for_each(|backing| backing.data.lie());
        }
    }
    let rng = Rng::new(case.seed);
    let mut run = Run {
        w: world,
        rng,
        plan,
        size,
        has_grown: false,
        has_begun: false,
        promoting: None,
        heard: [0; 2],
        held_at: [Time::ZERO; 2],
    };
    run.w.start_synced();
    if run.plan.kinds.has(Kind::Uneven) {
        run.count(Kind::Uneven);
    }
    let all: Vec<u32> = (0..run.plan.rounds).collect();
    for round in case.rounds.as_ref().unwrap_or(&all) {
        // Each round has a stream of its own, so that it does the same if others are left out.
        run.rng = Rng::new(mix(case.seed).wrapping_add(u64::from(*round)));
        run.w.note(A, &format!("=== round {round}"));
        run.round();
        run.check_patience();
        run.w.check_quiet();
    }
    run.rng = Rng::new(mix(!case.seed));
    run.heal();
    run.outcome()
}

/// A promotion that the operator has asked for.
#[derive(Clone, Copy, Debug)]
struct Promotion {
    node: usize,
    /// Of the process that was asked.
    incarnation: u32,
    command: u64,
}

struct Run {
    w: World,
    rng: Rng,
    plan: Plan,
    size: u64,
    has_grown: bool,
    /// The operator has begun a generation since both nodes were in sync.
    has_begun: bool,
    /// The last promotion that the operator has asked for.
    promoting: Option<Promotion>,
    /// Lines of each node's log that the operator has read.
    heard: [usize; 2],
    /// When something last held back requests of a node.
    held_at: [Time; 2],
}

impl Run {
    fn outcome(self) -> Outcome {
        Outcome {
            hash: self.w.trace.hash(),
            steps: self.w.steps,
            requests: [A, B].iter().map(|n| self.w.nodes[*n].host.successes).sum(),
            time_ms: self.w.now.0 / 1_000_000,
            rounds: self.plan.rounds,
            theme: self.plan.theme,
            kinds: self.plan.kinds,
            coverage: self.w.coverage.clone(),
        }
    }

    fn any_node(&mut self) -> usize {
        usize::from(self.rng.chance(50))
    }

    fn any_volume(&mut self) -> usize {
        usize::try_from(self.rng.below(self.w.volumes() as u64)).expect("few volumes")
    }

    /// Whether the node takes commands.
    fn is_ready(&self, n: usize) -> bool {
        self.w.is_alive(n) && self.w.nodes[n].frozen_until.is_none()
    }

    fn is_primary(&self, n: usize) -> bool {
        self.w.is_alive(n) && self.w.state(n, 0).role == Role::Primary
    }

    fn primary(&self) -> Option<usize> {
        [A, B].into_iter().find(|n| self.is_primary(*n))
    }

    fn is_careless(&self) -> bool {
        self.plan.kinds.has(Kind::Careless)
    }

    /// Counts a fault that really happened.
    fn count(&mut self, kind: Kind) {
        self.w.coverage.add(Family::Fault, kind.name());
    }

    /// WP-6, LV-1: a request that nothing holds back is answered in time.
    fn check_patience(&mut self) {
        for n in [A, B] {
            if !self.is_ready(n) {
                continue;
            }
            let node = &self.w.nodes[n];
            // What the core was told last may be older than the configuration.
            let is_frozen = (0..self.w.volumes()).any(|volume| self.w.state(n, volume).susp_nod);
            let is_held = node.stuck() > 0
                || node.slowness > 1
                || is_frozen
                || node.setup.config.on_no_data == OnNoData::SuspendIo;
            if is_held {
                self.held_at[n] = self.w.now;
            }
            // What was held back until now has its time from now on.
            let oldest = node.host.oldest(self.w.now).min(self.w.now.since(self.held_at[n]));
            assert!(
                oldest < PATIENCE,
                "WP-6: node {n} has not answered a request for {} ms: {:?}",
                oldest.as_ms(),
                node.host.words(self.w.now)
            );
        }
        self.w.coverage.add(Family::Check, "WP-6");
    }
}
