//! What the core wants done: its only output.
//!
//! Actions may be carried out in any order and at the same time, with three exceptions: the `Send`s
//! of one socket leave in the order in which they were given, a `Close` comes after the `Send`s
//! before it were given up or sent, and `Stop` or `Leave` is the last action of the event that led
//! to it. An action never says "and then".

use crate::control::{Refusal, Reply};
use crate::event::{CommandId, DialId, HostTag, OpId, SockId, VolumeIx};
use crate::meta::Page;
use crate::units::{Buf, Errno, Sector, SectorRange, VolumeNr};
use crate::wire::{HeaderKind, Packet};

/// What to do with the data area of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Fill the buffer.
    Read,
    /// Write the buffer; with `fua` it is durable when done.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything that was done before is durable when this is done.
    Flush,
    /// Give the space back; what the range reads as afterwards does not matter.
    Discard,
    /// The range reads as zeroes afterwards.
    Zeroes {
        /// The space may be given back.
        unmap: bool,
    },
}

/// A program of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// The local disk has failed.
    LocalIoError,
    /// A split brain was found, solved or not.
    InitialSplitBrain,
    /// A split brain was found that nothing solves.
    SplitBrain,
    /// A Primary is left with an Inconsistent disk and no peer.
    PriOnInconDegr,
    /// A resync to this node is done.
    AfterResyncTarget,
}

impl Handler {
    /// The name that operators know.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LocalIoError => "local-io-error",
            Self::InitialSplitBrain => "initial-split-brain",
            Self::SplitBrain => "split-brain",
            Self::PriOnInconDegr => "pri-on-incon-degr",
            Self::AfterResyncTarget => "after-resync-target",
        }
    }
}

/// How loud a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Data at risk or service lost.
    Error,
    /// Degraded.
    Warn,
    /// State changes and commands.
    Info,
    /// Packets and decisions.
    Debug,
}

/// What a log line is about, which gives its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The whole resource.
    Resource,
    /// The connection to the peer.
    Connection,
    /// The local side of a volume.
    Device(VolumeIx),
    /// A volume as seen together with the peer.
    PeerDevice(VolumeIx),
}

/// Something to do.
#[derive(Debug)]
pub enum Action {
    /// Open and lock the backing device of a volume; answered by `DiskOpened`.
    OpenDisk {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
    },
    /// Look again at the size of an open backing device; answered by `DiskOpened`.
    ProbeDisk {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
    },
    /// Close the backing device. Nothing of this volume's disk is in flight, or it is to be
    /// abandoned. Not answered.
    CloseDisk {
        /// Whose.
        volume: VolumeIx,
    },
    /// Work on the data area; answered by `DiskDone`.
    Disk {
        /// Names the answer.
        id: OpId,
        /// Whose disk.
        volume: VolumeIx,
        /// What.
        op: DiskOp,
        /// Where; empty for a flush.
        range: SectorRange,
        /// Memory for reads and writes.
        buf: Option<Buf>,
    },
    /// Read pages of metadata; answered by `MetaRead`.
    MetaRead {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// First sector on the metadata device, a multiple of 8.
        sector: Sector,
        /// How many pages.
        pages: u32,
    },
    /// Write a page of metadata; answered by `MetaWritten`.
    MetaWrite {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// First sector on the metadata device, a multiple of 8.
        sector: Sector,
        /// The contents.
        page: Box<Page>,
        /// Flush the metadata device's cache before, and make this page durable.
        durable: bool,
    },
    /// Open the listening socket on the local address, or close it. Not answered; the driver logs
    /// a failure to listen and tries again with the next `Listen(true)`.
    Listen(bool),
    /// Try to connect to the peer; answered by `DialDone`.
    Dial {
        /// Names the answer.
        dial: DialId,
    },
    /// Send a packet. The payload memory stays untouched until `Sent` or `SockGone`.
    Send {
        /// Where.
        sock: SockId,
        /// The volume field of the header.
        volume: VolumeNr,
        /// The packet.
        packet: Packet,
        /// Its bulk data, `packet.payload_len()` bytes.
        payload: Option<Buf>,
        /// The header format in force.
        kind: HeaderKind,
    },
    /// Close a socket, giving up what is unsent; answered by `SockGone`.
    Close {
        /// Which.
        sock: SockId,
    },
    /// Answer the host.
    Complete {
        /// The volume.
        volume: VolumeIx,
        /// The slot.
        tag: HostTag,
        /// Success, or the error to report.
        result: Result<(), Errno>,
    },
    /// The exposed size of a volume: make its device, or change it. Zero: no size is known.
    SetSize {
        /// The volume.
        volume: VolumeIx,
        /// The size.
        sectors: Sector,
    },
    /// Answer the operator.
    Reply {
        /// The command.
        id: CommandId,
        /// The answer.
        result: Result<Reply, Refusal>,
    },
    /// Write a log line.
    Log {
        /// How loud.
        level: Level,
        /// About what.
        scope: Scope,
        /// The words.
        text: String,
    },
    /// Run a program of the operator. Not answered: nothing waits for what it does.
    RunHandler {
        /// Which.
        handler: Handler,
        /// What about; none: the whole resource.
        volume: Option<VolumeIx>,
    },
    /// Everything is put away, and every request of the host that could be answered is: the process
    /// may end. What is handed in until it has is answered as by a node without disk and peer, and
    /// commands are refused.
    Stop,
    /// The process ends now, like one that was killed: the devices stay, with every request that
    /// was not answered, for the next one.
    Leave,
}
