//! Did this one event break a rule? Checks that need no rest, held at every event.
//!
//! | checks | what is remembered for it |
//! |---|---|
//! | ORD-2, DUR-3 | mirrored writes that a node has received, by epoch |
//! | ORD-3 | writes and barriers that a node has sent |
//! | ACK-C, ACK-1 | nothing: the peer's disk is looked at when a write is acknowledged |
//! | AL-2, AL-10 | nothing: the metadata is looked at when a write is submitted |
//! | GI-6 | which nodes wrote without each other, and whether split brain was seen since |
//! | ST-1, ST-5, ST-7, FE-1 | the states before each command and event |

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use replication_core::control::{Command, Refusal, Reply};
use replication_core::event::{Event, VolumeIx};
use replication_core::state::{Conn, Disk as DiskState, Role, State};
use replication_core::units::{Buf, Sector, SectorRange, VolumeNr};
use replication_core::wire::{BlockId, DpFlags, Packet, ReplicationProtocol};

use super::coverage::{Family, request_name};
use super::ledger::Write;
use super::world::World;
use super::{A, B};

/// One in this many acknowledgements is compared with the peer's disk.
const ACK_SAMPLE: u64 = 4;
/// One in this many writes is looked up in the metadata.
const LOG_SAMPLE: u64 = 16;

/// A mirrored write that a node has received.
#[derive(Clone, Copy, Debug)]
struct Received {
    block_id: BlockId,
    epoch: u64,
    volume: usize,
    range: SectorRange,
    buf: Option<Buf>,
    submitted: bool,
    done: bool,
    failed: bool,
}

/// What a node knows about the order of the writes of its peer.
#[derive(Debug, Default)]
struct Receiver {
    epoch: u64,
    writes: Vec<Received>,
}

/// What a node has sent since the connection was made.
#[derive(Debug, Default)]
struct Sender {
    writes: u32,
    barriers: VecDeque<(u32, u32)>,
    /// Ranges whose last write asked for no word when it is on the peer's disk.
    unasked: BTreeSet<(VolumeNr, u64, u64)>,
    /// It says what its core never said.
    forges: bool,
}

/// A command that was not answered yet.
#[derive(Debug)]
struct Asked {
    name: &'static str,
    step: u64,
    facts: Vec<Facts>,
    is_role: bool,
    forces: bool,
}

/// What a refused command may not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    role: Role,
    disk: DiskState,
    user_isp: bool,
    uuids: [u64; 4],
}

/// What the checks remember.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    states: [Vec<State>; 2],
    receivers: [Receiver; 2],
    senders: [Sender; 2],
    /// The process was told, by the operator or by its peer, of another protocol than C.
    told_other: [bool; 2],
    asked: BTreeMap<(usize, u64), Asked>,
    /// For each volume: nodes that acknowledged writes while they were not connected.
    apart: Vec<BTreeSet<usize>>,
    /// A node has said that it found a split brain.
    split_brain_seen: bool,
    /// The smallest size that the operator has asked for, in sectors.
    least_size: Option<u64>,
    looked_up: u64,
}

/// Whether a volume with this connection state is the source of a resync, also of one that waits.
pub(crate) const fn is_source(conn: Conn) -> bool {
    matches!(conn, Conn::SyncSource | Conn::PausedSyncS)
}

fn nr(volume: usize) -> u8 {
    u8::try_from(volume).expect("few volumes")
}

fn sectors(first: Sector, bytes: u32) -> SectorRange {
    SectorRange { start: first.0, end: first.0 + u64::from(bytes) / 512 }
}

impl World {
    /// From now on this node sends packets on this connection that are not its core's: what the
    /// other one answers is not held against it.
    pub fn forges(&mut self, n: usize) {
        self.watch.senders[n].forges = true;
    }

