//! One node as its driver sees it: the core, its memory, its disks, its sockets.
//!
//! Actions are carried out exactly as the contract of the core says, in an order that chance
//! decides wherever the contract leaves it open: every disk operation takes its own time.

use std::collections::{BTreeMap, BTreeSet};

use replication_core::action::{Action, DiskOp, Handler};
use replication_core::control::{Refusal, Reply};
use replication_core::event::{DiskInfo, Event, OpId, SockGone, SockId, VolumeIx};
use replication_core::meta::al_journal::encode_initialised;
use replication_core::meta::{KnownSizes, Page, Superblock};
use replication_core::resource::{Memory, Resource};
use replication_core::units::{Buf, Errno, Sector, SectorRange, Span, Time};

use super::coverage::{self, Family};
use super::disk::{Cut, Disk, Kind, PAGE, PAGE_SECTORS, SECTOR, Trouble};
use super::host::Host;
use super::lent::Lent;
use super::rng::{Rng, mix};
use super::setup::NodeSetup;
use super::sockets::Reader;
use super::trace;
use super::world::{Happening, World};

/// The disks behind one volume.
#[derive(Debug)]
pub struct Backing {
    /// Data, and internal metadata.
    pub data: Disk,
    /// Metadata, if it has a device of its own.
    pub meta: Option<Disk>,
    /// The driver has it open.
    pub is_open: bool,
    /// Sizes of the data device that the driver remembers.
    pub known: KnownSizes,
}

impl Backing {
    /// The disk with the metadata.
    #[must_use]
    pub fn meta_disk(&self) -> &Disk {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    /// The disk with the metadata.
    pub fn meta_disk_mut(&mut self) -> &mut Disk {
        self.meta.as_mut().unwrap_or(&mut self.data)
    }
}

/// An operation on a disk that is under way.
#[derive(Debug)]
pub struct Job {
    id: OpId,
    volume: usize,
    work: Work,
    fails: Option<Errno>,
    /// Where a write lands, if not where it should.
    lands: Option<u64>,
    /// What a flush that is part of it will cover.
    flush_point: u64,
}

#[derive(Debug)]
enum Work {
    Open,
    Probe,
    Data { op: DiskOp, range: SectorRange, buf: Option<Buf>, sum: u64 },
    ReadMeta { sector: Sector, pages: u32 },
    WriteMeta { sector: Sector, page: Box<Page>, durable: bool },
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// The core while the process lives.
    pub resource: Option<Resource>,
    /// The node has power.
    pub has_power: bool,
    /// Number of the process, so that what belongs to an earlier one is recognised.
    pub incarnation: u32,
    /// Its options.
    pub setup: NodeSetup,
    /// The driver's memory.
    pub arena: Vec<u8>,
    /// Its disks.
    pub backing: Vec<Backing>,
    jobs: BTreeMap<u64, Job>,
    stuck: Vec<u64>,
    next_job: u64,
    pub(crate) readers: BTreeMap<SockId, Reader>,
    /// Memory that closed sockets may still be read from.
    pub(crate) lent: BTreeMap<SockId, Lent>,
    /// The listening socket is open.
    pub is_listening: bool,
    /// When the next tick is wanted.
    pub tick_at: Option<Time>,
    /// Exposed sizes in sectors.
    pub sizes: Vec<u64>,
    /// Answers to commands.
    pub replies: BTreeMap<u64, Result<Reply, Refusal>>,
    /// Log lines of all incarnations.
    pub log: Vec<String>,
    /// Handlers that were to run.
    pub handlers: Vec<Handler>,
    /// The process ended by itself.
    pub is_stopped: bool,
    /// The users of its devices.
    pub host: Host,
    /// How far its clock is ahead of the simulator's.
    pub clock: Span,
    /// The process is stopped until then.
    pub frozen_until: Option<Time>,
    /// Disk operations take this many times as long.
    pub slowness: u64,
    /// The next header that it sends arrives damaged.
    pub damages_header: bool,
    /// A bit of a packet that it sends arrives turned over: chance for which one, among those that
    /// a check covers.
    pub flips: Option<u64>,
    pub(crate) rng: Rng,
}

pub(crate) fn arena_range(buf: Buf, bytes: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(buf.0).expect("a page number") * PAGE;
    start..start + usize::try_from(bytes).expect("a request fits into memory")
}

/// Any odd number with many bits: multiplying by it loses nothing.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// A number that changes with any byte. Four words at a time, because most of what a run moves is
/// summed up twice.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let (rows, rest) = bytes.as_chunks::<32>();
    assert!(rest.is_empty(), "whole sectors only");
    let mut sums = [1_u64, 2, 3, 4];
    for row in rows {
        for (sum, word) in sums.iter_mut().zip(row.as_chunks::<8>().0) {
            *sum = (sum.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(ODD);
        }
    }
    sums.into_iter().fold(0, |all, sum| mix(all ^ sum))
}

impl Node {
    /// A node with fresh metadata on its disks and no process.
    #[must_use]
    pub fn new(setup: NodeSetup, rng: Rng) -> Self {
        let pages = setup.first_pool_page() + setup.pool_pages;
        let volumes = setup.config.volumes.len();
        let backing = setup.devices.iter().map(|devices| Backing {
            data: Disk::new(devices.data),
            meta: devices.meta.map(Disk::new),
            is_open: false,
            known: KnownSizes::default(),
        });
        let mut node = Self {
            resource: None,
            has_power: true,
            incarnation: 0,
            arena: vec![0; usize::try_from(pages).expect("a small arena") * PAGE],
            backing: backing.collect(),
            jobs: BTreeMap::new(),
            stuck: Vec::new(),
            next_job: 0,
            readers: BTreeMap::new(),
            lent: BTreeMap::new(),
            is_listening: false,
            tick_at: None,
            sizes: vec![0; volumes],
            replies: BTreeMap::new(),
            log: Vec::new(),
            handlers: Vec::new(),
            is_stopped: false,
            host: Host::new(volumes, setup.queue_depth),
            clock: Span::ZERO,
            frozen_until: None,
            slowness: 1,
            damages_header: false,
            flips: None,
            rng,
            setup,
        };
        for volume in 0..volumes {
            node.create_metadata(volume);
        }
        node
    }

