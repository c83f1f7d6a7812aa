//! Agreement on the protocol version and on optional features (WP-3).
//!
//! The agreed version is the highest that both sides speak. As in the in-kernel driver, the
//! peer's lowest version only decides whether there is an agreement at all.
//!
//! Source: protocol notes, section 3.1.

use thiserror::Error;

use super::flags::Features;
use super::packet::FeaturesPacket;
use crate::limits::{PROTOCOL_MAX, PROTOCOL_MIN};

/// The two nodes have no protocol version in common. No further attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the peer speaks protocol {peer_min} to {peer_max}, this node {} to {}",
    PROTOCOL_MIN,
    PROTOCOL_MAX
)]
pub struct Incompatible {
    /// Lowest version of the peer.
    pub peer_min: u32,
    /// Highest version of the peer.
    pub peer_max: u32,
}

/// The features packet of this node.
#[must_use]
pub const fn ours() -> FeaturesPacket {
    FeaturesPacket {
        protocol_min: PROTOCOL_MIN,
        features: Features::OURS,
        protocol_max: PROTOCOL_MAX,
    }
}

/// The version and the features agreed with a peer.
///
/// # Errors
/// [`Incompatible`] if the ranges of versions do not meet.
pub fn negotiate(peer: &FeaturesPacket) -> Result<(u32, Features), Incompatible> {
    let peer_min = peer.protocol_min;
    let peer_max = if peer.protocol_max == 0 { peer_min } else { peer.protocol_max };
    if peer_min > PROTOCOL_MAX || peer_max < PROTOCOL_MIN {
        return Err(Incompatible { peer_min, peer_max });
    }
    let version = peer_max.min(PROTOCOL_MAX);
    assert!(version >= PROTOCOL_MIN, "an agreed version is one that this node speaks");
    Ok((version, peer.features.intersection(Features::OURS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranges that meet agree on the highest common version, the others are refused.
    #[test]
    fn the_highest_common_version_is_agreed() {
        let cases = [
            ((86, 101), Some(101)),
            ((86, 96), Some(96)),
            ((101, 124), Some(101)),
            ((86, 86), Some(86)),
            ((80, 90), Some(90)),
            ((94, 0), Some(94)),
            ((102, 124), None),
            ((80, 85), None),
            ((85, 0), None),
            ((0, 0), None),
            ((u32::MAX, u32::MAX), None),
        ];
        for ((protocol_min, protocol_max), version) in cases {
            let peer = FeaturesPacket { protocol_min, features: Features(0x3f2), protocol_max };
            let agreed = negotiate(&peer);
            match version {
                Some(version) => assert_eq!(agreed, Ok((version, Features(2)))),
                None => {
                    let peer_max = if protocol_max == 0 { protocol_min } else { protocol_max };
                    assert_eq!(agreed, Err(Incompatible { peer_min: protocol_min, peer_max }));
                }
            }
        }
    }

    /// A node agrees with its like on everything.
    #[test]
    fn equals_agree_on_everything() {
        assert_eq!(negotiate(&ours()), Ok((PROTOCOL_MAX, Features::OURS)));
    }
}
