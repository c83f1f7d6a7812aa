//! What goes through the sockets of a connection, and when silence ends it.
//!
//! One writer for each socket; nothing comes between the packets of a bitmap transfer. A peer that
//! is silent or accepts nothing is given up within configured bounds (WP-6). Only the data socket
//! is authenticated: the meta socket is used from the peer's `P_PROTOCOL` on (WP-2).

use super::{Deferred, Hold, Link, Phase, Then};
use crate::action::Action;
use crate::event::SockId;
use crate::limits;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::state::{Conn, Disk, Role};
use crate::units::{Buf, Time, VolumeNr};
use crate::wire::{Packet, Stream};
use arrayvec::ArrayVec;

/// Whose data counts as old once the peer has left.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LeftOld {
    pub(crate) ours: bool,
    pub(crate) theirs: bool,
}

impl Link {
    /// Packets of the data socket that the system has not accepted.
    pub(crate) fn unsent(&self) -> u64 {
        self.data.as_ref().map_or(0, |sock| sock.sent - sock.accepted)
    }

    /// Packets of the meta socket that the system has not accepted.
    pub(crate) fn unread_acks(&self) -> u64 {
        self.meta.as_ref().map_or(0, |sock| sock.sent - sock.accepted)
    }

    /// Whether the peer has yet to send `P_PROTOCOL`. It does so when it has our version and our
    /// answer to its challenge, and then it has a pair of sockets of its own (WP-2).
    pub(crate) fn waits_for_protocol(&self) -> bool {
        self.is_established() && self.protocol_due.is_some()
    }

    /// `P_PROTOCOL` has come.
    pub(crate) const fn protocol_came(&mut self) {
        self.protocol_due = None;
    }

    /// Whether the next packet may be taken from a socket: what came early stays in it.
    pub(crate) fn may_receive(&self, sock: SockId) -> bool {
        if self.is_fresh(sock) {
            // An attempt of this node may take long; the peer's need not wait for its end.
            return matches!(self.phase, Phase::Dialing | Phase::Waiting { .. });
        }
        match self.phase {
            Phase::Features { .. } | Phase::Challenge { .. } | Phase::Response { .. } => {
                self.is_data(sock)
            }
            Phase::Established => {
                self.is_data(sock) || (self.is_meta(sock) && !self.waits_for_protocol())
            }
            Phase::Down
            | Phase::Pause { .. }
            | Phase::Dialing
            | Phase::Waiting { .. }
            | Phase::PairCheck { .. }
            | Phase::Leaving => false,
        }
    }
}

impl Resource {
    pub(crate) fn on_sent(&mut self, sock: SockId, upto: u64) {
        let now = self.now;
        let link = &mut self.link;
        let socks = link.data.iter_mut().chain(link.meta.iter_mut()).chain(&mut link.closing);
        let Some(found) = socks.into_iter().find(|s| s.id == sock) else {
            self.ignored.stale_packets += 1;
            return;
        };
        assert!(upto <= found.sent, "the driver sends only what it was given");
        found.accepted = found.accepted.max(upto);
        found.moved_at = now;
        let mut free = std::mem::take(&mut self.sent_holds);
        while found.holds.front().is_some_and(|(nr, _)| *nr <= upto) {
            free.extend(found.holds.pop_front().map(|(_, hold)| hold));
        }
        for hold in free.drain(..) {
            self.release_hold(hold);
        }
        self.sent_holds = free;
    }

    pub(super) fn release_hold(&mut self, hold: Hold) {
        self.again = true;
        match hold {
            Hold::Request(key) => self.on_request_sent(key),
            Hold::Free(buf) => self.free_buf(buf),
            Hold::Bitmap => {}
        }
    }

    /// Sends on the data socket; without one the packet is dropped and its memory freed.
    pub(crate) fn send_data(
        &mut self,
        volume: VolumeNr,
        packet: Packet,
        payload: Option<Buf>,
        hold: Option<Hold>,
    ) {
        if self.link.bitmap_volume.is_some() {
            // Nothing may come between the packets of a bitmap.
            self.link.deferred.push_back(Deferred { volume, packet, payload, hold });
            return;
        }
        self.send_on(Stream::Data, volume, packet, payload, hold);
    }

