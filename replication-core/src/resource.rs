//! A resource: its volumes, its connection, and the one way in.
//!
//! [`Resource`] owns all state. Methods come in families: [`Resource::handle`] for everything that
//! happens, getters, and [`Resource::payload_buffer`] with [`Resource::return_buffer`] for the
//! memory of incoming data. Time is an argument. After every event the same short tail
//! (`settle`) starts whatever became possible, so no handler needs to know who waits
//! for it.
//!
//! An id of an operation that was given up is recognised by its generation, counted and dropped.

use std::collections::VecDeque;

use thiserror::Error;

use crate::action::{Action, Level, Scope};
use crate::buffers::BufferPool;
use crate::config::ResourceConfig;
use crate::connect::{Hold, Link};
use crate::epoch::{EpochId, Ordering, ReceiveEpochs, Step};
use crate::event::{Event, OpId, SockId, VolumeIx};
use crate::limits;
use crate::meta::Page;
use crate::mutant::{Chosen, Mutant};
use crate::peer_request::PeerRequest;
use crate::request::Request;
use crate::slab::{Key, Slab};
use crate::state::{Conn, Fencing, Role, State};
use crate::transfer_log::TransferLog;
use crate::units::{Buf, Errno, Time, VolumeNr};
use crate::volume::Volume;
use crate::wire::{Agreed, BitmapSender, BodyPlan, DecodeError, Header, Packet};

/// A source of unpredictable bytes: challenges and generation identifiers come from it.
pub trait Entropy: Send {
    /// Fills the slice.
    fn fill(&mut self, bytes: &mut [u8]);
}

/// The driver's memory, in 4 KiB pages of one arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Pages before this one belong to the frontends' request slots.
    pub first_pool_page: u32,
    /// Pages from there on are handed out by the core.
    pub pool_pages: u32,
    /// Request slots of each volume.
    pub queue_depth: u16,
}

/// A configuration that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Too many volumes.
    #[error("{found} volumes, at most {} are possible", limits::MAX_VOLUMES)]
    Volumes {
        /// Configured.
        found: usize,
    },
    /// Two volumes with one number, or not in ascending order.
    #[error("volume numbers must ascend: {after} follows {before}")]
    Order {
        /// The earlier one.
        before: VolumeNr,
        /// The later one.
        after: VolumeNr,
    },
    /// A fencing policy needs handlers.
    #[error("fencing {found:?} needs a fence-peer handler, which is not available yet")]
    Fencing {
        /// Configured.
        found: Fencing,
    },
    /// A number out of range.
    #[error("{name} is {found}, allowed is {min} to {max}")]
    Range {
        /// What.
        name: &'static str,
        /// Configured.
        found: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
}

/// Whom the end of a disk operation concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// The opening of a backing device.
    OpenDisk(VolumeIx),
    /// A second look at the size of an open backing device.
    ProbeDisk(VolumeIx),
    /// A read of metadata during an attach, or of the emptied log.
    ReadMeta(VolumeIx),
    /// A page of the metadata task under way.
    MetaPage(VolumeIx),
    /// The data flush of the metadata task under way.
    MetaFlush(VolumeIx),
    /// The data flush before extents leave the activity log.
    LogFlush(VolumeIx),
    /// A bitmap page of extents that leave the activity log.
    LogBitmap(VolumeIx),
    /// The activity-log block.
    LogBlock(VolumeIx),
    /// The local part of a host request.
    Host(Key),
    /// A request of the peer, or of resync.
    Peer(Key),
    /// The flush at the end of an epoch.
    EpochFlush(VolumeIx, EpochId),
    /// The flush at the end of a resync, on the target.
    SyncFlush(VolumeIx),
}

/// What the reader of a socket has to know to take bytes apart.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Ignored {
    /// Answers to operations that were given up.
    pub(crate) stale_operations: u64,
    /// Packets of sockets that were given up.
    pub(crate) stale_packets: u64,
}

