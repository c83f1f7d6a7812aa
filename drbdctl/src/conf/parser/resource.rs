//! The `resource` section and volumes.

use std::path::Path;

use super::super::ast::{Device, Disk, Meta, MetaPlace, Name, Resource, Scope, Volume};
use super::super::error::{Fault, Outcome, Problem, ValueFault};
use super::super::lexer::{Lexer, MAX_WORD, TokenKind};
use super::super::source::Loc;
use super::super::table::Section;
use super::{Parser, unexpected, unknown};

/// Highest minor number.
const MINOR_MAX: u32 = 1_048_575;
/// Highest volume number.
const VOLUME_MAX: u32 = 65_534;
/// Highest slot of a shared metadata device; 2^20 slots are 128 TiB of metadata.
const INDEX_MAX: u32 = 1 << 20;

/// Statements in a resource.
const IN_RESOURCE: &[&str] = &[
    "on",
    "floating",
    "stacked-on-top-of",
    "volume",
    "device",
    "disk",
    "meta-disk",
    "flexible-meta-disk",
    "connection",
    "connection-mesh",
    "protocol",
    "net",
    "options",
    "startup",
    "handlers",
    "syncer",
    "proxy",
    "template-file",
    "ignore-on",
    "skip",
    "}",
];
/// Statements in a volume.
const IN_VOLUME: &[&str] =
    &["device", "disk", "meta-disk", "flexible-meta-disk", "tiebreaker", "skip", "}"];

