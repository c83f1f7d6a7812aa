//! Captured connections of the in-kernel driver, read completely and written again.
//!
//! Shows that every byte of every captured stream belongs to a packet that is read as the
//! independent packet list beside the capture says, and that writing the packet again gives the
//! same bytes. Pads, in which the in-kernel driver leaves old bytes, are taken from the capture.
//! The bitmaps of the captures are received and sent again, and the authentication is recomputed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]
#![allow(clippy::disallowed_methods, reason = "captures are files; the ban is for the core itself")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use replication_core::units::BlockRange;
use replication_core::wire::{
    Agreed, BitmapReceiver, BitmapSender, BlockAck, BlockId, BlockRequest, DataHeader, DpFlags,
    HeaderKind, HmacAlg, Packet, Progress, Protocol, RangeHeader, Sizes, Stream, SyncParam, auth,
    decode, decode_header, encode, negotiate, plan_body,
};

/// A packet line of `packets.txt`.
struct Line {
    offset: usize,
    length: usize,
    name: String,
    volume: u16,
    body: u32,
    is_h100: bool,
    fields: String,
}

/// A packet as found in a raw stream.
struct Found {
    offset: usize,
    packet: Packet,
}

/// Connection, socket and direction, as in `c1-data-AtoB`.
type StreamName = String;

fn traces() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/traces");
    let mut traces: Vec<PathBuf> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("packets.txt").exists() || path.join("packets.txt.xz").exists())
        .collect();
    traces.sort();
    assert_eq!(traces.len(), 17, "all captures are there");
    traces
}

/// The bytes of a file, unpacked if its name says so.
fn read(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    if path.extension().is_none_or(|extension| extension != "xz") {
        return bytes;
    }
    let mut unpacked = Vec::new();
    lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut unpacked).unwrap();
    unpacked
}

/// The packet lines of a capture by stream.
fn packet_list(trace: &Path) -> BTreeMap<StreamName, Vec<Line>> {
    let plain = trace.join("packets.txt");
    let path = if plain.exists() { plain } else { trace.join("packets.txt.xz") };
    let text = String::from_utf8(read(&path)).unwrap();
    let mut streams: BTreeMap<StreamName, Vec<Line>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[4] == "---" {
            continue;
        }
        let name = format!("{}-{}-{}", words[1], words[2], words[3].replace("->", "to"));
        let (offset, length) = words[4].strip_prefix('@').unwrap().split_once('+').unwrap();
        let (_, fields) = line.split_once(" | ").unwrap();
        streams.entry(name).or_default().push(Line {
            offset: offset.parse().unwrap(),
            length: length.parse().unwrap(),
            name: words[5].to_owned(),
            volume: words[6].strip_prefix("vol=").unwrap().parse().unwrap(),
            body: words[7].strip_prefix("len=").unwrap().parse().unwrap(),
            is_h100: words[8] == "h100",
            fields: fields.to_owned(),
        });
    }
    streams
}

/// The raw streams of a capture.
fn raw_streams(trace: &Path) -> BTreeMap<StreamName, Vec<u8>> {
    let mut streams = BTreeMap::new();
    for entry in fs::read_dir(trace).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if let Some((name, _)) = file.split_once(".bin") {
            streams.insert(name.to_owned(), read(&path));
        }
    }
    streams
}

fn digest_size(alg: &str) -> usize {
    match alg {
        "" => 0,
        "crc32c" => 4,
        "sha1" => 20,
        other => panic!("no capture uses {other}"),
    }
}

