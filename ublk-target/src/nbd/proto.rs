//! The transmission phase of the NBD protocol: requests, checks, replies, byte by byte.
//!
//! | message | layout (big endian) |
//! |---|---|
//! | request | `0 u32 magic, 4 u16 flags, 6 u16 type, 8 u64 cookie, 16 u64 offset, 24 u32 length` |
//! | simple reply | `0 u32 magic, 4 u32 error, 8 u64 cookie` |
//! | chunk | `0 u32 magic, 4 u16 flags, 6 u16 type, 8 u64 cookie, 16 u32 length` |
//!
//! A request that cannot be served is answered with an error and leaves the connection usable; only
//! bytes that are no request end it.
//!
//! Source: the NBD protocol description (`doc/proto.md` of the NBD project).

use replication_core::event::HostOp;
use replication_core::limits::MAX_DISCARD_SIZE_OLD;
use replication_core::units::{Errno, SECTOR_SIZE, Sector, SectorRange};

/// Bytes of a request.
pub const REQUEST_SIZE: usize = 28;
/// Largest range of a discard or write of zeroes that the core gets at once: what every peer takes,
/// and at most two activity-log extents. Longer requests are served piece by piece.
pub const RANGE_PIECE: u64 = MAX_DISCARD_SIZE_OLD as u64;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;

const CMD_FLAG_FUA: u16 = 1 << 0;
const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
const CMD_FLAG_DF: u16 = 1 << 2;

const CHUNK_DONE: u16 = 1 << 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

const FLAG_HAS_FLAGS: u16 = 1 << 0;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_SEND_DF: u16 = 1 << 7;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// What an export can do, as announced. Several connections to one export see the same: all
/// requests meet in one core, and its flush covers them all.
#[must_use]
pub fn transmission_flags(structured: bool) -> u16 {
    let flags = FLAG_HAS_FLAGS
        | FLAG_SEND_FLUSH
        | FLAG_SEND_FUA
        | FLAG_SEND_TRIM
        | FLAG_SEND_WRITE_ZEROES
        | FLAG_CAN_MULTI_CONN;
    if structured { flags | FLAG_SEND_DF } else { flags }
}

/// Error numbers of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdError(pub u32);

impl NbdError {
    /// Input/output error.
    pub const IO: Self = Self(5);
    /// Invalid request.
    pub const INVALID: Self = Self(22);
    /// No space: a write beyond the end.
    pub const NO_SPACE: Self = Self(28);

    /// The protocol's number for an error of the system.
    #[must_use]
    pub fn from_errno(errno: Errno) -> Self {
        match errno.0 {
            libc::EPERM | libc::EROFS => Self(1),
            libc::ENOMEM => Self(12),
            libc::EINVAL => Self::INVALID,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NO_SPACE,
            libc::EOVERFLOW => Self(75),
            libc::EOPNOTSUPP => Self(95),
            libc::ESHUTDOWN => Self(108),
            _ => Self::IO,
        }
    }
}

/// A request as sent by a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    flags: u16,
    command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// What a request asks for, after all checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Something to do; an operation with FUA that has no such flag in the core is followed by a
    /// flush.
    Do {
        /// What.
        op: HostOp,
        /// Where.
        range: SectorRange,
        /// Make it durable before the answer.
        then_flush: bool,
    },
    /// The client leaves.
    Disconnect,
    /// It cannot be served.
    Refuse(NbdError),
}

/// Size and limits of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size.
    pub sectors: Sector,
    /// Smallest unit of a request in bytes.
    pub block_size: u32,
    /// Largest payload in bytes.
    pub max_io_size: u32,
}

