//! One volume: its state, its local disk and the work that is under way on it.
//!
//! This module holds data and the questions that can be answered from one volume alone. What
//! happens is decided in the rooms that act on it: [`crate::request`] for the host,
//! [`crate::peer_request`] for the peer, [`crate::resync`], [`crate::disk`] for the metadata.

use std::collections::VecDeque;

use arrayvec::ArrayVec;

use crate::activity_log::{ActivityLog, AlTransaction};
use crate::bitmap::Bitmap;
use crate::config::VolumeConfig;
use crate::event::{DiskInfo, VolumeIx};
use crate::gi::{PeerUuids, Uuid, Uuids};
use crate::interval::Intervals;
use crate::limits::AL_UPDATES_PER_TRANSACTION;
use crate::meta::{Geometry, Page, Superblock};
use crate::resync::target::Resync;
use crate::slab::Key;
use crate::state::{Conn, Disk, Role, State};
use crate::units::{Sector, SectorRange, Time};
use crate::wire::BitmapReceiver;

/// What the peer said about its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeerSizes {
    /// Capacity of its disk; zero without one.
    pub(crate) disk: u64,
    /// Configured there.
    pub(crate) user: u64,
    /// Exposed there; zero: none yet.
    pub(crate) current: u64,
}

/// What follows when the metadata work queued before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// One reason less to hold data writes and completions back.
    OpenGate,
    /// The attach goes on with its decision about the disk state.
    FinishAttach,
    /// The resync may begin: the source tells its new identifier.
    BeginSource,
    /// The target may ask for blocks.
    BeginTarget,
    /// Every bit is set and durable: a full sync may begin.
    FullSyncSet,
    /// The merged bitmap is durable: the target sends its own.
    SendBitmap,
    /// The disk is put away: close it.
    Detached,
    /// The new size is durable.
    Resized,
    /// The next superblock is the clean end of a detach.
    MarkClean,
}

/// A piece of metadata work. They are done one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetaTask {
    /// Make data writes durable that were done so far (before their bits are cleared on disk).
    FlushData,
    /// Write every bitmap page that changed.
    Bitmap,
    /// Empty the activity log on the disk.
    InitLog,
    /// Read the activity log back: a block that was not emptied would count after a crash, as newer
    /// than the log that begins here (AL-2).
    CheckLog,
    /// Write the superblock, with everything before it durable.
    Superblock,
    /// Go on with what waited.
    Then(After),
}

/// The metadata work of a volume.
#[derive(Debug, Default)]
pub(crate) struct MetaQueue {
    /// Work to be done; the first may be under way.
    pub(crate) tasks: VecDeque<MetaTask>,
    /// The first task was started.
    pub(crate) running: bool,
    /// Operations of the running task in flight.
    pub(crate) in_flight: u32,
    /// The next page or block of the running task.
    pub(crate) cursor: u64,
}

/// Numbers and images of bitmap pages.
pub(crate) type LogPages = ArrayVec<(u64, Box<Page>), AL_UPDATES_PER_TRANSACTION>;

/// Where an activity-log transaction stands.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a volume; a box is an allocation while writing")]
pub(crate) enum LogWrite {
    /// None is under way.
    Idle,
    /// What the evicted extents need before they are forgotten (AL-3): the data flush, then the
    /// bitmap pages.
    Evicting {
        /// The transaction to be written afterwards.
        transaction: AlTransaction,
        /// Flush or pages in flight.
        in_flight: u32,
        /// Bitmap pages as they were when the flush began: what they show as equal is covered by
        /// it (BM-1). They are written after it.
        pages: LogPages,
    },
    /// The block itself.
    Writing,
}

/// How far an attach has come, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Reading the superblock.
    Superblock,
    /// Reading the activity log.
    Log,
    /// Reading the bitmap.
    Bitmap,
    /// Bringing the metadata into its new form.
    Settling,
    /// In use.
    Attached,
    /// Waiting for operations to end before it is closed.
    Leaving,
}

