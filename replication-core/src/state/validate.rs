//! Whether a change may happen: the reasons to refuse one, and the rules that find them.
//!
//! Three kinds of rules. Hard limits hold for every change. A *soft* change, one that may be
//! refused, must in addition lead to a valid state and must be a valid transition. Invariants:
//! ST-1, ST-2, ST-5. Rules: protocol notes 6.3 and 7.2 to 7.4; texts and exit codes: user
//! surface notes 7.2.

use serde::{Deserialize, Serialize};

use super::{Conn, Disk, Fencing, Role, Rules, State};

/// Why a change of state was refused. Displays as the text that operators know.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error, Serialize, Deserialize,
)]
pub enum Refused {
    /// -1: both nodes would be Primary.
    #[error("Multiple primaries not allowed by config")]
    TwoPrimaries,
    /// -2: a Primary or a resync without good data.
    #[error("Need access to UpToDate data")]
    NoUpToDateDisk,
    /// -4: a resync without a disk here.
    #[error("Can not resync without local disk")]
    NoLocalDisk,
    /// -5: a resync without a disk there.
    #[error("Can not resync without remote disk")]
    NoRemoteDisk,
    /// -6: old data while the peer is connected.
    #[error("Refusing to be Outdated while Connected")]
    OutdatedWhileConnected,
    /// -7: fencing wants to know the peer's data old first.
    #[error("Refusing to be Primary while peer is not outdated")]
    PeerNotOutdated,
    /// -8: a verify or resync runs already.
    #[error("Can not start OV/resync since it is already active")]
    ResyncRunning,
    /// -9: nothing to disconnect.
    #[error("Can not disconnect a StandAlone device")]
    AlreadyStandAlone,
    /// -10: the peer said no.
    #[error("State change was refused by peer node")]
    ByPeer,
    /// -11: there is no disk.
    #[error("Device is diskless, the requested operation requires a disk")]
    Diskless,
    /// -12: the device is in use.
    #[error("Device is held open by someone")]
    DeviceInUse,
    /// -13: no connection is configured.
    #[error("Have no net/connection configuration")]
    NoNetConfig,
    /// -14: nothing to verify with.
    #[error("Need a verify algorithm to start online verify")]
    NoVerifyAlg,
    /// -15: there is no connection.
    #[error("State change requires a connection")]
    NeedConnection,
    /// -16: a disk that is worse cannot become Outdated.
    #[error("Disk state is lower than outdated")]
    LowerThanOutdated,
    /// -17: the peer is too old.
    #[error("Peer does not support protocol")]
    NotSupported,
    /// -18: something else is going on.
    #[error("In transient state, retry after next state change")]
    TransientState,
    /// -19: both nodes want something at once.
    #[error("Concurrent state changes detected and aborted")]
    Concurrent,
    /// -20: the peer is Primary on another volume.
    #[error("Other vol primary on peer not allowed by config")]
    OtherVolumePrimary,
    /// -21: the peer can only be outdated while it is connected.
    #[error("Interrupted state change")]
    OutdateNeedsConnection,
}

impl Refused {
    /// Every reason, by falling code.
    pub const ALL: [Self; 20] = [
        Self::TwoPrimaries,
        Self::NoUpToDateDisk,
        Self::NoLocalDisk,
        Self::NoRemoteDisk,
        Self::OutdatedWhileConnected,
        Self::PeerNotOutdated,
        Self::ResyncRunning,
        Self::AlreadyStandAlone,
        Self::ByPeer,
        Self::Diskless,
        Self::DeviceInUse,
        Self::NoNetConfig,
        Self::NoVerifyAlg,
        Self::NeedConnection,
        Self::LowerThanOutdated,
        Self::NotSupported,
        Self::TransientState,
        Self::Concurrent,
        Self::OtherVolumePrimary,
        Self::OutdateNeedsConnection,
    ];

