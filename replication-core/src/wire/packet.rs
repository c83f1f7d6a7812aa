//! The packets, typed: what each carries, in host byte order.
//!
//! Opaque tokens of the peer keep the byte order of whoever made them, because they are echoed
//! byte for byte. Pads are not part of a packet: they are sent as zero and ignored on receipt.

use arrayvec::{ArrayString, ArrayVec};
use serde::{Deserialize, Serialize};

use super::command::{Command, Stream};
use super::flags::{DpFlags, Features, SizesFlags, UuidFlags};
use crate::units::Sector;

/// An algorithm name as Linux spells it; empty if none. At most 63 bytes of printable ASCII.
pub type AlgName = ArrayString<63>;

/// A digest, as the hash produces it.
pub type Digest = ArrayVec<u8, 64>;

/// The replication protocol: when a write counts as done. Shared with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ReplicationProtocol {
    /// Done when it is on the local disk and in the send buffer.
    A = 1,
    /// Done when the peer has received it.
    B = 2,
    /// Done when it is on both disks.
    C = 3,
}

impl ReplicationProtocol {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::A => 1,
            Self::B => 2,
            Self::C => 3,
        }
    }

    /// The protocol of a number on the wire.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::A),
            2 => Some(Self::B),
            3 => Some(Self::C),
            _ => None,
        }
    }
}

/// Names a request in its answer; chosen by the requester, echoed by the other.
///
/// Shape: eight raw bytes, held in native byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u64);

impl BlockId {
    /// Resync and verify, which have no request of the host behind them.
    pub const SYNCER: Self = Self(u64::MAX);
}

/// Names an epoch in its barrier ack; chosen by the sender of the writes, echoed by the other.
///
/// Shape: four raw bytes, held in native byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarrierToken(pub u32);

/// The head of a packet with bulk data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataHeader {
    /// First sector of the data.
    pub sector: Sector,
    /// Names the write or the read request.
    pub block_id: BlockId,
    /// Sequence number of the write; 0 in replies.
    pub seq: u32,
    /// Flags of the write; none in replies.
    pub flags: DpFlags,
    /// Digest of the data; empty unless data integrity is in use.
    pub digest: Digest,
    /// Bytes of data, a multiple of 512. Only an empty flush of an old peer has none.
    pub len: u32,
}

/// A mirrored operation on a range that carries no data: discard and write of zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RangeHeader {
    /// First sector of the range.
    pub sector: Sector,
    /// Names the operation.
    pub block_id: BlockId,
    /// Sequence number of the operation.
    pub seq: u32,
    /// Flags of the operation.
    pub flags: DpFlags,
    /// Bytes of the range, a multiple of 512.
    pub size: u32,
}

/// Asks for blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRequest {
    /// First sector.
    pub sector: Sector,
    /// Names the request.
    pub block_id: BlockId,
    /// Bytes, a multiple of 512, not zero.
    pub size: u32,
}

/// The outcome of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockAck {
    /// First sector of the request.
    pub sector: Sector,
    /// The name of the request, echoed.
    pub block_id: BlockId,
    /// Bytes of the request.
    pub size: u32,
    /// Sequence number of this ack.
    pub seq: u32,
}

/// The outcome of a verify request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OvResult {
    /// First sector of the request.
    pub sector: Sector,
    /// Bytes of the request.
    pub size: u32,
    /// Sequence number of this ack.
    pub seq: u32,
    /// Whether both sides hold the same data.
    pub equal: bool,
}

/// A range without a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// First sector.
    pub sector: Sector,
    /// Bytes, a multiple of 512, not zero.
    pub size: u32,
}

/// A piece of a run-length coded bitmap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompressedBitmap {
    /// Whether the first run is one of set bits.
    pub first_run_set: bool,
    /// Unused bits at the end of the last byte, 0 to 7.
    pub unused_bits: u8,
    /// The code words, least significant bit of the first byte first.
    pub code: Vec<u8>,
}

/// Settings of the connection that both sides must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// When a write counts as done.
    pub protocol: ReplicationProtocol,
    /// Code of the policy after a split brain without a Primary.
    pub after_sb_0pri: u32,
    /// Code of the policy after a split brain with one Primary.
    pub after_sb_1pri: u32,
    /// Code of the policy after a split brain with two Primaries.
    pub after_sb_2pri: u32,
    /// The sender offers to give up its data.
    pub discard_my_data: bool,
    /// The handshake ends before anything is changed.
    pub dry_run: bool,
    /// Both nodes may be Primary.
    pub two_primaries: bool,
    /// Algorithm of the digests over mirrored data; not transmitted before version 87.
    pub integrity_alg: AlgName,
}

