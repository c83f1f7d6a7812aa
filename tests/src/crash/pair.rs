//! One or two production cores, their disks and the link between them, driven step by step.
//!
//! A step is the end of one disk operation, the delivery of one packet, or one notice to a core;
//! which of the possible steps comes next is decided by a seed. Timers run only when nothing else
//! can happen. There are no faults here but the crash that is looked at after every step: the
//! simulator has the others.

use std::collections::{BTreeMap, VecDeque};

use replication_core::action::{Action, DiskOp};
use replication_core::control::{Command, Refusal, Reply};
use replication_core::event::{
    CommandId, DialId, DiskInfo, Event, HostOp, HostRequest, HostTag, OpId, SockGone, SockId,
    VolumeIx,
};
use replication_core::meta::Page;
use replication_core::resource::{Memory, Resource};
use replication_core::state::{Conn, Disk, Role, State};
use replication_core::units::{Buf, Errno, Sector as SectorNr, SectorRange, Span, Time};
use replication_core::wire::{self, BodyPlan, DecodeError, Header, Packet};

use super::ledger::{Ledger, stamp};
use super::medium::{Device, Image, Medium, SECTOR};
use crate::sim::rng::Rng;
use crate::sim::setup::NodeSetup;

const PAGE: usize = 4096;
const VOLUME: VolumeIx = VolumeIx(0);
const ECONNREFUSED: Errno = Errno(111);

/// What the disk does to carry out an operation.
#[derive(Debug)]
enum Work {
    Open,
    Read { range: SectorRange, buf: Buf },
    Write { number: u64 },
    Flush { covered: Vec<u64> },
    ReadMeta { sector: u64, pages: u32 },
    WriteMeta { number: u64, page: Box<Page> },
}

#[derive(Debug)]
struct Job {
    id: OpId,
    work: Work,
}

/// Something that a core will be told.
#[derive(Debug)]
enum Notice {
    Sent(SockId, u64),
    Gone(SockId, SockGone),
    Dialed(DialId, Result<SockId, Errno>),
    Accepted(SockId),
}

/// The end of a connection at one node; the other end has the same number.
#[derive(Debug, Default)]
struct Sock {
    inbox: Vec<u8>,
    sent: u64,
    /// The other end is closed.
    ended: bool,
}

/// A request of the host that was not yet answered.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Its number.
    pub number: u64,
    /// What.
    pub op: HostOp,
    /// Where.
    pub range: SectorRange,
    /// How many requests had been answered when it was submitted.
    answered: u64,
    /// The peer was mirrored to then.
    mirrored: bool,
}

/// One node: a core, its memory, its disk.
#[derive(Debug)]
pub struct Node {
    /// The core.
    pub resource: Resource,
    /// Its options.
    pub setup: NodeSetup,
    /// Its disk.
    pub medium: Medium,
    /// The size of its data device now.
    pub data_sectors: u64,
    /// Log lines.
    pub log: Vec<String>,
    /// Requests of the host under way.
    pub asked: Vec<Option<Asked>>,
    /// The exposed size in sectors.
    pub size: u64,
    /// A write of this node's host got to its disk.
    pub host_wrote: bool,
    arena: Vec<u8>,
    jobs: Vec<Job>,
    notices: VecDeque<Notice>,
    socks: BTreeMap<SockId, Sock>,
    is_listening: bool,
    replies: BTreeMap<u64, Result<Reply, Refusal>>,
    /// What it asked of the peer: sector, name, bytes. A barrier has its name alone.
    pub wanted: Vec<(u64, u64, u32)>,
    /// Blocks of mirrored writes of the open epoch, and of those whose end is not acknowledged.
    epochs: VecDeque<(Option<u32>, Vec<SectorRange>)>,
}

/// One or two nodes.
#[derive(Debug)]
pub struct Pair {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// What the hosts wrote.
    pub ledger: Ledger,
    /// Chance.
    pub rng: Rng,
    /// New connections come about.
    pub link_up: bool,
    /// Packets that were none.
    pub garbage: u64,
    /// What happened, for reports.
    pub trace: Vec<String>,
    is_parted: bool,
    now: Time,
    next: u64,
    answered: u64,
}

/// The next thing that can happen.
#[derive(Clone, Copy, Debug)]
enum Step {
    Job(usize, usize),
    Notice(usize),
    Deliver(usize, SockId),
}

fn bytes_of(buf: Buf, bytes: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(buf.0).expect("a page number") * PAGE;
    start..start + usize::try_from(bytes).expect("a request fits into memory")
}

