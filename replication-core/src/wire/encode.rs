//! Writing packets: header and fixed part; payload is sent by the driver right behind them.
//!
//! Source: protocol notes, sections 1, 3, 4 and 10.1.

use super::codec::{
    Agreed, BITMAP_ENCODING, CONN_DISCARD_MY_DATA, CONN_DRY_RUN, FEATURES_BODY, ID_IN_SYNC,
    ID_OUT_OF_SYNC, NAME_FIELD, VERSION_INTEGRITY_NAME, VERSION_SYNC_PARAM89, sizes_body, to_u32,
    to_usize,
};
use super::command::Command;
use super::header::{Header, HeaderKind, encode_header};
use super::packet::{
    AlgName, BlockAck, BlockId, BlockRequest, DataHeader, Desc, FeaturesPacket, OvResult, Packet,
    Protocol, RangeHeader, Sizes, SyncParam, UuidsPacket,
};
use crate::units::VolumeNr;

/// First version whose settings of resync carry the rate controller.
const VERSION_CONTROLLER: u32 = 95;
/// First version whose settings of resync carry the verify algorithm.
const VERSION_VERIFY_NAME: u32 = 88;

/// Appends header and fixed part of `packet` to `out`. The length field includes the payload,
/// [`Packet::payload_len`] bytes, which the caller sends right behind.
///
/// Packets of the connection get volume 0, except the unplug hint. Flags that the agreed version
/// does not have are left out.
///
/// # Panics
/// If the digest of a data packet has another size than agreed: the peer would take the
/// difference for data.
pub fn encode(
    packet: &Packet,
    volume: VolumeNr,
    agreed: &Agreed,
    kind: HeaderKind,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    out.extend_from_slice(&[0; 16][..kind.size()]);
    encode_body(packet, agreed, out);
    let body = out.len() - start - kind.size();
    let command = match packet.kind() {
        Command::SyncParam89 if agreed.version < VERSION_SYNC_PARAM89 => Command::SyncParam,
        other => other,
    };
    let has_volume = !command.is_connection_level() || command == Command::UnplugRemote;
    let header = Header {
        volume: if has_volume { volume } else { VolumeNr(0) },
        command: command.code(),
        length: to_u32(body) + packet.payload_len(),
    };
    let (bytes, size) = encode_header(kind, agreed.version, header);
    out[start..start + size].copy_from_slice(&bytes[..size]);
}

fn encode_body(packet: &Packet, agreed: &Agreed, out: &mut Vec<u8>) {
    match packet {
        Packet::Data(header) | Packet::DataReply(header) | Packet::RsDataReply(header) => {
            data_header(header, agreed, out);
        }
        Packet::Trim(header) | Packet::Zeroes(header) => range_header(header, agreed, out),
        Packet::Barrier { barrier } => {
            out.extend_from_slice(&barrier.0.to_ne_bytes());
            put32(out, 0);
        }
        Packet::BarrierAck { barrier, set_size } => {
            out.extend_from_slice(&barrier.0.to_ne_bytes());
            put32(out, *set_size);
        }
        Packet::Bitmap(words) => out.extend_from_slice(words),
        Packet::CompressedBitmap(bitmap) => {
            assert!(bitmap.unused_bits < 8, "fewer bits are unused than a byte has");
            let polarity = if bitmap.first_run_set { 0x80 } else { 0 };
            out.push(BITMAP_ENCODING | (bitmap.unused_bits << 4) | polarity);
            out.extend_from_slice(&bitmap.code);
        }
        Packet::DataRequest(request)
        | Packet::RsDataRequest(request)
        | Packet::RsThinRequest(request)
        | Packet::OvRequest(request) => block_request(request, out),
        Packet::OvReply { request, digest } | Packet::CsumRsRequest { request, digest } => {
            block_request(request, out);
            out.extend_from_slice(digest);
        }
        Packet::Protocol(settings) | Packet::ProtocolUpdate(settings) => {
            protocol(settings, agreed, out);
        }
        Packet::SyncParam(param) => sync_param(param, agreed, out),
        Packet::Sizes(values) => sizes(values, agreed, out),
        Packet::Uuids(values) => uuids(values, out),
        Packet::State(word) => put32(out, *word),
        Packet::SyncUuid(uuid) => put64(out, *uuid),
        Packet::AuthChallenge(bytes) => out.extend_from_slice(bytes),
        Packet::AuthResponse(bytes) => out.extend_from_slice(bytes),
        Packet::StateChgReq { mask, value } | Packet::ConnStChgReq { mask, value } => {
            put32(out, *mask);
            put32(out, *value);
        }
        Packet::StateChgReply(code) | Packet::ConnStChgReply(code) => {
            out.extend_from_slice(&code.to_be_bytes());
        }
        Packet::OutOfSync(range) | Packet::RsDeallocated(range) => desc(*range, out),
        Packet::RecvAck(ack)
        | Packet::WriteAck(ack)
        | Packet::RsWriteAck(ack)
        | Packet::Superseded(ack)
        | Packet::NegAck(ack)
        | Packet::NegDReply(ack)
        | Packet::NegRsDReply(ack)
        | Packet::RsIsInSync(ack)
        | Packet::RsCancel(ack)
        | Packet::RetryWrite(ack) => block_ack(ack, out),
        Packet::OvResult(result) => ov_result(result, out),
        Packet::DelayProbe => put64(out, 0),
        Packet::ConnectionFeatures(values) => features(values, out),
        Packet::UnplugRemote
        | Packet::Ping
        | Packet::PingAck
        | Packet::InitialData
        | Packet::InitialMeta => {}
    }
}

