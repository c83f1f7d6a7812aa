//! Reads configuration files into the tree of `ast.rs`.
//!
//! Recursive descent with one token of look-ahead. The depth of the recursion is the depth of the
//! grammar, except for `include`, which is counted. Names are checked against the reserved words;
//! option values are not. Rules: the grammar section of the notes on the user's surface.

mod connection;
mod host;
mod options;
mod resource;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::ast::{FreeEnd, FreeLine, Name, Resource, Scope, Setting};
use super::dump;
use super::error::{Fault, Outcome, Problem, ValueFault, Warning};
use super::glob;
use super::lexer::{Lexer, Token, TokenKind};
use super::source::{Files, Loc, MAX_FILE_BYTES, Sources};
use super::table::Section;
use super::value;

/// Deepest nesting of `include`.
const MAX_INCLUDE_DEPTH: usize = 16;
/// Most files of one configuration. A cluster has tens of resources, one file each.
const MAX_FILES: usize = 4096;
/// Deepest nesting inside of a section that is kept and not understood.
const MAX_FREE_DEPTH: usize = 8;
/// The version that version requirements are compared with: the driver whose protocol is spoken.
const MODULE_VERSION: [u32; 3] = [8, 4, 11];

/// Words that are no names unless quoted.
const RESERVED: &[&str] = &[
    "_cstate",
    "_peer_node_id",
    "_remote_host",
    "_this_host",
    "_unknown",
    "address",
    "ask",
    "cmd-timeout-long",
    "cmd-timeout-medium",
    "cmd-timeout-short",
    "common",
    "connection",
    "connection-mesh",
    "device",
    "dialog-refresh",
    "disable-ip-verification",
    "disk",
    "flexible-meta-disk",
    "floating",
    "global",
    "handlers",
    "host",
    "hosts",
    "include",
    "inside",
    "internal",
    "ipv4",
    "ipv6",
    "meta-disk",
    "minor",
    "minor-count",
    "net",
    "no",
    "node-id",
    "none",
    "on",
    "options",
    "outside",
    "outside-address",
    "path",
    "plugin",
    "port",
    "proxy",
    "require-drbd-module-version-eq",
    "require-drbd-module-version-ge",
    "require-drbd-module-version-gt",
    "require-drbd-module-version-le",
    "require-drbd-module-version-lt",
    "require-drbd-module-version-ne",
    "resource",
    "sci",
    "sdp",
    "skip",
    "ssocks",
    "stacked-on-top-of",
    "startup",
    "syncer",
    "template-file",
    "tiebreaker",
    "udev-always-use-vnr",
    "usage-count",
    "via",
    "volume",
    "yes",
];

/// Whether `text` has to be quoted where a name is expected.
pub(crate) fn is_reserved(text: &str) -> bool {
    let is_integer = text.bytes().all(|byte| byte.is_ascii_digit());
    is_integer || RESERVED.contains(&text)
}

/// The parser and what it has read.
pub(crate) struct Parser<'a> {
    files: &'a dyn Files,
    /// Real paths of files that are left out of `include`.
    excluded: BTreeSet<PathBuf>,
    /// Real paths of the files read.
    seen: BTreeSet<PathBuf>,
    templates: BTreeMap<PathBuf, Scope>,
    global_at: Option<Loc>,
    /// Whether something stood before `global` that should not.
    is_past_global: bool,
    pub(crate) sources: Sources,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) global: Vec<Setting>,
    pub(crate) common: Scope,
    pub(crate) resources: Vec<Resource>,
}

impl<'a> Parser<'a> {
    /// A parser that has read nothing.
    pub(crate) fn new(files: &'a dyn Files, exclude: &[PathBuf]) -> Self {
        let excluded = exclude.iter().filter_map(|path| files.real_path(path).ok()).collect();
        Self {
            files,
            excluded,
            seen: BTreeSet::new(),
            templates: BTreeMap::new(),
            global_at: None,
            is_past_global: false,
            sources: Sources::default(),
            warnings: Vec::new(),
            global: Vec::new(),
            common: Scope::default(),
            resources: Vec::new(),
        }
    }

    /// Reads a file that the operator named.
    pub(crate) fn main_file(&mut self, path: &Path) -> Outcome<()> {
        let bytes = self.read(path, None)?;
        self.seen.extend(self.files.real_path(path));
        self.text(path, bytes, parent(path), 0)
    }

    /// Reads text that was not in a file, such as standard input.
    pub(crate) fn main_text(&mut self, name: &Path, bytes: Vec<u8>, dir: &Path) -> Outcome<()> {
        if bytes.len() > MAX_FILE_BYTES {
            let problem = Problem::TooLarge { path: name.to_path_buf(), limit: MAX_FILE_BYTES };
            return Err(Fault::nowhere(problem));
        }
        self.text(name, bytes, dir, 0)
    }

