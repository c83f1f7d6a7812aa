//! What the operator and the host send.

use std::path::PathBuf;

use drbdctl::conf::{self, Config, Inputs, Main, MemoryFiles};
use replication_core::control::{
    Command, FrameError, Refusal, Reply, decode_frame, encode_frame, frame_length,
};
use replication_core::units::Sector;
use ublk_target::nbd::handshake::{Export, Handshake, Progress};
use ublk_target::nbd::proto::{Asked, Limits, REQUEST_SIZE, Request};

use super::Bytes;

fn parse(bytes: &[u8]) -> Option<Config> {
    let name = PathBuf::from("STDIN");
    let main = Main::Text { name, bytes: bytes.to_vec(), dir: PathBuf::from("/etc") };
    let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
    let files = MemoryFiles::default().with("/etc/other", "common { net { protocol A; } }");
    match conf::load_inputs(inputs, &files) {
        Ok((config, warnings)) => {
            assert!(warnings.iter().all(|warning| !warning.to_string().contains('\n')));
            Some(config)
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// A configuration: refused, or its dump is read as the same.
pub fn config(data: &[u8]) {
    let Some(config) = parse(data) else { return };
    let dump = config.dump();
    let again = parse(dump.as_bytes()).unwrap_or_else(|| panic!("dump is unreadable:\n{dump}"));
    assert_eq!(again.dump(), dump);
    assert_eq!(again.resources(), config.resources());
    for name in config.resources() {
        for node in ["alice", "web1", "a"] {
            assert_eq!(
                config.for_node(name, node).is_ok(),
                again.for_node(name, node).is_ok(),
                "resource {name} on {node}"
            );
        }
    }
}

fn reread<T>(bytes: &[u8])
where
    T: serde::Serialize + for<'a> serde::Deserialize<'a>,
{
    let message: Result<T, FrameError> = decode_frame(bytes);
    let Ok(message) = message else { return };
    let frame = encode_frame(&message).expect("it was in a frame");
    let mut field = [0; 4];
    field.copy_from_slice(&frame[..4]);
    assert_eq!(frame_length(field), Ok(frame.len() - 4));
    let again: T = decode_frame(&frame[4..]).expect("our own frame");
    // Numbers that are not equal to themselves aside, equal messages have equal frames.
    assert_eq!(encode_frame(&again), Ok(frame));
}

/// A frame of the control socket, as a command and as an answer.
pub fn control(data: &[u8]) {
    let mut field = [0; 4];
    let head = Bytes(data).take(4);
    field[..head.len()].copy_from_slice(head);
    if let Ok(length) = frame_length(field) {
        let body = data.get(4..4 + length).unwrap_or_default();
        reread::<Command>(body);
        reread::<Result<Reply, Refusal>>(body);
    }
    reread::<Command>(data);
    reread::<Result<Reply, Refusal>>(data);
}

/// An NBD client: handshake, then requests. Whatever gets through lies inside of the export.
pub fn nbd(data: &[u8]) {
    const NAMES: [(&str, u64); 3] = [("0", 2048), ("7", 4096), ("8", 0)];
    let exports = NAMES.map(|(name, sectors)| Export {
        name: name.to_owned(),
        limits: Limits { sectors: Sector(sectors), block_size: 512, max_io_size: 1 << 20 },
    });
    let mut replies = Vec::new();
    let mut handshake = Handshake::new(&mut replies);
    let mut input = data;
    let chosen = loop {
        let there = input.len();
        replies.clear();
        let used = match handshake.advance(input, &exports, &mut replies) {
            Progress::More | Progress::Close(_) => return,
            Progress::Used(used) => used,
            Progress::Transmission { used, export } => break (used, export),
        };
        assert!(used > 0 && used <= there, "a step uses something");
        assert!(replies.len() < 4096, "replies are short");
        input = &input[used..];
    };
    let limits = exports[chosen.1].limits;
    assert!(limits.sectors.0 > 0, "a volume without a size is not offered");
    let mut requests = Bytes(&input[chosen.0..]);
    loop {
        let mut head = [0; REQUEST_SIZE];
        let bytes = requests.take(REQUEST_SIZE);
        if bytes.len() < REQUEST_SIZE {
            return;
        }
        head.copy_from_slice(bytes);
        let Some(request) = Request::parse(&head) else { return };
        match request.check(&limits, handshake.is_structured()) {
            Asked::Disconnect => return,
            Asked::Refuse(_) => {}
            Asked::Do { range, .. } => {
                assert!(range.end <= limits.sectors.0 && range.start <= range.end);
            }
        }
        requests.take(usize::try_from(request.payload()).expect("32 bits fit"));
    }
}
