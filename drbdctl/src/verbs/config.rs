//! Verbs that print from the configuration.

use replication_core::meta::MetaKind;

use super::Session;
use crate::conf::VolumeView;
use crate::exit::{self, Failure};
use crate::object::Named;
use crate::settings::{meta_kind, meta_path};

impl Session<'_> {
    /// Prints the configuration in its normal form: all of it, or the resources that are named
    /// with the section that they inherit from.
    pub(super) fn dump(&mut self, objects: &[String]) -> Result<u8, Failure> {
        self.warn()?;
        let config = self.context.config()?;
        let (node, addresses) = (&self.context.node, self.context.addresses());
        if objects.is_empty() || objects.iter().any(|word| word == "all") {
            write!(self.out, "{}", config.dump_for(node, addresses))?;
            return Ok(exit::DONE);
        }
        let mut names: Vec<String> = Vec::new();
        let mut worst = exit::DONE;
        for object in self.context.objects(objects)? {
            match self.context.view(&object.resource) {
                Ok(_) if names.contains(&object.resource) => {}
                Ok(_) => names.push(object.resource),
                Err(failure) => {
                    writeln!(self.err, "{failure}")?;
                    worst = worst.max(failure.exit);
                }
            }
        }
        if !names.is_empty() {
            write!(self.out, "{}", config.dump_only(&names, node, addresses))?;
        }
        Ok(worst)
    }

    /// Checks the configuration.
    pub(super) fn sh_nop(&mut self) -> Result<u8, Failure> {
        self.warn()?;
        self.context.config()?;
        Ok(exit::DONE)
    }

    /// Prints the names of this node's resources, one on each line.
    pub(super) fn sh_resources(&mut self) -> Result<u8, Failure> {
        for name in self.context.resources()? {
            writeln!(self.out, "{name}")?;
        }
        Ok(exit::DONE)
    }

    fn print_volumes(
        &mut self,
        on: &Named,
        shown: impl Fn(&VolumeView) -> String,
    ) -> Result<(), Failure> {
        for (_, volume) in self.volumes(on)? {
            writeln!(self.out, "{}", shown(&volume))?;
        }
        Ok(())
    }

    /// Prints the device of each volume.
    pub(super) fn sh_dev(&mut self, on: &Named) -> Result<(), Failure> {
        self.print_volumes(on, |volume| volume.device.clone())
    }

    /// Prints the backing disk of each volume.
    pub(super) fn sh_ll_dev(&mut self, on: &Named) -> Result<(), Failure> {
        self.print_volumes(on, |volume| {
            let disk = volume.disk.as_ref();
            disk.map_or_else(|| "none".to_owned(), |disk| disk.display().to_string())
        })
    }

    /// Prints the minor number of each volume.
    pub(super) fn sh_minor(&mut self, on: &Named) -> Result<(), Failure> {
        self.print_volumes(on, |volume| volume.minor.to_string())
    }

    /// Prints the device that carries the metadata of each volume.
    pub(super) fn sh_md_dev(&mut self, on: &Named) -> Result<(), Failure> {
        self.print_volumes(on, |volume| match (meta_path(volume), volume.disk.as_deref()) {
            (Some(path), Some(_)) | (None, Some(path)) => path.display().to_string(),
            (None | Some(_), None) => "none".to_owned(),
        })
    }

    /// Prints where on that device the metadata are.
    pub(super) fn sh_md_idx(&mut self, on: &Named) -> Result<(), Failure> {
        self.print_volumes(on, |volume| match meta_kind(volume) {
            Some(MetaKind::Internal) => "internal".to_owned(),
            Some(MetaKind::Flexible) => "flexible".to_owned(),
            Some(MetaKind::Indexed(index)) => index.to_string(),
            None => "none".to_owned(),
        })
    }

    /// Prints this node's address.
    pub(super) fn sh_ip(&mut self, on: &Named) -> Result<(), Failure> {
        let view = self.context.view(&on.resource)?;
        writeln!(self.out, "{}", view.local.ip())?;
        Ok(())
    }

    /// Prints the name of the resource.
    pub(super) fn sh_resource(&mut self, on: &Named) -> Result<(), Failure> {
        let view = self.context.view(&on.resource)?;
        writeln!(self.out, "{}", view.resource)?;
        Ok(())
    }

    /// Prints what a module would be loaded with: there is none, but loaders ask.
    pub(super) fn sh_mod_parms(&mut self) -> Result<u8, Failure> {
        let global = self.context.config()?.global();
        writeln!(self.out, "minor_count={}", global.minor_count)?;
        Ok(exit::DONE)
    }
}
