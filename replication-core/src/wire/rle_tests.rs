//! Bitmap transfers: worked examples, refusals, and a comparison with a naive model.

use proptest::prelude::*;

use super::*;

/// The words of a bitmap with these blocks set.
fn words_of(bits: u64, set: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut words = vec![0; index(bits.div_ceil(WORD_BITS))];
    for block in set {
        assert!(block < bits);
        words[index(block / WORD_BITS)] |= 1 << (block % WORD_BITS);
    }
    words
}

fn mark(words: &mut [u64], range: BlockRange) {
    assert!(!range.is_empty());
    for block in range.start..range.end {
        words[index(block / WORD_BITS)] |= 1 << (block % WORD_BITS);
    }
}

/// First byte and code bytes of a compressed packet.
fn body(packet: &Packet) -> Vec<u8> {
    let Packet::CompressedBitmap(bitmap) = packet else { panic!("{} is plain", packet.name()) };
    let polarity = if bitmap.first_run_set { 0x80 } else { 0 };
    let mut body = vec![2 | (bitmap.unused_bits << 4) | polarity];
    body.extend_from_slice(&bitmap.code);
    body
}

/// Captured packets of the in-kernel driver are produced and read byte for byte.
#[test]
fn worked_examples_are_reproduced() {
    let cases: [(u64, Vec<u64>, &[u8]); 9] = [
        (32, (0..32).collect(), &[0xe2, 0xef, 0x01]),
        (32, vec![1], &[0x22, 0xf0, 0x1a]),
        (128, (0..128).collect(), &[0xa2, 0xdf, 0x13]),
        (3062, (0..3062).collect(), &[0xb2, 0x3f, 0xc5, 0x0a]),
        (128, vec![0, 16, 17, 49], &[0xb2, 0x9c, 0x7d, 0x8e, 0xaf, 0x03]),
        (32, vec![3, 16, 17], &[0x32, 0xe1, 0xe6, 0x15]),
        (32, vec![4, 8, 9], &[0x42, 0x25, 0xbe, 0x02]),
        (32, vec![2], &[0x22, 0xf2, 0x18]),
        (32, vec![0, 2], &[0x82, 0xc0, 0x63]),
    ];
    for (bits, set, expected) in cases {
        let words = words_of(bits, set);
        let mut sender = BitmapSender::new(bits);
        let packet = sender.next_packet(&words, true, HeaderKind::H100).unwrap();
        assert_eq!(body(&packet), expected);
        assert!(sender.is_finished());
        assert_eq!(sender.next_packet(&words, true, HeaderKind::H100), None);
        let mut found = vec![0; words.len()];
        let progress = BitmapReceiver::new(bits).receive(&packet, |run| mark(&mut found, run));
        assert_eq!((progress, found), (Ok(Progress::Done), words));
    }
}

/// Least and greatest run of each class survive, and take the documented number of bits.
#[test]
fn runs_at_class_borders_survive() {
    let borders = [
        (1, 2, 2),
        (3, 4, 3),
        (5, 8, 5),
        (9, 16, 7),
        (17, 48, 10),
        (49, 304, 14),
        (305, 8496, 21),
        (8497, 2_105_648, 29),
        (2_105_649, 17_181_974_832, 42),
        (17_181_974_833, (1 << 56) + 17_181_974_832, 64),
    ];
    for (least, most, bits) in borders {
        for run in [least, most] {
            let mut writer = CodeWriter::new(8);
            assert!(writer.push(run));
            assert!(!CodeWriter::new((bits - 1) / 8).push(run));
            let (code, unused_bits) = writer.finish();
            assert_eq!(code.len() * 8 - usize::from(unused_bits), bits, "{run}");
            let packet = CompressedBitmap { first_run_set: true, unused_bits, code };
            let mut reader = CodeReader::new(&packet).unwrap();
            assert_eq!((reader.pop(), reader.is_empty()), (Some(run), true));
        }
    }
}

