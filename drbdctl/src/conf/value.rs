//! Turns the words after an option's name into a checked and scaled value.
//!
//! Numbers have one to eight digits and at most one suffix; `K`, `M`, `G` count bytes in powers
//! of 1024, `s` counts sectors. What is no whole multiple of the option's unit is rounded up.

use super::ast::Value;
use super::error::ValueFault;
use super::options::NbdAddress;
use super::table::{DISCARD_NODE, Kind, Spec, Unit};

/// Most digits of a number.
pub(crate) const MAX_DIGITS: usize = 8;

/// A value and whether it was moved into the range that has an effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) value: Value,
    pub(crate) was_clamped: bool,
}

/// Checks the words given for `spec`. Flags without a word and lists are for the caller.
///
/// # Errors
/// If the option does not take this word.
pub(crate) fn check(spec: &Spec, word: &str) -> Result<Checked, ValueFault> {
    let value = match spec.kind {
        Kind::Flag { .. } => match word {
            "yes" => Value::Flag(true),
            "no" => Value::Flag(false),
            _ => return Err(ValueFault::NotBoolean),
        },
        Kind::Number { unit, min, max, step, clamp, .. } => {
            let number = scaled(word, unit)?;
            let number = in_range(number, min, max, step)?;
            let (low, high) = clamp.unwrap_or((min, max));
            let clamped = number.clamp(low, high);
            let value = Value::Number(clamped);
            return Ok(Checked { value, was_clamped: clamped != number });
        }
        Kind::Choice(names) => one_of(names, word, "")?,
        Kind::AnyCase(names) => {
            one_of(names, names.iter().find(|n| n.eq_ignore_ascii_case(word)).unwrap_or(&word), "")?
        }
        Kind::ChoiceOrEmpty(_) if word.is_empty() => Value::Text(String::new()),
        Kind::ChoiceOrEmpty(names) => one_of(names, word, "")?,
        Kind::ChoiceOrHost(names) => match word.strip_prefix(DISCARD_NODE) {
            Some(host) if !host.is_empty() && !names.contains(&word) => {
                Value::Text(word.to_owned())
            }
            _ => one_of(names, word, " | discard-node-HOST")?,
        },
        Kind::Text(max) if word.chars().count() > max => return Err(ValueFault::TooLong { max }),
        Kind::Text(_) => Value::Text(word.to_owned()),
        Kind::ListenAddress => match NbdAddress::parse(word) {
            Some(_) => Value::Text(word.to_owned()),
            None => return Err(ValueFault::NotAddress),
        },
        Kind::List => Value::List(vec![word.to_owned()]),
    };
    Ok(Checked { value, was_clamped: false })
}

/// The word, if it is in the list.
fn one_of(names: &[&str], word: &str, more: &str) -> Result<Value, ValueFault> {
    match names.contains(&word) {
        true => Ok(Value::Text(word.to_owned())),
        false => Err(ValueFault::NotListed { allowed: names.join(" | ") + more }),
    }
}

/// The number, if it is in the range.
fn in_range(number: u64, min: u64, max: u64, step: u64) -> Result<u64, ValueFault> {
    match number {
        _ if number < min => Err(ValueFault::TooSmall),
        _ if number > max => Err(ValueFault::TooBig),
        _ if !number.is_multiple_of(step) => Err(ValueFault::NotMultiple { step }),
        _ => Ok(number),
    }
}

/// Reads a number and brings it to `unit`.
fn scaled(word: &str, unit: Unit) -> Result<u64, ValueFault> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = &word[digits.len()..];
    let is_number = (1..=MAX_DIGITS).contains(&digits.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return Err(ValueFault::NotNumber);
    }
    let number: u64 = digits.parse().map_err(|_| ValueFault::NotNumber)?;
    let factor = match suffix {
        "" => return Ok(number),
        "s" | "S" => 512,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        _ => return Err(ValueFault::NotNumber),
    };
    let unit_bytes: u64 = unit.bytes().ok_or(ValueFault::Suffix)?;
    // Eight digits times 2^30 stay below 2^57.
    Ok((number * factor).div_ceil(unit_bytes))
}

