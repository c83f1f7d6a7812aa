//! What can be wrong with a configuration, and how it is told.
//!
//! A message has the form `FILE:LINE:COLUMN: what is wrong`, then the line itself, a row of `^`
//! under the words meant, and what would be right. The wording of the messages that operators
//! have learned to search for is kept; the rest is ours.

use std::fmt;
use std::path::{Path, PathBuf};

use super::source::{Loc, Place, Sources};

/// Exit code of a command that meets a broken configuration.
pub const EXIT_CONFIG: u8 = 10;
/// The option whose value is shown to nobody.
pub(crate) const SECRET_OPTION: &str = "shared-secret";

/// Exit code of a command that names something the configuration does not define here.
pub const EXIT_NOT_DEFINED: u8 = 1;

/// What is wrong with the value of an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueFault {
    /// Neither `yes` nor `no`.
    #[error("Value is not 'yes' or 'no'.")]
    NotBoolean,
    /// Not in the list.
    #[error("Value is not valid.\nAllowed values are: {allowed}")]
    NotListed {
        /// The list.
        allowed: String,
    },
    /// No digits, too many, or a suffix that does not exist.
    #[error("Value is not a number.")]
    NotNumber,
    /// A suffix where the option takes none.
    #[error("Value takes no suffix.")]
    Suffix,
    /// Above the range.
    #[error("Value is too big.")]
    TooBig,
    /// Below the range.
    #[error("Value is too small.")]
    TooSmall,
    /// Not a multiple of the granularity.
    #[error("Value is not a multiple of {step}.")]
    NotMultiple {
        /// The granularity.
        step: u64,
    },
    /// More characters than the option can hold.
    #[error("Value is too long, {max} characters are allowed.")]
    TooLong {
        /// The limit.
        max: usize,
    },
    /// Not an address.
    #[error("Value is not an address.")]
    NotAddress,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A file that cannot be read.
    #[error("cannot read '{}': {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A file larger than any configuration.
    #[error("'{}' is larger than {limit} bytes, this is no configuration", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// Too many files, or files that include each other too deeply.
    #[error("more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Other words than these.
    #[error("Parse error: '{expected}' expected,\n\tbut got '{found}'")]
    Expected {
        /// What may stand here.
        expected: String,
        /// What does.
        found: String,
    },
    /// A word that is too long.
    #[error("Parse error: Token too long ({len} characters, {max} are allowed)")]
    TokenTooLong {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A quoted string that is too long.
    #[error("Parse error: quoted string too long ({len} characters, {max} are allowed)")]
    StringTooLong {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A quoted string whose end is not on the same line.
    #[error("Parse error: unterminated quoted string")]
    StringUnterminated,
    /// A quoted string that is not UTF-8.
    #[error("Parse error: quoted string is not UTF-8 text")]
    StringNotText,
    /// A character outside of the alphabet.
    #[error("Parse error: unexpected character '{}'", found.escape_ascii())]
    StrayByte {
        /// The character.
        found: u8,
    },
    /// A value its option does not take.
    #[error("Parse error: while parsing value ('{value}')\nfor {option}. {fault}")]
    Value {
        /// The option.
        option: String,
        /// The value as written.
        value: String,
        /// What is wrong with it.
        fault: ValueFault,
    },
    /// A feature that is understood and not there. To ignore it would endanger data.
    #[error("{what} is not available yet")]
    NotAvailable {
        /// The statement.
        what: String,
    },
    /// Something used twice.
    #[error("conflicting use of {what} '{key}' ...")]
    Conflict {
        /// What kind of thing.
        what: &'static str,
        /// Which one.
        key: String,
    },
    /// A name no command line could address.
    #[error("'{name}' cannot be the name of a resource")]
    BadResourceName {
        /// The name.
        name: String,
    },
    /// Something that has to be there and is not.
    #[error("in resource {resource}, {scope} {{ ... }}: '{keyword}' keyword missing.")]
    Missing {
        /// The resource.
        resource: String,
        /// The section.
        scope: String,
        /// The statement.
        keyword: &'static str,
    },
    /// Sections that do not fit together.
    #[error("in resource {resource}: {what}")]
    Inconsistent {
        /// The resource.
        resource: String,
        /// What does not fit.
        what: String,
    },
    /// The address of this host is on none of its interfaces.
    #[error("in resource {resource}, on {host}:\n\tIP {address} not found on this host.")]
    ForeignAddress {
        /// The resource.
        resource: String,
        /// The host section.
        host: String,
        /// The address.
        address: String,
    },
    /// The file asks for another version of the driver.
    #[error(
        "this configuration requires a drbd module version {relation} {wanted}, this is {ours}"
    )]
    Version {
        /// The comparison in words.
        relation: &'static str,
        /// The version asked for.
        wanted: String,
        /// The version of this driver.
        ours: String,
    },
    /// A resource that is not there, or not on this host.
    #[error("'{resource}' not defined in your config (for this host).")]
    NotDefined {
        /// The resource.
        resource: String,
    },
}

/// An error on its way up, before its place is turned into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) at: Option<Loc>,
    pub(crate) problem: Problem,
    /// What would be right, one line each.
    pub(crate) help: Vec<String>,
    /// Where the same thing was used first.
    pub(crate) first: Option<Loc>,
}

/// Result of everything inside of the parser. Boxed, because errors are rare and large.
pub(crate) type Outcome<T> = Result<T, Box<Fault>>;