/// What there is to read on a socket.
enum Arrived {
    /// Not enough for a packet, or the core does not want to read.
    Nothing,
    /// The end, maybe in the middle of a packet.
    End,
    /// Bytes that are no packet.
    Garbage(DecodeError),
    /// A packet; its payload may be cut short by the end of the stream.
    Packet(Header, BodyPlan, Packet),
}

impl Node {
    /// The open sockets.
    pub fn socks(&self) -> impl Iterator<Item = SockId> + '_ {
        self.socks.keys().copied()
    }

    /// Operations of its disk under way.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.jobs.len()
    }

    fn arrived(&self, sock: SockId) -> Arrived {
        let end = &self.socks[&sock];
        let short = if end.ended { Arrived::End } else { Arrived::Nothing };
        let size = self.resource.header_size(sock);
        if end.inbox.len() < size {
            return short;
        }
        if !self.resource.may_receive(sock) {
            return Arrived::Nothing;
        }
        let (header, plan) = match self.resource.plan(sock, &end.inbox[..size]) {
            Ok(planned) => planned,
            Err(error) => return Arrived::Garbage(error),
        };
        let Some(fixed) = end.inbox.get(size..size + plan.fixed) else { return short };
        let whole = u32::try_from(end.inbox.len() - size - plan.fixed)
            .is_ok_and(|there| there >= plan.payload);
        if !whole && !end.ended {
            return Arrived::Nothing;
        }
        match self.resource.decode(sock, &header, fixed) {
            Ok(packet) => Arrived::Packet(header, plan, packet),
            Err(error) => Arrived::Garbage(error),
        }
    }

    fn new(setup: NodeSetup, image: Image, rng: &mut Rng) -> Self {
        let memory = Memory {
            first_pool_page: setup.first_pool_page(),
            pool_pages: setup.pool_pages,
            queue_depth: setup.queue_depth,
        };
        let pages = usize::try_from(memory.first_pool_page + memory.pool_pages).expect("few");
        let config = setup.config.clone();
        let entropy = Box::new(rng.split());
        #[cfg(feature = "mutants")]
        let resource = match setup.mutant {
            Some(mutant) => Resource::new_mutant(config, memory, entropy, mutant),
            None => Resource::new(config, memory, entropy),
        };
        #[cfg(not(feature = "mutants"))]
        let resource = Resource::new(config, memory, entropy);
        Self {
            resource: resource.expect("a valid setup"),
            medium: Medium::new(image),
            data_sectors: setup.devices[0].data,
            log: Vec::new(),
            asked: vec![None; usize::from(setup.queue_depth)],
            size: 0,
            host_wrote: false,
            arena: vec![0; pages * PAGE],
            jobs: Vec::new(),
            notices: VecDeque::new(),
            socks: BTreeMap::new(),
            is_listening: false,
            replies: BTreeMap::new(),
            wanted: Vec::new(),
            epochs: VecDeque::from([(None, Vec::new())]),
            setup,
        }
    }

    /// The state of the volume.
    #[must_use]
    pub fn state(&self) -> State {
        self.resource.state(VOLUME).expect("one volume")
    }

    /// What is written here gets to a good disk of the peer as well.
    fn mirrors(&self) -> bool {
        let state = self.state();
        state.conn >= Conn::Connected && state.pdsk == Disk::UpToDate
    }

    /// The device that carries the metadata.
    #[must_use]
    pub fn meta_device(&self) -> Device {
        if self.setup.devices[0].meta.is_some() { Device::Meta } else { Device::Data }
    }

    /// Ranges of writes whose fate on the peer is open.
    #[must_use]
    pub fn unconfirmed(&self) -> Vec<SectorRange> {
        let asked = self.asked.iter().flatten().map(|asked| asked.range);
        asked.chain(self.epochs.iter().flat_map(|(_, ranges)| ranges.iter().copied())).collect()
    }

    /// Follows what the peer does not confirm yet.
    fn note_sent(&mut self, packet: &Packet) {
        let (sector, id, bytes, is_write) = match packet {
            Packet::Data(data) => (data.sector, data.block_id.0, data.len, true),
            Packet::Trim(range) | Packet::Zeroes(range) => {
                (range.sector, range.block_id.0, range.size, true)
            }
            Packet::DataRequest(request)
            | Packet::RsDataRequest(request)
            | Packet::RsThinRequest(request) => {
                (request.sector, request.block_id.0, request.size, false)
            }
            Packet::RsDataReply(data) => (data.sector, data.block_id.0, data.len, false),
            Packet::Barrier { barrier } => {
                let open = self.epochs.back_mut().expect("one is open");
                open.0 = Some(barrier.0);
                self.epochs.push_back((None, Vec::new()));
                (SectorNr(0), u64::from(barrier.0), 0, false)
            }
            _ => return,
        };
        self.wanted.push((sector.0, id, bytes));
        if is_write {
            let range = SectorRange::from_bytes(sector, u64::from(bytes));
            self.epochs.back_mut().expect("one is open").1.extend(range);
        }
    }

    fn note_received(&mut self, packet: &Packet) {
        if let Packet::BarrierAck { barrier, .. } = packet
            && self.epochs.front().is_some_and(|epoch| epoch.0 == Some(barrier.0))
        {
            self.epochs.pop_front();
        }
    }

    fn info(&self) -> DiskInfo {
        let data_sectors = SectorNr(self.data_sectors);
        let meta = self.setup.devices[0].meta;
        DiskInfo {
            data_sectors,
            meta_sectors: meta.map_or(data_sectors, SectorNr),
            meta_on_data_device: meta.is_none(),
            logical_block_size: 512,
            physical_block_size: 4096,
            discard: true,
        }
    }
}