    /// An event is about to be handed to the core.
    pub(crate) fn watch_event(&mut self, n: usize, event: &Event<'_>) {
        match event {
            Event::Host(request) => self.coverage.add(Family::Request, request_name(request.op)),
            Event::Packet { volume, packet, payload, .. } => {
                if let Packet::ProtocolUpdate(theirs) = packet {
                    self.told_protocol(n, theirs.protocol);
                }
                let volume = usize::from(volume.0);
                self.watch_received(n, volume, packet, *payload);
            }
            Event::Command { command: Command::Adjust(config), .. } => {
                self.told_protocol(n, config.resource.net.protocol);
            }
            Event::Tick
            | Event::DiskDone { .. }
            | Event::DiskOpened { .. }
            | Event::MetaRead { .. }
            | Event::MetaWritten { .. }
            | Event::DialDone { .. }
            | Event::Accepted { .. }
            | Event::Sent { .. }
            | Event::SockGone { .. }
            | Event::Command { .. } => {}
        }
    }

    /// A process begins.
    pub(crate) fn watch_boot(&mut self, n: usize) {
        self.watch.told_other[n] = false;
        self.told_protocol(n, self.nodes[n].setup.config.net.protocol);
    }

    fn told_protocol(&mut self, n: usize, protocol: ReplicationProtocol) {
        self.watch.told_other[n] |= protocol != ReplicationProtocol::C;
    }

    fn watch_received(&mut self, n: usize, volume: usize, packet: &Packet, buf: Option<Buf>) {
        let receiver = &mut self.watch.receivers[n];
        let (range, block_id) = match packet {
            Packet::ConnectionFeatures(_) => {
                *receiver = Receiver::default();
                return;
            }
            Packet::Barrier { .. } => {
                receiver.epoch += 1;
                return;
            }
            Packet::Data(h) => (sectors(h.sector, h.len), h.block_id),
            Packet::Trim(h) | Packet::Zeroes(h) => (sectors(h.sector, h.size), h.block_id),
            _ => return,
        };
        let epoch = receiver.epoch;
        let (submitted, done, failed) = (false, false, false);
        receiver.writes.push(Received {
            block_id,
            epoch,
            volume,
            range,
            buf,
            submitted,
            done,
            failed,
        });
    }

    /// ORD-3: what a packet that is being sent says about epochs.
    pub(crate) fn watch_sent(&mut self, n: usize, stream: u32, volume: VolumeNr, packet: &Packet) {
        match packet {
            Packet::ConnectionFeatures(_) => self.watch.senders[n] = Sender::default(),
            Packet::Data(h) => self.watch_mirrored(n, volume, sectors(h.sector, h.len), h.flags),
            Packet::Trim(h) | Packet::Zeroes(h) => {
                self.watch_mirrored(n, volume, sectors(h.sector, h.size), h.flags);
            }
            Packet::Bitmap(_) | Packet::CompressedBitmap(_) => self.watch_marks(n, volume),
            Packet::Barrier { barrier } => {
                let sender = &mut self.watch.senders[n];
                let writes = std::mem::take(&mut sender.writes);
                sender.barriers.push_back((barrier.0, writes));
            }
            Packet::NegAck(ack) => {
                // ORD-2: a write that is refused before it was submitted never will be.
                let refused = |w: &Received| !w.submitted && w.block_id == ack.block_id;
                self.watch.receivers[n].writes.retain(|w| !refused(w));
            }
            Packet::BarrierAck { barrier, set_size } => {
                if !self.net.is_open_at(stream, 1 - n) {
                    // It answers barriers of a connection that the other node has given up.
                    return;
                }
                if self.watch.senders[1 - n].forges {
                    return;
                }
                let expected = self.watch.senders[1 - n].barriers.pop_front();
                assert!(
                    expected == Some((barrier.0, *set_size)),
                    "ORD-3: node {n} acknowledges barrier {} with {set_size} writes, but its \
                     peer's oldest one (and its writes) is {expected:?}",
                    barrier.0
                );
                self.coverage.add(Family::Check, "ORD-3");
            }
            _ => {}
        }
    }

    /// GI-1: marks are told when the generation that they belong to is on the disk.
    fn watch_marks(&mut self, n: usize, volume: VolumeNr) {
        let volumes = &self.nodes[n].setup.config.volumes;
        let at = volumes.iter().position(|v| v.nr == volume).expect("a volume of the setup");
        let Some(on_disk) = self.on_disk(n, at) else { return };
        let (durable, known) =
            (on_disk.superblock.uuids.current, self.status(n).volumes[at].uuids[0]);
        assert!(
            durable | 1 == known | 1,
            "GI-1: node {n} tells the marks of {known:#x}, its disk is still of {durable:#x}"
        );
        self.coverage.add(Family::Check, "GI-1");
    }

