//! What both sides agreed on, and how long a packet's body may be.
//!
//! Lengths are checked from the header alone, before a byte of the body is asked for. The fixed
//! part never exceeds 4 KiB (WP-1). Features do not restrict which packets are accepted, only how
//! long they are.
//!
//! Source: protocol notes, sections 3 and 4.

use super::command::{Command, Stream};
use super::error::DecodeError;
use super::flags::Features;
use super::header::{Header, HeaderKind};
use crate::limits;

/// Bytes of the head of bulk data, of a block request and of an ack.
pub(super) const BLOCK_HEAD: u32 = 24;
/// Bytes of a discard or write of zeroes.
pub(super) const RANGE_HEAD: u32 = 28;
/// Bytes of a range without a request.
pub(super) const DESC: u32 = 16;
/// Bytes of the settings of a connection without the algorithm name.
pub(super) const PROTOCOL_HEAD: u32 = 24;
/// Bytes of an algorithm name field.
pub(super) const NAME_FIELD: u32 = 64;
/// Bytes of the features packet.
pub(super) const FEATURES_BODY: u32 = 72;
/// Bytes of the sizes packet without queue limits.
const SIZES_BODY: u32 = 32;
/// Bytes of the sizes packet with queue limits.
const SIZES_BODY_LIMITS: u32 = 56;
/// Bytes of the UUIDs packet.
const UUIDS_BODY: u32 = 48;
/// Longest digest.
pub(super) const DIGEST_MAX: u32 = 64;
/// Bytes of a sector: payload is a whole number of them.
pub(super) const SECTOR: u32 = 512;
/// First version with the resync settings that have a digest algorithm for checksums.
pub(super) const VERSION_SYNC_PARAM89: u32 = 89;
/// First version in which the settings of a connection can change while it lasts.
const VERSION_PROTOCOL_UPDATE: u32 = 100;
/// First version whose settings of a connection carry the integrity algorithm.
pub(super) const VERSION_INTEGRITY_NAME: u32 = 87;
/// Identifier of a comparison that found equal data.
pub(super) const ID_IN_SYNC: u64 = 0x1267;
/// Identifier of a comparison that found different data.
pub(super) const ID_OUT_OF_SYNC: u64 = 0x1268;
/// Flag of the settings of a connection: the sender offers to give up its data.
pub(super) const CONN_DISCARD_MY_DATA: u32 = 1;
/// Flag of the settings of a connection: nothing is to be changed.
pub(super) const CONN_DRY_RUN: u32 = 2;
/// The only encoding of compressed bitmaps.
pub(super) const BITMAP_ENCODING: u8 = 2;

/// What both sides have agreed on, as far as the layout of packets depends on it.
///
/// Digest sizes are in bytes, 0 if no algorithm is in use. They belong to one direction: an
/// update of the settings changes them at different points of the two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The protocol version; 80 before the features were exchanged.
    pub version: u32,
    /// The optional parts in use.
    pub features: Features,
    /// Size of the digest over mirrored data.
    pub integrity_digest: usize,
    /// Size of the digest of online verify.
    pub verify_digest: usize,
    /// Size of the digest of the checksum based resync.
    pub csums_digest: usize,
}

impl Agreed {
    /// What holds before the features were exchanged.
    pub const NOTHING: Self = Self {
        version: 80,
        features: Features::NONE,
        integrity_digest: 0,
        verify_digest: 0,
        csums_digest: 0,
    };

    /// The family of headers in use.
    #[must_use]
    pub const fn header_kind(&self) -> HeaderKind {
        HeaderKind::for_version(Some(self.version))
    }

    /// Largest payload of one packet, in bytes.
    #[must_use]
    pub const fn max_payload(&self) -> u32 {
        match self.version {
            0..95 => limits::MAX_BIO_SIZE_P94,
            95..100 => limits::MAX_BIO_SIZE_P95,
            100.. => limits::MAX_BIO_SIZE,
        }
    }

    /// Largest range of a discard or a write of zeroes, in bytes.
    #[must_use]
    pub const fn max_discard(&self) -> u32 {
        if self.features.contains(Features::WSAME) {
            limits::MAX_DISCARD_SIZE
        } else {
            limits::MAX_DISCARD_SIZE_OLD
        }
    }

    /// Largest body of a bitmap packet, in bytes.
    pub(super) fn max_bitmap_body(&self) -> u32 {
        to_u32(limits::CONTROL_PACKET_SIZE - self.header_kind().size())
    }

    /// The settings of resync and verify: the rate, then names, then the controller.
    const fn sync_param_shape(&self) -> Shape {
        match self.version {
            0..88 => Shape::Exact(4),
            88 => Shape::Between(5, 4 + NAME_FIELD),
            89..95 => Shape::Exact(132),
            95.. => Shape::Exact(148),
        }
    }
}

/// How a packet's body splits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyPlan {
    /// Bytes that go to [`decode`](super::decode); at most 4096.
    pub fixed: usize,
    /// Bytes of bulk data that follow them.
    pub payload: u32,
}

/// The lengths that a body can have.
#[derive(Clone, Copy)]
enum Shape {
    /// This many bytes.
    Exact(u32),
    /// From the first number of bytes to the second.
    Between(u32, u32),
    /// Whole words of eight bytes, at most this many bytes.
    Words(u32),
    /// A head of this many bytes, then whole sectors of payload.
    Payload(u32),
}

