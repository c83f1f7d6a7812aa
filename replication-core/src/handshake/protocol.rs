//! The settings that both nodes of a connection must share.
//!
//! Rules: protocol notes 3.3. Nothing is negotiated: a difference ends the connection, and the
//! error names the option and both values.

use serde::{Deserialize, Serialize};

use crate::split_brain::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri};

/// What a node announces in `P_PROTOCOL`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolSettings {
    /// 1 is A, 2 is B, 3 is C.
    pub protocol: u32,
    /// Policy without a Primary.
    pub after_sb_0pri: AfterSb0Pri,
    /// Policy with one Primary.
    pub after_sb_1pri: AfterSb1Pri,
    /// Policy with two Primaries.
    pub after_sb_2pri: AfterSb2Pri,
    /// The operator gave up the changes of this node.
    pub discard_my_data: bool,
    /// Only tell what would happen.
    pub dry_run: bool,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
    /// `data-integrity-alg`; empty if there is none.
    pub integrity_alg: String,
}

/// A setting in which the two nodes differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incompatible {
    /// Different replication protocols.
    #[error("incompatible protocol: {} here, {} on the peer", letter(*ours), letter(*theirs))]
    Protocol {
        /// Our number.
        ours: u32,
        /// The peer's number.
        theirs: u32,
    },
    /// Different policies without a Primary.
    #[error("incompatible after-sb-0pri: {ours} here, {theirs} on the peer")]
    AfterSb0 {
        /// Our policy.
        ours: AfterSb0Pri,
        /// The peer's policy, in the peer's words.
        theirs: AfterSb0Pri,
    },
    /// Different policies with one Primary.
    #[error("incompatible after-sb-1pri: {ours} here, {theirs} on the peer")]
    AfterSb1 {
        /// Our policy.
        ours: AfterSb1Pri,
        /// The peer's policy.
        theirs: AfterSb1Pri,
    },
    /// Different policies with two Primaries.
    #[error("incompatible after-sb-2pri: {ours} here, {theirs} on the peer")]
    AfterSb2 {
        /// Our policy.
        ours: AfterSb2Pri,
        /// The peer's policy.
        theirs: AfterSb2Pri,
    },
    /// Both operators gave up the data of their node: nothing would be left.
    #[error("both nodes were told to discard their data (--discard-my-data)")]
    BothDiscard,
    /// Only one node allows two Primaries.
    #[error("incompatible allow-two-primaries: {ours} here, {theirs} on the peer")]
    TwoPrimaries {
        /// Ours.
        ours: bool,
        /// The peer's.
        theirs: bool,
    },
    /// Different algorithms for data integrity.
    #[error("incompatible data-integrity-alg: {ours:?} here, {theirs:?} on the peer")]
    IntegrityAlg {
        /// Ours.
        ours: String,
        /// The peer's; shown escaped.
        theirs: String,
    },
}

fn letter(protocol: u32) -> String {
    match protocol {
        1 => String::from("A"),
        2 => String::from("B"),
        3 => String::from("C"),
        _ => format!("number {protocol}"),
    }
}

