//! Packets of every kind, version and shape: there and back, refusals, arbitrary bytes.

use proptest::prelude::*;

use super::*;
use crate::limits;
use crate::units::{Sector, VolumeNr};

const CURRENT: Agreed = Agreed {
    version: 101,
    features: Features::OURS,
    integrity_digest: 0,
    verify_digest: 0,
    csums_digest: 0,
};

/// Header and fixed part of the bytes of a packet.
fn read(stream: Stream, bytes: &[u8], agreed: &Agreed) -> Result<(Header, Packet), DecodeError> {
    let kind = agreed.header_kind();
    let header = decode_header(kind, &bytes[..kind.size()])?;
    let plan = plan_body(stream, &header, agreed)?;
    let fixed = &bytes[kind.size()..][..plan.fixed];
    let packet = decode(stream, &header, fixed, agreed)?;
    assert_eq!(packet.payload_len(), plan.payload);
    Ok((header, packet))
}

fn write(packet: &Packet, agreed: &Agreed) -> Vec<u8> {
    let mut bytes = vec![0xaa];
    encode(packet, VolumeNr(3), agreed, agreed.header_kind(), &mut bytes);
    assert_eq!(bytes.remove(0), 0xaa, "earlier bytes stay");
    bytes
}

/// What [`plan_body`] says to a bare header.
fn plan(
    stream: Stream,
    command: u16,
    length: u32,
    agreed: &Agreed,
) -> Result<BodyPlan, DecodeError> {
    plan_body(stream, &Header { volume: VolumeNr(0), command, length }, agreed)
}

/// Packets are refused on the other socket and if they do not exist.
#[test]
fn unknown_commands_are_refused() {
    for (stream, command) in [
        (Stream::Data, 0x05),
        (Stream::Data, 0x34),
        (Stream::Data, 0x13),
        (Stream::Meta, 0x00),
        (Stream::Meta, 0xfff2),
    ] {
        let expected = DecodeError::UnknownCommand { stream, command };
        assert_eq!(plan(stream, command, 0, &CURRENT), Err(expected));
    }
    for stream in [Stream::Data, Stream::Meta] {
        let both = Ok(BodyPlan { fixed: 8, payload: 0 });
        assert_eq!(plan(stream, 0x27, 8, &CURRENT), both);
    }
}

/// Data is bounded by the version, and comes in whole sectors behind head and digest.
#[test]
fn payload_is_bounded_by_the_version() {
    for (version, most) in
        [(86, 1 << 15), (94, 1 << 15), (95, 1 << 17), (99, 1 << 17), (100, 1 << 20)]
    {
        let agreed = Agreed { version, integrity_digest: 4, ..CURRENT };
        let fits = plan(Stream::Data, 0, 28 + most, &agreed);
        assert_eq!(fits, Ok(BodyPlan { fixed: 28, payload: most }));
        let expected =
            DecodeError::Length { name: "P_DATA", least: 28, most: 28 + most, found: 540 + most };
        assert_eq!(plan(Stream::Data, 0, 540 + most, &agreed), Err(expected));
    }
    let expected = DecodeError::Alignment { name: "P_RS_DATA_REPLY", unit: 512, found: 511 };
    assert_eq!(plan(Stream::Data, 2, 24 + 511, &CURRENT), Err(expected));
    assert_eq!(plan(Stream::Data, 0, 24, &CURRENT), Ok(BodyPlan { fixed: 24, payload: 0 }));
    for found in [0, 23, u32::MAX] {
        let most = 24 + (1 << 20);
        let expected = DecodeError::Length { name: "P_DATA", least: 24, most, found };
        assert_eq!(plan(Stream::Data, 0, found, &CURRENT), Err(expected));
    }
}

