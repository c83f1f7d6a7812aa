//! The queue of one device, served through a ring that belongs to somebody else.
//!
//! The driver keeps one command parked per tag. When a request comes, the command completes: the
//! request stands in the mapped descriptor array, and the bytes of a write are already in the
//! buffer that the parked command had named. The answer to the request is the next parked
//! command of the tag.
//!
//! All commands of a queue are submitted by one thread, the one that fetched first (the kernel
//! refuses others). The commands made here are plain entries; pushing them is where the caller
//! vouches for the buffer.

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr::NonNull;

use io_uring::{opcode, squeue, types};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use replication_core::event::HostOp;
use replication_core::units::{Errno, Sector, SectorRange};

use super::control::{DeviceInfo, DeviceState};
use super::driver::kernel_release;
use super::error::{Act, Site, UblkError};
use super::sys::{self, IoCmd, RawIoDesc};
use super::{DeviceId, MAX_QUEUE_DEPTH};

/// A request of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoDesc {
    /// What to do.
    pub op: HostOp,
    /// Where; empty for a flush.
    pub range: SectorRange,
    /// The request must be durable when answered. Equal to the operation's own mark for writes;
    /// for the others a flush must come between doing and answering.
    pub fua: bool,
}

/// A request that is not served; answer it with the error number given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Zone operations and whatever later kernels invent. Nothing that we announce invites them.
    #[error("operation {op} is not served")]
    Operation {
        /// Its number.
        op: u8,
    },
    /// A range that ends beyond the 64-bit range of sectors.
    #[error("{sectors} sectors from {start} are no range")]
    Range {
        /// The first sector.
        start: u64,
        /// The number of sectors.
        sectors: u32,
    },
}

impl Refused {
    /// The answer that the request gets.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::Operation { .. } => Errno::EOPNOTSUPP,
            Self::Range { .. } => Errno::EINVAL,
        }
    }
}

/// Why a parked command has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Wakeup {
    /// A request has come: read the tag's descriptor, do it, answer it.
    Request,
    /// The device stops, or gives up this process: the tag is not fetched again. When all tags
    /// have come here, the queue can be dropped.
    Stopping,
    /// The kernel took the command for wrong (not the thread that fetched first, a tag fetched
    /// twice, an answer to no request): a fault of ours. The tag is not parked.
    Failed {
        /// The completion's result.
        result: i32,
    },
}

impl Wakeup {
    /// The meaning of a completion's result.
    pub fn from_result(result: i32) -> Self {
        match result {
            sys::RES_OK => Self::Request,
            sys::RES_ABORT => Self::Stopping,
            _ => Self::Failed { result },
        }
    }
}

/// The only queue of a device.
#[derive(Debug)]
pub struct Queue {
    id: DeviceId,
    depth: u16,
    file: File,
    descriptors: Descriptors,
}