fn put16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put_id(out: &mut Vec<u8>, id: BlockId) {
    out.extend_from_slice(&id.0.to_ne_bytes());
}

/// A name in a field of fixed size, filled up with NUL.
fn put_name_field(out: &mut Vec<u8>, name: &AlgName) {
    let end = out.len() + to_usize(NAME_FIELD);
    out.extend_from_slice(name.as_bytes());
    out.resize(end, 0);
}

/// A name with one NUL behind it.
fn put_name(out: &mut Vec<u8>, name: &AlgName) {
    out.extend_from_slice(name.as_bytes());
    out.push(0);
}

fn data_header(header: &DataHeader, agreed: &Agreed, out: &mut Vec<u8>) {
    let agreed_size = agreed.integrity_digest;
    assert_eq!(header.digest.len(), agreed_size, "the digest has the agreed size");
    put64(out, header.sector.0);
    put_id(out, header.block_id);
    put32(out, header.seq);
    put32(out, header.flags.for_version(agreed.version).0);
    out.extend_from_slice(&header.digest);
}

fn range_header(header: &RangeHeader, agreed: &Agreed, out: &mut Vec<u8>) {
    put64(out, header.sector.0);
    put_id(out, header.block_id);
    put32(out, header.seq);
    put32(out, header.flags.for_version(agreed.version).0);
    put32(out, header.size);
}

fn block_request(request: &BlockRequest, out: &mut Vec<u8>) {
    put64(out, request.sector.0);
    put_id(out, request.block_id);
    put32(out, request.size);
    put32(out, 0);
}

fn block_ack(ack: &BlockAck, out: &mut Vec<u8>) {
    put64(out, ack.sector.0);
    put_id(out, ack.block_id);
    put32(out, ack.size);
    put32(out, ack.seq);
}

fn ov_result(result: &OvResult, out: &mut Vec<u8>) {
    put64(out, result.sector.0);
    put64(out, if result.equal { ID_IN_SYNC } else { ID_OUT_OF_SYNC });
    put32(out, result.size);
    put32(out, result.seq);
}

fn desc(range: Desc, out: &mut Vec<u8>) {
    put64(out, range.sector.0);
    put32(out, range.size);
    put32(out, 0);
}

fn protocol(settings: &Protocol, agreed: &Agreed, out: &mut Vec<u8>) {
    let discard = if settings.discard_my_data { CONN_DISCARD_MY_DATA } else { 0 };
    let dry_run = if settings.dry_run { CONN_DRY_RUN } else { 0 };
    put32(out, settings.protocol.code());
    put32(out, settings.after_sb_0pri);
    put32(out, settings.after_sb_1pri);
    put32(out, settings.after_sb_2pri);
    put32(out, discard | dry_run);
    put32(out, u32::from(settings.two_primaries));
    if agreed.version >= VERSION_INTEGRITY_NAME {
        put_name(out, &settings.integrity_alg);
    }
}

fn sync_param(param: &SyncParam, agreed: &Agreed, out: &mut Vec<u8>) {
    put32(out, param.rate);
    if agreed.version < VERSION_VERIFY_NAME {
        return;
    }
    if agreed.version < VERSION_SYNC_PARAM89 {
        put_name(out, &param.verify_alg);
        return;
    }
    put_name_field(out, &param.verify_alg);
    put_name_field(out, &param.csums_alg);
    if agreed.version < VERSION_CONTROLLER {
        return;
    }
    let controller = param.controller.unwrap_or_default();
    put32(out, controller.plan_ahead);
    put32(out, controller.delay_target);
    put32(out, controller.fill_target);
    put32(out, controller.max_rate);
}

fn sizes(values: &Sizes, agreed: &Agreed, out: &mut Vec<u8>) {
    let start = out.len();
    put64(out, values.disk_sectors);
    put64(out, values.user_sectors);
    put64(out, values.current_sectors);
    put32(out, values.max_request);
    put16(out, values.queue_order);
    put16(out, values.flags.0);
    let end = start + to_usize(sizes_body(agreed));
    if out.len() == end {
        return;
    }
    let limits = values.limits.unwrap_or_default();
    put32(out, limits.physical_block);
    put32(out, limits.logical_block);
    put32(out, limits.alignment_offset);
    put32(out, limits.io_min);
    put32(out, limits.io_opt);
    let switches = [limits.discard, limits.discard_zeroes, limits.write_same];
    out.extend_from_slice(&switches.map(u8::from));
    out.push(0);
    assert_eq!(out.len(), end, "the queue limits fill the packet");
}

fn uuids(values: &UuidsPacket, out: &mut Vec<u8>) {
    put64(out, values.current);
    put64(out, values.bitmap);
    put64(out, values.history[0]);
    put64(out, values.history[1]);
    put64(out, values.bits_set);
    put64(out, values.flags.0);
}

fn features(values: &FeaturesPacket, out: &mut Vec<u8>) {
    let end = out.len() + to_usize(FEATURES_BODY);
    put32(out, values.protocol_min);
    put32(out, values.features.0);
    put32(out, values.protocol_max);
    out.resize(end, 0);
}
