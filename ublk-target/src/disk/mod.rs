//! Backing devices: operations of the core on data and metadata, carried out through the ring.
//!
//! Responsible for: whole transfers (a short one goes on where it stopped, one that stops dead is
//! EIO), the ways in which discards and zeroes are done on what the device can do, and the order
//! "flush, then write" of durable metadata. Not responsible for: what an error leads to, and which
//! operations may be under way together.
//!
//! A flush or a metadata write that failed is reported, never tried again.
//!
//! | operation | first | if not supported | then |
//! |---|---|---|---|
//! | discard | punch a hole | discard command (block devices) | EOPNOTSUPP |
//! | zeroes, unmap | punch a hole | zero range | write zeroes |
//! | zeroes | zero range | write zeroes | |
//!
//! Punching a hole comes before the discard command because it leaves zeroes, so that replicas on
//! different devices stay equal (ORD-8).
//!
//! Invariants kept: DUR-1 and DUR-2 (a flush is fdatasync, FUA a synchronous write), DUR-4, ORD-8.

mod known;
mod open;
mod way;

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use replication_core::action::DiskOp;
use replication_core::event::{DiskInfo, Event, OpId, VolumeIx};
use replication_core::meta::Page;
use replication_core::units::{Buf, Errno, Sector, SectorRange};

pub use self::known::{remember_expected, remember_seen};
pub use self::open::{Opened, open, probe};
use self::way::{Abilities, Outcome, Way, judge};
use crate::arena::{PAGE_SIZE, ZERO_PAGES};
use crate::engine::Shared;
use crate::ring::{Fd, Keep, Memory, Op, Owner};

/// `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// `FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`.
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// An operation on a data disk that is under way.
#[derive(Clone, Copy, Debug)]
pub struct DiskJob {
    id: OpId,
    volume: VolumeIx,
    op: DiskOp,
    /// Chosen whenever a part is started.
    way: Way,
    range: SectorRange,
    buf: Option<Buf>,
    /// Bytes done.
    done: u64,
}

/// An operation on metadata that is under way.
#[derive(Debug)]
pub enum MetaJob {
    /// Pages are being read.
    Read {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// Byte offset of the first page.
        offset: u64,
        /// Bytes done.
        done: usize,
    },
    /// The flush before a durable write.
    Flush {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// Byte offset of the page.
        offset: u64,
        /// What will be written.
        page: Box<Page>,
    },
    /// A page is being written.
    Write {
        /// Names the answer.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// Byte offset of the page.
        offset: u64,
        /// Bytes done.
        done: usize,
        /// Durable when done.
        durable: bool,
    },
}

#[derive(Debug)]
struct Disk {
    data: Fd,
    meta: Fd,
    abilities: Abilities,
}

/// The disks of all volumes.
#[derive(Debug)]
pub struct Disks {
    disks: Vec<Option<Disk>>,
}

impl Disks {
    /// No disk of `volumes` volumes is open.
    #[must_use]
    pub fn new(volumes: usize) -> Self {
        Self { disks: (0..volumes).map(|_| None).collect() }
    }

    /// Takes over a disk that was opened.
    pub fn attach(&mut self, volume: VolumeIx, opened: Opened) -> DiskInfo {
        let data = Fd::new(opened.data);
        let meta = opened.meta.map_or_else(|| Fd::clone(&data), Fd::new);
        self.disks[volume.at()] =
            Some(Disk { data, meta, abilities: Abilities::new(opened.is_block_device) });
        opened.info
    }

    /// Descriptors of an open disk, for a look at it: data and metadata.
    ///
    /// # Errors
    /// The disk is closed, or there are no descriptors left.
    pub fn descriptors(&self, volume: VolumeIx) -> Result<(OwnedFd, OwnedFd)> {
        let disk = self.disks[volume.at()].as_ref().context("the disk is closed")?;
        let data = disk.data.try_clone().context("duplicate a descriptor")?;
        let meta = disk.meta.try_clone().context("duplicate a descriptor")?;
        Ok((data, meta))
    }

    /// Closes a disk. Operations in flight keep their descriptor and are answered.
    pub fn close(&mut self, volume: VolumeIx) {
        self.disks[volume.at()] = None;
    }

