//! The state word of a volume: roles, connection and disk states, and what happens to them.
//!
//! Responsible for the vocabulary (numbers and names), for the word as it travels in `P_STATE`,
//! for the mask and value pairs of a state change request and for the log line of a change.
//! [`sanitize()`] answers what follows from a wish, [`validate`] whether it may happen. Who asks,
//! and what is done because of a change, belongs to the volume and the connection.
//!
//! Invariants: ST-1, ST-2, ST-5 and ST-7 (a refused change yields an error and no state).
//! Rules: protocol notes sections 5 to 7; the names are those that monitoring tools match.

pub mod sanitize;
pub mod validate;
mod word;

use std::fmt;

use serde::{Deserialize, Serialize};

pub(crate) use sanitize::has_no_data;
pub use sanitize::sanitize;
pub use validate::{Refused, hard_limits, validate_change, validate_state};
pub use word::{BadStateWord, Field, StateChange};

/// Declares an enum whose variants have a number on the wire and a name for the operator.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal,)+ }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub enum $name { $($(#[$doc])* $variant = $number,)+ }

        impl $name {
            /// Every value, in the order of the numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The number in the state word.
            #[must_use]
            pub const fn number(self) -> u32 {
                match self { $(Self::$variant => $number,)+ }
            }

            /// The value with that number; `None` if there is none.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// The name that operators and tools know.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

numbered! {
    /// What a node does with a volume.
    Role {
        /// Not known: the peer while there is no connection.
        Unknown = 0,
        /// The volume may be used here.
        Primary = 1,
        /// The volume only receives what the peer writes.
        Secondary = 2,
    }
}

numbered! {
    /// State of the connection, and of the resync or verify that runs over it.
    ///
    /// The order is that of the numbers and is used in comparisons: below
    /// [`Conn::Connected`] nothing is replicated, above it something runs.
    Conn {
        /// No connection is wanted.
        StandAlone = 0,
        /// The operator ends the connection.
        Disconnecting = 1,
        /// Between two attempts.
        Unconnected = 2,
        /// The peer did not answer in time.
        Timeout = 3,
        /// Sending failed.
        BrokenPipe = 4,
        /// Receiving failed.
        NetworkFailure = 5,
        /// The peer broke the protocol.
        ProtocolError = 6,
        /// The peer ends the connection.
        TearDown = 7,
        /// Waiting for the peer.
        WFConnection = 8,
        /// The sockets are up; parameters are being exchanged.
        WFReportParams = 9,
        /// Replicating.
        Connected = 10,
        /// A full resync from here was requested; bits are being set.
        StartingSyncS = 11,
        /// A full resync to here was requested; bits are being set.
        StartingSyncT = 12,
        /// Source of a resync, exchanging bitmaps.
        WFBitMapS = 13,
        /// Target of a resync, exchanging bitmaps.
        WFBitMapT = 14,
        /// Target of a resync, waiting for the sync UUID.
        WFSyncUUID = 15,
        /// Source of a running resync.
        SyncSource = 16,
        /// Target of a running resync.
        SyncTarget = 17,
        /// Initiator of an online verify.
        VerifyS = 18,
        /// The other side of an online verify.
        VerifyT = 19,
        /// Source of a paused resync.
        PausedSyncS = 20,
        /// Target of a paused resync.
        PausedSyncT = 21,
        /// Congested: writes are only marked, not sent.
        Ahead = 22,
        /// The peer is [`Conn::Ahead`].
        Behind = 23,
    }
}

numbered! {
    /// State of a disk. The order is used in comparisons: below [`Disk::Inconsistent`] there is
    /// no usable disk.
    Disk {
        /// No disk.
        Diskless = 0,
        /// Metadata is being read.
        Attaching = 1,
        /// On the way to `Diskless`.
        Failed = 2,
        /// Attached while connected; the handshake decides.
        Negotiating = 3,
        /// Being resynchronised, or never was.
        Inconsistent = 4,
        /// In itself consistent, known to be old.
        Outdated = 5,
        /// Only for the peer: no connection.
        DUnknown = 6,
        /// Not connected, and not known whether up to date.
        Consistent = 7,
        /// Up to date.
        UpToDate = 8,
    }
}

/// What a lost peer means for a Primary (`fencing`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Fencing {
    /// Nothing.
    #[default]
    DontCare,
    /// The fence-peer handler is called.
    ResourceOnly,
    /// The handler is called, and I/O is frozen until it has answered.
    ResourceAndStonith,
}

