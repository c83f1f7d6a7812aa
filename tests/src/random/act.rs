//! The first phase: what a round does to the nodes, their disks and the link.

use replication_core::control::Command;
use replication_core::state::{Conn, Disk};
use replication_core::units::{Errno, SectorRange, Span};

use super::{Kind, Promotion, Run};
use crate::sim::disk::{Cut, Fault, Kind as Access, Trouble};
use crate::sim::{A, B, Load};

/// No space left on device.
const ENOSPC: Errno = Errno(28);

/// Requests of a round: enough to fill every queue and log many times.
const MOST_REQUESTS: u64 = 800;

/// What a round is about.
enum Turn {
    Kind(Kind),
    Promote,
    Repair,
}

impl Run {
    pub(super) fn round(&mut self) {
        if self.rng.chance(60) {
            self.start_load();
        }
        match self.turn() {
            Turn::Kind(kind) => self.act(kind),
            Turn::Promote => self.promote(),
            Turn::Repair => self.repair(),
        }
        let time = match self.rng.below(3) {
            0 => self.rng.between(0, 3_000_000),
            1 => self.rng.between(0, 400_000_000),
            _ => self.rng.between(0, 5_000_000_000),
        };
        self.w.run_for(Span(time));
    }

    fn turn(&mut self) -> Turn {
        let plan = &self.plan;
        let weighed: Vec<(Kind, u64)> =
            plan.kinds.iter().map(|kind| (kind, plan.weight(kind))).collect();
        let sum: u64 = weighed.iter().map(|(_, weight)| weight).sum();
        let (promote, repair) = (sum / 8 + 1, sum / 3 + 2);
        let mut dice = self.rng.below(sum + promote + repair);
        for (kind, weight) in weighed {
            if dice < weight {
                return Turn::Kind(kind);
            }
            dice -= weight;
        }
        if dice < promote { Turn::Promote } else { Turn::Repair }
    }

    fn act(&mut self, kind: Kind) {
        match kind {
            Kind::Kill => self.kill(),
            Kind::PowerCut => self.power_cut(),
            Kind::Cut | Kind::OneWay | Kind::Reset | Kind::HalfClose => self.change_link(kind),
            Kind::Trickle => self.trickle(),
            Kind::BitFlip => self.flip_bit(),
            Kind::Freeze => self.freeze(),
            Kind::ClockJump => self.jump_clock(),
            Kind::DiskError | Kind::DiskDead | Kind::DiskStuck | Kind::NoSpace => {
                self.break_disk(kind);
            }
            Kind::DiskSlow => self.slow_disk(),
            Kind::Misdirect => self.misdirect(),
            Kind::Operator => self.operate(),
            Kind::Storm => self.storm(),
            Kind::Reconnect => self.reconnect(),
            Kind::Pause => self.pause(),
            Kind::Adjust => self.adjust(),
            Kind::RestartOptions => self.restart_with_other_options(),
            Kind::SecondaryHost => self.use_secondary(),
            Kind::Grow => self.grow(),
            Kind::Invalidate => self.invalidate(),
            Kind::Careless => self.promote_carelessly(),
            Kind::Stranger => self.meet_stranger(),
            Kind::Flip => self.flip_checked_bit(),
            Kind::MisdirectLog => self.misdirect_log(),
            Kind::MisdirectData | Kind::Rot => self.spoil(kind),
            // It is so from the beginning.
            Kind::Uneven => {}
        }
    }

    pub(super) fn random_load(&mut self) -> Load {
        let areas = (0..self.rng.between(1, 6)).map(|_| {
            let start = self.rng.below(self.size - 64);
            SectorRange { start, end: start + self.rng.between(1, 400) }
        });
        let areas = areas.collect();
        Load {
            volumes: self.w.volumes(),
            depth: usize::try_from(self.rng.between(1, 8)).expect("small"),
            most_sectors: self.rng.between(1, 128),
            think: Span(self.rng.between(10_000, 20_000_000)),
            most: self.rng.between(1, MOST_REQUESTS),
            ..Load::mixed(areas)
        }
    }

    fn start_load(&mut self) {
        for n in [A, B] {
            if self.is_primary(n) {
                let load = self.random_load();
                self.w.start_load(n, load);
            }
        }
    }

    /// The requests of a host that takes the Secondary for usable fail, and nothing is written.
    fn use_secondary(&mut self) {
        let Some(n) = [A, B].into_iter().find(|n| self.is_ready(*n) && !self.is_primary(*n)) else {
            return;
        };
        self.count(Kind::SecondaryHost);
        let load = self.random_load();
        self.w.start_load(n, load);
        let time = self.rng.below(100);
        self.w.run_for(Span::from_ms(time));
        self.w.stop_load(n);
    }

