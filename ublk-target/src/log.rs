//! Log lines: to stderr, one line each, never waiting for whoever reads them.
//!
//! The core's lines get the prefixes that operators know:
//!
//! | scope | prefix |
//! |---|---|
//! | resource | `drbd r0:` |
//! | connection | `drbd r0 bob:` |
//! | device | `drbd r0/0 drbd0:` |
//! | peer device | `drbd r0/0 drbd0 bob:` |
//!
//! Lines go through a bounded channel to a thread that writes; when it cannot keep up, lines are
//! dropped and counted. A burst beyond [`BURST`] lines is cut down to [`LINES_PER_SECOND`].

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use replication_core::action::{Level, Scope};
use replication_core::config::ResourceConfig;
use replication_core::units::Time;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for the writer.
const LINES_MAX: usize = 1024;
/// Lines of the core that are let through at once.
pub const BURST: u64 = 200;
/// Lines of the core in the long run.
pub const LINES_PER_SECOND: u64 = 20;

#[derive(Debug)]
enum Line {
    Text(Vec<u8>),
    End,
}

/// Hands lines to the writing thread.
#[derive(Clone, Debug)]
struct Writer {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.lines.try_send(Line::Text(bytes.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Writes out what is left when it goes.
#[derive(Debug)]
pub struct Guard {
    lines: SyncSender<Line>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.lines.send(Line::End).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // Its panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// Starts logging. The level comes from `RUST_LOG` (`off`, `error`, `warn`, `info`, `debug`,
/// `trace`); without it, or with a word that is none of these (which is logged), `info`.
///
/// # Errors
/// Logging was started before, or there are no threads left.
pub fn start() -> Result<Guard> {
    let (lines, receiver) = sync_channel(LINES_MAX);
    let dropped = Arc::new(AtomicU64::new(0));
    let writer = Writer { lines: lines.clone(), dropped: Arc::clone(&dropped) };
    let wanted = std::env::var("RUST_LOG").ok();
    let level = wanted.as_deref().map_or(Ok(LevelFilter::INFO), str::parse);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(*level.as_ref().unwrap_or(&LevelFilter::INFO))
        .with_writer(writer)
        .with_ansi(false)
        .with_target(false);
    subscriber.try_init().map_err(|error| anyhow::anyhow!("start logging: {error}"))?;
    let builder = std::thread::Builder::new().name("log".to_owned());
    let thread = builder.stack_size(crate::worker::STACK_SIZE);
    let thread = thread.spawn(move || write_lines(&receiver, &dropped)).context("start logging")?;
    if level.is_err() {
        tracing::warn!("RUST_LOG={}: not a level; logging at info", wanted.unwrap_or_default());
    }
    Ok(Guard { lines, thread: Some(thread) })
}

fn write_lines(lines: &Receiver<Line>, dropped: &AtomicU64) {
    let mut stderr = std::io::stderr();
    while let Ok(Line::Text(line)) = lines.recv() {
        // Without stderr there is nobody to tell.
        let _ = stderr.write_all(&line);
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(stderr, "{lost} log lines were dropped");
        }
    }
}

/// Writes the core's lines.
#[derive(Debug)]
pub struct CoreLog {
    resource: String,
    peer: String,
    /// `r0/0 drbd0` for each volume.
    volumes: Vec<String>,
    credit: u64,
    refilled: Time,
    suppressed: u64,
}

impl CoreLog {
    /// With the names of a resource.
    #[must_use]
    pub fn new(resource: &ResourceConfig) -> Self {
        let name = &resource.name;
        let volume = |nr: u16, minor: u32| format!("{name}/{nr} drbd{minor}");
        Self {
            resource: name.clone(),
            peer: resource.peer.clone(),
            volumes: resource.volumes.iter().map(|v| volume(v.nr.0, v.minor)).collect(),
            credit: BURST,
            refilled: Time::ZERO,
            suppressed: 0,
        }
    }

    /// Writes a line.
    pub fn write(&mut self, now: Time, level: Level, scope: Scope, text: &str) {
        if level != Level::Debug && !self.may_write(now) {
            self.suppressed += 1;
            return;
        }
        if self.suppressed > 0 {
            tracing::warn!("drbd {}: {} messages suppressed", self.resource, self.suppressed);
            self.suppressed = 0;
        }
        let prefix = self.prefix(scope);
        match level {
            Level::Error => tracing::error!("{prefix}: {text}"),
            Level::Warn => tracing::warn!("{prefix}: {text}"),
            Level::Info => tracing::info!("{prefix}: {text}"),
            Level::Debug => tracing::debug!("{prefix}: {text}"),
        }
    }

    fn may_write(&mut self, now: Time) -> bool {
        let seconds = now.since(self.refilled).0 / 1_000_000_000;
        if seconds > 0 {
            let credit = seconds.saturating_mul(LINES_PER_SECOND);
            self.credit = self.credit.saturating_add(credit).min(BURST);
            self.refilled = now;
        }
        let may = self.credit > 0;
        self.credit = self.credit.saturating_sub(1);
        may
    }

    fn prefix(&self, scope: Scope) -> String {
        let Self { resource, peer, volumes, .. } = self;
        match scope {
            Scope::Resource => format!("drbd {resource}"),
            Scope::Connection => format!("drbd {resource} {peer}"),
            Scope::Device(volume) => format!("drbd {}", volumes[volume.at()]),
            Scope::PeerDevice(volume) => format!("drbd {} {peer}", volumes[volume.at()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_core::event::VolumeIx;
    use replication_core::units::Span;

    fn log() -> CoreLog {
        CoreLog {
            resource: "r0".to_owned(),
            peer: "bob".to_owned(),
            volumes: vec!["r0/0 drbd0".to_owned(), "r0/3 drbd7".to_owned()],
            credit: BURST,
            refilled: Time::ZERO,
            suppressed: 0,
        }
    }

    #[test]
    fn prefixes_are_those_that_operators_know() {
        let log = log();
        assert_eq!(log.prefix(Scope::Resource), "drbd r0");
        assert_eq!(log.prefix(Scope::Connection), "drbd r0 bob");
        assert_eq!(log.prefix(Scope::Device(VolumeIx(1))), "drbd r0/3 drbd7");
        assert_eq!(log.prefix(Scope::PeerDevice(VolumeIx(0))), "drbd r0/0 drbd0 bob");
    }

    #[test]
    fn a_flood_is_cut_down_and_counted() {
        let mut log = log();
        for _ in 0..BURST + 50 {
            log.write(Time::ZERO, Level::Info, Scope::Resource, "again");
        }
        assert_eq!(log.suppressed, 50);
        let later = Time::ZERO + Span::from_secs(1);
        log.write(later, Level::Info, Scope::Resource, "later");
        assert_eq!((log.suppressed, log.credit), (0, LINES_PER_SECOND - 1));
    }
}
