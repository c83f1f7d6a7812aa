//! The replication link: listening, connecting, and the sockets to the peer.
//!
//! Responsible for: TCP sockets with their options, packets in and packets out, and exactly one
//! `SockGone` for each socket. Not responsible for: which socket is used for what, handshakes,
//! keep-alives and time limits of an established connection; the core decides.
//!
//! A socket that ends by itself (end of file, error, garbage) is closed at once. What was received
//! before its end is still delivered if the core wants it: the end is reported after the last
//! packet.
//!
//! Invariants kept: WP-1, ORD-7, WP-9 (descriptors, buffers and slots go with their socket).

pub mod framing;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, getpeername,
    listen, setsockopt, socket, sockopt,
};
use replication_core::config::NetConfig;
use replication_core::event::{DialId, Event, SockGone, SockId};
use replication_core::units::{Buf, Errno, Span, Time, VolumeNr};
use replication_core::wire::{self, HeaderKind, Packet};

use self::framing::{Reader, Step};
use crate::engine::Shared;
use crate::ring::{Completion, Fd, Key, Op, Owner, Ring, accepted, is_single_failure};
use crate::stream::{Received, SendEnd, Stream, StreamId};

/// Connections that wait to be accepted; the peer needs two.
const BACKLOG: i32 = 5;
/// Sockets at the same time: the pair in use, the pair being collected, and strangers that have
/// not shown who they are (the core drops those after a time).
const SOCKETS_MAX: usize = 16;
/// Pause before another attempt to listen, or to accept.
const LISTEN_RETRY: Span = Span::from_secs(1);

#[derive(Debug)]
struct Listener {
    fd: Fd,
    accepting: Option<Key>,
    /// Accepting failed; when it is tried again.
    retry_at: Option<Time>,
}

#[derive(Debug)]
struct Peer {
    id: SockId,
    stream: Stream,
    reader: Reader,
    /// Packets handed to the stream.
    queued: u64,
    /// The end was seen, but packets before it are not delivered yet.
    ending: Option<SockGone>,
    /// Being closed; what will be reported.
    ended: Option<SockGone>,
}

impl Listener {
    fn accept(&mut self, shared: &mut Shared, count: u32) {
        self.retry_at = None;
        self.accepting = Some(shared.ring.push(&self.fd, Op::Accept, Owner::PeerAccept(count)));
    }
}

/// The sockets of the replication link.
#[derive(Debug)]
pub struct Net {
    local: SocketAddr,
    remote: SocketAddr,
    connect_limit: Duration,
    sndbuf: usize,
    rcvbuf: usize,
    listener: Option<Listener>,
    /// Counts listening sockets, to tell a late accept of an earlier one.
    listeners: u32,
    listen_retry_at: Option<Time>,
    listen_error: String,
    dials: Vec<(DialId, Fd)>,
    peers: Vec<Peer>,
    next_sock: u32,
    marks: Vec<u64>,
}

impl Net {
    /// Nothing is open yet.
    #[must_use]
    pub fn new(local: SocketAddr, remote: SocketAddr, config: &NetConfig) -> Self {
        let mut net = Self {
            local,
            remote,
            connect_limit: Duration::ZERO,
            sndbuf: 0,
            rcvbuf: 0,
            listener: None,
            listeners: 0,
            listen_retry_at: None,
            listen_error: String::new(),
            dials: Vec::new(),
            peers: Vec::with_capacity(SOCKETS_MAX),
            next_sock: 0,
            marks: Vec::new(),
        };
        net.adjust(config);
        net
    }

    /// Takes over changed options, for sockets that are made from now on.
    pub fn adjust(&mut self, config: &NetConfig) {
        self.connect_limit = Duration::from_nanos(config.connect_int.0);
        self.sndbuf = usize::try_from(config.sndbuf_size).expect("a buffer size has 32 bits");
        self.rcvbuf = usize::try_from(config.rcvbuf_size).expect("a buffer size has 32 bits");
    }