    fn watch_mirrored(&mut self, n: usize, volume: VolumeNr, range: SectorRange, flags: DpFlags) {
        let sender = &mut self.watch.senders[n];
        sender.writes += 1;
        let key = (volume, range.start, range.end);
        if flags.contains(DpFlags::SEND_WRITE_ACK) {
            sender.unasked.remove(&key);
        } else {
            sender.unasked.insert(key);
        }
    }

    /// Whether the write was sent under another protocol than C, which the node had been told of.
    /// Its configuration, of which it need not have heard yet, may be of C again.
    fn was_sent_otherwise(&self, n: usize, write: Write) -> bool {
        let volume = self.nodes[n].setup.config.volumes[usize::from(write.volume)].nr;
        let key = (volume, write.range.start, write.range.end);
        self.watch.told_other[n] && self.watch.senders[n].unasked.contains(&key)
    }

    /// A data write is about to be submitted to a disk: ORD-2 for those of the peer, AL-2 for
    /// those of the host.
    pub(crate) fn watch_write(
        &mut self,
        n: usize,
        volume: usize,
        range: SectorRange,
        buf: Option<Buf>,
    ) {
        let first_pool_page = self.nodes[n].setup.first_pool_page();
        if buf.is_some_and(|buf| buf.0 < first_pool_page) {
            self.watch_log_covers(n, volume, range);
            return;
        }
        let writes = &self.watch.receivers[n].writes;
        let is_it =
            |w: &Received| !w.submitted && w.volume == volume && w.range == range && w.buf == buf;
        let Some(at) = writes.iter().position(is_it) else { return };
        let epoch = writes[at].epoch;
        let disks: Vec<bool> = (0..self.volumes()).map(|v| self.has_usable_disk(n, v)).collect();
        let flushes = self.nodes[n].setup.config.volumes.iter().any(|v| v.disk.disk_flushes);
        for before in writes.iter().filter(|w| w.epoch < epoch && disks[w.volume] && !w.failed) {
            assert!(
                before.done,
                "ORD-2: node {n} submits {range} of epoch {epoch} before {before:?} is done"
            );
            let settled = self.state(n, before.volume).conn == Conn::Connected;
            let disk = &self.nodes[n].backing[before.volume].data;
            let mut sectors = before.range.start..before.range.end;
            assert!(
                !flushes || !settled || sectors.all(|sector| disk.is_durable(sector)),
                "DUR-3: node {n} submits {range} of epoch {epoch} before {before:?} is durable"
            );
        }
        self.coverage.add(Family::Check, "ORD-2");
        let writes = &mut self.watch.receivers[n].writes;
        writes[at].submitted = true;
        // What came before was checked and need not be checked again.
        writes.retain(|w| w.epoch >= epoch);
    }

    /// A data write has ended.
    pub(crate) fn watch_written(
        &mut self,
        n: usize,
        volume: usize,
        range: SectorRange,
        buf: Option<Buf>,
        ok: bool,
    ) {
        let is_it =
            |w: &&mut Received| w.submitted && !w.done && w.volume == volume && w.range == range;
        let mut writes = self.watch.receivers[n].writes.iter_mut().filter(is_it);
        if let Some(write) = writes.find(|w| w.buf == buf) {
            write.done = true;
            write.failed = !ok;
        }
    }

    fn has_usable_disk(&self, n: usize, volume: usize) -> bool {
        self.is_alive(n) && self.state(n, volume).disk >= DiskState::Inconsistent
    }

    /// AL-2, AL-10: before a host's write goes to the disk, the metadata there says that its
    /// blocks may differ.
    fn watch_log_covers(&mut self, n: usize, volume: usize, range: SectorRange) {
        self.watch.looked_up += 1;
        if !self.watch.looked_up.is_multiple_of(LOG_SAMPLE) {
            return;
        }
        let Some(on_disk) = self.on_disk(n, volume) else { return };
        let blocks = range.blocks_outward();
        let missing = (blocks.start..blocks.end).find(|block| !on_disk.covers(*block));
        assert!(
            missing.is_none(),
            "AL-2: node {n} volume {volume} writes {range}, but block {missing:?} is neither in \
             the activity log nor in the bitmap on disk (flags {:?})",
            on_disk.superblock.flags
        );
        self.coverage.add(Family::Check, "AL-2");
    }

