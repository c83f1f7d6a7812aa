//! `create-md`, `wipe-md`, `dump-md`, `check-resize`: on disks that no engine uses.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use replication_core::config::known_sizes_path;
use replication_core::units::VolumeNr;

use super::Session;
use crate::client::{Contact, contact};
use crate::conf::VolumeView;
use crate::engine::{self, Mute};
use crate::exit::{self, Failure};
use crate::md::create::Target;
use crate::md::device::Access;
use crate::md::relocate::{Outgrown, forget};
use crate::object::Named;

/// What is known of the engine of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// There may be one that has the disk.
    MayRun,
    /// It was seen to be gone. One that starts meanwhile is kept away by the lock of the disk.
    Gone,
}

impl Session<'_> {
    /// Creates metadata on each volume of an object.
    pub(super) fn create_md(&mut self, on: &Named, force: bool) -> Result<(), Failure> {
        for (resource, volume) in self.volumes(on)? {
            self.check_unused(&resource, volume.nr)?;
            let access = if self.context.dry_run { Access::Read } else { Access::Write };
            let target = Target::open(&resource, &volume, access)?;
            let plan = target.plan(force)?;
            for note in &plan.notes {
                writeln!(self.err, "{note}")?;
            }
            if self.context.dry_run {
                writeln!(self.out, "{resource}/{}: would create metadata", volume.nr)?;
                continue;
            }
            forget(&self.sizes_path(&resource, &volume))?;
            let out = &mut *self.out;
            target.create(&plan, |line| Ok(writeln!(out, "{line}")?))?;
        }
        Ok(())
    }

    /// Erases the metadata of each volume of an object.
    pub(super) fn wipe_md(&mut self, on: &Named, force: bool) -> Result<(), Failure> {
        for (resource, volume) in self.volumes(on)? {
            self.check_unused(&resource, volume.nr)?;
            if self.context.dry_run {
                writeln!(self.out, "{resource}/{}: would wipe the metadata", volume.nr)?;
                continue;
            }
            let target = Target::open(&resource, &volume, Access::Write)?;
            if force {
                // Even if there is none at the end: it is all to go, wherever it is.
                forget(&self.sizes_path(&resource, &volume))?;
            }
            if target.wipe(force)? {
                writeln!(self.out, "Wiping meta data...")?;
                writeln!(self.out, "DRBD meta data block successfully wiped out.")?;
            } else {
                let nr = volume.nr;
                writeln!(self.err, "{resource}/{nr}: there is no meta data to wipe out")?;
            }
        }
        Ok(())
    }

    /// Prints the metadata of each volume of an object.
    pub(super) fn dump_md(&mut self, on: &Named, force: bool) -> Result<(), Failure> {
        for (resource, volume) in self.volumes(on)? {
            self.check_unused(&resource, volume.nr)?;
            let target = Target::open(&resource, &volume, Access::Read)?;
            let header = [
                "# DRBD meta data dump".to_owned(),
                format!("# {}", date_line(SystemTime::now())),
                format!("# {}> drbdctl dump-md {resource}/{}", self.context.node, volume.nr),
                "#".to_owned(),
                String::new(),
            ];
            write!(self.out, "{}", target.dump(&header, force)?)?;
        }
        Ok(())
    }

    /// Moves internal metadata that its disk has outgrown, on each volume of an object that has no
    /// engine: one that has a disk moves the metadata itself, at `resize`.
    pub(super) fn check_resize(&mut self, on: &Named) -> Result<(), Failure> {
        for (resource, volume) in self.volumes(on)? {
            if let Some(line) = self.relocate(&resource, &volume, Engine::MayRun)? {
                writeln!(self.out, "{line}")?;
            }
        }
        Ok(())
    }

    /// The same before disks are attached. What goes wrong is told, and left to the attach: it
    /// decides whether the disk can be used, and says it if there is no metadata. Nor does it wait
    /// for somebody who listens: requests may wait for it.
    pub(super) fn check_before_attach(
        &mut self,
        on: &Named,
        engine: Engine,
    ) -> Result<(), Failure> {
        for (resource, volume) in self.volumes(on)? {
            let told = match self.relocate(&resource, &volume, engine) {
                Ok(Some(line)) => writeln!(self.out, "{line}"),
                Ok(None) => Ok(()),
                Err(failure) if failure.exit == exit::NO_METADATA => Ok(()),
                Err(failure) => writeln!(self.err, "{failure}"),
            };
            // What cannot be told is no reason to leave a disk away.
            let _ = told;
        }
        Ok(())
    }

    fn relocate(
        &self,
        resource: &str,
        volume: &VolumeView,
        engine: Engine,
    ) -> Result<Option<String>, Failure> {
        let sizes = self.sizes_path(resource, volume);
        let Some(outgrown) = Outgrown::new(resource, volume, sizes) else {
            return Ok(None);
        };
        if outgrown.is_in_place()? {
            return Ok(None);
        }
        let is_used = match engine {
            Engine::MayRun => self.is_used(resource, volume.nr)?,
            Engine::Gone => false,
        };
        if is_used {
            return Ok(None);
        }
        outgrown.settle(self.context.dry_run)
    }

    fn sizes_path(&self, resource: &str, volume: &VolumeView) -> PathBuf {
        known_sizes_path(&self.context.run_dir, resource, VolumeNr(volume.nr))
    }

    /// Refuses metadata that an engine works with.
    fn check_unused(&self, resource: &str, volume: u16) -> Result<(), Failure> {
        if !self.is_used(resource, volume)? {
            return Ok(());
        }
        let text = format!(
            "{resource}/{volume}: the disk is in use by the running resource\n  \
             what to do: drbdctl down {resource} (or detach {resource}/{volume})"
        );
        Err(Failure::new(exit::SYSTEM, text))
    }

    /// Whether an engine works with the metadata. The disk of a running resource may be replaced
    /// while it is detached.
    fn is_used(&self, resource: &str, volume: u16) -> Result<bool, Failure> {
        let paths = self.context.paths(resource)?;
        match contact(resource, &paths)? {
            Contact::Engine(client) => {
                let status = client.status()?;
                let running = status.volumes.iter().find(|running| running.nr == volume);
                Ok(running.is_none_or(|running| running.disk != "Diskless"))
            }
            Contact::Absent | Contact::Stale => match engine::seen(&paths) {
                None => Ok(false),
                Some(pid) => Err(engine::mute(resource, Some(pid), Mute::Deaf)),
            },
        }
    }
}

