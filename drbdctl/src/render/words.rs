//! Single values, in the form of 8.4: one line for each volume.

use replication_core::control::{Status, VolumeStatus};

/// The volumes that an object means.
pub fn volumes(status: &Status, nr: Option<u16>) -> impl Iterator<Item = &VolumeStatus> {
    status.volumes.iter().filter(move |volume| nr.is_none_or(|nr| volume.nr == nr))
}

/// Own role and the peer's.
#[must_use]
pub fn role(status: &Status) -> String {
    format!("{}/{}", status.role, status.peer_role)
}

/// Connection state, with the words of a resync.
#[must_use]
pub fn cstate(volume: &VolumeStatus) -> String {
    volume.cstate.clone()
}

/// Own disk state and the peer's.
#[must_use]
pub fn dstate(volume: &VolumeStatus) -> String {
    format!("{}/{}", volume.disk, volume.peer_disk)
}
