//! The verdict over the identifiers of two nodes.
//!
//! Both nodes compute it on their own from mirrored input and must come to mirrored results
//! (GI-3). The order of the rules and their numbers are those of protocol notes section 9.4; the
//! numbers appear in logs. The kernel driver's rules are not mirrored for two inputs that no
//! sequence of operations produces; those are refused here as [`Outcome::Contradictory`] instead
//! of letting both nodes wait for each other.
//!
//! How many blocks are marked takes no part in it, because a mark does not say whose data is right:
//! a node marks what its peer has missed, but also what its own disk has failed to take, and two
//! nodes that are equal may both have marks left. So whoever writes what the peer will not have
//! begins a generation before (GI-1), and it is that which brings about the resync.

use std::fmt;

use super::{PeerUuids, Uuid, Uuids};
use crate::state::Role;

/// What is compared. "Own" is this node, "peer" the other one.
#[derive(Clone, Copy, Debug)]
pub struct Compare<'a> {
    /// Our identifiers.
    pub own: &'a Uuids,
    /// We went down as Primary and have not been in sync since.
    pub own_crashed: bool,
    /// Our role.
    pub own_role: Role,
    /// We own the resolve-conflicts flag; exactly one of the two nodes does.
    pub own_resolver: bool,
    /// What the peer announced.
    pub peer: &'a PeerUuids,
    /// The peer went down as Primary and has not been in sync since.
    pub peer_crashed: bool,
    /// The peer's role.
    pub peer_role: Role,
    /// The agreed protocol version.
    pub agreed_version: u32,
    /// The WSAME feature is agreed.
    pub wsame_feature: bool,
}

/// The verdict, from our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both have the same data.
    NoSync,
    /// Our data is newer.
    Source {
        /// The bitmap does not belong to the generation found: everything has to be copied.
        full: bool,
    },
    /// The peer's data is newer.
    Target {
        /// The bitmap does not belong to the generation found: everything has to be copied.
        full: bool,
    },
    /// Both have changes that the other one lacks.
    SplitBrain {
        /// Both bitmaps count from the same generation, so together they cover the difference.
        bitmaps_usable: bool,
    },
    /// The data has no common past.
    Unrelated,
    /// Peers of this protocol version cannot decide this situation.
    NeedsProtocol(u32),
    /// Peers without the WSAME feature cannot decide this situation.
    NeedsFeature,
    /// Each node's generation appears in the other one's past, or neither node has one: the
    /// metadata is damaged, and no direction is right.
    Contradictory,
}

impl Outcome {
    /// The same verdict seen from the other node.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::Source { full } => Self::Target { full },
            Self::Target { full } => Self::Source { full },
            Self::NoSync
            | Self::SplitBrain { .. }
            | Self::Unrelated
            | Self::NeedsProtocol(_)
            | Self::NeedsFeature
            | Self::Contradictory => self,
        }
    }

    /// The customary number for logs.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::NoSync => 0,
            Self::Source { full: false } => 1,
            Self::Source { full: true } => 2,
            Self::Target { full: false } => -1,
            Self::Target { full: true } => -2,
            Self::SplitBrain { bitmaps_usable: true } => 100,
            Self::SplitBrain { bitmaps_usable: false } => -100,
            Self::Unrelated => -1000,
            Self::NeedsProtocol(_) | Self::NeedsFeature => -1001,
            Self::Contradictory => -1002,
        }
    }
}

/// The verdict with its reason and what was learned about lost messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// The verdict.
    pub outcome: Outcome,
    /// The number of the rule; 0 if no rule matched.
    pub rule: u32,
    /// What our identifiers should be: we missed the start or the end of a resync.
    pub own_correction: Option<Uuids>,
    /// What the peer's identifiers should be, in our copy of them.
    pub peer_correction: Option<Uuids>,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uuid_compare()={} by rule={}", self.outcome.number(), self.rule)
    }
}

const fn verdict(outcome: Outcome, rule: u32) -> Comparison {
    Comparison { outcome, rule, own_correction: None, peer_correction: None }
}