/// Settings of the resync rate controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResyncController {
    /// Look-ahead in tenths of a second; 0 selects the fixed rate.
    pub plan_ahead: u32,
    /// Delay aimed at, in tenths of a second.
    pub delay_target: u32,
    /// Sectors in flight aimed at.
    pub fill_target: u32,
    /// Highest rate in KiB/s.
    pub max_rate: u32,
}

impl Default for ResyncController {
    /// The defaults of the in-kernel driver, which a node without a disk announces.
    fn default() -> Self {
        Self { plan_ahead: 20, delay_target: 10, fill_target: 100, max_rate: 102_400 }
    }
}

/// Settings of resync and verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncParam {
    /// Resync rate in KiB/s.
    pub rate: u32,
    /// Algorithm of online verify; transmitted from version 88 on.
    pub verify_alg: AlgName,
    /// Algorithm of the checksum based resync; transmitted from version 89 on.
    pub csums_alg: AlgName,
    /// The rate controller. `Some` in packets received from version 95 on; `None` is sent as the
    /// default there.
    pub controller: Option<ResyncController>,
}

/// Limits of the sender's backing device. The in-kernel driver reads and ignores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Bytes of a physical block.
    pub physical_block: u32,
    /// Bytes of a logical block.
    pub logical_block: u32,
    /// Bytes from the start of the device to the first aligned physical block.
    pub alignment_offset: u32,
    /// Least bytes of an efficient request.
    pub io_min: u32,
    /// Best bytes of a request; 0 if unknown.
    pub io_opt: u32,
    /// The device can discard.
    pub discard: bool,
    /// Discarded blocks read as zeroes.
    pub discard_zeroes: bool,
    /// The device can repeat a block over a range.
    pub write_same: bool,
}

impl Default for QueueLimits {
    /// A plain device of 512-byte sectors.
    fn default() -> Self {
        Self {
            physical_block: 512,
            logical_block: 512,
            alignment_offset: 0,
            io_min: 512,
            io_opt: 0,
            discard: false,
            discard_zeroes: false,
            write_same: false,
        }
    }
}

/// The sizes of a volume as the sender sees them, in sectors. Not bounded by the decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Usable sectors of the sender's disk; 0 without a disk.
    pub disk_sectors: u64,
    /// Sectors that the operator asks for; 0 if not limited.
    pub user_sectors: u64,
    /// Sectors of the device now; 0 also asks for an answer.
    pub current_sectors: u64,
    /// Largest request accepted, in bytes.
    pub max_request: u32,
    /// Kind of ordering of the queue: 0.
    pub queue_order: u16,
    /// Flags.
    pub flags: SizesFlags,
    /// `Some` in packets received while the WSAME feature is agreed; `None` is sent as the default
    /// then.
    pub limits: Option<QueueLimits>,
}

/// The data generations of a volume as the sender sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UuidsPacket {
    /// The current generation.
    pub current: u64,
    /// The generation from which on the bitmap counts.
    pub bitmap: u64,
    /// Earlier generations, the youngest first.
    pub history: [u64; 2],
    /// Bits set in the sender's bitmap.
    pub bits_set: u64,
    /// Flags.
    pub flags: UuidFlags,
}

/// The first packet of the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeaturesPacket {
    /// Lowest protocol version spoken.
    pub protocol_min: u32,
    /// Optional parts offered.
    pub features: Features,
    /// Highest protocol version spoken; 0 means the lowest.
    pub protocol_max: u32,
}

