//! The state word and the mask and value pair of a change request, to and from typed values.
//!
//! Numbers that have no meaning are an error of the peer, reported with the field. The invariant
//! is that every [`State`] survives the way to a word and back. Layout: protocol notes section 5;
//! the change of view: section 6.2.

use std::fmt;

use super::{Conn, Disk, Role, State};

/// The fields of a state word that hold a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The sender's role.
    Role,
    /// The role of its peer.
    Peer,
    /// The connection.
    Conn,
    /// The sender's disk.
    Disk,
    /// The disk of its peer.
    Pdsk,
}

impl Field {
    /// Shift and width in bits.
    const fn place(self) -> (u32, u32) {
        match self {
            Self::Role => (0, 2),
            Self::Peer => (2, 2),
            Self::Conn => (4, 5),
            Self::Disk => (9, 4),
            Self::Pdsk => (13, 4),
        }
    }

    const fn ones(self) -> u32 {
        let (_, width) = self.place();
        (1 << width) - 1
    }

    const fn get(self, word: u32) -> u32 {
        let (shift, _) = self.place();
        (word >> shift) & self.ones()
    }

    const fn put(self, number: u32) -> u32 {
        let (shift, _) = self.place();
        number << shift
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Role => "role",
            Self::Peer => "peer",
            Self::Conn => "conn",
            Self::Disk => "disk",
            Self::Pdsk => "pdsk",
        })
    }
}

/// A state word or a change request that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadStateWord {
    /// A field holds a number without meaning.
    #[error("state word: field {field} holds {found}, which has no meaning")]
    Value {
        /// Where.
        field: Field,
        /// The number found.
        found: u32,
    },
    /// A mask covers a field only in part.
    #[error("state change: the mask of field {field} is {found:#x}, expected 0 or {expected:#x}")]
    Mask {
        /// Where.
        field: Field,
        /// The mask of a whole field.
        expected: u32,
        /// The mask found.
        found: u32,
    },
}

const SUSP: u32 = 1 << 17;
const AFTR_ISP: u32 = 1 << 18;
const PEER_ISP: u32 = 1 << 19;
const USER_ISP: u32 = 1 << 20;
const SUSP_NOD: u32 = 1 << 21;
const SUSP_FEN: u32 = 1 << 22;

const fn bit(on: bool, bit: u32) -> u32 {
    if on { bit } else { 0 }
}

fn role(field: Field, word: u32) -> Result<Role, BadStateWord> {
    let found = field.get(word);
    Role::from_number(found).ok_or(BadStateWord::Value { field, found })
}

fn conn(word: u32) -> Result<Conn, BadStateWord> {
    let field = Field::Conn;
    let found = field.get(word);
    Conn::from_number(found).ok_or(BadStateWord::Value { field, found })
}

fn disk(field: Field, word: u32) -> Result<Disk, BadStateWord> {
    let found = field.get(word);
    Disk::from_number(found).ok_or(BadStateWord::Value { field, found })
}

impl State {
    /// The state as it travels in `P_STATE`: 32 bits, of which the upper nine are 0.
    #[must_use]
    pub const fn word(self) -> u32 {
        Field::Role.put(self.role.number())
            | Field::Peer.put(self.peer.number())
            | Field::Conn.put(self.conn.number())
            | Field::Disk.put(self.disk.number())
            | Field::Pdsk.put(self.pdsk.number())
            | bit(self.susp, SUSP)
            | bit(self.aftr_isp, AFTR_ISP)
            | bit(self.peer_isp, PEER_ISP)
            | bit(self.user_isp, USER_ISP)
            | bit(self.susp_nod, SUSP_NOD)
            | bit(self.susp_fen, SUSP_FEN)
    }

    /// The state of a word from the wire; bits 23 to 31 are ignored, as newer peers use them.
    ///
    /// # Errors
    /// [`BadStateWord::Value`] if a field holds a number without meaning.
    pub fn from_word(word: u32) -> Result<Self, BadStateWord> {
        Ok(Self {
            role: role(Field::Role, word)?,
            peer: role(Field::Peer, word)?,
            conn: conn(word)?,
            disk: disk(Field::Disk, word)?,
            pdsk: disk(Field::Pdsk, word)?,
            susp: word & SUSP != 0,
            susp_nod: word & SUSP_NOD != 0,
            susp_fen: word & SUSP_FEN != 0,
            aftr_isp: word & AFTR_ISP != 0,
            peer_isp: word & PEER_ISP != 0,
            user_isp: word & USER_ISP != 0,
        })
    }
}

/// A wish to change parts of a state; `None` leaves a part as it is.
///
/// On the wire it is a mask and a value, both laid out as a state word and both in the view of
/// the sender. The suspension of I/O is a matter of each node alone and not part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateChange {
    /// Our role.
    pub role: Option<Role>,
    /// The peer's role.
    pub peer: Option<Role>,
    /// The connection.
    pub conn: Option<Conn>,
    /// Our disk.
    pub disk: Option<Disk>,
    /// The peer's disk.
    pub pdsk: Option<Disk>,
    /// Pause because of a dependency.
    pub aftr_isp: Option<bool>,
    /// Pause of the peer.
    pub peer_isp: Option<bool>,
    /// Pause by the user.
    pub user_isp: Option<bool>,
}