impl Pair {
    /// Cores with these options and disks, and no command given.
    ///
    /// # Panics
    /// If the options are refused.
    #[must_use]
    pub fn new(seed: u64, nodes: Vec<(NodeSetup, Image)>) -> Self {
        let mut rng = Rng::new(seed);
        let nodes: Vec<Node> =
            nodes.into_iter().map(|(setup, image)| Node::new(setup, image, &mut rng)).collect();
        Self {
            nodes,
            ledger: Ledger::default(),
            rng,
            link_up: true,
            garbage: 0,
            trace: Vec::new(),
            is_parted: false,
            now: Time::ZERO,
            next: 0,
            answered: 0,
        }
    }

    /// Gives a command.
    pub fn tell(&mut self, n: usize, command: Command) -> u64 {
        self.next += 1;
        let id = self.next;
        self.trace.push(format!("{n}: {command:?}"));
        self.handle(n, Event::Command { id: CommandId(id), command });
        id
    }

    /// The answer to a command, once.
    pub fn reply(&mut self, n: usize, id: u64) -> Option<Result<Reply, Refusal>> {
        self.nodes[n].replies.remove(&id)
    }

    /// A request of a host; returns its number.
    ///
    /// # Panics
    /// If too many are under way.
    pub fn host(&mut self, n: usize, op: HostOp, start: u64, sectors: u64) -> u64 {
        self.next += 1;
        let number = self.next;
        let range = SectorRange { start, end: start + sectors };
        let node = &mut self.nodes[n];
        let tag = node.asked.iter().position(Option::is_none).expect("a free slot");
        let mirrored = node.mirrors();
        node.asked[tag] = Some(Asked { number, op, range, answered: self.answered, mirrored });
        let tag = u16::try_from(tag).expect("few slots");
        let buf = Buf(u32::from(tag) * node.setup.slot_pages);
        match op {
            HostOp::Write { .. } => {
                let memory = &mut node.arena[bytes_of(buf, range.bytes())];
                for (sector, part) in (start..).zip(memory.chunks_mut(SECTOR)) {
                    stamp(part, sector, number);
                }
                self.ledger.submitted(range, number, false);
            }
            HostOp::Discard | HostOp::WriteZeroes { .. } => {
                self.ledger.submitted(range, number, true);
            }
            HostOp::Read | HostOp::Flush => {}
        }
        self.trace.push(format!("{n}: host {op:?} {range} = {number}"));
        let request = HostRequest { volume: VOLUME, tag: HostTag(tag), op, range, buf };
        self.handle(n, Event::Host(request));
        number
    }

    /// Breaks the connection without notice to anybody but the cores.
    pub fn cut(&mut self) {
        self.link_up = false;
        self.trace.push(String::from("link cut"));
        for n in 0..self.nodes.len() {
            let socks: Vec<SockId> = self.nodes[n].socks.keys().copied().collect();
            for sock in socks {
                self.sock_gone(n, sock, SockGone::Error(Errno(104)));
            }
        }
    }

    fn handle(&mut self, n: usize, event: Event<'_>) {
        let mut actions = Vec::new();
        self.nodes[n].resource.handle(self.now, event, &mut actions);
        if self.nodes[n].state().role != Role::Primary {
            self.nodes[n].host_wrote = false;
        }
        for action in actions {
            self.carry_out(n, action);
        }
    }