    /// Writes fresh metadata, as the operator's tool would.
    pub fn create_metadata(&mut self, volume: usize) {
        let backing = &mut self.backing[volume];
        let meta = backing.meta.as_ref().map(Disk::sectors);
        let Some(geometry) = self.setup.geometry(volume, backing.data.sectors(), meta) else {
            return;
        };
        let disk = backing.meta_disk_mut();
        let mut page = Page::zeroed();
        encode_initialised(&mut page);
        for index in 0..geometry.al_blocks() {
            disk.write(geometry.al_block_sector(index).0, &page.0, true);
        }
        page.clear();
        for index in 0..geometry.bitmap_sectors / PAGE_SECTORS {
            disk.write(geometry.bitmap.0 + index * PAGE_SECTORS, &page.0, true);
        }
        Superblock::fresh(&geometry).encode(&mut page);
        disk.write(geometry.superblock.0, &page.0, true);
    }

    /// Starts the process.
    ///
    /// # Panics
    /// If one is running, or the configuration is refused.
    pub fn boot(&mut self) {
        assert!(self.resource.is_none(), "the process runs already");
        self.has_power = true;
        self.is_stopped = false;
        self.incarnation += 1;
        let memory = Memory {
            first_pool_page: self.setup.first_pool_page(),
            pool_pages: self.setup.pool_pages,
            queue_depth: self.setup.queue_depth,
        };
        let entropy = Box::new(self.rng.split());
        let config = self.setup.config.clone();
        #[cfg(feature = "mutants")]
        let resource = match self.setup.mutant {
            Some(mutant) => Resource::new_mutant(config, memory, entropy, mutant),
            None => Resource::new(config, memory, entropy),
        };
        #[cfg(not(feature = "mutants"))]
        let resource = Resource::new(config, memory, entropy);
        self.resource = Some(resource.expect("a valid setup"));
    }

    /// Ends the process from outside: what the driver held is gone.
    fn lose_process(&mut self) {
        self.resource = None;
        self.incarnation += 1;
        self.readers.clear();
        self.lent.clear();
        self.is_listening = false;
        self.tick_at = None;
        self.replies.clear();
        self.stuck.clear();
        self.damages_header = false;
        self.flips = None;
        self.frozen_until = None;
        self.sizes.fill(0);
        for backing in &mut self.backing {
            backing.is_open = false;
        }
    }

