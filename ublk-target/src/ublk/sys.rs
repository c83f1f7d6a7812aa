//! Numbers and layouts of the kernel interface. Nothing is decided here.
//!
//! All integers are in the byte order of the machine. Command numbers have the form of an ioctl
//! number: direction in bits 30 and 31, payload size from bit 16, the letter `u` from bit 8 and
//! the command in the lowest byte.

use std::fmt;
use std::ops::BitOr;

/// Most tags of a queue.
pub const MAX_QUEUE_DEPTH: u16 = 4096;
/// Most bytes of one request: the interface has 25 bits for them.
pub const MAX_IO_BYTES: u32 = 1 << 25;
/// The path of the control device.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// `dev_id` of a new device whose number the kernel shall choose.
pub(super) const ANY_DEVICE: u32 = u32::MAX;
/// `queue_id` of commands that are for a device.
pub(super) const NO_QUEUE: u16 = u16::MAX;

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

pub(super) const GET_DEV_INFO: u32 = ctrl(READ, 0x02);
pub(super) const ADD_DEV: u32 = ctrl(READ_WRITE, 0x04);
pub(super) const DEL_DEV: u32 = ctrl(READ_WRITE, 0x05);
pub(super) const START_DEV: u32 = ctrl(READ_WRITE, 0x06);
pub(super) const STOP_DEV: u32 = ctrl(READ_WRITE, 0x07);
pub(super) const SET_PARAMS: u32 = ctrl(READ_WRITE, 0x08);
pub(super) const GET_PARAMS: u32 = ctrl(READ, 0x09);
pub(super) const START_USER_RECOVERY: u32 = ctrl(READ_WRITE, 0x10);
pub(super) const END_USER_RECOVERY: u32 = ctrl(READ_WRITE, 0x11);
pub(super) const GET_FEATURES: u32 = ctrl(READ, 0x13);
pub(super) const UPDATE_SIZE: u32 = ctrl(READ_WRITE, 0x15);

pub(super) const FETCH_REQ: u32 = io(0x20);
pub(super) const COMMIT_AND_FETCH_REQ: u32 = io(0x21);

/// Result of a parked command: a request has come.
pub(super) const RES_OK: i32 = 0;
/// Result of a parked command: the device stops, the tag is not to be fetched again.
pub(super) const RES_ABORT: i32 = -libc::ENODEV;

/// Queue 0's descriptors: offset of the mapping on the character device.
pub(super) const DESCRIPTOR_OFFSET: libc::off_t = 0;

pub(super) const OP_READ: u8 = 0;
pub(super) const OP_WRITE: u8 = 1;
pub(super) const OP_FLUSH: u8 = 2;
pub(super) const OP_DISCARD: u8 = 3;
pub(super) const OP_WRITE_ZEROES: u8 = 5;

/// Bit of `op_flags`: the request is durable when completed.
pub(super) const IO_FUA: u32 = 1 << 13;
/// Bit of `op_flags`: zeroes are to be written, not deallocated.
pub(super) const IO_NOUNMAP: u32 = 1 << 15;

pub(super) const ATTR_ROTATIONAL: u32 = 1 << 1;
pub(super) const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub(super) const ATTR_FUA: u32 = 1 << 3;

pub(super) const PARAM_BASIC: u32 = 1 << 0;
pub(super) const PARAM_DISCARD: u32 = 1 << 1;

pub(super) const STATE_DEAD: u16 = 0;
pub(super) const STATE_LIVE: u16 = 1;
pub(super) const STATE_QUIESCED: u16 = 2;
pub(super) const STATE_FAIL_IO: u16 = 3;

/// The process attribute of [`super::become_io_flusher`] (Linux 5.6).
pub(super) const PR_SET_IO_FLUSHER: libc::c_int = 57;

const fn ctrl(direction: u32, nr: u32) -> u32 {
    direction << 30 | CTRL_CMD_LEN << 16 | LETTER << 8 | nr
}

const fn io(nr: u32) -> u32 {
    READ_WRITE << 30 | IO_CMD_LEN << 16 | LETTER << 8 | nr
}

const LETTER: u32 = 0x75;
const CTRL_CMD_LEN: u32 = 32;
const IO_CMD_LEN: u32 = 16;

