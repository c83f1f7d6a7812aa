//! Sections of options: looking names up, checking values, telling what has no effect.

use super::super::ast::{Scope, Setting, Value};
use super::super::error::{Fault, Outcome, Problem, SECRET_OPTION, ValueFault};
use super::super::legacy;
use super::super::lexer::{Lexer, Token, TokenKind};
use super::super::source::Loc;
use super::super::table::{self, Effect, Kind, Section, Spec};
use super::super::value;
use super::{Parser, unexpected};

/// What the name of an option stands for.
struct Found {
    section: Section,
    spec: &'static Spec,
    /// Written with `no-` before it.
    is_negated: bool,
    /// Suffix for a number that has none.
    suffix: &'static str,
}

impl Parser<'_> {
    /// Parses `{ option; ... }` into the lists of `scope`. An option of an earlier version may
    /// end up in another list than that of `section`.
    pub(super) fn options(
        &mut self,
        lex: &mut Lexer,
        section: Section,
        scope: &mut Scope,
    ) -> Outcome<()> {
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => return Ok(()),
                TokenKind::Word(name) => self.option(lex, section, name, token.at, scope)?,
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, &[&format!("an option of {section}"), "}"]));
                }
            }
        }
    }

    /// Parses options of a scope that has a list for `section` only.
    pub(super) fn options_only(
        &mut self,
        lex: &mut Lexer,
        section: Section,
        list: &mut Vec<Setting>,
    ) -> Outcome<()> {
        let mut scope = Scope::default();
        std::mem::swap(scope.section_mut(section), list);
        self.options(lex, section, &mut scope)?;
        std::mem::swap(scope.section_mut(section), list);
        let mut others = Section::ALL.iter().flat_map(|&other| scope.section(other));
        match others.next() {
            None => Ok(()),
            Some(Setting { spec, at, .. }) => {
                let expected = format!("an option of {section} at this place");
                let problem = Problem::Expected { expected, found: spec.name.to_owned() };
                Err(Fault::new(*at, problem)
                    .help(format!("{} belongs to the resource or to common", spec.name)))
            }
        }
    }

    /// Parses the rest of one option, up to and including its `;`.
    pub(super) fn option(
        &mut self,
        lex: &mut Lexer,
        section: Section,
        name: &str,
        at: Loc,
        scope: &mut Scope,
    ) -> Outcome<()> {
        let found = self.look_up(section, name, at)?;
        let words = self.words(lex)?;
        let (value, written, value_at) = self.option_value(&found, at, &words)?;
        self.tell_effect(&found, &value, &written, value_at)?;
        let setting = Setting { spec: found.spec, value, written, at };
        let list = scope.section_mut(found.section);
        match list.iter_mut().find(|old| old.spec.name == setting.spec.name) {
            None => list.push(setting),
            Some(old) => {
                *old = setting;
                let text = format!("option {name} of {section} is given twice, this one counts");
                self.warn(at, text);
            }
        }
        Ok(())
    }

    /// Takes words up to `;`.
    fn words(&mut self, lex: &mut Lexer) -> Outcome<Vec<Token>> {
        let mut words = Vec::new();
        loop {
            let token = lex.next()?;
            match token.kind {
                TokenKind::Punct(';') => return Ok(words),
                TokenKind::Word(_) | TokenKind::Quoted(_) => words.push(token),
                TokenKind::Punct(_) | TokenKind::End => {
                    let expected: &[&str] = if words.is_empty() { &["value", ";"] } else { &[";"] };
                    return Err(unexpected(&token, expected));
                }
            }
        }
    }

    /// Finds the option of that name.
    fn look_up(&mut self, section: Section, name: &str, at: Loc) -> Outcome<Found> {
        if let Some(today) = legacy::today(section, name) {
            let spec = table::find(today.section, today.name).expect("legacy names have a home");
            if today.is_noted {
                let text = format!("{name} is an old name, it is taken for {}", today.name);
                self.warn(at, text);
            }
            let suffix = today.suffix.unwrap_or("");
            return Ok(Found { section: today.section, spec, is_negated: false, suffix });
        }
        if let Some(spec) = table::find(section, name) {
            return Ok(Found { section, spec, is_negated: false, suffix: "" });
        }
        let positive = name.strip_prefix("no-").and_then(|rest| table::find(section, rest));
        match positive {
            Some(spec) if matches!(spec.kind, Kind::Flag { .. }) => {
                Ok(Found { section, spec, is_negated: true, suffix: "" })
            }
            Some(_) | None => Err(unknown_option(section, name, at)),
        }
    }

    /// Checks the words after the name. Gives the value, its text, and its place.
    fn option_value(
        &mut self,
        found: &Found,
        at: Loc,
        words: &[Token],
    ) -> Outcome<(Value, String, Loc)> {
        let spec = found.spec;
        let is_flag = matches!(spec.kind, Kind::Flag { .. });
        if matches!(spec.kind, Kind::List) && !words.is_empty() {
            let list: Vec<String> = words.iter().map(Token::to_string).collect();
            return Ok((Value::List(list), String::new(), words[0].at));
        }
        let (word, extra) = match words {
            [] if is_flag => return Ok((Value::Flag(!found.is_negated), String::new(), at)),
            [] => {
                let expected = format!("value of {}", spec.name);
                let problem = Problem::Expected { expected, found: ";".to_owned() };
                return Err(Fault::new(at, problem));
            }
            [word] if found.is_negated => (word, Some(word)),
            [word] => (word, None),
            [word, extra, ..] => (word, Some(extra)),
        };
        if let Some(extra) = extra {
            let found = shown(spec, extra);
            let problem = Problem::Expected { expected: ";".to_owned(), found };
            return Err(Fault::new(extra.at, problem));
        }
        let mut written = word.to_string();
        if written.ends_with(|c: char| c.is_ascii_digit()) {
            written.push_str(found.suffix);
        }
        let checked = value::check(spec, &written).map_err(|fault| bad_value(spec, word, fault))?;
        if let (true, Value::Number(number)) = (checked.was_clamped, &checked.value) {
            let text =
                format!("{} {written} is outside of its range, it is set to {number}", spec.name);
            self.warn(word.at, text);
            written = number.to_string();
        }
        Ok((checked.value, written, word.at))
    }

    /// Warns of what has no effect; refuses what must not be ignored.
    fn tell_effect(&mut self, found: &Found, value: &Value, written: &str, at: Loc) -> Outcome<()> {
        let name = found.spec.name;
        let section = found.section;
        let text = match value {
            Value::Flag(flag) => if *flag { "yes" } else { "no" }.to_owned(),
            Value::Number(number) => number.to_string(),
            Value::Text(text) => text.clone(),
            Value::List(_) => String::new(),
        };
        match found.spec.effect {
            Effect::Live => {}
            Effect::Idle { neutral } if neutral.contains(&text.as_str()) => {}
            Effect::Idle { .. } => {
                let text = format!("option {name} of {section} is accepted but has no effect yet");
                self.warn(at, text);
            }
            Effect::Refused { allowed } if allowed.contains(&text.as_str()) => {}
            Effect::Refused { allowed } => {
                let what =
                    format!("option {name} {}", if written.is_empty() { &text } else { written });
                let without: Vec<&str> =
                    allowed.iter().copied().filter(|word| !word.is_empty()).collect();
                let fault = Fault::new(at, Problem::NotAvailable { what })
                    .help("to ignore it could cost data, so the configuration is refused");
                return Err(match without.is_empty() {
                    true => fault.help(format!("leave {name} out")),
                    false => fault.help(format!("available: {name} {}", without.join(" | "))),
                });
            }
            Effect::Replaced { values, by } => {
                if values.contains(&text.as_str()) {
                    let text = format!("{name} {text} is not available, {by} is used instead");
                    self.warn(at, text);
                }
            }
        }
        Ok(())
    }
}

