//! The connection: from nothing to a pair of authenticated sockets, and back.
//!
//! Responsible for the two sockets (which is data, which is meta, what was sent and not yet
//! accepted by the system), for crossing attempts (WP-7), version agreement (WP-3),
//! authentication (WP-2) and keep-alive (WP-6). What the volumes say to each other over it is
//! [`crate::report`] and later.
//!
//! Packets of one connection are never applied to a later one (ORD-7): a connection is left only
//! when both sockets are gone and nothing of the peer's is in flight.
//!
//! Source: protocol notes, sections 2 and 3.

mod sockets;

pub(crate) use sockets::LeftOld;

use std::collections::VecDeque;

use arrayvec::ArrayVec;

use crate::action::{Action, Level, Scope};
use crate::event::{DialId, SockGone, SockId};
use crate::limits;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::slab::Key;
use crate::state::Conn;
use crate::units::{Buf, Errno, Span, Time, VolumeNr};
use crate::wire::{
    self, Agreed, AuthError, BodyPlan, Command, DecodeError, Header, HeaderKind, Packet, Stream,
    auth,
};

/// Pause before the next attempt after a handshake that failed early.
const RETRY_PAUSE: Span = Span::from_secs(1);

/// What memory becomes free when a packet was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// The payload of a host request, which may now be completed.
    Request(Key),
    /// Memory of the pool.
    Free(Buf),
    /// A part of a bitmap: the next may follow.
    Bitmap,
}

/// A socket of the connection.
#[derive(Debug)]
pub(crate) struct Sock {
    pub(crate) id: SockId,
    /// Packets given to the driver.
    sent: u64,
    /// Packets accepted by the system.
    accepted: u64,
    /// What becomes free, by packet number.
    holds: VecDeque<(u64, Hold)>,
    /// When the system last accepted something, or had nothing to accept.
    moved_at: Time,
    /// Dialed by this node, and never yet preferred to a socket that the peer dialed.
    is_first_choice: bool,
}

impl Sock {
    fn new(id: SockId, now: Time) -> Self {
        let holds = VecDeque::with_capacity(256);
        Self { id, sent: 0, accepted: 0, holds, moved_at: now, is_first_choice: false }
    }

    fn dialed(id: SockId, now: Time) -> Self {
        Self { is_first_choice: true, ..Self::new(id, now) }
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not wanted.
    Down,
    /// A pause before the next attempt.
    Pause { until: Time },
    /// An outgoing attempt is under way.
    Dialing,
    /// Waiting for the peer to connect.
    Waiting { until: Time },
    /// Both sockets are there; they must stay for a while.
    PairCheck { until: Time },
    /// Waiting for the peer's version.
    Features { until: Time },
    /// Waiting for the peer's challenge.
    Challenge { until: Time },
    /// Waiting for the peer's answer to our challenge.
    Response { until: Time },
    /// Packets of the volumes flow.
    Established,
    /// Waiting until nothing of the old connection is left.
    Leaving,
}

/// What comes after a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Then {
    /// Connect again at once.
    Reconnect,
    /// Connect again after a pause.
    ReconnectLater,
    /// Stay alone until the operator says otherwise.
    StandAlone,
}