    /// When [`Net::on_tick`] is wanted.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let accept_at = self.listener.as_ref().and_then(|listener| listener.retry_at);
        self.listen_retry_at.into_iter().chain(accept_at).min()
    }

    /// Does what is due.
    pub fn on_tick(&mut self, shared: &mut Shared) {
        if self.listen_retry_at.is_some_and(|at| at <= shared.now()) {
            self.listen(shared, true);
        }
        let now = shared.now();
        if let Some(listener) = &mut self.listener
            && listener.retry_at.is_some_and(|at| at <= now)
        {
            listener.accept(shared, self.listeners);
        }
    }

    /// Opens or closes the listening socket.
    pub fn listen(&mut self, shared: &mut Shared, wanted: bool) {
        self.listen_retry_at = None;
        if !wanted {
            if let Some(Listener { accepting: Some(key), .. }) = self.listener.take() {
                shared.ring.cancel(key);
            }
            return;
        }
        if self.listener.is_some() {
            return;
        }
        match self.open_listener() {
            Ok(fd) => {
                self.listeners = self.listeners.wrapping_add(1);
                let mut listener = Listener { fd, accepting: None, retry_at: None };
                listener.accept(shared, self.listeners);
                self.listener = Some(listener);
                self.listen_error.clear();
            }
            Err(error) => {
                let text = format!("{error:#}");
                if text != self.listen_error {
                    tracing::error!("{text}; trying again every second");
                    self.listen_error = text;
                }
                self.listen_retry_at = Some(shared.now() + LISTEN_RETRY);
            }
        }
    }

    /// Starts an attempt to connect.
    pub fn dial(&mut self, shared: &mut Shared, dial: DialId) {
        match self.open_dial() {
            Ok(fd) => {
                let address = SockaddrStorage::from(self.remote);
                let op = Op::Connect { address, limit: self.connect_limit };
                shared.ring.push(&fd, op, Owner::Dial(dial));
                self.dials.push((dial, fd));
            }
            Err(errno) => {
                shared.tell(Event::DialDone { dial, result: Err(Errno(errno as i32)) });
            }
        }
    }

    /// An attempt to connect ended.
    pub fn on_dialled(&mut self, shared: &mut Shared, dial: DialId, completion: &Completion) {
        let place = self.dials.iter().position(|(id, _)| *id == dial);
        let (_, fd) = self.dials.swap_remove(place.expect("each dial has its socket"));
        let result = match completion.outcome() {
            Ok(_) => self.add_peer(fd),
            // The time limit cancels the attempt.
            Err(Errno(libc::ECANCELED)) => Err(Errno(libc::ETIMEDOUT)),
            Err(errno) => Err(errno),
        };
        shared.tell(Event::DialDone { dial, result });
    }

    /// Someone connected, or the listening socket failed.
    pub fn on_accepted(&mut self, shared: &mut Shared, count: u32, completion: Completion) {
        let result = accepted(completion);
        let current = count == self.listeners;
        let Some(listener) = self.listener.as_mut().filter(|_| current) else {
            // The listening socket is closed; the connection goes the same way.
            return;
        };
        listener.accepting = None;
        match &result {
            Err(errno) if !is_single_failure(*errno) => {
                listener.retry_at = Some(shared.now() + LISTEN_RETRY);
            }
            Ok(_) | Err(_) => listener.accept(shared, count),
        }
        match result {
            Ok(_) if self.peers.len() >= SOCKETS_MAX => {
                tracing::warn!("a connection was refused: {SOCKETS_MAX} sockets are open");
            }
            // A shared secret protects the connection; this keeps strangers from using up sockets.
            Ok(fd) if peer_ip(&fd).is_none_or(|ip| ip != self.remote.ip()) => {
                tracing::debug!("a connection to {} came from another host", self.local);
            }
            Ok(fd) => match self.add_peer(Rc::new(fd)) {
                Ok(sock) => shared.tell(Event::Accepted { sock }),
                Err(errno) => tracing::warn!("a connection was dropped: socket options: {errno}"),
            },
            Err(errno) => tracing::debug!("accept on {}: {errno}", self.local),
        }
    }

    /// Queues a packet. It leaves with [`Net::flush`].
    pub fn send(
        &mut self,
        shared: &Shared,
        sock: SockId,
        volume: VolumeNr,
        packet: &Packet,
        payload: Option<Buf>,
        kind: HeaderKind,
    ) {
        // A packet for a socket that is gone has crossed with the event that says so.
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == sock) else { return };
        peer.queued += 1;
        if let Some(batch) = peer.stream.batch() {
            batch.push_bytes(|out| {
                wire::encode(packet, volume, &shared.core.agreed(), kind, out);
            });
            if let Some(buf) = payload {
                let len = usize::try_from(packet.payload_len()).expect("lengths have 32 bits");
                batch.push_payload(buf, len);
            }
            batch.mark(peer.queued);
        }
    }

    /// Closes a socket on behalf of the core.
    pub fn close(&mut self, shared: &mut Shared, sock: SockId) {
        if let Some(index) = self.peers.iter().position(|peer| peer.id == sock) {
            self.end(shared, index, SockGone::Closed);
        }
    }

    /// Bytes came in, or the socket ended.
    pub fn on_received(&mut self, shared: &mut Shared, sock: SockId, completion: Completion) {
        let index = self.index(sock);
        let peer = &mut self.peers[index];
        match peer.stream.on_received(completion) {
            Received::Bytes { bulk } => peer.reader.on_bulk(bulk),
            Received::EndOfFile => peer.ending = Some(SockGone::EndOfFile),
            Received::Failed(errno) => peer.ending = Some(SockGone::Error(errno)),
        }
        self.settle(shared, index);
    }

    /// A batch was sent, or the socket failed.
    pub fn on_sent(&mut self, shared: &mut Shared, sock: SockId, completion: Completion) {
        let index = self.index(sock);
        let peer = &mut self.peers[index];
        self.marks.clear();
        match peer.stream.on_sent(completion, &mut self.marks) {
            SendEnd::Whole => {
                if let (Some(upto), None) = (self.marks.last(), &peer.ended) {
                    shared.tell(Event::Sent { sock, upto: *upto });
                }
            }
            SendEnd::Part => {}
            SendEnd::Failed(errno) => self.end(shared, index, SockGone::Error(errno)),
        }
        self.settle(shared, index);
    }

    /// Delivers what was received, as far as the core wants it. Whether there was anything.
    pub fn pump(&mut self, shared: &mut Shared) -> bool {
        let mut progress = false;
        let mut index = 0;
        while index < self.peers.len() {
            progress |= self.pump_peer(shared, index);
            index += 1;
        }
        progress
    }

    /// Sends what was queued.
    pub fn flush(&mut self, ring: &mut Ring) {
        for peer in &mut self.peers {
            peer.stream.start_send(ring);
        }
    }

    /// Closes everything; the core asked for it before, so this finds little.
    pub fn stop(&mut self, shared: &mut Shared) {
        self.listen(shared, false);
        for index in 0..self.peers.len() {
            self.end(shared, index, SockGone::Closed);
        }
    }

    /// Whether no socket is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn pump_peer(&mut self, shared: &mut Shared, index: usize) -> bool {
        let mut progress = false;
        loop {
            let peer = &mut self.peers[index];
            if peer.ended.is_some() || peer.stream.is_receiving() {
                return progress;
            }
            match peer.reader.next(&mut peer.stream, &mut shared.core, &shared.ring) {
                Step::Packet { volume, packet, payload } => {
                    progress = true;
                    let sock = peer.id;
                    shared.tell(Event::Packet { sock, volume, packet, payload });
                }
                Step::More(direct) => match peer.ending.take() {
                    Some(why) => {
                        self.end(shared, index, why);
                        return true;
                    }
                    None => {
                        peer.stream.start_receive(&mut shared.ring, direct);
                        return progress;
                    }
                },
                Step::Blocked => return progress,
                Step::Garbage(error) => {
                    self.end(shared, index, SockGone::Garbage(error));
                    return true;
                }
            }
        }
    }

    fn index(&self, sock: SockId) -> usize {
        let place = self.peers.iter().position(|peer| peer.id == sock);
        place.expect("a socket is kept until nothing of it is in flight")
    }

    fn end(&mut self, shared: &mut Shared, index: usize, why: SockGone) {
        let peer = &mut self.peers[index];
        if peer.ended.is_none() {
            peer.ended = Some(why);
            peer.stream.close(&mut shared.ring);
        }
    }

    fn settle(&mut self, shared: &mut Shared, index: usize) {
        let peer = &mut self.peers[index];
        if peer.ended.is_some() {
            peer.stream.continue_close(&mut shared.ring);
        }
    }

    /// Reports sockets of which nothing is in flight any more. Whether there were any.
    pub fn reap(&mut self, shared: &mut Shared) -> bool {
        let mut progress = false;
        while let Some(index) = self.peers.iter().position(|peer| peer.stream.is_idle()) {
            let mut peer = self.peers.swap_remove(index);
            if let Some(buf) = peer.reader.abandon() {
                shared.core.return_buffer(buf);
            }
            let why = peer.ended.take().expect("a stream is closed with a reason");
            shared.tell(Event::SockGone { sock: peer.id, why });
            progress = true;
        }
        progress
    }

    fn add_peer(&mut self, fd: Fd) -> Result<SockId, Errno> {
        self.set_options(&fd).map_err(|errno| Errno(errno as i32))?;
        let id = SockId(self.next_sock);
        self.next_sock = self.next_sock.checked_add(1).expect("fewer than 2^32 connections");
        let stream = Stream::new(StreamId::Peer(id), fd);
        let reader = Reader::new(id);
        self.peers.push(Peer { id, stream, reader, queued: 0, ending: None, ended: None });
        Ok(id)
    }

    fn open_listener(&self) -> Result<Fd> {
        let context = || format!("listen on {}", self.local);
        let fd = self.open_socket().with_context(context)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true).with_context(context)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(self.local)).with_context(context)?;
        let backlog = Backlog::new(BACKLOG).with_context(context)?;
        listen(&fd, backlog).with_context(context)?;
        Ok(Rc::new(fd))
    }

    fn open_dial(&self) -> nix::Result<Fd> {
        let fd = self.open_socket()?;
        let mut from = self.local;
        from.set_port(0);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
        Ok(Rc::new(fd))
    }

    /// A TCP socket; the receive buffer has to be set before there is a connection.
    fn open_socket(&self) -> nix::Result<OwnedFd> {
        let family = match self.local {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
        if self.rcvbuf > 0 {
            setsockopt(&fd, sockopt::RcvBuf, &self.rcvbuf)?;
        }
        Ok(fd)
    }

    fn set_options(&self, fd: &Fd) -> nix::Result<()> {
        setsockopt(fd, sockopt::TcpNoDelay, &true)?;
        if self.sndbuf > 0 {
            setsockopt(fd, sockopt::SndBuf, &self.sndbuf)?;
        }
        Ok(())
    }
}

/// The address of the other end; an IPv4 address in IPv6 clothes counts as IPv4.
fn peer_ip(fd: &OwnedFd) -> Option<IpAddr> {
    let name = getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
    let v4 = name.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| name.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()).to_canonical()))
}