/// The local disk, from the begin of an attach to the end of a detach.
#[derive(Debug)]
pub(crate) struct LocalDisk {
    pub(crate) stage: Stage,
    pub(crate) info: DiskInfo,
    pub(crate) geometry: Geometry,
    /// Last contents of the superblock, except for what is derived when it is written.
    pub(crate) superblock: Superblock,
    pub(crate) uuids: Uuids,
    pub(crate) bitmap: Bitmap,
    pub(crate) log: ActivityLog,
    pub(crate) log_write: LogWrite,
    pub(crate) meta: MetaQueue,
    /// This node was Primary when it went down and was not in sync since (GI-10).
    pub(crate) crashed_primary: bool,
    /// The attach found that this node had been Primary without its peer; no connection since.
    pub(crate) was_degraded: bool,
    /// The activity log on disk is not valid.
    pub(crate) log_disabled: bool,
    /// The blocks that an emptying of the log on disk begins and ends with.
    pub(crate) log_ends: (u32, u32),
    /// Bits were cleared since the last data flush: the bitmap may not go to disk before one.
    pub(crate) cleared_unflushed: bool,
    /// The current identifier in the superblock on disk.
    pub(crate) durable_uuid: Uuid,
    /// The superblock on disk says that the data is good.
    pub(crate) durable_is_good: bool,
    /// The superblock that was written last says so.
    pub(crate) written_is_good: bool,
    /// The next superblock says that the activity log does not count: data and bitmap go first.
    pub(crate) flush_first: bool,
    /// The disk state that the attach found, for the handshake of a disk attached while
    /// connected.
    pub(crate) found: Disk,
    /// What the attach found about the peer's disk.
    pub(crate) found_peer: Disk,
    /// Pages read so far of the log or the bitmap.
    pub(crate) read_cursor: u64,
    /// Pages of the activity log, while they are needed by the attach.
    pub(crate) log_pages: Vec<Page>,
    /// Blocks whose resync failed.
    pub(crate) failed_blocks: u64,
    /// The last superblock on disk was the clean end of a detach.
    pub(crate) clean_end: bool,
}

impl LocalDisk {
    /// Blocks whose resync failed and which nobody has overwritten since.
    pub(crate) fn failures_left(&self) -> u64 {
        self.failed_blocks.min(self.bitmap.count())
    }

    /// Whether work on the whole bitmap is under way: should this node crash before all of it is
    /// done, whatever its reason, every bit counts as set (BM-8, RS-3).
    pub(crate) fn counts_all_set(&self) -> bool {
        self.meta.tasks.iter().any(|task| {
            matches!(
                task,
                MetaTask::Then(After::FinishAttach | After::Resized | After::FullSyncSet)
            )
        })
    }
}

/// A generation that may be on disk or not. Nothing is submitted or acknowledged in it (GI-1):
/// should the disk fail over it, its data is still that of the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BegunGeneration {
    /// Its identifier.
    pub(crate) current: Uuid,
    /// The identifiers before it.
    pub(crate) before: Uuids,
}

/// Counters of a volume for status outputs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) read_sectors: u64,
    pub(crate) written_sectors: u64,
    pub(crate) received_sectors: u64,
    pub(crate) sent_sectors: u64,
    pub(crate) al_writes: u64,
    pub(crate) bm_writes: u64,
    pub(crate) upper_pending: u64,
    pub(crate) lower_pending: u64,
    pub(crate) unacked: u64,
}