const SOURCE: Outcome = Outcome::Source { full: false };
const SOURCE_FULL: Outcome = Outcome::Source { full: true };
const TARGET: Outcome = Outcome::Target { full: false };
const TARGET_FULL: Outcome = Outcome::Target { full: true };

/// The first protocol version whose peers repair identifiers after lost messages.
const REPAIR_VERSION: u32 = 91;
/// The first protocol version whose sync UUIDs are derived from the bitmap UUID.
const DERIVED_SYNC_VERSION: u32 = 96;

/// Whose data is newer?
#[must_use]
pub fn compare(input: &Compare<'_>) -> Comparison {
    let own = input.own.current;
    let peer = input.peer.uuids.current;
    let is_blank = |uuid: Uuid| uuid.same(Uuid::FRESH) || uuid.same(Uuid::ZERO);
    if own.same(Uuid::FRESH) && peer.same(Uuid::FRESH) {
        return verdict(Outcome::NoSync, 10);
    }
    if own.same(Uuid::ZERO) && peer.same(Uuid::ZERO) {
        return verdict(Outcome::Contradictory, 0);
    }
    if is_blank(own) && !peer.same(Uuid::FRESH) {
        return verdict(TARGET_FULL, 20);
    }
    if is_blank(peer) {
        return verdict(SOURCE_FULL, 30);
    }
    if own.same(peer) { compare_same(input) } else { compare_different(input) }
}

/// Rules 34 to 41: the same generation, but perhaps a resync that one side believes unfinished,
/// or writes that were cut off by a crash.
fn compare_same(input: &Compare<'_>) -> Comparison {
    let own = *input.own;
    let peer = input.peer.uuids;
    match (own.bitmap.is_zero(), peer.bitmap.is_zero()) {
        (true, true) | (false, false) => compare_crash(input),
        (false, true) | (true, false) if input.agreed_version < REPAIR_VERSION => {
            verdict(Outcome::NeedsProtocol(REPAIR_VERSION), 0)
        }
        (false, true) => {
            let missed_end = ended_resync(&own, &peer);
            Comparison {
                outcome: SOURCE,
                rule: if missed_end.is_some() { 34 } else { 36 },
                own_correction: missed_end,
                peer_correction: None,
            }
        }
        (true, false) => {
            let missed_end = ended_resync(&peer, &own);
            Comparison {
                outcome: TARGET,
                rule: if missed_end.is_some() { 35 } else { 37 },
                own_correction: None,
                peer_correction: missed_end,
            }
        }
    }
}

/// What the source of a resync should carry if the target's history shows that it has ended;
/// `None` if it does not.
fn ended_resync(source: &Uuids, target: &Uuids) -> Option<Uuids> {
    let ended = source.bitmap.same(target.history[0]) && source.history[0].same(target.history[1]);
    ended.then(|| {
        let mut corrected = *source;
        corrected.clear_bitmap();
        corrected
    })
}

/// Rules 40 and 41: equal generations; a Primary that crashed may have written a little more, or
/// less, than its peer.
fn compare_crash(input: &Compare<'_>) -> Comparison {
    let own_primary = input.own_role == Role::Primary;
    let peer_primary = input.peer_role == Role::Primary;
    if !input.own_crashed && !input.peer_crashed {
        return verdict(Outcome::NoSync, 40);
    }
    if own_primary || peer_primary {
        let outcome = match (input.wsame_feature, own_primary, peer_primary) {
            (false, _, _) => Outcome::NeedsFeature,
            (true, true, true) => Outcome::SplitBrain { bitmaps_usable: false },
            (true, true, false) => SOURCE,
            (true, false, _) => TARGET,
        };
        return verdict(outcome, 41);
    }
    let outcome = match (input.own_crashed, input.peer_crashed) {
        (true, false) => SOURCE,
        (false, true) => TARGET,
        (true, true) | (false, false) => {
            if input.own_resolver {
                TARGET
            } else {
                SOURCE
            }
        }
    };
    verdict(outcome, 40)
}