impl Request {
    /// Reads a request; `None` if the bytes are none.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_SIZE]) -> Option<Self> {
        if be32(bytes, 0) != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: be16(bytes, 4),
            command: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            length: be32(bytes, 24),
        })
    }

    /// Bytes that follow the request, also if it cannot be served.
    #[must_use]
    pub fn payload(&self) -> u32 {
        if self.command == CMD_WRITE { self.length } else { 0 }
    }

    /// Whether it asks for data, which is answered in a different form in structured mode.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.command == CMD_READ
    }

    /// Checks the request against the export.
    #[must_use]
    pub fn check(&self, limits: &Limits, structured: bool) -> Asked {
        let fua = self.flags & CMD_FLAG_FUA != 0;
        let no_hole = self.flags & CMD_FLAG_NO_HOLE != 0;
        let (op, allowed, then_flush) = match self.command {
            CMD_READ => (HostOp::Read, CMD_FLAG_FUA | CMD_FLAG_DF, false),
            CMD_WRITE => (HostOp::Write { fua }, CMD_FLAG_FUA, false),
            CMD_DISC => return Asked::Disconnect,
            CMD_FLUSH => (HostOp::Flush, CMD_FLAG_FUA, false),
            CMD_TRIM => (HostOp::Discard, CMD_FLAG_FUA, fua),
            CMD_WRITE_ZEROES => {
                let op = HostOp::WriteZeroes { unmap: !no_hole };
                (op, CMD_FLAG_FUA | CMD_FLAG_NO_HOLE, fua)
            }
            _ => return Asked::Refuse(NbdError::INVALID),
        };
        let unfit = self.flags & CMD_FLAG_DF != 0 && !structured;
        if self.flags & !allowed != 0 || unfit {
            return Asked::Refuse(NbdError::INVALID);
        }
        match self.range(op, limits) {
            Ok(range) => Asked::Do { op, range, then_flush },
            Err(error) => Asked::Refuse(error),
        }
    }

    fn range(&self, op: HostOp, limits: &Limits) -> Result<SectorRange, NbdError> {
        if op == HostOp::Flush {
            let empty = self.offset == 0 && self.length == 0;
            return if empty { Ok(SectorRange::default()) } else { Err(NbdError::INVALID) };
        }
        let bytes = u64::from(self.length);
        let block = u64::from(limits.block_size);
        if bytes == 0 || !self.offset.is_multiple_of(block) || !bytes.is_multiple_of(block) {
            return Err(NbdError::INVALID);
        }
        let carries_data = matches!(op, HostOp::Read | HostOp::Write { .. });
        if carries_data && self.length > limits.max_io_size {
            return Err(NbdError::INVALID);
        }
        let start = Sector(self.offset / SECTOR_SIZE);
        let range = SectorRange::from_bytes(start, bytes).ok_or(NbdError::INVALID)?;
        if range.end <= limits.sectors.0 {
            return Ok(range);
        }
        match op {
            HostOp::Write { .. } | HostOp::WriteZeroes { .. } => Err(NbdError::NO_SPACE),
            HostOp::Read | HostOp::Discard | HostOp::Flush => Err(NbdError::INVALID),
        }
    }
}