    /// Starts an operation on data.
    pub fn start(
        &mut self,
        shared: &mut Shared,
        id: OpId,
        volume: VolumeIx,
        op: DiskOp,
        range: SectorRange,
        buf: Option<Buf>,
    ) {
        assert!(op == DiskOp::Flush || !range.is_empty(), "an operation on no sector");
        self.go(shared, DiskJob { id, volume, op, way: Way::Flush, range, buf, done: 0 });
    }

    /// An operation on data came to an end, or to a point from which it goes on.
    pub fn on_done(&mut self, shared: &mut Shared, mut job: DiskJob, result: Result<usize, Errno>) {
        let result = match judge(job.way, job.done, job.range.bytes(), result) {
            Outcome::Ended(result) => result,
            Outcome::Partial(done) => {
                job.done = done;
                self.go(shared, job);
                return;
            }
            Outcome::Failed(errno) => {
                let disk = self.disks[job.volume.at()].as_mut();
                if disk.is_some_and(|disk| disk.abilities.learn(job.way, errno)) {
                    self.go(shared, job);
                    return;
                }
                Err(errno)
            }
        };
        shared.tell(Event::DiskDone { id: job.id, result });
    }

    /// Starts an operation, or what is left of it, in the best way.
    fn go(&mut self, shared: &mut Shared, mut job: DiskJob) {
        let id = job.id;
        let Some(disk) = &self.disks[job.volume.at()] else {
            // The disk was given up while the operation was on its way.
            shared.tell(Event::DiskDone { id, result: Err(Errno::EIO) });
            return;
        };
        let Some(way) = disk.abilities.way(job.op) else {
            shared.tell(Event::DiskDone { id, result: Err(Errno::EOPNOTSUPP) });
            return;
        };
        job.way = way;
        let op = operation(shared, &job);
        shared.ring.push(&disk.data, op, Owner::Disk(job));
    }

    /// Reads pages of metadata.
    pub fn read_meta(
        &mut self,
        shared: &mut Shared,
        id: OpId,
        volume: VolumeIx,
        sector: Sector,
        pages: u32,
    ) {
        let count = usize::try_from(pages).expect("page counts have 32 bits");
        assert!(count > 0, "a read of no page");
        let offset = sector.byte();
        match &self.disks[volume.at()] {
            Some(disk) => {
                let pages = vec![Page([0; PAGE_SIZE]); count];
                let memory = Memory::Pages { pages, skip: 0 };
                let owner = Owner::Meta(MetaJob::Read { id, volume, offset, done: 0 });
                shared.ring.push(&disk.meta, Op::Read { memory, offset }, owner);
            }
            None => shared.tell(Event::MetaRead { id, result: Err(Errno::EIO) }),
        }
    }

    /// Writes a page of metadata.
    pub fn write_meta(
        &mut self,
        shared: &mut Shared,
        id: OpId,
        volume: VolumeIx,
        sector: Sector,
        page: Box<Page>,
        durable: bool,
    ) {
        let offset = sector.byte();
        let Some(disk) = &self.disks[volume.at()] else {
            shared.tell(Event::MetaWritten { id, page, result: Err(Errno::EIO) });
            return;
        };
        if durable {
            let owner = Owner::Meta(MetaJob::Flush { id, volume, offset, page });
            shared.ring.push(&disk.meta, Op::Flush, owner);
        } else {
            let job = MetaJob::Write { id, volume, offset, done: 0, durable };
            push_meta_write(shared, &disk.meta, page, job);
        }
    }

