//! Two real engines and everything that a wire, or whoever sits at its other end, can do to them.
//!
//! The engines run as in production, each in its own network name space, and believe to be
//! connected to each other. Between them stands a [`relay`] that holds the peer's address on
//! either side and breaks, delays or changes what passes, as a [`plan`] says that follows from a
//! seed; [`frames`] tells it what a byte is. A [`host`] writes to the Primary all the while and
//! knows what every sector must hold. A [`stranger`] takes the place of a peer and says anything,
//! and with the secret its [`madness`] begins only behind the handshake.
//! [`rounds`] puts them together: faults, then healing, then the disks are compared. A [`node`] is
//! what an operator sees of an engine.
//!
//! Checked: RS-1, RD-1, DUR-5, WP-1, WP-2, WP-6, WP-7, WP-9 and LV-1, under T4 and T7.

pub mod frames;
pub mod host;
pub mod madness;
pub mod node;
pub mod plan;
pub mod relay;
pub mod rounds;
pub mod stranger;