/// A word as it may stand in a message.
fn shown(spec: &Spec, word: &Token) -> String {
    match spec.name == SECRET_OPTION {
        true => "***".to_owned(),
        false => word.to_string(),
    }
}

/// The error about a value.
fn bad_value(spec: &Spec, word: &Token, fault: ValueFault) -> Box<Fault> {
    let value = shown(spec, word);
    let is_long = fault == ValueFault::NotNumber && word.to_string().len() > value::MAX_DIGITS;
    let problem = Problem::Value { option: spec.name.to_owned(), value, fault };
    let mut fault = Fault::new(word.at, problem);
    if is_long {
        fault = fault.help(format!("a number has at most {} digits", value::MAX_DIGITS));
    }
    match spec.kind {
        Kind::Number { unit, min, max, .. } => {
            let suffixes = match unit.bytes() {
                Some(_) => ", or with a suffix s K M G",
                None => "",
            };
            let name = spec.name;
            fault.help(format!("{name} takes {min}..{max}, in {}{suffixes}", unit.name()))
        }
        Kind::Choice(_) if spec.name == "on-io-error" && word.to_string() == "panic" => fault.help(
            "use 'call-local-io-error' and let the handler 'local-io-error' stop the machine",
        ),
        Kind::Choice(names) | Kind::AnyCase(names) | Kind::ChoiceOrHost(names) => {
            help_nearest(fault, &word.to_string(), names)
        }
        Kind::ChoiceOrEmpty(names) => help_nearest(fault, &word.to_string(), names),
        Kind::ListenAddress => {
            fault.help("an address is \"unix:/path\", \"127.0.0.1:PORT\" or \"[::1]:PORT\"")
        }
        Kind::Flag { .. } | Kind::Text(_) | Kind::List => fault,
    }
}

/// Adds the name that was probably meant.
fn help_nearest(fault: Box<Fault>, word: &str, names: &[&str]) -> Box<Fault> {
    match value::nearest(word, names.iter().copied()) {
        Some(name) => fault.help(format!("did you mean '{name}'?")),
        None => fault,
    }
}

/// The error about a name that is no option.
fn unknown_option(section: Section, name: &str, at: Loc) -> Box<Fault> {
    let expected = format!("an option of {section}");
    let fault = Fault::new(at, Problem::Expected { expected, found: name.to_owned() });
    let home = Section::ALL.into_iter().find(|&other| table::find(other, name).is_some());
    if let Some(home) = home {
        return fault.help(format!("'{name}' is an option of {home}"));
    }
    if let Some(near) = value::nearest(name, legacy::known_names(section)) {
        return fault.help(format!("did you mean '{near}'?"));
    }
    let names: Vec<&str> = legacy::known_names(section).collect();
    fault.help(format!("options of {section}: {}", names.join(" ")))
}
