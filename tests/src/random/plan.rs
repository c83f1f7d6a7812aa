//! What a seed stands for: sizes, options, theme, kinds of faults, and the number of rounds.
//!
//! Every kind is switched off in about half of the seeds, so that every combination occurs and
//! no fault hides behind another one. A [`Case`] can leave kinds and rounds out: so a long run is
//! shrunk to a short one.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};
use replication_core::config::{Authentication, OnIoError};
use replication_core::split_brain::{AfterSb0Pri, AfterSb1Pri};
use replication_core::state::OnNoData;
use replication_core::units::Span;
use replication_core::wire::{HmacAlg, ReplicationProtocol};

use crate::sim::rng::{Rng, mix};
use crate::sim::setup::{MIB, Setup};

/// What a run is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Theme {
    /// Everything.
    #[default]
    Mixed,
    /// Resyncs that are slow and often interrupted.
    Resync,
    /// More extents in use than the activity log holds, and crashes.
    Al,
    /// A careless operator, who lets both nodes write without the other.
    SplitBrain,
    /// Connections that come and go.
    Connect,
    /// Many commands at once.
    Admin,
    /// Disks that lie about flushes: nobody can stand that, and the checks have to find it. Shows
    /// that they work; not chosen by seeds.
    LyingDisk,
}

impl Theme {
    /// Every theme.
    pub const ALL: [Self; 7] = [
        Self::Mixed,
        Self::Resync,
        Self::Al,
        Self::SplitBrain,
        Self::Connect,
        Self::Admin,
        Self::LyingDisk,
    ];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Resync => "resync",
            Self::Al => "al",
            Self::SplitBrain => "split-brain",
            Self::Connect => "connect",
            Self::Admin => "admin",
            Self::LyingDisk => "lying-disk",
        }
    }

    /// Kinds that a run of this theme has always, kinds that it never has, and kinds that come
    /// up more often than others.
    const fn kinds(self) -> (&'static [Kind], &'static [Kind], &'static [Kind]) {
        use Kind as K;
        match self {
            Self::Mixed => (&[], &[K::Careless], &[]),
            Self::LyingDisk => (&[K::PowerCut], &[K::Careless], &[K::PowerCut]),
            Self::Resync => (
                &[K::Cut, K::Invalidate],
                &[K::Careless],
                &[K::Cut, K::Invalidate, K::Pause, K::Reset],
            ),
            Self::Al => (
                &[K::Kill, K::PowerCut],
                &[K::Careless],
                &[K::Kill, K::PowerCut, K::RestartOptions],
            ),
            Self::SplitBrain => (&[K::Careless, K::Cut], &[], &[K::Careless, K::Cut, K::Kill]),
            Self::Connect => (
                &[K::Reset, K::Cut, K::Operator],
                &[K::Careless],
                &[
                    K::Reset,
                    K::HalfClose,
                    K::BitFlip,
                    K::OneWay,
                    K::Reconnect,
                    K::Trickle,
                    K::Stranger,
                    K::Flip,
                ],
            ),
            Self::Admin => {
                (&[K::Operator, K::Storm], &[K::Careless], &[K::Operator, K::Storm, K::Adjust])
            }
        }
    }
}

impl FromStr for Theme {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        if name == "dual-primary" {
            bail!(
                "there is no theme dual-primary: the engine refuses allow-two-primaries, so two \
                 connected Primaries cannot come about (ST-1 is checked at every event instead)"
            );
        }
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|theme| theme.name() == name);
        found.with_context(|| format!("there is no theme {name}; there are {}", names()))
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal, $weight:literal;)*) => {
        /// A kind of fault, or something else that happens to a run.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            /// Its name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }

            /// How often it comes up, compared with the others.
            pub(super) const fn weight(self) -> u64 {
                match self { $(Self::$kind => $weight,)* }
            }

            const fn bit(self) -> u64 {
                1 << self as u32
            }
        }
    };
}