    /// Operations on disks that will not end by themselves.
    #[must_use]
    pub fn stuck(&self) -> usize {
        self.stuck.len()
    }

    /// Operations on disks that are under way.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.jobs.len()
    }

    /// Data writes under way on a volume.
    pub fn writes_under_way(&self, volume: usize) -> impl Iterator<Item = SectorRange> + '_ {
        self.jobs.values().filter(move |job| job.volume == volume).filter_map(|job| {
            match &job.work {
                Work::Data { op, range, .. } if writes_data(*op) => Some(*range),
                _ => None,
            }
        })
    }
}

/// Whether the operation changes the data.
const fn writes_data(op: DiskOp) -> bool {
    match op {
        DiskOp::Write { .. } | DiskOp::Discard | DiskOp::Zeroes { .. } => true,
        DiskOp::Read | DiskOp::Flush => false,
    }
}

const fn kind_of(op: DiskOp) -> Kind {
    match op {
        DiskOp::Read => Kind::Read,
        DiskOp::Write { .. } | DiskOp::Discard | DiskOp::Zeroes { .. } => Kind::Write,
        DiskOp::Flush => Kind::Flush,
    }
}

impl World {
    /// A metadata write of a node without a process lands on the superblock instead.
    ///
    /// # Panics
    /// If the volume has no disk.
    pub fn misdirect_onto_superblock(&mut self, n: usize, volume: usize) {
        let node = &mut self.nodes[n];
        let backing = &mut node.backing[volume];
        let meta = backing.meta.as_ref().map(Disk::sectors);
        let geometry = node.setup.geometry(volume, backing.data.sectors(), meta);
        let geometry = geometry.expect("a node with a disk");
        let disk = backing.meta_disk_mut();
        let mut page = [0; PAGE];
        disk.read(geometry.al_block_sector(0).0, &mut page);
        disk.write(geometry.superblock.0, &page, true);
    }

    /// Where the activity log of a node is.
    ///
    /// # Panics
    /// If the volume has no disk.
    #[must_use]
    pub fn log_area(&self, n: usize, volume: usize) -> SectorRange {
        let node = &self.nodes[n];
        let backing = &node.backing[volume];
        let meta = backing.meta.as_ref().map(Disk::sectors);
        let geometry = node.setup.geometry(volume, backing.data.sectors(), meta);
        let [_, log, _] = geometry.expect("a node with a disk").areas();
        log
    }

    /// A bit of the data of a node turns over by itself.
    pub fn rot(&mut self, n: usize, volume: usize, sector: u64, bit: usize) {
        self.nodes[n].backing[volume].data.rot(sector, bit);
        self.data_changed(volume, SectorRange { start: sector, end: sector + 1 });
    }

    /// A number that changes with any byte of the metadata of a volume.
    #[must_use]
    pub fn metadata_sums(&self, n: usize, volume: usize) -> u64 {
        let disk = self.nodes[n].backing[volume].meta_disk();
        let mut page = [0; PAGE];
        self.metadata_sectors(n, volume).into_iter().fold(0, |all, sector| {
            disk.read(sector, &mut page);
            mix(all ^ sum(&page))
        })
    }

    /// Stops the process for some time, as a signal would: its system goes on.
    pub fn freeze(&mut self, n: usize, span: Span) {
        self.note(n, &format!("=== stopped for {} ms", span.as_ms()));
        let until = self.now + span;
        self.nodes[n].frozen_until = Some(until);
        self.schedule(until, Happening::Thaw { node: n });
    }

    /// The clock of a node jumps ahead, as after a suspended virtual machine.
    pub fn jump_clock(&mut self, n: usize, span: Span) {
        self.note(n, &format!("=== clock {} ms ahead", span.as_ms()));
        let clock = &mut self.nodes[n].clock;
        *clock = Span(clock.0 + span.0);
        self.nodes[n].tick_at = None;
        if self.nodes[n].resource.is_some() {
            self.plan_tick(n);
        }
    }

    /// Kills the process: what it had finished stays, what was under way happened or not.
    pub fn kill(&mut self, n: usize) {
        self.note(n, "=== killed");
        self.host_gone(n);
        let jobs = std::mem::take(&mut self.nodes[n].jobs);
        for job in jobs.into_values() {
            let happens = self.nodes[n].rng.chance(50);
            if happens {
                self.apply(n, &job, false);
            }
        }
        self.nodes[n].lose_process();
        self.watch_gone(n);
        self.net.close_all(self.now, n);
        self.crashed(n);
    }

