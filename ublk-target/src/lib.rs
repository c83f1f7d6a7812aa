//! The engine: one process that serves, stores and mirrors one resource.
//!
//! Responsible for everything that the core must not know: descriptors, memory, threads, time and
//! the operating system. One thread, the ring thread, owns the core, the disks, the sockets and the
//! frontend on one `io_uring`. Whatever may block (opening devices, the ublk control device,
//! looking for holders of a device) runs on helper threads that report back through a channel.
//!
//! | room | what |
//! |---|---|
//! | [`engine`] | the loop: completions to events, actions to operations |
//! | [`ring`] | the `io_uring`; owns what the kernel may still touch |
//! | [`arena`] | payload memory |
//! | [`disk`] | backing devices and files |
//! | [`net`], [`stream`] | the peer's sockets |
//! | [`frontend`], [`nbd`] | the host's side |
//! | [`ublk`] | the kernel's block driver for user space |
//! | [`control`] | the operator's socket |
//! | [`handler`] | the operator's programs |
//! | [`process`], [`service`], [`log`], [`settings`] | the process itself |

pub mod arena;
pub mod control;
pub mod disk;
pub mod engine;
pub mod frontend;
pub mod handler;
pub mod holders;
pub mod log;
pub mod nbd;
pub mod net;
mod patience;
pub mod process;
pub mod ring;
pub mod service;
pub mod settings;
pub mod stream;
pub mod ublk;
pub mod worker;
