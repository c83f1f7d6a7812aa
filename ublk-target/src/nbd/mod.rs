//! The NBD server: exports for hosts without ublk, virtual machines and tests.
//!
//! Responsible for: its listening socket, clients, and the request slots of the volumes, which all
//! clients of a volume share: none gets more than three times what it leaves free. A write's
//! payload is received into the slot's buffer and a read's reply is sent from it, so a slot is free
//! only when its reply was sent. Without a free slot, or with replies piling up, a client is not
//! read from; one that stalls while it holds slots is sent away. Not responsible for: what a
//! request does.
//!
//! A request that cannot be served is answered; bytes that are no request end the connection of
//! that client alone. Requests of a client that went away are carried out all the same.
//!
//! Invariants kept: LV-2 (slots, clients, option data and unsent replies are bounded), ORD-6 (a
//! slot's buffer does not change between request and completion), DUR-6 (flush and FUA are
//! announced).

pub mod handshake;
pub mod proto;
mod socket;
mod tags;

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use replication_core::config::{NbdAddress, ResourceConfig};
use replication_core::event::{Event, HostOp, HostRequest, HostTag, VolumeIx};
use replication_core::units::{Errno, Sector, SectorRange, Span, Time};

use self::handshake::{Export, Handshake, Progress};
use self::proto::{Asked, Limits, NbdError, REQUEST_SIZE, Request};
use self::tags::{Busy, Tag, Tags};
use crate::engine::Shared;
use crate::holders::{User, Users};
use crate::ring::{Completion, Direct, Fd, Key, Op, Owner, Ring, accepted, is_single_failure};
use crate::stream::{Received, SendEnd, Stream, StreamId};

/// Clients at the same time.
const CLIENTS_MAX: usize = 16;
/// A client that takes nothing of a reply, or sends nothing of a payload, for this long is not
/// coming back to it.
const STALL_LIMIT: Span = Span::from_secs(60);
/// Pause before another attempt to accept.
const ACCEPT_RETRY: Span = Span::from_secs(1);

/// Where the next bytes of a client in transmission belong.
#[derive(Debug)]
enum Stage {
    /// The next request.
    Head,
    /// Payload of a write.
    Payload { request: Request, op: HostOp, range: SectorRange, tag: HostTag, direct: Direct },
    /// Payload of a write that was refused.
    Skip { left: usize },
}

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Requests {
        volume: VolumeIx,
        structured: bool,
        stage: Stage,
    },
    /// It said goodbye: what is under way is answered, then the connection is closed.
    Leaving,
}

#[derive(Debug)]
struct Client {
    id: u64,
    stream: Stream,
    phase: Phase,
    /// Slots that hold a request or a reply of this client.
    slots: usize,
    /// Since when the replies under way were not looked after.
    sending_since: Option<Time>,
    /// Since when nothing came of the payload that is waited for.
    payload_since: Option<Time>,
    closed: bool,
}

/// The server.
#[derive(Debug)]
pub struct Server {
    listener: socket::Listener,
    accepting: Option<Key>,
    /// Accepting failed; when it is tried again.
    accept_at: Option<Time>,
    exports: Vec<Export>,
    tags: Vec<Tags>,
    clients: Vec<Client>,
    next_client: u64,
    users: Arc<Users>,
    stopping: bool,
    replies: Vec<u8>,
    marks: Vec<u64>,
}