impl Parser<'_> {
    /// Parses `resource NAME { ... }` after its keyword.
    pub(super) fn resource(&mut self, lex: &mut Lexer, at: Loc, dir: &Path) -> Outcome<Resource> {
        let name = self.name(lex, "resource name")?;
        check_resource_name(&name)?;
        let mut resource = Resource {
            name,
            scope: Scope::default(),
            volumes: Vec::new(),
            hosts: Vec::new(),
            connections: Vec::new(),
            ignored_on: Vec::new(),
            at,
        };
        let mut template = Scope::default();
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => break,
                TokenKind::Word(word) if word == "template-file" => {
                    lay_over(&mut template, self.template(lex, dir)?);
                }
                TokenKind::Word(word) => {
                    self.resource_statement(lex, word, token.at, &mut resource)?;
                }
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_RESOURCE));
                }
            }
        }
        let own = std::mem::take(&mut resource.scope);
        lay_over(&mut template, own);
        resource.scope = template;
        Ok(resource)
    }

    /// Parses a statement in a resource.
    fn resource_statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        resource: &mut Resource,
    ) -> Outcome<()> {
        match word {
            "on" => resource.hosts.push(self.on(lex, at)?),
            "floating" => resource.hosts.push(self.floating(lex, at)?),
            "stacked-on-top-of" => resource.hosts.push(self.stacked(lex, at)?),
            "connection" => resource.connections.push(self.connection(lex, at)?),
            "connection-mesh" => resource.connections.extend(self.mesh(lex, at)?),
            "ignore-on" => {
                let name = &resource.name.text;
                let text =
                    format!("in resource {name}, WARN: The 'ignore-on' keyword is deprecated.");
                self.warn(at, text);
                resource.ignored_on.push(self.name(lex, "host name")?);
                self.punct(lex, ';')?;
            }
            "disk" if lex.peek()?.is_punct('{') => {
                self.options(lex, Section::Disk, &mut resource.scope)?;
            }
            _ => {
                let is_known = self.volume_part(lex, word, at, &mut resource.volumes)?
                    || self.common_statement(lex, word, at, &mut resource.scope)?;
                if !is_known {
                    return Err(unknown(word, at, IN_RESOURCE));
                }
            }
        }
        Ok(())
    }

    /// Parses `volume`, or a statement that forms volume 0, in a resource or a host. Gives false
    /// for other words.
    pub(super) fn volume_part(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        volumes: &mut Vec<Volume>,
    ) -> Outcome<bool> {
        match word {
            "volume" => {
                let volume = self.volume(lex, at, volumes)?;
                volumes.push(volume);
            }
            "device" | "disk" | "meta-disk" | "flexible-meta-disk" | "tiebreaker" => {
                let volume = implicit(volumes, at)?;
                self.volume_statement(lex, word, at, volume)?;
            }
            "disk-size" => {
                let volume = implicit(volumes, at)?;
                let mut scope = Scope::default();
                self.option(lex, Section::Disk, word, at, &mut scope)?;
                volume.disk_options.extend(scope.disk);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Parses `volume N { ... }` after its keyword.
    fn volume(&mut self, lex: &mut Lexer, at: Loc, others: &[Volume]) -> Outcome<Volume> {
        let (number, number_at) = self.integer(lex, "volume", (0, VOLUME_MAX))?;
        let nr = u16::try_from(number).expect("the range of volume numbers ends below 2^16");
        if let Some(other) = others.iter().find(|other| other.is_implicit) {
            return Err(mixed_volumes(number_at, other.at));
        }
        if let Some(other) = others.iter().find(|other| other.nr == nr) {
            let problem = Problem::Conflict { what: "volume", key: nr.to_string() };
            return Err(Fault::new(number_at, problem).first(other.at));
        }
        let mut volume = Volume::new(nr, false, at);
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => return Ok(volume),
                TokenKind::Word(word) if word == "skip" => lex.skip_statement(token.at)?,
                TokenKind::Word(word) if word == "disk" && lex.peek()?.is_punct('{') => {
                    self.options_only(lex, Section::Disk, &mut volume.disk_options)?;
                }
                TokenKind::Word(word) if IN_VOLUME.contains(&word.as_str()) => {
                    self.volume_statement(lex, word, token.at, &mut volume)?;
                }
                TokenKind::Word(word) => return Err(unknown(word, token.at, IN_VOLUME)),
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_VOLUME));
                }
            }
        }
    }

    /// Parses a statement of a volume after its keyword.
    fn volume_statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        volume: &mut Volume,
    ) -> Outcome<()> {
        let first = match word {
            "device" => volume.device.as_ref().map(|device| device.at),
            "disk" => volume.disk.as_ref().map(|disk| disk.at),
            "tiebreaker" => volume.tiebreaker.map(|(_, at)| at),
            _ => volume.meta.as_ref().map(|meta| meta.at),
        };
        if let Some(first) = first {
            let problem = Problem::Conflict { what: "keyword", key: word.to_owned() };
            return Err(Fault::new(at, problem).first(first));
        }
        match word {
            "device" => volume.device = Some(self.device(lex)?),
            "disk" => {
                let token = lex.next()?;
                let path = match &token.kind {
                    TokenKind::Word(text) if text == "none" => None,
                    TokenKind::Word(text) | TokenKind::Quoted(text) => Some(text.clone()),
                    TokenKind::Punct(_) | TokenKind::End => {
                        return Err(unexpected(&token, &["path of a block device", "none"]));
                    }
                };
                volume.disk = Some(Disk { path, at: token.at });
            }
            "tiebreaker" => {
                volume.tiebreaker = Some((self.yes_or_no(lex, word)?, at));
                self.warn(at, "tiebreaker is accepted but has no effect yet");
            }
            "meta-disk" | "flexible-meta-disk" => volume.meta = Some(self.meta(lex, word)?),
            _ => unreachable!("callers pass the keywords above"),
        }
        self.punct(lex, ';')?;
        Ok(())
    }

    /// Takes `yes` or `no`.
    fn yes_or_no(&mut self, lex: &mut Lexer, option: &str) -> Outcome<bool> {
        let word = self.value(lex, "yes | no")?;
        match word.text.as_str() {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => {
                let fault = ValueFault::NotBoolean;
                let option = option.to_owned();
                Err(Fault::new(word.at, Problem::Value { option, value: word.text, fault }))
            }
        }
    }

    /// Takes `PATH minor N`, `PATH` or `minor N`.
    fn device(&mut self, lex: &mut Lexer) -> Outcome<Device> {
        if lex.peek()?.is_word("minor") {
            lex.next()?;
            let (minor, at) = self.integer(lex, "minor", (0, MINOR_MAX))?;
            return Ok(Device { path: format!("/dev/drbd{minor}"), minor, at });
        }
        let word = self.value(lex, "device")?;
        let is_short = word.text.starts_with("drbd") && !word.text.contains('/');
        let path = if is_short { format!("/dev/{}", word.text) } else { word.text };
        if path.len() > MAX_WORD {
            let problem = Problem::TokenTooLong { len: path.len(), max: MAX_WORD };
            return Err(Fault::new(word.at, problem));
        }
        let of_path = path.strip_prefix("/dev/drbd").and_then(minor_of);
        if !lex.peek()?.is_word("minor") {
            let Some(minor) = of_path else {
                let token = lex.next()?;
                return Err(unexpected(&token, &["minor"])
                    .help(format!("the minor number cannot be told from '{path}'"))
                    .help(format!("write: device {path} minor N;")));
            };
            return Ok(Device { path, minor, at: word.at });
        }
        lex.next()?;
        let (minor, minor_at) = self.integer(lex, "minor", (0, MINOR_MAX))?;
        if of_path.is_some_and(|of_path| of_path != minor) {
            let problem = Problem::Expected {
                expected: path.replace("/dev/drbd", ""),
                found: minor.to_string(),
            };
            return Err(Fault::new(minor_at, problem)
                .help(format!("the name {path} says another minor number")));
        }
        Ok(Device { path, minor, at: word.at })
    }

    /// Takes what follows `meta-disk` or `flexible-meta-disk`.
    fn meta(&mut self, lex: &mut Lexer, keyword: &str) -> Outcome<Meta> {
        let word = self.value(lex, "internal | path of a block device")?;
        let is_indexed = lex.peek()?.is_punct('[');
        if keyword == "flexible-meta-disk" || !is_indexed {
            let place = match word.text.as_str() {
                "internal" => MetaPlace::Internal,
                _ => MetaPlace::Flexible(word.text),
            };
            return Ok(Meta { place, at: word.at });
        }
        if word.text == "internal" {
            let token = lex.next()?;
            return Err(unexpected(&token, &[";"]));
        }
        self.punct(lex, '[')?;
        let (index, _) = self.integer(lex, "index", (0, INDEX_MAX))?;
        self.punct(lex, ']')?;
        Ok(Meta { place: MetaPlace::Indexed(word.text, index), at: word.at })
    }
}