    /// ACK-C, ACK-1: a write that is acknowledged by a mirroring Primary is on the peer's disk, or
    /// marked.
    pub(crate) fn watch_acknowledged(&mut self, n: usize, write: Write) {
        let volume = usize::from(write.volume);
        let is_sampled = write.version.is_multiple_of(ACK_SAMPLE);
        let always_c =
            self.nodes.iter().all(|n| n.setup.config.net.protocol == ReplicationProtocol::C);
        let since = &self.since_sync[volume];
        let is_plain = since.known && !since.troubled && since.power_cuts.is_empty();
        let state = self.state(n, volume);
        let mirrored = state.conn == Conn::Connected && state.pdsk == DiskState::UpToDate;
        if !is_sampled || !always_c || !is_plain || !mirrored || !self.is_alive(1 - n) {
            return;
        }
        if self.was_sent_otherwise(n, write) {
            return;
        }
        let moment = self.moment();
        let disk = &self.nodes[1 - n].backing[volume].data;
        for sector in write.range.start..write.range.end {
            if let Err(why) = self.ledger.check(nr(volume), sector, disk.sector(sector), moment) {
                let block = sector / replication_core::units::SECTORS_PER_BLOCK;
                assert!(
                    self.is_marked(n, volume, block),
                    "ACK-C: node {n} acknowledges, its peer is mirrored and not marked, but its \
                     disk: {why}"
                );
            }
        }
        self.coverage.add(Family::Check, "ACK-C");
    }

    /// A node acknowledges a write while it is not connected.
    pub(crate) fn wrote_apart(&mut self, n: usize, volume: usize) {
        if self.watch.apart.len() <= volume {
            self.watch.apart.resize(self.differing.len(), BTreeSet::new());
        }
        self.watch.apart[volume].insert(n);
    }

    /// The operator throws away what a node has.
    pub fn threw_away(&mut self, n: usize, volume: usize) {
        if let Some(apart) = self.watch.apart.get_mut(volume) {
            apart.remove(&n);
        }
    }

    /// GI-6: two histories become one only after the split brain was seen.
    fn histories_meet(&mut self, volume: usize) {
        let Some(apart) = self.watch.apart.get_mut(volume) else { return };
        assert!(
            apart.len() < 2 || self.watch.split_brain_seen,
            "GI-6: volume {volume}: both nodes acknowledged writes without the other, and now they \
             take themselves for equal without having seen a split brain"
        );
        if apart.len() == 2 {
            self.coverage.add(Family::Check, "GI-6");
        }
        self.watch.apart[volume].clear();
        if self.watch.apart.iter().all(BTreeSet::is_empty) {
            self.watch.split_brain_seen = false;
        }
    }

    /// Something has happened to both nodes.
    pub(crate) fn after_step(&mut self) {
        for volume in 0..self.volumes() {
            let has_apart = self.watch.apart.get(volume).is_some_and(|apart| !apart.is_empty());
            let has_alone = !self.since_sync[volume].alone.is_empty();
            if (has_apart || has_alone) && self.is_volume_synced(volume) {
                self.since_sync[volume].alone.clear();
                self.histories_meet(volume);
            }
        }
    }

    /// A log line of the core.
    pub(crate) fn watch_log(&mut self, text: &str) {
        if let Some((_, rule)) = text.split_once(" by rule=") {
            let digits = rule.find(|c: char| !c.is_ascii_digit()).unwrap_or(rule.len());
            self.coverage.add(Family::Rule, &rule[..digits]);
        }
        self.watch.split_brain_seen |= text.contains("Split-Brain detected");
    }

