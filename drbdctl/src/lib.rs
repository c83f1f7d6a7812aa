//! The operator's tool as a library: configuration, commands, rendering, metadata tools.
//!
//! | room | question it answers |
//! |---|---|
//! | [`conf`] | what did the operator write? |
//! | [`cli`], [`object`] | what does the operator want, and with what? |
//! | [`context`] | which node is this, and where are its files? |
//! | [`settings`] | what does the engine have to know? |
//! | [`client`], [`engine`] | how is an engine asked, started and ended? |
//! | [`guard`] | does another run of the tool work on the same resource? |
//! | [`verbs`] | what does each verb do? |
//! | [`render`] | how is a state shown? |
//! | [`md`] | what is on a device, and how does metadata get there? |
//! | [`exit`] | which exit code means what? |

#![forbid(unsafe_code)]

pub mod cli;
pub mod client;
pub mod conf;
pub mod context;
pub mod engine;
pub mod exit;
pub mod guard;
pub mod md;
pub mod object;
pub mod render;
pub mod settings;
pub mod verbs;

pub use verbs::run;
