//! A byte stream through the ring, for the peer's sockets and for NBD clients alike.
//!
//! Receiving: one operation at a time, into bulk memory first and then into the staging buffer.
//! While an operation is under way the staging buffer is the kernel's, so a new one is started
//! only when nothing staged can be used before more bytes come. Sending: packets are gathered in
//! batches; one batch is under way at a time, and a partial send goes on where it stopped.
//!
//! Closing: `shutdown`, cancel, wait until nothing is in flight; then [`Stream::is_idle`]. What
//! was queued before is tried once without waiting, so that a last word still leaves if there is
//! room for it.
//!
//! Not responsible for: what the bytes mean.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;

use nix::sys::socket::{Shutdown, shutdown};
use replication_core::event::SockId;
use replication_core::units::{Buf, Errno};

use crate::ring::{Batch, Completion, Direct, Fd, Keep, Key, Op, Owner, Receive, Ring};

/// Names a stream in completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamId {
    /// A socket of the replication link.
    Peer(SockId),
    /// A client of the NBD server, counted from its start.
    Client(u64),
}

/// Batches kept for use again: enough for one under way and some waiting.
const SPARE_MAX: usize = 8;

/// What a receive operation brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes: so many of them bulk data, the others staged.
    Bytes {
        /// Bulk bytes.
        bulk: usize,
    },
    /// The other end closed its side.
    EndOfFile,
    /// The socket is broken, or the operation was cancelled.
    Failed(Errno),
}

/// What a send operation brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendEnd {
    /// A batch is with the kernel; its marks were handed out.
    Whole,
    /// Part of a batch; the rest is sent next.
    Part,
    /// The socket is broken, or the operation was cancelled.
    Failed(Errno),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// The last queued bytes are tried.
    LastWord,
    /// Shut down; operations in flight are running out.
    Closing,
}

/// One socket.
#[derive(Debug)]
pub struct Stream {
    id: StreamId,
    fd: Fd,
    phase: Phase,
    /// `None` while the kernel has it.
    receive: Option<Box<Receive>>,
    receiving: Option<Key>,
    queue: VecDeque<Box<Batch>>,
    #[allow(clippy::vec_box, reason = "the box itself moves into the ring and back")]
    spare: Vec<Box<Batch>>,
    sending: Option<Key>,
}

impl Stream {
    /// A stream on a connected socket.
    #[must_use]
    pub fn new(id: StreamId, fd: Fd) -> Self {
        Self {
            id,
            fd,
            phase: Phase::Open,
            receive: Some(Box::default()),
            receiving: None,
            queue: VecDeque::with_capacity(SPARE_MAX),
            spare: Vec::with_capacity(SPARE_MAX),
            sending: None,
        }
    }

    /// The socket.
    #[must_use]
    pub fn fd(&self) -> &Fd {
        &self.fd
    }

    /// Bytes that wait to be parsed; none while an operation is under way.
    #[must_use]
    pub fn staged(&self) -> &[u8] {
        self.receive.as_ref().map_or(&[], |receive| receive.staged())
    }

