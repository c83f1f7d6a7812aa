//! The size of a volume, from what both disks hold and what the operator configured.
//!
//! Rules: protocol notes 3.5, metadata notes 8.1. The caller carries the result out; a volume
//! that holds data never shrinks because of a peer that it has just met.

use crate::state::{Disk, Role};
use crate::units::Sector;

/// What the size of a volume with a disk depends on. Zero means "none" or "unknown".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// What our disk holds beside the metadata.
    pub own_capacity: Sector,
    /// What the peer's disk holds; zero if it has none, or while not connected.
    pub peer_capacity: Sector,
    /// The size last agreed upon, from the metadata.
    pub last_agreed: Sector,
    /// The configured size.
    pub own_user: Sector,
    /// The size that the peer announced as configured; `None` while not connected.
    pub peer_user: Option<Sector>,
    /// The size of the device at present.
    pub current: Sector,
    /// Our disk.
    pub disk: Disk,
    /// The handshake of this connection runs.
    pub handshaking: bool,
    /// The peer had no disk up to now.
    pub peer_was_diskless: bool,
}

/// The size to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgreedSize {
    /// The size of the device.
    pub size: Sector,
    /// The configured size to keep from now on.
    pub user: Sector,
    /// The configured size is larger than the disks and has no effect: to be warned of.
    pub user_is_too_large: bool,
}

/// Why the sizes of two nodes do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeConflict {
    /// Our device would lose its end.
    #[error(
        "The peer's disk size is too small! The device has {} sectors, only {} would remain",
        current.0,
        found.0
    )]
    PeerTooSmall {
        /// The size of our device.
        current: Sector,
        /// The size that would result.
        found: Sector,
    },
    /// The device that we serve from the peer's disk would lose its end under its user.
    #[error(
        "The peer's device size is too small! The device has {} sectors and is in use, \
         the peer offers {}",
        current.0,
        found.0
    )]
    ServedDeviceShrinks {
        /// The size of our device.
        current: Sector,
        /// The size offered.
        found: Sector,
    },
}

const fn smaller_set(a: Sector, b: Sector) -> Sector {
    match (a.0, b.0) {
        (0, _) => b,
        (_, 0) => a,
        (x, y) => Sector(if x < y { x } else { y }),
    }
}

/// The configured size to keep: in a handshake both nodes' wishes count, later the peer's word is
/// the last.
#[must_use]
pub const fn agree_user(own: Sector, peer: Option<Sector>, handshaking: bool) -> Sector {
    match peer {
        None => own,
        Some(peer) if handshaking => smaller_set(own, peer),
        Some(peer) => peer,
    }
}

/// The size that results from the disks: what both hold, or what was agreed upon before.
const fn size_of_disks(own: Sector, peer: Sector, last_agreed: Sector) -> Sector {
    let known = smaller_set(own, peer);
    if own.0 != 0 && peer.0 != 0 { known } else { smaller_set(last_agreed, known) }
}

/// The size of a volume with a disk.
///
/// # Errors
/// [`SizeConflict::PeerTooSmall`] if a device with usable data would shrink because of a peer
/// that was just met; the connection ends in StandAlone.
pub fn agree_size(sizes: &Sizes) -> Result<AgreedSize, SizeConflict> {
    let user = agree_user(sizes.own_user, sizes.peer_user, sizes.handshaking);
    let possible = size_of_disks(sizes.own_capacity, sizes.peer_capacity, sizes.last_agreed);
    let user_is_too_large = user > possible;
    let size = if user.0 == 0 || user_is_too_large { possible } else { user };
    let just_met = sizes.peer_user.is_some() && (sizes.handshaking || sizes.peer_was_diskless);
    if just_met && sizes.disk >= Disk::Outdated && size < sizes.current {
        return Err(SizeConflict::PeerTooSmall { current: sizes.current, found: size });
    }
    Ok(AgreedSize { size, user, user_is_too_large })
}

/// What the size of a volume without a disk depends on: the packet of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizesDiskless {
    /// What the peer's disk holds; zero if it has none.
    pub peer_capacity: Sector,
    /// The configured size of the peer.
    pub peer_user: Sector,
    /// The size of the peer's device; zero if it only wants an answer.
    pub peer_current: Sector,
    /// The size of our device at present.
    pub current: Sector,
    /// Our role.
    pub role: Role,
}