    /// The core has taken an event in: which states were entered, and are they allowed?
    pub(crate) fn watch_states(&mut self, n: usize) {
        for volume in 0..self.volumes() {
            let new = self.state(n, volume);
            let old = self.watch.states[n].get(volume).copied();
            if old == Some(new) {
                continue;
            }
            if old.is_none_or(|old| old.conn != new.conn) {
                self.coverage.add(Family::Connection, new.conn.name());
            }
            self.note_connected(n, volume, new.conn >= Conn::Connected);
            for disk in [new.disk, new.pdsk] {
                self.coverage.add(Family::Disk, disk.name());
            }
            for role in [new.role, new.peer] {
                self.coverage.add(Family::Role, role.name());
            }
            if new.role == Role::Primary && old.is_some_and(|old| old.role == Role::Secondary) {
                self.check_promotion(n, volume, new);
            }
            let became_equal = old.is_some_and(|old| old.disk < DiskState::UpToDate)
                && new.disk == DiskState::UpToDate
                && new.pdsk == DiskState::UpToDate
                && new.conn >= Conn::Connected;
            if became_equal {
                self.histories_meet(volume);
                let was_target = old.is_some_and(|old| old.conn == Conn::SyncTarget);
                let peer = 1 - n;
                if was_target && self.is_alive(peer) && is_source(self.state(peer, volume).conn) {
                    // It has all that its peer wrote alone, and its peer's generation (GI-8).
                    self.since_sync[volume].alone.remove(&peer);
                }
            }
            match self.watch.states[n].get_mut(volume) {
                Some(known) => *known = new,
                None => self.watch.states[n].push(new),
            }
            self.check_two_primaries(volume);
        }
    }

    /// Notes when a connection begins and ends.
    fn note_connected(&mut self, n: usize, volume: usize, is_connected: bool) {
        let (_, end) = self.connected[n][volume];
        if is_connected == end.is_none() {
            return;
        }
        let moment = self.moment();
        let last = &mut self.connected[n][volume];
        *last = if is_connected { (moment, None) } else { (last.0, Some(moment)) };
    }

    /// ST-1.
    fn check_two_primaries(&self, volume: usize) {
        let is_primary = |n: usize| {
            self.is_alive(n)
                && self.state(n, volume).role == Role::Primary
                && self.state(n, volume).conn >= Conn::Connected
        };
        assert!(
            !(is_primary(A) && is_primary(B)),
            "ST-1: volume {volume}: both nodes are connected and Primary"
        );
    }

    /// FE-1: a device in use does not shrink, unless the operator has named the size.
    pub(crate) fn watch_size(&self, n: usize, volume: usize, sectors: u64) {
        let old = self.nodes[n].sizes[volume];
        let in_use = self.nodes[n].resource.as_ref().is_some_and(|resource| {
            resource.state(VolumeIx(nr(volume))).is_some_and(|s| s.role == Role::Primary)
        });
        let is_wanted = self.watch.least_size.is_some_and(|least| sectors >= least);
        assert!(
            !in_use || sectors == 0 || sectors >= old || is_wanted,
            "FE-1: node {n} volume {volume} shrinks from {old} to {sectors} while Primary"
        );
    }

    fn facts(&self, n: usize) -> Vec<Facts> {
        let status = self.status(n);
        let all = status.volumes.iter().enumerate().map(|(volume, status)| {
            let state = self.state(n, volume);
            let (role, disk, user_isp) = (state.role, state.disk, state.user_isp);
            Facts { role, disk, user_isp, uuids: status.uuids }
        });
        all.collect()
    }

    /// A command is about to be given.
    pub(crate) fn watch_command(&mut self, n: usize, id: u64, command: &Command) {
        let facts = self.facts(n);
        let is_role = matches!(command, Command::Primary { .. } | Command::Secondary { .. });
        let forces = matches!(command, Command::Primary { force: true });
        if let Command::Resize { size: Some(size), .. } = command {
            let least = self.watch.least_size.map_or(size.0, |least| least.min(size.0));
            self.watch.least_size = Some(least);
        }
        let name = command_name(command);
        let step = self.watch_step();
        self.watch.asked.insert((n, id), Asked { name, step, facts, is_role, forces });
    }

    /// Counts events and commands of both nodes: two equal numbers mean one call of the core.
    fn watch_step(&self) -> u64 {
        self.trace.count()
    }

