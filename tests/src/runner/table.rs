//! What did all runs meet, and what never?

use std::io::{Result, Write};

use crate::sim::coverage::{Coverage, Family};

/// Columns of a line.
const WIDTH: usize = 100;

/// Prints the counts of every family, and below them what never happened.
pub(super) fn print(out: &mut impl Write, coverage: &Coverage) -> Result<()> {
    writeln!(out, "--- coverage")?;
    for family in Family::ALL {
        let counts = coverage.iter().filter(|(of, ..)| *of == family);
        let entries: Vec<String> =
            counts.map(|(_, name, count)| format!("{name} {count}")).collect();
        wrapped(out, family.name(), &entries)?;
    }
    writeln!(out, "--- never")?;
    for family in Family::ALL {
        wrapped(out, family.name(), &coverage.missing(family))?;
    }
    writeln!(out, "---")
}

fn wrapped(out: &mut impl Write, head: &str, entries: &[String]) -> Result<()> {
    let mut line = format!("{head:<12}");
    let indent = line.len();
    if entries.is_empty() {
        return Ok(());
    }
    for (at, entry) in entries.iter().enumerate() {
        let comma = if at + 1 < entries.len() { "," } else { "" };
        if line.len() > indent && line.len() + entry.len() + 2 > WIDTH {
            writeln!(out, "{}", line.trim_end())?;
            line = " ".repeat(indent);
        }
        line.push_str(&format!("{entry}{comma} "));
    }
    writeln!(out, "{}", line.trim_end())
}
