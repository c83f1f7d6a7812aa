//! The three packet headers (protocol notes, section 1).
//!
//! | kind | layout |
//! |---|---|
//! | h80 | `0 u32 0x83740267, 4 u16 command, 6 u16 length` |
//! | h95 | `0 u16 0x835a, 2 u16 command, 4 u32 length` |
//! | h100 | `0 u32 0x8620ec20, 4 u16 volume, 6 u16 command, 8 u32 length, 12 u32 zero` |
//!
//! All numbers are big endian; `length` counts the bytes behind the header.

use super::bytes::{be16, be32};
use super::error::DecodeError;
use crate::units::VolumeNr;

const MAGIC_H80: u32 = 0x8374_0267;
const MAGIC_H95: u16 = 0x835a;
const MAGIC_H100: u32 = 0x8620_ec20;
const SIZE_H80: usize = 8;
const SIZE_H100: usize = 16;

/// First version that uses the 16-byte header.
const VERSION_H100: u32 = 100;
/// First version that knows h95.
const VERSION_H95: u32 = 95;
/// Longest body behind h80 when h95 exists: header and body together fill 32 KiB.
const H80_LENGTH_MAX: u32 = 32760;

/// The family of headers in use on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderKind {
    /// The two 8-byte formats, told apart by their magic.
    H80,
    /// The 16-byte format.
    H100,
}

impl HeaderKind {
    /// The kind in use with an agreed version; `None` before the features were exchanged.
    #[must_use]
    pub const fn for_version(agreed: Option<u32>) -> Self {
        match agreed {
            Some(version) if version >= VERSION_H100 => Self::H100,
            Some(_) | None => Self::H80,
        }
    }

    /// Bytes of a header.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::H80 => SIZE_H80,
            Self::H100 => SIZE_H100,
        }
    }
}

/// A decoded packet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The volume; 0 in 8-byte headers. Without meaning in connection-level packets.
    pub volume: VolumeNr,
    /// The packet type.
    pub command: u16,
    /// Bytes that follow the header. Not yet checked against anything.
    pub length: u32,
}

/// Decodes a packet header of `kind`.
///
/// # Errors
/// [`DecodeError::HeaderSize`] unless `bytes` has exactly [`HeaderKind::size`] bytes,
/// [`DecodeError::Magic`] and [`DecodeError::HeaderPad`] for a header that is none.
pub fn decode_header(kind: HeaderKind, bytes: &[u8]) -> Result<Header, DecodeError> {
    if bytes.len() != kind.size() {
        return Err(DecodeError::HeaderSize { expected: kind.size(), found: bytes.len() });
    }
    let magic = be32(bytes, 0);
    match kind {
        HeaderKind::H80 if magic == MAGIC_H80 => Ok(Header {
            volume: VolumeNr(0),
            command: be16(bytes, 4),
            length: u32::from(be16(bytes, 6)),
        }),
        HeaderKind::H80 if be16(bytes, 0) == MAGIC_H95 => {
            Ok(Header { volume: VolumeNr(0), command: be16(bytes, 2), length: be32(bytes, 4) })
        }
        HeaderKind::H100 if magic == MAGIC_H100 => {
            let pad = be32(bytes, 12);
            if pad != 0 {
                return Err(DecodeError::HeaderPad { found: pad });
            }
            Ok(Header {
                volume: VolumeNr(be16(bytes, 4)),
                command: be16(bytes, 6),
                length: be32(bytes, 8),
            })
        }
        HeaderKind::H80 | HeaderKind::H100 => Err(DecodeError::Magic { found: magic }),
    }
}