    /// Sends a packet of a bitmap transfer.
    pub(crate) fn send_bitmap(&mut self, volume: VolumeNr, packet: Packet) {
        self.send_on(Stream::Data, volume, packet, None, Some(Hold::Bitmap));
    }

    /// A bitmap transfer is complete: what waited goes out.
    pub(crate) fn end_bitmap(&mut self) {
        self.link.bitmap_volume = None;
        let deferred = std::mem::take(&mut self.link.deferred);
        for Deferred { volume, packet, payload, hold } in deferred {
            self.send_data(volume, packet, payload, hold);
        }
    }

    /// Sends on the meta socket, if there is one.
    pub(crate) fn send_meta(&mut self, volume: VolumeNr, packet: Packet) {
        self.send_on(Stream::Meta, volume, packet, None, None);
    }

    pub(super) fn send_on(
        &mut self,
        stream: Stream,
        volume: VolumeNr,
        packet: Packet,
        payload: Option<Buf>,
        hold: Option<Hold>,
    ) {
        let kind = self.link.agreed().header_kind();
        let now = self.now;
        let slot = match stream {
            Stream::Data => self.link.data.as_mut(),
            Stream::Meta => self.link.meta.as_mut(),
        };
        let Some(sock) = slot else {
            if let Some(hold) = hold {
                self.release_hold(hold);
            }
            return;
        };
        if sock.sent == sock.accepted {
            sock.moved_at = now;
        }
        sock.sent += 1;
        if let Some(hold) = hold {
            sock.holds.push_back((sock.sent, hold));
        }
        let sock = sock.id;
        let volume = if packet.is_connection_level() { VolumeNr(0) } else { volume };
        self.out.push(Action::Send { sock, volume, packet, payload, kind });
    }

    /// Asks the peer for a sign of life now.
    pub(crate) fn send_ping(&mut self) {
        if self.link.is_established() {
            self.link.ping_sent = Some(self.now);
            self.link.pings += 1;
            self.send_meta(VolumeNr(0), Packet::Ping);
        }
    }

    pub(crate) fn on_ping_ack(&mut self) {
        self.link.pongs = self.link.pings.min(self.link.pongs + 1);
        if self.link.pongs == self.link.pings {
            self.link.ping_sent = None;
        }
        self.again = true;
        self.on_pinged();
    }

    /// The peer wants to part: no error, and it may come back.
    pub(crate) fn part_from_peer(&mut self, left_old: LeftOld) {
        self.link.left_old = left_old;
        self.link.parting = Some(self.now + self.config.net.ping_timeout);
    }

    /// Data cannot count as old while the nodes are connected: now they are not any more.
    pub(super) fn outdate_who_left(&mut self) {
        let left_old = std::mem::take(&mut self.link.left_old);
        for at in 0..self.volumes.len() {
            let mut state = self.volumes[at].state;
            if left_old.ours && state.disk > Disk::Outdated && state.role != Role::Primary {
                state.disk = Disk::Outdated;
                self.set_state(at, state, "outdated by the peer");
            }
            let mut state = self.volumes[at].state;
            if left_old.theirs && state.pdsk > Disk::Outdated {
                state.pdsk = Disk::Outdated;
                self.set_state(at, state, "the peer outdates itself");
            }
        }
    }

    pub(crate) fn link_deadline(&self) -> Option<Time> {
        let net = &self.config.net;
        let phase = match self.link.phase {
            Phase::Down | Phase::Dialing | Phase::Leaving => None,
            Phase::Pause { until }
            | Phase::Waiting { until }
            | Phase::PairCheck { until }
            | Phase::Features { until }
            | Phase::Challenge { until }
            | Phase::Response { until } => Some(until),
            Phase::Established => Some(match (self.link.protocol_due, self.link.ping_sent) {
                (Some(until), _) => until,
                (None, Some(sent)) => sent.max(self.link.heard_at) + net.ping_timeout,
                (None, None) => self.link.heard_at + net.ping_int,
            }),
        };
        let phase = match self.link.parting {
            Some(until) if self.link.is_established() => phase.map(|p| p.min(until)),
            Some(_) | None => phase,
        };
        let fresh = self.link.fresh.iter().map(|(_, until)| *until);
        let fresh = fresh.chain(self.link.refusing).chain(self.link.half_gone);
        fresh.chain(phase).chain(self.send_deadline()).min()
    }

