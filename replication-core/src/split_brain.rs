//! Automatic recovery from split brain: the policies, and what they decide.
//!
//! Both nodes decide on their own from mirrored input and never choose differently (GI-6, GI-3);
//! without a decision both refuse. Whether a demotion that a policy asks for works is for the
//! caller to try. Rules: protocol notes 3.3 (numbers) and 9.5.1; names: configuration language.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::state::Role;

/// A word that is no value of a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{found}' is no value of {policy}; expected one of: {expected}")]
pub struct UnknownPolicy {
    /// The option.
    pub policy: &'static str,
    /// The word found, escaped.
    pub found: String,
    /// The words accepted.
    pub expected: String,
}

/// Declares a policy whose values have a number on the wire and a word in the configuration.
macro_rules! policy {
    ($(#[$meta:meta])* $name:ident, $option:literal {
        $($(#[$doc:meta])* $variant:ident = $code:literal, $word:literal;)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The number of the value in `P_PROTOCOL`.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)+ }
            }

            /// The value with that number; `None` if it has no meaning for this policy.
            #[must_use]
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }

            /// The word in the configuration language.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = UnknownPolicy;

            fn from_str(word: &str) -> Result<Self, UnknownPolicy> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(UnknownPolicy {
                        policy: $option,
                        found: word.escape_default().to_string(),
                        expected: [$($word,)+].join(", "),
                    }),
                }
            }
        }
    };
}

policy! {
    /// What to do when no node is Primary (`after-sb-0pri`).
    AfterSb0Pri, "after-sb-0pri" {
        /// No decision.
        #[default]
        Disconnect = 0, "disconnect";
        /// The node that became Primary last loses.
        DiscardYoungerPrimary = 1, "discard-younger-primary";
        /// The node that became Primary first loses.
        DiscardOlderPrimary = 2, "discard-older-primary";
        /// A node without any change loses.
        DiscardZeroChanges = 3, "discard-zero-changes";
        /// The node with fewer changes loses.
        DiscardLeastChanges = 4, "discard-least-changes";
        /// This node loses.
        DiscardLocal = 5, "discard-local";
        /// The other node loses.
        DiscardRemote = 6, "discard-remote";
    }
}

policy! {
    /// What to do when one node is Primary (`after-sb-1pri`).
    AfterSb1Pri, "after-sb-1pri" {
        /// No decision.
        #[default]
        Disconnect = 0, "disconnect";
        /// The decision without Primaries, if it makes the Secondary lose.
        Consensus = 7, "consensus";
        /// The Secondary loses.
        DiscardSecondary = 8, "discard-secondary";
        /// The decision without Primaries; a Primary that loses is demoted first.
        CallPriLost = 9, "call-pri-lost-after-sb";
        /// The decision without Primaries, whatever becomes of a Primary's data in use.
        Violently = 10, "violently-as0p";
    }
}

policy! {
    /// What to do when both nodes are Primary (`after-sb-2pri`).
    AfterSb2Pri, "after-sb-2pri" {
        /// No decision.
        #[default]
        Disconnect = 0, "disconnect";
        /// The decision without Primaries; the Primary that loses is demoted first.
        CallPriLost = 9, "call-pri-lost-after-sb";
        /// The decision without Primaries, whatever becomes of a Primary's data in use.
        Violently = 10, "violently-as0p";
    }
}

policy! {
    /// What to do when a Primary would have to become the target of a resync (`rr-conflict`).
    /// Local to each node, never sent.
    RrConflict, "rr-conflict" {
        /// Refuse to connect.
        #[default]
        Disconnect = 0, "disconnect";
        /// Call the pri-lost handler and refuse to connect.
        CallPriLost = 9, "call-pri-lost";
        /// Resync under the running application.
        Violently = 10, "violently";
    }
}

impl AfterSb0Pri {
    /// The value that the other node has to have.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::DiscardLocal => Self::DiscardRemote,
            Self::DiscardRemote => Self::DiscardLocal,
            Self::Disconnect
            | Self::DiscardYoungerPrimary
            | Self::DiscardOlderPrimary
            | Self::DiscardZeroChanges
            | Self::DiscardLeastChanges => self,
        }
    }
}

impl AfterSb1Pri {
    /// The value that the other node has to have: the same one.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        self
    }
}

impl AfterSb2Pri {
    /// The value that the other node has to have: the same one.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        self
    }
}

