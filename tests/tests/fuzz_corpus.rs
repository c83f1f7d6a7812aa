//! Every entry point of the fuzzer takes its committed corpus and the captured connections.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::path::{Path, PathBuf};

use tests::fuzz::{TARGETS, peer, wire};

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// What once was found, and what reaches far, is still taken well.
#[test]
fn the_corpora_are_taken() {
    for target in TARGETS {
        let corpus = files(&here("fuzz/corpus").join(target.name));
        assert!(corpus.len() >= 3, "the corpus of {} is there", target.name);
        for file in corpus {
            let bytes = fs::read(&file).unwrap();
            assert!(bytes.len() <= 16 << 10, "{file:?} is small");
            eprintln!("{}", file.display());
            (target.run)(&bytes);
        }
    }
}

/// There is a program for the fuzzer for each entry point.
#[test]
fn every_target_has_a_program() {
    let programs = files(&here("fuzz/fuzz_targets"));
    let names: Vec<_> =
        programs.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    let mut targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    targets.sort_unstable();
    assert_eq!(names, targets);
}

/// Captured streams of the in-kernel driver, as they are and cut short, to a core and to the
/// decoders: whoever the peer is, and whatever it answers to.
#[test]
fn captured_streams_are_taken() {
    let mut taken = 0;
    for trace in files(&here("../replication-core/tests/data/traces")) {
        if !trace.is_dir() {
            continue;
        }
        for file in files(&trace).iter().filter(|f| f.extension().is_some_and(|e| e == "bin")) {
            let bytes = fs::read(file).unwrap();
            let is_meta = file.to_str().unwrap().contains("-meta-");
            // The first packet has the header of the oldest version, and says version 101.
            let mut stream = vec![101, 0xf, 0, u8::from(is_meta)];
            stream.extend_from_slice(&bytes[if is_meta { 0 } else { 88.min(bytes.len()) }..]);
            wire::packets(&stream);
            for length in [bytes.len(), bytes.len() / 2, bytes.len() / 3] {
                let mut input = vec![7];
                for part in bytes[..length.min(60_000)].chunks(1000) {
                    input.push(u8::from(is_meta));
                    input.extend_from_slice(&u16::try_from(part.len()).unwrap().to_le_bytes());
                    input.extend_from_slice(part);
                }
                peer::connection(&input);
            }
            taken += 1;
        }
    }
    assert!(taken > 50, "{taken} streams");
}