/// A volume.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) ix: VolumeIx,
    pub(crate) config: VolumeConfig,
    pub(crate) state: State,
    pub(crate) disk: Option<LocalDisk>,
    /// Exposed size; zero: unknown.
    pub(crate) size: Sector,
    /// Current identifier of the data that is being served without a local disk.
    pub(crate) exposed_uuid: Uuid,
    /// The generation before that one, as long as nothing was acknowledged to the host since the
    /// peer has begun the new one: its disk may fail over it.
    pub(crate) exposed_before: Uuid,
    /// The own disk is gone from under this Primary, and the peer may not know: after a crash that
    /// disk could come back as the newest. Until the peer tells of a new generation, which is on
    /// its disk by then, what only it has is not done (ACK-2, DUR-5).
    pub(crate) awaits_generation: bool,
    /// The generation of the source from which this node, a target, gets what its disk lacks,
    /// until the disk says that it is good; else zero.
    pub(crate) source_uuid: Uuid,
    /// The peer is to hear of a generation as soon as that is on disk.
    pub(crate) uuids_due: bool,
    /// The generation that was begun last, until it is known to be on disk.
    pub(crate) begun: Option<BegunGeneration>,
    pub(crate) peer_uuids: Option<PeerUuids>,
    pub(crate) peer_sizes: Option<PeerSizes>,
    /// The device has grown, here or on both nodes, in this connection: the new part is to be
    /// synced. Whoever is its source starts that.
    pub(crate) resync_after_grow: bool,
    /// The size that the volume grows to with the result of the handshake, and whether the new part
    /// counts as equal.
    pub(crate) grows_to: Option<(Sector, bool)>,
    /// The size of the own disk is to be looked at because the peer's has grown, and whether the
    /// new part counts as equal.
    pub(crate) unseen_size: Option<bool>,
    /// Both disks were Inconsistent and the peer became Primary: its data is to be taken.
    pub(crate) peer_was_forced: bool,
    /// Sequence number of the last write or acknowledgement sent.
    pub(crate) seq: u32,
    /// Reasons to hold data writes and completions back until metadata is durable.
    pub(crate) gate: u32,
    /// Nothing new is written, so that what is under way comes to an end: metadata will move.
    pub(crate) is_paused: bool,
    /// Host requests that wait.
    pub(crate) waiting: VecDeque<Key>,
    /// Host requests that are finished and wait to be answered.
    pub(crate) held: VecDeque<Key>,
    /// Host writes under way.
    pub(crate) host_writes: Intervals<Key>,
    /// Operations on behalf of the peer and of resync: waiting and under way.
    pub(crate) peer_ops: Intervals<Key>,
    /// Those of them that wait.
    pub(crate) peer_waiting: VecDeque<Key>,
    pub(crate) resync: Option<Resync>,
    pub(crate) bitmap_in: Option<BitmapReceiver>,
    /// This volume's bitmap is to be sent or is being sent.
    pub(crate) bitmap_out: bool,
    /// What a second look at the backing device found.
    pub(crate) probed: Option<Result<DiskInfo, String>>,
    /// The source began before this node was ready to be its target.
    pub(crate) early_sync_uuid: Option<u64>,
    /// When a resync read that gave way to the host is to be looked at again.
    pub(crate) wake_at: Option<Time>,
    pub(crate) counters: Counters,
}

impl Volume {
    pub(crate) fn new(ix: VolumeIx, config: VolumeConfig, slots: usize) -> Self {
        Self {
            ix,
            config,
            state: State::initial(),
            disk: None,
            size: Sector(0),
            exposed_uuid: Uuid::ZERO,
            exposed_before: Uuid::ZERO,
            awaits_generation: false,
            source_uuid: Uuid::ZERO,
            uuids_due: false,
            begun: None,
            peer_uuids: None,
            peer_sizes: None,
            resync_after_grow: false,
            grows_to: None,
            unseen_size: None,
            peer_was_forced: false,
            seq: 0,
            gate: 0,
            is_paused: false,
            waiting: VecDeque::with_capacity(slots),
            held: VecDeque::with_capacity(slots),
            host_writes: Intervals::with_capacity(slots),
            peer_ops: Intervals::with_capacity(slots),
            peer_waiting: VecDeque::with_capacity(slots),
            resync: None,
            bitmap_in: None,
            bitmap_out: false,
            probed: None,
            early_sync_uuid: None,
            wake_at: None,
            counters: Counters::default(),
        }
    }

    /// Whether this generation is the data that is being served without a local disk.
    pub(crate) fn is_in_use(&self, generation: Uuid) -> bool {
        let before = self.exposed_before;
        generation.same(self.exposed_uuid) || (!before.is_zero() && generation.same(before))
    }

