//! What a `P_STATE` of the peer means for a volume.
//!
//! Two steps, because the handshake may lie between them and needs data that only the caller has:
//! [`PeerReport::judge`] says what kind of news the packet is, and [`Pending::conclude`] turns it
//! and the result of the handshake into the state to enter. Invariants: ST-2, ST-3, GI-8 (the
//! source ends a resync only on the target's word). Rules: protocol notes section 8.

use super::{HandshakeFailure, SyncDecision};
use crate::gi::UuidFlags;
use crate::state::{
    Conn, Disk, Refused, Role, Rules, State, hard_limits, sanitize, validate_change,
};

/// A `P_STATE` and what is known when it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerReport {
    /// Our state.
    pub old: State,
    /// The state in the packet, in the peer's view.
    pub packet: State,
    /// The flags of the peer's `P_UUIDS`; `None` if it sent none on this connection.
    pub peer_flags: Option<UuidFlags>,
    /// Bits set in our bitmap.
    pub bits_set: u64,
    /// What the attach in progress has determined for our disk; `None` without one.
    pub negotiating: Option<Disk>,
    /// The peer was promoted by force, see [`crate::state::peer_was_forced`], and no `P_STATE`
    /// has come since.
    pub peer_forced: bool,
    /// We owe a new current UUID as soon as I/O is resumed.
    pub new_uuid_pending: bool,
}

/// What kind of news it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection is ending: the packet is dropped.
    Dropped,
    /// The target reports the end of the resync. Only its role is taken from the packet, too.
    ResyncEnd {
        /// Our bits are clear too: finish the resync. Otherwise we have marked what the target
        /// takes for equal, and have to begin anew.
        finish: bool,
    },
    /// The initiator of a verify reports its end: finish it. Nothing else is taken from it.
    VerifyEnd,
    /// The state changes. Call [`Pending::conclude`], with the result of the handshake if it
    /// [`Pending::needs_handshake`].
    Pending(Pending),
}

/// A report that was judged, waiting for the result of the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    report: PeerReport,
    peer_disk: Disk,
    conn: Conn,
    handshake: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// Enter the state, already sanitised and checked.
    Enter {
        /// The state.
        state: State,
        /// The connection is established by it.
        establishes: bool,
        /// The peer has not decided to resync yet: send `P_UUIDS` and `P_STATE`.
        answer: bool,
        /// The handshake failed, and only the attach in progress on one side is given up for it.
        attach_refused: Option<HandshakeFailure>,
    },
    /// The handshake failed: end the connection, in StandAlone or (with
    /// [`HandshakeFailure::may_retry`]) to try again.
    Failed(HandshakeFailure),
    /// The state may not be entered: end the connection in StandAlone.
    Refused(Refused),
    /// The peer has lost what we still hold back: it may have been restarted. Complete the frozen
    /// I/O by its local result, create the new current UUID, drop the connection as a protocol
    /// error.
    PeerRestarted,
}

impl PeerReport {
    /// The peer's disk, with Negotiating replaced by what the peer will make of it when alone.
    #[must_use]
    pub fn peer_disk(&self) -> Disk {
        if self.packet.disk != Disk::Negotiating {
            return self.packet.disk;
        }
        if self.peer_flags.is_some_and(|flags| flags.inconsistent) {
            Disk::Inconsistent
        } else {
            Disk::Consistent
        }
    }

    /// Judges the packet.
    #[must_use]
    pub fn judge(self) -> Verdict {
        let Self { old, packet, .. } = self;
        if old.conn <= Conn::TearDown {
            return Verdict::Dropped;
        }
        let mut peer_disk = self.peer_disk();
        if self.is_source_of_improving_peer(peer_disk) {
            if (Conn::StartingSyncS..=Conn::WFSyncUUID).contains(&packet.conn) {
                // It still prepares the resync and has not invalidated its disk yet.
                peer_disk = Disk::Inconsistent;
            } else if old.conn >= Conn::SyncSource && packet.conn == Conn::Connected {
                return Verdict::ResyncEnd { finish: self.bits_set == 0 };
            }
        }
        let both_good = old.disk == Disk::UpToDate && peer_disk == Disk::UpToDate;
        if old.conn == Conn::VerifyT && both_good && packet.conn == Conn::Connected {
            return Verdict::VerifyEnd;
        }
        if old.pdsk == Disk::UpToDate
            && peer_disk == Disk::Inconsistent
            && old.conn == Conn::Connected
            && packet.conn > Conn::SyncSource
        {
            // A late report from a resync that has ended here already.
            peer_disk = Disk::UpToDate;
        }
        if self.is_target_without_source() && peer_disk > Disk::Inconsistent {
            // It has not heard yet that the source's disk is gone; then it is Inconsistent.
            peer_disk = Disk::Inconsistent;
        }
        let conn = if packet.conn == Conn::Ahead {
            Conn::Behind
        } else if old.conn == Conn::WFReportParams {
            Conn::Connected
        } else {
            old.conn
        };
        let handshake = self.needs_handshake();
        Verdict::Pending(Pending { report: self, peer_disk, conn, handshake })
    }

