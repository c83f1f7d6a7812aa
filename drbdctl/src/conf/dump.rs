//! Writes a configuration in its normal form.
//!
//! The dump shows what was understood: legacy spellings in the form of today, skipped sections
//! left out, templates merged, one option a line. Read back it gives the same dump
//! (`dump(parse(dump(x))) == dump(x)`). Comments with places are only in the form for operators,
//! [`Config::dump_for`], because a place changes when the text is moved.

use std::fmt::Write;
use std::net::IpAddr;

use super::Config;
use super::ast::{
    Address, Connection, End, FreeEnd, FreeLine, Host, HostKind, MetaPlace, Resource, Scope,
    Setting, Value, Volume,
};
use super::lexer::{MAX_WORD, is_word_byte};
use super::parser::is_reserved;
use super::resolve;
use super::table::Section;

/// Column that values begin in, counted from the name.
const NAME_WIDTH: usize = 16;
/// Blanks of one level.
const INDENT: usize = 4;

/// A value as it may stand in a configuration: quoted if it has to be.
pub(crate) fn word(text: &str) -> String {
    let is_plain = (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(is_word_byte);
    match is_plain {
        true => text.to_owned(),
        false => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
    }
}

/// A name as it may stand in a configuration: quoted also if it is reserved.
pub(crate) fn name(text: &str) -> String {
    match is_reserved(text) {
        true => format!("\"{text}\""),
        false => word(text),
    }
}

/// Text with indentation.
#[derive(Debug, Default)]
struct Writer {
    text: String,
    depth: usize,
}

impl Writer {
    fn line(&mut self, line: &str) {
        let pad = self.depth * INDENT;
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{:pad$}{line}", "");
    }

    fn open(&mut self, head: &str) {
        self.line(&format!("{head} {{"));
        self.depth += 1;
    }

    fn close(&mut self) {
        assert!(self.depth > 0, "a section is closed that was opened");
        self.depth -= 1;
        self.line("}");
    }

    fn statement(&mut self, name: &str, value: &str) {
        self.line(&format!("{name:NAME_WIDTH$} {value};"));
    }

    fn settings(&mut self, head: &str, settings: &[Setting]) {
        if settings.is_empty() {
            return;
        }
        self.open(head);
        for setting in settings {
            self.statement(setting.spec.name, &value(setting));
        }
        self.close();
    }

    fn free(&mut self, lines: &[FreeLine]) {
        for line in lines {
            match line.end {
                FreeEnd::Statement => self.line(&format!("{};", line.text)),
                FreeEnd::Open if line.text.is_empty() => self.anonymous(),
                FreeEnd::Open => self.open(&line.text),
                FreeEnd::Close => self.close(),
            }
        }
    }

    fn anonymous(&mut self) {
        self.line("{");
        self.depth += 1;
    }
}

/// The value of a setting.
fn value(setting: &Setting) -> String {
    match &setting.value {
        Value::Flag(flag) => if *flag { "yes" } else { "no" }.to_owned(),
        Value::Number(_) => setting.written.clone(),
        Value::Text(text) => word(text),
        Value::List(words) => words.iter().map(|text| word(text)).collect::<Vec<_>>().join(" "),
    }
}

impl Config {
    /// The configuration in its normal form.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut out = Writer::default();
        self.dump_shared(&mut out);
        for one in &self.resources {
            resource(&mut out, one);
            out.line("");
        }
        out.text
    }

    /// The same with comments that say where a resource is defined and whether it concerns this
    /// node; `addresses` are those of the node, for floating host sections.
    #[must_use]
    pub fn dump_for(&self, node: &str, addresses: &[IpAddr]) -> String {
        let mut out = Writer::default();
        out.line(&format!("# {}", self.main.display()));
        self.dump_shared(&mut out);
        for one in &self.resources {
            self.dump_resource(&mut out, one, node, addresses);
        }
        out.text
    }

    /// The resources of these names, in this order, behind the section that they inherit from. A
    /// name that is not defined is left out.
    #[must_use]
    pub fn dump_only(&self, names: &[String], node: &str, addresses: &[IpAddr]) -> String {
        let mut out = Writer::default();
        self.dump_common(&mut out);
        for name in names {
            if let Ok(one) = self.find(name) {
                self.dump_resource(&mut out, one, node, addresses);
            }
        }
        out.text
    }

    /// What belongs to no resource.
    fn dump_shared(&self, out: &mut Writer) {
        // The flags of this section are known without a value only.
        let is_shown = |setting: &&Setting| setting.value != Value::Flag(false);
        let shown: Vec<&Setting> = self.global_settings.iter().filter(is_shown).collect();
        if !shown.is_empty() {
            out.open("global");
            for setting in shown {
                match setting.value {
                    Value::Flag(_) => out.line(&format!("{};", setting.spec.name)),
                    Value::Number(_) | Value::Text(_) | Value::List(_) => {
                        out.statement(setting.spec.name, &value(setting));
                    }
                }
            }
            out.close();
            out.line("");
        }
        self.dump_common(out);
    }

    /// What every resource inherits.
    fn dump_common(&self, out: &mut Writer) {
        if !scope_text(&self.common).is_empty() {
            out.open("common");
            scope(out, &self.common);
            out.close();
            out.line("");
        }
    }

    /// A resource with its comments.
    fn dump_resource(&self, out: &mut Writer, one: &Resource, node: &str, addresses: &[IpAddr]) {
        let is_here = resolve::local_host(one, node, addresses).is_some();
        let is_stacked = one.hosts.iter().any(|host| matches!(host.kind, HostKind::Stacked(_)));
        let not = |is: bool| if is { "" } else { "not " };
        let (file, line) = self.defined_at(one);
        out.line(&format!(
            "# resource {} on {node}: {}ignored, {}stacked",
            one.name.text,
            not(!is_here),
            not(is_stacked)
        ));
        out.line(&format!("# defined at {}:{line}", file.display()));
        resource(out, one);
        out.line("");
    }
}

