//! The engine's `io_uring`: typed operations in, typed completions out.
//!
//! Each operation takes a slot. The slot owns what the kernel may still touch (descriptor,
//! received or sent messages, addresses, pages) until the completion arrives, and says whose the
//! completion is. A completion names its slot and the slot's generation, so one that comes for an
//! earlier use of a slot is recognised. Buffers in the [`Arena`] are the exception: they are never
//! freed while the ring lives, and who may use them when is the business of core and frontends.
//!
//! One call of [`Ring::wait`] submits everything that was pushed and waits: one system call for
//! each turn of the engine's loop.
//!
//! Not responsible for: what an operation means, retries, short transfers.
//!
//! Invariants kept: LV-2 (the number of slots is bounded; pushing beyond it is a bug of the
//! caller, who counts).

mod message;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use replication_core::event::{DialId, HostTag, VolumeIx};
use replication_core::meta::Page;
use replication_core::units::{Buf, Errno};

pub use self::message::{Batch, Direct, Receive, STAGING_SIZE};
use crate::arena::{Arena, Layout};
use crate::disk::{DiskJob, MetaJob};
use crate::stream::StreamId;
use crate::ublk::Queue;

/// Entries of the submission queue; more wait in the backlog until the next submission.
const SQ_ENTRIES: u32 = 1024;
/// Entries of the completion queue. The kernel keeps what does not fit.
const CQ_ENTRIES: u32 = 8192;
/// Entries of the backlog for which there is memory from the beginning.
const BACKLOG_ROOM: usize = 1024;
/// Operations in flight: a multiple of all queue depths that a resource can have.
const SLOTS_MAX: usize = 1 << 20;
/// Marks completions that nobody waits for: cancellations and timeouts of connects.
const NOBODY: u64 = u64::MAX;

/// A descriptor that operations in flight keep open.
pub type Fd = Rc<OwnedFd>;

/// Names an operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    fn new(generation: u32, index: usize) -> Self {
        let index = u64::try_from(index).expect("slot numbers are bounded by SLOTS_MAX");
        Self(u64::from(generation) << 32 | index)
    }

    fn index(self) -> usize {
        usize::try_from(self.0 & u64::from(u32::MAX)).expect("masked to 32 bits")
    }

    fn generation(self) -> u32 {
        u32::try_from(self.0 >> 32).expect("shifted to 32 bits")
    }
}

/// Whose an operation is.
#[derive(Debug)]
pub enum Owner {
    /// Work on a data disk.
    Disk(DiskJob),
    /// Work on metadata.
    Meta(MetaJob),
    /// Bytes from a socket.
    Received(StreamId),
    /// Bytes to a socket.
    Sent(StreamId),
    /// The peer's listening socket; counts the listening sockets opened.
    PeerAccept(u32),
    /// The NBD server's listening socket.
    NbdAccept,
    /// An attempt to connect.
    Dial(DialId),
    /// Another thread has news.
    Wake,
    /// The process got a signal.
    Signal,
    /// A command of a ublk queue.
    Ublk {
        /// Whose device.
        volume: VolumeIx,
        /// Request slot.
        tag: HostTag,
    },
}

/// What a slot keeps for the kernel, and gives back.
#[derive(Debug)]
pub enum Keep {
    /// Nothing, or the arena's.
    Nothing,
    /// The receive side of a socket.
    Receive(Box<Receive>),
    /// What is being sent.
    Batch(Box<Batch>),
    /// Pages of metadata.
    Pages(Vec<Page>),
    /// A page of metadata.
    Page(Box<Page>),
    /// The address and the time limit of a connect.
    Target(Box<Target>),
    /// A ublk queue with its descriptors.
    Queue(Rc<Queue>),
}

/// The address and the time limit of a connect.
#[derive(Debug)]
pub struct Target {
    address: SockaddrStorage,
    limit: types::Timespec,
}

