//! Rounds: faults under load, then healing, then the truth.
//!
//! In every round the Primary's host gets its answers, all of them right and within bounds; both
//! engines live on and answer their operators; and what they hold in memory and descriptors stays
//! where it was. What else is asked for depends on what was done:
//!
//! | round | after the faults |
//! |---|---|
//! | breaks, delays, flips that are noticed, all of these | in sync by themselves, disks equal |
//! | strangers without the secret | the same; a node that was made to stand alone is connected |
//! | flips anywhere, false peers | the Primary's data is right; the peer gets a new, full copy |
//! | control | one flipped bit of payload, and the comparison of the disks must find it |
//!
//! The roles change after each round.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replication_core::control::Status;

use super::host::{Ledger, Load};
use super::node::{Footprint, Node, differences, wait_until};
use super::plan::Kind;
use super::relay::{Relay, Side};
use super::stranger::{Mask, Place, Score, Stranger};
use crate::sim::rng::Rng;

/// The secret of the pair, as `tests/native/wire.sh` configures it.
const SECRET: &str = "between us";
/// The port of both nodes.
const PORT: u16 = 7789;
/// How long faults last in a round.
const FAULTS: Duration = Duration::from_secs(4);
/// Longest time to come together again. Far above what it takes.
const HEALING: Duration = Duration::from_secs(60);
/// What an engine may hold more than at the beginning: buffers of the allocator, of sockets and of
/// the log. What a peer can make it hold is bounded by tables that are there from the start.
const MORE_KIB: u64 = 24 << 10;
/// Sockets that strangers may occupy for a moment.
const MORE_DESCRIPTORS: usize = 24;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Order {
    /// The directory of the lab.
    pub lab: PathBuf,
    /// What everything follows from.
    pub seed: u64,
    /// Rounds begin until this time has passed; each kind comes at least once.
    pub time: Duration,
    /// Only rounds of these kinds.
    pub only: Vec<Round>,
}

/// A kind of round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Round {
    /// One bit of payload flips: the comparison has to notice.
    Control,
    /// Resets and half closes.
    Breaks,
    /// Trickles, short and long stalls.
    Delays,
    /// Flips that are noticed.
    Flips,
    /// All of these.
    Mixed,
    /// Flips of any bit.
    AnyFlips,
    /// Flips of payload, and equal disks are asked for all the same: a test of the test, which has
    /// to fail.
    Unprotected,
    /// Somebody without the secret, at either node.
    Strangers,
    /// A mad peer of the Primary.
    FalseSecondary,
    /// A mad peer of the Secondary.
    FalsePrimary,
}

impl Round {
    /// What a run consists of; [`Round::Unprotected`] has to be asked for.
    pub const ALL: [Self; 9] = [
        Self::Control,
        Self::Breaks,
        Self::Delays,
        Self::Flips,
        Self::Mixed,
        Self::AnyFlips,
        Self::Strangers,
        Self::FalseSecondary,
        Self::FalsePrimary,
    ];

    const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Breaks => &[Kind::Reset, Kind::HalfClose],
            Self::Delays => &[Kind::Pause, Kind::Trickle, Kind::Stall],
            Self::Flips => &[Kind::FlipChecked],
            Self::Mixed => &[
                Kind::Reset,
                Kind::HalfClose,
                Kind::Trickle,
                Kind::Pause,
                Kind::Stall,
                Kind::FlipChecked,
            ],
            Self::AnyFlips => &[Kind::FlipAny],
            Self::Control
            | Self::Unprotected
            | Self::Strangers
            | Self::FalseSecondary
            | Self::FalsePrimary => &[],
        }
    }
}

/// Two engines, what is between them, and what they must hold.
#[derive(Debug)]
struct Bed {
    nodes: [Node; 2],
    relay: Arc<Relay>,
    primary: usize,
    rng: Rng,
    ledger: Option<Ledger>,
    /// Bytes of the device.
    size: u64,
    pids: [u32; 2],
    footprints: [Footprint; 2],
    /// How often an operator had to connect a node that stood alone.
    connected: u64,
    score: Score,
}

