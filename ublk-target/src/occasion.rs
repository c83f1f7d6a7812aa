//! What happens to a resource that a handler is to tell of.
//!
//! For `local-io-error` the core asks by itself. Everything else is seen from outside, by what the
//! core shows anyway: the state of each volume after every event, and what it says of a split brain,
//! compared with the words of its own types. Nothing that a handler does comes back to the core.
//!
//! Rules: the notes on the user's surface, handlers.

use replication_core::action::Scope;
use replication_core::event::VolumeIx;
use replication_core::handshake::{HandshakeFailure, Solved};
use replication_core::resource::Resource;
use replication_core::state::{Conn, Disk, Role, State};

use crate::handler::Program;

/// A handler that is to run, and the volume it is about; none: the whole resource.
pub type Occasion = (Program, Option<VolumeIx>);

/// The states that were seen last.
#[derive(Debug)]
pub struct Watch {
    seen: Vec<State>,
}

impl Watch {
    /// Nothing has happened to the volumes yet.
    #[must_use]
    pub fn new(volumes: usize) -> Self {
        Self { seen: vec![State::initial(); volumes] }
    }

    /// Takes in the states after an event.
    ///
    /// # Panics
    /// The core has other volumes.
    pub fn look(&mut self, core: &Resource, found: &mut Vec<Occasion>) {
        for (index, seen) in (0..).zip(&mut self.seen) {
            let volume = VolumeIx(index);
            let now = core.state(volume).expect("the volumes of a resource do not change");
            let old = std::mem::replace(seen, now);
            if old != now {
                found.extend(of_change(&old, &now).map(|program| (program, Some(volume))));
            }
        }
    }
}

fn of_change(old: &State, new: &State) -> impl Iterator<Item = Program> {
    let is_target = |state: &State| matches!(state.conn, Conn::SyncTarget | Conn::PausedSyncT);
    let is_synced = is_target(old) && new.conn == Conn::Connected && new.disk == Disk::UpToDate;
    let is_stranded = |state: &State| {
        let is_alone = state.conn < Conn::Connected;
        state.role == Role::Primary && state.disk == Disk::Inconsistent && is_alone
    };
    let is_lost = is_stranded(new) && !is_stranded(old);
    let synced = is_synced.then_some(Program::AfterResyncTarget);
    synced.into_iter().chain(is_lost.then_some(Program::PriOnInconDegr))
}

/// Takes in what the core says in its log.
pub fn listen(scope: Scope, text: &str, found: &mut Vec<Occasion>) {
    if scope == Scope::Connection && text == HandshakeFailure::SplitBrain.to_string() {
        found.extend([(Program::InitialSplitBrain, None), (Program::SplitBrain, None)]);
    }
    if let Scope::PeerDevice(volume) = scope
        && solutions().any(|solved| solved.to_string() == text)
    {
        found.push((Program::InitialSplitBrain, Some(volume)));
    }
}

/// Every way in which a split brain is solved.
fn solutions() -> impl Iterator<Item = Solved> {
    [true, false].into_iter().flat_map(|from_here| {
        let automatic = move |primaries| Solved::Automatic { primaries, from_here };
        (0..=2).map(automatic).chain([Solved::Manually { from_here }])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(role: Role, conn: Conn, disk: Disk) -> State {
        State { role, conn, disk, ..State::initial() }
    }

    #[test]
    fn changes_that_a_handler_tells_of() {
        use Program::{AfterResyncTarget, PriOnInconDegr};
        let (primary, secondary) = (Role::Primary, Role::Secondary);
        let target = state(secondary, Conn::SyncTarget, Disk::Inconsistent);
        let paused = State { conn: Conn::PausedSyncT, ..target };
        let source = state(secondary, Conn::SyncSource, Disk::UpToDate);
        let synced = state(secondary, Conn::Connected, Disk::UpToDate);
        let given_up = State { conn: Conn::Connected, ..target };
        let cut = State { conn: Conn::NetworkFailure, ..target };
        let alone = |state: State| State { role: primary, conn: Conn::WFConnection, ..state };
        let table: [(State, State, &[Program]); 10] = [
            (target, synced, &[AfterResyncTarget]),
            (paused, synced, &[AfterResyncTarget]),
            (source, synced, &[]),
            (target, given_up, &[]),
            (target, cut, &[]),
            (paused, target, &[]),
            (State { role: primary, ..target }, State { role: primary, ..cut }, &[PriOnInconDegr]),
            (State { role: primary, ..cut }, alone(cut), &[]),
            (State { role: primary, ..synced }, alone(synced), &[]),
            (
                State { role: primary, ..target },
                State { role: primary, ..synced },
                &[AfterResyncTarget],
            ),
        ];
        for (old, new, expected) in table {
            let found: Vec<Program> = of_change(&old, &new).collect();
            assert_eq!(found, expected, "{old:?} -> {new:?}");
        }
    }

    #[test]
    fn a_split_brain_is_heard_of_whether_solved_or_not() {
        let heard = |scope, text: &str| {
            let mut found = Vec::new();
            listen(scope, text, &mut found);
            found
        };
        let volume = VolumeIx(3);
        let unsolved = "Split-Brain detected but unresolved, dropping connection!";
        let both = [(Program::InitialSplitBrain, None), (Program::SplitBrain, None)];
        assert_eq!(heard(Scope::Connection, unsolved), both);
        let first = [(Program::InitialSplitBrain, Some(volume))];
        for text in [
            "Split-Brain detected, 0 primaries, automatically solved. Sync from this node",
            "Split-Brain detected, 2 primaries, automatically solved. Sync from peer node",
            "Split-Brain detected, manually solved. Sync from this node",
        ] {
            assert_eq!(heard(Scope::PeerDevice(volume), text), first, "{text}");
        }
        assert!(heard(Scope::PeerDevice(volume), "Becoming sync source").is_empty());
    }
}