/// Memory of a read or write.
#[derive(Debug)]
pub enum Memory {
    /// `len` bytes from byte `offset` behind the start of `buf`.
    Arena {
        /// First page.
        buf: Buf,
        /// Bytes to skip.
        offset: usize,
        /// Bytes.
        len: usize,
    },
    /// Pages, without the first `skip` bytes.
    Pages {
        /// The pages.
        pages: Vec<Page>,
        /// Bytes to skip.
        skip: usize,
    },
    /// A page, without the first `skip` bytes.
    Page {
        /// The page.
        page: Box<Page>,
        /// Bytes to skip.
        skip: usize,
    },
}

/// An operation.
#[derive(Debug)]
pub enum Op {
    /// Read from a file.
    Read {
        /// Where to.
        memory: Memory,
        /// Byte offset in the file.
        offset: u64,
    },
    /// Write to a file.
    Write {
        /// Where from.
        memory: Memory,
        /// Byte offset in the file.
        offset: u64,
        /// Durable when done.
        durable: bool,
    },
    /// Make what was written durable.
    Flush,
    /// Change the allocation of a file or device.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Discard a range of a block device.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Receive from a socket.
    Receive {
        /// The receive side.
        receive: Box<Receive>,
        /// Bulk data to come first.
        direct: Option<Direct>,
    },
    /// Send to a socket.
    Send {
        /// What.
        batch: Box<Batch>,
        /// Do not wait for room in the socket's buffer.
        at_once: bool,
    },
    /// Accept a connection.
    Accept,
    /// Connect a socket.
    Connect {
        /// Where to.
        address: SockaddrStorage,
        /// Give up after this time.
        limit: Duration,
    },
    /// Wait until a descriptor is readable.
    Readable,
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose it was.
    pub owner: Owner,
    /// What it worked on.
    pub keep: Keep,
    /// Result of the system call: a number, or the negative errno.
    pub result: i32,
}

impl Completion {
    /// The result as a number of bytes (or whatever the call returns), or as an error.
    ///
    /// # Errors
    /// The operation failed.
    pub fn outcome(&self) -> Result<usize, Errno> {
        outcome(self.result)
    }
}

fn outcome(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno(result.saturating_neg()))
}

#[derive(Debug)]
struct Taken {
    owner: Owner,
    keep: Keep,
    /// Keeps it open; a queue keeps its own.
    _fd: Option<Fd>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    taken: Option<Taken>,
}

/// The ring, with the arena that its operations work on.
pub struct Ring {
    uring: Option<IoUring>,
    arena: Option<Arena>,
    slots: Vec<Slot>,
    vacant: Vec<u32>,
    /// Entries that wait for room, each with the one that is linked to it.
    backlog: VecDeque<(squeue::Entry, Option<squeue::Entry>)>,
    stale: u64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} in flight, {} stale)", self.in_flight(), self.stale)
    }
}

impl Ring {
    /// Sets up the ring and the arena. The calling thread is the only one that may use it.
    ///
    /// # Errors
    /// The kernel has no `io_uring`, forbids it, or is out of memory.
    pub fn new(layout: Layout) -> Result<Self> {
        let uring = build_uring().context("set up io_uring (is kernel.io_uring_disabled set?)")?;
        let arena = Arena::new(layout)?;
        let room = usize::try_from(CQ_ENTRIES).expect("32 bits fit");
        Ok(Self {
            uring: Some(uring),
            arena: Some(arena),
            slots: Vec::with_capacity(room),
            vacant: Vec::with_capacity(room),
            backlog: VecDeque::with_capacity(BACKLOG_ROOM),
            stale: 0,
        })
    }

