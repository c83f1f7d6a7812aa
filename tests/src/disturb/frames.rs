//! What the bytes of a connection are: which packet they belong to, and whether anything would
//! notice a change of them.
//!
//! Works from the bytes alone: the magic says which header it is. Nothing here is shared with the
//! engine but the numbers of the packets.
//!
//! # What is protected by a check, and what is not
//!
//! The protocol has no checksum of its own (`data-integrity-alg` covers payload, and this engine
//! refuses it by name): it relies on that of TCP. What a flipped bit below TCP does:
//!
//! | bytes | noticed by |
//! |---|---|
//! | magic and pad of a header | the header itself |
//! | packet type, if it becomes one that is unknown on the socket | the header |
//! | volume, of packets that need a known one | the lookup of the volume |
//! | length, of packets that have only one | the header |
//! | token of `P_BARRIER`, all of `P_BARRIER_ACK` | the sender's list of epochs |
//! | block id of a write | the answer, which names no request |
//! | sector and block id of `P_WRITE_ACK`, `P_RECV_ACK` | the lookup of the request |
//! | block id of `P_RS_WRITE_ACK` | the same |
//! | `P_RS_DATA_REQUEST` | the reply, which nobody has asked for |
//! | pads, sequence numbers, sizes in acks, block id and flags of resync data | without meaning |
//!
//! [`is_checked`] is this table. Everything else may do harm that nobody sees: payload; sector,
//! length and flags of a write or of resync data (the wrong place is overwritten, and not marked);
//! sectors of `P_RS_WRITE_ACK`; bitmaps; states, identifiers, sizes and settings; a type that
//! becomes another one. In the packets of the handshake up to the authentication a change is
//! noticed, but for the operator: the nodes then stand alone, as with the in-kernel driver.

use std::ops::Range;

use replication_core::wire::{Command, Stream};

const MAGIC_H80: [u8; 4] = [0x83, 0x74, 0x02, 0x67];
const MAGIC_H100: [u8; 4] = [0x86, 0x20, 0xec, 0x20];
/// Bytes before the payload of a packet with bulk data.
const DATA_HEAD: u64 = 24;

/// The head of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the header: 8 or 16.
    pub size: usize,
    /// The packet type.
    pub command: u16,
    /// Bytes behind the header.
    pub length: u32,
}

impl Head {
    /// Reads a complete header; `None` if it is none.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let be16 = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        if bytes.starts_with(&MAGIC_H80) {
            return Some(Self { size: 8, command: be16(4)?, length: u32::from(be16(6)?) });
        }
        if !bytes.starts_with(&MAGIC_H100) || bytes.len() < 16 {
            return None;
        }
        let length = u32::from(be16(8)?) << 16 | u32::from(be16(10)?);
        Some(Self { size: 16, command: be16(6)?, length })
    }

    /// The packet type, if it is a known one.
    #[must_use]
    pub const fn kind(&self) -> Option<Command> {
        Command::from_code(self.command)
    }

    /// Whether the byte at `offset` of the packet is bulk data.
    #[must_use]
    pub fn is_payload(&self, offset: u64) -> bool {
        let head = u64::try_from(self.size).expect("a small size") + DATA_HEAD;
        let is_bulk =
            matches!(self.kind(), Some(Command::Data | Command::DataReply | Command::RsDataReply));
        is_bulk && offset >= head
    }
}

/// Bytes of one packet within a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where they are in the chunk.
    pub at: Range<usize>,
    /// The place of the first of them in the packet.
    pub offset: u64,
    /// The head of the packet.
    pub head: Head,
}

/// Follows one direction of a connection.
#[derive(Clone, Debug, Default)]
pub struct Frames {
    /// The beginning of a header whose rest has not come.
    part: Vec<u8>,
    /// The packet that goes on, and how many of its bytes have passed.
    open: Option<(Head, u64)>,
    /// Bytes came that are no packet: nothing can be said any more.
    is_lost: bool,
}