impl Fault {
    /// An error at a place.
    pub(crate) fn new(at: Loc, problem: Problem) -> Box<Self> {
        Box::new(Self { at: Some(at), problem, help: Vec::new(), first: None })
    }

    /// An error that has no place, because no text is wrong.
    pub(crate) fn nowhere(problem: Problem) -> Box<Self> {
        Box::new(Self { at: None, problem, help: Vec::new(), first: None })
    }

    /// Adds a line that says what would be right.
    pub(crate) fn help(mut self: Box<Self>, line: impl Into<String>) -> Box<Self> {
        self.help.push(line.into());
        self
    }

    /// Adds the place of the first use.
    pub(crate) fn first(mut self: Box<Self>, at: Loc) -> Box<Self> {
        self.first = Some(at);
        self
    }

    /// Puts the places into words.
    pub(crate) fn report(self, sources: &Sources) -> ConfError {
        let at = self.at.map(|at| sources.place(at));
        let first = self.first.map(|at| sources.place(at));
        let report = Report { at, problem: self.problem, help: self.help, first };
        ConfError(Box::new(report))
    }
}

/// An error in the configuration, ready to be shown.
///
/// **Shape** (`Display`): several lines without a final line end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfError(Box<Report>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Report {
    at: Option<Place>,
    problem: Problem,
    help: Vec<String>,
    first: Option<Place>,
}

impl ConfError {
    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.0.problem
    }

    /// Where, if it is about words in a file.
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        self.0.at.as_ref()
    }

    /// The exit code of the command that meets this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.0.problem {
            Problem::NotDefined { .. } => EXIT_NOT_DEFINED,
            Problem::Unreadable { .. }
            | Problem::TooLarge { .. }
            | Problem::TooMany { .. }
            | Problem::Expected { .. }
            | Problem::TokenTooLong { .. }
            | Problem::StringTooLong { .. }
            | Problem::StringUnterminated
            | Problem::StringNotText
            | Problem::StrayByte { .. }
            | Problem::Value { .. }
            | Problem::NotAvailable { .. }
            | Problem::Conflict { .. }
            | Problem::BadResourceName { .. }
            | Problem::Missing { .. }
            | Problem::Inconsistent { .. }
            | Problem::ForeignAddress { .. }
            | Problem::Version { .. } => EXIT_CONFIG,
        }
    }
}

impl fmt::Display for ConfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { at, problem, help, first } = &*self.0;
        if let Some(place) = at {
            write!(f, "{}:{}:{}: {problem}", place.file.display(), place.line, place.column)?;
            write_excerpt(f, place)?;
        } else {
            write!(f, "{problem}")?;
        }
        if let (Some(place), Problem::Conflict { what, key }) = (first, problem) {
            let file = place.file.display();
            write!(f, "\n{file}:{}: {what} '{key}' first used here.", place.line)?;
        }
        for line in help {
            write!(f, "\n{line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfError {}

/// Writes the line and the row of carets. Tabs are kept, so that both are indented alike.
fn write_excerpt(f: &mut fmt::Formatter<'_>, place: &Place) -> fmt::Result {
    let before = place.text.chars().take(place.column - 1);
    let pad: String = before.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    let text: String = without_secret(&place.text).chars().map(shown).collect();
    write!(f, "\n{text}\n{pad}{}", "^".repeat(place.width))
}

/// The line with a star for each character of a secret, because messages end up in logs.
fn without_secret(line: &str) -> String {
    let mut text = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once(SECRET_OPTION) {
        let value = after.trim_start_matches([' ', '\t']);
        let blanks = &after[..after.len() - value.len()];
        let len = secret_len(value);
        let stars = "*".repeat(value[..len].chars().count());
        text.extend([before, SECRET_OPTION, blanks, &stars]);
        rest = &value[len..];
    }
    text + rest
}

/// Bytes of the value that `text` begins with: a quoted string, or all up to `;`.
fn secret_len(text: &str) -> usize {
    let Some(quoted) = text.strip_prefix('"') else {
        return text.find(';').unwrap_or(text.len());
    };
    let mut is_escaped = false;
    let end = quoted.find(|c: char| {
        let is_end = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        is_end
    });
    end.map_or(text.len(), |end| end + 2)
}

/// A character as it may go to a terminal: control characters are replaced.
fn shown(c: char) -> char {
    if c.is_control() && c != '\t' { '\u{fffd}' } else { c }
}

/// Something that is accepted and yet worth a line.
///
/// **Shape** (`Display`): `FILE:LINE: text`, one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// What to know.
    pub text: String,
}

impl Warning {
    /// A warning about `at`.
    pub(crate) fn new(sources: &Sources, at: Loc, text: impl Into<String>) -> Self {
        let file: &Path = sources.file(at);
        Self { file: file.to_path_buf(), line: sources.line(at), text: text.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A secret is replaced character by character, quoted or not, once or twice on a line.
    #[test]
    fn secrets_are_not_shown() {
        let table = [
            ("timeout 6;", "timeout 6;"),
            ("shared-secret abc; x", "shared-secret ***; x"),
            ("shared-secret\t\"a\\\";\"; x", "shared-secret\t******; x"),
            ("shared-secret \"abc", "shared-secret ****"),
            ("shared-secret a; shared-secret b;", "shared-secret *; shared-secret *;"),
            ("shared-secret", "shared-secret"),
        ];
        for (line, expected) in table {
            let found = without_secret(line);
            assert_eq!(found, expected);
            assert_eq!(found.chars().count(), line.chars().count(), "carets stay below");
        }
    }
}