    fn carry_out(&mut self, n: usize, action: Action) {
        match action {
            Action::OpenDisk { id, .. } | Action::ProbeDisk { id, .. } => {
                self.nodes[n].jobs.push(Job { id, work: Work::Open });
            }
            Action::Disk { id, op, range, buf, .. } => self.submit_data(n, id, op, range, buf),
            Action::MetaRead { id, sector, pages, .. } => {
                self.nodes[n]
                    .jobs
                    .push(Job { id, work: Work::ReadMeta { sector: sector.0, pages } });
            }
            Action::MetaWrite { id, sector, page, durable, .. } => {
                let device = self.nodes[n].meta_device();
                self.trace.push(format!("{n}: meta write {} durable {durable}", sector.0));
                let number = self.nodes[n].medium.submit(device, sector.0, &page.0, durable);
                self.nodes[n].jobs.push(Job { id, work: Work::WriteMeta { number, page } });
            }
            Action::Listen(wanted) => self.nodes[n].is_listening = wanted,
            Action::Dial { dial } => self.dial(n, dial),
            Action::Send { sock, volume, packet, payload, kind } => {
                self.send(n, sock, volume, &packet, payload, kind);
            }
            Action::Close { sock } => self.sock_gone(n, sock, SockGone::Closed),
            Action::Complete { tag, result, .. } => self.completed(n, tag, result),
            Action::Reply { id, result } => {
                self.trace.push(format!("{n}: reply {result:?}"));
                self.nodes[n].replies.insert(id.0, result);
            }
            Action::Log { text, .. } => {
                self.trace.push(format!("{n}: log {text}"));
                self.nodes[n].log.push(text);
            }
            Action::SetSize { sectors, .. } => self.nodes[n].size = sectors.0,
            Action::CloseDisk { .. } | Action::RunHandler { .. } | Action::Stop | Action::Leave => {
            }
        }
    }

    fn submit_data(
        &mut self,
        n: usize,
        id: OpId,
        op: DiskOp,
        range: SectorRange,
        buf: Option<Buf>,
    ) {
        let node = &mut self.nodes[n];
        self.trace.push(format!("{n}: disk {op:?} {range}"));
        if matches!(op, DiskOp::Write { .. } | DiskOp::Discard | DiskOp::Zeroes { .. }) {
            let asked = node.asked.iter().flatten();
            node.host_wrote |= asked.clone().any(|asked| asked.range.overlaps(range));
        }
        let work = match (op, buf) {
            (DiskOp::Read, Some(buf)) => Work::Read { range, buf },
            (DiskOp::Write { fua }, Some(buf)) => {
                let bytes = &node.arena[bytes_of(buf, range.bytes())];
                let number = if fua {
                    node.medium.submit_fua(Device::Data, range.start, bytes)
                } else {
                    node.medium.submit(Device::Data, range.start, bytes, false)
                };
                Work::Write { number }
            }
            (DiskOp::Discard | DiskOp::Zeroes { .. }, _) => {
                let bytes = vec![0; usize::try_from(range.bytes()).expect("a small range")];
                let number = node.medium.submit(Device::Data, range.start, &bytes, false);
                Work::Write { number }
            }
            (DiskOp::Flush, _) => Work::Flush { covered: node.medium.covered_now(Device::Data) },
            (DiskOp::Read | DiskOp::Write { .. }, None) => panic!("{op:?} without memory"),
        };
        node.jobs.push(Job { id, work });
    }

    fn dial(&mut self, n: usize, dial: DialId) {
        let other = 1 - n;
        let is_open = self.link_up && self.nodes.get(other).is_some_and(|node| node.is_listening);
        if !is_open {
            self.nodes[n].notices.push_back(Notice::Dialed(dial, Err(ECONNREFUSED)));
            return;
        }
        self.next += 1;
        let sock = SockId(u32::try_from(self.next).expect("a short history"));
        for end in [n, other] {
            self.nodes[end].socks.insert(sock, Sock::default());
        }
        self.nodes[n].notices.push_back(Notice::Dialed(dial, Ok(sock)));
        self.nodes[other].notices.push_back(Notice::Accepted(sock));
    }