    /// Takes the power away: what is not durable is kept, lost or torn.
    pub fn power_cut(&mut self, n: usize, cut: Cut) {
        self.note(n, &format!("=== power cut ({cut:?})"));
        self.host_gone(n);
        let jobs = std::mem::take(&mut self.nodes[n].jobs);
        for job in jobs.into_values() {
            self.apply(n, &job, false);
        }
        self.nodes[n].lose_process();
        self.watch_gone(n);
        self.nodes[n].has_power = false;
        self.net.vanish(n);
        let mut changed: Vec<(usize, BTreeSet<u64>)> = Vec::new();
        let node = &mut self.nodes[n];
        for (volume, backing) in node.backing.iter_mut().enumerate() {
            changed.push((volume, backing.data.power_cut(cut, &mut node.rng)));
            if let Some(meta) = &mut backing.meta {
                meta.power_cut(cut, &mut node.rng);
            }
        }
        for (volume, pages) in changed {
            for page in pages {
                self.compare_block(volume, page);
            }
        }
        self.power_was_lost(n);
        self.crashed(n);
    }

    /// Starts the process again, without any command.
    pub fn boot(&mut self, n: usize) {
        self.note(n, "=== started");
        self.crashed_primary_returns(n);
        self.nodes[n].boot();
        self.watch_boot(n);
        self.net.revive(self.now, n);
    }

    /// Lets the core take an event in and carries out what it wants.
    pub fn handle(&mut self, n: usize, event: Event<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.note(n, &trace::event_words(&event));
        if let Some(name) = coverage::event_name(&event) {
            self.coverage.add(Family::Event, name);
        }
        self.watch_event(n, &event);
        self.note_mirrored(n, &event);
        let now = self.local(n);
        let Some(resource) = self.nodes[n].resource.as_mut() else {
            panic!("an event for node {n}, which has no process");
        };
        resource.handle(now, event, &mut actions);
        self.watch_states(n);
        for action in actions.drain(..) {
            self.note(n, &trace::action_words(&action));
            if let Some(name) = coverage::action_name(&action) {
                self.coverage.add(Family::Action, name);
            }
            self.carry_out(n, action);
        }
        self.actions = actions;
        self.plan_tick(n);
    }

    fn plan_tick(&mut self, n: usize) {
        let Some(resource) = &self.nodes[n].resource else { return };
        let clock = self.nodes[n].clock.0;
        let wanted = resource.next_deadline().map(|at| Time(at.0.saturating_sub(clock)));
        if wanted == self.nodes[n].tick_at {
            return;
        }
        self.nodes[n].tick_at = wanted;
        if let Some(at) = wanted {
            let incarnation = self.nodes[n].incarnation;
            // A deadline in the past is served at once, but time goes on.
            let at = at.max(self.now + Span(1_000));
            self.nodes[n].tick_at = Some(at);
            self.schedule(at, Happening::Tick { node: n, incarnation });
        }
    }