kinds! {
    /// A process is killed.
    Kill = "kill", 6;
    /// A node loses power.
    PowerCut = "power-cut", 4;
    /// The link is cut in both directions, silently.
    Cut = "cut", 6;
    /// Nothing gets through in one direction.
    OneWay = "one-way", 3;
    /// Every stream is reset.
    Reset = "reset", 3;
    /// One direction of a stream ends.
    HalfClose = "half-close", 2;
    /// Bytes trickle.
    Trickle = "trickle", 2;
    /// A header arrives damaged.
    BitFlip = "bit-flip", 2;
    /// A process is stopped and goes on.
    Freeze = "freeze", 3;
    /// A clock jumps ahead.
    ClockJump = "clock-jump", 2;
    /// A disk operation fails.
    DiskError = "disk-error", 3;
    /// A disk fails from now on.
    DiskDead = "disk-dead", 2;
    /// A disk operation does not end.
    DiskStuck = "disk-stuck", 2;
    /// A disk is slow.
    DiskSlow = "disk-slow", 3;
    /// The backing store is full.
    NoSpace = "no-space", 1;
    /// A metadata write lands on the superblock, and the process dies.
    Misdirect = "misdirect", 1;
    /// The operator types a command.
    Operator = "operator", 8;
    /// The operator types several commands at once.
    Storm = "storm", 3;
    /// Both nodes are told to connect and disconnect at once.
    Reconnect = "reconnect", 3;
    /// Resync is paused, or goes on.
    Pause = "pause", 2;
    /// Options are changed.
    Adjust = "adjust", 2;
    /// A dead node starts with other options.
    RestartOptions = "restart-options", 2;
    /// A host tries to use the Secondary.
    SecondaryHost = "secondary-host", 2;
    /// The devices grow.
    Grow = "grow", 2;
    /// The operator throws away the data of one node.
    Invalidate = "invalidate", 2;
    /// The operator promotes a node that may lack data.
    Careless = "careless", 4;
    /// Somebody who is not the peer connects.
    Stranger = "stranger", 3;
    /// A bit turns over on the wire, where a check covers it.
    Flip = "flip", 2;
    /// A write of the activity log lands on another block of it.
    MisdirectLog = "misdirect-log", 2;
    /// A write of data on the Secondary lands elsewhere, and nobody is told.
    MisdirectData = "misdirect-data", 1;
    /// A bit of data on the Secondary turns over, and nobody is told.
    Rot = "rot", 1;
    /// The disks of the two nodes are of different sizes, and grow by different amounts.
    Uneven = "uneven", 0;
}

impl Kind {
    /// Kinds that came later. They have chance of their own, so that a seed without them is the
    /// run that it was before.
    pub const LATER: [Self; 6] = [
        Self::Stranger,
        Self::Flip,
        Self::MisdirectLog,
        Self::MisdirectData,
        Self::Rot,
        Self::Uneven,
    ];
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds(u64);

impl Kinds {
    /// Whether the kind is in it.
    #[must_use]
    pub const fn has(self, kind: Kind) -> bool {
        self.0 & kind.bit() != 0
    }

    /// Adds a kind.
    pub const fn insert(&mut self, kind: Kind) {
        self.0 |= kind.bit();
    }

    const fn remove(&mut self, kind: Kind) {
        self.0 &= !kind.bit();
    }

    /// The kinds in it.
    pub fn iter(self) -> impl Iterator<Item = Kind> {
        Kind::ALL.iter().copied().filter(move |kind| self.has(*kind))
    }
}

impl fmt::Display for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.iter().map(Kind::name).collect();
        f.write_str(&names.join(","))
    }
}

impl FromStr for Kinds {
    type Err = anyhow::Error;

    fn from_str(names: &str) -> anyhow::Result<Self> {
        let mut kinds = Self::default();
        for name in names.split(',').filter(|name| !name.is_empty()) {
            let found = Kind::ALL.iter().find(|kind| kind.name() == name);
            kinds.insert(*found.with_context(|| format!("there is no kind {name}"))?);
        }
        Ok(kinds)
    }
}

/// A run, named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Case {
    /// Everything follows from it.
    pub seed: u64,
    /// What the run is about; `None`: the seed chooses.
    pub theme: Option<Theme>,
    /// Only these rounds, in this order; `None`: all.
    pub rounds: Option<Vec<u32>>,
    /// Without these kinds.
    pub without: Kinds,
}