impl Frames {
    /// What the bytes of a chunk are. Headers that lie in two chunks are left out.
    pub fn take(&mut self, chunk: &[u8]) -> Vec<Span> {
        let mut spans = Vec::new();
        let mut at = 0;
        while at < chunk.len() && !self.is_lost {
            let Some((head, offset)) = self.open.take() else {
                at = self.take_header(chunk, at);
                if let Some((head, offset)) = self.open.as_mut()
                    && let Some(start) = at.checked_sub(head.size)
                    && *offset == 0
                {
                    *offset = header_bytes(head);
                    spans.push(Span { at: start..at, offset: 0, head: *head });
                }
                self.close_if_done();
                continue;
            };
            let left = header_bytes(&head) + u64::from(head.length) - offset;
            let here = usize::try_from(left).map_or(chunk.len() - at, |l| l.min(chunk.len() - at));
            spans.push(Span { at: at..at + here, offset, head });
            self.open = Some((head, offset + u64::try_from(here).expect("it fits")));
            at += here;
            self.close_if_done();
        }
        spans
    }

    fn close_if_done(&mut self) {
        if let Some((head, offset)) = self.open
            && offset >= header_bytes(&head) + u64::from(head.length)
        {
            self.open = None;
        }
    }

    /// Takes bytes of a header. A header that lies in this chunk alone begins at offset 0; another
    /// one is behind its end.
    fn take_header(&mut self, chunk: &[u8], at: usize) -> usize {
        let is_whole = self.part.is_empty();
        let mut next = at;
        while next < chunk.len() {
            self.part.push(chunk[next]);
            next += 1;
            let is_h100 = self.part.starts_with(&MAGIC_H100);
            if self.part.len() < if is_h100 { 16 } else { 8 } {
                continue;
            }
            match Head::parse(&self.part) {
                Some(head) => {
                    let offset = if is_whole { 0 } else { header_bytes(&head) };
                    self.open = Some((head, offset));
                }
                None => self.is_lost = true,
            }
            self.part.clear();
            return next;
        }
        next
    }
}

fn header_bytes(head: &Head) -> u64 {
    u64::try_from(head.size).expect("a small size")
}

/// Whether a flip of `bit` in byte `offset` of a packet is noticed, or has no meaning, so that the
/// nodes must come to the same contents by themselves.
#[must_use]
pub fn is_checked(stream: Stream, head: &Head, offset: u64, bit: u8) -> bool {
    let Some(command) = head.kind() else { return false };
    let is_early = matches!(
        command,
        Command::ConnectionFeatures | Command::AuthChallenge | Command::AuthResponse
    );
    if is_early {
        return false;
    }
    match offset.checked_sub(header_bytes(head)) {
        Some(offset) => is_checked_body(command, offset),
        None => is_checked_header(stream, head, command, offset, bit),
    }
}

fn is_checked_header(stream: Stream, head: &Head, command: Command, offset: u64, bit: u8) -> bool {
    let becomes_unknown = |low: bool| {
        let flip = if low { 1 << bit } else { 0x100 << bit };
        Command::from_code(head.command ^ flip).is_none_or(|other| !other.is_on(stream))
    };
    if head.size == 8 {
        return match offset {
            0..4 => true,
            4 | 5 => becomes_unknown(offset == 5),
            _ => has_one_length(command),
        };
    }
    match offset {
        0..4 | 12..16 => true,
        // The low byte may come to name another volume of the setup, which nothing can notice.
        4 => !command.is_connection_level() && !may_be_of_unknown_volume(command),
        5 => false,
        6 | 7 => becomes_unknown(offset == 7),
        _ => has_one_length(command),
    }
}

const fn may_be_of_unknown_volume(command: Command) -> bool {
    matches!(
        command,
        Command::SyncParam
            | Command::SyncParam89
            | Command::Sizes
            | Command::Uuids
            | Command::State
    )
}

const fn has_one_length(command: Command) -> bool {
    !matches!(
        command,
        Command::Data
            | Command::DataReply
            | Command::RsDataReply
            | Command::Bitmap
            | Command::CompressedBitmap
            | Command::Protocol
            | Command::ProtocolUpdate
    )
}

