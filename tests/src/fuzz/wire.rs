//! What the peer sends, taken apart without a core (WP-1, WP-4, BM-9).

use replication_core::units::VolumeNr;
use replication_core::wire::{
    Agreed, BitmapReceiver, CompressedBitmap, Features, HeaderKind, Packet, Progress, Stream,
    decode, decode_header, encode, plan_body,
};

use super::Bytes;

/// What was agreed, chosen by three bytes.
fn agreed(bytes: &mut Bytes<'_>) -> Agreed {
    const DIGESTS: [usize; 4] = [0, 4, 20, 64];
    let version = match bytes.u8() {
        choice @ 80..=101 => u32::from(choice),
        choice => 86 + u32::from(choice % 16),
    };
    let (features, digests) = (bytes.u8(), usize::from(bytes.u8()));
    Agreed {
        version,
        features: Features(u32::from(features)),
        integrity_digest: DIGESTS[digests % 4],
        verify_digest: DIGESTS[digests / 4 % 4],
        csums_digest: DIGESTS[digests / 16 % 4],
    }
}

/// A stream of packets. Each is refused or read, and what was read is written and read again.
pub fn packets(data: &[u8]) {
    let mut bytes = Bytes(data);
    let agreed = agreed(&mut bytes);
    let stream = if bytes.u8() % 2 == 0 { Stream::Data } else { Stream::Meta };
    let kind = agreed.header_kind();
    while !bytes.is_empty() {
        let Ok(header) = decode_header(kind, bytes.take(kind.size())) else { return };
        let Ok(plan) = plan_body(stream, &header, &agreed) else { return };
        assert!(plan.fixed <= 4096, "fixed parts are bounded");
        let fixed = bytes.take(plan.fixed);
        if fixed.len() < plan.fixed {
            return;
        }
        bytes.take(usize::try_from(plan.payload).expect("32 bits fit"));
        let Ok(packet) = decode(stream, &header, fixed, &agreed) else { continue };
        assert_eq!(packet.payload_len(), plan.payload, "{packet:?}");
        let mut again = Vec::new();
        encode(&packet, VolumeNr(header.volume.0), &agreed, kind, &mut again);
        let (head, body) = again.split_at(kind.size());
        let header = decode_header(kind, head).expect("our own header");
        let plan = plan_body(stream, &header, &agreed).expect("our own packet");
        assert_eq!(plan.fixed, body.len());
        let reread = decode(stream, &header, body, &agreed).expect("our own packet");
        assert_eq!(reread, packet);
    }
}

/// A transfer of a bitmap: every run lies inside, and runs ascend within a packet.
pub fn bitmap(data: &[u8]) {
    let mut bytes = Bytes(data);
    let bits = u64::from(bytes.u32()) << (bytes.u8() % 6);
    let kind = if bytes.u8() % 2 == 0 { HeaderKind::H100 } else { HeaderKind::H80 };
    let mut receiver = BitmapReceiver::for_kind(bits, kind);
    while !bytes.is_empty() {
        let (head, length) = (bytes.u8(), usize::from(bytes.u16()));
        let body = bytes.take(length).to_vec();
        let packet = if head & 1 == 0 {
            Packet::Bitmap(body)
        } else {
            let first_run_set = head & 2 != 0;
            Packet::CompressedBitmap(CompressedBitmap {
                first_run_set,
                unused_bits: head >> 5,
                code: body,
            })
        };
        let mut last = 0;
        let result = receiver.receive(&packet, |run| {
            assert!(run.start < run.end && run.end <= bits, "{run:?} of {bits}");
            assert!(run.start >= last, "runs ascend");
            last = run.end;
        });
        match result {
            Ok(Progress::More) => {}
            Ok(Progress::Done) | Err(_) => return,
        }
    }
}