    /// The code in a reply to a state change request: -21 to -1.
    #[must_use]
    pub const fn code(self) -> i32 {
        match self {
            Self::TwoPrimaries => -1,
            Self::NoUpToDateDisk => -2,
            Self::NoLocalDisk => -4,
            Self::NoRemoteDisk => -5,
            Self::OutdatedWhileConnected => -6,
            Self::PeerNotOutdated => -7,
            Self::ResyncRunning => -8,
            Self::AlreadyStandAlone => -9,
            Self::ByPeer => -10,
            Self::Diskless => -11,
            Self::DeviceInUse => -12,
            Self::NoNetConfig => -13,
            Self::NoVerifyAlg => -14,
            Self::NeedConnection => -15,
            Self::LowerThanOutdated => -16,
            Self::NotSupported => -17,
            Self::TransientState => -18,
            Self::Concurrent => -19,
            Self::OtherVolumePrimary => -20,
            Self::OutdateNeedsConnection => -21,
        }
    }

    /// The reason with that code; `None` for results that are no refusal and for codes that
    /// only newer peers use.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|refused| refused.code() == code)
    }

    /// The exit code of the operator's tool.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::NoUpToDateDisk => 17,
            Self::NoLocalDisk => 16,
            // The disk already is what the caller wanted, or worse: agents go on at this.
            Self::LowerThanOutdated => 5,
            Self::TwoPrimaries
            | Self::NoRemoteDisk
            | Self::OutdatedWhileConnected
            | Self::PeerNotOutdated
            | Self::ResyncRunning
            | Self::AlreadyStandAlone
            | Self::ByPeer
            | Self::Diskless
            | Self::DeviceInUse
            | Self::NoNetConfig
            | Self::NoVerifyAlg
            | Self::NeedConnection
            | Self::NotSupported
            | Self::TransientState
            | Self::Concurrent
            | Self::OtherVolumePrimary
            | Self::OutdateNeedsConnection => 11,
        }
    }

    /// What the operator can do about it: one sentence.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::TwoPrimaries => {
                "Make the peer Secondary first, or set allow-two-primaries on both nodes."
            }
            Self::NoUpToDateDisk => {
                "Attach or connect a node with good data; only if this copy is known to be the \
                 best one, promote it with --force."
            }
            Self::NoLocalDisk => "Attach the local disk first.",
            Self::NoRemoteDisk => "Attach the disk of the peer first.",
            Self::OutdatedWhileConnected => "Disconnect first, then outdate the disk.",
            Self::PeerNotOutdated => {
                "Outdate the peer, or let its fence-peer handler succeed, then try again."
            }
            Self::ResyncRunning => "Wait until the running resync or verify has ended.",
            Self::AlreadyStandAlone => "Nothing needs to be done: there is no connection.",
            Self::ByPeer => "The log of the peer names its reason.",
            Self::Diskless => "Attach a disk first.",
            Self::DeviceInUse => "Unmount or close the device, then try again.",
            Self::NoNetConfig => "Configure a connection and connect first.",
            Self::NoVerifyAlg => "Set verify-alg in the net section on both nodes.",
            Self::NeedConnection => "Connect to the peer first.",
            Self::LowerThanOutdated => "Nothing needs to be done: the disk is not usable anyway.",
            Self::NotSupported => "Upgrade the peer.",
            Self::TransientState => "Try again when the change in progress has ended.",
            Self::Concurrent => "Try again: the other node's change went first.",
            Self::OtherVolumePrimary => {
                "Make every volume of the peer Secondary, or set allow-two-primaries on both \
                 nodes."
            }
            Self::OutdateNeedsConnection => {
                "Connect to the peer first, or disconnect without outdating it."
            }
        }
    }
}

/// The connection states in which being Outdated would contradict what the peer relies on.
pub(super) const fn must_not_be_outdated(conn: Conn) -> bool {
    matches!(conn, Conn::Connected | Conn::WFBitMapS | Conn::SyncSource | Conn::PausedSyncS)
}

const fn is_verify(conn: Conn) -> bool {
    matches!(conn, Conn::VerifyS | Conn::VerifyT)
}

const fn is_starting_sync(conn: Conn) -> bool {
    matches!(conn, Conn::StartingSyncS | Conn::StartingSyncT)
}

const fn refuse_if(violated: bool, reason: Refused) -> Result<(), Refused> {
    if violated { Err(reason) } else { Ok(()) }
}