// These have another layout of ioctl numbers, which nobody has tried here.
#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc",
    target_arch = "sparc64"
))]
compile_error!("the ublk command numbers are not known for this architecture");

/// Abilities of the driver, and of a device: one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u64);

impl Flags {
    /// None.
    pub const NONE: Self = Self(0);
    /// The block device outlives its process.
    pub const USER_RECOVERY: Self = Self(1 << 3);
    /// Requests that the dead process had are given to the next one.
    pub const USER_RECOVERY_REISSUE: Self = Self(1 << 4);
    /// Command numbers in the form used here.
    pub const CMD_IOCTL_ENCODE: Self = Self(1 << 6);
    /// The size can be changed while the device is in use (Linux 6.16).
    pub const UPDATE_SIZE: Self = Self(1 << 10);
    /// Each tag may be served by a thread of its own (Linux 6.16).
    pub const PER_IO_DAEMON: Self = Self(1 << 13);
    /// The kernel does not look for partitions when the device starts (Linux 7.0).
    pub const NO_AUTO_PART_SCAN: Self = Self(1 << 18);
    /// What every device of ours needs: it survives its process without an I/O error.
    pub const RECOVERY: Self = Self(Self::USER_RECOVERY.0 | Self::USER_RECOVERY_REISSUE.0);

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those of `self` that `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Body of a command to the control device.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | device |
/// | 4 | 2 | queue |
/// | 6 | 2 | length of the payload |
/// | 8 | 8 | address of the payload |
/// | 16 | 8 | number carried in place: size, process |
/// | 24 | 8 | for devices of other users, zero here |
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CtrlCmd {
    pub(super) dev_id: u32,
    pub(super) len: u16,
    pub(super) addr: u64,
    pub(super) data: u64,
}

impl CtrlCmd {
    /// The command as it stands in the last 80 bytes of a large submission entry.
    pub(super) fn to_bytes(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&NO_QUEUE.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes
    }
}

/// Body of a command to a device's queue 0.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 2 | queue |
/// | 2 | 2 | tag |
/// | 4 | 4 | result of the request that the tag had: bytes, or a negative errno |
/// | 8 | 8 | address of the buffer for the next request of the tag |
#[derive(Clone, Copy, Debug)]
pub(super) struct IoCmd {
    pub(super) tag: u16,
    pub(super) result: i32,
    pub(super) addr: u64,
}

impl IoCmd {
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

/// A request, as the kernel describes it in the mapped array.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | operation in the lowest byte, flags above |
/// | 4 | 4 | length in sectors |
/// | 8 | 8 | first sector |
/// | 16 | 8 | address of the buffer (we know it already) |
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RawIoDesc {
    pub(super) op_flags: u32,
    pub(super) sectors: u32,
    pub(super) start: u64,
    pub(super) addr: u64,
}

const _: () = assert!(size_of::<RawIoDesc>() == 24);

/// Payload of `ADD_DEV` and `GET_DEV_INFO`.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 2 | queues |
/// | 2 | 2 | tags of a queue |
/// | 4 | 2 | state |
/// | 6 | 2 | - |
/// | 8 | 4 | most bytes of a request |
/// | 12 | 4 | device |
/// | 16 | 4 | serving process |
/// | 20 | 4 | - |
/// | 24 | 8 | flags |
/// | 32 | 8 | free for the process |
/// | 40 | 8 | owner: user, group |
/// | 48 | 16 | - |
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RawDevInfo {
    pub(super) queues: u16,
    pub(super) queue_depth: u16,
    pub(super) state: u16,
    pub(super) pad0: u16,
    pub(super) max_io_bytes: u32,
    pub(super) dev_id: u32,
    pub(super) pid: i32,
    pub(super) pad1: u32,
    pub(super) flags: u64,
    pub(super) private: u64,
    pub(super) owner: [u32; 2],
    pub(super) reserved: [u64; 2],
}

const _: () = assert!(size_of::<RawDevInfo>() == 64);
const _: () = assert!(std::mem::offset_of!(RawDevInfo, flags) == 24);

/// Payload of `SET_PARAMS` and `GET_PARAMS`.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | length of the structure |
/// | 4 | 4 | which of the parts count |
/// | 8 | 4 | attributes |
/// | 12 | 4 | log2 of: logical block, physical block, optimal I/O, smallest good I/O |
/// | 16 | 4 | most sectors of a request |
/// | 20 | 4 | sectors that no request may cross a multiple of; 0 = none |
/// | 24 | 8 | size in sectors |
/// | 32 | 8 | mask of addresses that no segment may cross; 0 = none |
/// | 40 | 4 | discard: alignment |
/// | 44 | 4 | discard: granularity in bytes |
/// | 48 | 4 | discard: most sectors |
/// | 52 | 4 | write-zeroes: most sectors |
/// | 56 | 2 | discard: most ranges |
/// | 58 | 2 | - |
/// | 60 | 16 | device numbers, filled in by the kernel |
/// | 76 | 60 | zones, alignment of memory, segments: not used |
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RawParams {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) attrs: u32,
    pub(super) logical_shift: u8,
    pub(super) physical_shift: u8,
    pub(super) optimal_shift: u8,
    pub(super) minimal_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) chunk_sectors: u32,
    pub(super) dev_sectors: u64,
    pub(super) virt_boundary: u64,
    pub(super) discard_alignment: u32,
    pub(super) discard_granularity: u32,
    pub(super) discard_max_sectors: u32,
    pub(super) zeroes_max_sectors: u32,
    pub(super) discard_segments: u16,
    pub(super) pad: u16,
    pub(super) device_numbers: [u32; 4],
    pub(super) others: [u32; 15],
}

/// Length of [`RawParams`], which stands in the structure itself.
pub(super) const PARAMS_LEN: u32 = 136;
const _: () = assert!(size_of::<RawParams>() == 136);
const _: () = assert!(std::mem::offset_of!(RawParams, dev_sectors) == 24);
const _: () = assert!(std::mem::offset_of!(RawParams, device_numbers) == 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_numbers_have_the_form_of_the_interface() {
        let table = [
            (GET_DEV_INFO, 0x8020_7502),
            (ADD_DEV, 0xc020_7504),
            (DEL_DEV, 0xc020_7505),
            (START_DEV, 0xc020_7506),
            (STOP_DEV, 0xc020_7507),
            (SET_PARAMS, 0xc020_7508),
            (GET_PARAMS, 0x8020_7509),
            (START_USER_RECOVERY, 0xc020_7510),
            (END_USER_RECOVERY, 0xc020_7511),
            (GET_FEATURES, 0x8020_7513),
            (UPDATE_SIZE, 0xc020_7515),
            (FETCH_REQ, 0xc010_7520),
            (COMMIT_AND_FETCH_REQ, 0xc010_7521),
        ];
        for (number, expected) in table {
            assert_eq!(number, expected, "{number:#x} should be {expected:#x}");
        }
    }

    #[test]
    fn command_bodies_have_their_fields_in_place() {
        let command = CtrlCmd { dev_id: 7, len: 64, addr: 0x1122_3344_5566_7788, data: 9 };
        let bytes = command.to_bytes();
        assert_eq!(bytes[0..4], 7_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], [0xff, 0xff]);
        assert_eq!(bytes[6..8], 64_u16.to_ne_bytes());
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788_u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 9_u64.to_ne_bytes());
        assert!(bytes[24..].iter().all(|&byte| byte == 0));

        let bytes = IoCmd { tag: 4095, result: -5, addr: 1 << 40 }.to_bytes();
        assert_eq!(bytes[0..2], [0, 0]);
        assert_eq!(bytes[2..4], 4095_u16.to_ne_bytes());
        assert_eq!(bytes[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(bytes[8..16], (1_u64 << 40).to_ne_bytes());
    }

    #[test]
    fn flags_are_sets() {
        let both = Flags::RECOVERY | Flags::UPDATE_SIZE;
        assert!(both.contains(Flags::RECOVERY));
        assert!(!Flags::USER_RECOVERY.contains(Flags::RECOVERY));
        assert_eq!(both.without(Flags(0x1fe)), Flags::UPDATE_SIZE);
        assert_eq!(both.and(Flags(0x1fe)), Flags::RECOVERY);
        assert_eq!(Flags::RECOVERY.to_string(), "0x18");
    }
}