/// What happens to I/O without any reachable data (`on-no-data-accessible`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnNoData {
    /// It fails.
    #[default]
    IoError,
    /// It is frozen until data is reachable again.
    SuspendIo,
}

/// One volume's state: our role and disk, the peer's as we see them, and the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// Our role.
    pub role: Role,
    /// The peer's role.
    pub peer: Role,
    /// The connection.
    pub conn: Conn,
    /// Our disk.
    pub disk: Disk,
    /// The peer's disk.
    pub pdsk: Disk,
    /// I/O is suspended by the user.
    pub susp: bool,
    /// I/O is suspended because no data is reachable.
    pub susp_nod: bool,
    /// I/O is suspended while the peer is being fenced.
    pub susp_fen: bool,
    /// Resync is paused because another device of this node goes first.
    pub aftr_isp: bool,
    /// Resync is paused by the peer.
    pub peer_isp: bool,
    /// Resync is paused by the user.
    pub user_isp: bool,
}

impl State {
    /// The state of a volume that has just been created.
    #[must_use]
    pub const fn initial() -> Self {
        Self {
            role: Role::Secondary,
            peer: Role::Unknown,
            conn: Conn::StandAlone,
            disk: Disk::Diskless,
            pdsk: Disk::DUnknown,
            susp: false,
            susp_nod: false,
            susp_fen: false,
            aftr_isp: false,
            peer_isp: false,
            user_isp: false,
        }
    }

    /// Whether I/O of the host is held back, for any reason.
    #[must_use]
    pub const fn is_suspended(self) -> bool {
        self.susp || self.susp_nod || self.susp_fen
    }

    /// Whether a resync would have to pause, for any reason.
    #[must_use]
    pub const fn is_resync_paused(self) -> bool {
        self.aftr_isp || self.peer_isp || self.user_isp
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{} {}/{}", self.conn, self.role, self.peer, self.disk, self.pdsk)?;
        write!(f, " susp-io:{}", suspension(self))?;
        write!(f, " resync-susp:{}", resync_suspension(self))
    }
}

/// What the rules need to know beyond the state itself.
///
/// The caller fills it from the configuration and from its own bookkeeping right before the
/// question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// `allow-two-primaries`, as agreed with the peer.
    pub two_primaries: bool,
    /// `fencing`.
    pub fencing: Fencing,
    /// `on-no-data-accessible`.
    pub on_no_data: OnNoData,
    /// A verify algorithm is configured.
    pub has_verify_alg: bool,
    /// The protocol version agreed with the peer; the highest one while not connected.
    pub agreed_version: u32,
    /// Somebody holds the device open.
    pub device_open: bool,
    /// The peer is Primary on another volume of the same connection.
    pub peer_primary_elsewhere: bool,
    /// The handshake of the connection runs: our first `P_STATE` was sent, and not all volumes
    /// have left [`Conn::WFReportParams`].
    pub handshaking: bool,
    /// The states of our and of the peer's disk that an attach in progress has read from the
    /// metadata. `None` if there is no such attach, or if the volume has been serving data of
    /// another generation than the one on that disk: then a lost connection ends the attach.
    pub negotiating: Option<(Disk, Disk)>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            two_primaries: false,
            fencing: Fencing::DontCare,
            on_no_data: OnNoData::IoError,
            has_verify_alg: false,
            agreed_version: crate::limits::PROTOCOL_MAX,
            device_open: false,
            peer_primary_elsewhere: false,
            handshaking: false,
            negotiating: None,
        }
    }
}