impl Case {
    /// The run of a seed, with everything that belongs to it.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    fn rounds_words(&self) -> Option<String> {
        let rounds = self.rounds.as_ref()?;
        Some(rounds.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
    }

    /// A line that [`Case::from_str`] understands.
    #[must_use]
    pub fn words(&self) -> String {
        let theme = self.theme.map_or("-", Theme::name);
        let rounds = self.rounds_words().unwrap_or_else(|| String::from("-"));
        format!("{};{theme};{rounds};{}", self.seed, self.without)
    }

    /// The command that runs it.
    #[must_use]
    pub fn command(&self) -> String {
        let mut command = String::from("cargo run --release -p tests --bin simulate --");
        command.push_str(&format!(" --seeds 1 --from {}", self.seed));
        if let Some(theme) = self.theme {
            command.push_str(&format!(" --focus {}", theme.name()));
        }
        if let Some(rounds) = self.rounds_words() {
            command.push_str(&format!(" --rounds={rounds}"));
        }
        if self.without != Kinds::default() {
            command.push_str(&format!(" --without {}", self.without));
        }
        command
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(words: &str) -> anyhow::Result<Self> {
        let fields: Vec<&str> = words.split(';').collect();
        let [seed, theme, rounds, without] = fields[..] else { bail!("no case: {words}") };
        let theme = if theme == "-" { None } else { Some(theme.parse()?) };
        let rounds = match rounds {
            "-" => None,
            "" => Some(Vec::new()),
            rounds => Some(rounds.split(',').map(str::parse).collect::<Result<_, _>>()?),
        };
        Ok(Self { seed: seed.parse()?, theme, rounds, without: without.parse()? })
    }
}

/// What a case comes to.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the run is about.
    pub theme: Theme,
    /// Kinds that it has.
    pub kinds: Kinds,
    /// How many rounds it has if none is left out.
    pub rounds: u32,
    /// Options and sizes.
    pub setup: Setup,
    /// Clocks of the nodes at the begin.
    pub clocks: [Span; 2],
    /// The weakest protocol that may come into force.
    pub protocol: ReplicationProtocol,
}

impl Plan {
    /// How often a kind comes up in a run of this theme.
    #[must_use]
    pub fn weight(&self, kind: Kind) -> u64 {
        let (_, _, favoured) = self.theme.kinds();
        if favoured.contains(&kind) { 4 * kind.weight() } else { kind.weight() }
    }
}

/// What a case comes to.
#[must_use]
pub fn plan(case: &Case) -> Plan {
    let mut rng = Rng::new(case.seed ^ 0x5eed);
    let drawn = match rng.below(12) {
        0 | 1 => Theme::Resync,
        2 => Theme::Al,
        3 | 4 => Theme::SplitBrain,
        5 => Theme::Connect,
        6 => Theme::Admin,
        _ => Theme::Mixed,
    };
    let theme = case.theme.unwrap_or(drawn);
    let mut kinds = Kinds::default();
    let mut later = Rng::new(!mix(case.seed));
    for kind in Kind::ALL {
        let rng = if Kind::LATER.contains(kind) { &mut later } else { &mut rng };
        if rng.chance(50) {
            kinds.insert(*kind);
        }
    }
    let (always, never, _) = theme.kinds();
    always.iter().for_each(|kind| kinds.insert(*kind));
    never.iter().for_each(|kind| kinds.remove(*kind));
    let rounds = u32::try_from(rng.between(5, 30)).expect("small");
    let mut setup = draw_setup(&mut rng, theme);
    let clocks = [Span(rng.below(1 << 50)), Span(rng.below(1 << 50))];
    let adjusts = kinds.has(Kind::Adjust);
    let own = setup.nodes[0].config.net.protocol;
    let protocol = if adjusts { ReplicationProtocol::A } else { own };
    // Drawn as before, and then left out: the rest of the run stays as it was.
    case.without.iter().for_each(|kind| kinds.remove(kind));
    if kinds.has(Kind::Uneven) {
        let larger = usize::from(later.chance(50));
        for devices in &mut setup.nodes[larger].devices {
            devices.data += later.between(1, 4 * MIB);
        }
    }
    Plan { theme, kinds, rounds, setup, clocks, protocol }
}