/// The three policies as agreed with the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// Without a Primary.
    pub after_sb_0pri: AfterSb0Pri,
    /// With one Primary.
    pub after_sb_1pri: AfterSb1Pri,
    /// With two Primaries.
    pub after_sb_2pri: AfterSb2Pri,
}

impl Policies {
    /// The policies that the other node has to have.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        Self {
            after_sb_0pri: self.after_sb_0pri.mirrored(),
            after_sb_1pri: self.after_sb_1pri.mirrored(),
            after_sb_2pri: self.after_sb_2pri.mirrored(),
        }
    }
}

/// One node in a split brain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its role.
    pub role: Role,
    /// Bit 0 of its bitmap UUID: it was Primary already when the generations parted.
    pub bitmap_role_bit: bool,
    /// Number of bits set in its bitmap, as announced in `P_UUIDS`.
    pub bits_set: u64,
}

/// Whose data is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ours.
    Source,
    /// The peer's.
    Target,
    /// The peer's, but only if this node can be demoted first; if not, there is no decision.
    TargetAfterDemotion,
}

impl Decision {
    const fn for_loser(own_loses: bool) -> Self {
        if own_loses { Self::Target } else { Self::Source }
    }

    /// Whether our data is given up.
    #[must_use]
    pub const fn own_loses(self) -> bool {
        match self {
            Self::Source => false,
            Self::Target | Self::TargetAfterDemotion => true,
        }
    }
}

/// How many of the two nodes are Primary.
#[must_use]
pub fn primaries(own: Role, peer: Role) -> u8 {
    u8::from(own == Role::Primary) + u8::from(peer == Role::Primary)
}

/// What the policies decide; `None` if they leave it to the operator.
///
/// `own_resolver`: we own the resolve-conflicts flag, which breaks ties.
#[must_use]
pub fn resolve(
    policies: Policies,
    own: &Party,
    peer: &Party,
    own_resolver: bool,
) -> Option<Decision> {
    let as_0pri = resolve_0pri(policies.after_sb_0pri, own, peer, own_resolver);
    let own_primary = own.role == Role::Primary;
    match (own_primary, peer.role == Role::Primary) {
        (false, false) => as_0pri,
        (true, true) => match policies.after_sb_2pri {
            AfterSb2Pri::Disconnect => None,
            AfterSb2Pri::CallPriLost => as_0pri.map(demoted_first),
            AfterSb2Pri::Violently => as_0pri,
        },
        (true, false) | (false, true) => match policies.after_sb_1pri {
            AfterSb1Pri::Disconnect => None,
            AfterSb1Pri::Consensus => {
                as_0pri.filter(|decision| decision.own_loses() != own_primary)
            }
            AfterSb1Pri::DiscardSecondary => Some(Decision::for_loser(!own_primary)),
            AfterSb1Pri::CallPriLost if own_primary => as_0pri.map(demoted_first),
            AfterSb1Pri::CallPriLost | AfterSb1Pri::Violently => as_0pri,
        },
    }
}

const fn demoted_first(decision: Decision) -> Decision {
    match decision {
        Decision::Source => Decision::Source,
        Decision::Target | Decision::TargetAfterDemotion => Decision::TargetAfterDemotion,
    }
}

fn resolve_0pri(
    policy: AfterSb0Pri,
    own: &Party,
    peer: &Party,
    own_resolver: bool,
) -> Option<Decision> {
    let by_changes = || Some(by_zero_or_least_changes(own, peer, own_resolver));
    match policy {
        AfterSb0Pri::Disconnect => None,
        AfterSb0Pri::DiscardYoungerPrimary => match (own.bitmap_role_bit, peer.bitmap_role_bit) {
            (false, true) => Some(Decision::Target),
            (true, false) => Some(Decision::Source),
            (false, false) | (true, true) => by_changes(),
        },
        AfterSb0Pri::DiscardOlderPrimary => match (own.bitmap_role_bit, peer.bitmap_role_bit) {
            (false, true) => Some(Decision::Source),
            (true, false) => Some(Decision::Target),
            (false, false) | (true, true) => by_changes(),
        },
        AfterSb0Pri::DiscardZeroChanges => by_zero_changes(own, peer, own_resolver),
        AfterSb0Pri::DiscardLeastChanges => Some(by_least_changes(own, peer, own_resolver)),
        AfterSb0Pri::DiscardLocal => Some(Decision::Target),
        AfterSb0Pri::DiscardRemote => Some(Decision::Source),
    }
}

/// Neither role bit tells the nodes apart.
fn by_zero_or_least_changes(own: &Party, peer: &Party, own_resolver: bool) -> Decision {
    by_zero_changes(own, peer, own_resolver)
        .unwrap_or_else(|| by_least_changes(own, peer, own_resolver))
}

