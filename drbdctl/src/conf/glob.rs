//! File name patterns of the `include` statement.
//!
//! `*`, `?`, `[abc]`, `[a-z]`, `[!a]` and `\` before a character that is meant literally, per path
//! component, as the shell does it: a leading dot is matched by a dot only. The result is sorted,
//! because the order of files decides which of two conflicting statements is reported.

use std::io;
use std::path::{Path, PathBuf};

use super::source::Files;

/// Whether `pattern` contains anything but literal characters.
pub(crate) fn is_pattern(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// The files that match `pattern`, taken relative to `dir`, sorted by path.
///
/// # Errors
/// If a directory exists and cannot be listed. A missing one matches nothing.
pub(crate) fn expand(files: &dyn Files, dir: &Path, pattern: &str) -> io::Result<Vec<PathBuf>> {
    let start = if pattern.starts_with('/') { PathBuf::from("/") } else { dir.to_path_buf() };
    let mut found = vec![start];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        found = match is_pattern(part) {
            true => matching(files, &found, part)?,
            false => found.iter().map(|base| base.join(part)).collect(),
        };
    }
    found.retain(|path| files.real_path(path).is_ok());
    found.sort();
    found.dedup();
    Ok(found)
}

/// One step of [`expand`]: the entries of all `bases` that match `part`.
fn matching(files: &dyn Files, bases: &[PathBuf], part: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for base in bases {
        let names = match files.names(base) {
            Ok(names) => names,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        let hits = names.iter().filter(|name| matches(part, name));
        found.extend(hits.map(|name| base.join(name)));
    }
    Ok(found)
}

/// Whether the error says that there is no such directory.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Whether `name` matches the pattern of one component.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut p, mut n) = (0, 0);
    // Where to go on when a star has to take one character more.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            retry = Some((p + 1, n + 1));
            p += 1;
            continue;
        }
        if let Some(next) = match_one(&pattern, p, name[n]) {
            (p, n) = (next, n + 1);
            continue;
        }
        let Some((star_p, star_n)) = retry else { return false };
        (p, n) = (star_p, star_n);
        retry = Some((star_p, star_n + 1));
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// Matches one character; gives the position after the piece of pattern used.
fn match_one(pattern: &[char], p: usize, found: char) -> Option<usize> {
    match *pattern.get(p)? {
        '?' => Some(p + 1),
        '[' => match_set(pattern, p, found),
        '\\' => (*pattern.get(p + 1)? == found).then_some(p + 2),
        literal => (literal == found).then_some(p + 1),
    }
}

/// Matches one character against `[...]` that begins at `p`. A set without end is literal.
fn match_set(pattern: &[char], p: usize, found: char) -> Option<usize> {
    let negated = matches!(pattern.get(p + 1), Some('!' | '^'));
    let first = p + 1 + usize::from(negated);
    // A bracket directly after the opening one belongs to the set.
    let Some(len) = pattern.get(first + 1..).and_then(|rest| rest.iter().position(|&c| c == ']'))
    else {
        return (found == '[').then_some(p + 1);
    };
    let end = first + 1 + len;
    let mut hit = false;
    let mut at = first;
    while at < end {
        let is_range = at + 2 < end && pattern[at + 1] == '-';
        let last = if is_range { pattern[at + 2] } else { pattern[at] };
        hit |= pattern[at] <= found && found <= last;
        at += if is_range { 3 } else { 1 };
    }
    (hit != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::super::source::MemoryFiles;
    use super::*;

    /// Pattern, name, and whether they match.
    #[test]
    fn one_component() {
        let table = [
            ("*.res", "r0.res", true),
            ("*.res", ".r0.res", false),
            (".*", ".r0", true),
            ("*.res", "r0.res.bak", false),
            ("*", "", true),
            ("?", "", false),
            ("r?.res", "r1.res", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]x", "]x", true),
            ("[a", "[a", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
        ];
        for (pattern, name, expected) in table {
            assert_eq!(matches(pattern, name), expected, "{pattern} against {name}");
        }
    }

    /// A pattern over two levels finds the files in order; a missing directory finds nothing.
    #[test]
    fn expansion_is_sorted_and_relative() {
        let files =
            MemoryFiles::default().with("/e/d/b.res", "").with("/e/d/a.res", "").with("/e/x", "");
        let found = expand(&files, Path::new("/e"), "d/*.res").expect("listable");
        assert_eq!(found, [PathBuf::from("/e/d/a.res"), PathBuf::from("/e/d/b.res")]);
        assert_eq!(
            expand(&files, Path::new("/e"), "n/*.res").expect("empty"),
            [""; 0].map(PathBuf::from)
        );
        let found = expand(&files, Path::new("/other"), "/e/?").expect("listable");
        assert_eq!(found, [PathBuf::from("/e/x")]);
    }
}
