//! Seeded runs: a phase of faults, then healing, after which both nodes have to agree.
//!
//! Everything is drawn from the seed: sizes, options, which kinds of faults there are, what
//! happens when. In the first phase nodes are killed and lose power, the link is cut and reset,
//! disks fail, and an operator types commands, none of them with force. The operator is a careful
//! one: a node is promoted only if it has every acknowledged write, as a cluster manager with
//! fencing would see to. In the second phase everything is repaired; both nodes must become equal
//! within bounded time and hold what was acknowledged (RS-1, LV-1, DUR-5).

use replication_core::config::{Authentication, OnIoError};
use replication_core::control::Command;
use replication_core::state::{Conn, Disk, OnNoData, Role};
use replication_core::units::{Errno, SectorRange, Span};
use replication_core::wire::{HmacAlg, ReplicationProtocol};

use crate::sim::disk::{Cut, Fault, Kind, Trouble};
use crate::sim::rng::Rng;
use crate::sim::setup::{MIB, Setup};
use crate::sim::{A, B, Load, World};

/// The longest that healing may take.
const HEALING: Span = Span::from_secs(900);

/// Which kinds of faults a run has.
#[derive(Clone, Copy, Debug)]
struct Kinds {
    kills: bool,
    power_cuts: bool,
    link: bool,
    disks: bool,
    operator: bool,
}

/// What a run came to, for statistics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// The hash of its trace.
    pub hash: u64,
    /// Events, actions and log lines.
    pub lines: u64,
    /// Requests that were answered with success.
    pub requests: u64,
    /// Virtual time in milliseconds.
    pub time_ms: u64,
}

/// Runs one seed.
///
/// # Panics
/// If something is wrong: the report goes to the standard error.
pub fn run(seed: u64) -> Outcome {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let setup = random_setup(&mut rng);
    let protocol = setup.nodes[0].config.net.protocol;
    let size = setup.nodes[0].devices[0].data;
    let kinds = Kinds {
        kills: rng.chance(70),
        power_cuts: rng.chance(50),
        link: rng.chance(75),
        disks: rng.chance(30),
        operator: rng.chance(70),
    };
    let mut run = Run { w: World::new(seed, setup), rng, kinds, protocol, size, has_grown: false };
    run.w.start_synced();
    let rounds = run.rng.between(5, 30);
    for _ in 0..rounds {
        run.round();
        run.w.check_quiet();
    }
    run.heal();
    Outcome {
        hash: run.w.trace.hash(),
        lines: run.w.trace.count(),
        requests: [A, B].iter().map(|n| run.w.nodes[*n].host.successes).sum(),
        time_ms: run.w.now.0 / 1_000_000,
    }
}