/// A packet that waits until the bitmap transfer before it is complete.
#[derive(Debug)]
struct Deferred {
    volume: VolumeNr,
    packet: Packet,
    payload: Option<Buf>,
    hold: Option<Hold>,
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Link {
    /// The part of the connection state that all volumes share: up to `WFReportParams`, then
    /// `Connected`.
    pub(crate) conn: Conn,
    phase: Phase,
    then: Then,
    data: Option<Sock>,
    meta: Option<Sock>,
    /// Sockets that are being closed.
    closing: Vec<Sock>,
    /// Accepted sockets whose first packet has not come.
    fresh: ArrayVec<(SockId, Time), { limits::MAX_PENDING_ACCEPTS }>,
    dial: Option<DialId>,
    dials: u32,
    /// This node decides ties: it accepted the meta socket.
    pub(crate) is_resolver: bool,
    agreed: Option<Agreed>,
    challenge: [u8; limits::CHALLENGE_SIZE],
    /// On split brain, throw away this node's changes: for the next handshake only.
    pub(crate) discard_my_data: bool,
    pub(crate) peer_discards: bool,
    /// Split brain was found and the operator has not acted since.
    pub(crate) split_brain: bool,
    heard_at: Time,
    ping_sent: Option<Time>,
    /// Pings sent and answered on this connection.
    pub(crate) pings: u64,
    pub(crate) pongs: u64,
    pub(crate) established_at: Time,
    /// The peer has yet to say that it has agreed, too, with the first packet that follows
    /// authentication: until then the meta socket, which nothing authenticates, is left alone.
    protocol_due: Option<Time>,
    /// The peer asked to part and was told yes: when to stop waiting for it to close.
    parting: Option<Time>,
    /// Whose data counts as old once the peer has left.
    left_old: LeftOld,
    /// The peer is refused; until then it may read why, and come to the same conclusion (GI-6).
    refusing: Option<Time>,
    /// The meta socket went away in the handshake; until then the data socket may tell why.
    half_gone: Option<Time>,
    /// The volume whose bitmap is being sent; other data packets wait.
    pub(crate) bitmap_volume: Option<usize>,
    deferred: VecDeque<Deferred>,
}

impl Link {
    pub(crate) fn new() -> Self {
        Self {
            conn: Conn::StandAlone,
            phase: Phase::Down,
            then: Then::StandAlone,
            data: None,
            meta: None,
            closing: Vec::with_capacity(4),
            fresh: ArrayVec::new(),
            dial: None,
            dials: 0,
            is_resolver: false,
            agreed: None,
            challenge: [0; limits::CHALLENGE_SIZE],
            discard_my_data: false,
            peer_discards: false,
            split_brain: false,
            heard_at: Time::ZERO,
            ping_sent: None,
            pings: 0,
            pongs: 0,
            established_at: Time::ZERO,
            protocol_due: None,
            parting: None,
            left_old: LeftOld::default(),
            refusing: None,
            half_gone: None,
            bitmap_volume: None,
            deferred: VecDeque::new(),
        }
    }

    pub(crate) fn is_data(&self, sock: SockId) -> bool {
        self.data.as_ref().is_some_and(|s| s.id == sock)
    }

    fn is_meta(&self, sock: SockId) -> bool {
        self.meta.as_ref().is_some_and(|s| s.id == sock)
    }

    fn is_fresh(&self, sock: SockId) -> bool {
        self.fresh.iter().any(|(id, _)| *id == sock)
    }

    pub(crate) fn agreed(&self) -> Agreed {
        self.agreed.unwrap_or(Agreed::NOTHING)
    }

    /// Whether the volumes' packets may be sent and received.
    pub(crate) fn is_established(&self) -> bool {
        self.phase == Phase::Established
    }

    pub(crate) fn header_kind(&self, sock: SockId) -> HeaderKind {
        if self.is_data(sock) || self.is_meta(sock) {
            self.agreed().header_kind()
        } else {
            HeaderKind::H80
        }
    }

    fn stream(&self, sock: SockId, command: u16) -> Stream {
        let is_first = self.is_fresh(sock);
        if self.is_meta(sock) || (is_first && command == Command::InitialMeta.code()) {
            Stream::Meta
        } else {
            Stream::Data
        }
    }

    pub(crate) fn plan(
        &self,
        sock: SockId,
        header: &[u8],
    ) -> Result<(Header, BodyPlan), DecodeError> {
        let header = wire::decode_header(self.header_kind(sock), header)?;
        let stream = self.stream(sock, header.command);
        if !self.is_established() && !may_come_early(header.command) {
            return Err(DecodeError::UnknownCommand { stream, command: header.command });
        }
        let plan = wire::plan_body(stream, &header, &self.agreed())?;
        Ok((header, plan))
    }