    fn send(
        &mut self,
        n: usize,
        sock: SockId,
        volume: replication_core::units::VolumeNr,
        packet: &Packet,
        payload: Option<Buf>,
        kind: wire::HeaderKind,
    ) {
        let node = &mut self.nodes[n];
        let Some(end) = node.socks.get_mut(&sock) else { return };
        end.sent += 1;
        let sent = end.sent;
        let mut bytes = Vec::new();
        wire::encode(packet, volume, &node.resource.agreed(), kind, &mut bytes);
        if let Some(buf) = payload {
            let length = u64::from(packet.payload_len());
            bytes.extend_from_slice(&node.arena[bytes_of(buf, length)]);
        }
        node.note_sent(packet);
        node.notices.push_back(Notice::Sent(sock, sent));
        self.trace.push(format!("{n}: send {}", packet.name()));
        if self.is_parted {
            return;
        }
        if let Some(there) = self.nodes.get_mut(1 - n).and_then(|node| node.socks.get_mut(&sock)) {
            there.inbox.extend_from_slice(&bytes);
        }
    }

    fn sock_gone(&mut self, n: usize, sock: SockId, why: SockGone) {
        if self.nodes[n].socks.remove(&sock).is_none() {
            return;
        }
        self.nodes[n].notices.retain(|notice| !matches!(notice, Notice::Sent(s, _) if *s == sock));
        self.nodes[n].notices.push_back(Notice::Gone(sock, why));
        if self.is_parted {
            return;
        }
        if let Some(there) = self.nodes.get_mut(1 - n).and_then(|node| node.socks.get_mut(&sock)) {
            there.ended = true;
        }
    }

