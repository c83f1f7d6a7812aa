//! What can be wrong with bytes from the peer: one error type for headers, packets and bitmaps.
//!
//! Every variant names the packet and the numbers, never bytes of the peer. All of them mean that
//! the peer broke the protocol, so the connection is dropped; see section 17.4 of the protocol
//! notes for the cases in which no further attempt is made.

use thiserror::Error;

use super::Stream;

/// Bytes that are no packet of the agreed protocol version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The caller passed a header of another size than the header kind has.
    #[error("packet header of {found} bytes where {expected} were expected")]
    HeaderSize {
        /// Bytes of this kind of header.
        expected: usize,
        /// Bytes passed.
        found: usize,
    },
    /// The first bytes are the magic of no header accepted at this point.
    #[error("bad magic {found:#010x} in a packet header")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// The pad of a 16-byte header is not zero.
    #[error("pad of a packet header is {found:#010x} where zero was expected")]
    HeaderPad {
        /// The pad.
        found: u32,
    },
    /// A command that does not exist on this socket.
    #[error("unknown packet type {command:#06x} on the {stream} socket")]
    UnknownCommand {
        /// The socket.
        stream: Stream,
        /// The command of the header.
        command: u16,
    },
    /// A command that the agreed protocol version does not have.
    #[error("{name} does not exist in protocol version {version}")]
    NotInVersion {
        /// The packet.
        name: &'static str,
        /// The agreed version.
        version: u32,
    },
    /// The length field does not fit the packet.
    #[error("{name} of {found} bytes where {least} to {most} were expected")]
    Length {
        /// The packet.
        name: &'static str,
        /// Least length of the packet.
        least: u32,
        /// Greatest length of the packet.
        most: u32,
        /// The length field.
        found: u32,
    },
    /// The length is in range, but not a whole number of units.
    #[error("{name} carries {found} bytes, which is no multiple of {unit}")]
    Alignment {
        /// The packet.
        name: &'static str,
        /// Bytes of a unit.
        unit: u32,
        /// Bytes found.
        found: u32,
    },
    /// The caller passed another number of bytes than the plan of the packet asks for.
    #[error("{found} bytes passed for the fixed part of {name}, which has {expected}")]
    FixedPart {
        /// The packet.
        name: &'static str,
        /// Bytes of the fixed part.
        expected: usize,
        /// Bytes passed.
        found: usize,
    },
    /// A field holds a value without a meaning.
    #[error("{name} carries {found} as its {field}")]
    Field {
        /// The packet.
        name: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The addressed range ends beyond the largest device.
    #[error("{name} addresses {size} bytes from sector {sector}, beyond sector {limit}")]
    Range {
        /// The packet.
        name: &'static str,
        /// First sector.
        sector: u64,
        /// Bytes.
        size: u32,
        /// Sectors of the largest device.
        limit: u64,
    },
    /// An algorithm name is not terminated, too long or not printable ASCII.
    #[error("{name} carries a malformed {field} name")]
    Name {
        /// The packet.
        name: &'static str,
        /// The field.
        field: &'static str,
    },
    /// Another packet inside of a bitmap transfer, or one after its end.
    #[error("{name} where the bitmap transfer at block {position} of {bits} does not allow it")]
    BitmapPacket {
        /// The packet.
        name: &'static str,
        /// Position of the transfer.
        position: u64,
        /// Blocks of the device.
        bits: u64,
    },
    /// A plain bitmap packet with another number of words than its position asks for.
    #[error("P_BITMAP of {found} words at block {position} where {expected} were expected")]
    BitmapWords {
        /// Position of the transfer.
        position: u64,
        /// Words expected.
        expected: u64,
        /// Words found.
        found: u64,
    },
    /// A run of a compressed bitmap reaches beyond the device.
    #[error("run of {run} at block {position} reaches beyond block {bits}")]
    BitmapRun {
        /// Position of the run.
        position: u64,
        /// Length of the run.
        run: u64,
        /// Blocks of the device.
        bits: u64,
    },
    /// A compressed bitmap ends inside of a code word.
    #[error("compressed bitmap ends inside of the code word for block {position}")]
    BitmapCode {
        /// Position of the run that the code word describes.
        position: u64,
    },
    /// The bits that a compressed bitmap declares unused are not zero.
    #[error("compressed bitmap with bits set among its {unused} unused ones")]
    BitmapTrailing {
        /// Number of unused bits declared.
        unused: u8,
    },
}