    fn carry_out(&mut self, n: usize, action: Action) {
        let has_ended = self.nodes[n].resource.is_none();
        assert!(!has_ended, "the end is the last word, but then node {n} wants {action:?}");
        match action {
            Action::OpenDisk { id, volume } => self.submit_job(n, id, volume, Work::Open),
            Action::ProbeDisk { id, volume } => self.submit_job(n, id, volume, Work::Probe),
            Action::CloseDisk { volume } => {
                let backing = &mut self.nodes[n].backing[volume.at()];
                assert!(backing.is_open, "a disk is closed that is not open");
                backing.is_open = false;
            }
            Action::Disk { id, volume, op, range, buf } => {
                self.submit_data(n, id, volume, op, range, buf);
            }
            Action::MetaRead { id, volume, sector, pages } => {
                assert!(sector.0.is_multiple_of(PAGE_SECTORS), "metadata is read in whole pages");
                self.submit_job(n, id, volume, Work::ReadMeta { sector, pages });
            }
            Action::MetaWrite { id, volume, sector, page, durable } => {
                self.check_meta_write(n, volume, sector);
                self.submit_job(n, id, volume, Work::WriteMeta { sector, page, durable });
            }
            Action::Listen(wanted) => self.nodes[n].is_listening = wanted,
            Action::Dial { dial } => self.dial(n, dial.0),
            Action::Send { sock, volume, packet, payload, kind } => {
                self.send(n, sock, volume, &packet, payload, kind);
            }
            Action::Close { sock } => self.sock_gone(n, sock, SockGone::Closed),
            Action::Complete { volume, tag, result } => self.completed(n, volume, tag, result),
            Action::SetSize { volume, sectors } => {
                self.watch_size(n, volume.at(), sectors.0);
                self.nodes[n].sizes[volume.at()] = sectors.0;
                self.size_changed(volume.at());
            }
            Action::Reply { id, result } => {
                self.watch_reply(n, id.0, &result);
                let old = self.nodes[n].replies.insert(id.0, result);
                assert!(old.is_none(), "command {} was answered twice", id.0);
            }
            Action::Log { level, scope, text } => {
                self.watch_log(&text);
                self.nodes[n].log.push(format!("{level:?} {scope:?}: {text}"));
            }
            Action::RunHandler { handler, .. } => self.nodes[n].handlers.push(handler),
            Action::Stop => self.stop(n),
            Action::Leave => self.leave(n),
        }
    }

    /// The process ends in mid-service: a kill that it has chosen the moment of.
    fn leave(&mut self, n: usize) {
        let replies = std::mem::take(&mut self.nodes[n].replies);
        self.kill(n);
        self.nodes[n].replies = replies;
        self.nodes[n].is_stopped = true;
    }

    fn stop(&mut self, n: usize) {
        self.host_gone(n);
        self.nodes[n].jobs.clear();
        let replies = std::mem::take(&mut self.nodes[n].replies);
        self.nodes[n].lose_process();
        self.nodes[n].replies = replies;
        self.watch_gone(n);
        self.nodes[n].is_stopped = true;
        self.net.close_all(self.now, n);
    }

    fn check_meta_write(&self, n: usize, volume: VolumeIx, sector: Sector) {
        assert!(sector.0.is_multiple_of(PAGE_SECTORS), "metadata is written in whole pages");
        let node = &self.nodes[n];
        let same = |job: &Job| {
            job.volume == volume.at()
                && matches!(&job.work, Work::WriteMeta { sector: other, .. } if *other == sector)
        };
        assert!(!node.jobs.values().any(same), "two writes of the metadata page {sector} at once");
        let meta = node.backing[volume.at()].meta.as_ref().map(Disk::sectors);
        // While a device grows, its metadata may be at the old place and at the new one.
        let inside = node.backing[volume.at()].known.iter().any(|data| {
            let geometry = node.setup.geometry(volume.at(), data.0, meta).expect("a disk is open");
            geometry.areas().iter().any(|a| (a.start..a.end).contains(&sector.0))
        });
        assert!(inside, "a metadata write outside of the metadata areas at {sector}");
    }

    fn submit_data(
        &mut self,
        n: usize,
        id: OpId,
        volume: VolumeIx,
        op: DiskOp,
        range: SectorRange,
        buf: Option<Buf>,
    ) {
        if writes_data(op) {
            self.watch_write(n, volume.at(), range, buf);
            let node = &self.nodes[n];
            let busy = node.writes_under_way(volume.at()).find(|other| other.overlaps(range));
            assert!(busy.is_none(), "write of {range} while {busy:?} is under way (ORD-5)");
        }
        let node = &self.nodes[n];
        let data = node.backing[volume.at()].data.sectors();
        let meta = node.backing[volume.at()].meta.as_ref().map(Disk::sectors);
        let geometry = node.setup.geometry(volume.at(), data, meta).expect("a disk is open");
        assert!(range.end <= geometry.capacity.0, "{op:?} of {range} beyond the data area");
        let sum = match (op, buf) {
            (DiskOp::Write { .. }, Some(buf)) => sum(&node.arena[arena_range(buf, range.bytes())]),
            (DiskOp::Write { .. } | DiskOp::Read, None) => panic!("{op:?} without memory"),
            _ => 0,
        };
        self.submit_job(n, id, volume, Work::Data { op, range, buf, sum });
    }