/// Whether the mask covers the field: wholly (true) or not at all (false).
fn covers(mask: u32, field: Field) -> Result<bool, BadStateWord> {
    let (found, expected) = (field.get(mask), field.ones());
    if found == 0 {
        Ok(false)
    } else if found == expected {
        Ok(true)
    } else {
        Err(BadStateWord::Mask { field, expected, found })
    }
}

fn flag(mask: u32, value: u32, bit: u32) -> Option<bool> {
    if mask & bit == 0 { None } else { Some(value & bit != 0) }
}

impl StateChange {
    /// The change of a request. Mask bits of the I/O suspension and of bits 23 to 31 are ignored.
    ///
    /// # Errors
    /// [`BadStateWord`] if the mask covers a field in part, or a covered field has no meaning.
    pub fn from_mask_value(mask: u32, value: u32) -> Result<Self, BadStateWord> {
        let role_of = |field| covers(mask, field)?.then(|| role(field, value)).transpose();
        let disk_of = |field| covers(mask, field)?.then(|| disk(field, value)).transpose();
        Ok(Self {
            role: role_of(Field::Role)?,
            peer: role_of(Field::Peer)?,
            conn: covers(mask, Field::Conn)?.then(|| conn(value)).transpose()?,
            disk: disk_of(Field::Disk)?,
            pdsk: disk_of(Field::Pdsk)?,
            aftr_isp: flag(mask, value, AFTR_ISP),
            peer_isp: flag(mask, value, PEER_ISP),
            user_isp: flag(mask, value, USER_ISP),
        })
    }

    /// The mask and the value for a request.
    #[must_use]
    pub fn mask_value(&self) -> (u32, u32) {
        let fields = [
            (Field::Role, self.role.map(Role::number)),
            (Field::Peer, self.peer.map(Role::number)),
            (Field::Conn, self.conn.map(Conn::number)),
            (Field::Disk, self.disk.map(Disk::number)),
            (Field::Pdsk, self.pdsk.map(Disk::number)),
        ];
        let (mut mask, mut value) = (0, 0);
        for (field, number) in fields {
            if let Some(number) = number {
                mask |= field.put(field.ones());
                value |= field.put(number);
            }
        }
        let flags =
            [(AFTR_ISP, self.aftr_isp), (PEER_ISP, self.peer_isp), (USER_ISP, self.user_isp)];
        for (bit_of, wish) in flags {
            if let Some(on) = wish {
                mask |= bit_of;
                value |= bit(on, bit_of);
            }
        }
        (mask, value)
    }

    /// The same change seen from the other node.
    ///
    /// A connection state that no peer may ask for becomes [`Conn::StandAlone`]; the rules for
    /// changes then refuse it or end the connection.
    #[must_use]
    pub fn mirrored(&self) -> Self {
        let peer_isp = match (self.aftr_isp, self.user_isp) {
            (None, None) => None,
            (aftr, user) => Some(aftr.unwrap_or(false) || user.unwrap_or(false)),
        };
        Self {
            role: self.peer,
            peer: self.role,
            conn: self.conn.map(mirrored_conn),
            disk: self.pdsk,
            pdsk: self.disk,
            aftr_isp: None,
            peer_isp,
            user_isp: None,
        }
    }

    /// `state` with the change made to it, nothing else.
    #[must_use]
    pub fn apply(&self, state: State) -> State {
        State {
            role: self.role.unwrap_or(state.role),
            peer: self.peer.unwrap_or(state.peer),
            conn: self.conn.unwrap_or(state.conn),
            disk: self.disk.unwrap_or(state.disk),
            pdsk: self.pdsk.unwrap_or(state.pdsk),
            aftr_isp: self.aftr_isp.unwrap_or(state.aftr_isp),
            peer_isp: self.peer_isp.unwrap_or(state.peer_isp),
            user_isp: self.user_isp.unwrap_or(state.user_isp),
            ..state
        }
    }
}

