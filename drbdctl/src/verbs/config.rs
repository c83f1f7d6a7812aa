//! Verbs that print from the configuration.

use super::Session;
use crate::conf::VolumeView;
use crate::exit::{self, Failure};
use crate::object::Named;

impl Session<'_> {
    /// Prints the configuration in its normal form. With names, checks them and prints the same.
    pub(super) fn dump(&mut self, objects: &[String]) -> Result<u8, Failure> {
        self.warn()?;
        let names: Vec<String> = objects.iter().filter(|word| *word != "all").cloned().collect();
        for object in self.context.objects(&names)? {
            self.context.view(&object.resource)?;
        }
        let config = self.context.config()?;
        write!(self.out, "{}", config.dump_for(&self.context.node, self.context.addresses()))?;
        Ok(exit::DONE)
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
}