    /// Without a local disk, the peer's data is what the host sees.
    pub(crate) fn expose(&mut self, peer: &Uuids) {
        let old = self.exposed_uuid;
        if !peer.current.same(old) {
            let follows = self.state.role == Role::Primary && peer.bitmap.same(old);
            self.exposed_before = if follows { old } else { Uuid::ZERO };
            self.awaits_generation = false;
        }
        self.exposed_uuid = peer.current;
    }

    /// The attached local disk, if data may be read from or written to it.
    pub(crate) fn usable_disk(&mut self) -> Option<&mut LocalDisk> {
        if self.state.disk < Disk::Inconsistent {
            return None;
        }
        self.disk.as_mut().filter(|disk| disk.stage == Stage::Attached)
    }

    /// Whether data may be read from or written to the local disk.
    pub(crate) fn has_usable_disk(&self) -> bool {
        self.state.disk >= Disk::Inconsistent
            && self.disk.as_ref().is_some_and(|disk| disk.stage == Stage::Attached)
    }

    /// Whether host writes are to be mirrored (section 10.2 of the protocol notes).
    pub(crate) fn mirrors(&self) -> bool {
        let conn = self.state.conn;
        let is_connected = conn >= Conn::Connected && conn < Conn::Ahead;
        is_connected
            && (self.state.pdsk == Disk::UpToDate
                || (self.state.pdsk >= Disk::Inconsistent && conn >= Conn::WFBitMapT))
    }

    /// Whether local-only writes are to be announced to the peer (BM-4).
    pub(crate) fn announces(&self) -> bool {
        matches!(self.state.conn, Conn::Ahead | Conn::WFBitMapS)
    }

    /// Whether a resync runs or is paused: writes of whole blocks clear their bits.
    pub(crate) fn is_syncing(&self) -> bool {
        matches!(
            self.state.conn,
            Conn::SyncSource | Conn::SyncTarget | Conn::PausedSyncS | Conn::PausedSyncT
        )
    }

    /// Marks blocks as differing, as far as there is a bitmap; returns how many were not marked
    /// before.
    pub(crate) fn set_out_of_sync(&mut self, range: SectorRange) -> u64 {
        let Some(disk) = self.disk.as_mut() else { return 0 };
        if disk.stage < Stage::Settling {
            return 0;
        }
        disk.bitmap.set(range.blocks_outward())
    }

    /// Marks the blocks wholly inside of `range` as equal: the caller has the proof (BM-3).
    pub(crate) fn set_in_sync(&mut self, range: SectorRange) -> u64 {
        let end = self.size;
        let Some(disk) = self.disk.as_mut() else { return 0 };
        let cleared = disk.bitmap.clear(range.blocks_inward(end));
        disk.cleared_unflushed |= cleared > 0;
        cleared
    }

    /// Number of blocks that differ, zero without a bitmap.
    pub(crate) fn out_of_sync(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.bitmap.count())
    }

    /// The next sequence number for a write or an acknowledgement.
    pub(crate) fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    /// A resync is over or will not happen: what it had queued is void.
    pub(crate) fn forget_sync_steps(&mut self) {
        self.early_sync_uuid = None;
        if let Some(disk) = self.disk.as_mut() {
            disk.meta.tasks.retain(|task| {
                !matches!(
                    task,
                    MetaTask::Then(After::BeginSource | After::BeginTarget | After::SendBitmap)
                )
            });
        }
    }

    /// Whether the bitmap is about to be written.
    pub(crate) fn saves_bitmap(&self) -> bool {
        let front = self.disk.as_ref().and_then(|disk| disk.meta.tasks.front());
        matches!(front, Some(MetaTask::FlushData | MetaTask::Bitmap))
    }

    /// This node's identifiers.
    pub(crate) fn uuids(&self) -> Option<Uuids> {
        self.disk.as_ref().filter(|d| d.stage >= Stage::Settling).map(|d| d.uuids)
    }
}