impl Queue {
    /// Opens the character device of a device that was added, or that is being recovered, and
    /// maps its descriptors.
    ///
    /// # Errors
    /// [`UblkError::Busy`] if another process has it open; [`UblkError::HalfRecovered`].
    pub fn open(info: &DeviceInfo) -> Result<Self, UblkError> {
        let path = info.id.char_path();
        let kernel = kernel_release();
        let site = |act| Site { act, device: Some(info.id), kernel: &kernel };
        if info.queues != 1 {
            let value = u64::from(info.queues);
            return Err(UblkError::BadParam { what: "number of queues", value, rule: "1" });
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            site(Act::Open).error(path.clone(), errno)
        })?;
        let descriptors = match Descriptors::map(&file, info.queue_depth) {
            Ok(descriptors) => descriptors,
            Err(nix::Error::EINVAL) if info.state == DeviceState::Quiesced => {
                return Err(UblkError::HalfRecovered { device: info.id, kernel });
            }
            Err(errno) => return Err(site(Act::Map).error(path, errno as i32)),
        };
        Ok(Self { id: info.id, depth: info.queue_depth, file, descriptors })
    }

    /// The device.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// The number of tags.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// The character device.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Parks a tag for the first time. Its `user_data` is to be set before it is pushed.
    ///
    /// Whoever pushes the entry vouches that `buffer` is valid for reads and writes of the
    /// device's largest request and used by nobody else until the completion, and that the queue
    /// is not dropped before.
    ///
    /// # Panics
    /// If the queue has no such tag, or `buffer` is null.
    #[must_use]
    pub fn fetch(&self, tag: u16, buffer: *mut u8) -> squeue::Entry {
        self.command(sys::FETCH_REQ, tag, 0, buffer)
    }

    /// Answers a tag's request and parks the tag again; `buffer` is as for [`Queue::fetch`] and
    /// may be the same as before.
    ///
    /// `answer` is the number of bytes read or written: all of them, as a short answer makes the
    /// block layer ask for the rest again. For other operations the number is not looked at. The
    /// answer to a read must name the buffer that holds the bytes, the same one that the parked
    /// command had named; which of the two the kernel looks at is not promised.
    ///
    /// # Panics
    /// If the queue has no such tag, `buffer` is null, more bytes are answered than a request can
    /// have, or the error number is not positive.
    #[must_use]
    pub fn commit_and_fetch(
        &self,
        tag: u16,
        answer: Result<u32, Errno>,
        buffer: *mut u8,
    ) -> squeue::Entry {
        self.command(sys::COMMIT_AND_FETCH_REQ, tag, encode_answer(answer), buffer)
    }

    /// The request of a tag whose command has just completed with [`Wakeup::Request`]. At other
    /// times the answer is some older request.
    ///
    /// # Errors
    /// The reason why the request is not served; it must be answered nevertheless.
    ///
    /// # Panics
    /// If the queue has no such tag.
    pub fn descriptor(&self, tag: u16) -> Result<IoDesc, Refused> {
        decode(self.descriptors.read(tag))
    }

    fn command(&self, op: u32, tag: u16, result: i32, buffer: *mut u8) -> squeue::Entry {
        assert!(tag < self.depth, "tag {tag} of a queue with {} tags", self.depth);
        assert!(!buffer.is_null(), "the kernel refuses a command without a buffer");
        let addr = u64::try_from(buffer.expose_provenance()).expect("64 bits hold an address");
        let body = IoCmd { tag, result, addr };
        opcode::UringCmd16::new(types::Fd(self.fd()), op).cmd(body.to_bytes()).build()
    }
}

/// The array of descriptors, shared with the kernel, which writes it.
#[derive(Debug)]
struct Descriptors {
    first: NonNull<RawIoDesc>,
    count: u16,
    bytes: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is read only, and unmapped once,
// by the owner.
unsafe impl Send for Descriptors {}

impl Descriptors {
    fn map(file: &File, count: u16) -> Result<Self, nix::Error> {
        if count == 0 || count > MAX_QUEUE_DEPTH {
            return Err(nix::Error::EINVAL);
        }
        // The driver wants exactly this length: whole pages.
        let bytes = (usize::from(count) * size_of::<RawIoDesc>()).next_multiple_of(page_size());
        let bytes = NonZeroUsize::new(bytes).ok_or(nix::Error::EINVAL)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        let (fd, offset) = (file.as_fd(), sys::DESCRIPTOR_OFFSET);
        // SAFETY: a new mapping at an address of the kernel's choice; it replaces nothing.
        let base = unsafe { mmap(None, bytes, ProtFlags::PROT_READ, flags, fd, offset)? };
        Ok(Self { first: base.cast(), count, bytes })
    }