    fn submit_job(&mut self, n: usize, id: OpId, volume: VolumeIx, work: Work) {
        let node = &mut self.nodes[n];
        let backing = &mut node.backing[volume.at()];
        let is_open = matches!(work, Work::Open);
        assert!(is_open != backing.is_open, "disk open: {}, wanted: {work:?}", backing.is_open);
        let (kind, range, of_meta) = match &work {
            Work::Open | Work::Probe => (None, SectorRange::default(), false),
            Work::Data { op, range, .. } => (Some(kind_of(*op)), *range, false),
            Work::ReadMeta { sector, pages } => {
                let end = sector.0 + u64::from(*pages) * PAGE_SECTORS;
                (Some(Kind::MetaRead), SectorRange { start: sector.0, end }, true)
            }
            Work::WriteMeta { sector, .. } => {
                let end = sector.0 + PAGE_SECTORS;
                (Some(Kind::MetaWrite), SectorRange { start: sector.0, end }, true)
            }
        };
        let disk = if of_meta { backing.meta_disk_mut() } else { &mut backing.data };
        let flush_point = disk.flush_point();
        let trouble = kind.and_then(|kind| disk.trouble(kind, range));
        let (fails, lands) = match trouble {
            Some(Trouble::Fail(errno)) => (Some(errno), None),
            Some(Trouble::Misdirect(sector)) => (None, Some(sector)),
            Some(Trouble::Stick) | None => (None, None),
        };
        let job = node.next_job;
        node.next_job += 1;
        node.jobs.insert(job, Job { id, volume: volume.at(), work, fails, lands, flush_point });
        // A disk that says nothing is as good as any to whoever cannot look behind it.
        if trouble.is_some() && lands.is_none() {
            self.disk_broke(n, volume.at());
        }
        let node = &mut self.nodes[n];
        if trouble == Some(Trouble::Stick) {
            node.stuck.push(job);
            return;
        }
        let (least, most) = node.setup.disk_time;
        let at = self.now + Span(node.rng.between(least.0, most.0) * node.slowness);
        let incarnation = node.incarnation;
        self.schedule(at, Happening::DiskReady { node: n, incarnation, job });
    }

    /// Lets stuck operations go on, and takes planned faults away.
    pub fn heal_disks(&mut self, n: usize) {
        self.nodes[n].slowness = 1;
        for backing in &mut self.nodes[n].backing {
            backing.data.heal();
            if let Some(meta) = &mut backing.meta {
                meta.heal();
            }
        }
        let incarnation = self.nodes[n].incarnation;
        for job in std::mem::take(&mut self.nodes[n].stuck) {
            self.schedule(self.now, Happening::DiskReady { node: n, incarnation, job });
        }
    }

    /// A disk operation ends.
    pub(crate) fn disk_ready(&mut self, n: usize, number: u64) {
        let mut job = self.nodes[n].jobs.remove(&number).expect("a job ends once");
        if let Work::Data { op: DiskOp::Write { .. }, range, buf: Some(buf), sum: before } =
            job.work
        {
            let after = sum(&self.nodes[n].arena[arena_range(buf, range.bytes())]);
            assert!(after == before, "memory of a disk write of {range} changed meanwhile (ORD-6)");
        }
        match job.fails {
            None => self.apply(n, &job, true),
            Some(_) => self.apply_partly(n, &job),
        }
        let result = job.fails.map_or(Ok(()), Err);
        let id = job.id;
        if let Work::Data { op, range, buf, .. } = job.work
            && writes_data(op)
        {
            self.watch_written(n, job.volume, range, buf, result.is_ok());
        }
        match job.work {
            Work::Open | Work::Probe => {
                let info = self.open_disk(n, job.volume, matches!(job.work, Work::Open));
                self.handle(n, Event::DiskOpened { id, result: Ok(info) });
            }
            Work::Data { op, range, buf, .. } => {
                if let (DiskOp::Read, Some(buf), Ok(())) = (op, buf, result) {
                    let node = &mut self.nodes[n];
                    let out = &mut node.arena[arena_range(buf, range.bytes())];
                    node.backing[job.volume].data.read(range.start, out);
                }
                self.handle(n, Event::DiskDone { id, result });
            }
            Work::ReadMeta { sector, pages } => match result {
                Ok(()) => {
                    let read = self.read_meta(n, job.volume, sector, pages);
                    self.handle(n, Event::MetaRead { id, result: Ok(&read) });
                }
                Err(errno) => self.handle(n, Event::MetaRead { id, result: Err(errno) }),
            },
            Work::WriteMeta { ref mut page, .. } => {
                let page = std::mem::replace(page, Page::zeroed());
                self.handle(n, Event::MetaWritten { id, page, result });
            }
        }
    }