impl Client {
    /// When it has stalled.
    fn deadline(&self) -> Option<Time> {
        let since = [self.sending_since, self.payload_since].into_iter().flatten().min();
        since.filter(|_| !self.closed).map(|since| since + STALL_LIMIT)
    }
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// The address is in use, cannot be bound, or is not of this machine alone.
    pub fn new(
        address: &NbdAddress,
        resource: &ResourceConfig,
        queue_depth: u16,
        max_io_size: u32,
        users: Arc<Users>,
        ring: &mut Ring,
    ) -> Result<Self> {
        let listener = socket::Listener::open(address).context("start the NBD server")?;
        let limits = Limits { sectors: Sector(0), block_size: 512, max_io_size };
        let export = |nr: u16| Export { name: nr.to_string(), limits };
        let exports = resource.volumes.iter().map(|volume| export(volume.nr.0)).collect();
        let tags = resource.volumes.iter().map(|_| Tags::new(queue_depth)).collect();
        let accepting = Some(ring.push(listener.fd(), Op::Accept, Owner::NbdAccept));
        tracing::info!("NBD server listens on {}", listener.name());
        Ok(Self {
            listener,
            accepting,
            accept_at: None,
            exports,
            tags,
            clients: Vec::with_capacity(CLIENTS_MAX),
            next_client: 0,
            users,
            stopping: false,
            replies: Vec::new(),
            marks: Vec::new(),
        })
    }

    /// Where it listens: the path, or the address with the port that the system chose.
    #[must_use]
    pub fn name(&self) -> &str {
        self.listener.name()
    }

    /// Takes over the size of a volume and the block size of its disk. Clients learn about it when
    /// they connect; requests are checked against the new size at once.
    pub fn set_size(&mut self, volume: VolumeIx, sectors: Sector, block_size: u32) {
        let limits = &mut self.exports[volume.at()].limits;
        limits.sectors = sectors;
        limits.block_size = block_size;
    }

    /// Someone connected.
    pub fn on_accepted(&mut self, shared: &mut Shared, completion: Completion) {
        let result = accepted(completion);
        self.accepting = None;
        if self.stopping {
            return;
        }
        match result {
            Ok(fd) => {
                self.accept(shared);
                self.add_client(shared, Rc::new(fd));
            }
            Err(errno) => {
                tracing::warn!("NBD server: accept: {errno}");
                if is_single_failure(errno) {
                    self.accept(shared);
                } else {
                    self.accept_at = Some(shared.now() + ACCEPT_RETRY);
                }
            }
        }
    }

    fn accept(&mut self, shared: &mut Shared) {
        self.accept_at = None;
        let accepting = shared.ring.push(self.listener.fd(), Op::Accept, Owner::NbdAccept);
        self.accepting = Some(accepting);
    }