/// Whether the state, already sanitised, may be entered by a change that can be refused.
///
/// # Errors
/// The first rule that the state violates.
pub fn validate_state(state: &State, rules: &Rules) -> Result<(), Refused> {
    validate_role(state, rules)?;
    let State { conn, disk, pdsk, .. } = *state;
    let primary = state.role == Role::Primary;
    let working = conn > Conn::Connected;
    refuse_if(
        primary && disk <= Disk::Inconsistent && pdsk <= Disk::Inconsistent,
        Refused::NoUpToDateDisk,
    )?;
    refuse_if(working && disk < Disk::Inconsistent, Refused::NoLocalDisk)?;
    refuse_if(working && pdsk < Disk::Inconsistent, Refused::NoRemoteDisk)?;
    refuse_if(working && disk < Disk::UpToDate && pdsk < Disk::UpToDate, Refused::NoUpToDateDisk)?;
    refuse_if(
        must_not_be_outdated(conn) && disk == Disk::Outdated,
        Refused::OutdatedWhileConnected,
    )?;
    refuse_if(is_verify(conn) && !rules.has_verify_alg, Refused::NoVerifyAlg)?;
    refuse_if(is_verify(conn) && rules.agreed_version < 88, Refused::NotSupported)?;
    refuse_if(primary && disk < Disk::UpToDate && pdsk < Disk::UpToDate, Refused::NoUpToDateDisk)?;
    refuse_if(is_starting_sync(conn) && pdsk == Disk::DUnknown, Refused::NeedConnection)?;
    refuse_if(conn >= Conn::Connected && pdsk == Disk::DUnknown, Refused::OutdatedWhileConnected)
}

/// The rules about roles: the first four.
fn validate_role(state: &State, rules: &Rules) -> Result<(), Refused> {
    let primary = state.role == Role::Primary;
    let alone = state.conn < Conn::Connected;
    if !rules.two_primaries && primary {
        refuse_if(state.peer == Role::Primary, Refused::TwoPrimaries)?;
        refuse_if(rules.peer_primary_elsewhere, Refused::OtherVolumePrimary)?;
    }
    refuse_if(state.role == Role::Secondary && rules.device_open, Refused::DeviceInUse)?;
    refuse_if(primary && alone && state.disk < Disk::UpToDate, Refused::NoUpToDateDisk)?;
    refuse_if(
        rules.fencing >= Fencing::ResourceOnly && primary && alone && state.pdsk >= Disk::DUnknown,
        Refused::PeerNotOutdated,
    )
}

/// Whether a change that can be refused may lead from `old` to `new`, already sanitised.
///
/// A violation for the same reason that the old state is in already is tolerated: otherwise a
/// volume in trouble could not be helped step by step.
///
/// # Errors
/// The reason to refuse it.
pub fn validate_change(old: &State, new: &State, rules: &Rules) -> Result<(), Refused> {
    if let Err(refused) = validate_state(new, rules)
        && validate_state(old, rules) != Err(refused)
    {
        return Err(refused);
    }
    validate_transition(old, new, rules)
}

