//! What two nodes that meet decide: may they talk, how large is the device, who copies to whom.
//!
//! Pure functions over what both nodes have announced; the connection and the volume call them
//! and carry out the result. Both nodes must come to mirrored results, because nothing on the
//! wire would notice a difference: they would wait for each other.
//!
//! Invariants: GI-3 to GI-6, GI-10, ST-7 (a failure corrects nothing). Rules: protocol notes 3.3
//! ([`check_protocol`]), 3.5 ([`agree_size`]), 3.6, 8 ([`PeerReport`]) and 9.5 ([`Handshake`]).

mod peer_state;
mod protocol;
mod size;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use peer_state::{Conclusion, PeerReport, Pending, Verdict};
pub use protocol::{Incompatible, ProtocolSettings, check_protocol};
pub use size::{
    AgreedSize, SizeConflict, Sizes, SizesDiskless, agree_size, agree_size_diskless, agree_user,
};

use crate::gi::{Compare, Comparison, Outcome, PeerUuids, Uuid, Uuids, compare};
use crate::split_brain::{self, Decision, Party, Policies, RrConflict};
use crate::state::{Conn, Disk, Role};

/// Everything that the decision over a resync depends on.
#[derive(Clone, Copy, Debug)]
pub struct Handshake<'a> {
    /// Our identifiers, as announced.
    pub own: &'a Uuids,
    /// Number of bits set in our bitmap, as announced.
    pub own_bits_set: u64,
    /// We went down as Primary and have not been in sync since.
    pub own_crashed: bool,
    /// Our role.
    pub own_role: Role,
    /// Our disk; while it is Negotiating, the state that the attach has read from the metadata.
    pub own_disk: Disk,
    /// Our disk is being attached on the running connection. Then nobody here uses its data, and
    /// a Primary may become target: it has been reading from the peer.
    pub own_attaching: bool,
    /// Our operator gave up our changes (`discard-my-data`).
    pub own_discard: bool,
    /// We own the resolve-conflicts flag.
    pub own_resolver: bool,
    /// What the peer announced in `P_UUIDS`.
    pub peer: &'a PeerUuids,
    /// The peer's role.
    pub peer_role: Role,
    /// The peer's disk, after Negotiating was replaced; see [`PeerReport`].
    pub peer_disk: Disk,
    /// The agreed protocol version.
    pub agreed_version: u32,
    /// The WSAME feature is agreed.
    pub wsame_feature: bool,
    /// The policies for split brain.
    pub policies: Policies,
    /// `always-asbp`: the policies also apply when the bitmaps do not cover the difference.
    pub always_asbp: bool,
    /// `rr-conflict`.
    pub rr_conflict: RrConflict,
    /// One of the two sides only wants to know what would happen.
    pub dry_run: bool,
}

/// How a split brain was solved. Displays as the words that operators search for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Solved {
    /// By a policy.
    Automatic {
        /// Number of nodes that are Primary.
        primaries: u8,
        /// Our data is kept.
        from_here: bool,
    },
    /// By `discard-my-data` on one side.
    Manually {
        /// Our data is kept.
        from_here: bool,
    },
}

impl fmt::Display for Solved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from_here = match self {
            Self::Automatic { primaries, from_here } => {
                write!(f, "Split-Brain detected, {primaries} primaries, automatically solved.")?;
                *from_here
            }
            Self::Manually { from_here } => {
                f.write_str("Split-Brain detected, manually solved.")?;
                *from_here
            }
        };
        write!(f, " Sync from {} node", if from_here { "this" } else { "peer" })
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncDecision {
    /// Connected, WFBitMapS or WFBitMapT.
    pub conn: Conn,
    /// Set all bits of our bitmap, durably, before the bitmaps are exchanged.
    pub full: bool,
    /// What the identifiers alone said, for the log.
    pub comparison: Comparison,
    /// How a split brain was solved, for the log and the handlers.
    pub solved: Option<Solved>,
    /// We lose by a policy that wants us demoted first. If that is not possible, the split brain
    /// stands: treat it as [`HandshakeFailure::SplitBrain`].
    pub demote_first: bool,
    /// We become target although we are Primary, as `rr-conflict` allows: to be warned of.
    pub overwrites_primary: bool,
}