    pub(crate) fn decode(
        &self,
        sock: SockId,
        header: &Header,
        fixed: &[u8],
    ) -> Result<Packet, DecodeError> {
        wire::decode(self.stream(sock, header.command), header, fixed, &self.agreed())
    }

    /// Looks for the peer as soon as nothing of the connection before is left.
    pub(crate) const fn begin_anew(&mut self) {
        (self.phase, self.then) = (Phase::Leaving, Then::Reconnect);
    }

    fn is_up(&self) -> bool {
        !matches!(self.phase, Phase::Down | Phase::Leaving | Phase::Pause { .. })
    }
}

impl Resource {
    /// Begins to look for the peer.
    pub(crate) fn start_connecting(&mut self) {
        assert!(self.link.closing.is_empty(), "nothing of the old connection is left");
        assert!(self.link.data.is_none() && self.link.meta.is_none(), "no socket is left");
        self.link.then = Then::Reconnect;
        self.set_link_state(Conn::WFConnection, "connecting");
        self.out.push(Action::Listen(true));
        self.dial();
    }

    fn dial(&mut self) {
        self.link.phase = Phase::Dialing;
        if self.link.dial.is_some() {
            return; // An older attempt is still under way: its end counts.
        }
        let dial = DialId(self.link.dials);
        self.link.dials = self.link.dials.wrapping_add(1);
        self.link.dial = Some(dial);
        self.out.push(Action::Dial { dial });
    }

    pub(crate) fn on_dial_done(&mut self, dial: DialId, result: Result<SockId, Errno>) {
        if self.link.dial != Some(dial) {
            self.ignored.stale_operations += 1;
            if let Ok(sock) = result {
                self.close_stray(sock);
            }
            return;
        }
        self.link.dial = None;
        self.again = true;
        match result {
            Ok(sock) if self.link.phase == Phase::Dialing => self.take_dialed(sock),
            Ok(sock) => self.close_stray(sock),
            Err(_) if self.link.phase == Phase::Dialing => self.wait_or_check(),
            Err(_) => {}
        }
    }

    fn take_dialed(&mut self, sock: SockId) {
        let now = self.now;
        if self.link.data.is_none() {
            self.link.data = Some(Sock::dialed(sock, now));
            self.send_on(Stream::Data, VolumeNr(0), Packet::InitialData, None, None);
        } else if self.link.meta.is_none() {
            self.link.meta = Some(Sock::dialed(sock, now));
            self.link.is_resolver = false;
            self.send_on(Stream::Meta, VolumeNr(0), Packet::InitialMeta, None, None);
        } else {
            self.close_stray(sock);
        }
        self.wait_or_check();
    }

    /// With a pair of sockets, see whether it lasts; else wait for the peer.
    fn wait_or_check(&mut self) {
        let net = &self.config.net;
        let now = self.now;
        if self.link.data.is_some() && self.link.meta.is_some() {
            let check = net.socket_check_timeout;
            let check = if check == Span::ZERO { net.ping_timeout } else { check };
            self.link.phase = Phase::PairCheck { until: now + check };
            return;
        }
        // A random seventh more or less keeps two nodes from meeting in lockstep.
        let base = net.connect_int.0;
        let spread = 2 * (base / 7);
        let part = self.random() % spread.max(1);
        self.link.phase = Phase::Waiting { until: now + Span(base - spread / 2 + part) };
    }

    pub(crate) fn on_accepted(&mut self, sock: SockId) {
        let wanted = matches!(
            self.link.phase,
            Phase::Dialing | Phase::Waiting { .. } | Phase::PairCheck { .. }
        );
        if !wanted || self.link.fresh.is_full() {
            self.close_stray(sock);
            return;
        }
        let until = self.now + self.handshake_timeout();
        self.link.fresh.push((sock, until));
    }

    fn handshake_timeout(&self) -> Span {
        self.config.net.ping_timeout.times(4)
    }