/// Carries out an order.
///
/// # Errors
/// What was found, with what had happened before.
pub fn run(order: &Order) -> Result<()> {
    let mut bed = Bed::begin(order)?;
    let begun = Instant::now();
    let rounds = if order.only.is_empty() { &Round::ALL[..] } else { &order.only };
    let mut number = 0;
    while number < rounds.len() || begun.elapsed() < order.time {
        let round = rounds[number % rounds.len()];
        number += 1;
        let started = Instant::now();
        bed.relay.say(&format!("-- round {number}: {round:?}"));
        if let Err(error) = bed.round(round) {
            for line in bed.relay.journal() {
                eprintln!("   | {line}");
            }
            let seed = order.seed;
            return Err(error.context(format!("seed {seed}, round {number} ({round:?})")));
        }
        println(&format!("round {number}: {round:?}, {:.1} s", started.elapsed().as_secs_f64()));
    }
    bed.end(order.only.is_empty())
}

#[allow(clippy::print_stdout, reason = "how far it is")]
fn println(text: &str) {
    println!("   {text}");
}

fn side(node: usize) -> Side {
    let (name, own, other) = [("alice", 2, 1), ("bob", 1, 2)][node];
    Side {
        space: PathBuf::from(format!("/run/netns/near-{name}")),
        own: ([10, 0, 0, own], PORT).into(),
        node: ([10, 0, 0, other], PORT).into(),
    }
}

impl Bed {
    /// Fresh metadata, engines, the first synchronisation.
    fn begin(order: &Order) -> Result<Self> {
        let nodes = [Node::of_lab(&order.lab, "alice")?, Node::of_lab(&order.lab, "bob")?];
        let relay = Relay::start([side(0), side(1)], order.seed)?;
        for node in &nodes {
            node.drbdctl(&["create-md", "--force", "r0"])?;
            node.drbdctl(&["up", "r0"])?;
        }
        nodes[0].drbdctl(&["primary", "--force", "r0"])?;
        let nothing = Footprint { kib: 0, descriptors: 0 };
        let mut bed = Self {
            pids: [nodes[0].pid()?, nodes[1].pid()?],
            nodes,
            relay,
            primary: 0,
            rng: Rng::new(order.seed),
            ledger: None,
            size: 0,
            footprints: [nothing; 2],
            connected: 0,
            score: Score::default(),
        };
        bed.come_together(true)?;
        bed.size = bed.nodes[0].status()?.volumes[0].size_kib << 10;
        bed.ledger = Some(Ledger::new(order.seed, bed.size));
        // Whatever an engine allocates when it is used for the first time belongs to it.
        let load = bed.load()?;
        wait_until("the load runs", HEALING, || Ok(load.requests() > 1000 || load.has_failed()))?;
        bed.ledger = Some(load.stop()?);
        bed.hand_over()?;
        bed.footprints = [bed.nodes[0].footprint()?, bed.nodes[1].footprint()?];
        Ok(bed)
    }

    /// Ends both engines in order, and sees whether there was enough of everything.
    fn end(&self, is_complete: bool) -> Result<()> {
        for node in &self.nodes {
            node.drbdctl(&["down", "r0"])?;
        }
        let tally = self.relay.tally();
        println(&format!("{} connections, faults: {tally:?}", self.relay.connections()));
        println(&format!("strangers: {:?}, connected by hand {}", self.score, self.connected));
        if !is_complete {
            return Ok(());
        }
        let is_whole = tally.iter().all(|(_, times)| *times > 0);
        ensure!(is_whole, "a kind of fault never happened: nothing was shown about it");
        ensure!(self.score.accepted > 0 && self.score.packets > 0, "no false peer was accepted");
        Ok(())
    }

    fn round(&mut self, round: Round) -> Result<()> {
        match round {
            Round::Control => return self.control(),
            Round::Breaks | Round::Delays | Round::Flips | Round::Mixed => {
                let (load, result) = self.faults(round.kinds())?;
                self.heal(load, result, false)?;
            }
            Round::Unprotected => {
                // Some of these blocks are written again; the others stay wrong.
                self.relay.flip_payload(50);
                let (load, result) = self.faults(round.kinds())?;
                self.heal(load, result, false)?;
            }
            Round::AnyFlips => {
                let (load, result) = self.faults(round.kinds())?;
                // What a flip has done to the state of a connection ends with the connection.
                self.relay.cut();
                self.survive(load, result, 1 - self.primary)?;
            }
            Round::Strangers => {
                let load = self.load()?;
                let result = self
                    .annoy(self.primary, Mask::Nobody, &load)
                    .and_then(|()| self.annoy(1 - self.primary, Mask::Nobody, &load));
                self.heal(load, result, true)?;
            }
            Round::FalseSecondary => {
                let load = self.load()?;
                let result = self.annoy(self.primary, Mask::Secondary, &load);
                self.survive(load, result, 1 - self.primary)?;
            }
            Round::FalsePrimary => {
                let load = self.load()?;
                let result = self.annoy(1 - self.primary, Mask::Primary, &load);
                self.survive(load, result, 1 - self.primary)?;
            }
        }
        self.hand_over()
    }