/// Why there is no agreement. The connection ends; what each node has stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeFailure {
    /// Both have changes that the other one lacks, and nothing says whose are to be kept.
    #[error("Split-Brain detected but unresolved, dropping connection!")]
    SplitBrain,
    /// The two disks never held the same data.
    #[error("Unrelated data, aborting!")]
    Unrelated,
    /// Our data would be kept, but it is not usable.
    #[error("this node would be the source of the resync, but its disk is only {disk}")]
    NotGoodEnough {
        /// Our disk.
        disk: Disk,
    },
    /// Our data would be overwritten while it is in use here.
    #[error(
        "this node is Primary and would be the target of the resync (rr-conflict is {policy}); \
         make it Secondary first"
    )]
    RoleConflict {
        /// The policy; with [`RrConflict::CallPriLost`] the pri-lost handler is to be called.
        policy: RrConflict,
    },
    /// The agreed protocol is too old for this situation.
    #[error("this situation needs peers with at least protocol version {expected}")]
    NeedsProtocol {
        /// The least version.
        expected: u32,
    },
    /// The agreed features are too few for this situation.
    #[error("a primary has crashed, and resolving that needs the WSAME feature on both nodes")]
    NeedsFeature,
    /// The identifiers cannot have come about by any sequence of operations.
    #[error(
        "the generation identifiers contradict each other; \
         create new metadata on the node whose data is to be given up"
    )]
    Contradictory,
    /// It was only asked what would happen.
    #[error("dry-run connect: this node would become {conn} ({amount})", amount = amount(*full))]
    DryRun {
        /// The state that would have been entered.
        conn: Conn,
        /// Whether everything would be copied.
        full: bool,
    },
}

const fn amount(full: bool) -> &'static str {
    if full { "full resync" } else { "by bitmap" }
}

impl HandshakeFailure {
    /// Whether the connection is to be tried again. All other failures end in StandAlone.
    #[must_use]
    pub const fn may_retry(self) -> bool {
        match self {
            Self::DryRun { .. } => true,
            Self::SplitBrain
            | Self::Unrelated
            | Self::NotGoodEnough { .. }
            | Self::RoleConflict { .. }
            | Self::NeedsProtocol { .. }
            | Self::NeedsFeature
            | Self::Contradictory => false,
        }
    }
}

/// Where data flows, before it is known whether that is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    None,
    Source { full: bool },
    Target { full: bool, demote_first: bool },
}

impl Flow {
    const fn conn(self) -> Conn {
        match self {
            Self::None => Conn::Connected,
            Self::Source { .. } => Conn::WFBitMapS,
            Self::Target { .. } => Conn::WFBitMapT,
        }
    }

    const fn is_full(self) -> bool {
        match self {
            Self::None => false,
            Self::Source { full } | Self::Target { full, .. } => full,
        }
    }

    const fn demotes_first(self) -> bool {
        match self {
            Self::None | Self::Source { .. } => false,
            Self::Target { demote_first, .. } => demote_first,
        }
    }

    const fn from_winner(own_wins: bool, full: bool) -> Self {
        if own_wins { Self::Source { full } } else { Self::Target { full, demote_first: false } }
    }
}