    fn open_disk(&mut self, n: usize, volume: usize, is_attach: bool) -> DiskInfo {
        let configured = self.nodes[n].setup.config.volumes[volume].disk.size;
        let backing = &mut self.nodes[n].backing[volume];
        backing.is_open = true;
        if is_attach {
            backing.remember_seen(configured);
        } else {
            backing.remember_expected();
        }
        DiskInfo {
            data_sectors: Sector(backing.data.sectors()),
            meta_sectors: Sector(backing.meta_disk().sectors()),
            meta_on_data_device: backing.meta.is_none(),
            logical_block_size: 512,
            physical_block_size: 4096,
            discard: true,
        }
    }

    fn read_meta(&self, n: usize, volume: usize, sector: Sector, pages: u32) -> Vec<Page> {
        let disk = self.nodes[n].backing[volume].meta_disk();
        let read = (0..u64::from(pages)).map(|index| {
            let mut page = Page([0; PAGE]);
            disk.read(sector.0 + index * PAGE_SECTORS, &mut page.0);
            page
        });
        read.collect()
    }

    /// What an operation does to the disk. If it has not `finished` (a crash came first), nothing
    /// of it is durable.
    fn apply(&mut self, n: usize, job: &Job, finished: bool) {
        let node = &mut self.nodes[n];
        let backing = &mut node.backing[job.volume];
        match &job.work {
            Work::Open
            | Work::Probe
            | Work::ReadMeta { .. }
            | Work::Data { op: DiskOp::Read, .. } => {}
            Work::Data { op: DiskOp::Write { fua }, range, buf, .. } => {
                let buf = buf.expect("checked at submission");
                let bytes = &node.arena[arena_range(buf, range.bytes())];
                let start = job.lands.unwrap_or(range.start);
                backing.data.write(start, bytes, *fua && finished);
                self.data_changed(job.volume, SectorRange { start, end: start + range.sectors() });
            }
            Work::Data { op: DiskOp::Flush, .. } => {
                if finished {
                    backing.data.flush(job.flush_point);
                }
            }
            Work::Data { op: DiskOp::Discard | DiskOp::Zeroes { .. }, range, .. } => {
                backing.data.zero(*range);
                self.data_changed(job.volume, *range);
            }
            Work::WriteMeta { sector, page, durable } => {
                // The flush comes first: without it nothing of the page is on its way.
                let is_flushed = *durable && (finished || node.rng.chance(50));
                let disk = backing.meta_disk_mut();
                if is_flushed {
                    disk.flush(job.flush_point);
                }
                if is_flushed || !*durable {
                    let at = job.lands.unwrap_or(sector.0);
                    disk.write(at, &page.0, *durable && finished);
                }
            }
        }
    }

    /// A failed write leaves some of its sectors.
    fn apply_partly(&mut self, n: usize, job: &Job) {
        let node = &mut self.nodes[n];
        let backing = &mut node.backing[job.volume];
        match &job.work {
            Work::Data { op: DiskOp::Write { .. }, range, buf: Some(buf), .. } => {
                let bytes = &node.arena[arena_range(*buf, range.bytes())];
                for (sector, part) in (range.start..).zip(bytes.chunks(SECTOR)) {
                    if node.rng.chance(50) {
                        backing.data.write(sector, part, false);
                    }
                }
                self.data_changed(job.volume, *range);
            }
            Work::WriteMeta { sector, page, .. } => {
                for (sector, part) in (sector.0..).zip(page.0.chunks(SECTOR)) {
                    if node.rng.chance(50) {
                        backing.meta_disk_mut().write(sector, part, false);
                    }
                }
            }
            Work::Open | Work::Probe | Work::ReadMeta { .. } | Work::Data { .. } => {}
        }
    }

    pub(crate) fn data_changed(&mut self, volume: usize, range: SectorRange) {
        let blocks = range.blocks_outward();
        for block in blocks.start..blocks.end {
            self.compare_block(volume, block);
        }
    }
}