fn is_checked_body(command: Command, offset: u64) -> bool {
    match command {
        Command::Data | Command::Trim | Command::Zeroes => (8..20).contains(&offset),
        Command::RsDataReply => (8..24).contains(&offset),
        Command::RsWriteAck => (8..16).contains(&offset) || (20..24).contains(&offset),
        Command::Barrier
        | Command::BarrierAck
        | Command::RsDataRequest
        | Command::WriteAck
        | Command::RecvAck => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(command: Command, body: &[u8]) -> Vec<u8> {
        let mut out = MAGIC_H100.to_vec();
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&command.code().to_be_bytes());
        out.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(body);
        out
    }

    fn stream() -> Vec<u8> {
        let mut bytes = vec![0x83, 0x74, 0x02, 0x67, 0xff, 0xf2, 0, 0];
        bytes.extend(packet(Command::Data, &[7; 24 + 1024]));
        bytes.extend(packet(Command::UnplugRemote, &[]));
        bytes.extend(packet(Command::Barrier, &[1; 8]));
        bytes
    }

    /// Every byte is where it is, however the bytes are cut into chunks.
    #[test]
    fn places_do_not_depend_on_chunks() {
        let bytes = stream();
        let whole = Frames::default().take(&bytes);
        let covered: usize = whole.iter().map(|span| span.at.len()).sum();
        assert_eq!(covered, bytes.len());
        let place_of = |spans: &[(usize, Span)], at: usize| {
            let found = spans
                .iter()
                .find(|(base, span)| (base + span.at.start..base + span.at.end).contains(&at))?;
            let into = u64::try_from(at - found.0 - found.1.at.start).unwrap();
            Some((found.1.head, found.1.offset + into))
        };
        let whole: Vec<_> = whole.into_iter().map(|span| (0, span)).collect();
        for size in [1, 3, 7, 16, 100, 1000] {
            let mut frames = Frames::default();
            let mut spans = Vec::new();
            for (number, chunk) in bytes.chunks(size).enumerate() {
                let found = frames.take(chunk);
                spans.extend(found.into_iter().map(|span| (number * size, span)));
            }
            for at in 0..bytes.len() {
                let (head, offset) = place_of(&whole, at).unwrap();
                let cut = place_of(&spans, at);
                // Only a header may be left out.
                let is_header = offset < u64::try_from(head.size).unwrap();
                assert!(cut == Some((head, offset)) || (is_header && cut.is_none()), "{at} {size}");
            }
        }
    }

    #[test]
    fn payload_is_told_from_the_rest() {
        let spans = Frames::default().take(&stream());
        let data = spans.iter().find(|s| s.head.kind() == Some(Command::Data)).unwrap();
        assert!(!data.head.is_payload(39) && data.head.is_payload(40));
        let barrier = spans.iter().find(|s| s.head.kind() == Some(Command::Barrier)).unwrap();
        assert!(!barrier.head.is_payload(40));
    }

    /// A few lines of the table.
    #[test]
    fn the_table_is_as_documented() {
        let head = |command: Command, length| Head { size: 16, command: command.code(), length };
        let data = head(Command::Data, 24 + 512);
        let checked = |head: &Head, offset, bit| is_checked(Stream::Data, head, offset, bit);
        assert!(checked(&data, 0, 0) && checked(&data, 15, 7) && checked(&data, 4, 0));
        assert!(!checked(&data, 5, 0), "another volume");
        assert!(checked(&data, 16 + 8, 0), "a block id");
        assert!(!checked(&data, 16, 0), "a sector");
        assert!(!checked(&data, 16 + 20, 0), "flags");
        assert!(!checked(&data, 10, 1) && !checked(&data, 16 + 24, 0), "length, payload");
        assert!(!checked(&data, 7, 0), "P_DATA becomes P_DATA_REPLY");
        assert!(checked(&data, 6, 0), "an unknown type");
        let state = head(Command::State, 4);
        assert!(!checked(&state, 4, 0), "a state of an unknown volume is ignored");
        assert!(checked(&state, 11, 0) && !checked(&state, 16, 0));
    }
}
