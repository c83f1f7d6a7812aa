//! Crash points: what is left on a disk after a power cut at any moment, and what recovery makes
//! of it.
//!
//! A scripted history runs on the production core with disks that remember which writes are not
//! durable. After every change of a disk the possible states after a power cut are built, each is
//! attached by a fresh core, and the outcome is compared with what the history knows to be true.
//! This complements the simulator: fewer and shorter runs, but every moment and every subset.
//!
//! | room | question it answers |
//! |---|---|
//! | [`medium`] | what may be on this disk after a power cut? |
//! | [`pair`] | what happens next to one or two nodes? |
//! | [`ledger`] | what was written, and what has to survive? |
//! | [`recover`] | what does the production attach make of a disk? |
//! | [`explore`] | is what must hold true for all of these? |
//! | [`history`] | which histories are there, and how is one written? |

pub mod explore;
pub mod history;
pub mod ledger;
pub mod medium;
pub mod pair;
pub mod recover;