    /// Goes on for a few events, so that what comes next meets everything half done.
    fn in_the_middle(&mut self) {
        if self.rng.chance(50) {
            for _ in 0..self.rng.below(300) {
                self.w.step();
            }
        }
    }

    fn kill(&mut self) {
        let n = self.any_node();
        self.in_the_middle();
        if self.w.is_alive(n) {
            self.count(Kind::Kill);
            self.w.kill(n);
        }
    }

    fn power_cut(&mut self) {
        let n = self.any_node();
        let both = self.rng.chance(15);
        self.in_the_middle();
        for n in if both { vec![A, B] } else { vec![n] } {
            let cut = match self.rng.below(4) {
                0 => Cut::LoseAll,
                1 => Cut::KeepAll,
                _ => Cut::Mixed,
            };
            if self.w.is_alive(n) {
                self.count(Kind::PowerCut);
                self.w.power_cut(n, cut);
            }
        }
    }

    fn change_link(&mut self, kind: Kind) {
        let n = self.any_node();
        self.in_the_middle();
        self.count(kind);
        match kind {
            Kind::Reset => {
                self.w.note(A, "=== every stream is reset");
                self.w.net.reset_all(self.w.now);
            }
            Kind::HalfClose => {
                self.w.note(n, "=== this node's side of a stream ends");
                let which = self.rng.next();
                self.w.net.half_close(self.w.now, n, which);
            }
            Kind::OneWay => {
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

    fn trickle(&mut self) {
        self.count(Kind::Trickle);
        self.w.note(A, "=== bytes trickle");
        let segment = self.w.net.speed.segment;
        self.w.net.speed.segment = usize::try_from(self.rng.between(1, 40)).expect("small");
        let time = self.rng.below(300);
        self.w.run_for(Span::from_ms(time));
        self.w.net.speed.segment = segment;
    }

    fn flip_bit(&mut self) {
        let n = self.any_node();
        if self.w.is_alive(n) {
            self.count(Kind::BitFlip);
            self.w.note(n, "=== the next header of this node arrives damaged");
            self.w.nodes[n].damages_header = true;
        }
    }

    fn flip_checked_bit(&mut self) {
        let n = self.any_node();
        if self.w.is_alive(n) {
            self.count(Kind::Flip);
            self.w.note(n, "=== a bit of a packet of this node will turn over");
            self.w.nodes[n].flips = Some(self.rng.next());
        }
    }

    fn freeze(&mut self) {
        let n = self.any_node();
        self.in_the_middle();
        if self.is_ready(n) {
            self.count(Kind::Freeze);
            let time = self.rng.below(15_000);
            self.w.freeze(n, Span::from_ms(time));
        }
    }

    fn jump_clock(&mut self) {
        let n = self.any_node();
        self.count(Kind::ClockJump);
        let most = 1 << self.rng.between(1, 26);
        let time = self.rng.below(most);
        self.w.jump_clock(n, Span::from_ms(time));
    }

    fn break_disk(&mut self, kind: Kind) {
        let n = self.any_node();
        let volume = self.any_volume();
        let access = match self.rng.below(5) {
            _ if kind == Kind::NoSpace => Access::Write,
            0 => Access::Read,
            1 => Access::Write,
            2 => Access::Flush,
            3 => Access::MetaRead,
            _ => Access::MetaWrite,
        };
        let (trouble, times) = match kind {
            Kind::DiskStuck => (Trouble::Stick, Some(1)),
            Kind::DiskDead => (Trouble::Fail(Errno::EIO), None),
            Kind::NoSpace => (Trouble::Fail(ENOSPC), None),
            _ => (Trouble::Fail(Errno::EIO), Some(1)),
        };
        self.count(kind);
        let fault = Fault { kind: access, range: None, times, trouble };
        let words =
            format!("=== the disk of volume {volume}: {trouble:?} at {access:?}, {times:?}");
        self.w.note(n, &words);
        let backing = &mut self.w.nodes[n].backing[volume];
        match access {
            Access::Read | Access::Write | Access::Flush => backing.data.add_fault(fault),
            Access::MetaRead | Access::MetaWrite => backing.meta_disk_mut().add_fault(fault),
        }
    }

    fn slow_disk(&mut self) {
        let n = self.any_node();
        self.count(Kind::DiskSlow);
        self.w.nodes[n].slowness = 1 << self.rng.between(2, 9);
        self.w.note(n, "=== the disks of this node are slow");
    }

    /// A write of metadata lands on the superblock instead, and the process dies of it. Such a
    /// disk is refused, nothing is written to it, and the operator makes new metadata (MD-2). That
    /// is possible without loss only while the peer has everything.
    fn misdirect(&mut self) {
        let n = self.any_node();
        let volume = self.any_volume();
        let can = [A, B].iter().all(|n| self.is_ready(*n))
            && self.w.is_synced()
            && !self.w.net.is_cut()
            && !self.is_primary(n)
            && self.w.nodes.iter().all(|node| node.stuck() == 0 && node.slowness == 1)
            && !self.w.stale.iter().flatten().any(|stale| *stale);
        if !can {
            return;
        }
        self.count(Kind::Misdirect);
        self.w.disk_failed(n, volume);
        self.w.stale[n][volume] = true;
        self.w.note(n, &format!("=== a write lands on the superblock of volume {volume}"));
        // What else would trouble the disk must not meet the attach that follows.
        self.heal_disks();
        self.w.kill(n);
        self.w.misdirect_onto_superblock(n, volume);
        self.w.boot(n);
        let nr = self.w.nodes[n].setup.config.volumes[volume].nr;
        let before = self.w.metadata_sums(n, volume);
        let refused = self.w.ask(n, Command::Attach(Some(nr)));
        assert!(refused.is_err(), "MD-2: metadata that is none was attached: {refused:?}");
        let is_left = self.w.state(n, volume).disk == Disk::Diskless;
        assert!(is_left, "MD-2: a disk without metadata is in use");
        assert!(self.w.metadata_sums(n, volume) == before, "MD-2: foreign metadata was written to");
        self.w.nodes[n].create_metadata(volume);
        self.w.threw_away(n, volume);
        self.tell(n, Command::Up);
        self.w.run_for(Span::from_secs(2));
    }

    /// Something is repaired.
    pub(super) fn repair(&mut self) {
        if self.w.net.is_cut() && self.rng.chance(60) {
            self.w.heal();
            return;
        }
        let troubled = self.w.nodes.iter().any(|node| node.slowness > 1 || node.stuck() > 0);
        if troubled && self.rng.chance(50) {
            self.heal_disks();
            return;
        }
        if let Some(n) = [A, B].into_iter().find(|n| !self.w.is_alive(*n)) {
            self.w.boot(n);
            self.command(n, Command::Up);
        }
    }

    /// Disks that hang, fail or are slow are well again.
    pub(super) fn heal_disks(&mut self) {
        for n in [A, B] {
            self.w.heal_disks(n);
        }
    }

    /// Moves the role, or takes over after a crash, if the node has all data.
    fn promote(&mut self) {
        if let Some(n) = self.primary() {
            if self.is_ready(n) && self.rng.chance(70) && self.comes_to_rest(n) {
                self.command(n, Command::Secondary { holder: None });
            }
            return;
        }
        let n = self.any_node();
        let is_unfit = self.w.stale[n].contains(&true) || self.may_become_primary(1 - n);
        if self.is_ready(n) && (!is_unfit || self.is_careless()) {
            self.take_over(n);
        }
    }

    /// Whether a promotion of the node was asked for and is not answered: what it waits for may be
    /// the end of the connection, and then it goes on alone. A careful operator waits for the
    /// answer, or for the end of the process, before he promotes the other node.
    fn may_become_primary(&self, n: usize) -> bool {
        self.promoting.is_some_and(|Promotion { node, incarnation, command }| {
            node == n
                && self.w.is_alive(n)
                && self.w.nodes[n].incarnation == incarnation
                && self.w.reply(n, command).is_none()
        })
    }

    /// Promotes a node that cannot reach the other one, whatever that one does.
    fn promote_carelessly(&mut self) {
        let n = self.any_node();
        if self.is_ready(n) && !self.is_primary(n) {
            self.count(Kind::Careless);
            self.take_over(n);
        }
    }

    /// Whether the requests of a node end soon; some wait for a repair.
    pub(super) fn comes_to_rest(&mut self, n: usize) -> bool {
        self.w.stop_load(n);
        for _ in 0..20 {
            if self.w.nodes[n].host.outstanding() == 0 {
                return self.is_ready(n);
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
                if self.plan.protocol != replication_core::wire::ReplicationProtocol::C {
                    self.w.ledger.doubt_unsettled(u8::try_from(volume).expect("few"));
                }
            }
        }
        if let Some(command) = self.command(n, Command::Primary { force: false }) {
            let incarnation = self.w.nodes[n].incarnation;
            self.promoting = Some(Promotion { node: n, incarnation, command });
        }
    }
}