    /// The memory that operations work on.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        self.arena.as_ref().expect("the arena goes with the ring")
    }

    /// A list for [`Ring::completions`] that need not grow.
    #[must_use]
    pub fn room_for_completions(&self) -> Vec<Completion> {
        Vec::with_capacity(self.slots.capacity())
    }

    /// Operations that were pushed and have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    /// Starts an operation; it reaches the kernel with the next [`Ring::wait`].
    ///
    /// # Panics
    /// If its memory lies outside of the arena or of its pages.
    pub fn push(&mut self, fd: &Fd, op: Op, owner: Owner) -> Key {
        let raw = types::Fd(fd.as_raw_fd());
        let mut limit = None;
        let (entry, keep) = match op {
            Op::Read { memory, offset } => {
                let (address, len, keep) = self.locate(memory);
                (opcode::Read::new(raw, address, len).offset(offset).build(), keep)
            }
            Op::Write { memory, offset, durable } => {
                let (address, len, keep) = self.locate(memory);
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Write::new(raw, address, len).offset(offset).rw_flags(flags);
                (write.build(), keep)
            }
            Op::Flush => {
                let fsync = opcode::Fsync::new(raw).flags(types::FsyncFlags::DATASYNC);
                (fsync.build(), Keep::Nothing)
            }
            Op::Allocate { mode, offset, len } => {
                let fallocate = opcode::Fallocate::new(raw, len).offset(offset).mode(mode);
                (fallocate.build(), Keep::Nothing)
            }
            Op::Discard { offset, len } => (discard_entry(raw, offset, len), Keep::Nothing),
            Op::Receive { mut receive, direct } => {
                receive.prepare(direct, self.arena());
                let entry = opcode::RecvMsg::new(raw, receive.header()).build();
                (entry, Keep::Receive(receive))
            }
            Op::Send { mut batch, at_once } => {
                let entry = send_entry(raw, batch.header(self.arena()), at_once);
                (entry, Keep::Batch(batch))
            }
            Op::Accept => (accept_entry(raw), Keep::Nothing),
            Op::Connect { address, limit: span } => {
                let target = Box::new(Target { address, limit: types::Timespec::from(span) });
                let (connect, link) = connect_entries(raw, &target);
                limit = Some(link);
                (connect, Keep::Target(target))
            }
            Op::Readable => {
                let flags = u32::from(libc::POLLIN.unsigned_abs());
                (opcode::PollAdd::new(raw, flags).build(), Keep::Nothing)
            }
        };
        self.start(Some(fd), entry, limit, owner, keep)
    }

    /// Starts a command of a ublk queue: parks a tag whose buffer is `buf`, `len` bytes long, and
    /// answers its request if `answer` says how. The queue stays until the command has completed.
    pub fn push_command(
        &mut self,
        queue: &Rc<Queue>,
        tag: u16,
        answer: Option<Result<u32, Errno>>,
        (buf, len): (Buf, usize),
        owner: Owner,
    ) -> Key {
        let buffer = self.arena().address(buf, 0, len);
        let entry = match answer {
            None => queue.fetch(tag, buffer),
            Some(answer) => queue.commit_and_fetch(tag, answer, buffer),
        };
        self.start(None, entry, None, owner, Keep::Queue(Rc::clone(queue)))
    }

    /// Asks the kernel to give an operation up. Its completion comes in any case.
    pub fn cancel(&mut self, key: Key) {
        self.submit_entry(opcode::AsyncCancel::new(key.0).build().user_data(NOBODY));
    }

    /// Submits what was pushed and waits for a completion, at most for `limit`.
    ///
    /// # Errors
    /// The kernel refuses the call, which leaves nothing to work with.
    pub fn wait(&mut self, limit: Option<Duration>) -> Result<()> {
        self.push_backlog();
        let limit = if self.backlog.is_empty() { limit } else { Some(Duration::ZERO) };
        let uring = self.uring.as_ref().expect("the ring is set up");
        let result = match limit {
            Some(limit) => {
                let timespec = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&timespec);
                uring.submitter().submit_with_args(1, &args)
            }
            None => uring.submit_and_wait(1),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error).context("io_uring_enter"),
        }
    }

    /// Collects the operations that ended.
    pub fn completions(&mut self, out: &mut Vec<Completion>) {
        let uring = self.uring.as_mut().expect("the ring is set up");
        let mut queue = uring.completion();
        queue.sync();
        for entry in &mut queue {
            let key = Key(entry.user_data());
            if key.0 == NOBODY {
                continue;
            }
            assert!(!cqueue::more(entry.flags()), "only single completions are asked for");
            let slot = self.slots.get_mut(key.index());
            let slot = slot.filter(|slot| slot.generation == key.generation());
            match slot.and_then(|slot| slot.taken.take()) {
                Some(Taken { owner, keep, _fd: _ }) => {
                    self.vacant.push(u32::try_from(key.index()).expect("bounded by SLOTS_MAX"));
                    out.push(Completion { owner, keep, result: entry.result() });
                }
                None => self.stale += 1,
            }
        }
    }

    fn start(
        &mut self,
        fd: Option<&Fd>,
        entry: squeue::Entry,
        limit: Option<squeue::Entry>,
        owner: Owner,
        keep: Keep,
    ) -> Key {
        let taken = Taken { owner, keep, _fd: fd.map(Rc::clone) };
        let index = match self.vacant.pop() {
            Some(index) => usize::try_from(index).expect("slot numbers have 32 bits"),
            None => {
                assert!(self.slots.len() < SLOTS_MAX, "more operations in flight than can be");
                self.slots.push(Slot { generation: 0, taken: None });
                // Room for a later release, so that releasing never allocates.
                self.vacant.reserve(self.slots.len());
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[index];
        assert!(slot.taken.is_none(), "a vacant slot holds nothing");
        slot.generation = slot.generation.wrapping_add(1) & (u32::MAX >> 1);
        slot.taken = Some(taken);
        let key = Key::new(slot.generation, index);
        match limit {
            None => self.submit_entry(entry.user_data(key.0)),
            Some(limit) => self.submit_pair(entry.user_data(key.0), limit.user_data(NOBODY)),
        }
        key
    }

    fn submit_entry(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || !self.has_room(1) {
            self.backlog.push_back((entry, None));
            return;
        }
        self.queue_entries(&[entry]);
    }

    /// Linked entries have to be submitted by one call.
    fn submit_pair(&mut self, first: squeue::Entry, second: squeue::Entry) {
        if !self.backlog.is_empty() || !self.has_room(2) {
            self.backlog.push_back((first, Some(second)));
            return;
        }
        self.queue_entries(&[first, second]);
    }

    fn push_backlog(&mut self) {
        while !self.backlog.is_empty() && self.has_room(2) {
            match self.backlog.pop_front().expect("it is not empty") {
                (entry, None) => self.queue_entries(&[entry]),
                (first, Some(second)) => self.queue_entries(&[first, second]),
            }
        }
    }

    /// Whether `entries` entries fit, after making room if need be. The backlog takes what does
    /// not: the kernel may refuse submissions for a while when completions pile up.
    fn has_room(&mut self, entries: usize) -> bool {
        let uring = self.uring.as_mut().expect("the ring is set up");
        let queue = uring.submission();
        if queue.capacity() - queue.len() >= entries {
            return true;
        }
        drop(queue);
        if let Err(error) = uring.submit() {
            assert!(is_passing(&error), "io_uring_enter refuses submissions: {error}");
        }
        let queue = uring.submission();
        queue.capacity() - queue.len() >= entries
    }

    fn queue_entries(&mut self, entries: &[squeue::Entry]) {
        let uring = self.uring.as_mut().expect("the ring is set up");
        let mut queue = uring.submission();
        // SAFETY: each entry was built by `push`, `push_command` or `cancel`. What it points to is
        // in the arena, which lives as long as the ring, or in boxes and vectors of the slot's
        // `Keep`, which are given out only after the completion. The slot also holds the
        // descriptor. `drop` leaks all of it when operations are in flight.
        let pushed = unsafe { queue.push_multiple(entries) };
        assert!(pushed.is_ok(), "room in the submission queue was made before");
    }

    fn locate(&self, memory: Memory) -> (*mut u8, u32, Keep) {
        let (address, len, keep) = match memory {
            Memory::Arena { buf, offset, len } => {
                (self.arena().address(buf, offset, len), len, Keep::Nothing)
            }
            Memory::Pages { mut pages, skip } => {
                let bytes = size_of_val(pages.as_slice());
                assert!(skip < bytes, "an operation on pages has at least one byte");
                let base = pages.as_mut_ptr().cast::<u8>();
                (base.wrapping_add(skip), bytes - skip, Keep::Pages(pages))
            }
            Memory::Page { mut page, skip } => {
                let bytes = page.0.len();
                assert!(skip < bytes, "an operation on a page has at least one byte");
                let base = page.0.as_mut_ptr();
                (base.wrapping_add(skip), bytes - skip, Keep::Page(page))
            }
        };
        (address, u32::try_from(len).expect("an operation has less than 4 GiB"), keep)
    }
}

impl Drop for Ring {
    /// Closing the ring only starts to cancel what is in flight. The memory of such operations is
    /// given up for good, so that the kernel cannot write into memory that is used again.
    fn drop(&mut self) {
        self.uring = None;
        if self.in_flight() > 0 {
            std::mem::forget(self.arena.take());
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

fn build_uring() -> std::io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_cqsize(CQ_ENTRIES).setup_single_issuer().setup_defer_taskrun();
    builder.build(SQ_ENTRIES).or_else(|_| {
        // Before Linux 6.1.
        IoUring::builder().dontfork().setup_cqsize(CQ_ENTRIES).build(SQ_ENTRIES)
    })
}

/// Errors of `io_uring_enter` after which the next call will do.
fn is_passing(error: &std::io::Error) -> bool {
    let passing = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
    error.raw_os_error().is_some_and(|errno| passing.contains(&errno))
}

fn send_entry(fd: types::Fd, header: *const libc::msghdr, at_once: bool) -> squeue::Entry {
    let wait = if at_once { libc::MSG_DONTWAIT } else { libc::MSG_WAITALL };
    let flags = (libc::MSG_NOSIGNAL | wait).unsigned_abs();
    opcode::SendMsg::new(fd, header).flags(flags).build()
}

fn accept_entry(fd: types::Fd) -> squeue::Entry {
    // Sockets stay in blocking mode: the ring does not wait on descriptors that are non-blocking.
    let accept = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut());
    accept.flags(libc::SOCK_CLOEXEC).build()
}

fn connect_entries(fd: types::Fd, target: &Target) -> (squeue::Entry, squeue::Entry) {
    let connect = opcode::Connect::new(fd, target.address.as_ptr(), target.address.len()).build();
    let limit = opcode::LinkTimeout::new(&raw const target.limit).build();
    (connect.flags(squeue::Flags::IO_LINK), limit)
}

/// `BLOCK_URING_CMD_DISCARD` of Linux 6.12: the range lies in `addr` and in the first eight bytes
/// of the command.
fn discard_entry(fd: types::Fd, offset: u64, len: u64) -> squeue::Entry {
    const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;
    let mut command = [0; 16];
    command[..8].copy_from_slice(&len.to_ne_bytes());
    opcode::UringCmd16::new(fd, BLOCK_URING_CMD_DISCARD).addr(Some(offset)).cmd(command).build()
}

/// Whether the next accept may work although this one has failed: the connection was gone again.
/// Without descriptors or memory it would fail at once, again and again.
#[must_use]
pub fn is_single_failure(errno: Errno) -> bool {
    matches!(errno.0, libc::ECONNABORTED | libc::EINTR)
}

/// The raw descriptor of an accepted connection.
///
/// # Errors
/// Accepting failed.
pub fn accepted(completion: Completion) -> Result<OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    assert!(
        matches!(completion.owner, Owner::PeerAccept(_) | Owner::NbdAccept),
        "only the result of an accept is a descriptor"
    );
    let fd: RawFd = outcome(completion.result).map(|_| completion.result)?;
    // SAFETY: the kernel returned this descriptor as the result of an accept operation, as the
    // owner shows; nobody else has taken it, because a completion is handed out once and is used
    // up here.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests;