impl Handshake<'_> {
    /// Decides who copies to whom.
    ///
    /// # Errors
    /// The reason why the two nodes cannot be connected as they are.
    pub fn decide(&self) -> Result<SyncDecision, HandshakeFailure> {
        assert!(self.own_disk != Disk::Negotiating, "the attach has determined a state");
        let comparison = self.compare();
        let (flow, solved) = self.flow(comparison.outcome)?;
        let overwrites_primary = self.check_possible(flow)?;
        let (conn, full) = (flow.conn(), flow.is_full());
        if self.dry_run {
            return Err(HandshakeFailure::DryRun { conn, full });
        }
        let demote_first = flow.demotes_first();
        Ok(SyncDecision { conn, full, comparison, solved, demote_first, overwrites_primary })
    }

    /// What the identifiers alone say.
    #[must_use]
    pub fn compare(&self) -> Comparison {
        compare(&Compare {
            own: self.own,
            own_crashed: self.own_crashed,
            own_role: self.own_role,
            own_resolver: self.own_resolver,
            peer: self.peer,
            peer_crashed: self.peer.flags.crashed_primary,
            peer_role: self.peer_role,
            agreed_version: self.agreed_version,
            wsame_feature: self.wsame_feature,
        })
    }

    /// The direction: by disk states if they differ in usability, else by identifiers, else by
    /// the ways out of a split brain.
    fn flow(&self, outcome: Outcome) -> Result<(Flow, Option<Solved>), HandshakeFailure> {
        let (identified, doubtful) = match outcome {
            Outcome::NoSync => (Some(Flow::None), false),
            Outcome::Source { full } => (Some(Flow::from_winner(true, full)), full),
            Outcome::Target { full } => (Some(Flow::from_winner(false, full)), full),
            Outcome::SplitBrain { bitmaps_usable } => (None, !bitmaps_usable),
            Outcome::Unrelated => return Err(HandshakeFailure::Unrelated),
            Outcome::NeedsProtocol(expected) => {
                return Err(HandshakeFailure::NeedsProtocol { expected });
            }
            Outcome::NeedsFeature => return Err(HandshakeFailure::NeedsFeature),
            Outcome::Contradictory => return Err(HandshakeFailure::Contradictory),
        };
        if let Some(own_better) = self.only_usable_disk() {
            return Ok((Flow::from_winner(own_better, doubtful), None));
        }
        match identified {
            Some(flow) => Ok((flow, None)),
            None => self.solve_split_brain(doubtful),
        }
    }

    /// If exactly one of the disks is Inconsistent and the other one better: whether ours is the
    /// better one.
    fn only_usable_disk(&self) -> Option<bool> {
        let own_bad = self.own_disk == Disk::Inconsistent && self.peer_disk > Disk::Inconsistent;
        let peer_bad = self.peer_disk == Disk::Inconsistent && self.own_disk > Disk::Inconsistent;
        if own_bad || peer_bad { Some(peer_bad) } else { None }
    }

    /// The policies, then the operator's word. With `doubtful` bitmaps everything is copied,
    /// also when the operator chose the victim (GI-4): a peer that would go by bitmap then still
    /// ends up with our full one, because the bitmaps are merged.
    fn solve_split_brain(
        &self,
        doubtful: bool,
    ) -> Result<(Flow, Option<Solved>), HandshakeFailure> {
        if (!doubtful || self.always_asbp)
            && let Some(decision) = self.ask_policies()
        {
            let primaries = split_brain::primaries(self.own_role, self.peer_role);
            let flow = match decision {
                Decision::Source => Flow::Source { full: doubtful },
                Decision::Target => Flow::Target { full: doubtful, demote_first: false },
                Decision::TargetAfterDemotion => {
                    Flow::Target { full: doubtful, demote_first: true }
                }
            };
            let from_here = !decision.own_loses();
            return Ok((flow, Some(Solved::Automatic { primaries, from_here })));
        }
        let from_here = match (self.own_discard, self.peer.flags.discard_my_data) {
            (true, false) => false,
            (false, true) => true,
            (false, false) | (true, true) => return Err(HandshakeFailure::SplitBrain),
        };
        let flow = Flow::from_winner(from_here, doubtful);
        Ok((flow, Some(Solved::Manually { from_here })))
    }

    fn ask_policies(&self) -> Option<Decision> {
        let own = Party {
            role: self.own_role,
            bitmap_role_bit: self.own.bitmap.role_bit(),
            bits_set: self.own_bits_set,
        };
        let peer = Party {
            role: self.peer_role,
            bitmap_role_bit: self.peer.uuids.bitmap.role_bit(),
            bits_set: self.peer.bits_set,
        };
        split_brain::resolve(self.policies, &own, &peer, self.own_resolver)
    }

    /// Whether this node can take its part; true if a running Primary is overwritten by that.
    fn check_possible(&self, flow: Flow) -> Result<bool, HandshakeFailure> {
        match flow {
            Flow::None => Ok(false),
            Flow::Source { .. } => {
                if self.own_disk <= Disk::Inconsistent {
                    return Err(HandshakeFailure::NotGoodEnough { disk: self.own_disk });
                }
                Ok(false)
            }
            Flow::Target { demote_first, .. } => {
                let in_use = self.own_role == Role::Primary
                    && self.own_disk >= Disk::Consistent
                    && !self.own_attaching;
                if !in_use || demote_first {
                    return Ok(false);
                }
                match self.rr_conflict {
                    RrConflict::Violently => Ok(true),
                    policy @ (RrConflict::Disconnect | RrConflict::CallPriLost) => {
                        Err(HandshakeFailure::RoleConflict { policy })
                    }
                }
            }
        }
    }
}

/// A Primary that reads from its peer only goes on with the data that it has been reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node is Primary without a disk and was using generation {expected}, \
     but the peer has {found}"
)]
pub struct WrongData {
    /// The generation in use.
    pub expected: Uuid,
    /// The generation of the peer.
    pub found: Uuid,
}

/// Checks the `P_UUIDS` that comes first on a connection, or first after the peer attached a disk,
/// against the data that a Primary without a usable disk has been serving.
///
/// # Errors
/// [`WrongData`] if the peer holds another generation; the connection ends in StandAlone.
pub fn check_exposed_data(
    role: Role,
    disk: Disk,
    exposed: Uuid,
    peer: &PeerUuids,
) -> Result<(), WrongData> {
    let depends_on_peer = role == Role::Primary && disk < Disk::Inconsistent;
    if depends_on_peer && !exposed.same(peer.uuids.current) {
        return Err(WrongData { expected: exposed, found: peer.uuids.current });
    }
    Ok(())
}

/// Whether a `P_UUIDS` asks us to take our fresh disk for equal to the peer's. Only metadata that
/// was never used may be treated so: all 64 bits have to match.
#[must_use]
pub fn is_skip_initial_sync(conn: Conn, own: &Uuids, peer: &PeerUuids) -> bool {
    conn == Conn::Connected && own.current == Uuid::FRESH && peer.flags.skip_initial_sync
}

#[cfg(test)]
#[path = "handshake/tests.rs"]
mod tests;
#[cfg(test)]
#[path = "handshake/trace_tests.rs"]
mod trace_tests;
