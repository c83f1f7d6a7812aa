//! The conversation between the operator's tool and an engine: commands, answers, frames.
//!
//! A frame is `u32 length` (big endian, of what follows), `u8 schema version`, then the message in
//! bincode. This is the only place where bincode is used; another encoding would change this file
//! alone. Messages are bounded and must be used up by the decoder: trailing bytes are an error.

use bincode::Options;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::EngineConfig;
use crate::units::{Sector, VolumeNr};

/// Version of the messages below. A tool and an engine of different versions refuse each other.
pub const SCHEMA: u8 = 3;
/// Most bytes of a frame after its length field.
pub const MAX_FRAME: u32 = 1 << 20;

/// What the operator wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Tell the state of everything.
    Status,
    /// Attach every disk and connect; answered when the disks are attached.
    Up,
    /// End: disconnect, detach, stop. Refused while a device is in use.
    Down {
        /// What holds a device open, as the engine found it; filled in by the engine.
        holder: Option<String>,
        /// Do not wait for the peer or the disk.
        force: bool,
    },
    /// End in mid-service for another engine: the devices stay, with the requests that wait in
    /// them, and so does the role.
    Upgrade,
    /// Attach the disk of one volume, or of all.
    Attach(Option<VolumeNr>),
    /// Detach the disk of one volume, or of all.
    Detach {
        /// Which volume; `None`: all.
        volume: Option<VolumeNr>,
        /// Do not wait for operations in flight.
        force: bool,
    },
    /// Connect to the peer.
    Connect {
        /// On split brain, throw away this node's changes.
        discard_my_data: bool,
    },
    /// Disconnect and stay so.
    Disconnect {
        /// Do not ask the peer.
        force: bool,
    },
    /// Become Primary.
    Primary {
        /// Take the local data as good even if it is not known to be.
        force: bool,
    },
    /// Become Secondary.
    Secondary {
        /// What holds a device open, as the engine found it; filled in by the engine.
        holder: Option<String>,
    },
    /// Throw away the local data of one volume, or of all, and sync from the peer.
    Invalidate(Option<VolumeNr>),
    /// Sync one volume, or all, to the peer in full.
    InvalidateRemote(Option<VolumeNr>),
    /// Take up a changed size of the backing devices.
    Resize {
        /// Which volume; `None`: all.
        volume: Option<VolumeNr>,
        /// Use only this much; `None`: as configured.
        size: Option<Sector>,
        /// The new space is known to be equal on both nodes.
        assume_clean: bool,
        /// Grow without asking the (absent) peer.
        assume_peer_has_space: bool,
    },
    /// Mark the local data Outdated.
    Outdate,
    /// Stop or continue resync on the operator's behalf.
    PauseSync(bool),
    /// Start a new data generation; with `clear_bitmap`, declare both nodes equal.
    NewCurrentUuid {
        /// Which volume; `None`: all.
        volume: Option<VolumeNr>,
        /// Skip the initial sync.
        clear_bitmap: bool,
    },
    /// Take over changed options. Addresses, volumes and files must be the same as before.
    Adjust(Box<EngineConfig>),
}

/// An answer to a command that was carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// It was so already.
    NothingToDo,
    /// The state of everything.
    Status(Box<Status>),
}

/// Why a command was not carried out. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{text}")]
pub struct Refusal {
    /// The number operators know: negative for a state change, above 100 for a configuration
    /// error, zero when there is none.
    pub code: i32,
    /// The exit code of the tool.
    pub exit: u8,
    /// Which rule refused it.
    pub text: String,
    /// What to do about it.
    pub advice: String,
}

/// The state of a resource.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Resource name.
    pub name: String,
    /// This node's name.
    pub node: String,
    /// The peer's name.
    pub peer: String,
    /// `Primary` or `Secondary`.
    pub role: String,
    /// I/O is suspended by the operator.
    pub suspended_user: bool,
    /// I/O is suspended for want of a good copy.
    pub suspended_no_data: bool,
    /// I/O is suspended until fencing is done.
    pub suspended_fencing: bool,
    /// `flush`, `drain` or `none`.
    pub write_ordering: String,
    /// Connection state in the words of 8.4 without replication states: `StandAlone`,
    /// `Unconnected`, `Connecting`, `Connected`, ...
    pub connection: String,
    /// The peer's role.
    pub peer_role: String,
    /// Agreed protocol version; zero when not connected.
    pub agreed_version: u32,
    /// Sectors sent to the peer and not yet confirmed.
    pub ap_in_flight: u64,
    /// Sectors of resync in flight.
    pub rs_in_flight: u64,
    /// Local address, `ip:port`; filled in by the engine.
    pub local: String,
    /// Peer address, `ip:port`; filled in by the engine.
    pub remote: String,
    /// Split brain was found and is not resolved.
    pub split_brain: bool,
    /// Process id of the engine; filled in by the engine.
    pub pid: u32,
    /// Per volume.
    pub volumes: Vec<VolumeStatus>,
}

