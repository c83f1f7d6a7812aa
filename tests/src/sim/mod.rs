//! Two nodes, their disks, the network between them, their hosts, and one queue of events.
//!
//! | room | question it answers |
//! |---|---|
//! | [`rng`] | what does chance say? |
//! | [`disk`] | what is left on this disk after a crash? |
//! | [`net`] | which bytes arrive, and when? |
//! | [`node`] | what does a driver do with the core's actions? |
//! | `sockets` | which packet is read next? |
//! | [`ledger`] | which contents may this sector have? |
//! | `lent` | was the memory of a packet left alone? |
//! | [`host`] | what does the host ask for, and was it answered rightly? |
//! | [`stranger`] | what if it is not the peer who connects? |
//! | [`setup`] | with which options do the nodes run? |
//! | [`world`] | what happens next? |
//! | [`check`] | is what must always hold still true? |
//! | [`order`] | could the host have had this history? |
//! | `outgrown` | where is the metadata of a disk that has grown? |
//! | [`still`] | has something changed that should not have? |
//! | [`watch`] | did this one event break a rule? |
//! | [`coverage`] | what did the run meet, and what never? |
//! | [`trace`] | what happened, in words? |
//! | [`replay`] | how far has the run come, and what is to be shown of it? |

pub mod check;
pub mod control;
pub mod coverage;
pub mod disk;
pub mod host;
pub mod ledger;
mod lent;
pub mod net;
pub mod node;
pub mod order;
mod outgrown;
pub mod replay;
pub mod rng;
pub mod setup;
mod sockets;
pub mod still;
pub mod stranger;
pub mod trace;
pub mod watch;
pub mod world;

pub use host::Load;
pub use setup::Setup;
pub use world::World;

/// One node.
pub const A: usize = 0;
/// The other node.
pub const B: usize = 1;
