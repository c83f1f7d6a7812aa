//! What can happen to a resource: the only input of the core.
//!
//! Every disk operation, metadata operation, dial and socket that the core asked for is answered
//! by exactly one event. Operation ids carry a generation, so a late answer to something that was
//! given up is recognised, counted and dropped.

use crate::control::Command;
use crate::meta::Page;
use crate::slab::Key;
use crate::units::{Buf, Errno, Sector, SectorRange, VolumeNr};
use crate::wire::{DecodeError, Packet};

/// The index of a volume in its resource's table; the driver uses it in place of the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeIx(pub u8);

impl VolumeIx {
    /// The index as a table position.
    #[must_use]
    pub const fn at(self) -> usize {
        self.0 as usize
    }
}

/// A request slot of the frontend. The driver may use a tag again only after
/// [`Action::Complete`](crate::action::Action::Complete).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostTag(pub u16);

/// A socket of the driver; never used again within one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SockId(pub u32);

/// One attempt to connect, numbered by the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DialId(pub u32);

/// A disk or metadata operation, numbered by the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub Key);

/// An operator's command, numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// What the host wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostOp {
    /// Fill the request's buffer.
    Read,
    /// Write the request's buffer; with `fua` it is durable when completed.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything completed before is durable when this completes. The range is empty.
    Flush,
    /// The contents of the range are no longer needed. No buffer.
    Discard,
    /// The range reads as zeroes afterwards. No buffer.
    WriteZeroes {
        /// The backing store may give the space back.
        unmap: bool,
    },
}

/// A request of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRequest {
    /// The volume.
    pub volume: VolumeIx,
    /// The slot, which names the answer.
    pub tag: HostTag,
    /// What to do.
    pub op: HostOp,
    /// Where; empty for a flush.
    pub range: SectorRange,
    /// The slot's memory: at least `range.bytes()` long for reads and writes. It stays untouched
    /// by the host until the request is completed (ORD-6).
    pub buf: Buf,
}

/// What the driver found when it opened a backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Size of the data device.
    pub data_sectors: Sector,
    /// Size of the metadata device; equal to `data_sectors` for internal metadata.
    pub meta_sectors: Sector,
    /// Data and metadata lie on the same device, so that one flush covers both.
    pub meta_on_data_device: bool,
    /// Logical block size in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// Physical block size in bytes.
    pub physical_block_size: u32,
    /// Discards are passed on.
    pub discard: bool,
}

/// Why a socket is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SockGone {
    /// The core asked for it.
    Closed,
    /// The peer closed its end in an orderly way.
    EndOfFile,
    /// The operating system reported an error.
    Error(Errno),
    /// Bytes that are no packet of the protocol.
    Garbage(DecodeError),
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// The deadline of [`Resource::next_deadline`](crate::resource::Resource::next_deadline)
    /// passed. Harmless at any other time.
    Tick,
    /// The host wants something.
    Host(HostRequest),
    /// A data operation ended.
    DiskDone {
        /// Which.
        id: OpId,
        /// How.
        result: Result<(), Errno>,
    },
    /// A backing device was opened and locked, or not.
    DiskOpened {
        /// Which operation.
        id: OpId,
        /// What was found; the text of a failure names path and reason.
        result: Result<DiskInfo, String>,
    },
    /// Pages of metadata were read.
    MetaRead {
        /// Which operation.
        id: OpId,
        /// The pages asked for, all of them.
        result: Result<&'a [Page], Errno>,
    },
    /// A page of metadata was written; the page comes back for use again.
    MetaWritten {
        /// Which operation.
        id: OpId,
        /// The page that was handed out.
        page: Box<Page>,
        /// How it ended.
        result: Result<(), Errno>,
    },
    /// An attempt to connect ended.
    DialDone {
        /// Which attempt.
        dial: DialId,
        /// The connected socket, or why there is none.
        result: Result<SockId, Errno>,
    },
    /// Someone connected to the listening socket.
    Accepted {
        /// The new socket.
        sock: SockId,
    },
    /// A packet came in.
    Packet {
        /// On which socket.
        sock: SockId,
        /// The volume field of its header.
        volume: VolumeNr,
        /// The packet.
        packet: Packet,
        /// Its bulk data, in memory from
        /// [`Resource::payload_buffer`](crate::resource::Resource::payload_buffer); the core owns
        /// it from here on.
        payload: Option<Buf>,
    },
    /// Every packet of this socket whose number (counted from 1 in the order of the `Send`
    /// actions) is at most `upto` was accepted by the operating system: its payload memory is
    /// free.
    Sent {
        /// The socket.
        sock: SockId,
        /// The number of the last packet sent wholly.
        upto: u64,
    },
    /// A socket is closed and nothing of it is in flight any more: exactly once for each socket.
    SockGone {
        /// The socket.
        sock: SockId,
        /// Why.
        why: SockGone,
    },
    /// The operator wants something.
    Command {
        /// Names the answer.
        id: CommandId,
        /// What.
        command: Command,
    },
}
