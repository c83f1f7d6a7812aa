//! What one receive or send call of the kernel works on: iovecs, their header, staged bytes.
//!
//! These objects are boxed, are moved into the ring for the time of an operation and come back
//! with its completion. While one is away nobody can touch it, which is the whole point.

use std::ptr;

use replication_core::units::{Buf, Errno};

use crate::arena::Arena;

/// Bytes that a socket can have received and not yet parsed. Small packets come in many at once;
/// bulk data goes past this buffer.
pub const STAGING_SIZE: usize = 64 << 10;
/// Segments of one send: far below the kernel's limit of 1024, so that payload memory is given
/// back in steps.
const SEGMENTS_MAX: usize = 256;
/// Bytes of one send, for the same reason.
const SEND_BYTES_MAX: usize = 4 << 20;

const EMPTY_IOVEC: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

fn empty_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// Bulk data that goes straight into the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Where it goes.
    pub buf: Buf,
    /// Bytes that are there already.
    pub have: usize,
    /// Bytes in all.
    pub need: usize,
}

impl Direct {
    /// Bytes still to come.
    #[must_use]
    pub fn missing(&self) -> usize {
        assert!(self.have <= self.need, "more bulk data than announced");
        self.need - self.have
    }
}

/// The receive side of a socket.
pub struct Receive {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    direct: Option<Direct>,
    iovecs: [libc::iovec; 2],
    header: libc::msghdr,
}

impl std::fmt::Debug for Receive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Receive({} staged, {:?})", self.end - self.start, self.direct)
    }
}

impl Receive {
    /// Nothing received yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            staging: vec![0; STAGING_SIZE].into_boxed_slice(),
            start: 0,
            end: 0,
            direct: None,
            iovecs: [EMPTY_IOVEC; 2],
            header: empty_header(),
        }
    }

    /// The bytes that wait to be parsed.
    #[must_use]
    pub fn staged(&self) -> &[u8] {
        &self.staging[self.start..self.end]
    }

    /// Drops the first `bytes` bytes of the staged ones.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn consume(&mut self, bytes: usize) {
        assert!(bytes <= self.end - self.start, "only staged bytes can be consumed");
        self.start += bytes;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Gets ready for the kernel: bulk data first, then the free part of the staging buffer.
    ///
    /// # Panics
    /// If bulk data is to come but there are staged bytes, which would be part of it.
    pub(crate) fn prepare(&mut self, direct: Option<Direct>, arena: &Arena) {
        assert!(direct.is_none() || self.start == self.end, "staged bytes belong to the bulk data");
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        assert!(self.end < self.staging.len(), "no packet header or fixed part fills the staging");
        self.direct = direct;
        self.iovecs[0] = match direct {
            Some(direct) => libc::iovec {
                iov_base: arena.address(direct.buf, direct.have, direct.missing()).cast(),
                iov_len: direct.missing(),
            },
            None => EMPTY_IOVEC,
        };
        let free = &mut self.staging[self.end..];
        self.iovecs[1] = libc::iovec { iov_base: free.as_mut_ptr().cast(), iov_len: free.len() };
    }

    /// The message header for the kernel, valid as long as the box is neither moved nor changed.
    pub(crate) fn header(&mut self) -> *mut libc::msghdr {
        self.header = empty_header();
        self.header.msg_iov = self.iovecs.as_mut_ptr();
        self.header.msg_iovlen = self.iovecs.len();
        &raw mut self.header
    }

    /// Takes in `bytes` received bytes. Returns how many of them are bulk data.
    ///
    /// # Panics
    /// If the kernel reports more than there was room for.
    pub fn filled(&mut self, bytes: usize) -> usize {
        let bulk = self.direct.take().map_or(0, |direct| direct.missing().min(bytes));
        self.end += bytes - bulk;
        assert!(self.end <= self.staging.len(), "the kernel filled more than it was given");
        bulk
    }
}

impl Default for Receive {
    fn default() -> Self {
        Self::new()
    }
}

/// A piece of what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segment {
    /// Bytes of the batch's own buffer.
    Bytes { start: usize, len: usize },
    /// Payload in the arena.
    Payload { buf: Buf, len: usize },
}

impl Segment {
    fn len(self) -> usize {
        match self {
            Self::Bytes { len, .. } | Self::Payload { len, .. } => len,
        }
    }
}

/// Packets that leave with one call: small parts copied, payload from the arena.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    segments: Vec<Segment>,
    marks: Vec<u64>,
    total: usize,
    sent: usize,
    iovecs: Vec<libc::iovec>,
    header: Option<libc::msghdr>,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({} of {} bytes sent)", self.sent, self.total)
    }
}