/// A plain transfer ends with an empty packet, in both header kinds.
#[test]
fn plain_transfers_end_with_an_empty_packet() {
    for (kind, full) in [(HeaderKind::H100, 510), (HeaderKind::H80, 511)] {
        let bits = full * 64 + 3;
        let mut words = words_of(bits, [0, bits - 1]);
        // Bits beyond the device are not sent.
        words[index(full)] |= 0xff << 3;
        let mut sender = BitmapSender::new(bits);
        let mut receiver = BitmapReceiver::for_kind(bits, kind);
        let mut found = Vec::new();
        for (length, progress) in [(full, Progress::More), (1, Progress::More), (0, Progress::Done)]
        {
            let packet = sender.next_packet(&words, false, kind).unwrap();
            let Packet::Bitmap(bytes) = &packet else { panic!("compressed") };
            assert_eq!(count(bytes.len()), length * 8);
            if length == 1 {
                assert_eq!(bytes.as_slice(), [4, 0, 0, 0, 0, 0, 0, 0]);
            }
            assert_eq!(receiver.receive(&packet, |run| found.push(run)), Ok(progress));
        }
        assert_eq!(sender.next_packet(&words, false, kind), None);
        let last = BlockRange { start: bits - 1, end: bits };
        assert_eq!(found, [BlockRange { start: 0, end: 1 }, last]);
    }
}

/// A bitmap without blocks is one empty packet.
#[test]
fn an_empty_bitmap_is_one_empty_packet() {
    let mut sender = BitmapSender::new(0);
    let packet = sender.next_packet(&[], true, HeaderKind::H100).unwrap();
    assert_eq!(packet, Packet::Bitmap(Vec::new()));
    assert!(sender.is_finished());
    let progress = BitmapReceiver::new(0).receive(&packet, |run| panic!("{run:?}"));
    assert_eq!(progress, Ok(Progress::Done));
}

/// Incompressible parts go as plain words from the last word border on, then runs are tried again.
#[test]
fn incompressible_parts_go_back_to_a_word_border() {
    let quiet = 100_000;
    let bits = quiet + 200_000;
    // One long clear run whose end lies inside of a word, then alternating blocks.
    let words = words_of(bits, (quiet + 5..bits - 90_000).step_by(2));
    let mut sender = BitmapSender::new(bits);
    let mut receiver = BitmapReceiver::new(bits);
    let mut found = vec![0; words.len()];
    let mut plain = 0;
    let mut compressed = 0;
    while let Some(packet) = sender.next_packet(&words, true, HeaderKind::H100) {
        if matches!(packet, Packet::Bitmap(_)) {
            plain += 1;
        } else {
            compressed += 1;
        }
        let progress = receiver.receive(&packet, |run| mark(&mut found, run)).unwrap();
        assert_eq!(progress == Progress::Done, sender.is_finished());
    }
    assert_eq!(found, words);
    assert!(plain >= 3 && compressed >= 2, "{plain} plain, {compressed} compressed");
}

fn compressed(first_run_set: bool, unused_bits: u8, code: &[u8]) -> Packet {
    Packet::CompressedBitmap(CompressedBitmap { first_run_set, unused_bits, code: code.to_vec() })
}

/// Every malformed packet is refused with the reason.
#[test]
fn malformed_packets_are_refused() {
    let cases = [
        // 32 set blocks on a device of 31.
        (31, compressed(true, 6, &[0xef, 0x01]), "run"),
        // 32 clear blocks on a device of 31.
        (31, compressed(false, 6, &[0xef, 0x01]), "run"),
        // Behind the last block comes another run.
        (32, compressed(true, 4, &[0xef, 0x01]), "run"),
        // The greatest run of all.
        (32, compressed(true, 0, &[0xff; 8]), "run"),
        // A code word cut short.
        (32, compressed(true, 7, &[0xef, 0x01]), "code"),
        (32, compressed(true, 7, &[0x01]), "code"),
        (32, compressed(true, 0, &[]), "code"),
        // Unused bits that are set.
        (32, compressed(true, 6, &[0xef, 0x05]), "trailing"),
        // Plain packets of the wrong size.
        (64, Packet::Bitmap(vec![0; 16]), "words"),
        (64, Packet::Bitmap(vec![0; 7]), "words"),
        (64, Packet::Bitmap(Vec::new()), "words"),
        (64 * 600, Packet::Bitmap(vec![0; 8 * 511]), "words"),
        // A foreign packet.
        (64, Packet::Ping, "packet"),
    ];
    for (bits, packet, expected) in cases {
        let found = BitmapReceiver::new(bits).receive(&packet, |_| ());
        let class = match found.unwrap_err() {
            DecodeError::BitmapRun { .. } => "run",
            DecodeError::BitmapCode { .. } => "code",
            DecodeError::BitmapTrailing { .. } => "trailing",
            DecodeError::BitmapWords { .. } => "words",
            DecodeError::BitmapPacket { .. } => "packet",
            other => panic!("{other}"),
        };
        assert_eq!(class, expected, "{packet:?}");
    }
}