    fn close_stray(&mut self, sock: SockId) {
        self.link.closing.push(Sock::new(sock, self.now));
        self.out.push(Action::Close { sock });
    }

    fn on_first_packet(&mut self, sock: SockId, packet: &Packet) {
        self.link.fresh.retain(|(id, _)| *id != sock);
        match packet {
            Packet::InitialData => self.take_accepted(sock, Stream::Data),
            Packet::InitialMeta => self.take_accepted(sock, Stream::Meta),
            other => {
                let text = format!("{} as first packet: not our peer, closing", other.name());
                self.log(Level::Warn, Scope::Connection, text);
                self.close_stray(sock);
            }
        }
    }

    fn take_accepted(&mut self, sock: SockId, stream: Stream) {
        let new = Sock::new(sock, self.now);
        let slot = match stream {
            Stream::Data => &mut self.link.data,
            Stream::Meta => &mut self.link.meta,
        };
        let crossed = slot.is_some();
        if (self.config.net.keeps_own_dial || self.mutant.is_on(Mutant::KeepOwnDial))
            && let Some(own) = slot
            && std::mem::take(&mut own.is_first_choice)
        {
            // Both dialed at once. The peer gives up its attempt for ours; if it comes again, it
            // has not got ours.
            self.close_stray(sock);
            return;
        }
        if let Some(old) = slot.replace(new) {
            let sock = old.id;
            self.link.closing.push(old);
            self.out.push(Action::Close { sock });
        }
        if stream == Stream::Meta {
            self.link.is_resolver = true;
        }
        let is_pair = self.link.data.is_some() && self.link.meta.is_some();
        if is_pair {
            self.wait_or_check();
        } else if !crossed || stream == Stream::Data {
            self.dial();
        }
    }

    fn begin_features(&mut self) {
        self.out.push(Action::Listen(false));
        for (sock, _) in std::mem::take(&mut self.link.fresh) {
            self.close_stray(sock);
        }
        let until = self.now + self.handshake_timeout();
        self.link.phase = Phase::Features { until };
        let packet = Packet::ConnectionFeatures(wire::features::ours());
        self.send_on(Stream::Data, VolumeNr(0), packet, None, None);
    }

    /// Packets before the volumes may speak.
    fn on_handshake_packet(&mut self, packet: &Packet) {
        match (self.link.phase, packet) {
            (Phase::Features { .. }, Packet::ConnectionFeatures(theirs)) => {
                match wire::negotiate(theirs) {
                    Ok((version, features)) => {
                        let agreed = Agreed { version, features, ..Agreed::NOTHING };
                        self.link.agreed = Some(agreed);
                        let text = format!(
                            "Handshake to peer {} successful: Agreed network protocol version \
                             {version}",
                            self.config.peer
                        );
                        self.log(Level::Info, Scope::Connection, text);
                        self.begin_auth();
                    }
                    Err(e) => self.refuse_peer(&format!("incompatible peer: {e}")),
                }
            }
            (Phase::Challenge { .. }, Packet::AuthChallenge(theirs)) => {
                self.on_challenge(theirs);
            }
            (Phase::Response { .. }, Packet::AuthResponse(response)) => self.on_response(response),
            (Phase::Features { .. }, other) => {
                let text = format!("expected P_CONNECTION_FEATURES, received {}", other.name());
                self.refuse_peer(&text);
            }
            (Phase::Challenge { .. }, other) => {
                let text = format!(
                    "expected P_AUTH_CHALLENGE, received {}: the peer has no cram-hmac-alg \
                     configured",
                    other.name()
                );
                self.refuse_peer(&text);
            }
            (_, other) => {
                let text = format!("{} in the middle of the handshake", other.name());
                self.lose_link(Conn::ProtocolError, Then::ReconnectLater, &text);
            }
        }
    }