/// The state of a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Volume number.
    pub nr: u16,
    /// Device minor.
    pub minor: u32,
    /// Backing disk path; filled in by the engine.
    pub backing: String,
    /// Own disk state.
    pub disk: String,
    /// Peer's disk state.
    pub peer_disk: String,
    /// Connection state of 8.4, with replication states: `Connected`, `SyncSource`, ...
    pub cstate: String,
    /// Replication state: `Off`, `Established`, `SyncSource`, ...
    pub replication: String,
    /// Someone has the device open; filled in by the engine.
    pub open: bool,
    /// The device is there and takes requests; filled in by the engine.
    pub is_serving: bool,
    /// Exposed size in KiB.
    pub size_kib: u64,
    /// Read from the local disk for the host, KiB.
    pub read_kib: u64,
    /// Written to the local disk, KiB.
    pub written_kib: u64,
    /// Received from the peer, KiB.
    pub received_kib: u64,
    /// Sent to the peer, KiB.
    pub sent_kib: u64,
    /// Blocks that differ, KiB.
    pub out_of_sync_kib: u64,
    /// Activity-log transactions.
    pub al_writes: u64,
    /// Bitmap pages written.
    pub bm_writes: u64,
    /// Host requests not yet answered.
    pub upper_pending: u64,
    /// Local disk operations in flight.
    pub lower_pending: u64,
    /// Requests waiting for the peer.
    pub pending: u64,
    /// The peer's requests not yet answered.
    pub unacked: u64,
    /// Generation identifiers: current, bitmap, history 1, history 2.
    pub uuids: [u64; 4],
    /// When its disk was attached, this node had last been Primary without its peer, and there was
    /// no connection since.
    pub was_degraded: bool,
    /// Why resync is paused: `no`, or a list of `user`, `peer`, `dependency`.
    pub resync_suspended: String,
    /// Present while a resync runs.
    pub resync: Option<ResyncStatus>,
}

/// The progress of a resync.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Blocks to sync at its start, as sectors.
    pub total_sectors: u64,
    /// Blocks still to sync, as sectors.
    pub left_sectors: u64,
    /// Blocks that could not be read or written, as sectors.
    pub failed_sectors: u64,
    /// Since its start, without pauses, ms.
    pub elapsed_ms: u64,
    /// Time in pause, ms.
    pub paused_ms: u64,
    /// Length of the last window of measurement, ms.
    pub window_ms: u64,
    /// Synced in the last window, sectors.
    pub window_sectors: u64,
    /// On the target, which sets the pace: the speed that it asks for, KiB/s. Zero on the source.
    pub want_kib: u64,
}

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`], or too short for a version.
    #[error("control frame of {0} bytes: 1 to {MAX_FRAME} are allowed")]
    Length(u32),
    /// Another schema.
    #[error(
        "control schema {found}, but this program speaks {SCHEMA}: engine and drbdctl are of different versions"
    )]
    Schema {
        /// Theirs.
        found: u8,
    },
    /// No message of this schema.
    #[error("malformed control message: {0}")]
    Malformed(String),
}

fn codec() -> impl Options {
    bincode::DefaultOptions::new().with_limit(u64::from(MAX_FRAME)).reject_trailing_bytes()
}

/// The frame of a message.
///
/// # Errors
/// The message does not fit into [`MAX_FRAME`].
pub fn encode_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let body = codec().serialize(message).map_err(|e| FrameError::Malformed(e.to_string()))?;
    let length = u32::try_from(body.len() + 1).map_err(|_| FrameError::Length(u32::MAX))?;
    if length > MAX_FRAME {
        return Err(FrameError::Length(length));
    }
    let mut frame = Vec::with_capacity(body.len() + 5);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.push(SCHEMA);
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The number of bytes that follow a length field.
///
/// # Errors
/// Out of range.
pub fn frame_length(field: [u8; 4]) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(field);
    if length == 0 || length > MAX_FRAME {
        return Err(FrameError::Length(length));
    }
    usize::try_from(length).map_err(|_| FrameError::Length(length))
}

/// The message of a frame; `bytes` is what follows the length field.
///
/// # Errors
/// Another schema version, or bytes that are no such message.
pub fn decode_frame<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, FrameError> {
    match bytes.split_first() {
        None => Err(FrameError::Length(0)),
        Some((&SCHEMA, body)) => {
            codec().deserialize(body).map_err(|e| FrameError::Malformed(e.to_string()))
        }
        Some((&found, _)) => Err(FrameError::Schema { found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let command = Command::Primary { force: true };
        let frame = encode_frame(&command).unwrap();
        let length = frame_length(frame[..4].try_into().unwrap()).unwrap();
        assert_eq!(length, frame.len() - 4);
        assert_eq!(decode_frame::<Command>(&frame[4..]), Ok(command));
    }

    #[test]
    fn other_schema_trailing_bytes_and_garbage_are_refused() {
        let mut frame = encode_frame(&Command::Status).unwrap();
        frame.push(0);
        assert!(matches!(decode_frame::<Command>(&frame[4..]), Err(FrameError::Malformed(_))));
        frame[4] = SCHEMA + 1;
        let other = FrameError::Schema { found: SCHEMA + 1 };
        assert_eq!(decode_frame::<Command>(&frame[4..]), Err(other));
        assert_eq!(decode_frame::<Command>(&[]), Err(FrameError::Length(0)));
        assert_eq!(frame_length([0xff; 4]), Err(FrameError::Length(u32::MAX)));
        assert_eq!(frame_length([0; 4]), Err(FrameError::Length(0)));
    }
}
