//! The users of the devices: what they ask for, and whether it was answered rightly.
//!
//! Every request is answered exactly once (ACK-3); reads return contents that the ledger allows
//! (RD-1); the memory of a request belongs to the host again with its answer, and is overwritten
//! then, so that any later use of it shows (ORD-6).

use std::collections::BTreeMap;

use replication_core::event::{Event, HostOp, HostRequest, HostTag, VolumeIx};
use replication_core::state::{Conn, Disk as DiskState, Role};
use replication_core::units::{Buf, Errno, SectorRange, Span, Time};

use super::disk::{PAGE, SECTOR};
use super::ledger::{Write, stamp};
use super::watch::is_source;
use super::world::{Happening, World};

/// A request that was not yet answered.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    number: u64,
    op: HostOp,
    range: SectorRange,
    write: Option<Write>,
    moment: u64,
    since: Time,
    of_load: bool,
}

/// The users of one node's devices.
#[derive(Debug)]
pub struct Host {
    slots: Vec<Vec<Option<Outstanding>>>,
    answers: BTreeMap<u64, Result<(), Errno>>,
    next_number: u64,
    /// Random requests, as long as wanted.
    pub load: Option<Load>,
    /// The longest time that a request has taken.
    pub slowest: Span,
    /// Requests answered with success.
    pub successes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A stream of random requests.
#[derive(Clone, Debug)]
pub struct Load {
    /// Volumes in use.
    pub volumes: usize,
    /// Requests at a time.
    pub depth: usize,
    /// Where. Requests stay inside of one area.
    pub areas: Vec<SectorRange>,
    /// Largest request in sectors.
    pub most_sectors: u64,
    /// Average time between two requests.
    pub think: Span,
    /// Reads in a hundred requests.
    pub reads: u64,
    /// Flushes in a hundred requests.
    pub flushes: u64,
    /// Discards and writes of zeroes in a hundred requests.
    pub zeroes: u64,
    /// FUA in a hundred writes.
    pub fua: u64,
    /// Requests until the stream dries up.
    pub most: u64,
}

impl Load {
    /// Writes and some of everything else, in these areas.
    #[must_use]
    pub fn mixed(areas: Vec<SectorRange>) -> Self {
        Self {
            volumes: 1,
            depth: 4,
            areas,
            most_sectors: 64,
            think: Span::from_ms(1),
            reads: 25,
            flushes: 5,
            zeroes: 5,
            fua: 10,
            most: u64::MAX,
        }
    }

    /// Writes only.
    #[must_use]
    pub fn writes(areas: Vec<SectorRange>) -> Self {
        Self { reads: 0, flushes: 0, zeroes: 0, fua: 0, ..Self::mixed(areas) }
    }
}

impl Host {
    /// Users of this many volumes.
    #[must_use]
    pub fn new(volumes: usize, queue_depth: u16) -> Self {
        Self {
            slots: vec![vec![None; usize::from(queue_depth)]; volumes],
            answers: BTreeMap::new(),
            next_number: 0,
            load: None,
            slowest: Span::ZERO,
            successes: 0,
            errors: 0,
        }
    }

    /// Requests that were not yet answered.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.slots.iter().flatten().flatten().count()
    }

    /// The age of the oldest request that was not yet answered.
    #[must_use]
    pub fn oldest(&self, now: Time) -> Span {
        let ages = self.slots.iter().flatten().flatten().map(|request| now.since(request.since));
        ages.max().unwrap_or(Span::ZERO)
    }

    /// The requests that were not yet answered, in words.
    #[must_use]
    pub fn words(&self, now: Time) -> Vec<String> {
        let all = self.slots.iter().enumerate().flat_map(|(volume, slots)| {
            slots.iter().flatten().map(move |request| (volume, request))
        });
        all.map(|(volume, request)| {
            let age = now.since(request.since).as_ms();
            format!("volume {volume} {:?} {} for {age} ms", request.op, request.range)
        })
        .collect()
    }
}

impl World {
    fn slot_buf(&self, n: usize, volume: usize, tag: u16) -> Buf {
        let setup = &self.nodes[n].setup;
        let volume = u32::try_from(volume).expect("few volumes");
        Buf((volume * u32::from(setup.queue_depth) + u32::from(tag)) * setup.slot_pages)
    }