/// A packet without its bulk payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// `P_DATA`: a mirrored write; payload follows.
    Data(DataHeader),
    /// `P_DATA_REPLY`: answer to a read; payload follows.
    DataReply(DataHeader),
    /// `P_RS_DATA_REPLY`: resync data; payload follows.
    RsDataReply(DataHeader),
    /// `P_BARRIER`: the end of an epoch.
    Barrier {
        /// Names the epoch.
        barrier: BarrierToken,
    },
    /// `P_BITMAP`: whole little-endian words of the bitmap; none ends the transfer.
    Bitmap(Vec<u8>),
    /// `P_COMPRESSED_BITMAP`: runs of the bitmap.
    CompressedBitmap(CompressedBitmap),
    /// `P_UNPLUG_REMOTE`: nothing more for the moment.
    UnplugRemote,
    /// `P_DATA_REQUEST`: a read of the host.
    DataRequest(BlockRequest),
    /// `P_RS_DATA_REQUEST`: the sync target asks for blocks.
    RsDataRequest(BlockRequest),
    /// `P_RS_THIN_REQ`: the same, and zeroes need not be sent.
    RsThinRequest(BlockRequest),
    /// `P_OV_REQUEST`: asks for a digest.
    OvRequest(BlockRequest),
    /// `P_OV_REPLY`: the digest asked for.
    OvReply {
        /// The blocks.
        request: BlockRequest,
        /// Digest over all of them.
        digest: Digest,
    },
    /// `P_CSUM_RS_REQUEST`: asks for blocks unless the digest is the same.
    CsumRsRequest {
        /// The blocks.
        request: BlockRequest,
        /// Digest over all of them.
        digest: Digest,
    },
    /// `P_PROTOCOL`: settings of the connection.
    Protocol(Protocol),
    /// `P_PROTOCOL_UPDATE`: changed settings of the connection.
    ProtocolUpdate(Protocol),
    /// `P_SYNC_PARAM89`, before version 89 `P_SYNC_PARAM`: settings of resync and verify.
    SyncParam(SyncParam),
    /// `P_SIZES`.
    Sizes(Sizes),
    /// `P_UUIDS`.
    Uuids(UuidsPacket),
    /// `P_STATE`: the sender's state word.
    State(u32),
    /// `P_SYNC_UUID`: the generation of a starting resync.
    SyncUuid(u64),
    /// `P_AUTH_CHALLENGE`: random bytes.
    AuthChallenge(ArrayVec<u8, 128>),
    /// `P_AUTH_RESPONSE`: the digest over the challenge.
    AuthResponse(Digest),
    /// `P_STATE_CHG_REQ`: asks to change the state of a volume.
    StateChgReq {
        /// Fields concerned.
        mask: u32,
        /// Their values.
        value: u32,
    },
    /// `P_CONN_ST_CHG_REQ`: asks to change the state of all volumes.
    ConnStChgReq {
        /// Fields concerned.
        mask: u32,
        /// Their values.
        value: u32,
    },
    /// `P_STATE_CHG_REPLY`: result code.
    StateChgReply(i32),
    /// `P_CONN_ST_CHG_REPLY`: result code.
    ConnStChgReply(i32),
    /// `P_OUT_OF_SYNC`: written on the sender alone.
    OutOfSync(Desc),
    /// `P_RS_DEALLOCATED`: the range holds zeroes.
    RsDeallocated(Desc),
    /// `P_TRIM`: a mirrored discard.
    Trim(RangeHeader),
    /// `P_ZEROES`: a mirrored write of zeroes.
    Zeroes(RangeHeader),
    /// `P_PING`.
    Ping,
    /// `P_PING_ACK`.
    PingAck,
    /// `P_RECV_ACK`: the write was received.
    RecvAck(BlockAck),
    /// `P_WRITE_ACK`: the write is on disk.
    WriteAck(BlockAck),
    /// `P_RS_WRITE_ACK`: the resync block is on disk, or the write is and its bits are clear.
    RsWriteAck(BlockAck),
    /// `P_SUPERSEDED`: the write lost against a concurrent one and counts as done.
    Superseded(BlockAck),
    /// `P_NEG_ACK`: the write failed.
    NegAck(BlockAck),
    /// `P_NEG_DREPLY`: the read failed.
    NegDReply(BlockAck),
    /// `P_NEG_RS_DREPLY`: the resync or verify read failed.
    NegRsDReply(BlockAck),
    /// `P_BARRIER_ACK`: an epoch is stable.
    BarrierAck {
        /// The name of the epoch, echoed.
        barrier: BarrierToken,
        /// Number of writes in the epoch.
        set_size: u32,
    },
    /// `P_OV_RESULT`: the outcome of a comparison.
    OvResult(OvResult),
    /// `P_RS_IS_IN_SYNC`: the digests are the same.
    RsIsInSync(BlockAck),
    /// `P_RS_CANCEL`: the resync request is not served.
    RsCancel(BlockAck),
    /// `P_RETRY_WRITE`: the write has to be sent again.
    RetryWrite(BlockAck),
    /// `P_DELAY_PROBE`: without meaning.
    DelayProbe,
    /// `P_INITIAL_DATA`: this connection is the data socket.
    InitialData,
    /// `P_INITIAL_META`: this connection is the meta socket.
    InitialMeta,
    /// `P_CONNECTION_FEATURES`: versions and features.
    ConnectionFeatures(FeaturesPacket),
}

