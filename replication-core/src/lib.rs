//! The protocol and the data rules of a DRBD node, free of I/O.
//!
//! Events go in, actions come out: [`resource::Resource::handle`] is the only way in. There is no
//! descriptor, thread, clock or randomness here, so that the simulator and production run the
//! same code. What an operation means for the data is decided here and nowhere else.
//!
//! | room | question it answers |
//! |---|---|
//! | [`wire`] | what do these bytes mean? |
//! | [`meta`] | what is on this metadata sector? |
//! | [`gi`] | whose data is newer? |
//! | [`state`] | what follows, and may we? |
//! | [`bitmap`] | which blocks differ? |
//! | [`activity_log`] | which blocks may differ after a crash? |
//! | [`transfer_log`], [`epoch`] | in which order? |
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod action;
pub mod activity_log;
mod admin;
pub mod bitmap;
pub mod buffers;
mod change;
pub mod config;
mod connect;
pub mod control;
mod disk;
pub mod epoch;
pub mod event;
pub mod gi;
pub mod handshake;
pub mod interval;
pub mod limits;
pub mod meta;
#[cfg(feature = "mutants")]
pub mod mutant;
#[cfg(not(feature = "mutants"))]
mod mutant;
mod parameters;
mod peer_request;
mod receive;
mod request;
mod resize;
pub mod resource;
pub mod resync;
pub mod slab;
pub mod split_brain;
pub mod state;
mod status;
pub mod transfer_log;
pub mod units;
mod volume;
pub mod wire;