    /// When a data socket that accepts nothing is given up (WP-6).
    pub(super) fn send_deadline(&self) -> Option<Time> {
        let net = &self.config.net;
        if net.ko_count == 0 || !self.link.is_established() {
            return None;
        }
        let stuck = self.link.data.as_ref().filter(|sock| sock.sent > sock.accepted)?;
        Some(stuck.moved_at + net.timeout.times(u64::from(net.ko_count)))
    }

    pub(crate) fn link_timers(&mut self) {
        let now = self.now;
        let late: ArrayVec<SockId, { limits::MAX_PENDING_ACCEPTS }> = self
            .link
            .fresh
            .iter()
            .filter(|(_, until)| *until <= now)
            .map(|(sock, _)| *sock)
            .collect();
        for sock in late {
            self.link.fresh.retain(|(id, _)| *id != sock);
            self.close_stray(sock);
        }
        if self.link.refusing.is_some_and(|until| until <= now) {
            self.lose_link(Conn::Disconnecting, Then::StandAlone, "");
        }
        if self.link.half_gone.is_some_and(|until| until <= now) {
            let then =
                if self.link.is_established() { Then::Reconnect } else { Then::ReconnectLater };
            self.lose_link(Conn::BrokenPipe, then, "msock went away in the handshake");
        }
        match self.link.phase {
            Phase::Pause { until } if until <= now => self.start_connecting(),
            Phase::Waiting { until } if until <= now => self.dial(),
            Phase::PairCheck { until } if until <= now => self.begin_features(),
            Phase::Features { until } | Phase::Challenge { until } | Phase::Response { until }
                if until <= now =>
            {
                self.lose_silent_peer();
            }
            Phase::Established => self.keep_alive(),
            Phase::Down
            | Phase::Dialing
            | Phase::Leaving
            | Phase::Pause { .. }
            | Phase::Waiting { .. }
            | Phase::PairCheck { .. }
            | Phase::Features { .. }
            | Phase::Challenge { .. }
            | Phase::Response { .. } => {}
        }
    }

    fn lose_silent_peer(&mut self) {
        let text = "the peer did not answer in the handshake";
        self.lose_link(Conn::NetworkFailure, Then::ReconnectLater, text);
    }

    pub(super) fn keep_alive(&mut self) {
        let now = self.now;
        if self.link.parting.is_some_and(|until| until <= now) {
            self.lose_link(Conn::TearDown, Then::Reconnect, "peer disconnected");
            return;
        }
        if self.send_deadline().is_some_and(|until| until <= now) {
            let net = &self.config.net;
            let text = format!(
                "the peer accepted no data within ko-count ({}) * timeout ({} * 0.1s)",
                net.ko_count,
                net.timeout.as_ms() / 100
            );
            self.lose_link(Conn::Timeout, Then::Reconnect, &text);
            return;
        }
        if let Some(until) = self.link.protocol_due {
            if until <= now {
                self.lose_silent_peer();
            }
            return;
        }
        match self.link.ping_sent {
            Some(sent) => {
                let last = sent.max(self.link.heard_at);
                let is_late = last + self.config.net.ping_timeout <= now;
                if is_late && self.mutant.is_on(Mutant::WaitForEver) {
                    self.send_ping();
                } else if is_late {
                    let text = "PingAck did not arrive in time.";
                    self.lose_link(Conn::NetworkFailure, Then::Reconnect, text);
                }
            }
            None => {
                if self.link.heard_at + self.config.net.ping_int <= now {
                    self.send_ping();
                }
            }
        }
    }
}