/// Nothing is accepted after the end, nor runs after the last plain word.
#[test]
fn packets_after_the_end_are_refused() {
    let mut receiver = BitmapReceiver::new(32);
    let all = compressed(true, 6, &[0xef, 0x01]);
    assert_eq!(receiver.receive(&all, |_| ()), Ok(Progress::Done));
    let misplaced = DecodeError::BitmapPacket { name: "P_BITMAP", position: FINISHED, bits: 32 };
    assert_eq!(receiver.receive(&Packet::Bitmap(Vec::new()), |_| ()), Err(misplaced));

    let mut receiver = BitmapReceiver::new(32);
    assert_eq!(receiver.receive(&Packet::Bitmap(vec![0; 8]), |_| ()), Ok(Progress::More));
    let beyond = DecodeError::BitmapRun { position: 32, run: 1, bits: 32 };
    assert_eq!(receiver.receive(&compressed(false, 6, &[0]), |_| ()), Err(beyond));
}

/// Bitmaps of runs of all sizes, sparse, dense, and noise.
fn bitmap() -> impl Strategy<Value = (u64, Vec<u64>)> {
    let run = prop_oneof![
        8 => 1_u64..6,
        4 => 1_u64..400,
        1 => 1_u64..50_000,
    ];
    let runs = prop::collection::vec((run, any::<bool>()), 0..400);
    let noise = prop::collection::vec(any::<u64>(), 0..1200);
    (runs, noise, 0_u64..64).prop_map(|(runs, noise, cut)| {
        let mut bits = 0;
        let mut set = Vec::new();
        for (length, is_set) in runs {
            if is_set {
                set.extend(bits..bits + length);
            }
            bits += length;
        }
        for word in noise {
            set.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| bits + bit));
            bits += 64;
        }
        bits = bits.saturating_sub(cut);
        let words = words_of(bits, set.into_iter().filter(|block| *block < bits));
        (bits, words)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What arrives is what was sent, however plain and compressed packets are mixed.
    #[test]
    fn a_transfer_carries_the_bitmap(
        (bits, words) in bitmap(),
        rle in prop::collection::vec(any::<bool>(), 1..8),
        is_old in any::<bool>(),
    ) {
        let kind = if is_old { HeaderKind::H80 } else { HeaderKind::H100 };
        let mut sender = BitmapSender::new(bits);
        let mut receiver = BitmapReceiver::for_kind(bits, kind);
        let mut found = vec![0; words.len()];
        let mut done = false;
        for use_rle in rle.iter().cycle() {
            let Some(packet) = sender.next_packet(&words, *use_rle, kind) else { break };
            prop_assert!(!done);
            let mut last = 0;
            let progress = receiver.receive(&packet, |run| {
                assert!(run.start >= last && run.end <= bits);
                last = run.end;
                mark(&mut found, run);
            }).unwrap();
            done = progress == Progress::Done;
        }
        prop_assert!(done);
        prop_assert_eq!(found, words);
    }

    /// The ends of runs are those that looking at every single bit finds.
    #[test]
    fn run_ends_match_a_bitwise_search((bits, words) in bitmap(), from in any::<u64>()) {
        prop_assume!(bits > 0);
        let start = from % bits;
        let bit = |at: u64| words[index(at / 64)] >> (at % 64) & 1 == 1;
        for set in [false, true] {
            let expected = (start..bits).find(|at| bit(*at) != set).unwrap_or(bits);
            prop_assert_eq!(run_end(&words, bits, start, set), expected);
        }
    }

    /// Arbitrary code never panics and never reports a block beyond the device.
    #[test]
    fn arbitrary_code_stays_inside(
        bits in prop_oneof![0_u64..5000, Just(u64::from(u32::MAX))],
        first_run_set in any::<bool>(),
        unused_bits in 0_u8..8,
        code in prop::collection::vec(any::<u8>(), 0..64),
        plain in any::<bool>(),
    ) {
        let packet = if plain {
            Packet::Bitmap(code)
        } else {
            Packet::CompressedBitmap(CompressedBitmap { first_run_set, unused_bits, code })
        };
        let mut receiver = BitmapReceiver::new(bits);
        for _ in 0..2 {
            let result = receiver.receive(&packet, |run| {
                assert!(run.start < run.end && run.end <= bits);
            });
            if result != Ok(Progress::More) {
                break;
            }
        }
    }
}