/// `YYYY-MM-DD hh:mm:ss +0000 [seconds]`.
fn date_line(now: SystemTime) -> String {
    // A clock before 1970 is as good as none.
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    let (year, month, day) = date(days);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} +0000 [{seconds}]")
}

/// The date of a day counted from 1970-01-01, by whole years and months.
fn date(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // 400 years have 146097 days, wherever they start.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    loop {
        let len = if is_leap(year) { 366 } else { 365 };
        if days < len {
            break;
        }
        days -= len;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < len {
            break;
        }
        days -= len;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Dates around leap days and the ends of years.
    #[test]
    fn dates() {
        let table = [
            (0, "1970-01-01 00:00:00 +0000 [0]"),
            (951_782_400, "2000-02-29 00:00:00 +0000 [951782400]"),
            (1_735_689_599, "2024-12-31 23:59:59 +0000 [1735689599]"),
            (1_795_214_332, "2026-11-20 22:38:52 +0000 [1795214332]"),
            (4_107_542_400, "2100-03-01 00:00:00 +0000 [4107542400]"),
            (13_574_649_600, "2400-03-01 00:00:00 +0000 [13574649600]"),
        ];
        for (seconds, line) in table {
            assert_eq!(date_line(UNIX_EPOCH + Duration::from_secs(seconds)), line);
        }
    }
}