    fn slot_bytes(&self, n: usize, volume: usize, tag: u16) -> std::ops::Range<usize> {
        let start = usize::try_from(self.slot_buf(n, volume, tag).0).expect("a page number") * PAGE;
        let pages = usize::try_from(self.nodes[n].setup.slot_pages).expect("a few pages");
        start..start + pages * PAGE
    }

    /// Asks for something; returns the number of the request, or `None` if no slot is free.
    ///
    /// # Panics
    /// If the request does not fit into a slot.
    pub fn submit(
        &mut self,
        n: usize,
        volume: usize,
        op: HostOp,
        range: SectorRange,
    ) -> Option<u64> {
        self.submit_as(n, volume, op, range, false)
    }

    fn submit_as(
        &mut self,
        n: usize,
        volume: usize,
        op: HostOp,
        range: SectorRange,
        of_load: bool,
    ) -> Option<u64> {
        let free = self.nodes[n].host.slots[volume].iter().position(Option::is_none)?;
        let tag = u16::try_from(free).expect("a slot number");
        let moment = self.moment();
        let write = match op {
            HostOp::Read | HostOp::Flush => None,
            HostOp::Write { .. } => Some(false),
            HostOp::Discard | HostOp::WriteZeroes { .. } => Some(true),
        };
        let volume_nr = u8::try_from(volume).expect("few volumes");
        let write = write.map(|zeroes| Write {
            version: self.ledger.new_version(),
            volume: volume_nr,
            range,
            zeroes,
        });
        if let Some(write) = write {
            self.ledger.submitted(write, moment);
            if self.state(n, volume).role == Role::Primary {
                self.wrote(n, volume);
            }
        }
        let bytes = self.slot_bytes(n, volume, tag);
        let memory = &mut self.nodes[n].arena[bytes];
        if let (HostOp::Write { .. }, Some(write)) = (op, write) {
            let length = usize::try_from(range.bytes()).expect("a small request");
            assert!(length <= memory.len(), "a request of {range} does not fit into its slot");
            for (sector, part) in (range.start..).zip(memory[..length].chunks_mut(SECTOR)) {
                stamp(part, volume_nr, sector, write.version);
            }
        }
        let host = &mut self.nodes[n].host;
        host.next_number += 1;
        let number = host.next_number;
        let since = self.now;
        host.slots[volume][free] =
            Some(Outstanding { number, op, range, write, moment, since, of_load });
        let buf = self.slot_buf(n, volume, tag);
        let ix = VolumeIx(volume_nr);
        let request = HostRequest { volume: ix, tag: HostTag(tag), op, range, buf };
        self.handle(n, Event::Host(request));
        Some(number)
    }

    /// The core answers a request.
    pub(crate) fn completed(
        &mut self,
        n: usize,
        volume: VolumeIx,
        tag: HostTag,
        result: Result<(), Errno>,
    ) {
        let at = volume.at();
        let slot = &mut self.nodes[n].host.slots[at][usize::from(tag.0)];
        let Some(request) = slot.take() else {
            panic!("volume {at} tag {} is answered, but nobody waits for it (ACK-3)", tag.0);
        };
        let moment = self.moment();
        match request.write {
            Some(write) => {
                let fua = matches!(request.op, HostOp::Write { fua: true });
                let is_sure = (fua || !self.leans_on_lost_power(n, at, request.moment))
                    && request.moment >= self.since_sync[at].unsure_before;
                self.ledger.ended(write, moment, result.is_ok() && is_sure, fua);
                if result.is_ok() {
                    self.acknowledged(n, at);
                    self.watch_acknowledged(n, write);
                }
            }
            None if request.op == HostOp::Flush && result.is_ok() => {
                self.ledger.flushed(volume.0, request.moment);
            }
            None if request.op == HostOp::Read && result.is_ok() => {
                self.check_read(n, volume.0, tag.0, &request, moment);
            }
            None => {}
        }
        let bytes = self.slot_bytes(n, at, tag.0);
        self.nodes[n].arena[bytes].fill(0xdb);
        let now = self.now;
        let host = &mut self.nodes[n].host;
        host.slowest = host.slowest.max(now.since(request.since));
        if result.is_ok() {
            host.successes += 1;
        } else {
            host.errors += 1;
        }
        if !request.of_load {
            host.answers.insert(request.number, result);
        }
    }

    /// Whether the good copy of what is acknowledged now was in the cache of a peer that has lost
    /// power since it was asked for: its word may come in after the power cut that it did not
    /// survive, which is a second fault.
    fn leans_on_lost_power(&self, n: usize, volume: usize, submitted: u64) -> bool {
        self.stale[n][volume] && submitted < self.lost_power_at[1 - n]
    }