impl Packet {
    /// The packet type; for [`Packet::SyncParam`] the one in use since version 89.
    #[must_use]
    pub const fn kind(&self) -> Command {
        match self {
            Self::Data(_) => Command::Data,
            Self::DataReply(_) => Command::DataReply,
            Self::RsDataReply(_) => Command::RsDataReply,
            Self::Barrier { .. } => Command::Barrier,
            Self::Bitmap(_) => Command::Bitmap,
            Self::CompressedBitmap(_) => Command::CompressedBitmap,
            Self::UnplugRemote => Command::UnplugRemote,
            Self::DataRequest(_) => Command::DataRequest,
            Self::RsDataRequest(_) => Command::RsDataRequest,
            Self::RsThinRequest(_) => Command::RsThinRequest,
            Self::OvRequest(_) => Command::OvRequest,
            Self::OvReply { .. } => Command::OvReply,
            Self::CsumRsRequest { .. } => Command::CsumRsRequest,
            Self::Protocol(_) => Command::Protocol,
            Self::ProtocolUpdate(_) => Command::ProtocolUpdate,
            Self::SyncParam(_) => Command::SyncParam89,
            Self::Sizes(_) => Command::Sizes,
            Self::Uuids(_) => Command::Uuids,
            Self::State(_) => Command::State,
            Self::SyncUuid(_) => Command::SyncUuid,
            Self::AuthChallenge(_) => Command::AuthChallenge,
            Self::AuthResponse(_) => Command::AuthResponse,
            Self::StateChgReq { .. } => Command::StateChgReq,
            Self::ConnStChgReq { .. } => Command::ConnStChgReq,
            Self::StateChgReply(_) => Command::StateChgReply,
            Self::ConnStChgReply(_) => Command::ConnStChgReply,
            Self::OutOfSync(_) => Command::OutOfSync,
            Self::RsDeallocated(_) => Command::RsDeallocated,
            Self::Trim(_) => Command::Trim,
            Self::Zeroes(_) => Command::Zeroes,
            Self::Ping => Command::Ping,
            Self::PingAck => Command::PingAck,
            Self::RecvAck(_) => Command::RecvAck,
            Self::WriteAck(_) => Command::WriteAck,
            Self::RsWriteAck(_) => Command::RsWriteAck,
            Self::Superseded(_) => Command::Superseded,
            Self::NegAck(_) => Command::NegAck,
            Self::NegDReply(_) => Command::NegDReply,
            Self::NegRsDReply(_) => Command::NegRsDReply,
            Self::BarrierAck { .. } => Command::BarrierAck,
            Self::OvResult(_) => Command::OvResult,
            Self::RsIsInSync(_) => Command::RsIsInSync,
            Self::RsCancel(_) => Command::RsCancel,
            Self::RetryWrite(_) => Command::RetryWrite,
            Self::DelayProbe => Command::DelayProbe,
            Self::InitialData => Command::InitialData,
            Self::InitialMeta => Command::InitialMeta,
            Self::ConnectionFeatures(_) => Command::ConnectionFeatures,
        }
    }

    /// The number of the packet type; see [`Packet::kind`].
    #[must_use]
    pub const fn command(&self) -> u16 {
        self.kind().code()
    }

    /// The customary name, as `P_DATA`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// The socket that carries it; `None` if both may.
    #[must_use]
    pub const fn stream(&self) -> Option<Stream> {
        self.kind().stream()
    }

    /// Whether the packet concerns the connection, so that its volume number has no meaning.
    #[must_use]
    pub const fn is_connection_level(&self) -> bool {
        self.kind().is_connection_level()
    }

    /// Bytes of bulk data that follow the packet.
    #[must_use]
    pub const fn payload_len(&self) -> u32 {
        match self.data_header() {
            Some(header) => header.len,
            None => 0,
        }
    }

    /// The head of the bulk data, in packets that have any.
    #[must_use]
    pub const fn data_header(&self) -> Option<&DataHeader> {
        if let Self::Data(header) | Self::DataReply(header) | Self::RsDataReply(header) = self {
            Some(header)
        } else {
            None
        }
    }
}
