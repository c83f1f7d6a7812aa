//! Verbs that show the state.

use std::io::IsTerminal;

use replication_core::control::Status;
use replication_core::meta::dump::gi_line;
use replication_core::meta::{Superblock, Uuids};

use super::{Idle, Session, no_volume};
use crate::cli::{Color, StatusArgs};
use crate::client::{Contact, contact};
use crate::conf::VolumeView;
use crate::exit::{self, Failure};
use crate::md::create::{self, Target};
use crate::md::device::Access;
use crate::object::Named;
use crate::render::text::{NodeIds, Show};
use crate::render::{json, text, words};

impl Session<'_> {
    /// Shows resources: those named, or all that run.
    pub(super) fn status(&mut self, args: &StatusArgs) -> Result<u8, Failure> {
        let is_all = args.objects.is_empty() || args.objects.iter().any(|word| word == "all");
        let objects = match is_all {
            true => self.context.running()?.into_iter().map(Named::whole).collect(),
            false => self.context.objects(&args.objects)?,
        };
        let mut shown: Vec<(Status, NodeIds)> = Vec::new();
        let mut worst = exit::DONE;
        for object in &objects {
            match self.status_of(object) {
                Ok(status) => {
                    let ids = self.ids(&status);
                    shown.push((status, ids));
                }
                Err(failure) => {
                    writeln!(self.err, "{failure}")?;
                    worst = worst.max(failure.exit);
                }
            }
        }
        if args.json {
            write!(self.out, "{}", json::resources(&shown))?;
            return Ok(worst);
        }
        let show = Show {
            verbose: self.context.verbose > 0,
            statistics: args.statistics,
            color: match self.context.color {
                Color::Always => true,
                Color::Never => false,
                Color::Auto => std::io::stdout().is_terminal(),
            },
        };
        for (status, ids) in &shown {
            write!(self.out, "{}", text::status(status, *ids, show))?;
            if status.split_brain {
                writeln!(self.err, "{}", split_brain_hint(&status.name))?;
            }
        }
        if objects.is_empty() {
            writeln!(self.out, "# No currently configured DRBD found.")?;
        }
        Ok(worst)
    }

    fn status_of(&self, object: &Named) -> Result<Status, Failure> {
        let resource = &object.resource;
        let paths = self.context.paths(resource)?;
        match contact(resource, &paths)? {
            Contact::Engine(client) => select(client.status()?, object),
            Contact::Stale => Err(Failure::new(
                exit::SYSTEM,
                format!(
                    "{resource}: its engine has died; start another with: drbdctl up {resource}"
                ),
            )),
            Contact::Absent => {
                let mut text = format!("{resource}: No such resource");
                if self.context.view(resource).is_ok() {
                    text.push_str("; start it with: drbdctl up ");
                    text.push_str(resource);
                }
                Err(Failure::new(exit::FAILURE, text))
            }
        }
    }

    /// Node ids of both nodes.
    fn ids(&self, status: &Status) -> NodeIds {
        let address = |text: &str| text.parse::<std::net::SocketAddr>().ok();
        let is_lower = match (address(&status.local), address(&status.remote)) {
            (Some(local), Some(remote)) => local < remote,
            (None, _) | (_, None) => status.node < status.peer,
        };
        self.context.node_ids(&status.name, is_lower)
    }

    fn running_status(&self, object: &Named) -> Result<Option<Status>, Failure> {
        match self.engine(object, Idle::Fine)? {
            Some(client) => select(client.status()?, object).map(Some),
            None => Ok(None),
        }
    }

    fn needed_status(&self, object: &Named) -> Result<Status, Failure> {
        let status = self.running_status(object)?;
        status.ok_or_else(|| super::not_running(&object.resource))
    }

    /// Prints both roles for each volume.
    pub(super) fn role(&mut self, on: &Named) -> Result<(), Failure> {
        let status = self.needed_status(on)?;
        for _ in &status.volumes {
            writeln!(self.out, "{}", words::role(&status))?;
        }
        Ok(())
    }

    /// Prints the peer's role for each volume.
    pub(super) fn peer_role(&mut self, on: &Named) -> Result<(), Failure> {
        let status = self.needed_status(on)?;
        for _ in &status.volumes {
            writeln!(self.out, "{}", status.peer_role)?;
        }
        Ok(())
    }

    /// Prints the connection state for each volume.
    pub(super) fn cstate(&mut self, on: &Named) -> Result<(), Failure> {
        let status = self.needed_status(on)?;
        for volume in &status.volumes {
            writeln!(self.out, "{}", volume.cstate)?;
        }
        Ok(())
    }

    /// Prints both disk states for each volume; when nothing runs, what the metadata says.
    pub(super) fn dstate(&mut self, on: &Named) -> Result<(), Failure> {
        if let Some(status) = self.running_status(on)? {
            for volume in &status.volumes {
                writeln!(self.out, "{}", words::dstate(volume))?;
            }
            return Ok(());
        }
        for (resource, volume) in self.volumes(on)? {
            let (superblock, _) = Target::open(&resource, &volume, Access::Read)?.read()?;
            writeln!(self.out, "{}", create::disk_state(&superblock))?;
        }
        Ok(())
    }

    /// Prints the generation identifiers of each volume. The flags are those on the disk; the
    /// identifiers of a running volume are the engine's own, which the disk may lag behind.
    pub(super) fn get_gi(&mut self, on: &Named, explain: bool) -> Result<(), Failure> {
        let status = self.running_status(on)?;
        for (resource, volume) in self.volumes(on)? {
            let target = Target::open(&resource, &volume, Access::Read)?;
            let (mut superblock, _) = target.read()?;
            let running = status.as_ref().and_then(|status| {
                let running = status.volumes.iter().find(|running| running.nr == volume.nr);
                running.filter(|running| running.disk != "Diskless")
            });
            if let Some(running) = running {
                set_uuids(&mut superblock, running.uuids);
            }
            match explain {
                true => write!(self.out, "{}", create::explained(&superblock))?,
                false => writeln!(self.out, "{}", gi_line(&superblock))?,
            }
        }
        Ok(())
    }

    /// The volumes of an object, by the configuration.
    pub(super) fn volumes(&self, on: &Named) -> Result<Vec<(String, VolumeView)>, Failure> {
        let view = self.context.view(&on.resource)?;
        let mut volumes = view.volumes;
        volumes.retain(|volume| on.volume.is_none_or(|nr| volume.nr == nr));
        if volumes.is_empty() {
            return Err(no_volume(on));
        }
        Ok(volumes.into_iter().map(|volume| (view.resource.clone(), volume)).collect())
    }
}

fn set_uuids(superblock: &mut Superblock, [current, bitmap, younger, older]: [u64; 4]) {
    superblock.uuids = Uuids { current, bitmap, history: [younger, older] };
}

/// The part of a state that an object names.
fn select(mut status: Status, object: &Named) -> Result<Status, Failure> {
    if object.volume.is_some() {
        status.volumes.retain(|volume| object.volume == Some(volume.nr));
        if status.volumes.is_empty() {
            return Err(no_volume(object));
        }
    }
    Ok(status)
}

fn split_brain_hint(resource: &str) -> String {
    format!(
        "{resource}: split brain: both nodes have changed their data while apart\n  \
         what to do: on the node whose changes are to be thrown away:\n    \
         drbdctl secondary {resource} && drbdctl disconnect {resource} &&\n    \
         drbdctl connect --discard-my-data {resource}\n  \
         then on the other: drbdctl connect {resource}"
    )
}