fn random_setup(rng: &mut Rng) -> Setup {
    let mut setup = Setup::default();
    setup.size(rng.between(1, 12) * 4 * MIB);
    if rng.chance(30) {
        setup.external_meta(4096);
    }
    if rng.chance(20) {
        setup.second_volume();
    }
    let protocol = match rng.below(10) {
        0 => ReplicationProtocol::A,
        1 | 2 => ReplicationProtocol::B,
        _ => ReplicationProtocol::C,
    };
    setup.protocol(protocol);
    let al_extents = u16::try_from(rng.between(2, 8)).expect("small");
    setup.disk(|disk| disk.al_extents = al_extents);
    if rng.chance(20) {
        setup.disk(|disk| disk.rate.max_rate_kib = 2_000);
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

struct Run {
    w: World,
    rng: Rng,
    kinds: Kinds,
    protocol: ReplicationProtocol,
    size: u64,
    has_grown: bool,
}

impl Run {
    fn any_node(&mut self) -> usize {
        usize::from(self.rng.chance(50))
    }

    fn is_primary(&self, n: usize) -> bool {
        self.w.is_alive(n) && self.w.state(n, 0).role == Role::Primary
    }

    fn round(&mut self) {
        if self.rng.chance(60) {
            self.start_load();
        }
        match self.rng.below(10) {
            0 | 1 if self.kinds.kills => self.kill(),
            2 if self.kinds.power_cuts => self.power_cut(),
            3 | 4 if self.kinds.link => self.change_link(),
            5 if self.kinds.disks => self.break_disk(),
            6 | 7 if self.kinds.operator => self.operate(),
            8 => self.promote(),
            _ => self.repair(),
        }
        let time = match self.rng.below(3) {
            0 => self.rng.between(0, 3_000_000),
            1 => self.rng.between(0, 400_000_000),
            _ => self.rng.between(0, 5_000_000_000),
        };
        self.w.run_for(Span(time));
    }

    fn start_load(&mut self) {
        let Some(n) = [A, B].into_iter().find(|n| self.is_primary(*n)) else { return };
        let areas = (0..self.rng.between(1, 6)).map(|_| {
            let start = self.rng.below(self.size - 64);
            SectorRange { start, end: start + self.rng.between(1, 400) }
        });
        let areas = areas.collect();
        let load = Load {
            volumes: self.w.volumes(),
            depth: usize::try_from(self.rng.between(1, 8)).expect("small"),
            most_sectors: self.rng.between(1, 128),
            think: Span(self.rng.between(10_000, 20_000_000)),
            ..Load::mixed(areas)
        };
        self.w.start_load(n, load);
    }

    fn kill(&mut self) {
        let n = self.any_node();
        if self.w.is_alive(n) {
            self.w.kill(n);
        }
    }

    fn power_cut(&mut self) {
        let n = self.any_node();
        let cut = match self.rng.below(4) {
            0 => Cut::LoseAll,
            1 => Cut::KeepAll,
            _ => Cut::Mixed,
        };
        if self.w.is_alive(n) {
            self.w.power_cut(n, cut);
        }
    }

    fn change_link(&mut self) {
        match self.rng.below(4) {
            0 => self.w.net.reset_all(self.w.now),
            1 => {
                let n = self.any_node();
                self.w.note(n, "=== nothing gets through to this node");
                self.w.net.cut_towards(n);
            }
            _ => self.w.cut(),
        }
        if self.rng.chance(40) {
            let time = self.rng.below(3_000);
            self.w.run_for(Span::from_ms(time));
            self.w.heal();
        }
    }

    fn break_disk(&mut self) {
        let n = self.any_node();
        let volume = usize::try_from(self.rng.below(self.w.volumes() as u64)).expect("small");
        let kind = match self.rng.below(5) {
            0 => Kind::Read,
            1 => Kind::Write,
            2 => Kind::Flush,
            3 => Kind::MetaRead,
            _ => Kind::MetaWrite,
        };
        let hangs = self.rng.chance(20);
        let trouble = if hangs { Trouble::Stick } else { Trouble::Fail(Errno::EIO) };
        let fault = Fault { kind, range: None, times: Some(1), trouble };
        self.w.note(n, &format!("=== the disk of volume {volume}: {trouble:?} at a {kind:?}"));
        let backing = &mut self.w.nodes[n].backing[volume];
        match kind {
            Kind::Read | Kind::Write | Kind::Flush => backing.data.add_fault(fault),
            Kind::MetaRead | Kind::MetaWrite => backing.meta_disk_mut().add_fault(fault),
        }
    }

    /// A command of the operator; whether it is refused does not matter here.
    fn command(&mut self, n: usize, command: Command) {
        if !self.w.is_alive(n) {
            return;
        }
        let id = self.w.tell(n, command);
        if self.rng.chance(80) {
            // Some commands wait for a repair.
            for _ in 0..10 {
                if self.w.reply(n, id).is_some() {
                    break;
                }
                self.w.run_for(Span::from_secs(1));
            }
        }
    }

    fn operate(&mut self) {
        let n = self.any_node();
        if !self.w.is_alive(n) {
            return;
        }
        match self.rng.below(16) {
            0 | 1 => self.command(n, Command::Disconnect { force: false }),
            2 => self.command(n, Command::Disconnect { force: true }),
            3..=5 => self.command(n, Command::Connect { discard_my_data: false }),
            6 => {
                for volume in 0..self.w.volumes() {
                    self.w.disk_failed(n, volume);
                }
                self.command(n, Command::Detach { volume: None, force: false });
            }
            7 | 8 => self.command(n, Command::Attach(None)),
            9 => self.command(n, Command::PauseSync(true)),
            10 => self.command(n, Command::PauseSync(false)),
            11 => self.invalidate(n),
            12 => self.command(n, Command::Outdate),
            13 => self.command(n, Command::Down { holder: None, force: false }),
            14 => self.grow(n),
            _ => self.heal_disks(),
        }
    }

    /// Disks that hang go on.
    fn heal_disks(&mut self) {
        for n in [A, B] {
            self.w.heal_disks(n);
        }
    }

    /// Both nodes' devices of all volumes grow, and one node is told. Internal metadata would not
    /// be found at the new end by a node that is not there to move it, so nothing else happens
    /// until it is done.
    fn grow(&mut self, n: usize) {
        let is_calm = self.w.is_synced() && !self.w.net.is_cut() && !self.kinds.disks;
        let is_used = self.is_primary(A) || self.is_primary(B);
        if self.has_grown || !is_calm || !is_used {
            return;
        }
        self.has_grown = true;
        let size = self.size + self.rng.between(1, 4 * MIB);
        for node in &mut self.w.nodes {
            for backing in &mut node.backing {
                backing.data.grow(size);
            }
        }
        let resize = Command::Resize {
            volume: None,
            size: None,
            assume_clean: false,
            assume_peer_has_space: false,
        };
        drop(self.w.ask(n, resize));
        self.w.run_for(Span::from_secs(2));
    }

    fn invalidate(&mut self, n: usize) {
        if self.size > 16 * MIB {
            return;
        }
        for volume in 0..self.w.volumes() {
            self.w.since_sync[volume].troubled = true;
        }
        if self.w.ask(n, Command::Invalidate(None)).is_ok() {
            for volume in 0..self.w.volumes() {
                self.w.stale[n][volume] = true;
            }
        }
    }

    /// Moves the role, or takes over after a crash, if the node has all data.
    fn promote(&mut self) {
        if let Some(n) = [A, B].into_iter().find(|n| self.is_primary(*n)) {
            if self.rng.chance(70) && self.comes_to_rest(n) {
                self.command(n, Command::Secondary { holder: None });
            }
            return;
        }
        let n = self.any_node();
        let is_stale = self.w.stale[n].contains(&true);
        if !self.w.is_alive(n) || is_stale {
            return;
        }
        self.take_over(n);
    }

    /// Whether the requests of a node end soon; some wait for a repair.
    fn comes_to_rest(&mut self, n: usize) -> bool {
        self.w.stop_load(n);
        for _ in 0..20 {
            if self.w.nodes[n].host.outstanding() == 0 {
                return true;
            }
            self.w.run_for(Span::from_ms(500));
        }
        false
    }

    fn take_over(&mut self, n: usize) {
        let connected = self.w.all(|s| s.conn >= Conn::Connected) && !self.w.net.is_cut();
        for volume in 0..self.w.volumes() {
            if !connected {
                self.w.stale[1 - n][volume] = true;
                if self.protocol != ReplicationProtocol::C {
                    self.w.ledger.doubt_unsettled(u8::try_from(volume).expect("few"));
                }
            }
        }
        drop(self.w.ask(n, Command::Primary { force: false }));
    }

    /// Something is repaired.
    fn repair(&mut self) {
        if self.w.net.is_cut() && self.rng.chance(60) {
            self.w.heal();
            return;
        }
        if let Some(n) = [A, B].into_iter().find(|n| !self.w.is_alive(*n)) {
            self.w.boot(n);
            self.command(n, Command::Up);
        }
    }

    /// The second phase: everything is repaired, and both nodes become equal.
    fn heal(&mut self) {
        self.w.note(A, "=== healing begins");
        self.w.heal();
        for n in [A, B] {
            self.w.heal_disks(n);
            self.w.stop_load(n);
        }
        // What the cut link had held back, resets among it, arrives first.
        self.w.run_for(Span::from_secs(1));
        let begin = self.w.now;
        let end = begin + HEALING;
        while !(self.w.is_synced() && self.w.is_quiet()) {
            assert!(self.w.now < end, "the nodes do not become equal (RS-1)");
            self.help();
            if self.w.now.since(begin) > Span(HEALING.0 / 2)
                && self.w.is_alive(A)
                && self.w.is_alive(B)
            {
                self.separate();
            }
            self.w.run_for(Span::from_secs(1));
        }
        self.w.check_synced();
        self.use_once_more();
    }

    /// What a careful operator does to bring the nodes together.
    fn help(&mut self) {
        for n in [A, B] {
            if !self.w.is_alive(n) {
                self.w.boot(n);
                drop(self.w.ask(n, Command::Up));
            }
            drop(self.w.ask(n, Command::PauseSync(false)));
            for volume in 0..self.w.volumes() {
                if self.w.state(n, volume).disk == Disk::Diskless {
                    let nr = self.w.nodes[n].setup.config.volumes[volume].nr;
                    drop(self.w.ask(n, Command::Attach(Some(nr))));
                }
            }
        }
        let split = [A, B].iter().any(|n| self.w.status(*n).split_brain);
        for n in [A, B] {
            // A Primary that lost its disk accepts only the data it has lost.
            let is_bare = self.w.state(n, 0).disk == Disk::Diskless;
            if is_bare && self.w.conn(n) < Conn::Connected && self.is_primary(n) {
                self.demote(n);
            }
        }
        let alone = [A, B].map(|n| self.w.is_alive(n) && self.w.conn(n) == Conn::StandAlone);
        if split && alone == [true, true] {
            self.choose_victim();
            return;
        }
        for n in [A, B] {
            if alone[n] && self.w.is_alive(n) {
                drop(self.w.ask(n, Command::Connect { discard_my_data: false }));
            }
        }
    }

    /// A disk that the connected nodes refuse to attach has other data than the ones in use: what
    /// is to be done shows when both are apart. A resync that left blocks out begins again.
    fn separate(&mut self) {
        for n in [A, B] {
            let lacks = |w: &World, volume| {
                let state = w.state(n, volume);
                let has_ended = state.conn <= Conn::Connected && state.disk < Disk::UpToDate;
                state.disk < Disk::Inconsistent || has_ended
            };
            if (0..self.w.volumes()).any(|volume| lacks(&self.w, volume)) {
                self.w.note(n, "=== taken apart");
                self.demote(n);
            }
            if self.w.is_alive(n) && lacks(&self.w, 0) {
                drop(self.w.ask(n, Command::Disconnect { force: true }));
            }
        }
    }

    /// Makes a node Secondary; one whose frozen requests nobody will ever serve is started anew.
    fn demote(&mut self, n: usize) {
        let id = self.w.tell(n, Command::Secondary { holder: None });
        self.w.run_for(Span::from_secs(5));
        if self.w.reply(n, id).is_none() {
            self.w.kill(n);
        }
    }

    /// Split brain: the node without the acknowledged data gives its own up.
    fn choose_victim(&mut self) {
        let lacks =
            |w: &mut World, n: usize| (0..w.volumes()).any(|volume| !w.holds_everything(n, volume));
        let victim = if lacks(&mut self.w, A) {
            A
        } else if lacks(&mut self.w, B) || self.w.stale[B].contains(&true) {
            B
        } else {
            A
        };
        self.w.note(victim, "=== chosen as victim of the split brain");
        self.w.must(victim, Command::Secondary { holder: None });
        self.w.must(victim, Command::Connect { discard_my_data: true });
        self.w.must(1 - victim, Command::Connect { discard_my_data: false });
    }

    /// Everything still works.
    fn use_once_more(&mut self) {
        let primary = [A, B].into_iter().find(|n| self.is_primary(*n));
        let n = primary.unwrap_or(A);
        if primary.is_none() {
            self.w.must(n, Command::Primary { force: false });
        }
        for volume in 0..self.w.volumes() {
            self.w.read_all(n, volume);
            self.w.write(n, volume, 8, 8);
        }
        self.w.wait_synced();
    }
}