/// A reply to a request that returns no data.
pub fn simple_reply(out: &mut Vec<u8>, cookie: u64, result: Result<(), NbdError>) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&result.map_or_else(|error| error.0, |()| 0).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// What precedes the data of a successful read.
pub fn read_head(out: &mut Vec<u8>, cookie: u64, structured: bool, offset: u64, length: u32) {
    if !structured {
        simple_reply(out, cookie, Ok(()));
        return;
    }
    chunk(out, CHUNK_OFFSET_DATA, cookie, length + 8);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// A reply to a read that failed.
pub fn read_error(out: &mut Vec<u8>, cookie: u64, structured: bool, error: NbdError) {
    if !structured {
        simple_reply(out, cookie, Err(error));
        return;
    }
    chunk(out, CHUNK_ERROR, cookie, 6);
    out.extend_from_slice(&error.0.to_be_bytes());
    out.extend_from_slice(&0_u16.to_be_bytes());
}

fn chunk(out: &mut Vec<u8>, kind: u16, cookie: u64, length: u32) {
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&CHUNK_DONE.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { sectors: Sector(2048), block_size: 512, max_io_size: 65536 };

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        Request::parse(bytes.as_slice().try_into().unwrap()).unwrap()
    }

    fn asked(command: u16, flags: u16, offset: u64, length: u32) -> Asked {
        request(command, flags, offset, length).check(&LIMITS, true)
    }

    #[test]
    fn good_requests_become_host_operations() {
        let range = SectorRange { start: 8, end: 16 };
        let flushed = |op, range, then_flush| Asked::Do { op, range, then_flush };
        let none = SectorRange::default();
        let table = [
            (CMD_READ, 0, 4096, 4096, flushed(HostOp::Read, range, false)),
            (CMD_READ, CMD_FLAG_DF, 4096, 4096, flushed(HostOp::Read, range, false)),
            (CMD_WRITE, 0, 4096, 4096, flushed(HostOp::Write { fua: false }, range, false)),
            (CMD_WRITE, 1, 4096, 4096, flushed(HostOp::Write { fua: true }, range, false)),
            (CMD_FLUSH, 0, 0, 0, flushed(HostOp::Flush, none, false)),
            (CMD_TRIM, 1, 4096, 4096, flushed(HostOp::Discard, range, true)),
            (
                CMD_WRITE_ZEROES,
                CMD_FLAG_NO_HOLE,
                4096,
                4096,
                flushed(HostOp::WriteZeroes { unmap: false }, range, false),
            ),
            (CMD_DISC, 0, 0, 0, Asked::Disconnect),
        ];
        for (command, flags, offset, length, expected) in table {
            assert_eq!(asked(command, flags, offset, length), expected, "command {command}");
        }
    }

    #[test]
    fn bad_requests_are_refused_with_the_right_error() {
        let invalid = Asked::Refuse(NbdError::INVALID);
        let no_space = Asked::Refuse(NbdError::NO_SPACE);
        let end = 2048 * 512;
        let table = [
            (CMD_READ, 0, 100, 512, invalid),
            (CMD_READ, 0, 512, 100, invalid),
            (CMD_READ, 0, 512, 0, invalid),
            (CMD_READ, 0, end, 512, invalid),
            (CMD_READ, 0, u64::MAX - 511, 512, invalid),
            (CMD_READ, 0, 0, 65536 + 512, invalid),
            (CMD_WRITE, 0, 0, 65536 + 512, invalid),
            (CMD_WRITE, 0, end - 512, 1024, no_space),
            (CMD_WRITE, CMD_FLAG_NO_HOLE, 0, 512, invalid),
            (CMD_WRITE_ZEROES, 0, end, 512, no_space),
            (CMD_TRIM, 0, end, 512, invalid),
            (CMD_FLUSH, 0, 512, 0, invalid),
            (CMD_FLUSH, 0, 0, 512, invalid),
            (5, 0, 0, 512, invalid),
            (99, 0, 0, 512, invalid),
        ];
        for (command, flags, offset, length, expected) in table {
            let found = asked(command, flags, offset, length);
            assert_eq!(found, expected, "command {command} at {offset} +{length}");
        }
        let fragmented = request(CMD_READ, CMD_FLAG_DF, 0, 512).check(&LIMITS, false);
        assert_eq!(fragmented, invalid);
        let coarse = Limits { block_size: 4096, ..LIMITS };
        assert_eq!(request(CMD_READ, 0, 512, 512).check(&coarse, false), invalid);
    }

    #[test]
    fn only_writes_are_followed_by_payload() {
        assert_eq!(request(CMD_WRITE, 0, 1, 77).payload(), 77);
        assert_eq!(request(CMD_READ, 0, 0, 512).payload(), 0);
        assert_eq!(request(99, 0, 0, 512).payload(), 0);
    }

    #[test]
    fn other_bytes_are_no_request() {
        assert_eq!(Request::parse(&[0x55; REQUEST_SIZE]), None);
    }

    #[test]
    fn replies_have_the_protocols_bytes() {
        let mut out = Vec::new();
        simple_reply(&mut out, 0x0102_0304_0506_0708, Err(NbdError::IO));
        assert_eq!(out, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8]);
        out.clear();
        read_head(&mut out, 1, true, 512, 4096);
        let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0x10, 8];
        assert_eq!(out[..20], head);
        assert_eq!(out[20..], [0, 0, 0, 0, 0, 0, 2, 0]);
        out.clear();
        read_error(&mut out, 1, true, NbdError::IO);
        let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 6];
        assert_eq!(out[..20], head);
        assert_eq!(out[20..], [0, 0, 0, 5, 0, 0]);
        out.clear();
        read_head(&mut out, 1, false, 512, 4096);
        assert_eq!(out.len(), 16);
    }

    #[test]
    fn errors_of_the_system_have_a_number_of_the_protocol() {
        assert_eq!(NbdError::from_errno(Errno(libc::EROFS)), NbdError(1));
        assert_eq!(NbdError::from_errno(Errno::ENOSPC), NbdError::NO_SPACE);
        assert_eq!(NbdError::from_errno(Errno(libc::ETIMEDOUT)), NbdError::IO);
    }
}