/// The length of packets that changed over time follows the version and the features.
#[test]
fn lengths_follow_the_version() {
    type Case = (Command, u32, Features, &'static [u32], &'static [u32]);
    let cases: [Case; 12] = [
        (Command::SyncParam, 86, Features::NONE, &[4], &[3, 5, 132]),
        (Command::SyncParam, 87, Features::NONE, &[4], &[5]),
        (Command::SyncParam, 88, Features::NONE, &[5, 68], &[4, 69]),
        (Command::SyncParam89, 89, Features::NONE, &[132], &[4, 148]),
        (Command::SyncParam89, 94, Features::NONE, &[132], &[148]),
        (Command::SyncParam89, 95, Features::NONE, &[148], &[132, 149]),
        (Command::Protocol, 86, Features::NONE, &[24], &[23, 25]),
        (Command::Protocol, 87, Features::NONE, &[25, 88], &[24, 89]),
        (Command::Sizes, 101, Features::TRIM, &[32], &[56]),
        (Command::Sizes, 101, Features::WSAME, &[56], &[32, 57]),
        (Command::Bitmap, 99, Features::NONE, &[0, 8, 4088], &[4, 4096]),
        (Command::Bitmap, 101, Features::NONE, &[0, 4080], &[1, 4088]),
    ];
    for (command, version, features, right, wrong) in cases {
        let agreed = Agreed { version, features, ..CURRENT };
        for length in right {
            let fixed = usize::try_from(*length).unwrap();
            let found = plan(Stream::Data, command.code(), *length, &agreed);
            assert_eq!(found, Ok(BodyPlan { fixed, payload: 0 }), "{command:?} {version}");
        }
        for length in wrong {
            let found = plan(Stream::Data, command.code(), *length, &agreed).unwrap_err();
            assert!(
                matches!(found, DecodeError::Length { .. } | DecodeError::Alignment { .. }),
                "{command:?} {version} {length}: {found}"
            );
        }
    }
}

/// Packets whose layout has no meaning in a version are refused.
#[test]
fn packets_of_other_versions_are_refused() {
    for (command, version) in [(0x0a, 89), (0x0a, 101), (0x23, 88), (0x2d, 99)] {
        let agreed = Agreed { version, ..CURRENT };
        let name = Command::from_code(command).unwrap().name();
        let expected = DecodeError::NotInVersion { name, version };
        assert_eq!(plan(Stream::Data, command, 25, &agreed), Err(expected));
    }
}

/// No packet asks for more than a control packet besides its payload.
#[test]
fn fixed_parts_are_bounded() {
    for version in [80, 86, 88, 89, 95, 100, 101] {
        let agreed = Agreed {
            version,
            integrity_digest: 64,
            verify_digest: 64,
            csums_digest: 64,
            ..CURRENT
        };
        for command in Command::ALL {
            for length in (0..5000).chain([1 << 15, 1 << 20, u32::MAX]) {
                for stream in [Stream::Data, Stream::Meta] {
                    if let Ok(plan) = plan(stream, command.code(), length, &agreed) {
                        assert!(plan.fixed <= limits::CONTROL_PACKET_SIZE);
                        assert!(plan.payload <= agreed.max_payload());
                    }
                }
            }
        }
    }
}

/// The bytes of a packet with one field overwritten.
fn with_field(packet: &Packet, at: usize, field: &[u8]) -> Vec<u8> {
    let mut bytes = write(packet, &CURRENT);
    bytes[16 + at..16 + at + field.len()].copy_from_slice(field);
    bytes
}

