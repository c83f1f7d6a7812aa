//! The first phase: what the operator does.

use replication_core::config::OnIoError;
use replication_core::control::{Command, Refusal, Reply};
use replication_core::state::OnNoData;
use replication_core::units::{Sector, SectorRange, Span, VolumeNr};
use replication_core::wire::ReplicationProtocol;

use super::{Kind, Run};
use crate::sim::setup::MIB;
use crate::sim::{A, B};

/// The largest device that is copied as a whole, in sectors: a bound for the time of a run.
pub(super) const MOST_COPIED: u64 = 16 * MIB;

impl Run {
    /// A command of the operator, if the node can take one. The operator's tool does not have a
    /// disk attached before it has looked where the metadata is.
    pub(super) fn tell(&mut self, n: usize, command: Command) -> Option<u64> {
        if !self.is_ready(n) {
            return None;
        }
        if matches!(command, Command::Up | Command::Attach(_)) {
            self.w.check_resize(n);
        }
        Some(self.w.tell(n, command))
    }

    /// A command of the operator; whether it is refused does not matter here. Its number, if the
    /// node could take it.
    pub(super) fn command(&mut self, n: usize, command: Command) -> Option<u64> {
        let id = self.tell(n, command)?;
        if self.rng.chance(80) {
            // Some commands wait for a repair.
            for _ in 0..10 {
                if self.w.reply(n, id).is_some() {
                    break;
                }
                self.w.run_for(Span::from_secs(1));
            }
        }
        Some(id)
    }

    /// All volumes, one of them, or one that does not exist.
    fn some_volume(&mut self) -> Option<VolumeNr> {
        match self.rng.below(10) {
            0..5 => None,
            5..9 => {
                let volume = self.any_volume();
                Some(self.w.nodes[A].setup.config.volumes[volume].nr)
            }
            _ => Some(VolumeNr(77)),
        }
    }

    /// The volumes that a command concerns, by index.
    fn volumes_of(&self, nr: Option<VolumeNr>) -> Vec<usize> {
        let volumes = self.w.nodes[A].setup.config.volumes.iter().enumerate();
        volumes.filter(|(_, v)| nr.is_none_or(|nr| nr == v.nr)).map(|(at, _)| at).collect()
    }

    /// Draws a command, and takes note of what it may do to the data.
    fn draw_command(&mut self, n: usize) -> Command {
        let force = self.rng.chance(30);
        match self.rng.below(18) {
            0 | 1 => Command::Disconnect { force },
            2..=4 => Command::Connect { discard_my_data: false },
            5 | 6 => {
                let volume = self.some_volume();
                for at in self.volumes_of(volume) {
                    self.w.disk_failed(n, at);
                }
                Command::Detach { volume, force }
            }
            7..=9 => Command::Attach(self.some_volume()),
            10 => Command::Outdate,
            11 => Command::Down { holder: None, force },
            12 => Command::Resize {
                volume: self.some_volume(),
                size: None,
                assume_clean: false,
                // Which is not true of disks of different sizes.
                assume_peer_has_space: self.rng.chance(30) && !self.plan.kinds.has(Kind::Uneven),
            },
            13 => {
                self.w.note(n, "=== somebody has the device open");
                Command::Secondary { holder: Some(String::from("mount (1)")) }
            }
            14 => Command::Status,
            15 if self.is_careless() => Command::Primary { force: false },
            // Begun beside a Primary that knows nothing of it, a generation parts two histories.
            16 if self.is_primary(n) || self.is_careless() => {
                if self.w.is_synced() {
                    self.has_begun = false;
                }
                if std::mem::replace(&mut self.has_begun, true) {
                    // The metadata has room for so many generations that the peer lacks.
                    return Command::Up;
                }
                Command::NewCurrentUuid { volume: self.some_volume(), clear_bitmap: force }
            }
            _ => Command::Up,
        }
    }

    pub(super) fn operate(&mut self) {
        let n = self.any_node();
        if !self.is_ready(n) {
            return;
        }
        self.count(Kind::Operator);
        let command = self.draw_command(n);
        self.command(n, command);
    }

    /// Several commands at once, on both nodes, in the middle of things.
    pub(super) fn storm(&mut self) {
        self.count(Kind::Storm);
        for _ in 0..self.rng.between(2, 6) {
            let n = self.any_node();
            if !self.is_ready(n) {
                continue;
            }
            let command = match self.rng.below(6) {
                0 if self.is_primary(n) => {
                    self.w.stop_load(n);
                    Command::Secondary { holder: None }
                }
                // While the role is given up, and the connection may be lost as well.
                1 if self.is_careless() => Command::Primary { force: false },
                _ => self.draw_command(n),
            };
            self.tell(n, command);
            for _ in 0..self.rng.below(40) {
                self.w.step();
            }
        }
    }

    pub(super) fn reconnect(&mut self) {
        self.count(Kind::Reconnect);
        for n in [A, B] {
            let force = self.rng.chance(50);
            if self.rng.chance(70) {
                self.tell(n, Command::Disconnect { force });
            }
        }
        for _ in 0..self.rng.below(200) {
            self.w.step();
        }
        for n in [A, B] {
            self.tell(n, Command::Connect { discard_my_data: false });
        }
    }

    pub(super) fn pause(&mut self) {
        let n = self.any_node();
        let pause = self.rng.chance(50);
        self.count(Kind::Pause);
        self.command(n, Command::PauseSync(pause));
    }