    fn load(&mut self) -> Result<Load> {
        let ledger = self.ledger.take().context("the ledger was lost in an earlier round")?;
        ledger.load(&self.nodes[self.primary].server())
    }

    /// Load and faults for a while, and until each kind has come once. What was found meanwhile
    /// comes with the load, whose clients may know more about it.
    fn faults(&mut self, kinds: &[Kind]) -> Result<(Load, Result<()>)> {
        let load = self.load()?;
        let before = self.relay.tally();
        self.relay.disturb(kinds);
        let begun = Instant::now();
        let result = wait_until("each kind of fault", FAULTS * 10, || {
            self.look(&load)?;
            let mut counts = self.relay.tally().into_iter().zip(&before);
            let is_complete =
                counts.all(|((kind, now), (_, then))| now > *then || !kinds.contains(&kind));
            Ok(begun.elapsed() >= FAULTS && is_complete)
        });
        self.relay.disturb(&[]);
        self.relay.say("no more faults");
        Ok((load, result))
    }

    /// What must hold at any time.
    fn look(&self, load: &Load) -> Result<()> {
        for (at, node) in self.nodes.iter().enumerate() {
            let status = node.status()?;
            let role = if at == self.primary { "Primary" } else { "Secondary" };
            ensure!(status.role == role, "{} is {}, not {role}", node.name, status.role);
            let pid = node.pid()?;
            ensure!(pid == self.pids[at], "the engine of {} was replaced", node.name);
            let (now, then) = (node.footprint()?, self.footprints[at]);
            let is_small = now.kib <= then.kib + MORE_KIB
                && now.descriptors <= then.descriptors + MORE_DESCRIPTORS;
            ensure!(is_small, "{} has grown from {then:?} to {now:?}", node.name);
        }
        let disk = &self.nodes[self.primary].status()?.volumes[0].disk;
        ensure!(disk == "UpToDate", "the disk of the Primary is {disk}");
        ensure!(!load.has_failed(), "a client of the Primary has ended");
        Ok(())
    }