    /// Drops the first `bytes` staged bytes.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn consume(&mut self, bytes: usize) {
        let receive = self.receive.as_mut();
        receive.expect("staged bytes are seen only while the buffer is here").consume(bytes);
    }

    /// Moves staged bytes to where bulk data is gathered. Returns how many.
    pub fn take_bulk(&mut self, direct: Direct, ring: &Ring) -> usize {
        let staged = self.staged();
        let bytes = staged.len().min(direct.missing());
        if bytes > 0 {
            ring.arena().copy_in(direct.buf, direct.have, &staged[..bytes]);
            self.consume(bytes);
        }
        bytes
    }

    /// Whether a receive operation is under way.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        self.receiving.is_some()
    }

    /// Starts to receive, unless that is under way or the stream is being closed.
    pub fn start_receive(&mut self, ring: &mut Ring, direct: Option<Direct>) {
        if self.phase != Phase::Open || self.is_receiving() {
            return;
        }
        let receive = self.receive.take().expect("the buffer is here when nothing is under way");
        let op = Op::Receive { receive, direct };
        self.receiving = Some(ring.push(&self.fd, op, Owner::Received(self.id)));
    }

    /// Takes in the end of a receive operation.
    pub fn on_received(&mut self, completion: Completion) -> Received {
        let outcome = completion.outcome();
        let Keep::Receive(mut receive) = completion.keep else {
            panic!("a receive operation keeps the receive side");
        };
        assert!(self.receiving.take().is_some(), "a receive operation was under way");
        let received = match outcome {
            Ok(0) => {
                receive.filled(0);
                Received::EndOfFile
            }
            Ok(bytes) => Received::Bytes { bulk: receive.filled(bytes) },
            Err(errno) => {
                receive.filled(0);
                Received::Failed(errno)
            }
        };
        self.receive = Some(receive);
        received
    }

    /// The batch that takes the next packet; `None` if the stream is being closed.
    pub fn batch(&mut self) -> Option<&mut Batch> {
        if self.phase != Phase::Open {
            return None;
        }
        if self.queue.back().is_none_or(|batch| batch.is_full()) {
            self.queue.push_back(self.spare.pop().unwrap_or_default());
        }
        self.queue.back_mut().map(Box::as_mut)
    }

    /// Queues bytes and payload as one packet with a mark. What the stream will not send any more
    /// is dropped.
    pub fn send(&mut self, bytes: &[u8], payload: Option<(Buf, usize)>, mark: Option<u64>) {
        if let Some(batch) = self.batch() {
            batch.push_bytes(|out| out.extend_from_slice(bytes));
            if let Some((buf, len)) = payload {
                batch.push_payload(buf, len);
            }
            if let Some(mark) = mark {
                batch.mark(mark);
            }
        }
    }

    /// Whether there is nothing to send or being sent.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.sending.is_none() && self.queue.iter().all(|batch| batch.is_empty())
    }

    /// Whether a batch is under way.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Whether the other end lags behind so far that it should not get more to do.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        self.queue.len() > 1
    }

    /// Ends the send operation under way: it comes back with what was sent until now, or, if that
    /// is nothing, as cancelled.
    pub fn interrupt_send(&mut self, ring: &mut Ring) {
        if let Some(key) = self.sending {
            ring.cancel(key);
        }
    }

    /// Starts to send what is queued, unless that is under way.
    pub fn start_send(&mut self, ring: &mut Ring) {
        let at_once = match self.phase {
            Phase::Open => false,
            Phase::LastWord => true,
            Phase::Closing => return,
        };
        if self.sending.is_some() {
            return;
        }
        if self.queue.front().is_some_and(|batch| !batch.is_empty())
            && let Some(batch) = self.queue.pop_front()
        {
            let op = Op::Send { batch, at_once };
            self.sending = Some(ring.push(&self.fd, op, Owner::Sent(self.id)));
        }
    }

    /// Takes in the end of a send operation; the marks of a batch that is with the kernel are
    /// appended to `marks`.
    pub fn on_sent(&mut self, completion: Completion, marks: &mut Vec<u64>) -> SendEnd {
        let outcome = completion.outcome();
        let Keep::Batch(mut batch) = completion.keep else {
            panic!("a send operation keeps the batch");
        };
        assert!(self.sending.take().is_some(), "a send operation was under way");
        match outcome.and_then(|bytes| batch.advance(bytes)) {
            Ok(true) => {
                marks.extend_from_slice(batch.marks());
                batch.clear();
                if self.spare.len() < SPARE_MAX {
                    self.spare.push(batch);
                }
                SendEnd::Whole
            }
            Ok(false) => {
                self.queue.push_front(batch);
                SendEnd::Part
            }
            Err(errno) => {
                // A last word behind a hole would be a lie.
                self.queue.clear();
                SendEnd::Failed(errno)
            }
        }
    }

    /// Starts to close. What is queued is tried once if nothing stands in its way.
    pub fn close(&mut self, ring: &mut Ring) {
        if self.phase != Phase::Open {
            return;
        }
        if self.sending.is_none() && !self.is_drained() {
            self.phase = Phase::LastWord;
            self.start_send(ring);
        } else {
            self.shut(ring);
        }
    }

    /// Goes on with closing after the end of an operation. Whether the stream is idle now.
    pub fn continue_close(&mut self, ring: &mut Ring) -> bool {
        if self.phase == Phase::LastWord && self.sending.is_none() {
            self.shut(ring);
        }
        self.is_idle()
    }

    /// Whether the stream is closed and nothing of it is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Closing && self.sending.is_none() && self.receiving.is_none()
    }

    fn shut(&mut self, ring: &mut Ring) {
        self.phase = Phase::Closing;
        // A socket that is not connected any more cannot be shut down, and need not be.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
        for key in [self.receiving, self.sending].into_iter().flatten() {
            ring.cancel(key);
        }
        self.queue.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::arena::Layout;

    /// What was queued behind a batch that failed never leaves.
    #[test]
    fn after_a_failed_send_there_is_no_last_word() {
        let (near, far) = UnixStream::pair().unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let mut ring = Ring::new(Layout::new(1, 1, 4096, 0).unwrap()).unwrap();
        let mut stream = Stream::new(StreamId::Client(0), Rc::new(near.into()));
        stream.send(b"lost", None, None);
        stream.start_send(&mut ring);
        stream.send(b"behind the hole", None, None);
        let mut done = Vec::new();
        while done.is_empty() {
            ring.wait(Some(Duration::from_secs(10))).unwrap();
            ring.completions(&mut done);
        }
        let end = stream.on_sent(done.remove(0), &mut Vec::new());
        assert_eq!(end, SendEnd::Failed(Errno(libc::EPIPE)));
        assert!(stream.is_drained());
        stream.close(&mut ring);
        assert!(stream.is_idle());
        drop(far);
    }
}
