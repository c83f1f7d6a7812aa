//! News for the ring thread from other threads.
//!
//! A bounded channel carries the news; an eventfd with a poll in the ring wakes the loop. Whatever
//! may block runs on a thread of its own that posts its result here.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use replication_core::control::{Command, Refusal, Reply};
use replication_core::event::{CommandId, DiskInfo, OpId, VolumeIx};

use crate::disk::Opened;
use crate::frontend::DeviceNews;

/// News that wait to be read; helpers wait when there are more.
const NEWS_MAX: usize = 64;
/// Stack of a helper thread: they do little, and all memory is locked.
pub const STACK_SIZE: usize = 256 << 10;

/// The answer to an operator's command.
pub type Answer = Result<Reply, Refusal>;

/// What another thread has to tell.
#[derive(Debug)]
pub enum News {
    /// A backing device was opened, or not.
    Opened {
        /// The core's name for it.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// The device, or why there is none.
        result: Result<Opened, String>,
    },
    /// An open backing device was looked at again.
    Probed {
        /// The core's name for it.
        id: OpId,
        /// Whose.
        volume: VolumeIx,
        /// What was found.
        result: Result<DiskInfo, String>,
    },
    /// The operator wants something.
    Command {
        /// Its number.
        id: CommandId,
        /// What.
        command: Command,
        /// Where the answer goes.
        reply: SyncSender<Answer>,
    },
    /// Something about a block device.
    Device(DeviceNews),
    /// Whether a device is in use, asked because the process is to end.
    InUse(Option<String>),
}

/// Where other threads post their news.
#[derive(Clone, Debug)]
pub struct Mailbox {
    sender: SyncSender<News>,
    event: Arc<EventFd>,
}

/// The ring thread's end.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<News>,
    event: Arc<EventFd>,
}

/// A new channel.
///
/// # Errors
/// There are no descriptors left.
pub fn channel() -> Result<(Mailbox, Inbox)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = EventFd::from_flags(flags).context("make an eventfd")?;
    let event = Arc::new(event);
    let (sender, receiver) = sync_channel(NEWS_MAX);
    Ok((Mailbox { sender, event: Arc::clone(&event) }, Inbox { receiver, event }))
}

impl Mailbox {
    /// Posts news. Whether there is still somebody to read it.
    pub fn post(&self, news: News) -> bool {
        let sent = self.sender.send(news).is_ok();
        // The counter cannot overflow: it is reset with every look into the inbox.
        sent && self.event.write(1).is_ok()
    }

    /// Runs `work` on a thread of its own and posts what it returns.
    ///
    /// # Errors
    /// There are no threads left.
    pub fn spawn(&self, name: &str, work: impl FnOnce() -> News + Send + 'static) -> Result<()> {
        let mailbox = self.clone();
        let run = move || {
            mailbox.post(work());
        };
        let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_SIZE);
        builder.spawn(run).with_context(|| format!("start thread {name}"))?;
        Ok(())
    }
}

impl Inbox {
    /// The descriptor that is readable when there are news.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event; call before [`Inbox::next`], so that no news is missed.
    pub fn clear(&self) {
        // Nothing to clear is fine: the news were read with those before.
        let _ = self.event.read();
    }

    /// The next news, if any.
    #[must_use]
    pub fn next(&self) -> Option<News> {
        self.receiver.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_of_a_thread_arrive_with_an_event() {
        let (mailbox, inbox) = channel().unwrap();
        mailbox.spawn("test", || News::InUse(Some("somebody".to_owned()))).unwrap();
        let mut poll = [nix::poll::PollFd::new(inbox.event(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut poll, 10_000_u16).unwrap(), 1);
        inbox.clear();
        assert!(matches!(inbox.next(), Some(News::InUse(Some(_)))));
        assert!(inbox.next().is_none());
        drop(inbox);
        assert!(!mailbox.post(News::InUse(None)));
    }
}