/// One replicated resource with one peer.
pub struct Resource {
    pub(crate) config: ResourceConfig,
    pub(crate) memory: Memory,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) link: Link,
    pub(crate) pool: BufferPool,
    pub(crate) requests: Slab<Request>,
    pub(crate) peer_requests: Slab<PeerRequest>,
    pub(crate) ops: Slab<Op>,
    pub(crate) transfer_log: TransferLog,
    pub(crate) epochs: ReceiveEpochs,
    pub(crate) admin: crate::admin::Admin,
    pub(crate) entropy: Box<dyn Entropy>,
    pub(crate) spare_pages: Vec<Box<Page>>,
    pub(crate) ignored: Ignored,
    /// Something happened that may let waiting work go on.
    pub(crate) again: bool,
    pub(crate) now: Time,
    pub(crate) out: Vec<Action>,
    pub(crate) scratch: Vec<Key>,
    pub(crate) sent_holds: Vec<Hold>,
    /// Requests sent to the peer, oldest first; answered ones are dropped at the front.
    pub(crate) unanswered: VecDeque<Key>,
    /// Flushes of the host that wait for the peer.
    pub(crate) flushes: Vec<Key>,
    /// Counts the peer's requests in the order of their arrival.
    pub(crate) arrivals: u64,
    /// The transfer of the bitmap of `link.bitmap_volume`.
    pub(crate) bitmap_sender: Option<BitmapSender>,
    /// The rule that this resource breaks, in tests of the checkers.
    pub(crate) mutant: Chosen,
}

impl std::fmt::Debug for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let states: Vec<State> = self.volumes.iter().map(|v| v.state).collect();
        f.debug_struct("Resource")
            .field("name", &self.config.name)
            .field("link", &self.link)
            .field("states", &states)
            .finish_non_exhaustive()
    }
}

/// Spare metadata pages kept from the start.
const SPARE_PAGES: usize = 64;

pub(crate) fn check(config: &ResourceConfig, memory: &Memory) -> Result<(), ConfigError> {
    let found = config.volumes.len();
    if found > limits::MAX_VOLUMES {
        return Err(ConfigError::Volumes { found });
    }
    for pair in config.volumes.windows(2) {
        let (before, after) = (pair[0].nr, pair[1].nr);
        if before >= after {
            return Err(ConfigError::Order { before, after });
        }
    }
    if config.net.fencing != Fencing::DontCare {
        return Err(ConfigError::Fencing { found: config.net.fencing });
    }
    let range = |name, found: u64, min: u64, max: u64| {
        if (min..=max).contains(&found) {
            Ok(())
        } else {
            Err(ConfigError::Range { name, found, min, max })
        }
    };
    let max_depth = u64::from(limits::MAX_QUEUE_DEPTH);
    range("queue-depth", u64::from(memory.queue_depth), 1, max_depth)?;
    let pages_of_largest = u64::from(limits::MAX_BIO_SIZE / 4096);
    range("buffer pool", u64::from(memory.pool_pages), 2 * pages_of_largest, 1 << 24)?;
    range("max-epoch-size", u64::from(config.net.max_epoch_size), 1, 20_000)?;
    for volume in &config.volumes {
        // The operator's minimum is the driver's rule: the simulator runs with fewer slots, to
        // reach the end of the log at once. A write at the border of two extents needs both (AL-8).
        let max = u64::from(limits::AL_EXTENTS_MAX);
        range("al-extents", u64::from(volume.disk.al_extents), 2, max)?;
    }
    Ok(())
}