    fn begin_auth(&mut self) {
        if self.config.net.auth.is_none() {
            self.begin_report();
            return;
        }
        let mut challenge = [0; limits::CHALLENGE_SIZE];
        self.entropy.fill(&mut challenge);
        self.link.challenge = challenge;
        let until = self.now + self.handshake_timeout();
        self.link.phase = Phase::Challenge { until };
        let packet = Packet::AuthChallenge(challenge.iter().copied().collect());
        self.send_on(Stream::Data, VolumeNr(0), packet, None, None);
    }

    fn on_challenge(&mut self, theirs: &[u8]) {
        if let Err(e) = auth::check_challenge(&self.link.challenge, theirs) {
            self.refuse_peer(&format!("authentication of peer failed: {e}"));
            return;
        }
        let config = self.config.net.auth.as_ref().expect("only asked for when configured");
        let answer = auth::respond(config.alg, config.secret.as_bytes(), theirs);
        let until = self.now + self.handshake_timeout();
        self.link.phase = Phase::Response { until };
        self.send_on(Stream::Data, VolumeNr(0), Packet::AuthResponse(answer), None, None);
    }

    fn on_response(&mut self, response: &[u8]) {
        let config = self.config.net.auth.as_ref().expect("only asked for when configured");
        let size = config.alg.digest_size();
        let checked =
            auth::verify(config.alg, config.secret.as_bytes(), &self.link.challenge, response);
        let checked = if self.mutant.is_on(Mutant::TrustAnybody) { Ok(()) } else { checked };
        match checked {
            Ok(()) => {
                let text = format!("Peer authenticated using {size} bytes HMAC");
                self.log(Level::Info, Scope::Connection, text);
                self.begin_report();
            }
            Err(e @ (AuthError::Reflected | AuthError::WrongResponse)) => {
                self.refuse_peer(&format!("Authentication of peer failed: {e}"));
            }
            Err(e @ AuthError::ResponseSize { .. }) => {
                let text = format!("Authentication of peer failed: {e}");
                self.lose_link(Conn::ProtocolError, Then::ReconnectLater, &text);
            }
        }
    }

    fn begin_report(&mut self) {
        self.link.phase = Phase::Established;
        self.link.established_at = self.now;
        self.link.heard_at = self.now;
        self.link.protocol_due = Some(self.now + self.handshake_timeout());
        self.link.ping_sent = None;
        self.link.parting = None;
        self.link.pings = 0;
        self.link.pongs = 0;
        self.set_link_state(Conn::WFReportParams, "sockets and versions agreed");
        self.report_everything();
    }

    /// The peer cannot be worked with until somebody changes something. In the handshake it gets
    /// some time to find out by itself: a close at once could overtake what it has to know.
    pub(crate) fn refuse_peer(&mut self, text: &str) {
        if self.link.refusing.is_some() {
            return;
        }
        if !self.is_in_handshake() {
            self.lose_link(Conn::Disconnecting, Then::StandAlone, text);
            return;
        }
        self.log(Level::Error, Scope::Connection, text);
        self.link.refusing = Some(self.now + self.config.net.ping_timeout);
        self.again = true;
    }

    /// Whether the two nodes have not yet agreed on everything.
    fn is_in_handshake(&self) -> bool {
        match self.link.phase {
            Phase::Features { .. } | Phase::Challenge { .. } | Phase::Response { .. } => true,
            Phase::Established => self.is_handshaking(),
            Phase::Down
            | Phase::Pause { .. }
            | Phase::Dialing
            | Phase::Waiting { .. }
            | Phase::PairCheck { .. }
            | Phase::Leaving => false,
        }
    }