    fn is_source_of_improving_peer(&self, peer_disk: Disk) -> bool {
        matches!(self.old.pdsk, Disk::Inconsistent | Disk::Consistent)
            && peer_disk == Disk::UpToDate
            && self.old.conn > Conn::Connected
            && self.old.disk == Disk::UpToDate
    }

    /// Whether the peer takes part in a resync for which this node has no disk any more.
    fn is_target_without_source(&self) -> bool {
        let is_target = matches!(
            self.packet.conn,
            Conn::StartingSyncT
                | Conn::WFBitMapT
                | Conn::WFSyncUUID
                | Conn::SyncTarget
                | Conn::PausedSyncT
        );
        is_target && self.old.conn == Conn::Connected && self.old.disk < Disk::Inconsistent
    }

    fn needs_handshake(&self) -> bool {
        let Self { old, packet, .. } = *self;
        let possible = self.peer_flags.is_some()
            && packet.disk >= Disk::Negotiating
            && old.disk >= Disk::Negotiating;
        let attaching = packet.disk == Disk::Negotiating || old.disk == Disk::Negotiating;
        let peer_starts = (Conn::StartingSyncS..=Conn::WFBitMapT).contains(&packet.conn);
        let wanted = old.conn < Conn::Connected
            || self.peer_forced
            || (old.conn == Conn::Connected && (attaching || peer_starts));
        possible && wanted
    }
}

impl Pending {
    /// Whether the handshake has to be run, see [`super::Handshake`].
    #[must_use]
    pub const fn needs_handshake(&self) -> bool {
        self.handshake
    }

    /// The peer's disk for the handshake.
    #[must_use]
    pub const fn peer_disk(&self) -> Disk {
        self.peer_disk
    }

    /// Our disk for the handshake: while it is Negotiating, what the attach has determined.
    ///
    /// # Panics
    /// If our disk is Negotiating and no state was determined for it: then the caller has lost
    /// its attach.
    #[must_use]
    pub fn own_disk(&self) -> Disk {
        if self.report.old.disk != Disk::Negotiating {
            return self.report.old.disk;
        }
        let determined = self.report.negotiating;
        determined.expect("an attach has read its metadata before it starts negotiating")
    }

    /// Whether our disk is being attached on the running connection, for the handshake.
    #[must_use]
    pub fn own_attaching(&self) -> bool {
        self.report.old.disk == Disk::Negotiating
    }

    /// What follows from the report and the handshake.
    ///
    /// # Panics
    /// If a result is missing although the handshake was needed, or the other way round.
    #[must_use]
    pub fn conclude(
        self,
        handshake: Option<Result<SyncDecision, HandshakeFailure>>,
        rules: &Rules,
    ) -> Conclusion {
        assert_eq!(self.handshake, handshake.is_some(), "run the handshake when it is needed");
        let PeerReport { old, packet, .. } = self.report;
        let mut new = State { conn: self.conn, ..old };
        let mut peer_disk = self.peer_disk;
        let mut attach_refused = None;
        match handshake {
            None => {}
            Some(Ok(decision)) => new.conn = decision.conn,
            Some(Err(failure)) if old.disk == Disk::Negotiating => {
                new.conn = Conn::Connected;
                new.disk = Disk::Failed;
                attach_refused = Some(failure);
            }
            Some(Err(failure)) if packet.disk == Disk::Negotiating => {
                new.conn = Conn::Connected;
                peer_disk = Disk::Diskless;
                attach_refused = Some(failure);
            }
            Some(Err(failure)) => return Conclusion::Failed(failure),
        }
        new.peer = packet.role;
        new.pdsk = peer_disk;
        new.peer_isp = packet.aftr_isp || packet.user_isp;
        if new.disk == Disk::Negotiating && matches!(new.conn, Conn::Connected | Conn::WFBitMapS) {
            new.disk = self.own_disk();
        }
        self.enter(new, attach_refused, rules)
    }

    fn enter(
        self,
        new: State,
        attach_refused: Option<HandshakeFailure>,
        rules: &Rules,
    ) -> Conclusion {
        let PeerReport { old, packet, new_uuid_pending, .. } = self.report;
        let is_new = old.conn < Conn::Connected;
        if is_new
            && new.conn == Conn::Connected
            && new.pdsk == Disk::Consistent
            && old.is_suspended()
            && new_uuid_pending
        {
            return Conclusion::PeerRestarted;
        }
        let state = sanitize(new, &old, rules);
        let establishes = is_new && state.conn >= Conn::Connected;
        let checked = if establishes {
            hard_limits(&old, &state).and_then(|()| validate_change(&old, &state, rules))
        } else {
            hard_limits(&old, &state)
        };
        if let Err(refused) = checked {
            return Conclusion::Refused(refused);
        }
        let answer = old.conn > Conn::WFReportParams
            && state.conn > Conn::Connected
            && packet.conn <= Conn::Connected
            && packet.disk != Disk::Negotiating;
        Conclusion::Enter { state, establishes, answer, attach_refused }
    }

    /// Whether the peer is Primary in the report.
    #[must_use]
    pub fn peer_is_primary(&self) -> bool {
        self.report.packet.role == Role::Primary
    }
}

#[cfg(test)]
#[path = "peer_state_tests.rs"]
mod tests;