/// Whether a connection between nodes with these settings is possible.
///
/// # Errors
/// The first setting, in the order of the packet, that does not fit.
pub fn check_protocol(own: &ProtocolSettings, peer: &ProtocolSettings) -> Result<(), Incompatible> {
    if own.protocol != peer.protocol {
        return Err(Incompatible::Protocol { ours: own.protocol, theirs: peer.protocol });
    }
    if own.after_sb_0pri != peer.after_sb_0pri.mirrored() {
        let (ours, theirs) = (own.after_sb_0pri, peer.after_sb_0pri);
        return Err(Incompatible::AfterSb0 { ours, theirs });
    }
    if own.after_sb_1pri != peer.after_sb_1pri.mirrored() {
        let (ours, theirs) = (own.after_sb_1pri, peer.after_sb_1pri);
        return Err(Incompatible::AfterSb1 { ours, theirs });
    }
    if own.after_sb_2pri != peer.after_sb_2pri.mirrored() {
        let (ours, theirs) = (own.after_sb_2pri, peer.after_sb_2pri);
        return Err(Incompatible::AfterSb2 { ours, theirs });
    }
    if own.discard_my_data && peer.discard_my_data {
        return Err(Incompatible::BothDiscard);
    }
    if own.two_primaries != peer.two_primaries {
        let (ours, theirs) = (own.two_primaries, peer.two_primaries);
        return Err(Incompatible::TwoPrimaries { ours, theirs });
    }
    if own.integrity_alg != peer.integrity_alg {
        let (ours, theirs) = (own.integrity_alg.clone(), peer.integrity_alg.clone());
        return Err(Incompatible::IntegrityAlg { ours, theirs });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> ProtocolSettings {
        ProtocolSettings {
            protocol: 3,
            after_sb_0pri: AfterSb0Pri::DiscardLocal,
            after_sb_1pri: AfterSb1Pri::Consensus,
            after_sb_2pri: AfterSb2Pri::Disconnect,
            discard_my_data: false,
            dry_run: false,
            two_primaries: false,
            integrity_alg: String::from("sha1"),
        }
    }

    fn mirrored() -> ProtocolSettings {
        ProtocolSettings { after_sb_0pri: AfterSb0Pri::DiscardRemote, ..settings() }
    }

    #[test]
    fn equal_and_mirrored_settings_fit() {
        assert_eq!(check_protocol(&settings(), &mirrored()), Ok(()));
        assert_eq!(check_protocol(&mirrored(), &settings()), Ok(()));
        let one_sided = ProtocolSettings { discard_my_data: true, dry_run: true, ..mirrored() };
        assert_eq!(check_protocol(&settings(), &one_sided), Ok(()));
    }

    #[test]
    fn every_difference_is_named_with_both_values() {
        let discarding = ProtocolSettings { discard_my_data: true, ..settings() };
        let peer = mirrored();
        let cases = [
            (
                settings(),
                ProtocolSettings { protocol: 1, ..peer.clone() },
                "incompatible protocol: C here, A on the peer",
            ),
            (
                settings(),
                ProtocolSettings { protocol: 9, ..peer.clone() },
                "incompatible protocol: C here, number 9 on the peer",
            ),
            (
                settings(),
                settings(),
                "incompatible after-sb-0pri: discard-local here, discard-local on the peer",
            ),
            (
                settings(),
                ProtocolSettings { after_sb_1pri: AfterSb1Pri::Violently, ..peer.clone() },
                "incompatible after-sb-1pri: consensus here, violently-as0p on the peer",
            ),
            (
                settings(),
                ProtocolSettings { after_sb_2pri: AfterSb2Pri::CallPriLost, ..peer.clone() },
                "incompatible after-sb-2pri: disconnect here, call-pri-lost-after-sb on the peer",
            ),
            (
                discarding,
                ProtocolSettings { discard_my_data: true, ..peer.clone() },
                "both nodes were told to discard their data (--discard-my-data)",
            ),
            (
                settings(),
                ProtocolSettings { two_primaries: true, ..peer.clone() },
                "incompatible allow-two-primaries: false here, true on the peer",
            ),
            (
                settings(),
                ProtocolSettings { integrity_alg: String::from("m\u{7}d5"), ..peer },
                "incompatible data-integrity-alg: \"sha1\" here, \"m\\u{7}d5\" on the peer",
            ),
        ];
        for (own, peer, text) in cases {
            let error = check_protocol(&own, &peer).unwrap_err();
            assert_eq!(error.to_string(), text);
            assert!(check_protocol(&peer, &own).is_err(), "{text}");
        }
        let two = Incompatible::Protocol { ours: 2, theirs: 3 };
        assert_eq!(two.to_string(), "incompatible protocol: B here, C on the peer");
    }
}
