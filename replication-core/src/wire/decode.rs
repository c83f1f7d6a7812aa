//! Reading the fixed part of a packet.
//!
//! Everything that needs no device is checked here (WP-4): sizes are whole sectors within the
//! limits of the version, and ranges end within the largest device, so that later arithmetic on
//! them cannot overflow. Pads are skipped: the in-kernel driver leaves old bytes in them.
//!
//! Source: protocol notes, sections 3, 4 and 10.1.

use arrayvec::ArrayVec;

use super::bytes::{be16, be32, be64, ne32, ne64};
use super::codec::{
    Agreed, BITMAP_ENCODING, BLOCK_HEAD, CONN_DISCARD_MY_DATA, CONN_DRY_RUN, ID_IN_SYNC,
    ID_OUT_OF_SYNC, SECTOR, VERSION_INTEGRITY_NAME, VERSION_SYNC_PARAM89, command_of, plan_body,
    to_usize,
};
use super::command::{Command, Stream};
use super::error::DecodeError;
use super::flags::{DpFlags, Features, SizesFlags, UuidFlags};
use super::header::Header;
use super::packet::{
    AlgName, BarrierToken, BlockAck, BlockId, BlockRequest, CompressedBitmap, DataHeader, Desc,
    Digest, FeaturesPacket, OvResult, Packet, Protocol, QueueLimits, RangeHeader,
    ReplicationProtocol, ResyncController, Sizes, SyncParam, UuidsPacket,
};
use crate::limits;
use crate::units::Sector;

/// Decodes the fixed part of a packet; `fixed` holds the bytes that [`plan_body`] asked for.
///
/// # Errors
/// What [`plan_body`] refuses, a `fixed` of another length, and fields without a meaning.
pub fn decode(
    stream: Stream,
    header: &Header,
    fixed: &[u8],
    agreed: &Agreed,
) -> Result<Packet, DecodeError> {
    let plan = plan_body(stream, header, agreed)?;
    let command = command_of(stream, header)?;
    let body = Body { name: command.name(), bytes: fixed, agreed };
    if fixed.len() != plan.fixed {
        let (expected, found) = (plan.fixed, fixed.len());
        return Err(DecodeError::FixedPart { name: body.name, expected, found });
    }
    packet(command, &body, plan.payload)
}

fn packet(command: Command, body: &Body<'_>, payload: u32) -> Result<Packet, DecodeError> {
    let fixed = body.bytes;
    Ok(match command {
        Command::Data => Packet::Data(body.data_header(payload)?),
        Command::DataReply => Packet::DataReply(body.data_header(payload)?),
        Command::RsDataReply => Packet::RsDataReply(body.data_header(payload)?),
        Command::Barrier => Packet::Barrier { barrier: BarrierToken(ne32(fixed, 0)) },
        Command::Bitmap => Packet::Bitmap(fixed.to_vec()),
        Command::CompressedBitmap => Packet::CompressedBitmap(body.compressed_bitmap()?),
        Command::UnplugRemote => Packet::UnplugRemote,
        Command::DataRequest => Packet::DataRequest(body.block_request()?),
        Command::RsDataRequest => Packet::RsDataRequest(body.block_request()?),
        Command::RsThinRequest => Packet::RsThinRequest(body.block_request()?),
        Command::OvRequest => Packet::OvRequest(body.block_request()?),
        Command::OvReply => {
            Packet::OvReply { request: body.block_request()?, digest: body.digest() }
        }
        Command::CsumRsRequest => {
            Packet::CsumRsRequest { request: body.block_request()?, digest: body.digest() }
        }
        Command::Protocol => Packet::Protocol(body.protocol()?),
        Command::ProtocolUpdate => Packet::ProtocolUpdate(body.protocol()?),
        Command::SyncParam | Command::SyncParam89 => Packet::SyncParam(body.sync_param()?),
        Command::Sizes => Packet::Sizes(body.sizes()),
        Command::Uuids => Packet::Uuids(body.uuids()),
        Command::State => Packet::State(be32(fixed, 0)),
        Command::SyncUuid => Packet::SyncUuid(be64(fixed, 0)),
        Command::AuthChallenge => Packet::AuthChallenge(body.array(0)),
        Command::AuthResponse => Packet::AuthResponse(body.array(0)),
        Command::StateChgReq => Packet::StateChgReq { mask: be32(fixed, 0), value: be32(fixed, 4) },
        Command::ConnStChgReq => {
            Packet::ConnStChgReq { mask: be32(fixed, 0), value: be32(fixed, 4) }
        }
        Command::StateChgReply => Packet::StateChgReply(be32(fixed, 0).cast_signed()),
        Command::ConnStChgReply => Packet::ConnStChgReply(be32(fixed, 0).cast_signed()),
        Command::OutOfSync => Packet::OutOfSync(body.desc()?),
        Command::RsDeallocated => Packet::RsDeallocated(body.desc()?),
        Command::Trim => Packet::Trim(body.range_header()?),
        Command::Zeroes => Packet::Zeroes(body.range_header()?),
        Command::Ping => Packet::Ping,
        Command::PingAck => Packet::PingAck,
        Command::RecvAck => Packet::RecvAck(body.block_ack()?),
        Command::WriteAck => Packet::WriteAck(body.block_ack()?),
        Command::RsWriteAck => Packet::RsWriteAck(body.block_ack()?),
        Command::Superseded => Packet::Superseded(body.block_ack()?),
        Command::NegAck => Packet::NegAck(body.block_ack()?),
        Command::NegDReply => Packet::NegDReply(body.block_ack()?),
        Command::NegRsDReply => Packet::NegRsDReply(body.block_ack()?),
        Command::BarrierAck => {
            Packet::BarrierAck { barrier: BarrierToken(ne32(fixed, 0)), set_size: be32(fixed, 4) }
        }
        Command::OvResult => Packet::OvResult(body.ov_result()?),
        Command::RsIsInSync => Packet::RsIsInSync(body.block_ack()?),
        Command::RsCancel => Packet::RsCancel(body.block_ack()?),
        Command::RetryWrite => Packet::RetryWrite(body.block_ack()?),
        Command::DelayProbe => Packet::DelayProbe,
        Command::InitialData => Packet::InitialData,
        Command::InitialMeta => Packet::InitialMeta,
        Command::ConnectionFeatures => Packet::ConnectionFeatures(body.features()),
    })
}

