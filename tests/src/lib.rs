//! The simulator: two nodes of the production core in one thread, with virtual time and one seed.
//!
//! [`sim`] is the machinery (disks, network, hosts, the ledger of what was written, checkers),
//! [`random`] the seeded runs of faults and healing, [`runner`] many of them. Scenarios in `tests/`
//! use the same machinery with a script. Everything that happens is a function of the seed.
#![forbid(unsafe_code)]

pub mod crash;
pub mod disturb;
pub mod fuzz;
pub mod random;
pub mod runner;
pub mod sim;