/// Where a packet has a pad, relative to its body.
fn pad(packet: &Packet) -> std::ops::Range<usize> {
    match packet {
        Packet::DataRequest(_)
        | Packet::RsDataRequest(_)
        | Packet::RsThinRequest(_)
        | Packet::OvRequest(_)
        | Packet::OvReply { .. }
        | Packet::CsumRsRequest { .. } => 20..24,
        Packet::OutOfSync(_) | Packet::RsDeallocated(_) => 12..16,
        _ => 0..0,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dp_flags(flags: DpFlags) -> String {
    let names = [
        (DpFlags::RW_SYNC, "RW_SYNC"),
        (DpFlags::MAY_SET_IN_SYNC, "MAY_SET_IN_SYNC"),
        (DpFlags::FUA, "FUA"),
        (DpFlags::FLUSH, "FLUSH"),
        (DpFlags::DISCARD, "DISCARD"),
        (DpFlags::SEND_RECEIVE_ACK, "SEND_RECEIVE_ACK"),
        (DpFlags::SEND_WRITE_ACK, "SEND_WRITE_ACK"),
        (DpFlags::ZEROES, "ZEROES"),
    ];
    let set: Vec<&str> =
        names.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect();
    format!("{:#x}({})", flags.0, set.join("|"))
}

fn block(sector: u64, id: BlockId) -> String {
    format!("sector={sector} block_id={}", hex(&id.0.to_ne_bytes()))
}

/// In the packet list the payload includes the digest in front of it.
fn data_fields(header: &DataHeader) -> String {
    let DataHeader { sector, block_id, seq, flags, digest, len } = header;
    let payload = usize::try_from(*len).unwrap() + digest.len();
    let (block, flags) = (block(sector.0, *block_id), dp_flags(*flags));
    format!("{block} seq={seq} dp_flags={flags} payload={payload}")
}

fn range_fields(header: &RangeHeader) -> String {
    let RangeHeader { sector, block_id, seq, flags, size } = header;
    let (block, flags) = (block(sector.0, *block_id), dp_flags(*flags));
    format!("{block} seq={seq} dp_flags={flags} size={size}")
}

fn request_fields(request: &BlockRequest, pad: &[u8]) -> String {
    let BlockRequest { sector, block_id, size } = request;
    format!("{} blksize={size} pad=0x{}", block(sector.0, *block_id), hex(pad))
}

fn ack_fields(ack: &BlockAck) -> String {
    let BlockAck { sector, block_id, size, seq } = ack;
    format!("{} blksize={size} seq={seq}", block(sector.0, *block_id))
}

fn protocol_fields(settings: &Protocol) -> String {
    let flags = u32::from(settings.discard_my_data) + 2 * u32::from(settings.dry_run);
    format!(
        "protocol={} sb0={} sb1={} sb2={} conn_flags={flags} two_primaries={} integrity=b'{}\\x00'",
        settings.protocol.code(),
        settings.after_sb_0pri,
        settings.after_sb_1pri,
        settings.after_sb_2pri,
        u32::from(settings.two_primaries),
        settings.integrity_alg,
    )
}

fn sync_param_fields(param: &SyncParam) -> String {
    let controller = param.controller.unwrap();
    format!(
        "rate={} verify='{}' csums='{}' \
         plan_ahead,delay_target,fill_target,max_rate=({}, {}, {}, {})",
        param.rate,
        param.verify_alg,
        param.csums_alg,
        controller.plan_ahead,
        controller.delay_target,
        controller.fill_target,
        controller.max_rate,
    )
}

fn sizes_fields(sizes: &Sizes) -> String {
    let limits = sizes.limits.unwrap();
    format!(
        "d_size={} u_size={} c_size={} max_bio={} qorder={} dds={} \
         qlim(pbs,lbs,align,io_min,io_opt)=({}, {}, {}, {}, {}) \
         discard_en={} dzd={} wsame={} pad=0",
        sizes.disk_sectors,
        sizes.user_sectors,
        sizes.current_sectors,
        sizes.max_request,
        sizes.queue_order,
        sizes.flags.0,
        limits.physical_block,
        limits.logical_block,
        limits.alignment_offset,
        limits.io_min,
        limits.io_opt,
        u8::from(limits.discard),
        u8::from(limits.discard_zeroes),
        u8::from(limits.write_same),
    )
}

/// The fields as the packet list shows them. State words are shown with more behind them.
fn fields(packet: &Packet, pad: &[u8]) -> String {
    match packet {
        Packet::Data(header) | Packet::DataReply(header) | Packet::RsDataReply(header) => {
            data_fields(header)
        }
        Packet::Trim(header) | Packet::Zeroes(header) => range_fields(header),
        Packet::Barrier { barrier } => format!("barrier={} pad=0", hex(&barrier.0.to_ne_bytes())),
        Packet::BarrierAck { barrier, set_size } => {
            format!("barrier={} set_size={set_size}", hex(&barrier.0.to_ne_bytes()))
        }
        Packet::Bitmap(words) => format!("plain {} bytes: {}", words.len(), hex(words)),
        Packet::CompressedBitmap(bitmap) => {
            let polarity = if bitmap.first_run_set { 0x80 } else { 0 };
            let (code, length) = (hex(&bitmap.code), bitmap.code.len());
            let head = 2 | (bitmap.unused_bits << 4) | polarity;
            format!("enc={head:#x} code={code} ({length} code bytes)")
        }
        Packet::DataRequest(request)
        | Packet::RsDataRequest(request)
        | Packet::RsThinRequest(request)
        | Packet::OvRequest(request) => request_fields(request, pad),
        Packet::OvReply { request, digest } | Packet::CsumRsRequest { request, digest } => {
            format!("{} digest={}", request_fields(request, pad), hex(digest))
        }
        Packet::Protocol(settings) | Packet::ProtocolUpdate(settings) => protocol_fields(settings),
        Packet::SyncParam(param) => sync_param_fields(param),
        Packet::Sizes(sizes) => sizes_fields(sizes),
        Packet::Uuids(uuids) => format!(
            "cur={:016X} bm={:016X} h0={:016X} h1={:016X} bits={} flags={:#x}",
            uuids.current,
            uuids.bitmap,
            uuids.history[0],
            uuids.history[1],
            uuids.bits_set,
            uuids.flags.0
        ),
        Packet::State(word) => format!("{word:#010x}"),
        Packet::SyncUuid(uuid) => format!("uuid={uuid:016X}"),
        Packet::AuthChallenge(bytes) => hex(bytes),
        Packet::AuthResponse(bytes) => hex(bytes),
        Packet::StateChgReq { mask, value } | Packet::ConnStChgReq { mask, value } => {
            format!("mask={mask:#010x} val={value:#010x}")
        }
        Packet::StateChgReply(code) | Packet::ConnStChgReply(code) => format!("retcode={code}"),
        Packet::OutOfSync(range) | Packet::RsDeallocated(range) => {
            format!("sector={} blksize={} pad=0x{}", range.sector.0, range.size, hex(pad))
        }
        Packet::OvResult(result) => format!(
            "sector={} block_id=000000000000126{} blksize={} seq={}",
            result.sector.0,
            if result.equal { 7 } else { 8 },
            result.size,
            result.seq
        ),
        other => answer_fields(other),
    }
}

/// The fields of packets that answer another one or have none.
fn answer_fields(packet: &Packet) -> String {
    match packet {
        Packet::RecvAck(ack)
        | Packet::WriteAck(ack)
        | Packet::RsWriteAck(ack)
        | Packet::Superseded(ack)
        | Packet::NegAck(ack)
        | Packet::NegDReply(ack)
        | Packet::NegRsDReply(ack)
        | Packet::RsIsInSync(ack)
        | Packet::RsCancel(ack)
        | Packet::RetryWrite(ack) => ack_fields(ack),
        Packet::ConnectionFeatures(peer) => format!(
            "min={} features={:#x} max={}",
            peer.protocol_min, peer.features.0, peer.protocol_max
        ),
        _ => String::new(),
    }
}

fn is_state_line(packet: &Packet) -> bool {
    matches!(packet, Packet::State(_) | Packet::StateChgReq { .. } | Packet::ConnStChgReq { .. })
}

/// What the packet changes for those behind it.
fn follow(packet: &Packet, agreed: &mut Agreed, kind: &mut HeaderKind) {
    match packet {
        Packet::ConnectionFeatures(peer) => {
            let (version, features) = negotiate(peer).unwrap();
            (agreed.version, agreed.features) = (version, features);
            *kind = HeaderKind::for_version(Some(version));
        }
        Packet::InitialMeta => {
            agreed.version = 101;
            *kind = HeaderKind::H100;
        }
        Packet::Protocol(settings) | Packet::ProtocolUpdate(settings) => {
            agreed.integrity_digest = digest_size(&settings.integrity_alg);
        }
        Packet::SyncParam(param) => {
            agreed.verify_digest = digest_size(&param.verify_alg);
            agreed.csums_digest = digest_size(&param.csums_alg);
        }
        _ => {}
    }
}

/// Reads a stream to its last byte, compares it with the packet list and writes it again.
fn walk(name: &str, bytes: &[u8], lines: &[Line]) -> Vec<Found> {
    let stream = if name.contains("-data-") { Stream::Data } else { Stream::Meta };
    let mut agreed = Agreed::NOTHING;
    let starts_plain = bytes.starts_with(&[0x83, 0x74]);
    let mut kind = if starts_plain { HeaderKind::H80 } else { HeaderKind::H100 };
    if !starts_plain {
        // Only the side that connected the meta socket sends a first packet on it.
        assert_eq!(stream, Stream::Meta, "{name}");
        agreed.version = 101;
    }
    let mut found = Vec::new();
    let mut at = 0;
    for line in lines {
        let context = format!("{name} @{at} {}", line.name);
        let (header, rest) = bytes[at..].split_at(kind.size());
        let header = decode_header(kind, header).expect(&context);
        let plan = plan_body(stream, &header, &agreed).expect(&context);
        let packet = decode(stream, &header, &rest[..plan.fixed], &agreed).expect(&context);
        let fixed_end = at + kind.size() + plan.fixed;
        let end = fixed_end + usize::try_from(plan.payload).unwrap();

        assert_eq!((line.offset, line.length), (at, end - at), "{context}");
        assert_eq!((line.volume, line.body), (header.volume.0, header.length), "{context}");
        assert_eq!(line.is_h100, kind == HeaderKind::H100, "{context}");
        assert_eq!(line.name, packet.name(), "{context}");
        assert_eq!(packet.payload_len(), plan.payload, "{context}");
        let expected = fields(&packet, &rest[pad(&packet)]);
        let shown =
            if is_state_line(&packet) { &line.fields[..expected.len()] } else { &line.fields };
        assert_eq!(shown, expected, "{context}");

        let mut again = Vec::new();
        encode(&packet, header.volume, &agreed, kind, &mut again);
        again[kind.size()..][pad(&packet)].copy_from_slice(&rest[pad(&packet)]);
        assert_eq!(hex(&again), hex(&bytes[at..fixed_end]), "{context}");

        follow(&packet, &mut agreed, &mut kind);
        found.push(Found { offset: at, packet });
        at = end;
    }
    assert_eq!(at, bytes.len(), "{name} has bytes behind its last packet");
    found
}

fn walk_trace(trace: &Path) -> BTreeMap<StreamName, Vec<Found>> {
    let lists = packet_list(trace);
    let raw = raw_streams(trace);
    let listed: Vec<&StreamName> = lists.keys().collect();
    assert_eq!(listed, raw.keys().collect::<Vec<_>>(), "{}", trace.display());
    raw.iter().map(|(name, bytes)| (name.clone(), walk(name, bytes, &lists[name]))).collect()
}

/// Every captured packet is read as listed and written back byte for byte.
#[test]
fn captured_packets_are_read_and_written_exactly() {
    let mut names = BTreeSet::new();
    let mut total = 0;
    for trace in traces() {
        for found in walk_trace(&trace).into_values().flatten() {
            names.insert(found.packet.name());
            total += 1;
        }
    }
    assert_eq!((names.len(), total), (43, 2516), "{names:?}");
}

/// The number of blocks of the device at the time of a bitmap transfer.
fn blocks_of(found: &[Found], before: usize) -> u64 {
    let mut sizes = found.iter().filter(|found| found.offset < before).filter_map(|found| {
        if let Packet::Sizes(sizes) = &found.packet { Some(sizes.current_sectors) } else { None }
    });
    sizes.next_back().unwrap().div_ceil(8)
}

/// Receives a transfer, then sends the same bitmap and compares the packets.
fn check_transfer(packets: &[&Packet], bits: u64, context: &str) {
    let mut words = vec![0_u64; usize::try_from(bits.div_ceil(64)).unwrap()];
    let mut receiver = BitmapReceiver::new(bits);
    let mut use_rle = true;
    for (index, packet) in packets.iter().enumerate() {
        let progress = receiver
            .receive(packet, |BlockRange { start, end }| {
                for block in start..end {
                    words[usize::try_from(block / 64).unwrap()] |= 1 << (block % 64);
                }
            })
            .expect(context);
        assert_eq!(progress == Progress::Done, index + 1 == packets.len(), "{context}");
        use_rle &= matches!(packet, Packet::CompressedBitmap(_));
    }
    let mut sender = BitmapSender::new(bits);
    for packet in packets {
        let again = sender.next_packet(&words, use_rle, HeaderKind::H100);
        assert_eq!(again.as_ref(), Some(*packet), "{context}");
    }
    assert!(sender.is_finished(), "{context}");
}

/// The bitmap transfers of all captures are received, and sent again as the same packets.
#[test]
fn captured_bitmaps_are_received_and_sent_alike() {
    let mut transfers = 0;
    for trace in traces() {
        for (name, found) in walk_trace(&trace) {
            let mut series: Vec<&Packet> = Vec::new();
            for (index, Found { offset, packet }) in found.iter().enumerate() {
                if !matches!(packet, Packet::Bitmap(_) | Packet::CompressedBitmap(_)) {
                    continue;
                }
                series.push(packet);
                let more = found.get(index + 1).is_some_and(|next| {
                    matches!(next.packet, Packet::Bitmap(_) | Packet::CompressedBitmap(_))
                });
                if !more {
                    let context = format!("{} {name} @{offset}", trace.display());
                    check_transfer(&series, blocks_of(&found, *offset), &context);
                    series.clear();
                    transfers += 1;
                }
            }
        }
    }
    // 24 compressed packets and two transfers of one plain packet and its terminator.
    assert_eq!(transfers, 26);
}

/// The captured responses are those that the secret of the capture gives.
#[test]
fn captured_authentication_is_reproduced() {
    let trace = traces().into_iter().nth(3).unwrap();
    let streams = walk_trace(&trace);
    let pick = |name: &str| {
        let mut challenge = None;
        let mut response = None;
        for found in &streams[name] {
            if let Packet::AuthChallenge(bytes) = &found.packet {
                challenge = Some(<[u8; 64]>::try_from(bytes.as_slice()).unwrap());
            }
            if let Packet::AuthResponse(bytes) = &found.packet {
                response = Some(bytes.clone());
            }
        }
        (challenge.unwrap(), response.unwrap())
    };
    let (a, b) = (pick("c1-data-AtoB"), pick("c1-data-BtoA"));
    for ((challenge, _), (_, response)) in [(&a, &b), (&b, &a)] {
        let secret = b"SecretKey42";
        assert_eq!(auth::respond(HmacAlg::Sha1, secret, challenge), *response);
        assert_eq!(auth::verify(HmacAlg::Sha1, secret, challenge, response), Ok(()));
        let wrong = auth::verify(HmacAlg::Sha1, b"SecretKey43", challenge, response);
        assert_eq!(wrong, Err(auth::AuthError::WrongResponse));
    }
    assert_eq!(auth::check_challenge(&a.0, &b.0), Ok(()));
}