/// Of all transition rules that match, the last one names the reason.
fn validate_transition(old: &State, new: &State, rules: &Rules) -> Result<(), Refused> {
    let changing = new.conn != old.conn;
    let handshake_step = match old.conn {
        Conn::WFConnection => new.conn == Conn::WFReportParams,
        Conn::WFReportParams => new.conn >= Conn::Connected,
        Conn::StandAlone
        | Conn::Disconnecting
        | Conn::Unconnected
        | Conn::Timeout
        | Conn::BrokenPipe
        | Conn::NetworkFailure
        | Conn::ProtocolError
        | Conn::TearDown
        | Conn::Connected
        | Conn::StartingSyncS
        | Conn::StartingSyncT
        | Conn::WFBitMapS
        | Conn::WFBitMapT
        | Conn::WFSyncUUID
        | Conn::SyncSource
        | Conn::SyncTarget
        | Conn::VerifyS
        | Conn::VerifyT
        | Conn::PausedSyncS
        | Conn::PausedSyncT
        | Conn::Ahead
        | Conn::Behind => false,
    };
    let matches = [
        (
            changing && is_starting_sync(new.conn) && old.conn > Conn::Connected,
            Refused::ResyncRunning,
        ),
        (
            new.conn == Conn::Disconnecting && old.conn == Conn::StandAlone,
            Refused::AlreadyStandAlone,
        ),
        (old.disk == Disk::Diskless && new.disk > Disk::Attaching, Refused::Diskless),
        (new.conn == Conn::WFConnection && old.conn < Conn::Unconnected, Refused::NoNetConfig),
        (
            new.disk == Disk::Outdated && old.disk < Disk::Outdated && old.disk != Disk::Attaching,
            Refused::LowerThanOutdated,
        ),
        (new.conn == Conn::Disconnecting && old.conn == Conn::Unconnected, Refused::TransientState),
        (rules.handshaking && !handshake_step, Refused::TransientState),
        (is_premature_promotion(old, new), Refused::TransientState),
        (is_verify(new.conn) && old.conn < Conn::Connected, Refused::NeedConnection),
        (is_verify(new.conn) && changing && old.conn > Conn::Connected, Refused::ResyncRunning),
        (is_starting_sync(new.conn) && old.conn < Conn::Connected, Refused::NeedConnection),
        (
            matches!(new.conn, Conn::SyncSource | Conn::SyncTarget)
                && old.conn < Conn::WFReportParams,
            Refused::NeedConnection,
        ),
        (
            new.conn == Conn::Disconnecting
                && new.pdsk == Disk::Outdated
                && old.conn < Conn::Connected
                && old.pdsk > Disk::Outdated,
            Refused::OutdateNeedsConnection,
        ),
    ];
    match matches.into_iter().rev().find(|(matched, _)| *matched) {
        Some((_, reason)) => Err(reason),
        None => Ok(()),
    }
}

/// A promotion next to good data, before it is clear that a resync really brings that data here.
fn is_premature_promotion(old: &State, new: &State) -> bool {
    let promoted = old.role == Role::Secondary && new.role == Role::Primary;
    let not_good = new.disk != Disk::UpToDate && new.disk != Disk::Diskless;
    let unsettled = new.conn <= Conn::WFSyncUUID || new.conn != old.conn;
    promoted && new.pdsk == Disk::UpToDate && not_good && unsettled
}

/// The limits that hold for every change, forced ones included.
///
/// # Errors
/// The reason; of several, the one for the disk, then the strictest for the connection.
pub fn hard_limits(old: &State, new: &State) -> Result<(), Refused> {
    if new.disk == Disk::Failed && old.disk == Disk::Diskless {
        return Err(Refused::Diskless);
    }
    if old.conn == new.conn {
        return Ok(());
    }
    match old.conn {
        Conn::StandAlone => {
            refuse_if(new.conn == Conn::Disconnecting, Refused::AlreadyStandAlone)?;
            refuse_if(new.conn != Conn::Unconnected, Refused::NeedConnection)
        }
        Conn::Disconnecting => refuse_if(new.conn != Conn::StandAlone, Refused::TransientState),
        Conn::Timeout
        | Conn::BrokenPipe
        | Conn::NetworkFailure
        | Conn::ProtocolError
        | Conn::TearDown => refuse_if(
            !matches!(new.conn, Conn::Unconnected | Conn::Disconnecting),
            Refused::TransientState,
        ),
        Conn::Unconnected | Conn::WFConnection => {
            refuse_if(new.conn >= Conn::Connected, Refused::NeedConnection)
        }
        Conn::WFReportParams
        | Conn::Connected
        | Conn::StartingSyncS
        | Conn::StartingSyncT
        | Conn::WFBitMapS
        | Conn::WFBitMapT
        | Conn::WFSyncUUID
        | Conn::SyncSource
        | Conn::SyncTarget
        | Conn::VerifyS
        | Conn::VerifyT
        | Conn::PausedSyncS
        | Conn::PausedSyncT
        | Conn::Ahead
        | Conn::Behind => Ok(()),
    }
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