    /// The content of a file; `from` is the statement that asks for it.
    fn read(&self, path: &Path, from: Option<Loc>) -> Outcome<Vec<u8>> {
        let problem = match self.files.read(path) {
            Ok(bytes) if bytes.len() <= MAX_FILE_BYTES => return Ok(bytes),
            Ok(_) => Problem::TooLarge { path: path.to_path_buf(), limit: MAX_FILE_BYTES },
            Err(error) => {
                Problem::Unreadable { path: path.to_path_buf(), reason: error.to_string() }
            }
        };
        Err(match from {
            Some(at) => Fault::new(at, problem),
            None => Fault::nowhere(problem),
        })
    }

    /// Adds a warning.
    fn warn(&mut self, at: Loc, text: impl Into<String>) {
        self.warnings.push(Warning::new(&self.sources, at, text));
    }

    /// Parses one file. `dir` is where its `include` statements start.
    fn text(&mut self, name: &Path, bytes: Vec<u8>, dir: &Path, depth: usize) -> Outcome<()> {
        let (file, bytes) = self.sources.add(name, bytes);
        let mut lex = Lexer::new(file, bytes);
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::End => return Ok(()),
                TokenKind::Word(word) => self.statement(&mut lex, word, token.at, dir, depth)?,
                TokenKind::Quoted(_) | TokenKind::Punct(_) => {
                    return Err(unexpected(&token, TOP_LEVEL));
                }
            }
        }
    }

    /// Parses a statement outside of any section.
    fn statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        dir: &Path,
        depth: usize,
    ) -> Outcome<()> {
        match word {
            "global" => self.global(lex, at),
            "common" => {
                self.is_past_global = true;
                let mut common = std::mem::take(&mut self.common);
                let result = self.common(lex, &mut common);
                self.common = common;
                result
            }
            "resource" => {
                self.is_past_global = true;
                let resource = self.resource(lex, at, dir)?;
                self.resources.push(resource);
                Ok(())
            }
            "skip" => lex.skip_statement(at),
            "include" => self.include(lex, dir, depth),
            _ => match word.strip_prefix("require-drbd-module-version-") {
                Some(relation) => require_version(lex, relation, at),
                None => Err(unknown(word, at, TOP_LEVEL)),
            },
        }
    }

    /// Parses `global { ... }` after its keyword.
    fn global(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<()> {
        if let Some(first) = self.global_at {
            let problem = Problem::Conflict { what: "section", key: "global".to_owned() };
            return Err(Fault::new(at, problem).first(first));
        }
        self.global_at = Some(at);
        if self.is_past_global {
            self.warn(at, "the global section should come first");
        }
        let mut scope = Scope::default();
        self.options(lex, Section::Global, &mut scope)?;
        self.global = scope.global;
        Ok(())
    }

    /// Parses `common { ... }` after its keyword.
    fn common(&mut self, lex: &mut Lexer, scope: &mut Scope) -> Outcome<()> {
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => return Ok(()),
                TokenKind::Word(word) => {
                    if !self.common_statement(lex, word, token.at, scope)? {
                        return Err(unknown(word, token.at, IN_COMMON));
                    }
                }
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_COMMON));
                }
            }
        }
    }

    /// Parses a statement that may stand in `common`, a template and a resource. `disk` is among
    /// them; a caller that knows `disk PATH` looks first. Gives false for other words.
    fn common_statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        scope: &mut Scope,
    ) -> Outcome<bool> {
        match word {
            "protocol" => self.option(lex, Section::Net, word, at, scope)?,
            "inittimeout" | "load-only" | "incon-degr-cmd" => {
                self.option(lex, Section::Startup, word, at, scope)?;
            }
            "net" => self.options(lex, Section::Net, scope)?,
            "disk" => self.options(lex, Section::Disk, scope)?,
            "options" => self.options(lex, Section::Options, scope)?,
            "startup" => self.options(lex, Section::Startup, scope)?,
            "handlers" => self.options(lex, Section::Handlers, scope)?,
            "syncer" => self.options(lex, Section::Syncer, scope)?,
            "proxy" | "plugin" => {
                self.warn(at, format!("section {word} is accepted but has no effect"));
                scope.proxy.extend(self.free(lex, word)?);
            }
            "skip" => lex.skip_statement(at)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Parses `include PATTERN;` after its keyword and reads the files.
    fn include(&mut self, lex: &mut Lexer, dir: &Path, depth: usize) -> Outcome<()> {
        let pattern = self.value(lex, "file name")?;
        self.punct(lex, ';')?;
        if depth == MAX_INCLUDE_DEPTH {
            let problem = Problem::TooMany { what: "levels of include", limit: MAX_INCLUDE_DEPTH };
            return Err(Fault::new(pattern.at, problem));
        }
        let paths = if glob::is_pattern(&pattern.text) {
            glob::expand(self.files, dir, &pattern.text).map_err(|error| {
                let path = PathBuf::from(&pattern.text);
                Fault::new(pattern.at, Problem::Unreadable { path, reason: error.to_string() })
            })?
        } else {
            vec![dir.join(&pattern.text)]
        };
        for path in paths {
            let Ok(real) = self.files.real_path(&path) else {
                self.read(&path, Some(pattern.at))?;
                continue;
            };
            if self.excluded.contains(&real) || !self.seen.insert(real) {
                continue;
            }
            if self.seen.len() > MAX_FILES {
                let problem = Problem::TooMany { what: "files", limit: MAX_FILES };
                return Err(Fault::new(pattern.at, problem));
            }
            let bytes = self.read(&path, Some(pattern.at))?;
            self.text(&path, bytes, parent(&path), depth + 1)?;
        }
        Ok(())
    }

    /// Parses `template-file "f";` after its keyword; gives the sections of the file.
    fn template(&mut self, lex: &mut Lexer, dir: &Path) -> Outcome<Scope> {
        let name = self.value(lex, "file name")?;
        self.punct(lex, ';')?;
        let path = dir.join(&name.text);
        if let Some(scope) = self.templates.get(&path) {
            return Ok(scope.clone());
        }
        let bytes = self.read(&path, Some(name.at))?;
        let (file, bytes) = self.sources.add(&path, bytes);
        let mut lex = Lexer::new(file, bytes);
        let mut scope = Scope::default();
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::End => break,
                TokenKind::Word(word) if word == "common" || word == "template" => {
                    self.common(&mut lex, &mut scope)?;
                }
                TokenKind::Word(word) => {
                    if !self.common_statement(&mut lex, word, token.at, &mut scope)? {
                        return Err(unknown(word, token.at, IN_COMMON));
                    }
                }
                TokenKind::Quoted(_) | TokenKind::Punct(_) => {
                    return Err(unexpected(&token, IN_COMMON));
                }
            }
        }
        self.templates.insert(path, scope.clone());
        Ok(scope)
    }

    /// Takes the punctuation mark `mark`.
    fn punct(&mut self, lex: &mut Lexer, mark: char) -> Outcome<Loc> {
        let token = lex.next()?;
        match token.is_punct(mark) {
            true => Ok(token.at),
            false => Err(unexpected(&token, &[mark.encode_utf8(&mut [0; 4])])),
        }
    }

    /// Takes the name of something: a quoted string, or a word that is neither reserved nor a
    /// number.
    fn name(&mut self, lex: &mut Lexer, what: &str) -> Outcome<Name> {
        let token = lex.next()?;
        match token.kind {
            TokenKind::Quoted(text) => Ok(Name { text, at: token.at }),
            TokenKind::Word(ref text) if is_reserved(text) => Err(unexpected(&token, &[what])
                .help(format!(
                    "'{text}' is a reserved word or a number; as a name it is quoted: \"{text}\""
                ))),
            TokenKind::Word(text) => Ok(Name { text, at: token.at }),
            TokenKind::Punct(_) | TokenKind::End => Err(unexpected(&token, &[what])),
        }
    }

    /// Takes a value: a quoted string or any word.
    fn value(&mut self, lex: &mut Lexer, what: &str) -> Outcome<Name> {
        let token = lex.next()?;
        match token.kind {
            TokenKind::Quoted(text) | TokenKind::Word(text) => Ok(Name { text, at: token.at }),
            TokenKind::Punct(_) | TokenKind::End => Err(unexpected(&token, &[what])),
        }
    }

    /// Takes a number without suffix between `min` and `max`.
    fn integer(
        &mut self,
        lex: &mut Lexer,
        what: &str,
        (min, max): (u32, u32),
    ) -> Outcome<(u32, Loc)> {
        let word = self.value(lex, what)?;
        let is_digits = word.text.bytes().all(|byte| byte.is_ascii_digit());
        let fault = match word.text.parse::<u32>() {
            Ok(number) if is_digits && number < min => ValueFault::TooSmall,
            Ok(number) if is_digits && number > max => ValueFault::TooBig,
            Ok(number) if is_digits => return Ok((number, word.at)),
            Ok(_) | Err(_) => ValueFault::NotNumber,
        };
        let problem = Problem::Value { option: what.to_owned(), value: word.text, fault };
        Err(Fault::new(word.at, problem).help(format!("{what} takes {min}..{max}")))
    }

    /// Takes the rest of a statement or section whose content is kept and not understood. `first`
    /// is what was read of it already.
    fn free(&mut self, lex: &mut Lexer, first: &str) -> Outcome<Vec<FreeLine>> {
        let mut lines = Vec::new();
        let mut depth = 0;
        let mut text = first.to_owned();
        // Two words need a blank between them, punctuation needs none.
        let mut ends_in_word = true;
        loop {
            let token = lex.next()?;
            let end = match &token.kind {
                TokenKind::Word(word) | TokenKind::Quoted(word) => {
                    text.push_str(if ends_in_word && !text.is_empty() { " " } else { "" });
                    text.push_str(&dump::word(word));
                    ends_in_word = true;
                    continue;
                }
                TokenKind::Punct(';') if !text.is_empty() => FreeEnd::Statement,
                TokenKind::Punct('{') if depth < MAX_FREE_DEPTH => FreeEnd::Open,
                TokenKind::Punct('}') if depth > 0 && text.is_empty() => FreeEnd::Close,
                TokenKind::Punct(mark @ (':' | '[' | ']')) => {
                    let is_apart = *mark == '[' && ends_in_word && !text.is_empty();
                    text.push_str(if is_apart { " " } else { "" });
                    text.push(*mark);
                    ends_in_word = false;
                    continue;
                }
                TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, &["value", ";"]));
                }
            };
            depth -= usize::from(end == FreeEnd::Close);
            lines.push(FreeLine { depth, text: std::mem::take(&mut text), end });
            depth += usize::from(end == FreeEnd::Open);
            ends_in_word = true;
            if depth == 0 {
                return Ok(lines);
            }
        }
    }
}