    fn completed(&mut self, n: usize, tag: HostTag, result: Result<(), Errno>) {
        let slot = &mut self.nodes[n].asked[usize::from(tag.0)];
        let asked = slot.take().expect("a request is answered once");
        self.trace.push(format!("{n}: host {} answered {result:?}", asked.number));
        self.answered += 1;
        let Ok(()) = result else { return };
        let mirrored = asked.mirrored && self.nodes[n].mirrors();
        match asked.op {
            HostOp::Flush => self.ledger.flushed(asked.answered, n, mirrored),
            HostOp::Write { fua } => {
                let safe_here = fua.then_some(n);
                self.ledger.acked(asked.range, asked.number, self.answered, mirrored, safe_here);
            }
            HostOp::Discard | HostOp::WriteZeroes { .. } => {
                self.ledger.acked(asked.range, asked.number, self.answered, mirrored, None);
            }
            HostOp::Read => {}
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (n, node) in self.nodes.iter().enumerate() {
            steps.extend((0..node.jobs.len()).map(|job| Step::Job(n, job)));
            if !node.notices.is_empty() {
                steps.push(Step::Notice(n));
            }
            let is_new = |sock: &SockId| {
                node.notices.iter().any(|notice| match notice {
                    Notice::Accepted(s) | Notice::Dialed(_, Ok(s)) => s == sock,
                    Notice::Dialed(_, Err(_)) | Notice::Sent(..) | Notice::Gone(..) => false,
                })
            };
            let socks = node.socks.keys().filter(|sock| !is_new(sock));
            let readable = socks.filter(|sock| !matches!(node.arrived(**sock), Arrived::Nothing));
            steps.extend(readable.map(|sock| Step::Deliver(n, *sock)));
        }
        steps
    }

    /// Lets one thing happen, a timer only if `timers` and nothing else can; false if nothing did.
    pub fn step(&mut self, timers: bool) -> bool {
        let steps = self.steps();
        if steps.is_empty() {
            return timers && self.tick();
        }
        let chosen = usize::try_from(self.rng.below(steps.len() as u64)).expect("an index");
        match steps[chosen] {
            Step::Job(n, job) => self.finish_job(n, job),
            Step::Notice(n) => self.tell_notice(n),
            Step::Deliver(n, sock) => self.deliver(n, sock),
        }
        true
    }

    fn tick(&mut self) -> bool {
        let deadlines = self.nodes.iter().enumerate();
        let next =
            deadlines.filter_map(|(n, node)| Some((node.resource.next_deadline()?, n))).min();
        let Some((at, n)) = next else { return false };
        self.now = at.max(self.now + Span(1_000));
        self.handle(n, Event::Tick);
        true
    }

    fn finish_job(&mut self, n: usize, job: usize) {
        let Job { id, work } = self.nodes[n].jobs.remove(job);
        let node = &mut self.nodes[n];
        match work {
            Work::Open => {
                let result = Ok(node.info());
                self.handle(n, Event::DiskOpened { id, result });
            }
            Work::Read { range, buf } => {
                let out = &mut node.arena[bytes_of(buf, range.bytes())];
                for (sector, part) in (range.start..).zip(out.chunks_mut(SECTOR)) {
                    part.copy_from_slice(&node.medium.read(Device::Data, sector));
                }
                self.handle(n, Event::DiskDone { id, result: Ok(()) });
            }
            Work::Write { number } => {
                node.medium.finish(number);
                self.handle(n, Event::DiskDone { id, result: Ok(()) });
            }
            Work::Flush { covered } => {
                node.medium.flushed(&covered);
                self.handle(n, Event::DiskDone { id, result: Ok(()) });
            }
            Work::ReadMeta { sector, pages } => {
                let device = node.meta_device();
                let read: Vec<Page> = (0..u64::from(pages))
                    .map(|index| {
                        let mut page = Page([0; PAGE]);
                        for (at, part) in (sector + index * 8..).zip(page.0.chunks_mut(SECTOR)) {
                            part.copy_from_slice(&node.medium.read(device, at));
                        }
                        page
                    })
                    .collect();
                self.handle(n, Event::MetaRead { id, result: Ok(&read) });
            }
            Work::WriteMeta { number, page } => {
                node.medium.finish(number);
                self.handle(n, Event::MetaWritten { id, page, result: Ok(()) });
            }
        }
    }

    fn tell_notice(&mut self, n: usize) {
        let notice = self.nodes[n].notices.pop_front().expect("one was there");
        match notice {
            Notice::Sent(sock, upto) => self.handle(n, Event::Sent { sock, upto }),
            Notice::Gone(sock, why) => {
                self.nodes[n].epochs = VecDeque::from([(None, Vec::new())]);
                self.handle(n, Event::SockGone { sock, why });
            }
            Notice::Dialed(dial, result) => self.handle(n, Event::DialDone { dial, result }),
            Notice::Accepted(sock) => self.handle(n, Event::Accepted { sock }),
        }
    }

    fn deliver(&mut self, n: usize, sock: SockId) {
        let node = &mut self.nodes[n];
        let (header, plan, packet) = match node.arrived(sock) {
            Arrived::Nothing => return,
            Arrived::End => {
                self.sock_gone(n, sock, SockGone::EndOfFile);
                return;
            }
            Arrived::Garbage(error) => {
                self.garbage += 1;
                self.sock_gone(n, sock, SockGone::Garbage(error));
                return;
            }
            Arrived::Packet(header, plan, packet) => (header, plan, packet),
        };
        let mut payload = None;
        if plan.payload > 0 {
            let Some(buf) = node.resource.payload_buffer(&packet) else { return };
            payload = Some(buf);
        }
        let head = node.resource.header_size(sock) + plan.fixed;
        let length = usize::try_from(plan.payload).expect("a payload fits");
        let end = node.socks.get_mut(&sock).expect("it was just seen");
        if let Some(buf) = payload {
            if end.inbox.len() < head + length {
                // The stream ends in the middle of the payload.
                node.resource.return_buffer(buf);
                self.sock_gone(n, sock, SockGone::EndOfFile);
                return;
            }
            let memory = &mut node.arena[bytes_of(buf, u64::from(plan.payload))];
            memory.copy_from_slice(&end.inbox[head..head + length]);
        }
        end.inbox.drain(..head + length);
        node.note_received(&packet);
        self.trace.push(format!("{n}: received {}", packet.name()));
        let volume = header.volume;
        self.handle(n, Event::Packet { sock, volume, packet, payload });
    }

    /// From here on nothing gets from one node to the other, and neither knows.
    pub fn part(&mut self) {
        self.link_up = false;
        self.is_parted = true;
    }

    /// A stranger connects to a node; the node hears of it.
    pub fn knock(&mut self, n: usize) -> SockId {
        self.next += 1;
        let sock = SockId(u32::try_from(self.next).expect("a short history"));
        self.nodes[n].socks.insert(sock, Sock::default());
        self.nodes[n].notices.push_back(Notice::Accepted(sock));
        sock
    }

    /// Bytes arrive on a socket that are not from the other node; false if it is closed.
    pub fn inject(&mut self, n: usize, sock: SockId, bytes: &[u8]) -> bool {
        let end = self.nodes[n].socks.get_mut(&sock);
        end.map(|end| end.inbox.extend_from_slice(bytes)).is_some()
    }

    /// The other end of a socket is closed.
    pub fn end(&mut self, n: usize, sock: SockId) {
        if let Some(end) = self.nodes[n].socks.get_mut(&sock) {
            end.ended = true;
        }
    }
}