    /// Leaves the connection, or stops looking for one. `cause` is the state that says why.
    pub(crate) fn lose_link(&mut self, cause: Conn, then: Then, text: &str) {
        assert!(cause <= Conn::TearDown, "{cause} is no way to leave");
        if !self.link.is_up() {
            let paused = matches!(self.link.phase, Phase::Pause { .. });
            self.link.then = self.link.then.max(then);
            if paused && then == Then::StandAlone {
                self.link.phase = Phase::Leaving;
                self.again = true;
            }
            return;
        }
        self.link.half_gone = None;
        let is_refused = self.link.refusing.take().is_some();
        let then = if is_refused { Then::StandAlone } else { then };
        if !text.is_empty() {
            let level = if cause <= Conn::Unconnected && then == Then::StandAlone {
                Level::Error
            } else {
                Level::Warn
            };
            self.log(level, Scope::Connection, text);
        }
        if !self.link.is_established() {
            self.out.push(Action::Listen(false));
        }
        self.link.phase = Phase::Leaving;
        self.link.then = then;
        self.close_everything();
        self.set_link_state(cause, text);
        self.outdate_who_left();
        self.forget_peer();
        self.again = true;
    }

    fn close_everything(&mut self) {
        let link = &mut self.link;
        let fresh = std::mem::take(&mut link.fresh);
        let mut socks: ArrayVec<Sock, 2> = link.data.take().into_iter().collect();
        socks.extend(link.meta.take());
        for sock in socks {
            self.out.push(Action::Close { sock: sock.id });
            link.closing.push(sock);
        }
        for (sock, _) in fresh {
            self.close_stray(sock);
        }
    }

    /// Everything that was under way with the peer ends here.
    fn forget_peer(&mut self) {
        self.link.bitmap_volume = None;
        self.bitmap_sender = None;
        let deferred = std::mem::take(&mut self.link.deferred);
        for packet in deferred {
            match packet.hold {
                Some(hold) => self.release_hold(hold),
                None => assert!(packet.payload.is_none(), "payload always has a hold"),
            }
        }
        self.drop_peer_requests();
        self.lose_transfer_log();
        for volume in &mut self.volumes {
            volume.bitmap_out = false;
            volume.bitmap_in = None;
            volume.forget_sync_steps();
            volume.resync = None;
            volume.peer_uuids = None;
            volume.peer_sizes = None;
            volume.grows_to = None;
            volume.resync_after_grow = false;
            volume.uuids_due = false;
            volume.peer_was_forced = false;
        }
        self.save_bitmaps();
        let ordering = crate::resource::ordering_of(&self.config);
        self.epochs.reset(ordering);
        self.admin_connection_lost();
    }

    /// Ends the leaving of a connection when nothing of it is left.
    pub(crate) fn run_link(&mut self) {
        if self.link.phase != Phase::Leaving || !self.link.closing.is_empty() {
            return;
        }
        self.fail_remote_reads();
        if !self.peer_requests.is_empty() && !self.mutant.is_on(Mutant::AnswerOldConnection) {
            return;
        }
        // An attempt still under way is stale: its socket will be closed.
        self.link.dial = None;
        self.link.agreed = None;
        self.link.is_resolver = false;
        self.again = true;
        match self.link.then {
            Then::StandAlone => {
                self.link.phase = Phase::Down;
                self.link.discard_my_data = false;
                self.set_link_state(Conn::StandAlone, "");
            }
            Then::Reconnect => {
                self.set_link_state(Conn::Unconnected, "");
                self.start_connecting();
            }
            Then::ReconnectLater => {
                self.set_link_state(Conn::Unconnected, "");
                self.link.phase = Phase::Pause { until: self.now + RETRY_PAUSE };
            }
        }
    }

    /// Whether the connection is down and nothing of it is left.
    pub(crate) fn link_is_down(&self) -> bool {
        self.link.phase == Phase::Down
    }

    /// Takes a packet in.
    pub(crate) fn on_packet(
        &mut self,
        sock: SockId,
        volume: VolumeNr,
        packet: Packet,
        payload: Option<Buf>,
    ) {
        if self.link.is_fresh(sock) {
            self.on_first_packet(sock, &packet);
        } else if self.link.refusing.is_some() {
            // Read and thrown away, so that nothing of ours is lost with a reset.
        } else if self.link.is_data(sock) || self.link.is_meta(sock) {
            self.link.heard_at = self.now;
            if self.link.is_established() {
                self.receive(self.link.is_data(sock), volume, packet, payload);
                return;
            }
            self.on_handshake_packet(&packet);
        } else {
            self.ignored.stale_packets += 1;
        }
        if let Some(buf) = payload {
            self.free_buf(buf);
        }
    }