/// The result of a change that may be refused: the state to enter.
///
/// `old` with `change` applied, sanitised, and checked by [`hard_limits`] and
/// [`validate_change`]. An explicit wish to be Outdated is refused on a connection before
/// sanitising would turn it into nothing, and so is a wish that would declare an unusable disk to
/// be good as a side effect (a verify or resync request among bad disks).
///
/// # Errors
/// The rule that forbids it; then nothing may be changed (ST-7).
pub fn soft_change(old: &State, change: &StateChange, rules: &Rules) -> Result<State, Refused> {
    let wish = change.apply(*old);
    if change.disk == Some(Disk::Outdated) && validate::must_not_be_outdated(wish.conn) {
        return Err(Refused::OutdatedWhileConnected);
    }
    let new = sanitize(wish, old, rules);
    let works = new.conn > Conn::Connected;
    if works && (is_raised(wish.disk, new.disk) || is_raised(wish.pdsk, new.pdsk)) {
        return Err(Refused::NoUpToDateDisk);
    }
    hard_limits(old, &new)?;
    validate_change(old, &new, rules)?;
    Ok(new)
}

/// Whether data that is no data was made good; only an explicit, forced wish may do that.
fn is_raised(wish: Disk, new: Disk) -> bool {
    (Disk::Negotiating..=Disk::Inconsistent).contains(&wish)
        && (Disk::Consistent..=Disk::UpToDate).contains(&new)
}

/// Whether going from `old` to `new` means that the peer was promoted by force while neither
/// side had good data: the next `P_STATE` then has to run the handshake.
#[must_use]
pub fn peer_was_forced(old: &State, new: &State) -> bool {
    old.disk == Disk::Inconsistent
        && old.pdsk == Disk::Inconsistent
        && old.peer == Role::Secondary
        && new.peer == Role::Primary
}

/// What changed from `old` to `new`, in the form that operators search for in logs; `None` if
/// nothing did.
#[must_use]
pub fn log_line(old: &State, new: &State) -> Option<String> {
    let parts = [
        part("role", old.role.name(), new.role.name()),
        part("peer", old.peer.name(), new.peer.name()),
        part("conn", old.conn.name(), new.conn.name()),
        part("disk", old.disk.name(), new.disk.name()),
        part("pdsk", old.pdsk.name(), new.pdsk.name()),
        part("susp-io", &suspension(old), &suspension(new)),
        part("resync-susp", &resync_suspension(old), &resync_suspension(new)),
    ];
    let changed: Vec<String> = parts.into_iter().flatten().collect();
    if changed.is_empty() { None } else { Some(changed.join(" ")) }
}

fn part(label: &str, old: &str, new: &str) -> Option<String> {
    if old == new { None } else { Some(format!("{label}( {old} -> {new} )")) }
}

/// Why I/O is suspended, in words.
pub(crate) fn suspension(state: &State) -> String {
    words(&[(state.susp, "user"), (state.susp_nod, "no-data"), (state.susp_fen, "fencing")])
}

fn resync_suspension(state: &State) -> String {
    let flags =
        [(state.user_isp, "user"), (state.peer_isp, "peer"), (state.aftr_isp, "dependency")];
    words(&flags)
}