/// The minor number in a name like `drbd7`.
fn minor_of(digits: &str) -> Option<u32> {
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'));
    let minor: u32 = digits.parse().ok().filter(|_| is_plain)?;
    (minor <= MINOR_MAX).then_some(minor)
}

/// The volume that statements outside of any `volume` form.
fn implicit(volumes: &mut Vec<Volume>, at: Loc) -> Outcome<&mut Volume> {
    if let Some(other) = volumes.iter().find(|volume| !volume.is_implicit) {
        return Err(mixed_volumes(at, other.at));
    }
    if volumes.is_empty() {
        volumes.push(Volume::new(0, true, at));
    }
    Ok(&mut volumes[0])
}

/// The error about both kinds of volumes in one scope.
fn mixed_volumes(at: Loc, first: Loc) -> Box<Fault> {
    let problem = Problem::Conflict { what: "volume", key: "0".to_owned() };
    Fault::new(at, problem)
        .first(first)
        .help("device, disk and meta-disk outside of 'volume' form volume 0; use one form only")
}

/// Lays the settings of `upper` over those of `lower`.
fn lay_over(lower: &mut Scope, upper: Scope) {
    for section in Section::ALL {
        let list = lower.section_mut(section);
        for setting in upper.section(section) {
            match list.iter_mut().find(|old| old.spec.name == setting.spec.name) {
                Some(old) => *old = setting.clone(),
                None => list.push(setting.clone()),
            }
        }
    }
    lower.proxy.extend(upper.proxy);
}

/// Refuses names that a command line could not address or a path could not hold.
fn check_resource_name(name: &Name) -> Outcome<()> {
    let text = name.text.as_str();
    let is_odd = |c: char| "/:".contains(c) || c.is_whitespace() || c.is_control();
    let is_bad = matches!(text, "" | "all" | "." | "..")
        || text.starts_with('-')
        || text.contains(is_odd)
        || text.len() > 127;
    match is_bad {
        false => Ok(()),
        true => Err(Fault::new(name.at, Problem::BadResourceName { name: name.text.clone() })
            .help("no name: all . .. and anything with / : blanks or a leading '-'")),
    }
}