/// Fields without a meaning are refused, and the error names them.
#[test]
fn meaningless_fields_are_refused() {
    let request = BlockRequest { sector: Sector(8), block_id: BlockId::SYNCER, size: 4096 };
    let request = Packet::RsDataRequest(request);
    let trim = Packet::Trim(RangeHeader { size: 512, ..RangeHeader::default() });
    let result = Packet::OvResult(OvResult::default());
    let bitmap = Packet::CompressedBitmap(CompressedBitmap { code: vec![0], ..Default::default() });
    let settings = Packet::Protocol(protocol("crc32c"));
    let cases: [(Stream, Vec<u8>, &str); 10] = [
        (Stream::Data, with_field(&request, 16, &0_u32.to_be_bytes()), "0 as its size"),
        (Stream::Data, with_field(&request, 16, &513_u32.to_be_bytes()), "513 as its size"),
        (Stream::Data, with_field(&request, 16, &0x10_0200_u32.to_be_bytes()), "its size"),
        (Stream::Data, with_field(&request, 0, &[0xff; 8]), "beyond sector"),
        (Stream::Data, with_field(&trim, 24, &0x0800_0200_u32.to_be_bytes()), "its size"),
        (Stream::Meta, with_field(&result, 8, &[0; 8]), "0 as its verify result"),
        (Stream::Data, with_field(&bitmap, 0, &[3]), "3 as its bitmap encoding"),
        (Stream::Data, with_field(&settings, 0, &[0, 0, 0, 4]), "4 as its replication protocol"),
        (Stream::Data, with_field(&settings, 30, b"x"), "malformed integrity algorithm"),
        (Stream::Data, with_field(&settings, 24, b"\xff"), "malformed integrity algorithm"),
    ];
    for (stream, bytes, expected) in cases {
        let message = read(stream, &bytes, &CURRENT).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// The decoder insists on the number of bytes that the plan asked for.
#[test]
fn a_wrong_fixed_part_is_refused() {
    let header = Header { volume: VolumeNr(0), command: 0x0e, length: 4 };
    let found = decode(Stream::Data, &header, &[0; 3], &CURRENT);
    assert_eq!(found, Err(DecodeError::FixedPart { name: "P_STATE", expected: 4, found: 3 }));
}

/// Packets of the connection carry volume 0, the others and the unplug hint their own.
#[test]
fn volumes_are_sent_where_they_mean_something() {
    for (packet, volume) in [
        (Packet::Ping, 0),
        (Packet::Barrier { barrier: BarrierToken(1) }, 0),
        (Packet::Protocol(protocol("")), 0),
        (Packet::UnplugRemote, 3),
        (Packet::State(0), 3),
    ] {
        let bytes = write(&packet, &CURRENT);
        assert_eq!(bytes[4..6], [0, volume], "{}", packet.name());
    }
}

/// A digest of another size than agreed would turn into data at the peer.
#[test]
#[should_panic(expected = "the digest has the agreed size")]
fn a_digest_of_another_size_is_our_bug() {
    let agreed = Agreed { integrity_digest: 4, ..CURRENT };
    write(&Packet::Data(DataHeader::default()), &agreed);
}

fn protocol(integrity_alg: &str) -> Protocol {
    Protocol {
        protocol: ReplicationProtocol::C,
        after_sb_0pri: 0,
        after_sb_1pri: 0,
        after_sb_2pri: 0,
        discard_my_data: false,
        dry_run: false,
        two_primaries: false,
        integrity_alg: AlgName::from(integrity_alg).unwrap(),
    }
}

fn digest(size: usize) -> impl Strategy<Value = Digest> {
    prop::collection::vec(any::<u8>(), size).prop_map(|bytes| bytes.into_iter().collect())
}

fn alg_name() -> impl Strategy<Value = AlgName> {
    "[a-z0-9()-]{0,63}".prop_map(|name| AlgName::from(&name).unwrap())
}

/// A range of at most `most` bytes; empty if `least` is 0.
fn range(least: u32, most: u32) -> impl Strategy<Value = (Sector, u32)> {
    (least..=most / 512, any::<u64>()).prop_map(|(sectors, start)| {
        let room = limits::MAX_DEVICE_SECTORS - u64::from(sectors);
        (Sector(start % (room + 1)), sectors * 512)
    })
}

fn data(agreed: Agreed) -> impl Strategy<Value = DataHeader> {
    let range = range(0, agreed.max_payload());
    (range, any::<u64>(), any::<u32>(), any::<u32>(), digest(agreed.integrity_digest)).prop_map(
        move |((sector, len), id, seq, flags, digest)| DataHeader {
            sector,
            block_id: BlockId(id),
            seq,
            flags: DpFlags(flags).for_version(agreed.version),
            digest,
            len,
        },
    )
}

fn range_header(agreed: Agreed) -> impl Strategy<Value = RangeHeader> {
    let range = range(1, agreed.max_discard());
    (range, any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
        move |((sector, size), id, seq, flags)| RangeHeader {
            sector,
            block_id: BlockId(id),
            seq,
            flags: DpFlags(flags).for_version(agreed.version),
            size,
        },
    )
}

fn request() -> impl Strategy<Value = BlockRequest> {
    (range(1, limits::MAX_BIO_SIZE), any::<u64>()).prop_map(|((sector, size), id)| BlockRequest {
        sector,
        block_id: BlockId(id),
        size,
    })
}

fn ack() -> impl Strategy<Value = BlockAck> {
    (range(0, u32::MAX), any::<u64>(), any::<u32>())
        .prop_map(|((sector, size), id, seq)| BlockAck { sector, block_id: BlockId(id), size, seq })
}

fn desc() -> impl Strategy<Value = Desc> {
    range(1, u32::MAX).prop_map(|(sector, size)| Desc { sector, size })
}

fn settings(agreed: Agreed) -> impl Strategy<Value = Protocol> {
    let protocols = [ReplicationProtocol::A, ReplicationProtocol::B, ReplicationProtocol::C];
    (prop::sample::select(protocols.to_vec()), any::<[u32; 3]>(), any::<[bool; 3]>(), alg_name())
        .prop_map(move |(protocol, after_sb, [discard_my_data, dry_run, two_primaries], name)| {
            Protocol {
                protocol,
                after_sb_0pri: after_sb[0],
                after_sb_1pri: after_sb[1],
                after_sb_2pri: after_sb[2],
                discard_my_data,
                dry_run,
                two_primaries,
                integrity_alg: if agreed.version < 87 { AlgName::new() } else { name },
            }
        })
}

fn sync_param(agreed: Agreed) -> impl Strategy<Value = SyncParam> {
    (any::<[u32; 5]>(), alg_name(), alg_name()).prop_map(move |(n, verify, csums)| SyncParam {
        rate: n[0],
        verify_alg: if agreed.version < 88 { AlgName::new() } else { verify },
        csums_alg: if agreed.version < 89 { AlgName::new() } else { csums },
        controller: (agreed.version >= 95).then_some(ResyncController {
            plan_ahead: n[1],
            delay_target: n[2],
            fill_target: n[3],
            max_rate: n[4],
        }),
    })
}

fn sizes(agreed: Agreed) -> impl Strategy<Value = Sizes> {
    (any::<[u64; 3]>(), any::<[u32; 6]>(), any::<[u16; 2]>(), any::<[bool; 3]>()).prop_map(
        move |(sectors, n, words, switches)| Sizes {
            disk_sectors: sectors[0],
            user_sectors: sectors[1],
            current_sectors: sectors[2],
            max_request: n[0],
            queue_order: words[0],
            flags: SizesFlags(words[1]),
            limits: agreed.features.contains(Features::WSAME).then_some(QueueLimits {
                physical_block: n[1],
                logical_block: n[2],
                alignment_offset: n[3],
                io_min: n[4],
                io_opt: n[5],
                discard: switches[0],
                discard_zeroes: switches[1],
                write_same: switches[2],
            }),
        },
    )
}

fn uuids() -> impl Strategy<Value = UuidsPacket> {
    any::<[u64; 6]>().prop_map(|n| UuidsPacket {
        current: n[0],
        bitmap: n[1],
        history: [n[2], n[3]],
        bits_set: n[4],
        flags: UuidFlags(n[5]),
    })
}

fn bitmap_packet() -> impl Strategy<Value = Packet> {
    let words = prop::collection::vec(any::<u64>(), 0..=510)
        .prop_map(|words| Packet::Bitmap(words.iter().flat_map(|w| w.to_le_bytes()).collect()));
    let code = (any::<bool>(), 0_u8..8, prop::collection::vec(any::<u8>(), 1..=4079)).prop_map(
        |(first_run_set, unused_bits, code)| {
            Packet::CompressedBitmap(CompressedBitmap { first_run_set, unused_bits, code })
        },
    );
    prop_oneof![words, code]
}

fn data_packet(agreed: Agreed) -> impl Strategy<Value = Packet> {
    prop_oneof![
        data(agreed).prop_map(Packet::Data),
        data(agreed).prop_map(Packet::DataReply),
        data(agreed).prop_map(Packet::RsDataReply),
        range_header(agreed).prop_map(Packet::Trim),
        range_header(agreed).prop_map(Packet::Zeroes),
        request().prop_map(Packet::DataRequest),
        request().prop_map(Packet::RsDataRequest),
        request().prop_map(Packet::RsThinRequest),
        request().prop_map(Packet::OvRequest),
        (request(), digest(agreed.verify_digest))
            .prop_map(|(request, digest)| Packet::OvReply { request, digest }),
        (request(), digest(agreed.csums_digest))
            .prop_map(|(request, digest)| Packet::CsumRsRequest { request, digest }),
        desc().prop_map(Packet::OutOfSync),
        desc().prop_map(Packet::RsDeallocated),
        bitmap_packet(),
    ]
}

fn setup_packet(agreed: Agreed) -> impl Strategy<Value = Packet> {
    let challenge = prop::collection::vec(any::<u8>(), 64..=128)
        .prop_map(|bytes| Packet::AuthChallenge(bytes.into_iter().collect()));
    let features = any::<[u32; 3]>().prop_map(|n| {
        Packet::ConnectionFeatures(FeaturesPacket {
            protocol_min: n[0],
            features: Features(n[1]),
            protocol_max: n[2],
        })
    });
    // The update exists from version 100 on.
    let is_update = move |update: bool| update && agreed.version >= 100;
    prop_oneof![
        (settings(agreed), any::<bool>()).prop_map(move |(settings, update)| {
            if is_update(update) {
                Packet::ProtocolUpdate(settings)
            } else {
                Packet::Protocol(settings)
            }
        }),
        sync_param(agreed).prop_map(Packet::SyncParam),
        sizes(agreed).prop_map(Packet::Sizes),
        uuids().prop_map(Packet::Uuids),
        any::<u32>().prop_map(Packet::State),
        any::<u64>().prop_map(Packet::SyncUuid),
        challenge,
        (1_usize..=64).prop_flat_map(digest).prop_map(Packet::AuthResponse),
        (any::<u32>(), any::<u32>()).prop_map(|(mask, value)| Packet::StateChgReq { mask, value }),
        (any::<u32>(), any::<u32>()).prop_map(|(mask, value)| Packet::ConnStChgReq { mask, value }),
        any::<i32>().prop_map(Packet::StateChgReply),
        any::<i32>().prop_map(Packet::ConnStChgReply),
        features,
    ]
}

fn answer_packet() -> impl Strategy<Value = Packet> {
    let barrier = any::<u32>().prop_map(|token| Packet::Barrier { barrier: BarrierToken(token) });
    let barrier_ack = any::<[u32; 2]>().prop_map(|[token, set_size]| Packet::BarrierAck {
        barrier: BarrierToken(token),
        set_size,
    });
    let ov_result = (ack(), any::<bool>()).prop_map(|(ack, equal)| {
        let BlockAck { sector, size, seq, .. } = ack;
        Packet::OvResult(OvResult { sector, size, seq, equal })
    });
    prop_oneof![
        prop::sample::select(vec![
            Packet::UnplugRemote,
            Packet::Ping,
            Packet::PingAck,
            Packet::DelayProbe,
            Packet::InitialData,
            Packet::InitialMeta,
        ]),
        ack().prop_map(Packet::RecvAck),
        ack().prop_map(Packet::WriteAck),
        ack().prop_map(Packet::RsWriteAck),
        ack().prop_map(Packet::Superseded),
        ack().prop_map(Packet::NegAck),
        ack().prop_map(Packet::NegDReply),
        ack().prop_map(Packet::NegRsDReply),
        ack().prop_map(Packet::RsIsInSync),
        ack().prop_map(Packet::RsCancel),
        ack().prop_map(Packet::RetryWrite),
        barrier,
        barrier_ack,
        ov_result,
    ]
}

fn agreed() -> impl Strategy<Value = Agreed> {
    let digest = prop::sample::select(&[0_usize, 4, 20, 64]);
    (86_u32..=101, 0_u32..16, digest.clone(), digest.clone(), digest).prop_map(
        |(version, features, integrity_digest, verify_digest, csums_digest)| Agreed {
            version,
            features: Features(features),
            integrity_digest,
            verify_digest,
            csums_digest,
        },
    )
}

fn agreed_and_packet() -> impl Strategy<Value = (Agreed, Packet)> {
    agreed().prop_flat_map(|agreed| {
        let packet = prop_oneof![data_packet(agreed), setup_packet(agreed), answer_packet()];
        (Just(agreed), packet)
    })
}

/// The packet without the flags that its version does not have.
fn with_known_flags(mut packet: Packet, version: u32) -> Packet {
    if let Packet::Data(DataHeader { flags, .. })
    | Packet::DataReply(DataHeader { flags, .. })
    | Packet::RsDataReply(DataHeader { flags, .. })
    | Packet::Trim(RangeHeader { flags, .. })
    | Packet::Zeroes(RangeHeader { flags, .. }) = &mut packet
    {
        *flags = flags.for_version(version);
    }
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Every packet comes back as it was sent, in every version.
    #[test]
    fn packets_survive_the_way((agreed, packet) in agreed_and_packet()) {
        let bytes = write(&packet, &agreed);
        let stream = packet.stream().unwrap_or(Stream::Meta);
        let (header, back) = read(stream, &bytes, &agreed).unwrap();
        prop_assert_eq!(&back, &packet);
        let has_volume = !packet.is_connection_level() || packet == Packet::UnplugRemote;
        let volume = if has_volume && agreed.version >= 100 { 3 } else { 0 };
        prop_assert_eq!(header.volume, VolumeNr(volume));
        let body = u32::try_from(bytes.len() - agreed.header_kind().size()).unwrap();
        prop_assert_eq!(header.length, body + packet.payload_len());
    }

    /// Arbitrary bytes give a packet or an error.
    #[test]
    fn arbitrary_bytes_never_panic(
        agreed in agreed(),
        command in prop_oneof![
            any::<u16>(),
            prop::sample::select(Command::ALL).prop_map(Command::code),
        ],
        is_meta in any::<bool>(),
        extra in 0_u32..200,
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let stream = if is_meta { Stream::Meta } else { Stream::Data };
        for length in [u32::try_from(bytes.len()).unwrap(), extra, 24, 28, 48, 132, 148] {
            let header = Header { volume: VolumeNr(0), command, length };
            if let Ok(plan) = plan_body(stream, &header, &agreed) {
                let mut fixed = bytes.clone();
                fixed.resize(plan.fixed, 0);
                if let Ok(packet) = decode(stream, &header, &fixed, &agreed) {
                    // What is accepted can be sent again, and is then the same.
                    let again = write(&packet, &agreed);
                    let (_, back) = read(stream, &again, &agreed).unwrap();
                    prop_assert_eq!(back, with_known_flags(packet, agreed.version));
                }
            }
            let _ = decode_header(HeaderKind::H80, &bytes);
            let _ = decode_header(HeaderKind::H100, &bytes);
        }
    }

    /// A header of arbitrary bytes is refused unless the magic fits.
    #[test]
    fn arbitrary_headers_never_panic(bytes in any::<[u8; 16]>(), is_old in any::<bool>()) {
        let kind = if is_old { HeaderKind::H80 } else { HeaderKind::H100 };
        let found = decode_header(kind, &bytes[..kind.size()]);
        let magic = [bytes[0], bytes[1]];
        prop_assert!(found.is_err() || magic == [0x83, 0x74] || magic == [0x83, 0x5a]
            || magic == [0x86, 0x20]);
    }
}
