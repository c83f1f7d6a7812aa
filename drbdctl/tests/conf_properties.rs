//! Whatever the text: an error or a configuration, and its dump is a fixed point.

use std::path::PathBuf;

use drbdctl::conf::{self, Config, Inputs, Main, MemoryFiles};
use proptest::prelude::*;
use proptest::sample::{Index, select};

const SAMPLES: [&str; 3] = [
    include_str!("data/conf/v83.conf"),
    include_str!("data/conf/v84.conf"),
    include_str!("data/conf/v9.conf"),
];

/// Reads text as if it came from standard input.
fn parse(bytes: &[u8]) -> Option<Config> {
    let name = PathBuf::from("STDIN");
    let main = Main::Text { name, bytes: bytes.to_vec(), dir: PathBuf::from("/etc") };
    let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
    match conf::load_inputs(inputs, &MemoryFiles::default()) {
        Ok((config, warnings)) => {
            assert!(warnings.iter().all(|warning| !warning.to_string().contains('\n')));
            Some(config)
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// The rules for any text. Gives whether it was a configuration.
fn check(bytes: &[u8]) -> bool {
    let Some(config) = parse(bytes) else { return false };
    let dump = config.dump();
    let again = parse(dump.as_bytes()).unwrap_or_else(|| panic!("dump is unreadable:\n{dump}"));
    assert_eq!(again.dump(), dump);
    assert_eq!(again.resources(), config.resources());
    for name in config.resources() {
        for node in ["alice", "web1", "far", "a"] {
            let (view, same) = (config.for_node(name, node), again.for_node(name, node));
            match (view, same) {
                (Ok(view), Ok(mut same)) => {
                    (same.file, same.line) = (view.file.clone(), view.line);
                    assert_eq!(view, same);
                }
                (Err(error), Err(same)) => assert_eq!(error.problem(), same.problem()),
                (view, same) => panic!("{view:?} became {same:?}"),
            }
        }
    }
    true
}

/// Pieces of the language, some of which do not fit anywhere.
const WORDS: &[&str] = &[
    "resource",
    "r0",
    "{",
    "}",
    ";",
    "on",
    "alice",
    "bob",
    "address",
    "10.0.0.1",
    ":",
    "7788",
    "net",
    "disk",
    "device",
    "minor",
    "0",
    "1",
    "meta-disk",
    "internal",
    "[",
    "]",
    "volume",
    "skip",
    "connection",
    "host",
    "protocol",
    "C",
    "timeout",
    "60",
    "\"\"",
    "\"a b\"",
    "proxy",
    "via",
    "none",
    "global",
    "common",
    "syncer",
    "rate",
    "33M",
    "options",
    "floating",
    "ipv6",
    "#",
    "\n",
    "handlers",
    "pri-lost",
    "plugin",
    "path",
    "hosts",
    "connection-mesh",
    "no-tcp-cork",
    "\\",
    "stacked-on-top-of",
    "ignore-on",
    "node-id",
    "include",
    "template-file",
    "\"x",
    "inside",
];

proptest! {
    /// Bytes of any kind.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        check(&bytes);
    }

    /// Words of the language in any order.
    #[test]
    fn any_words(words in proptest::collection::vec(select(WORDS), 0..60)) {
        check(words.join(" ").as_bytes());
    }

    /// Samples with pieces of one sample copied, cut and replaced by those of another.
    #[test]
    fn mutated_samples(
        which in 0..SAMPLES.len(),
        edits in proptest::collection::vec(
            (any::<Index>(), 0..40_usize, select(WORDS), any::<u8>(), 0..4_u8), 0..4),
    ) {
        let mut bytes = SAMPLES[which].as_bytes().to_vec();
        for (at, len, word, byte, kind) in edits {
            let at = at.index(bytes.len());
            let end = (at + len).min(bytes.len());
            let cut = bytes[at..end].to_vec();
            match kind {
                0 => drop(bytes.splice(at..end, [])),
                1 => drop(bytes.splice(at..at, cut)),
                2 => drop(bytes.splice(at..at, word.bytes())),
                _ => bytes[at] = byte,
            }
            if bytes.is_empty() {
                break;
            }
        }
        check(&bytes);
    }

    /// Samples with one token replaced by another of the language: more of these are correct.
    #[test]
    fn replaced_words(
        which in 0..SAMPLES.len(), at in any::<Index>(), word in select(WORDS),
    ) {
        let words: Vec<&str> = SAMPLES[which].split_inclusive([' ', '\t', '\n']).collect();
        let at = at.index(words.len());
        let mut text = words[..at].concat();
        text.push_str(word);
        text.push(' ');
        text.push_str(&words[at + 1..].concat());
        check(text.as_bytes());
    }

    /// Names and values of any text survive the dump.
    #[test]
    fn any_text_in_quotes(name in "[ -~\u{e4}]{0,40}", value in "\\PC{0,60}") {
        let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let text = format!(
            "resource {} {{ handlers {{ pri-lost {value}; }} disk {value}; device {value} minor 1; \
             on alice {{ address 10.0.0.1:1; }} on {} {{ address 10.0.0.2:1; }} }}",
            quote("r0"), quote(&name), value = quote(&value),
        );
        if check(text.as_bytes()) && name != "alice" {
            let view = parse(text.as_bytes()).expect("correct").for_node("r0", "alice");
            let view = view.expect("defined");
            prop_assert_eq!(view.handlers.get("pri-lost").map_or("", String::as_str), value);
        }
    }
}

/// The samples themselves pass, so that the properties above are not empty.
#[test]
fn samples_are_correct() {
    for text in SAMPLES {
        assert!(check(text.as_bytes()));
    }
}