/// The bytes of `header` as sent with an agreed `version`; the second number counts those in use.
///
/// # Panics
/// If a body longer than 64 KiB meets a version that has no header for it: payload is bounded to
/// 32 KiB there.
pub(super) fn encode_header(kind: HeaderKind, version: u32, header: Header) -> ([u8; 16], usize) {
    let mut bytes = [0; SIZE_H100];
    let command = header.command.to_be_bytes();
    match kind {
        HeaderKind::H100 => {
            bytes[0..4].copy_from_slice(&MAGIC_H100.to_be_bytes());
            bytes[4..6].copy_from_slice(&header.volume.0.to_be_bytes());
            bytes[6..8].copy_from_slice(&command);
            bytes[8..12].copy_from_slice(&header.length.to_be_bytes());
        }
        HeaderKind::H80 if must_use_h95(version, header.length) => {
            bytes[0..2].copy_from_slice(&MAGIC_H95.to_be_bytes());
            bytes[2..4].copy_from_slice(&command);
            bytes[4..8].copy_from_slice(&header.length.to_be_bytes());
        }
        HeaderKind::H80 => {
            let length = u16::try_from(header.length)
                .expect("payload is bounded to 32 KiB in versions without the long header");
            bytes[0..4].copy_from_slice(&MAGIC_H80.to_be_bytes());
            bytes[4..6].copy_from_slice(&command);
            bytes[6..8].copy_from_slice(&length.to_be_bytes());
        }
    }
    (bytes, kind.size())
}

fn must_use_h95(version: u32, length: u32) -> bool {
    version >= VERSION_H95 && length > H80_LENGTH_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kind follows the agreed version, and is the old one before there is an agreement.
    #[test]
    fn kind_follows_the_agreed_version() {
        for (agreed, kind) in [
            (None, HeaderKind::H80),
            (Some(86), HeaderKind::H80),
            (Some(99), HeaderKind::H80),
            (Some(100), HeaderKind::H100),
            (Some(101), HeaderKind::H100),
        ] {
            assert_eq!(HeaderKind::for_version(agreed), kind, "{agreed:?}");
        }
    }

    /// Each of the three formats is read back from its documented bytes.
    #[test]
    fn the_three_formats_are_decoded() {
        let h80 = [0x83, 0x74, 0x02, 0x67, 0xff, 0xf2, 0x01, 0x02];
        let header = Header { volume: VolumeNr(0), command: 0xfff2, length: 0x0102 };
        assert_eq!(decode_header(HeaderKind::H80, &h80), Ok(header));
        let h95 = [0x83, 0x5a, 0x00, 0x02, 0x00, 0x02, 0x00, 0x18];
        let header = Header { volume: VolumeNr(0), command: 2, length: 0x2_0018 };
        assert_eq!(decode_header(HeaderKind::H80, &h95), Ok(header));
        let h100 = [0x86, 0x20, 0xec, 0x20, 0, 7, 0, 0x0b, 0, 0, 0, 0x19, 0, 0, 0, 0];
        let header = Header { volume: VolumeNr(7), command: 0x0b, length: 25 };
        assert_eq!(decode_header(HeaderKind::H100, &h100), Ok(header));
    }

    /// The 16-byte kind refuses the old magics and a pad that is not zero, and the other way round.
    #[test]
    fn foreign_headers_are_refused() {
        let mut h100 = [0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0x13, 0, 0, 0, 0, 0, 0, 0, 1];
        let found = decode_header(HeaderKind::H100, &h100);
        assert_eq!(found, Err(DecodeError::HeaderPad { found: 1 }));
        h100[0..4].copy_from_slice(&MAGIC_H80.to_be_bytes());
        let found = decode_header(HeaderKind::H100, &h100);
        assert_eq!(found, Err(DecodeError::Magic { found: MAGIC_H80 }));
        let found = decode_header(HeaderKind::H80, &[0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0]);
        assert_eq!(found, Err(DecodeError::Magic { found: MAGIC_H100 }));
        let found = decode_header(HeaderKind::H80, &[0; 7]);
        assert_eq!(found, Err(DecodeError::HeaderSize { expected: 8, found: 7 }));
    }

    /// The long 8-byte format is sent from version 95 on, and only above 32 KiB in all.
    #[test]
    fn the_long_header_starts_above_32_kib() {
        for (version, length, magic) in [
            (94, 32768 + 24, 0x8374),
            (95, 32760, 0x8374),
            (95, 32761, 0x835a),
            (99, 131_096, 0x835a),
        ] {
            let header = Header { volume: VolumeNr(0), command: 0, length };
            let (bytes, size) = encode_header(HeaderKind::H80, version, header);
            assert_eq!(be16(&bytes, 0), magic, "version {version} length {length}");
            assert_eq!(decode_header(HeaderKind::H80, &bytes[..size]), Ok(header));
        }
    }
}
