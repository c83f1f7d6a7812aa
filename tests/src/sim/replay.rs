//! Where a run stands, for whoever has to tell after a failure, and what a replay shows.
//!
//! A release build ends at the first failure without unwinding, so nothing of the world can be
//! asked then. The runner notes the step of the failure, runs the seed again, and lets this run
//! show its last lines and the states as they were right before that step. One thread runs one
//! world at a time.

use std::cell::Cell;

use super::world::World;

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Things that have happened.
    pub steps: u64,
    /// Lines of trace.
    pub lines: u64,
}

/// What a replay prints.
#[derive(Clone, Copy, Debug)]
pub struct Show {
    /// Lines of trace from this one on.
    pub from_line: u64,
    /// The states right before this step.
    pub before_step: u64,
}

thread_local! {
    static POSITION: Cell<Position> = const { Cell::new(Position { steps: 0, lines: 0 }) };
    static SHOW: Cell<Option<Show>> = const { Cell::new(None) };
}

/// How far the run of this thread has come.
#[must_use]
pub fn position() -> Position {
    POSITION.get()
}

/// What the run of this thread is to show.
pub fn show(what: Show) {
    SHOW.set(Some(what));
}

/// Whether this line of trace is to be printed.
pub(crate) fn on_line(lines: u64) -> bool {
    POSITION.set(Position { lines, ..POSITION.get() });
    SHOW.get().is_some_and(|show| lines >= show.from_line)
}

/// The next step begins.
pub(crate) fn on_step(world: &World) {
    let position = Position { steps: world.steps, lines: world.trace.count() };
    POSITION.set(position);
    if SHOW.get().is_some_and(|show| show.before_step == world.steps) {
        eprintln!("--- states before step {}\n{}---", world.steps, world.states());
    }
}