/// The fixed part of a packet, its length already checked against the packet's layout.
struct Body<'a> {
    name: &'static str,
    bytes: &'a [u8],
    agreed: &'a Agreed,
}

impl Body<'_> {
    fn field<T>(&self, field: &'static str, found: impl Into<u64>) -> Result<T, DecodeError> {
        Err(DecodeError::Field { name: self.name, field, found: found.into() })
    }

    /// The bytes from `at` to the end; the layout bounds their number.
    fn array<const N: usize>(&self, at: usize) -> ArrayVec<u8, N> {
        ArrayVec::try_from(&self.bytes[at..]).expect("the layout bounds the length")
    }

    /// A range of sectors: whole sectors that end within the largest device.
    fn range(&self, size: u32) -> Result<Sector, DecodeError> {
        if !size.is_multiple_of(SECTOR) {
            return self.field("size", size);
        }
        let sector = be64(self.bytes, 0);
        let limit = limits::MAX_DEVICE_SECTORS;
        let end = sector.checked_add(u64::from(size / SECTOR));
        if end.is_none_or(|end| end > limit) {
            return Err(DecodeError::Range { name: self.name, sector, size, limit });
        }
        Ok(Sector(sector))
    }

    /// A range that may not be empty.
    fn filled_range(&self, size: u32, most: u32) -> Result<Sector, DecodeError> {
        if size == 0 || size > most {
            return self.field("size", size);
        }
        self.range(size)
    }

    fn data_header(&self, len: u32) -> Result<DataHeader, DecodeError> {
        Ok(DataHeader {
            sector: self.range(len)?,
            block_id: BlockId(ne64(self.bytes, 8)),
            seq: be32(self.bytes, 16),
            flags: self.write_flags(),
            digest: self.digest(),
            len,
        })
    }

    /// The flags of a write, as far as the agreed version has them.
    fn write_flags(&self) -> DpFlags {
        DpFlags(be32(self.bytes, 20)).for_version(self.agreed.version)
    }

    fn range_header(&self) -> Result<RangeHeader, DecodeError> {
        let size = be32(self.bytes, 24);
        Ok(RangeHeader {
            sector: self.filled_range(size, self.agreed.max_discard())?,
            block_id: BlockId(ne64(self.bytes, 8)),
            seq: be32(self.bytes, 16),
            flags: self.write_flags(),
            size,
        })
    }

    fn block_request(&self) -> Result<BlockRequest, DecodeError> {
        let size = be32(self.bytes, 16);
        Ok(BlockRequest {
            sector: self.filled_range(size, limits::MAX_BIO_SIZE)?,
            block_id: BlockId(ne64(self.bytes, 8)),
            size,
        })
    }

    /// The digest behind the head of a block packet.
    fn digest(&self) -> Digest {
        self.array(to_usize(BLOCK_HEAD))
    }

    fn block_ack(&self) -> Result<BlockAck, DecodeError> {
        let size = be32(self.bytes, 16);
        Ok(BlockAck {
            sector: self.range(size)?,
            block_id: BlockId(ne64(self.bytes, 8)),
            size,
            seq: be32(self.bytes, 20),
        })
    }

    fn ov_result(&self) -> Result<OvResult, DecodeError> {
        let equal = match be64(self.bytes, 8) {
            ID_IN_SYNC => true,
            ID_OUT_OF_SYNC => false,
            other => return self.field("verify result", other),
        };
        let size = be32(self.bytes, 16);
        Ok(OvResult { sector: self.range(size)?, size, seq: be32(self.bytes, 20), equal })
    }

    fn desc(&self) -> Result<Desc, DecodeError> {
        let size = be32(self.bytes, 8);
        Ok(Desc { sector: self.filled_range(size, u32::MAX)?, size })
    }

    fn compressed_bitmap(&self) -> Result<CompressedBitmap, DecodeError> {
        let head = self.bytes[0];
        if head & 0x0f != BITMAP_ENCODING {
            return self.field("bitmap encoding", head & 0x0f);
        }
        Ok(CompressedBitmap {
            first_run_set: head & 0x80 != 0,
            unused_bits: (head >> 4) & 7,
            code: self.bytes[1..].to_vec(),
        })
    }

    fn protocol(&self) -> Result<Protocol, DecodeError> {
        let code = be32(self.bytes, 0);
        let Some(protocol) = ReplicationProtocol::from_code(code) else {
            return self.field("replication protocol", code);
        };
        let flags = be32(self.bytes, 16);
        let integrity_alg = if self.agreed.version < VERSION_INTEGRITY_NAME {
            AlgName::new()
        } else {
            self.alg_name("integrity algorithm", &self.bytes[24..])?
        };
        Ok(Protocol {
            protocol,
            after_sb_0pri: be32(self.bytes, 4),
            after_sb_1pri: be32(self.bytes, 8),
            after_sb_2pri: be32(self.bytes, 12),
            discard_my_data: flags & CONN_DISCARD_MY_DATA != 0,
            dry_run: flags & CONN_DRY_RUN != 0,
            two_primaries: be32(self.bytes, 20) != 0,
            integrity_alg,
        })
    }

    fn sync_param(&self) -> Result<SyncParam, DecodeError> {
        let mut param = SyncParam { rate: be32(self.bytes, 0), ..SyncParam::default() };
        let version = self.agreed.version;
        if version < VERSION_SYNC_PARAM89 {
            if version == VERSION_SYNC_PARAM89 - 1 {
                param.verify_alg = self.alg_name("verify algorithm", &self.bytes[4..])?;
            }
            return Ok(param);
        }
        param.verify_alg = self.alg_name("verify algorithm", &self.bytes[4..68])?;
        param.csums_alg = self.alg_name("checksum algorithm", &self.bytes[68..132])?;
        if self.bytes.len() > 132 {
            param.controller = Some(ResyncController {
                plan_ahead: be32(self.bytes, 132),
                delay_target: be32(self.bytes, 136),
                fill_target: be32(self.bytes, 140),
                max_rate: be32(self.bytes, 144),
            });
        }
        Ok(param)
    }

    /// The name before the first NUL of a field.
    fn alg_name(&self, field: &'static str, bytes: &[u8]) -> Result<AlgName, DecodeError> {
        let malformed = DecodeError::Name { name: self.name, field };
        let end = bytes.iter().position(|byte| *byte == 0).ok_or(malformed)?;
        let name = &bytes[..end];
        if !name.iter().all(u8::is_ascii_graphic) {
            return Err(malformed);
        }
        let name = str::from_utf8(name).map_err(|_| malformed)?;
        AlgName::from(name).map_err(|_| malformed)
    }

    fn sizes(&self) -> Sizes {
        let limits = self.agreed.features.contains(Features::WSAME).then(|| QueueLimits {
            physical_block: be32(self.bytes, 32),
            logical_block: be32(self.bytes, 36),
            alignment_offset: be32(self.bytes, 40),
            io_min: be32(self.bytes, 44),
            io_opt: be32(self.bytes, 48),
            discard: self.bytes[52] != 0,
            discard_zeroes: self.bytes[53] != 0,
            write_same: self.bytes[54] != 0,
        });
        Sizes {
            disk_sectors: be64(self.bytes, 0),
            user_sectors: be64(self.bytes, 8),
            current_sectors: be64(self.bytes, 16),
            max_request: be32(self.bytes, 24),
            queue_order: be16(self.bytes, 28),
            flags: SizesFlags(be16(self.bytes, 30)),
            limits,
        }
    }

    fn uuids(&self) -> UuidsPacket {
        UuidsPacket {
            current: be64(self.bytes, 0),
            bitmap: be64(self.bytes, 8),
            history: [be64(self.bytes, 16), be64(self.bytes, 24)],
            bits_set: be64(self.bytes, 32),
            flags: UuidFlags(be64(self.bytes, 40)),
        }
    }

    fn features(&self) -> FeaturesPacket {
        FeaturesPacket {
            protocol_min: be32(self.bytes, 0),
            features: Features(be32(self.bytes, 4)),
            protocol_max: be32(self.bytes, 8),
        }
    }
}