/// The sections of a scope alone, to see whether there are any.
fn scope_text(sections: &Scope) -> String {
    let mut out = Writer::default();
    scope(&mut out, sections);
    out.text
}

/// Writes the sections of a scope.
fn scope(out: &mut Writer, scope: &Scope) {
    for section in [
        Section::Net,
        Section::Disk,
        Section::Options,
        Section::Startup,
        Section::Handlers,
        Section::Syncer,
    ] {
        out.settings(section.name(), scope.section(section));
    }
    out.free(&scope.proxy);
}

/// Writes a resource.
fn resource(out: &mut Writer, resource: &Resource) {
    out.open(&format!("resource {}", name(&resource.name.text)));
    for host in &resource.ignored_on {
        out.statement("ignore-on", &name(&host.text));
    }
    volumes(out, &resource.volumes);
    for one in &resource.hosts {
        host(out, one);
    }
    for one in &resource.connections {
        connection(out, one);
    }
    scope(out, &resource.scope);
    out.close();
}

/// Writes the volumes of a resource or host.
fn volumes(out: &mut Writer, volumes: &[Volume]) {
    for volume in volumes {
        let is_flat = volume.is_implicit && volume.disk_options.is_empty();
        if !is_flat {
            out.open(&format!("volume {}", volume.nr));
        }
        if let Some(device) = &volume.device {
            out.statement("device", &format!("{} minor {}", name(&device.path), device.minor));
        }
        if let Some(disk) = &volume.disk {
            out.statement("disk", &disk.path.as_deref().map_or_else(|| "none".to_owned(), name));
        }
        match volume.meta.as_ref().map(|meta| &meta.place) {
            None => {}
            Some(MetaPlace::Internal) => out.statement("meta-disk", "internal"),
            Some(MetaPlace::Flexible(path)) => out.statement("meta-disk", &name(path)),
            Some(MetaPlace::Indexed(path, index)) => {
                out.statement("meta-disk", &format!("{} [{index}]", name(path)));
            }
        }
        if let Some((is_tiebreaker, _)) = volume.tiebreaker {
            out.statement("tiebreaker", if is_tiebreaker { "yes" } else { "no" });
        }
        out.settings("disk", &volume.disk_options);
        if !is_flat {
            out.close();
        }
    }
}

/// Writes a host section.
fn host(out: &mut Writer, host: &Host) {
    let is_floating = host.kind == HostKind::Floating;
    let head = match (&host.kind, &host.address) {
        (HostKind::Stacked(lower), _) => format!("stacked-on-top-of {}", name(lower)),
        (HostKind::Floating, Some(address)) => format!("floating {}", address_text(address)),
        (HostKind::On, _) | (HostKind::Floating, None) => {
            let names: Vec<String> = host.names.iter().map(|own| name(&own.text)).collect();
            format!("on {}", names.join(" "))
        }
    };
    out.open(&head);
    if let Some((id, _)) = host.node_id {
        out.statement("node-id", &id.to_string());
    }
    volumes(out, &host.volumes);
    if let (Some(address), false) = (&host.address, is_floating) {
        out.statement("address", &address_text(address));
    }
    out.settings("options", &host.options);
    out.free(&host.proxy);
    out.close();
}

/// An address with its family.
fn address_text(address: &Address) -> String {
    let port = address.port;
    match address.ip {
        IpAddr::V4(ip) => format!("ipv4 {ip}:{port}"),
        IpAddr::V6(ip) => match &address.scope {
            Some(scope) => format!("ipv6 [{ip}%{scope}]:{port}"),
            None => format!("ipv6 [{ip}]:{port}"),
        },
    }
}

/// Writes a connection.
fn connection(out: &mut Writer, connection: &Connection) {
    out.open("connection");
    for one in &connection.ends {
        end(out, one);
    }
    for (ends, _) in &connection.paths {
        out.open("path");
        for one in ends {
            end(out, one);
        }
        out.close();
    }
    out.settings("net", &connection.net);
    out.settings("disk", &connection.disk);
    for (nr, settings) in &connection.volumes {
        out.open(&format!("volume {nr}"));
        out.settings("disk", settings);
        out.close();
    }
    out.close();
}

/// Writes an end of a connection.
fn end(out: &mut Writer, end: &End) {
    let mut text = format!("host {}", name(&end.host.text));
    if let Some(address) = &end.address {
        text.push_str(&format!(" address {}", address_text(address)));
    }
    if let Some(port) = end.port {
        text.push_str(&format!(" port {port}"));
    }
    let Some((first, rest)) = end.proxy.split_first() else {
        out.line(&format!("{text};"));
        return;
    };
    let head = FreeLine { text: format!("{text} {}", first.text), ..first.clone() };
    out.free(std::slice::from_ref(&head));
    out.free(rest);
    if head.end == FreeEnd::Open {
        // The statement goes on after the block of the proxy; a line of its own ends it.
        out.line(";");
    }
}
