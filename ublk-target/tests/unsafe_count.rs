//! The places with `unsafe` are known: raising a number is a decision, another file is a bigger
//! one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;

/// `unsafe` blocks and implementations by file.
const KNOWN: [(&str, usize); 5] = [
    ("arena.rs", 5),
    ("ring/mod.rs", 2),
    ("ublk/control.rs", 5),
    ("ublk/driver.rs", 1),
    ("ublk/queue.rs", 6),
];

fn count(dir: &Path, prefix: &str, found: &mut BTreeMap<String, usize>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            count(&entry.path(), &format!("{name}/"), found);
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let is_unsafe = |line: &&str| line.contains("unsafe {") || line.contains("unsafe impl");
        let lines = text.lines().filter(is_unsafe).count();
        if lines > 0 {
            found.insert(name, lines);
        }
    }
}

#[test]
fn unsafe_code_is_where_it_is_known_to_be() {
    let mut found = BTreeMap::new();
    count(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut found);
    let known = KNOWN.iter().map(|(name, lines)| ((*name).to_owned(), *lines)).collect();
    assert_eq!(found, known);
}