    /// A command was answered.
    pub(crate) fn watch_reply(&mut self, n: usize, id: u64, result: &Result<Reply, Refusal>) {
        let Some(asked) = self.watch.asked.remove(&(n, id)) else { return };
        let how = match result {
            Ok(Reply::NothingToDo) => "nothing to do",
            Ok(Reply::Done | Reply::Status(_)) => "done",
            Err(_) => "refused",
        };
        self.coverage.add(Family::Command, &format!("{} {how}", asked.name));
        let facts = self.facts(n);
        if asked.is_role {
            let first = facts.first().map(|facts| facts.role);
            assert!(
                facts.iter().all(|facts| Some(facts.role) == first),
                "ST-4: the {} of node {n} was {how}, and its volumes have different roles: \
                 {facts:?} ({result:?})",
                asked.name
            );
        }
        // Another command may have had its turn in the same call.
        let is_only_one = !self.watch.asked.keys().any(|(node, _)| *node == n);
        if result.is_err() && asked.step == self.command_began && is_only_one {
            assert!(
                facts == asked.facts,
                "ST-7: the {} of node {n} was refused ({result:?}), but {:?} became {facts:?}",
                asked.name,
                asked.facts
            );
            self.coverage.add(Family::Check, "ST-7");
        }
    }

    /// ST-5: a node becomes Primary only with a good copy, unless the operator takes what there is.
    fn check_promotion(&mut self, n: usize, volume: usize, new: State) {
        let is_forced =
            self.watch.asked.iter().any(|((node, _), asked)| *node == n && asked.forces);
        let by_peer = new.conn >= Conn::Connected && new.pdsk == DiskState::UpToDate;
        assert!(
            is_forced || by_peer || new.disk == DiskState::UpToDate,
            "ST-5: node {n} was promoted without a good copy of volume {volume}: {new}"
        );
        self.coverage.add(Family::Check, "ST-5");
    }

    /// Notes of which volumes the peer gets everything at this moment. What an event from the peer,
    /// a disk or the driver lets the core answer was mirrored to it, also if the same call gives
    /// the peer up afterwards.
    pub(crate) fn note_mirrored(&mut self, n: usize, event: &Event<'_>) {
        let is_alive = self.nodes[n].resource.is_some() && !matches!(event, Event::Tick);
        let mut mirrored = std::mem::take(&mut self.was_mirrored);
        mirrored.clear();
        mirrored.extend((0..self.volumes()).map(|volume| {
            is_alive && {
                let state = self.state(n, volume);
                state.conn >= Conn::Connected && state.pdsk == DiskState::UpToDate
            }
        }));
        self.was_mirrored = mirrored;
    }

    /// What was not answered belongs to a process that is gone.
    pub(crate) fn watch_gone(&mut self, n: usize) {
        self.watch.asked.retain(|(node, _), _| *node != n);
        self.watch.receivers[n] = Receiver::default();
        self.watch.senders[n] = Sender::default();
        self.watch.states[n].clear();
        for volume in 0..self.volumes() {
            self.note_connected(n, volume, false);
        }
    }
}

const fn command_name(command: &Command) -> &'static str {
    match command {
        Command::Status => "status",
        Command::Upgrade => "upgrade",
        Command::Up => "up",
        Command::Down { force: false, .. } => "down",
        Command::Down { force: true, .. } => "down --force",
        Command::Attach(_) => "attach",
        Command::Detach { force: false, .. } => "detach",
        Command::Detach { force: true, .. } => "detach --force",
        Command::Connect { discard_my_data: false } => "connect",
        Command::Connect { discard_my_data: true } => "connect --discard-my-data",
        Command::Disconnect { force: false } => "disconnect",
        Command::Disconnect { force: true } => "disconnect --force",
        Command::Primary { force: false } => "primary",
        Command::Primary { force: true } => "primary --force",
        Command::Secondary { .. } => "secondary",
        Command::Invalidate(_) => "invalidate",
        Command::InvalidateRemote(_) => "invalidate-remote",
        Command::Resize { .. } => "resize",
        Command::Outdate => "outdate",
        Command::PauseSync(true) => "pause-sync",
        Command::PauseSync(false) => "resume-sync",
        Command::NewCurrentUuid { .. } => "new-current-uuid",
        Command::Adjust(_) => "adjust",
    }
}