impl Resource {
    /// A resource with nothing attached and nobody connected.
    ///
    /// # Errors
    /// The configuration cannot be run.
    pub fn new(
        config: ResourceConfig,
        memory: Memory,
        entropy: Box<dyn Entropy>,
    ) -> Result<Self, ConfigError> {
        check(&config, &memory)?;
        let depth = usize::from(memory.queue_depth);
        let volumes = u32::try_from(config.volumes.len().max(1)).expect("the number was checked");
        let host_slots = u32::from(memory.queue_depth) * volumes;
        let log_slots = host_slots + 2 * config.net.max_epoch_size;
        let slots = depth + limits::MAX_PEER_REQUESTS as usize;
        let volumes = config.volumes.iter().enumerate().map(|(at, volume)| {
            let ix = VolumeIx(u8::try_from(at).expect("the number of volumes was checked"));
            Volume::new(ix, volume.clone(), slots)
        });
        let ordering = ordering_of(&config);
        Ok(Self {
            volumes: volumes.collect(),
            link: Link::new(),
            pool: BufferPool::new(memory.first_pool_page, memory.pool_pages),
            requests: Slab::new(host_slots + log_slots),
            peer_requests: Slab::new(limits::MAX_PEER_REQUESTS),
            ops: Slab::new(2 * host_slots + 2 * limits::MAX_PEER_REQUESTS + 1024),
            transfer_log: TransferLog::new(log_slots as usize, config.net.max_epoch_size),
            epochs: ReceiveEpochs::new(ordering),
            admin: crate::admin::Admin::default(),
            entropy,
            spare_pages: (0..SPARE_PAGES).map(|_| Page::zeroed()).collect(),
            ignored: Ignored::default(),
            again: false,
            now: Time::ZERO,
            out: Vec::new(),
            scratch: Vec::with_capacity(log_slots as usize),
            sent_holds: Vec::with_capacity(slots),
            unanswered: VecDeque::with_capacity(log_slots as usize),
            flushes: Vec::with_capacity(slots),
            arrivals: 0,
            bitmap_sender: None,
            mutant: Chosen::default(),
            config,
            memory,
        })
    }

    /// A resource that breaks one rule, to show that a checker notices.
    ///
    /// # Errors
    /// The configuration cannot be run.
    #[cfg(feature = "mutants")]
    pub fn new_mutant(
        config: ResourceConfig,
        memory: Memory,
        entropy: Box<dyn Entropy>,
        mutant: Mutant,
    ) -> Result<Self, ConfigError> {
        let resource = Self::new(config, memory, entropy)?;
        Ok(Self { mutant: Chosen::new(mutant), ..resource })
    }

    /// Takes an event in; what is to be done because of it is appended to `out`.
    pub fn handle(&mut self, now: Time, event: Event<'_>, out: &mut Vec<Action>) {
        std::mem::swap(&mut self.out, out);
        self.now = self.now.max(now);
        match event {
            Event::Tick => {}
            Event::Host(request) => self.on_host(request),
            Event::DiskDone { id, result } => self.on_disk_done(id, result),
            Event::DiskOpened { id, result } => match self.take_op(id) {
                Some(Op::OpenDisk(volume)) => self.on_disk_opened(volume, result),
                Some(Op::ProbeDisk(volume)) => self.on_disk_probed(volume, result),
                other => assert!(other.is_none(), "{other:?} is not answered by DiskOpened"),
            },
            Event::MetaRead { id, result } => {
                if let Some(Op::ReadMeta(volume)) = self.take_op(id) {
                    self.on_meta_read(volume, result);
                }
            }
            Event::MetaWritten { id, page, result } => {
                self.spare_pages.push(page);
                self.on_meta_written(id, result);
            }
            Event::DialDone { dial, result } => self.on_dial_done(dial, result),
            Event::Accepted { sock } => self.on_accepted(sock),
            Event::Packet { sock, volume, packet, payload } => {
                self.on_packet(sock, volume, packet, payload);
            }
            Event::Sent { sock, upto } => self.on_sent(sock, upto),
            Event::SockGone { sock, why } => self.on_sock_gone(sock, why),
            Event::Command { id, command } => self.on_command(id, command),
        }
        self.on_timers();
        self.settle();
        self.tell_end();
        std::mem::swap(&mut self.out, out);
    }

    /// The tail of every event: start whatever became possible, until nothing does.
    fn settle(&mut self) {
        // Each round lets at least one waiting thing go on; the bound is a safeguard only.
        for _ in 0..1_000_000 {
            self.again = false;
            for at in 0..self.volumes.len() {
                self.run_meta_queue(at);
                self.run_activity_log(at);
                self.run_peer_waiting(at);
                self.refill_resync(at);
                self.run_host_waiting(at);
                self.run_held(at);
                self.run_detach(at);
            }
            self.run_epochs();
            self.run_bitmap_out();
            self.run_link();
            self.run_admin();
            if !self.again || self.has_left() {
                return;
            }
        }
        unreachable!("work that never comes to rest: {self:?}");
    }