fn draw_setup(rng: &mut Rng, theme: Theme) -> Setup {
    let mut setup = Setup::default();
    setup.size(rng.between(1, 12) * 4 * MIB);
    if rng.chance(30) {
        setup.external_meta(4096);
    }
    let many_volumes = if theme == Theme::Admin { 60 } else { 25 };
    if rng.chance(many_volumes) {
        setup.second_volume();
    }
    let protocol = match rng.below(10) {
        0 => ReplicationProtocol::A,
        1 | 2 => ReplicationProtocol::B,
        _ => ReplicationProtocol::C,
    };
    setup.protocol(protocol);
    let most_slots = if theme == Theme::Al { 3 } else { 8 };
    let al_extents = u16::try_from(rng.between(2, most_slots)).expect("small");
    setup.disk(|disk| disk.al_extents = al_extents);
    let slow_resync = if theme == Theme::Resync { 70 } else { 20 };
    if rng.chance(slow_resync) {
        let rate = u32::try_from(rng.between(500, 8_000)).expect("small");
        setup.disk(|disk| disk.rate.max_rate_kib = rate);
    }
    if rng.chance(10) {
        setup.disk(|disk| disk.al_updates = false);
    }
    let epoch = if rng.chance(50) { rng.between(1, 8) } else { 2048 };
    setup.net(|net| net.max_epoch_size = u32::try_from(epoch).expect("small"));
    if rng.chance(30) {
        setup.disk(|disk| disk.on_io_error = OnIoError::PassOn);
    }
    if rng.chance(20) {
        let secret = String::from("mellon");
        let auth = Authentication { alg: HmacAlg::Sha256, secret };
        setup.net(|net| net.auth = Some(auth.clone()));
    }
    let ko_count = u32::try_from(rng.between(1, 7)).expect("small");
    setup.net(|net| {
        net.timeout = Span::from_secs(1);
        net.ko_count = ko_count;
    });
    draw_policies(rng, &mut setup, theme);
    let suspends = rng.chance(20);
    for node in &mut setup.nodes {
        if suspends {
            node.config.on_no_data = OnNoData::SuspendIo;
        }
        node.config.net.use_rle = rng.chance(70);
        node.queue_depth = u16::try_from(rng.between(1, 8)).expect("small");
        node.pool_pages = 512 << rng.below(2);
        node.disk_time = (Span(20_000), Span(rng.between(50_000, 3_000_000)));
    }
    setup.speed.jitter = Span(rng.between(1_000, 2_000_000));
    setup.speed.window = 1 << rng.between(15, 19);
    setup
}

/// What the nodes do about a split brain by themselves.
fn draw_policies(rng: &mut Rng, setup: &mut Setup, theme: Theme) {
    let any = rng.below(AfterSb0Pri::ALL.len() as u64);
    let any = AfterSb0Pri::ALL[usize::try_from(any).expect("few")];
    let demotes = rng.chance(50);
    if theme != Theme::SplitBrain || !rng.chance(50) {
        return;
    }
    setup.net(|net| {
        net.after_sb_0pri = any;
        net.after_sb_1pri =
            if demotes { AfterSb1Pri::DiscardSecondary } else { AfterSb1Pri::Consensus };
    });
    setup.nodes[1].config.net.after_sb_0pri = any.mirrored();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written down for a replay is read back.
    #[test]
    fn a_case_is_read_back() {
        let mut without = Kinds::default();
        without.insert(Kind::Kill);
        without.insert(Kind::Careless);
        let rounds = Some(vec![3, 7]);
        let case = Case { seed: 9, theme: Some(Theme::Al), rounds, without };
        assert_eq!(case.words().parse::<Case>().unwrap(), case);
        let none = Case { rounds: Some(Vec::new()), ..Case::of(1) };
        assert_eq!(none.words().parse::<Case>().unwrap(), none);
        assert!(case.command().ends_with("--focus al --rounds=3,7 --without kill,careless"));
    }

    /// Two connected Primaries are refused by name, not silently run as something else.
    #[test]
    fn dual_primary_is_refused_by_name() {
        let words = "dual-primary".parse::<Theme>().unwrap_err().to_string();
        assert!(words.contains("refuses allow-two-primaries"), "{words}");
    }
}
