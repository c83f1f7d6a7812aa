//! The configuration as written, after legacy spellings were brought to today's form.
//!
//! Inheritance is not applied here; every statement stays in the scope it was found in, with the
//! place of its words. `resolve.rs` puts the scopes on top of each other, `dump.rs` writes them.

use std::net::IpAddr;

use super::source::Loc;
use super::table::{Section, Spec};

/// A word with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) text: String,
    pub(crate) at: Loc,
}

/// The value of an option, checked and scaled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Flag(bool),
    /// In the internal unit of the option.
    Number(u64),
    Text(String),
    List(Vec<String>),
}

/// An option that was set.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) spec: &'static Spec,
    pub(crate) value: Value,
    /// The value as the operator wrote it, for the dump of numbers.
    pub(crate) written: String,
    pub(crate) at: Loc,
}

/// One line of a section whose content is kept and not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreeLine {
    pub(crate) depth: usize,
    /// Without the final `;` or `{`; empty where a block ends.
    pub(crate) text: String,
    pub(crate) end: FreeEnd,
}

/// How a [`FreeLine`] ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FreeEnd {
    Statement,
    Open,
    Close,
}

/// The sections that may stand in `common`, in a resource and in a template file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    pub(crate) net: Vec<Setting>,
    pub(crate) disk: Vec<Setting>,
    pub(crate) options: Vec<Setting>,
    pub(crate) startup: Vec<Setting>,
    pub(crate) handlers: Vec<Setting>,
    /// What is left of `syncer` when everything that has a place today was moved there.
    pub(crate) syncer: Vec<Setting>,
    /// Only in the scope that the `global` section is read into.
    pub(crate) global: Vec<Setting>,
    /// The sections `proxy` and `plugin`, with their first and last lines.
    pub(crate) proxy: Vec<FreeLine>,
}

impl Scope {
    /// The settings of one section.
    pub(crate) fn section(&self, section: Section) -> &Vec<Setting> {
        match section {
            Section::Global => &self.global,
            Section::Startup => &self.startup,
            Section::Options => &self.options,
            Section::Disk => &self.disk,
            Section::Net => &self.net,
            Section::Handlers => &self.handlers,
            Section::Syncer => &self.syncer,
        }
    }

    /// The settings of one section, to be changed.
    pub(crate) fn section_mut(&mut self, section: Section) -> &mut Vec<Setting> {
        match section {
            Section::Global => &mut self.global,
            Section::Startup => &mut self.startup,
            Section::Options => &mut self.options,
            Section::Disk => &mut self.disk,
            Section::Net => &mut self.net,
            Section::Handlers => &mut self.handlers,
            Section::Syncer => &mut self.syncer,
        }
    }
}

/// An address family with its address and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    /// Interface of a link-local IPv6 address.
    pub(crate) scope: Option<String>,
    pub(crate) port: u16,
    pub(crate) at: Loc,
}

/// A device node and its minor number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) path: String,
    pub(crate) minor: u32,
    pub(crate) at: Loc,
}

/// The backing disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// `None` for `disk none`.
    pub(crate) path: Option<String>,
    pub(crate) at: Loc,
}

/// Where metadata are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MetaPlace {
    Internal,
    Flexible(String),
    Indexed(String, u32),
}

/// The `meta-disk` statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) place: MetaPlace,
    pub(crate) at: Loc,
}

/// A volume, in a resource or in a host.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    pub(crate) nr: u16,
    /// Whether it was formed from statements outside of any `volume`.
    pub(crate) is_implicit: bool,
    pub(crate) device: Option<Device>,
    pub(crate) disk: Option<Disk>,
    pub(crate) meta: Option<Meta>,
    pub(crate) tiebreaker: Option<(bool, Loc)>,
    pub(crate) disk_options: Vec<Setting>,
    pub(crate) at: Loc,
}

impl Volume {
    /// A volume without any statement.
    pub(crate) fn new(nr: u16, is_implicit: bool, at: Loc) -> Self {
        Self {
            nr,
            is_implicit,
            device: None,
            disk: None,
            meta: None,
            tiebreaker: None,
            disk_options: Vec::new(),
            at,
        }
    }
}

/// What introduced a host section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    On,
    Floating,
    /// With the name of the lower resource.
    Stacked(String),
}

/// A host section.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) kind: HostKind,
    /// At least one, except for floating and stacked ones.
    pub(crate) names: Vec<Name>,
    pub(crate) address: Option<Address>,
    pub(crate) node_id: Option<(u32, Loc)>,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) options: Vec<Setting>,
    pub(crate) proxy: Vec<FreeLine>,
    pub(crate) at: Loc,
}

/// An end of a connection.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) host: Name,
    pub(crate) address: Option<Address>,
    pub(crate) port: Option<u16>,
    /// Content of `via proxy`, first line included.
    pub(crate) proxy: Vec<FreeLine>,
}

/// A `connection`, or one of those that a mesh stands for.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) ends: Vec<End>,
    /// Each with the place of its keyword.
    pub(crate) paths: Vec<(Vec<End>, Loc)>,
    pub(crate) net: Vec<Setting>,
    pub(crate) disk: Vec<Setting>,
    pub(crate) volumes: Vec<(u16, Vec<Setting>)>,
    pub(crate) at: Loc,
}

/// A resource.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(crate) name: Name,
    pub(crate) scope: Scope,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) ignored_on: Vec<Name>,
    pub(crate) at: Loc,
}