/// Says how much follows a header, and how it splits.
///
/// # Errors
/// [`DecodeError`] if the packet type is unknown on this socket or in this version, or if its
/// length is not one that it can have.
pub fn plan_body(
    stream: Stream,
    header: &Header,
    agreed: &Agreed,
) -> Result<BodyPlan, DecodeError> {
    let command = command_of(stream, header)?;
    check_version(command, agreed.version)?;
    let name = command.name();
    let found = header.length;
    let shape = shape_of(command, agreed);
    let (least, most, unit) = match shape {
        Shape::Exact(length) => (length, length, 1),
        Shape::Between(least, most) => (least, most, 1),
        Shape::Words(most) => (0, most, 8),
        Shape::Payload(head) => (head, head + agreed.max_payload(), SECTOR),
    };
    if found < least || found > most {
        return Err(DecodeError::Length { name, least, most, found });
    }
    if !(found - least).is_multiple_of(unit) {
        return Err(DecodeError::Alignment { name, unit, found: found - least });
    }
    let payload = match shape {
        Shape::Exact(_) | Shape::Between(..) | Shape::Words(_) => 0,
        Shape::Payload(head) => found - head,
    };
    let fixed = to_usize(found - payload);
    assert!(fixed <= limits::CONTROL_PACKET_SIZE, "a fixed part fits a control packet");
    Ok(BodyPlan { fixed, payload })
}

/// The packet type of a header that arrived on `stream`.
pub(super) fn command_of(stream: Stream, header: &Header) -> Result<Command, DecodeError> {
    Command::from_code(header.command)
        .filter(|command| command.is_on(stream))
        .ok_or(DecodeError::UnknownCommand { stream, command: header.command })
}

/// Refuses the few packets whose layout has no meaning in a version.
fn check_version(command: Command, version: u32) -> Result<(), DecodeError> {
    let known = if command == Command::SyncParam {
        version < VERSION_SYNC_PARAM89
    } else if command == Command::SyncParam89 {
        version >= VERSION_SYNC_PARAM89
    } else if command == Command::ProtocolUpdate {
        version >= VERSION_PROTOCOL_UPDATE
    } else {
        true
    };
    if known { Ok(()) } else { Err(DecodeError::NotInVersion { name: command.name(), version }) }
}

fn shape_of(command: Command, agreed: &Agreed) -> Shape {
    match command {
        Command::Data | Command::DataReply | Command::RsDataReply => {
            Shape::Payload(BLOCK_HEAD + to_u32(agreed.integrity_digest))
        }
        Command::Barrier
        | Command::BarrierAck
        | Command::StateChgReq
        | Command::ConnStChgReq
        | Command::SyncUuid
        | Command::DelayProbe => Shape::Exact(8),
        Command::Bitmap => Shape::Words(agreed.max_bitmap_body() / 8 * 8),
        Command::CompressedBitmap => Shape::Between(2, agreed.max_bitmap_body()),
        Command::UnplugRemote
        | Command::Ping
        | Command::PingAck
        | Command::InitialMeta
        | Command::InitialData => Shape::Exact(0),
        Command::DataRequest
        | Command::RsDataRequest
        | Command::RsThinRequest
        | Command::OvRequest
        | Command::RecvAck
        | Command::WriteAck
        | Command::RsWriteAck
        | Command::Superseded
        | Command::NegAck
        | Command::NegDReply
        | Command::NegRsDReply
        | Command::OvResult
        | Command::RsIsInSync
        | Command::RsCancel
        | Command::RetryWrite => Shape::Exact(BLOCK_HEAD),
        Command::OvReply => with_digest(agreed.verify_digest),
        Command::CsumRsRequest => with_digest(agreed.csums_digest),
        Command::SyncParam | Command::SyncParam89 => agreed.sync_param_shape(),
        Command::Protocol | Command::ProtocolUpdate => {
            if agreed.version < VERSION_INTEGRITY_NAME {
                Shape::Exact(PROTOCOL_HEAD)
            } else {
                Shape::Between(PROTOCOL_HEAD + 1, PROTOCOL_HEAD + NAME_FIELD)
            }
        }
        Command::Uuids => Shape::Exact(UUIDS_BODY),
        Command::Sizes => Shape::Exact(sizes_body(agreed)),
        Command::State | Command::StateChgReply | Command::ConnStChgReply => Shape::Exact(4),
        Command::AuthChallenge => {
            Shape::Between(to_u32(limits::CHALLENGE_SIZE), to_u32(limits::CHALLENGE_SIZE_MAX))
        }
        Command::AuthResponse => Shape::Between(1, DIGEST_MAX),
        Command::OutOfSync | Command::RsDeallocated => Shape::Exact(DESC),
        Command::Trim | Command::Zeroes => Shape::Exact(RANGE_HEAD),
        Command::ConnectionFeatures => Shape::Exact(FEATURES_BODY),
    }
}

/// A request with a digest. Without an agreed algorithm any digest is let through: it can still
/// be on the way when the algorithm is switched off.
fn with_digest(agreed: usize) -> Shape {
    if agreed == 0 {
        Shape::Between(BLOCK_HEAD, BLOCK_HEAD + DIGEST_MAX)
    } else {
        Shape::Exact(BLOCK_HEAD + to_u32(agreed))
    }
}

pub(super) fn sizes_body(agreed: &Agreed) -> u32 {
    if agreed.features.contains(Features::WSAME) { SIZES_BODY_LIMITS } else { SIZES_BODY }
}

/// A length that is bounded by [`limits::CONTROL_PACKET_SIZE`].
pub(super) fn to_u32(length: usize) -> u32 {
    u32::try_from(length).expect("packet lengths fit 32 bits")
}

/// A length field; `usize` has at least 32 bits on every supported target.
pub(super) fn to_usize(length: u32) -> usize {
    usize::try_from(length).expect("usize has at least 32 bits")
}