    /// Both nodes' devices of all volumes grow, and one node is told. A node that cannot move its
    /// internal metadata then, because a resync runs, has it moved before the next attach.
    pub(super) fn grow(&mut self) {
        let n = self.any_node();
        let kinds = self.plan.kinds;
        let has_disk_faults =
            [Kind::DiskError, Kind::DiskDead, Kind::DiskStuck, Kind::DiskSlow, Kind::NoSpace]
                .iter()
                .any(|kind| kinds.has(*kind));
        let is_calm = self.w.is_synced() && !self.w.net.is_cut() && !has_disk_faults;
        let is_used = self.primary().is_some();
        let are_ready = [A, B].iter().all(|n| self.is_ready(*n));
        if self.has_grown || !is_calm || !is_used || !are_ready {
            return;
        }
        self.count(Kind::Grow);
        self.has_grown = true;
        let mut more = [self.rng.between(1, 4 * MIB); 2];
        if kinds.has(Kind::Uneven) {
            more[A] = self.rng.between(1, 4 * MIB);
        }
        for volume in 0..self.w.volumes() {
            // Where the metadata was is data then.
            let start = self.w.nodes[n].sizes[volume];
            let ends = [A, B].map(|n| self.w.nodes[n].backing[volume].data.sectors());
            let nr = u8::try_from(volume).expect("few volumes");
            self.w.ledger.add_unknown(nr, SectorRange { start, end: ends[A].max(ends[B]) });
        }
        for (node, more) in self.w.nodes.iter_mut().zip(more) {
            for backing in &mut node.backing {
                let old = backing.data.sectors();
                backing.data.grow(old + more);
            }
        }
        if kinds.has(Kind::Uneven) && self.rng.chance(30) {
            // More than the peer is known to have is refused until it has told its new size.
            let size = self.w.nodes[n].sizes[0] + self.rng.below(more[n]);
            let named = self.resize(n, Some(Sector(size)));
            let words = format!("=== a resize to {size}s: {named:?}");
            self.w.note(n, &words);
        }
        let resized = self.resize(n, None);
        // A part that grew before may still be copied.
        let is_done = resized.is_ok() || !self.w.is_synced();
        assert!(is_done, "growing was refused: {resized:?}");
        self.w.run_for(Span::from_secs(2));
    }

    fn resize(&mut self, n: usize, size: Option<Sector>) -> Result<Reply, Refusal> {
        let resize = Command::Resize {
            volume: None,
            size,
            assume_clean: false,
            assume_peer_has_space: false,
        };
        self.w.ask(n, resize)
    }

    /// The data of one node is thrown away, by itself or by its peer.
    pub(super) fn invalidate(&mut self) {
        let n = self.any_node();
        if self.size > MOST_COPIED || !self.is_ready(n) {
            return;
        }
        let volume = self.some_volume();
        let remote = self.rng.chance(40);
        let victim = if remote { 1 - n } else { n };
        let volumes = self.volumes_of(volume);
        let keeps = volumes.iter().all(|at| !self.w.stale[1 - victim][*at]);
        if !keeps {
            return;
        }
        self.count(Kind::Invalidate);
        for at in &volumes {
            self.w.since_sync[*at].troubled = true;
            self.w.stale[victim][*at] = true;
            self.w.threw_away(victim, *at);
            if self.primary() == Some(victim) {
                // Its peer need not have got what was acknowledged in protocols A and B.
                self.w.disk_failed(victim, *at);
            }
        }
        let command =
            if remote { Command::InvalidateRemote(volume) } else { Command::Invalidate(volume) };
        self.command(n, command);
    }

    /// Changes options of a running resource, on both nodes.
    pub(super) fn adjust(&mut self) {
        self.count(Kind::Adjust);
        let protocol = match self.rng.below(3) {
            0 => ReplicationProtocol::A,
            1 => ReplicationProtocol::B,
            _ => ReplicationProtocol::C,
        };
        let epoch = u32::try_from(self.rng.between(1, 20)).expect("small");
        let on_no_data = if self.rng.chance(30) { OnNoData::SuspendIo } else { OnNoData::IoError };
        for n in [A, B] {
            let config = &mut self.w.nodes[n].setup.config;
            config.net.protocol = protocol;
            config.net.max_epoch_size = epoch;
            config.on_no_data = on_no_data;
            self.take_options_over(n);
        }
    }

    /// Tells a node what its configuration says now.
    pub(super) fn take_options_over(&mut self, n: usize) {
        let resource = self.w.nodes[n].setup.config.clone();
        let command = self.w.adjust(n, resource);
        self.tell(n, command);
    }

    /// A node that is down comes back with another size of the activity log and other policies.
    pub(super) fn restart_with_other_options(&mut self) {
        let Some(n) = [A, B].into_iter().find(|n| !self.w.is_alive(*n)) else { return };
        self.count(Kind::RestartOptions);
        let slots = u16::try_from(self.rng.between(2, 9)).expect("small");
        let passes_on = self.rng.chance(50);
        for volume in &mut self.w.nodes[n].setup.config.volumes {
            volume.disk.al_extents = slots;
            let detach = OnIoError::CallLocalIoError;
            volume.disk.on_io_error = if passes_on { OnIoError::PassOn } else { detach };
        }
        self.w.nodes[n].setup.config.net.use_rle = self.rng.chance(50);
        self.w.boot(n);
        self.command(n, Command::Up);
    }
}