    /// Whether a read tells nothing about what the good copy holds. With a disk that is none, a
    /// Primary reads its peer's data, or what it has written to both disks. The peer has lost
    /// power, and with it what was in its cache: the only good copy is as safe as a single disk,
    /// and only a flush, which waits for it, makes a write safe there (DUR-1). Until the Primary
    /// notices the loss it still returns what it has; then it marks whatever the peer has not
    /// confirmed as durable, and returns it no more (RD-2). What is read after that binds again.
    fn reads_what_lost_power(&self, n: usize, volume: usize, submitted: u64) -> bool {
        let (begin, end) = self.connected[n][volume];
        self.state(n, volume).disk != DiskState::UpToDate
            && self.lost_power_at[1 - n] > begin
            && end.is_none_or(|end| submitted < end)
    }

    fn check_read(&mut self, n: usize, volume: u8, tag: u16, request: &Outstanding, now: u64) {
        let binds = !self.reads_what_lost_power(n, usize::from(volume), request.moment);
        let start = self.slot_bytes(n, usize::from(volume), tag).start;
        let length = usize::try_from(request.range.bytes()).expect("a small request");
        let bytes = self.nodes[n].arena[start..start + length].to_vec();
        for (sector, part) in (request.range.start..).zip(bytes.chunks(SECTOR)) {
            if let Err(why) = self.ledger.check(volume, sector, part, request.moment) {
                panic!("read on node {n} (RD-1): {why}");
            }
            if binds {
                self.ledger.seen(volume, sector, part, (request.moment, now));
            }
        }
    }

    /// A write was acknowledged: does the peer have it?
    fn acknowledged(&mut self, n: usize, volume: usize) {
        let ix = VolumeIx(u8::try_from(volume).expect("few volumes"));
        let resource = self.nodes[n].resource.as_ref().expect("it just answered");
        let state = resource.state(ix).expect("a volume of the setup");
        let mirrored = self.was_mirrored[volume]
            || state.conn >= Conn::Connected && state.pdsk == DiskState::UpToDate;
        if !mirrored {
            self.stale[1 - n][volume] = true;
            if !(is_source(state.conn) && self.has_ended_resync(1 - n, volume)) {
                self.since_sync[volume].alone.insert(n);
            }
        }
        // With a disk that is no good copy, the peer has confirmed it before the connection was
        // lost.
        let is_alone = state.conn < Conn::Connected && !self.was_mirrored[volume];
        if is_alone && state.disk == DiskState::UpToDate {
            self.wrote_apart(n, volume);
        }
        if state.disk != DiskState::UpToDate {
            self.stale[n][volume] = true;
        }
    }

    /// Whether a node is done with a resync, of which its source need not have heard yet. What is
    /// mirrored to it meanwhile is not written alone.
    fn has_ended_resync(&self, n: usize, volume: usize) -> bool {
        self.is_alive(n) && {
            let state = self.state(n, volume);
            state.conn == Conn::Connected && state.disk == DiskState::UpToDate
        }
    }

    /// The process is gone: nobody will answer what is outstanding.
    pub(crate) fn host_gone(&mut self, n: usize) {
        let moment = self.moment();
        let host = &mut self.nodes[n].host;
        host.load = None;
        host.answers.clear();
        for slot in host.slots.iter_mut().flatten() {
            if let Some(Outstanding { write: Some(write), .. }) = slot.take() {
                self.ledger.ended(write, moment, false, false);
            }
        }
    }

    /// The answer to a request, if it has come.
    #[must_use]
    pub fn answer(&self, n: usize, number: u64) -> Option<Result<(), Errno>> {
        self.nodes[n].host.answers.get(&number).copied()
    }

    /// Asks for something and waits for the answer.
    pub fn request(
        &mut self,
        n: usize,
        volume: usize,
        op: HostOp,
        range: SectorRange,
    ) -> Result<(), Errno> {
        let number = self.submit(n, volume, op, range).expect("a slot is free");
        let what = format!("answer to {op:?} of {range} on node {n}");
        self.run_until(&what, Span::from_secs(120), |w| w.answer(n, number).is_some());
        self.answer(n, number).expect("it was just seen")
    }