const fn by_zero_changes(own: &Party, peer: &Party, own_resolver: bool) -> Option<Decision> {
    match (own.bits_set, peer.bits_set) {
        (0, 0) => Some(Decision::for_loser(own_resolver)),
        (0, _) => Some(Decision::Target),
        (_, 0) => Some(Decision::Source),
        (_, _) => None,
    }
}

const fn by_least_changes(own: &Party, peer: &Party, own_resolver: bool) -> Decision {
    if own.bits_set == peer.bits_set {
        Decision::for_loser(own_resolver)
    } else {
        Decision::for_loser(own.bits_set < peer.bits_set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(primary: bool, bitmap_role_bit: bool, bits_set: u64) -> Party {
        let role = if primary { Role::Primary } else { Role::Secondary };
        Party { role, bitmap_role_bit, bits_set }
    }

    fn all_parties() -> Vec<Party> {
        let mut all = Vec::new();
        for primary in [false, true] {
            for bit in [false, true] {
                all.extend([0, 3, 8].map(|bits| party(primary, bit, bits)));
            }
        }
        all
    }

    fn all_policies() -> Vec<Policies> {
        let mut all = Vec::new();
        for after_sb_0pri in AfterSb0Pri::ALL.iter().copied() {
            for after_sb_1pri in AfterSb1Pri::ALL.iter().copied() {
                for after_sb_2pri in AfterSb2Pri::ALL.iter().copied() {
                    all.push(Policies { after_sb_0pri, after_sb_1pri, after_sb_2pri });
                }
            }
        }
        all
    }

    #[test]
    fn words_and_numbers_are_those_of_the_configuration_and_the_wire() {
        let mut text = String::new();
        for policy in AfterSb0Pri::ALL {
            assert_eq!(AfterSb0Pri::from_code(policy.code()), Some(*policy));
            assert_eq!(policy.name().parse(), Ok(*policy));
            text.push_str(&format!("0pri {:>2} {policy}\n", policy.code()));
        }
        for policy in AfterSb1Pri::ALL {
            assert_eq!(AfterSb1Pri::from_code(policy.code()), Some(*policy));
            assert_eq!(policy.name().parse(), Ok(*policy));
            assert_eq!(policy.mirrored(), *policy);
            text.push_str(&format!("1pri {:>2} {policy}\n", policy.code()));
        }
        for policy in AfterSb2Pri::ALL {
            assert_eq!(AfterSb2Pri::from_code(policy.code()), Some(*policy));
            assert_eq!(policy.name().parse(), Ok(*policy));
            assert_eq!(policy.mirrored(), *policy);
            text.push_str(&format!("2pri {:>2} {policy}\n", policy.code()));
        }
        for policy in RrConflict::ALL {
            assert_eq!(RrConflict::from_code(policy.code()), Some(*policy));
            assert_eq!(policy.name().parse(), Ok(*policy));
            text.push_str(&format!("rr   {:>2} {policy}\n", policy.code()));
        }
        insta::assert_snapshot!("policies", text);
        assert_eq!(AfterSb0Pri::from_code(7), None);
        assert_eq!(AfterSb1Pri::from_code(1), None);
        assert_eq!(AfterSb2Pri::from_code(7), None);
        assert_eq!(RrConflict::from_code(8), None);
        let error = "violent\u{1b}".parse::<RrConflict>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "'violent\\u{1b}' is no value of rr-conflict; \
             expected one of: disconnect, call-pri-lost, violently"
        );
    }

    #[test]
    fn both_nodes_choose_the_same_victim() {
        let mut decided = 0;
        for policies in all_policies() {
            assert_eq!(policies.mirrored().mirrored(), policies);
            for own in all_parties() {
                for peer in all_parties() {
                    let here = resolve(policies, &own, &peer, true);
                    let there = resolve(policies.mirrored(), &peer, &own, false);
                    let here = here.map(Decision::own_loses);
                    let there = there.map(|decision| !decision.own_loses());
                    assert_eq!(here, there, "{policies:?} {own:?} {peer:?}");
                    decided += u32::from(here.is_some());
                }
            }
        }
        assert!(decided > 0);
    }

    #[test]
    fn nothing_is_decided_without_a_policy() {
        for own in all_parties() {
            for peer in all_parties() {
                assert_eq!(resolve(Policies::default(), &own, &peer, true), None);
            }
        }
    }

    #[test]
    fn without_primaries_the_first_policy_decides() {
        use AfterSb0Pri as P;
        const SOURCE: Option<Decision> = Some(Decision::Source);
        const TARGET: Option<Decision> = Some(Decision::Target);
        // Policy, own and peer (bit, changes), resolver, decision.
        let cases = [
            (P::DiscardYoungerPrimary, (false, 3), (true, 3), true, TARGET),
            (P::DiscardYoungerPrimary, (true, 3), (false, 3), true, SOURCE),
            (P::DiscardYoungerPrimary, (true, 0), (true, 3), true, TARGET),
            (P::DiscardYoungerPrimary, (true, 8), (true, 3), true, SOURCE),
            (P::DiscardOlderPrimary, (false, 3), (true, 3), true, SOURCE),
            (P::DiscardOlderPrimary, (true, 3), (false, 3), true, TARGET),
            (P::DiscardOlderPrimary, (false, 3), (false, 8), true, TARGET),
            (P::DiscardZeroChanges, (true, 0), (false, 0), true, TARGET),
            (P::DiscardZeroChanges, (true, 0), (false, 0), false, SOURCE),
            (P::DiscardZeroChanges, (true, 0), (false, 3), true, TARGET),
            (P::DiscardZeroChanges, (true, 3), (false, 0), true, SOURCE),
            (P::DiscardZeroChanges, (true, 3), (false, 8), true, None),
            (P::DiscardLeastChanges, (true, 3), (false, 8), true, TARGET),
            (P::DiscardLeastChanges, (true, 8), (false, 3), true, SOURCE),
            (P::DiscardLeastChanges, (true, 3), (false, 3), true, TARGET),
            (P::DiscardLeastChanges, (true, 3), (false, 3), false, SOURCE),
            (P::DiscardLocal, (true, 8), (false, 0), true, TARGET),
            (P::DiscardRemote, (false, 0), (true, 8), true, SOURCE),
        ];
        for (after_sb_0pri, own, peer, resolver, expected) in cases {
            let policies = Policies { after_sb_0pri, ..Policies::default() };
            let (own, peer) = (party(false, own.0, own.1), party(false, peer.0, peer.1));
            let got = resolve(policies, &own, &peer, resolver);
            assert_eq!(got, expected, "{after_sb_0pri} {own:?} {peer:?}");
        }
    }

    #[test]
    fn with_primaries_their_policy_uses_or_drops_that_decision() {
        use AfterSb1Pri as One;
        use AfterSb2Pri as Two;
        let decide = |zero, one, two, own, peer| {
            let policies = Policies { after_sb_0pri: zero, after_sb_1pri: one, after_sb_2pri: two };
            resolve(policies, &party(own, false, 3), &party(peer, false, 3), true)
        };
        let (lose, win) = (AfterSb0Pri::DiscardLocal, AfterSb0Pri::DiscardRemote);
        let one = |zero, policy, own| decide(zero, policy, Two::Disconnect, own, !own);
        assert_eq!(one(lose, One::Disconnect, true), None);
        assert_eq!(one(lose, One::Consensus, true), None);
        assert_eq!(one(lose, One::Consensus, false), Some(Decision::Target));
        assert_eq!(one(win, One::Consensus, true), Some(Decision::Source));
        assert_eq!(one(win, One::Consensus, false), None);
        assert_eq!(one(lose, One::DiscardSecondary, true), Some(Decision::Source));
        assert_eq!(one(win, One::DiscardSecondary, false), Some(Decision::Target));
        assert_eq!(one(lose, One::Violently, true), Some(Decision::Target));
        assert_eq!(one(lose, One::CallPriLost, true), Some(Decision::TargetAfterDemotion));
        assert_eq!(one(lose, One::CallPriLost, false), Some(Decision::Target));
        assert_eq!(one(win, One::CallPriLost, true), Some(Decision::Source));
        let two = |zero, policy| decide(zero, One::Disconnect, policy, true, true);
        assert_eq!(two(lose, Two::Disconnect), None);
        assert_eq!(two(lose, Two::Violently), Some(Decision::Target));
        assert_eq!(two(lose, Two::CallPriLost), Some(Decision::TargetAfterDemotion));
        assert_eq!(two(win, Two::CallPriLost), Some(Decision::Source));
        assert_eq!(two(AfterSb0Pri::Disconnect, Two::Violently), None);
        assert_eq!(primaries(Role::Primary, Role::Unknown), 1);
        assert_eq!(primaries(Role::Primary, Role::Primary), 2);
    }
}