fn words(flags: &[(bool, &str)]) -> String {
    let set: Vec<&str> = flags.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect();
    if set.is_empty() { String::from("no") } else { set.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_those_of_the_protocol() {
        assert_eq!(Role::ALL.len(), 3);
        assert_eq!(Conn::ALL.len(), 24);
        assert_eq!(Disk::ALL.len(), 9);
        for (number, conn) in (0u32..).zip(Conn::ALL) {
            assert_eq!((conn.number(), Conn::from_number(number)), (number, Some(*conn)));
        }
        assert_eq!(Conn::from_number(24), None);
        assert_eq!(Disk::from_number(9), None);
        assert_eq!(Role::from_number(3), None);
        assert_eq!(Disk::DUnknown.to_string(), "DUnknown");
        assert_eq!(Conn::WFBitMapS.to_string(), "WFBitMapS");
        assert_eq!(format!("{:<10}|", Role::Primary), "Primary   |");
        assert!(Disk::Outdated < Disk::DUnknown && Conn::WFReportParams < Conn::Connected);
    }

    #[test]
    fn the_log_line_names_only_what_changed() {
        let old = State {
            conn: Conn::Connected,
            peer: Role::Secondary,
            disk: Disk::UpToDate,
            pdsk: Disk::Outdated,
            ..State::initial()
        };
        assert_eq!(log_line(&old, &old), None);
        let new =
            State { role: Role::Primary, conn: Conn::WFBitMapS, pdsk: Disk::Inconsistent, ..old };
        assert_eq!(
            log_line(&old, &new).unwrap(),
            "role( Secondary -> Primary ) conn( Connected -> WFBitMapS ) \
             pdsk( Outdated -> Inconsistent )"
        );
        let frozen = State { susp: true, susp_fen: true, aftr_isp: true, ..old };
        assert_eq!(
            log_line(&old, &frozen).unwrap(),
            "susp-io( no -> user,fencing ) resync-susp( no -> dependency )"
        );
        assert!(frozen.is_suspended() && frozen.is_resync_paused());
        let lost = State { peer: Role::Unknown, susp_nod: true, peer_isp: true, ..old };
        assert_eq!(
            log_line(&old, &lost).unwrap(),
            "peer( Secondary -> Unknown ) susp-io( no -> no-data ) resync-susp( no -> peer )"
        );
        assert_eq!(
            old.to_string(),
            "Connected Secondary/Secondary UpToDate/Outdated susp-io:no resync-susp:no"
        );
    }

    #[test]
    fn a_soft_change_yields_the_sanitised_state_or_the_reason() {
        let old = State {
            conn: Conn::Connected,
            peer: Role::Secondary,
            disk: Disk::UpToDate,
            pdsk: Disk::UpToDate,
            ..State::initial()
        };
        let promote = StateChange { role: Some(Role::Primary), ..StateChange::default() };
        let new = soft_change(&old, &promote, &Rules::default()).unwrap();
        assert_eq!(new, State { role: Role::Primary, ..old });
        let outdate = StateChange { disk: Some(Disk::Outdated), ..StateChange::default() };
        let refused = soft_change(&old, &outdate, &Rules::default());
        assert_eq!(refused, Err(Refused::OutdatedWhileConnected));
        let verify = StateChange { conn: Some(Conn::VerifyS), ..StateChange::default() };
        let refused = soft_change(&old, &verify, &Rules::default());
        assert_eq!(refused, Err(Refused::NoVerifyAlg));
        let bad = State { disk: Disk::Inconsistent, pdsk: Disk::Inconsistent, ..old };
        let able = Rules { has_verify_alg: true, ..Rules::default() };
        for conn in [Conn::VerifyS, Conn::VerifyT, Conn::StartingSyncS, Conn::StartingSyncT] {
            let wish = StateChange { conn: Some(conn), ..StateChange::default() };
            assert_eq!(soft_change(&bad, &wish, &able), Err(Refused::NoUpToDateDisk), "{conn}");
            let new = soft_change(&old, &wish, &able).unwrap();
            assert_eq!(new.conn, conn);
        }
        let attaching = State { disk: Disk::Negotiating, ..old };
        let known =
            Rules { negotiating: Some((Disk::Consistent, Disk::DUnknown)), ..Rules::default() };
        let leave = StateChange { conn: Some(Conn::Disconnecting), ..StateChange::default() };
        assert_eq!(soft_change(&attaching, &leave, &known).unwrap().disk, Disk::Consistent);
        let force = StateChange { disk: Some(Disk::UpToDate), ..promote };
        let new = soft_change(&bad, &force, &Rules::default()).unwrap();
        assert_eq!((new.role, new.disk), (Role::Primary, Disk::UpToDate));
        let alone = State { conn: Conn::StandAlone, ..old };
        let refused = soft_change(&alone, &leave, &Rules::default());
        assert_eq!(refused, Err(Refused::AlreadyStandAlone));
    }

    #[test]
    fn a_peer_promoted_among_bad_disks_was_forced() {
        let old = State {
            conn: Conn::Connected,
            peer: Role::Secondary,
            disk: Disk::Inconsistent,
            pdsk: Disk::Inconsistent,
            ..State::initial()
        };
        let new = State { peer: Role::Primary, pdsk: Disk::UpToDate, ..old };
        assert!(peer_was_forced(&old, &new));
        assert!(!peer_was_forced(&old, &old));
        assert!(!peer_was_forced(&State { disk: Disk::UpToDate, ..old }, &new));
        assert!(!peer_was_forced(&State { pdsk: Disk::UpToDate, ..old }, &new));
        assert!(!peer_was_forced(&new, &new));
    }
}