    /// When [`Event::Tick`] is wanted.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let resync = self.volumes.iter().filter_map(|volume| {
            volume.resync.as_ref().and_then(|resync| resync.next_tick(volume.state.conn))
        });
        let others = [self.link_deadline(), self.request_deadline(), self.admin_deadline()];
        let gave_way = self.volumes.iter().filter_map(|volume| volume.wake_at);
        others.into_iter().flatten().chain(resync).chain(gave_way).min()
    }

    fn on_timers(&mut self) {
        self.link_timers();
        self.request_timers();
        for at in 0..self.volumes.len() {
            self.resync_timer(at);
            if self.volumes[at].wake_at.is_some_and(|wake| wake <= self.now) {
                self.volumes[at].wake_at = None;
            }
        }
    }

    /// Whether the next packet of this socket may be read now.
    #[must_use]
    pub fn may_receive(&self, sock: SockId) -> bool {
        // Keep-alives are answered whatever the load is.
        let has_room = self.peer_requests.len() + 2 < limits::MAX_PEER_REQUESTS as usize
            && self.epochs.len() < limits::MAX_PEER_EPOCHS
            && self.link.unread_acks() < limits::MAX_UNREAD_ACKS
            && self.spare_ops() > 64
            // A peer that attaches its disk would be told of a generation too early.
            && !self.volumes.iter().any(|volume| volume.uuids_due);
        self.link.may_receive(sock) && (has_room || !self.link.is_data(sock))
    }

    fn spare_ops(&self) -> usize {
        self.ops.capacity() as usize - self.ops.len()
    }

    /// Bytes of the next packet's header on this socket.
    #[must_use]
    pub fn header_size(&self, sock: SockId) -> usize {
        self.link.header_kind(sock).size()
    }

    /// How the body of a packet splits into a fixed part and payload.
    ///
    /// # Errors
    /// The header is none, or the packet is not allowed here.
    pub fn plan(&self, sock: SockId, header: &[u8]) -> Result<(Header, BodyPlan), DecodeError> {
        self.link.plan(sock, header)
    }

    /// The packet behind a header and its fixed part.
    ///
    /// # Errors
    /// The bytes are no such packet.
    pub fn decode(
        &self,
        sock: SockId,
        header: &Header,
        fixed: &[u8],
    ) -> Result<Packet, DecodeError> {
        self.link.decode(sock, header, fixed)
    }

    /// The agreed facts that the codec needs.
    #[must_use]
    pub fn agreed(&self) -> Agreed {
        self.link.agreed()
    }

    /// Memory for the payload of a packet that is being received; `None`: none is free, try again
    /// after the next event.
    pub fn payload_buffer(&mut self, packet: &Packet) -> Option<Buf> {
        if let Packet::DataReply(header) = packet
            && let Some(buf) = self.begin_remote_read(header)
        {
            return Some(buf);
        }
        self.pool.alloc(packet.payload_len().max(1))
    }

    /// Takes back memory whose packet never became whole.
    pub fn return_buffer(&mut self, buf: Buf) {
        self.free_buf(buf);
    }

    /// Frees payload memory if it is of the pool; the memory of request slots is the driver's.
    pub(crate) fn free_buf(&mut self, buf: Buf) {
        if buf.0 >= self.memory.first_pool_page {
            self.pool.free(buf);
            self.again = true;
        }
    }

    /// Registers a disk operation.
    pub(crate) fn new_op(&mut self, op: Op) -> OpId {
        OpId(self.ops.insert(op).expect("operations are bounded by the requests' limits"))
    }

    /// Ends a disk operation; `None` if it is none of ours any more.
    pub(crate) fn take_op(&mut self, id: OpId) -> Option<Op> {
        let op = self.ops.remove(id.0);
        if op.is_none() {
            self.ignored.stale_operations += 1;
        }
        op
    }

    fn on_disk_done(&mut self, id: OpId, result: Result<(), Errno>) {
        let Some(op) = self.take_op(id) else { return };
        self.again = true;
        match op {
            Op::Host(key) => self.on_host_local_done(key, result),
            Op::Peer(key) => self.on_peer_done(key, result),
            Op::EpochFlush(volume, epoch) => self.on_epoch_flushed(volume, epoch, result),
            Op::MetaFlush(volume) => self.on_meta_flushed(volume, result),
            Op::SyncFlush(volume) => self.on_sync_flushed(volume, result),
            Op::LogFlush(volume) => self.on_log_part_done(volume, result),
            Op::OpenDisk(_)
            | Op::ProbeDisk(_)
            | Op::ReadMeta(_)
            | Op::MetaPage(_)
            | Op::LogBitmap(_)
            | Op::LogBlock(_) => unreachable!("{op:?} is not answered by DiskDone"),
        }
    }

    fn on_meta_written(&mut self, id: OpId, result: Result<(), Errno>) {
        let Some(op) = self.take_op(id) else { return };
        self.again = true;
        match op {
            Op::MetaPage(volume) => self.on_meta_page(volume, result),
            Op::LogBitmap(volume) => self.on_log_part_done(volume, result),
            Op::LogBlock(volume) => self.on_log_written(volume, result),
            Op::OpenDisk(_)
            | Op::ReadMeta(_)
            | Op::MetaFlush(_)
            | Op::LogFlush(_)
            | Op::Host(_)
            | Op::Peer(_)
            | Op::SyncFlush(_)
            | Op::ProbeDisk(_)
            | Op::EpochFlush(..) => unreachable!("{op:?} is not answered by MetaWritten"),
        }
    }

    fn run_epochs(&mut self) {
        while let Some(step) = self.epochs.next_step() {
            match step {
                Step::Flush(volumes) if self.mutant.is_on(Mutant::SkipEpochFlush) => {
                    let epoch = self.epochs.oldest();
                    volumes.iter().for_each(|_| self.epochs.flushed(epoch));
                }
                Step::Flush(volumes) => self.flush_epoch(volumes),
                Step::Acknowledge { barrier, writes } => {
                    let set_size = writes + u32::from(self.mutant.is_on(Mutant::MiscountEpoch));
                    let packet = Packet::BarrierAck { barrier, set_size };
                    self.send_meta(VolumeNr(0), packet);
                    self.again = true;
                }
            }
        }
    }

    /// A page for metadata, zeroed.
    pub(crate) fn page(&mut self) -> Box<Page> {
        match self.spare_pages.pop() {
            Some(mut page) => {
                page.clear();
                page
            }
            None => Page::zeroed(),
        }
    }

    /// A random number.
    pub(crate) fn random(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.entropy.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn log(&mut self, level: Level, scope: Scope, text: impl Into<String>) {
        self.out.push(Action::Log { level, scope, text: text.into() });
    }

    /// The volume with this number.
    pub(crate) fn find_volume(&self, nr: VolumeNr) -> Option<usize> {
        self.volumes.iter().position(|volume| volume.config.nr == nr)
    }

    /// This node's role: Primary as soon as one volume is.
    #[must_use]
    pub fn role(&self) -> Role {
        let is_primary = self.volumes.iter().any(|v| v.state.role == Role::Primary);
        if is_primary { Role::Primary } else { Role::Secondary }
    }

    /// The peer's role as far as it is known.
    #[must_use]
    pub fn peer_role(&self) -> Role {
        let mut roles = self.volumes.iter().map(|v| v.state.peer);
        if roles.clone().any(|role| role == Role::Primary) {
            return Role::Primary;
        }
        roles.next().unwrap_or(Role::Unknown)
    }

    /// The state of a volume, for tests and status.
    #[must_use]
    pub fn state(&self, volume: VolumeIx) -> Option<State> {
        self.volumes.get(volume.at()).map(|v| v.state)
    }

    /// Whether packets may be sent for the volumes.
    pub(crate) fn is_connected(&self) -> bool {
        self.link.conn >= Conn::WFReportParams
    }
}

/// The weakest write ordering that every volume allows.
pub(crate) fn ordering_of(config: &ResourceConfig) -> Ordering {
    let disks = || config.volumes.iter().map(|volume| &volume.disk);
    if disks().any(|disk| disk.disk_flushes) || config.volumes.is_empty() {
        Ordering::Flush
    } else if disks().any(|disk| disk.disk_drain) {
        Ordering::Drain
    } else {
        Ordering::None
    }
}