    /// An operation on metadata came to an end, or to a point from which it goes on.
    pub fn on_meta_done(
        &mut self,
        shared: &mut Shared,
        job: MetaJob,
        outcome: Result<usize, Errno>,
        keep: Keep,
    ) {
        match (job, keep) {
            (MetaJob::Read { id, volume, offset, done }, Keep::Pages(pages)) => {
                let rest = size_of_val(pages.as_slice()) - done;
                match transferred(outcome, rest) {
                    Transfer::Whole => {
                        shared.tell(Event::MetaRead { id, result: Ok(&pages) });
                    }
                    Transfer::Part(bytes) => {
                        let done = done + bytes;
                        self.continue_meta_read(shared, pages, id, volume, offset, done);
                    }
                    Transfer::Failed(errno) => {
                        shared.tell(Event::MetaRead { id, result: Err(errno) });
                    }
                }
            }
            (MetaJob::Flush { id, volume, offset, page }, Keep::Nothing) => {
                match (outcome, &self.disks[volume.at()]) {
                    (Ok(_), Some(disk)) => {
                        let job = MetaJob::Write { id, volume, offset, done: 0, durable: true };
                        push_meta_write(shared, &disk.meta, page, job);
                    }
                    (result, _) => {
                        let result = Err(result.err().unwrap_or(Errno::EIO));
                        shared.tell(Event::MetaWritten { id, page, result });
                    }
                }
            }
            (MetaJob::Write { id, volume, offset, done, durable }, Keep::Page(page)) => {
                match transferred(outcome, PAGE_SIZE - done) {
                    Transfer::Whole => shared.tell(Event::MetaWritten { id, page, result: Ok(()) }),
                    Transfer::Part(bytes) => {
                        let done = done + bytes;
                        let job = MetaJob::Write { id, volume, offset, done, durable };
                        match &self.disks[volume.at()] {
                            Some(disk) => push_meta_write(shared, &disk.meta, page, job),
                            None => {
                                let result = Err(Errno::EIO);
                                shared.tell(Event::MetaWritten { id, page, result });
                            }
                        }
                    }
                    Transfer::Failed(errno) => {
                        shared.tell(Event::MetaWritten { id, page, result: Err(errno) });
                    }
                }
            }
            (job, keep) => panic!("{job:?} came back with {keep:?}"),
        }
    }

    fn continue_meta_read(
        &self,
        shared: &mut Shared,
        pages: Vec<Page>,
        id: OpId,
        volume: VolumeIx,
        offset: u64,
        done: usize,
    ) {
        let Some(disk) = &self.disks[volume.at()] else {
            shared.tell(Event::MetaRead { id, result: Err(Errno::EIO) });
            return;
        };
        let at = offset + u64::try_from(done).expect("a transfer has less than 2^64 bytes");
        let memory = Memory::Pages { pages, skip: done };
        let owner = Owner::Meta(MetaJob::Read { id, volume, offset, done });
        shared.ring.push(&disk.meta, Op::Read { memory, offset: at }, owner);
    }
}

enum Transfer {
    Whole,
    Part(usize),
    Failed(Errno),
}

fn transferred(outcome: Result<usize, Errno>, rest: usize) -> Transfer {
    match outcome {
        Ok(0) => Transfer::Failed(Errno::EIO),
        Ok(bytes) if bytes == rest => Transfer::Whole,
        Ok(bytes) => {
            assert!(bytes < rest, "more was transferred than asked for");
            Transfer::Part(bytes)
        }

        Err(errno) => Transfer::Failed(errno),
    }
}

fn push_meta_write(shared: &mut Shared, meta: &Fd, page: Box<Page>, job: MetaJob) {
    let MetaJob::Write { offset, done, durable, .. } = job else {
        panic!("only writes are pushed as writes");
    };
    let at = offset + u64::try_from(done).expect("a page has 4096 bytes");
    let op = Op::Write { memory: Memory::Page { page, skip: done }, offset: at, durable };
    shared.ring.push(meta, op, Owner::Meta(job));
}

/// What the ring has to do for the rest of a job.
fn operation(shared: &Shared, job: &DiskJob) -> Op {
    let offset = Sector(job.range.start).byte() + job.done;
    let rest = job.range.bytes() - job.done;
    let arena = |buf: Option<Buf>| {
        let buf = buf.expect("reads and writes have memory");
        let to_usize = |bytes: u64| usize::try_from(bytes).expect("payload lengths fit");
        Memory::Arena { buf, offset: to_usize(job.done), len: to_usize(rest) }
    };
    match job.way {
        Way::Read => Op::Read { memory: arena(job.buf), offset },
        Way::Write { fua } => Op::Write { memory: arena(job.buf), offset, durable: fua },
        Way::Flush => Op::Flush,
        Way::Punch => Op::Allocate { mode: PUNCH_HOLE, offset, len: rest },
        Way::ZeroRange => Op::Allocate { mode: ZERO_RANGE, offset, len: rest },
        Way::DiscardCommand => Op::Discard { offset, len: rest },
        Way::WriteZeroes => {
            let zeroes = usize::try_from(ZERO_PAGES).expect("a small number") * PAGE_SIZE;
            let len = usize::try_from(rest).map_or(zeroes, |rest| rest.min(zeroes));
            let buf = shared.ring.arena().layout().zero_buf();
            Op::Write { memory: Memory::Arena { buf, offset: 0, len }, offset, durable: false }
        }
    }
}