    pub(crate) fn on_sock_gone(&mut self, sock: SockId, why: SockGone) {
        self.again = true;
        if let Some(at) = self.link.closing.iter().position(|s| s.id == sock) {
            let gone = self.link.closing.swap_remove(at);
            for (_, hold) in gone.holds {
                self.release_hold(hold);
            }
            return;
        }
        if self.link.is_fresh(sock) {
            self.link.fresh.retain(|(id, _)| *id != sock);
            return;
        }
        let is_data = self.link.is_data(sock);
        if !is_data && !self.link.is_meta(sock) {
            self.ignored.stale_packets += 1;
            return;
        }
        let slot = if is_data { &mut self.link.data } else { &mut self.link.meta };
        let gone = slot.take().expect("it was just found");
        for (_, hold) in gone.holds {
            self.release_hold(hold);
        }
        self.on_half_gone(if is_data { "sock" } else { "msock" }, why);
    }

    fn on_half_gone(&mut self, which: &str, why: SockGone) {
        if self.link.refusing.is_some() {
            self.lose_link(Conn::Disconnecting, Then::StandAlone, "");
            return;
        }
        let is_garbage = matches!(why, SockGone::Garbage(_));
        if which == "msock" && self.is_in_handshake() && !is_garbage {
            self.link.half_gone = Some(self.now + self.config.net.ping_timeout);
            return;
        }
        match self.link.phase {
            Phase::Dialing | Phase::Waiting { .. } => {}
            Phase::PairCheck { .. } => self.dial(),
            Phase::Features { .. } | Phase::Challenge { .. } | Phase::Response { .. } => {
                let text = format!("{which} went away in the handshake: {}", gone_text(&why));
                match why {
                    SockGone::Garbage(_) => self.refuse_peer(&text),
                    SockGone::Closed | SockGone::EndOfFile | SockGone::Error(_) => {
                        self.lose_link(Conn::BrokenPipe, Then::ReconnectLater, &text);
                    }
                }
            }
            Phase::Established if self.link.parting.is_some() => {
                self.lose_link(Conn::TearDown, Then::Reconnect, "peer disconnected");
            }
            Phase::Established => {
                let text = format!("{which} {}", gone_text(&why));
                let (cause, then) = match why {
                    SockGone::Garbage(_) if which == "sock" => {
                        (Conn::ProtocolError, Then::Reconnect)
                    }
                    SockGone::Garbage(_) => (Conn::NetworkFailure, Then::Reconnect),
                    SockGone::Closed | SockGone::EndOfFile => (Conn::BrokenPipe, Then::Reconnect),
                    SockGone::Error(_) => (Conn::NetworkFailure, Then::Reconnect),
                };
                self.lose_link(cause, then, &text);
            }
            Phase::Down | Phase::Pause { .. } | Phase::Leaving => {
                unreachable!("no socket is in use while the connection is {:?}", self.link.phase)
            }
        }
    }
}

/// Packets of a peer that is not authenticated yet (WP-2): all of them are small.
fn may_come_early(command: u16) -> bool {
    [
        Command::InitialData,
        Command::InitialMeta,
        Command::ConnectionFeatures,
        Command::AuthChallenge,
        Command::AuthResponse,
        // Of a peer that has no authentication configured: refused by name.
        Command::Protocol,
    ]
    .iter()
    .any(|known| known.code() == command)
}

fn gone_text(why: &SockGone) -> String {
    match why {
        SockGone::Closed => String::from("was closed"),
        SockGone::EndOfFile => String::from("was shut down by peer"),
        SockGone::Error(errno) => format!("failed: {errno}"),
        SockGone::Garbage(e) => format!("carried no valid packet: {e}"),
    }
}