    /// When [`Server::pump`] may find something to do that no completion announces.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let stalled = self.clients.iter().filter_map(Client::deadline);
        stalled.chain(self.accept_at).min()
    }

    fn add_client(&mut self, shared: &mut Shared, fd: Fd) {
        if self.clients.len() >= CLIENTS_MAX {
            // Whoever has not got further than the handshake makes room.
            let idle = |client: &Client| matches!(client.phase, Phase::Handshake(_));
            if let Some(client) = self.clients.iter_mut().find(|client| idle(client)) {
                close(client, &mut shared.ring);
            }
            tracing::warn!("NBD client refused: {CLIENTS_MAX} are connected");
            return;
        }
        self.listener.set_options(&fd);
        let id = self.next_client;
        self.next_client += 1;
        let mut stream = Stream::new(StreamId::Client(id), fd);
        self.replies.clear();
        let handshake = Handshake::new(&mut self.replies);
        stream.send(&self.replies, None, None);
        let phase = Phase::Handshake(handshake);
        self.clients.push(Client {
            id,
            stream,
            phase,
            slots: 0,
            sending_since: None,
            payload_since: None,
            closed: false,
        });
    }

    /// Bytes came in, or the client went away.
    pub fn on_received(&mut self, shared: &mut Shared, id: u64, completion: Completion) {
        let client = self.client(id);
        client.payload_since = None;
        match client.stream.on_received(completion) {
            Received::Bytes { bulk } => match &mut client.phase {
                Phase::Requests { stage: Stage::Payload { direct, .. }, .. } => direct.have += bulk,
                Phase::Requests { stage: Stage::Head | Stage::Skip { .. }, .. }
                | Phase::Handshake(_)
                | Phase::Leaving => assert!(bulk == 0, "payload where none was expected"),
            },
            Received::EndOfFile | Received::Failed(_) => close(client, &mut shared.ring),
        }
        client.stream.continue_close(&mut shared.ring);
    }

    /// Replies were sent, or the client went away.
    pub fn on_sent(&mut self, shared: &mut Shared, id: u64, completion: Completion) {
        let mut marks = std::mem::take(&mut self.marks);
        marks.clear();
        let client = self.client(id);
        client.sending_since = None;
        match client.stream.on_sent(completion, &mut marks) {
            SendEnd::Whole | SendEnd::Part => {}
            SendEnd::Failed(errno) => {
                if !client.closed {
                    tracing::info!("NBD client {id} does not take its replies: {errno}");
                }
                close(client, &mut shared.ring);
            }
        }
        client.stream.continue_close(&mut shared.ring);
        client.slots -= marks.len();
        for mark in &marks {
            let (volume, tag) = unpack(*mark);
            self.tags[volume.at()].release(tag);
        }
        self.marks = marks;
    }

    /// A request was carried out, or failed.
    pub fn complete(
        &mut self,
        shared: &mut Shared,
        volume: VolumeIx,
        tag: HostTag,
        result: Result<(), Errno>,
    ) {
        let mut busy = self.tags[volume.at()].busy(tag);
        if result.is_ok()
            && let Some(request) = busy.next_piece(shared, volume, tag)
        {
            self.tags[volume.at()].set(tag, Tag::Busy(busy));
            shared.tell(Event::Host(request));
            return;
        }
        let buf = shared.ring.arena().layout().tag_buf(volume, tag);
        let Some(client) = self.clients.iter_mut().find(|client| client.id == busy.client) else {
            self.tags[volume.at()].release(tag);
            return;
        };
        let result = result.map_err(NbdError::from_errno);
        self.replies.clear();
        match (busy.op, result) {
            (HostOp::Read, Ok(())) if !client.closed => {
                let offset = Sector(busy.whole.start).byte();
                let length = busy.whole.bytes();
                let bytes = u32::try_from(length).expect("reads are bounded by max_io_size");
                let head = &mut self.replies;
                proto::read_head(head, busy.cookie, busy.structured, offset, bytes);
                let length = usize::try_from(length).expect("reads are bounded by max_io_size");
                let mark = Some(pack(volume, tag));
                client.stream.send(&self.replies, Some((buf, length)), mark);
                self.tags[volume.at()].set(tag, Tag::Replying { client: busy.client });
                return;
            }
            (HostOp::Read, Err(error)) => {
                proto::read_error(&mut self.replies, busy.cookie, busy.structured, error);
            }
            (
                HostOp::Read
                | HostOp::Write { .. }
                | HostOp::Flush
                | HostOp::Discard
                | HostOp::WriteZeroes { .. },
                result,
            ) => proto::simple_reply(&mut self.replies, busy.cookie, result),
        }
        client.stream.send(&self.replies, None, None);
        client.slots -= 1;
        self.tags[volume.at()].release(tag);
    }

    /// Serves what clients have sent, as far as there are slots. Whether anything was done.
    pub fn pump(&mut self, shared: &mut Shared) -> bool {
        let now = shared.now();
        if self.accept_at.is_some_and(|at| at <= now) && !self.stopping {
            self.accept(shared);
        }
        self.tend_stalled(&mut shared.ring, now);
        let mut progress = false;
        let mut index = 0;
        while index < self.clients.len() {
            while self.step(shared, index) {
                progress = true;
            }
            index += 1;
        }
        progress | self.reap()
    }

    /// Sends what was queued.
    pub fn flush(&mut self, ring: &mut Ring, now: Time) {
        for client in &mut self.clients {
            client.stream.start_send(ring);
            if client.stream.is_sending() && client.sending_since.is_none() {
                client.sending_since = Some(now);
            }
        }
    }

    /// Sends away who holds slots and makes no progress. How far a send has come only shows at its
    /// end, so one that takes long is interrupted: what it has sent until then is progress, and it
    /// fails if that is nothing.
    fn tend_stalled(&mut self, ring: &mut Ring, now: Time) {
        let is_over = |since: Option<Time>| since.is_some_and(|since| since + STALL_LIMIT <= now);
        for client in self.clients.iter_mut().filter(|client| !client.closed) {
            if is_over(client.sending_since) {
                client.sending_since = Some(now);
                client.stream.interrupt_send(ring);
            }
            if is_over(client.payload_since) {
                tracing::warn!("NBD client {}: the rest of a write does not come", client.id);
                close(client, ring);
            }
        }
    }

    /// Stops to listen and closes every connection.
    pub fn stop(&mut self, ring: &mut Ring) {
        self.stopping = true;
        if let Some(key) = self.accepting {
            ring.cancel(key);
        }
        for client in &mut self.clients {
            close(client, ring);
        }
    }

    /// Whether nothing is left after [`Server::stop`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopping && self.clients.is_empty()
    }

    fn client(&mut self, id: u64) -> &mut Client {
        let client = self.clients.iter_mut().find(|client| client.id == id);
        client.expect("a client is kept until nothing of it is in flight")
    }

    /// One step of one client. Whether another one may be possible.
    fn step(&mut self, shared: &mut Shared, index: usize) -> bool {
        let client = &mut self.clients[index];
        if client.closed || client.stream.is_receiving() || client.stream.is_congested() {
            return false;
        }
        match &mut client.phase {
            Phase::Handshake(_) => self.step_handshake(shared, index),
            Phase::Requests { stage: Stage::Head, .. } => self.step_head(shared, index),
            Phase::Requests { stage: Stage::Payload { .. }, .. } => {
                self.step_payload(shared, index)
            }
            Phase::Requests { stage: stage @ Stage::Skip { .. }, .. } => {
                let Stage::Skip { left } = stage else { panic!("matched above") };
                let bytes = client.stream.staged().len().min(*left);
                if bytes == 0 {
                    client.stream.start_receive(&mut shared.ring, None);
                    return false;
                }
                client.stream.consume(bytes);
                *left -= bytes;
                if *left == 0 {
                    *stage = Stage::Head;
                }
                true
            }
            Phase::Leaving => {
                if client.slots == 0 && client.stream.is_drained() {
                    close(client, &mut shared.ring);
                }
                false
            }
        }
    }

    fn step_handshake(&mut self, shared: &mut Shared, index: usize) -> bool {
        let client = &mut self.clients[index];
        let Phase::Handshake(handshake) = &mut client.phase else { panic!("in the handshake") };
        self.replies.clear();
        let staged = client.stream.staged();
        let progress = handshake.advance(staged, &self.exports, &mut self.replies);
        if !self.replies.is_empty() {
            client.stream.send(&self.replies, None, None);
        }
        match progress {
            Progress::More => {
                client.stream.start_receive(&mut shared.ring, None);
                false
            }
            Progress::Used(used) => {
                client.stream.consume(used);
                true
            }
            Progress::Transmission { used, export } => {
                client.stream.consume(used);
                let structured = handshake.is_structured();
                let volume = VolumeIx(u8::try_from(export).expect("few volumes"));
                client.phase = Phase::Requests { volume, structured, stage: Stage::Head };
                let who = socket::describe(client.stream.fd());
                tracing::info!("NBD {who} uses volume {}", self.exports[export].name);
                self.users.add(User { client: client.id, volume: export, who });
                true
            }
            Progress::Close(used) => {
                client.stream.consume(used);
                client.phase = Phase::Leaving;
                true
            }
        }
    }

    fn step_head(&mut self, shared: &mut Shared, index: usize) -> bool {
        let client = &mut self.clients[index];
        let Phase::Requests { volume, structured, stage } = &mut client.phase else {
            panic!("in transmission")
        };
        let staged = client.stream.staged().first_chunk::<REQUEST_SIZE>();
        let Some(bytes) = staged else {
            client.stream.start_receive(&mut shared.ring, None);
            return false;
        };
        let Some(request) = Request::parse(bytes) else {
            tracing::warn!(
                "NBD client {}: bytes that are no request; connection closed",
                client.id
            );
            close(client, &mut shared.ring);
            return false;
        };
        match request.check(&self.exports[volume.at()].limits, *structured) {
            Asked::Disconnect => {
                client.stream.consume(REQUEST_SIZE);
                client.phase = Phase::Leaving;
            }
            Asked::Refuse(error) => {
                client.stream.consume(REQUEST_SIZE);
                self.replies.clear();
                if request.is_read() {
                    proto::read_error(&mut self.replies, request.cookie, *structured, error);
                } else {
                    proto::simple_reply(&mut self.replies, request.cookie, Err(error));
                }
                client.stream.send(&self.replies, None, None);
                let left = usize::try_from(request.payload()).expect("lengths have 32 bits");
                if left > 0 {
                    *stage = Stage::Skip { left };
                }
            }
            Asked::Do { op, range, then_flush } => {
                let Some(tag) = self.tags[volume.at()].take(client.id, client.slots) else {
                    return false;
                };
                client.stream.consume(REQUEST_SIZE);
                client.slots += 1;
                let buf = shared.ring.arena().layout().tag_buf(*volume, tag);
                if request.payload() > 0 {
                    let need = usize::try_from(request.payload()).expect("lengths have 32 bits");
                    let direct = Direct { buf, have: 0, need };
                    *stage = Stage::Payload { request, op, range, tag, direct };
                    return true;
                }
                let (volume, structured) = (*volume, *structured);
                let busy = Busy::new(client.id, request.cookie, structured, op, range, then_flush);
                self.submit(shared, volume, tag, busy);
            }
        }
        true
    }

    fn step_payload(&mut self, shared: &mut Shared, index: usize) -> bool {
        let client = &mut self.clients[index];
        let Phase::Requests { volume, structured, stage } = &mut client.phase else {
            panic!("in transmission")
        };
        let Stage::Payload { request, op, range, tag, direct } = stage else {
            panic!("payload is coming in")
        };
        direct.have += client.stream.take_bulk(*direct, &shared.ring);
        if direct.missing() > 0 {
            client.stream.start_receive(&mut shared.ring, Some(*direct));
            client.payload_since = Some(shared.now());
            return false;
        }
        let (volume, tag) = (*volume, *tag);
        let busy = Busy::new(client.id, request.cookie, *structured, *op, *range, false);
        *stage = Stage::Head;
        self.submit(shared, volume, tag, busy);
        true
    }

    fn submit(&mut self, shared: &mut Shared, volume: VolumeIx, tag: HostTag, mut busy: Busy) {
        let request = busy.next_piece(shared, volume, tag);
        let request: HostRequest = request.expect("a new request has something to do");
        self.tags[volume.at()].set(tag, Tag::Busy(busy));
        shared.tell(Event::Host(request));
    }

    /// Forgets clients of which nothing is in flight any more.
    fn reap(&mut self) -> bool {
        let mut progress = false;
        while let Some(index) = self.clients.iter().position(|client| client.stream.is_idle()) {
            let client = self.clients.swap_remove(index);
            self.users.remove(client.id);
            for tags in &mut self.tags {
                tags.forget(client.id);
            }
            progress = true;
        }
        progress
    }
}

fn close(client: &mut Client, ring: &mut Ring) {
    client.closed = true;
    client.stream.close(ring);
}

fn pack(volume: VolumeIx, tag: HostTag) -> u64 {
    u64::from(volume.0) << 16 | u64::from(tag.0)
}

fn unpack(mark: u64) -> (VolumeIx, HostTag) {
    let volume = u8::try_from(mark >> 16).expect("packed from a volume index");
    let tag = u16::try_from(mark & 0xffff).expect("masked to 16 bits");
    (VolumeIx(volume), HostTag(tag))
}

#[cfg(test)]
mod tests;
