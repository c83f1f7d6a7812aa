//! Messages to the service manager, from a thread of their own: its socket blocks when nobody reads
//! it, and the ring thread must not wait for anybody.

use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result};
use sd_notify::NotifyState;

use crate::worker::STACK_SIZE;

/// Messages that wait for the service manager.
const MESSAGES_MAX: usize = 4;

/// What the service manager is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Commands are taken.
    Ready,
    /// The end has begun.
    Stopping,
    /// The ring thread is alive.
    Watchdog,
}

/// The way to the service manager.
#[derive(Debug)]
pub struct Service {
    sender: SyncSender<Notice>,
}

impl Service {
    /// Starts the thread that talks to it.
    ///
    /// # Errors
    /// There are no threads left.
    pub fn start() -> Result<Self> {
        let (sender, notices) = sync_channel(MESSAGES_MAX);
        let talk = move || {
            for notice in notices {
                let state = match notice {
                    Notice::Ready => NotifyState::Ready,
                    Notice::Stopping => NotifyState::Stopping,
                    Notice::Watchdog => NotifyState::Watchdog,
                };
                if let Err(error) = sd_notify::notify(false, &[state]) {
                    tracing::warn!("tell the service manager: {error}");
                }
            }
        };
        let builder = std::thread::Builder::new().name("service".to_owned());
        builder.stack_size(STACK_SIZE).spawn(talk).context("start the service thread")?;
        Ok(Self { sender })
    }

    /// Tells it, without waiting.
    pub fn tell(&self, notice: Notice) {
        if self.sender.try_send(notice).is_err() {
            tracing::warn!("the service manager does not listen: {notice:?} was dropped");
        }
    }
}