/// Statements outside of any section.
const TOP_LEVEL: &[&str] = &["resource", "global", "common", "include", "skip"];
/// Statements in `common`.
const IN_COMMON: &[&str] =
    &["protocol", "net", "disk", "options", "startup", "handlers", "syncer", "proxy", "skip", "}"];

/// The directory of a file.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) | None => Path::new("."),
    }
}

/// The error about a token of the wrong kind.
fn unexpected(token: &Token, expected: &[&str]) -> Box<Fault> {
    let problem = Problem::Expected { expected: expected.join(" | "), found: token.to_string() };
    Fault::new(token.at, problem)
}

/// The error about a word that is no statement here.
fn unknown(word: &str, at: Loc, expected: &[&str]) -> Box<Fault> {
    let problem = Problem::Expected { expected: expected.join(" | "), found: word.to_owned() };
    let fault = Fault::new(at, problem);
    match value::nearest(word, expected.iter().copied()) {
        Some(name) => fault.help(format!("did you mean '{name}'?")),
        None => fault,
    }
}

/// Parses `require-drbd-module-version-OP VERSION;` after its keyword and compares.
fn require_version(lex: &mut Lexer, relation: &str, at: Loc) -> Outcome<()> {
    type Test = fn(&[u32; 3], &[u32; 3]) -> bool;
    let (words, test): (&'static str, Test) = match relation {
        "eq" => ("equal to", |ours, wanted| ours == wanted),
        "ne" => ("other than", |ours, wanted| ours != wanted),
        "gt" => ("above", |ours, wanted| ours > wanted),
        "ge" => ("of at least", |ours, wanted| ours >= wanted),
        "lt" => ("below", |ours, wanted| ours < wanted),
        "le" => ("of at most", |ours, wanted| ours <= wanted),
        _ => {
            let found = format!("require-drbd-module-version-{relation}");
            let expected = "require-drbd-module-version-{eq,ne,gt,ge,lt,le}".to_owned();
            return Err(Fault::new(at, Problem::Expected { expected, found }));
        }
    };
    let token = lex.next()?;
    let parsed = match &token.kind {
        TokenKind::Word(text) | TokenKind::Quoted(text) => version(text),
        TokenKind::Punct(_) | TokenKind::End => None,
    };
    let Some(wanted) = parsed else { return Err(unexpected(&token, &["x.y.z"])) };
    let end = lex.next()?;
    if !end.is_punct(';') {
        return Err(unexpected(&end, &[";"]));
    }
    if test(&MODULE_VERSION, &wanted) {
        return Ok(());
    }
    let [major, minor, patch] = MODULE_VERSION;
    let ours = format!("{major}.{minor}.{patch}");
    let problem = Problem::Version { relation: words, wanted: token.to_string(), ours };
    Err(Fault::new(token.at, problem))
}

/// Reads a version of one to three numbers.
fn version(text: &str) -> Option<[u32; 3]> {
    let mut version = [0; 3];
    let mut parts = text.split('.');
    for place in &mut version {
        match parts.next() {
            Some(part) => *place = part.parse().ok()?,
            None => break,
        }
    }
    parts.next().is_none().then_some(version)
}