/// The name in `names` that `word` was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(1);
    let scored = names.map(|name| (distance(word, name), name));
    let (best, name) = scored.min_by_key(|(score, _)| *score)?;
    (best <= limit).then_some(name)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut older: Vec<usize> = Vec::new();
    let mut old: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = old[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(old[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(older[j - 2] + 1);
            }
            row.push(best);
        }
        older = std::mem::replace(&mut old, row);
    }
    old[b.len()]
}

#[cfg(test)]
mod tests {
    use super::super::table::{self, Section};
    use super::*;

    /// Words and the numbers they are, in the unit of the option.
    #[test]
    fn numbers_are_scaled_and_rounded_up() {
        let table = [
            ("33M", Unit::Kib, Ok(33 * 1024)),
            ("250", Unit::Kib, Ok(250)),
            ("1s", Unit::Kib, Ok(1)),
            ("3s", Unit::Kib, Ok(2)),
            ("1k", Unit::Sectors, Ok(2)),
            ("100s", Unit::Sectors, Ok(100)),
            ("10G", Unit::Sectors, Ok(20_971_520)),
            ("8K", Unit::One, Ok(8192)),
            ("99999999G", Unit::Bytes, Ok(99_999_999 << 30)),
            ("0", Unit::Tenths, Ok(0)),
            ("6s", Unit::Tenths, Err(ValueFault::Suffix)),
            ("123456789", Unit::One, Err(ValueFault::NotNumber)),
            ("", Unit::One, Err(ValueFault::NotNumber)),
            ("K", Unit::One, Err(ValueFault::NotNumber)),
            ("1KK", Unit::One, Err(ValueFault::NotNumber)),
            ("1T", Unit::Bytes, Err(ValueFault::NotNumber)),
            ("-1", Unit::One, Err(ValueFault::NotNumber)),
            ("1.5", Unit::One, Err(ValueFault::NotNumber)),
        ];
        for (word, unit, expected) in table {
            assert_eq!(scaled(word, unit), expected, "{word} in {}", unit.name());
        }
    }

    /// Words of every kind of option, good and bad.
    #[test]
    fn words_are_checked() {
        let spec = |section, name| table::find(section, name).expect("exists");
        let good = [
            (Section::Net, "protocol", "b", Value::Text("B".to_owned())),
            (Section::Net, "after-sb-0pri", "discard-node-bob", {
                Value::Text("discard-node-bob".to_owned())
            }),
            (Section::Net, "cram-hmac-alg", "", Value::Text(String::new())),
            (Section::Disk, "md-flushes", "no", Value::Flag(false)),
            (Section::Disk, "al-extents", "7", Value::Number(67)),
            (Section::Options, "max-io-size", "64k", Value::Number(65_536)),
        ];
        for (section, name, word, value) in good {
            assert_eq!(check(spec(section, name), word).expect("good").value, value, "{name}");
        }
        let bad = [
            (Section::Net, "protocol", "D", "Value is not valid.\nAllowed values are: A | B | C"),
            (Section::Net, "timeout", "700", "Value is too big."),
            (Section::Net, "timeout", "0", "Value is too small."),
            (Section::Disk, "md-flushes", "maybe", "Value is not 'yes' or 'no'."),
            (Section::Options, "max-io-size", "5000", "Value is not a multiple of 4096."),
            (Section::Options, "nbd-address", "10.0.0.1:10809", "Value is not an address."),
            (Section::Options, "nbd-address", "unix:sock", "Value is not an address."),
        ];
        for (section, name, word, text) in bad {
            let fault = check(spec(section, name), word).expect_err("bad");
            assert_eq!(fault.to_string(), text, "{name}");
        }
    }

    /// Typing errors find their word, other words find nothing.
    #[test]
    fn typing_errors() {
        let names = || Section::Net.specs().iter().map(|spec| spec.name);
        assert_eq!(nearest("tiemout", names()), Some("timeout"));
        assert_eq!(nearest("pingint", names()), Some("ping-int"));
        assert_eq!(nearest("after-sb-0pir", names()), Some("after-sb-0pri"));
        assert_eq!(nearest("frobnicate", names()), None);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
    }
}