/// Rules 50 to 100: different generations.
fn compare_different(input: &Compare<'_>) -> Comparison {
    let own = input.own;
    let peer = &input.peer.uuids;
    let own_is_past = is_past_of(own.current, peer);
    let peer_is_past = is_past_of(peer.current, own);
    match (own_is_past, peer_is_past) {
        (true, true) => verdict(Outcome::Contradictory, 0),
        (true, false) => compare_past(input, own, peer),
        (false, true) => {
            let mirrored = compare_past(input, peer, own);
            Comparison {
                outcome: mirrored.outcome.mirrored(),
                // 50 to 53 and 60 become 70 to 73 and 80.
                rule: if mirrored.rule == 0 { 0 } else { mirrored.rule + 20 },
                own_correction: mirrored.peer_correction,
                peer_correction: None,
            }
        }
        (false, false) => compare_diverged(own, peer),
    }
}

fn is_past_of(uuid: Uuid, of: &Uuids) -> bool {
    [of.bitmap, of.history[0], of.history[1]].into_iter().any(|slot| slot.same(uuid))
}

/// Rules 50 to 53 and 60 in the view of the node with the older data.
fn compare_past(input: &Compare<'_>, old: &Uuids, new: &Uuids) -> Comparison {
    if old.current.same(new.bitmap) {
        return verdict(TARGET, 50);
    }
    if let Some(corrected) = gone_on_from_resync(input, old, new) {
        return corrected;
    }
    let base_known = new.history[0].same(old.current);
    let start_lost = base_known
        && if input.agreed_version < DERIVED_SYNC_VERSION {
            old.history[0].same(new.history[1])
        } else {
            new.history[0].is_base_of(new.bitmap)
        };
    if !start_lost {
        return verdict(TARGET_FULL, 60);
    }
    if input.agreed_version < REPAIR_VERSION {
        return verdict(Outcome::NeedsProtocol(REPAIR_VERSION), 0);
    }
    // The newer node rotated for a resync of which the older one never heard: undo that.
    let mut undone = *new;
    undone.undo_sync_start();
    Comparison { outcome: TARGET, rule: 51, own_correction: None, peer_correction: Some(undone) }
}

/// Rules 52 and 53: the newer node began a resync, lost its target, and went on in a generation of
/// its own without having heard how far it got. The kernel driver does neither, and takes both for
/// rule 60: such a peer copies everything.
fn gone_on_from_resync(input: &Compare<'_>, old: &Uuids, new: &Uuids) -> Option<Comparison> {
    if input.agreed_version < REPAIR_VERSION || new.bitmap.is_zero() {
        return None;
    }
    let [begun_in, base] = new.history;
    let has_ended = old.current.same(begun_in)
        && old.bitmap.is_zero()
        && old.history[0].same(new.bitmap)
        && old.history[1].same(base);
    let is_unheard = old.current.same(base) && base.is_base_of(new.bitmap);
    let (rule, corrected) = if has_ended {
        (52, new.with_resync_ended())
    } else if is_unheard {
        (53, new.with_resync_unheard())
    } else {
        return None;
    };
    let peer_correction = Some(corrected);
    Some(Comparison { outcome: TARGET, rule, own_correction: None, peer_correction })
}

/// Rules 90, 100 and "otherwise": neither generation is the past of the other.
fn compare_diverged(own: &Uuids, peer: &Uuids) -> Comparison {
    if own.bitmap.same(peer.bitmap) && !own.bitmap.same(Uuid::ZERO) {
        return verdict(Outcome::SplitBrain { bitmaps_usable: true }, 90);
    }
    // Two empty slots count as equal, so that short histories do not pass for unrelated data.
    let share = own.history.iter().any(|uuid| peer.history.iter().any(|other| uuid.same(*other)));
    // The kernel driver looks at the histories only, and takes such a pair for unrelated.
    if share || counts_from_past_of(own, peer) || counts_from_past_of(peer, own) {
        return verdict(Outcome::SplitBrain { bitmaps_usable: false }, 100);
    }
    verdict(Outcome::Unrelated, 0)
}

/// Whether the bitmap of one node counts from a generation in the other one's history.
fn counts_from_past_of(one: &Uuids, other: &Uuids) -> bool {
    let is_generation = !one.bitmap.same(Uuid::ZERO) && !one.bitmap.same(Uuid::FRESH);
    is_generation && other.history.iter().any(|uuid| uuid.same(one.bitmap))
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