    /// Waits until both are in sync; an operator may connect who stands alone.
    fn come_together(&mut self, with_operator: bool) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut in_sync = 0;
            for node in &self.nodes {
                if with_operator && node.status()?.connection == "StandAlone" {
                    self.relay.say(&format!("the operator connects {}", node.name));
                    node.drbdctl(&["connect", "r0"])?;
                    self.connected += 1;
                }
                in_sync += u64::from(node.is_in_sync()?);
            }
            if in_sync == 2 {
                return Ok(());
            }
            if begun.elapsed() > HEALING {
                let states = [self.nodes[0].status()?, self.nodes[1].status()?];
                bail!("not in sync within {HEALING:?}: {}", summary(&states));
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// The faults are over: in sync under load, and then equal, and right.
    fn heal(&mut self, load: Load, faults: Result<()>, with_operator: bool) -> Result<()> {
        let result = faults
            .and_then(|()| self.come_together(with_operator))
            .and_then(|()| self.go_on(&load));
        self.ledger = Some(stopped(load, result)?);
        self.come_together(false)?;
        self.drain()?;
        self.check_ledger()?;
        let (count, first) = differences(&self.nodes, self.size)?;
        ensure!(count == 0, "the disks differ in {count} bytes, the first at {first:?}");
        Ok(())
    }

    /// The Primary's data is right whatever happened; the other node starts from nothing.
    fn survive(&mut self, load: Load, faults: Result<()>, other: usize) -> Result<()> {
        self.relay.open();
        let result = faults.and_then(|()| self.go_on(&load));
        self.ledger = Some(stopped(load, result)?);
        self.check_ledger()?;
        self.renew(other)?;
        self.drain()?;
        self.check_ledger()?;
        let (count, first) = differences(&self.nodes, self.size)?;
        ensure!(count == 0, "a new copy differs in {count} bytes, the first at {first:?}");
        Ok(())
    }

    /// The host's requests are served.
    fn go_on(&self, load: &Load) -> Result<()> {
        let before = load.requests();
        wait_until("requests are served", HEALING, || {
            self.look(load)?;
            Ok(load.requests() >= before + 100)
        })
    }

    /// Nothing is under way any more.
    fn drain(&self) -> Result<()> {
        wait_until("everything is done", HEALING, || {
            let is_idle = |status: &Status| {
                let volume = &status.volumes[0];
                volume.out_of_sync_kib == 0
                    && volume.upper_pending + volume.pending + volume.unacked == 0
                    && volume.lower_pending == 0
            };
            Ok(is_idle(&self.nodes[0].status()?) && is_idle(&self.nodes[1].status()?))
        })
    }

    fn check_ledger(&self) -> Result<()> {
        let ledger = self.ledger.as_ref().context("no ledger")?;
        let primary = &self.nodes[self.primary];
        ledger.check(&primary.server()).with_context(|| format!("on {}", primary.name))
    }

    /// A node loses everything and gets a full copy.
    fn renew(&mut self, at: usize) -> Result<()> {
        let node = &self.nodes[at];
        self.relay.say(&format!("{} starts from nothing", node.name));
        node.drbdctl(&["down", "r0"])?;
        node.drbdctl(&["create-md", "--force", "r0"])?;
        node.drbdctl(&["up", "r0"])?;
        self.pids[at] = node.pid()?;
        self.come_together(true)
    }

    fn hand_over(&mut self) -> Result<()> {
        let (old, new) = (self.primary, 1 - self.primary);
        wait_until("the last client is gone", HEALING, || {
            Ok(!self.nodes[old].status()?.volumes[0].open)
        })?;
        self.nodes[old].drbdctl(&["secondary", "r0"])?;
        self.nodes[new].drbdctl(&["primary", "r0"])?;
        self.primary = new;
        self.check_ledger().context("after the roles have changed")
    }

    /// A change that nothing but the comparison can see: it must see it.
    fn control(&mut self) -> Result<()> {
        let server = self.nodes[self.primary].server();
        self.relay.flip_payload(1);
        self.ledger.as_mut().context("no ledger")?.write_once(&server)?;
        self.drain()?;
        let (count, first) = differences(&self.nodes, self.size)?;
        ensure!(count == 1, "one flipped bit makes {count} different bytes: the test is blind");
        self.relay.say(&format!("the comparison has found the flipped bit, in byte {first:?}"));
        self.renew(1 - self.primary)?;
        let (count, _) = differences(&self.nodes, self.size)?;
        ensure!(count == 0, "a new copy differs in {count} bytes");
        self.check_ledger()
    }

    /// Somebody takes the place of the peer of a node for a while.
    fn annoy(&mut self, at: usize, mask: Mask, load: &Load) -> Result<()> {
        let incoming = self.relay.give(at);
        let Side { space, node: target, .. } = self.relay.side(at).clone();
        let place = Place { space, target, secret: SECRET };
        let relay = Arc::clone(&self.relay);
        let stranger = Stranger::new(place, mask, self.rng.next(), incoming, &relay);
        let stop = AtomicBool::new(false);
        let (score, result) = std::thread::scope(|scope| {
            let thread = scope.spawn(|| stranger.annoy(&stop));
            let begun = Instant::now();
            let result = wait_until("the stranger", FAULTS * 10, || {
                self.look(load)?;
                let node = &self.nodes[at];
                if node.status()?.connection == "StandAlone" {
                    node.drbdctl(&["connect", "r0"])?;
                    self.connected += 1;
                }
                Ok(begun.elapsed() >= FAULTS)
            });
            stop.store(true, Ordering::SeqCst);
            (thread.join(), result)
        });
        let score = score.ok().context("the stranger panicked")??;
        self.relay.say(&format!("{mask:?} at {}: {score:?}", self.nodes[at].name));
        self.score.attempts += score.attempts;
        self.score.accepted += score.accepted;
        self.score.packets += score.packets;
        self.relay.close();
        self.relay.open();
        result
    }
}

/// What a client has found comes first: it says more than that the clients have ended.
fn stopped(load: Load, result: Result<()>) -> Result<Ledger> {
    let ledger = load.stop()?;
    result?;
    Ok(ledger)
}

fn summary(states: &[Status; 2]) -> String {
    let one = |status: &Status| {
        let volume = &status.volumes[0];
        format!(
            "{} is {} {} {}/{}, {} KiB out of sync",
            status.node,
            status.connection,
            volume.cstate,
            volume.disk,
            volume.peer_disk,
            volume.out_of_sync_kib
        )
    };
    states.iter().map(one).collect::<Vec<_>>().join("; ")
}