const fn mirrored_conn(conn: Conn) -> Conn {
    match conn {
        Conn::WFReportParams => Conn::WFReportParams,
        Conn::Connected => Conn::Connected,
        Conn::StartingSyncS => Conn::StartingSyncT,
        Conn::StartingSyncT => Conn::StartingSyncS,
        Conn::Disconnecting => Conn::TearDown,
        Conn::VerifyS => Conn::VerifyT,
        Conn::StandAlone
        | Conn::Unconnected
        | Conn::Timeout
        | Conn::BrokenPipe
        | Conn::NetworkFailure
        | Conn::ProtocolError
        | Conn::TearDown
        | Conn::WFConnection
        | Conn::WFBitMapS
        | Conn::WFBitMapT
        | Conn::WFSyncUUID
        | Conn::SyncSource
        | Conn::SyncTarget
        | Conn::VerifyT
        | Conn::PausedSyncS
        | Conn::PausedSyncT
        | Conn::Ahead
        | Conn::Behind => Conn::StandAlone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_seen_on_the_wire_are_understood() {
        let first = State::from_word(0x0000_c882).unwrap();
        let expected =
            State { conn: Conn::WFConnection, disk: Disk::Inconsistent, ..State::initial() };
        assert_eq!(first, expected);
        let connected = State::from_word(0x0000_88aa).unwrap();
        assert_eq!(
            connected,
            State {
                peer: Role::Secondary,
                conn: Conn::Connected,
                disk: Disk::Inconsistent,
                pdsk: Disk::Inconsistent,
                ..State::initial()
            }
        );
        assert_eq!((first.word(), connected.word()), (0xc882, 0x88aa));
        assert_eq!(State::from_word(0xff80_88aa), Ok(connected));
    }

    #[test]
    fn every_state_survives_the_way_to_a_word_and_back() {
        for word in 0u32..1 << 23 {
            if let Ok(state) = State::from_word(word) {
                assert_eq!(state.word(), word);
            }
        }
    }

    #[test]
    fn numbers_without_meaning_name_their_field() {
        let bad = |field, found| Err(BadStateWord::Value { field, found });
        assert_eq!(State::from_word(0x3), bad(Field::Role, 3));
        assert_eq!(State::from_word(0xe), bad(Field::Peer, 3));
        assert_eq!(State::from_word(0x1f2), bad(Field::Conn, 31));
        assert_eq!(State::from_word(0x1e02), bad(Field::Disk, 15));
        assert_eq!(State::from_word(0x1_2002), bad(Field::Pdsk, 9));
        let text = BadStateWord::Value { field: Field::Pdsk, found: 9 }.to_string();
        assert_eq!(text, "state word: field pdsk holds 9, which has no meaning");
        let partial = StateChange::from_mask_value(0x0000_0800, 0);
        let mask = BadStateWord::Mask { field: Field::Disk, expected: 15, found: 4 };
        assert_eq!(partial, Err(mask));
        assert_eq!(
            mask.to_string(),
            "state change: the mask of field disk is 0x4, expected 0 or 0xf"
        );
        let all_bits = StateChange::from_mask_value(0x1f0, 0x1f0);
        assert_eq!(all_bits, Err(BadStateWord::Value { field: Field::Conn, found: 31 }));
    }

    #[test]
    fn requests_seen_on_the_wire_are_read_built_and_mirrored() {
        let none = StateChange::default();
        let promote = StateChange { role: Some(Role::Primary), ..none };
        let forced = StateChange { disk: Some(Disk::UpToDate), ..promote };
        let conn = |conn| StateChange { conn: Some(conn), ..none };
        let cases = [
            (0x3, 0x1, promote, StateChange { peer: Some(Role::Primary), ..none }),
            (
                0x1e03,
                0x1001,
                forced,
                StateChange { peer: Some(Role::Primary), pdsk: Some(Disk::UpToDate), ..none },
            ),
            (
                0x1e00,
                0x400,
                StateChange { disk: Some(Disk::Failed), ..none },
                StateChange { pdsk: Some(Disk::Failed), ..none },
            ),
            (0x1f0, 0x10, conn(Conn::Disconnecting), conn(Conn::TearDown)),
            (0x1f0, 0xc0, conn(Conn::StartingSyncT), conn(Conn::StartingSyncS)),
            (0x1f0, 0xb0, conn(Conn::StartingSyncS), conn(Conn::StartingSyncT)),
            (0x1f0, 0x120, conn(Conn::VerifyS), conn(Conn::VerifyT)),
            (0x1f0, 0x160, conn(Conn::Ahead), conn(Conn::StandAlone)),
            (
                0x1e1f0,
                0xa010,
                StateChange { pdsk: Some(Disk::Outdated), ..conn(Conn::Disconnecting) },
                StateChange { disk: Some(Disk::Outdated), ..conn(Conn::TearDown) },
            ),
        ];
        for (mask, value, change, mirrored) in cases {
            assert_eq!(StateChange::from_mask_value(mask, value), Ok(change));
            assert_eq!(change.mask_value(), (mask, value));
            assert_eq!(change.mirrored(), mirrored);
        }
    }

    #[test]
    fn pauses_of_the_sender_become_one_pause_of_the_peer() {
        let none = StateChange::default();
        let both = StateChange { aftr_isp: Some(false), user_isp: Some(true), ..none };
        assert_eq!(both.mirrored(), StateChange { peer_isp: Some(true), ..none });
        let off = StateChange { user_isp: Some(false), ..none };
        assert_eq!(off.mirrored(), StateChange { peer_isp: Some(false), ..none });
        let peer = StateChange { peer_isp: Some(true), ..none };
        assert_eq!(peer.mirrored(), none);
        let (mask, value) = both.mask_value();
        assert_eq!((mask, value), (0x14_0000, 0x10_0000));
        assert_eq!(StateChange::from_mask_value(mask, value), Ok(both));
        let paused = both.apply(State { aftr_isp: true, ..State::initial() });
        assert!(paused.user_isp && !paused.aftr_isp);
    }
}