    fn read(&self, tag: u16) -> RawIoDesc {
        assert!(tag < self.count, "tag {tag} of a queue with {} tags", self.count);
        // SAFETY: the mapping holds `count` descriptors, the tag is below, and the mapping stays
        // until drop. It starts on a page, so the descriptor is aligned.
        let place = unsafe { self.first.add(usize::from(tag)) };
        // SAFETY: `place` lies inside of the mapping. The kernel writes a descriptor before it
        // completes the tag's command, and reaping the completion was an acquire. The read is
        // volatile as the kernel may write it again after a later command; every bit pattern is
        // a value.
        unsafe { place.read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this address and length, nobody else unmaps
        // it, and no reference into it is ever handed out.
        let result = unsafe { munmap(self.first.cast(), self.bytes.get()) };
        assert!(result.is_ok(), "unmapping our own mapping failed: {result:?}");
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf takes no pointers and has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every system knows its page size")
}

fn encode_answer(answer: Result<u32, Errno>) -> i32 {
    match answer {
        Ok(bytes) => i32::try_from(bytes).expect("a request has less than 2 GiB"),
        Err(Errno(errno)) => {
            assert!(errno > 0, "{errno} is no error number");
            -errno
        }
    }
}

fn decode(raw: RawIoDesc) -> Result<IoDesc, Refused> {
    let [op, ..] = (raw.op_flags & 0xff).to_le_bytes();
    let fua = raw.op_flags & sys::IO_FUA != 0;
    let host_op = match op {
        sys::OP_READ => HostOp::Read,
        sys::OP_WRITE => HostOp::Write { fua },
        sys::OP_FLUSH => {
            // Only in this operation the range has no meaning.
            let range = SectorRange { start: 0, end: 0 };
            return Ok(IoDesc { op: HostOp::Flush, range, fua });
        }
        sys::OP_DISCARD => HostOp::Discard,
        sys::OP_WRITE_ZEROES => HostOp::WriteZeroes { unmap: raw.op_flags & sys::IO_NOUNMAP == 0 },
        op => return Err(Refused::Operation { op }),
    };
    let start = Sector(raw.start).0;
    let Some(end) = start.checked_add(u64::from(raw.sectors)) else {
        return Err(Refused::Range { start, sectors: raw.sectors });
    };
    Ok(IoDesc { op: host_op, range: SectorRange { start, end }, fua })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(op_flags: u32, start: u64, sectors: u32) -> RawIoDesc {
        RawIoDesc { op_flags, sectors, start, addr: 0 }
    }

    #[test]
    fn every_operation_is_decoded_or_refused() {
        const FUA: u32 = 1 << 13;
        const NOUNMAP: u32 = 1 << 15;
        // Marks that say nothing to us: fail fast (three kinds), metadata, swap.
        const OTHER: u32 = 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 16;
        let table = [
            (0, HostOp::Read, false),
            (OTHER, HostOp::Read, false),
            (1, HostOp::Write { fua: false }, false),
            (1 | FUA, HostOp::Write { fua: true }, true),
            (1 | FUA | OTHER, HostOp::Write { fua: true }, true),
            (3, HostOp::Discard, false),
            (5, HostOp::WriteZeroes { unmap: true }, false),
            (5 | NOUNMAP, HostOp::WriteZeroes { unmap: false }, false),
            (5 | NOUNMAP | FUA, HostOp::WriteZeroes { unmap: false }, true),
        ];
        for (op_flags, op, fua) in table {
            let range = SectorRange { start: 8, end: 24 };
            assert_eq!(
                decode(raw(op_flags, 8, 16)),
                Ok(IoDesc { op, range, fua }),
                "{op_flags:#x}"
            );
        }
        for op in (0..=u8::MAX).filter(|op| ![0, 1, 2, 3, 5].contains(op)) {
            let refused = decode(raw(u32::from(op), 0, 8)).unwrap_err();
            assert_eq!(refused, Refused::Operation { op });
            assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
        }
    }

    #[test]
    fn a_flush_has_no_range() {
        let range = SectorRange { start: 0, end: 0 };
        let expected = IoDesc { op: HostOp::Flush, range, fua: false };
        assert_eq!(decode(raw(2, u64::MAX, u32::MAX)), Ok(expected));
    }

    #[test]
    fn a_range_beyond_all_sectors_is_refused() {
        let refused = decode(raw(1, u64::MAX, 1)).unwrap_err();
        assert_eq!(refused, Refused::Range { start: u64::MAX, sectors: 1 });
        assert_eq!(refused.errno(), Errno::EINVAL);
        let last = decode(raw(0, u64::MAX - 1, 1)).unwrap();
        assert_eq!(last.range, SectorRange { start: u64::MAX - 1, end: u64::MAX });
    }

    #[test]
    fn results_of_parked_commands_are_told_apart() {
        assert_eq!(Wakeup::from_result(0), Wakeup::Request);
        assert_eq!(Wakeup::from_result(-19), Wakeup::Stopping);
        for result in [1, -16, -22, -125, i32::MIN, i32::MAX] {
            assert_eq!(Wakeup::from_result(result), Wakeup::Failed { result });
        }
    }

    #[test]
    fn answers_are_bytes_or_negative_error_numbers() {
        assert_eq!(encode_answer(Ok(0)), 0);
        assert_eq!(encode_answer(Ok(32 << 20)), 32 << 20);
        assert_eq!(encode_answer(Err(Errno::EIO)), -5);
        assert_eq!(encode_answer(Err(Errno::EOPNOTSUPP)), -95);
    }

    #[test]
    #[should_panic(expected = "-5 is no error number")]
    fn a_negative_error_number_is_a_fault_of_ours() {
        let _: i32 = encode_answer(Err(Errno(-5)));
    }

    /// A queue over a file that looks like a character device with these descriptors.
    fn queue(depth: u16, descriptors: &[RawIoDesc]) -> Queue {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        for raw in descriptors {
            file.write_all(&raw.op_flags.to_ne_bytes()).unwrap();
            file.write_all(&raw.sectors.to_ne_bytes()).unwrap();
            file.write_all(&raw.start.to_ne_bytes()).unwrap();
            file.write_all(&raw.addr.to_ne_bytes()).unwrap();
        }
        file.set_len(u64::from(MAX_QUEUE_DEPTH) * 24 + 65536).unwrap();
        let descriptors = Descriptors::map(&file, depth).unwrap();
        Queue { id: DeviceId(5), depth, file, descriptors }
    }

    #[test]
    fn descriptors_are_read_at_their_place() {
        let queue = queue(171, &[raw(0, 8, 8), raw(1 | 1 << 13, 4096, 1), raw(2, 0, 0)]);
        assert_eq!(queue.descriptor(0).unwrap().op, HostOp::Read);
        let second = queue.descriptor(1).unwrap();
        assert_eq!(second.op, HostOp::Write { fua: true });
        assert_eq!(second.range, SectorRange { start: 4096, end: 4097 });
        assert_eq!(queue.descriptor(2).unwrap().op, HostOp::Flush);
        assert!(queue.descriptor(170).unwrap().range.is_empty());
        assert_eq!(queue.depth(), 171);
    }

    #[test]
    fn entries_name_the_tag_and_the_buffer() {
        let queue = queue(4, &[]);
        let mut buffer = [0_u8; 8];
        let address = buffer.as_mut_ptr();
        let fetch = format!("{:?}", queue.fetch(3, address).user_data(77));
        assert!(fetch.contains("user_data: 77"), "{fetch}");
        let commit = queue.commit_and_fetch(3, Ok(8), address);
        assert_eq!(commit.get_user_data(), 0);
    }

    #[test]
    #[should_panic(expected = "tag 4 of a queue with 4 tags")]
    fn a_tag_beyond_the_queue_is_a_fault_of_ours() {
        let queue = queue(4, &[]);
        let _: Result<IoDesc, Refused> = queue.descriptor(4);
    }

    #[test]
    fn a_queue_cannot_be_mapped_from_nowhere() {
        let file = tempfile::tempfile().unwrap();
        for count in [0, MAX_QUEUE_DEPTH + 1] {
            let error = Descriptors::map(&file, count).unwrap_err();
            assert_eq!(error, nix::Error::EINVAL);
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let info = DeviceInfo {
            id: DeviceId(999_999),
            queues: 1,
            queue_depth: 4,
            max_io_bytes: 4096,
            state: DeviceState::Dead,
            pid: -1,
            flags: super::super::Flags::RECOVERY,
        };
        let error = Queue::open(&info).unwrap_err();
        assert!(matches!(error, UblkError::NoDevice { act: Act::Open, .. }), "{error:?}");
        let error = Queue::open(&DeviceInfo { queues: 2, ..info }).unwrap_err();
        assert!(matches!(error, UblkError::BadParam { .. }), "{error:?}");
    }
}