    /// Writes, and waits for success.
    pub fn write(&mut self, n: usize, volume: usize, start: u64, sectors: u64) {
        let range = SectorRange { start, end: start + sectors };
        let result = self.request(n, volume, HostOp::Write { fua: false }, range);
        assert!(result.is_ok(), "write of {range} on node {n}: {result:?}");
    }

    /// Reads, and waits for success. The contents are checked against the ledger.
    pub fn read(&mut self, n: usize, volume: usize, start: u64, sectors: u64) {
        let range = SectorRange { start, end: start + sectors };
        let result = self.request(n, volume, HostOp::Read, range);
        assert!(result.is_ok(), "read of {range} on node {n}: {result:?}");
    }

    /// Flushes, and waits for success.
    pub fn flush(&mut self, n: usize, volume: usize) {
        let result = self.request(n, volume, HostOp::Flush, SectorRange::default());
        assert!(result.is_ok(), "flush on node {n}: {result:?}");
    }

    /// Reads everything that was ever written.
    pub fn read_all(&mut self, n: usize, volume: usize) {
        let sectors: Vec<u64> = self.ledger.sectors_of(volume).collect();
        let most = u64::from(self.nodes[n].setup.slot_pages) * 8;
        let mut at = 0;
        while let Some(&start) = sectors.get(at) {
            let run = (at..sectors.len()).take_while(|i| sectors[*i] == start + (i - at) as u64);
            let length = (run.count() as u64).min(most);
            self.read(n, volume, start, length);
            at += usize::try_from(length).expect("a small request");
        }
    }

    /// Starts a stream of random requests.
    pub fn start_load(&mut self, n: usize, load: Load) {
        let fresh = self.nodes[n].host.load.replace(load).is_none();
        if fresh {
            self.schedule(self.now, Happening::Load { node: n });
        }
    }

    /// No more random requests; those under way go on.
    pub fn stop_load(&mut self, n: usize) {
        self.nodes[n].host.load = None;
    }

    /// Ends the random requests and waits for their answers.
    pub fn drain(&mut self, n: usize) {
        self.stop_load(n);
        let what = format!("answers to all requests on node {n}");
        self.run_until(&what, Span::from_secs(120), |w| w.nodes[n].host.outstanding() == 0);
    }

    /// The time has come for another random request.
    pub(crate) fn load_tick(&mut self, n: usize) {
        let Some(load) = self.nodes[n].host.load.clone() else { return };
        if self.nodes[n].resource.is_none() || load.most == 0 {
            self.nodes[n].host.load = None;
            return;
        }
        let wait = Span(self.rng.below(2 * load.think.0 + 1));
        self.schedule(self.now + wait, Happening::Load { node: n });
        if self.nodes[n].host.outstanding() >= load.depth {
            return;
        }
        let volume = usize::try_from(self.rng.below(load.volumes as u64)).expect("few volumes");
        if let Some((op, range)) = self.random_request(n, volume, &load) {
            if let Some(load) = &mut self.nodes[n].host.load {
                load.most -= 1;
            }
            self.submit_as(n, volume, op, range, true);
        }
    }

    fn random_request(
        &mut self,
        n: usize,
        volume: usize,
        load: &Load,
    ) -> Option<(HostOp, SectorRange)> {
        let size = self.nodes[n].sizes[volume];
        let rng = &mut self.rng;
        let area = load.areas[usize::try_from(rng.below(load.areas.len() as u64)).ok()?];
        let area = SectorRange { start: area.start, end: area.end.min(size) };
        if area.is_empty() {
            return None;
        }
        let slot = u64::from(self.nodes[n].setup.slot_pages) * 8;
        let most = load.most_sectors.min(area.sectors()).min(slot);
        let mut length = rng.between(1, most);
        let mut start = area.start + rng.below(area.sectors() - length + 1);
        if rng.chance(60) {
            start -= start % 8;
            length = length.next_multiple_of(8).min(area.end - start);
        }
        let range = SectorRange { start, end: start + length };
        let dice = rng.below(100);
        if dice < load.reads {
            Some((HostOp::Read, range))
        } else if dice < load.reads + load.flushes {
            Some((HostOp::Flush, SectorRange::default()))
        } else if dice < load.reads + load.flushes + load.zeroes {
            let unmap = rng.chance(50);
            let op = if rng.chance(50) { HostOp::Discard } else { HostOp::WriteZeroes { unmap } };
            Some((op, range))
        } else {
            Some((HostOp::Write { fua: rng.chance(load.fua) }, range))
        }
    }
}