impl Batch {
    /// Whether another packet should start a new batch.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.segments.len() >= SEGMENTS_MAX || self.total >= SEND_BYTES_MAX
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Adds bytes; `fill` appends them.
    pub fn push_bytes(&mut self, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        fill(&mut self.bytes);
        assert!(self.bytes.len() >= start, "bytes are appended, not taken away");
        let len = self.bytes.len() - start;
        self.total += len;
        match self.segments.last_mut() {
            Some(Segment::Bytes { len: before, .. }) => *before += len,
            Some(Segment::Payload { .. }) | None => {
                self.segments.push(Segment::Bytes { start, len });
            }
        }
    }

    /// Adds payload, which must stay untouched until the batch was sent or given up.
    pub fn push_payload(&mut self, buf: Buf, len: usize) {
        self.total += len;
        self.segments.push(Segment::Payload { buf, len });
    }

    /// Remembers a number of the owner's with this batch.
    pub fn mark(&mut self, mark: u64) {
        self.marks.push(mark);
    }

    /// The numbers remembered.
    #[must_use]
    pub fn marks(&self) -> &[u64] {
        &self.marks
    }

    /// Takes note that the kernel accepted `bytes` bytes more; whether that was all.
    ///
    /// # Errors
    /// It accepted nothing, or more than there was.
    pub fn advance(&mut self, bytes: usize) -> Result<bool, Errno> {
        if bytes == 0 || bytes > self.total - self.sent {
            return Err(Errno::EIO);
        }
        self.sent += bytes;
        Ok(self.sent == self.total)
    }

    /// Makes it empty, keeping its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.segments.clear();
        self.marks.clear();
        self.iovecs.clear();
        self.header = None;
        self.total = 0;
        self.sent = 0;
    }

    /// The message header for the kernel: what was not sent yet. Valid as long as the box is
    /// neither moved nor changed.
    pub(crate) fn header(&mut self, arena: &Arena) -> *const libc::msghdr {
        self.iovecs.clear();
        let mut skip = self.sent;
        for segment in &self.segments {
            let len = segment.len();
            if skip >= len {
                skip -= len;
                continue;
            }
            let rest = len - skip;
            let base = match *segment {
                Segment::Bytes { start, .. } => {
                    self.bytes[start + skip..start + len].as_ptr().cast_mut()
                }
                Segment::Payload { buf, .. } => arena.address(buf, skip, rest),
            };
            self.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: rest });
            skip = 0;
        }
        assert!(!self.iovecs.is_empty(), "a batch without bytes is never sent");
        let header = self.header.insert(empty_header());
        header.msg_iov = self.iovecs.as_mut_ptr();
        header.msg_iovlen = self.iovecs.len();
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Layout;

    #[test]
    fn received_bytes_are_split_into_bulk_and_staged() {
        let arena = Arena::new(Layout::new(1, 1, 4096, 0).unwrap()).unwrap();
        let mut receive = Receive::new();
        let direct = Direct { buf: Buf(0), have: 1000, need: 4096 };
        receive.prepare(Some(direct), &arena);
        assert_eq!(receive.filled(4000), 3096);
        assert_eq!(receive.staged().len(), 904);
        receive.consume(900);
        receive.prepare(None, &arena);
        assert_eq!(receive.staged().len(), 4);
        assert_eq!(receive.filled(10), 0);
        assert_eq!(receive.staged().len(), 14);
    }

    #[test]
    fn a_partial_send_goes_on_where_it_stopped() {
        let arena = Arena::new(Layout::new(1, 1, 4096, 0).unwrap()).unwrap();
        let mut batch = Batch::default();
        batch.push_bytes(|out| out.extend_from_slice(b"head"));
        batch.push_bytes(|out| out.extend_from_slice(b"more"));
        batch.push_payload(Buf(0), 100);
        batch.push_bytes(|out| out.extend_from_slice(b"tail"));
        batch.header(&arena);
        let lengths = |batch: &Batch| batch.iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>();
        assert_eq!(lengths(&batch), [8, 100, 4]);
        assert_eq!(batch.advance(58), Ok(false));
        batch.header(&arena);
        assert_eq!(lengths(&batch), [50, 4]);
        assert_eq!(batch.advance(54), Ok(true));
        assert_eq!(batch.advance(1), Err(Errno::EIO));
        batch.clear();
        assert!(batch.is_empty() && batch.marks().is_empty());
    }
}