/// The size of a volume without a disk; `None` if the packet tells nothing.
///
/// # Errors
/// [`SizeConflict::ServedDeviceShrinks`] if a Primary would lose the end of its device.
pub fn agree_size_diskless(sizes: &SizesDiskless) -> Result<Option<Sector>, SizeConflict> {
    let offers = [sizes.peer_current, sizes.peer_user, sizes.peer_capacity];
    let Some(found) = offers.into_iter().find(|size| size.0 != 0) else {
        return Ok(None);
    };
    let current = sizes.current;
    if current.0 != 0 && sizes.peer_capacity.0 == 0 {
        return Ok(None);
    }
    if sizes.role == Role::Primary && found < current {
        return Err(SizeConflict::ServedDeviceShrinks { current, found });
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(own: u64, peer: u64, last: u64, user: u64, peer_user: Option<u64>) -> Sizes {
        Sizes {
            own_capacity: Sector(own),
            peer_capacity: Sector(peer),
            last_agreed: Sector(last),
            own_user: Sector(user),
            peer_user: peer_user.map(Sector),
            current: Sector(0),
            disk: Disk::UpToDate,
            handshaking: true,
            peer_was_diskless: false,
        }
    }

    #[test]
    fn the_size_follows_disks_agreement_and_configuration() {
        // Own, peer, last agreed, user, peer's user; size, user, too large.
        let cases = [
            (sizes(900, 800, 0, 0, Some(0)), 800, 0, false),
            (sizes(900, 800, 500, 0, Some(0)), 800, 0, false),
            (sizes(900, 0, 0, 0, None), 900, 0, false),
            (sizes(900, 0, 500, 0, None), 500, 0, false),
            (sizes(900, 0, 990, 0, None), 900, 0, false),
            (sizes(0, 800, 990, 0, None), 800, 0, false),
            (sizes(0, 0, 700, 0, None), 700, 0, false),
            (sizes(900, 800, 0, 600, Some(0)), 600, 600, false),
            (sizes(900, 800, 0, 0, Some(600)), 600, 600, false),
            (sizes(900, 800, 0, 600, Some(700)), 600, 600, false),
            (sizes(900, 800, 0, 850, Some(0)), 800, 850, true),
            (sizes(900, 800, 0, 800, Some(0)), 800, 800, false),
            (Sizes { handshaking: false, ..sizes(900, 800, 0, 600, Some(700)) }, 700, 700, false),
            (Sizes { handshaking: false, ..sizes(900, 800, 0, 600, Some(0)) }, 800, 0, false),
        ];
        for (input, size, user, user_is_too_large) in cases {
            let expected = AgreedSize { size: Sector(size), user: Sector(user), user_is_too_large };
            assert_eq!(agree_size(&input), Ok(expected), "{input:?}");
        }
    }

    #[test]
    fn a_device_with_data_does_not_shrink_for_a_new_peer() {
        let met = Sizes { current: Sector(900), ..sizes(900, 800, 900, 0, Some(0)) };
        let conflict = SizeConflict::PeerTooSmall { current: Sector(900), found: Sector(800) };
        assert_eq!(agree_size(&met), Err(conflict));
        assert!(conflict.to_string().starts_with("The peer's disk size is too small!"));
        let size_of = |sizes: Sizes| agree_size(&sizes).map(|agreed| agreed.size);
        assert_eq!(size_of(Sizes { disk: Disk::Outdated, ..met }), Err(conflict));
        assert_eq!(size_of(Sizes { disk: Disk::Inconsistent, ..met }), Ok(Sector(800)));
        let known = Sizes { handshaking: false, ..met };
        assert_eq!(size_of(known), Ok(Sector(800)));
        assert_eq!(size_of(Sizes { peer_was_diskless: true, ..known }), Err(conflict));
        let alone = Sizes { peer_user: None, peer_capacity: Sector(0), ..met };
        let alone = Sizes { last_agreed: Sector(800), ..alone };
        assert_eq!(agree_size(&alone).map(|agreed| agreed.size), Ok(Sector(800)));
    }

    #[test]
    fn without_a_disk_the_peer_is_followed() {
        let input = |capacity, user, current, own, role| SizesDiskless {
            peer_capacity: Sector(capacity),
            peer_user: Sector(user),
            peer_current: Sector(current),
            current: Sector(own),
            role,
        };
        let some = |size| Ok(Some(Sector(size)));
        let (first, second) = (Role::Primary, Role::Secondary);
        assert_eq!(agree_size_diskless(&input(900, 700, 800, 0, first)), some(800));
        assert_eq!(agree_size_diskless(&input(900, 700, 0, 0, first)), some(700));
        assert_eq!(agree_size_diskless(&input(900, 0, 0, 0, first)), some(900));
        assert_eq!(agree_size_diskless(&input(0, 0, 0, 0, first)), Ok(None));
        assert_eq!(agree_size_diskless(&input(0, 0, 500, 0, first)), some(500));
        assert_eq!(agree_size_diskless(&input(0, 0, 500, 800, first)), Ok(None));
        assert_eq!(agree_size_diskless(&input(900, 0, 800, 900, second)), some(800));
        let conflict =
            SizeConflict::ServedDeviceShrinks { current: Sector(900), found: Sector(800) };
        assert_eq!(agree_size_diskless(&input(900, 0, 800, 900, first)), Err(conflict));
        assert!(conflict.to_string().contains("900 sectors"));
    }
}
