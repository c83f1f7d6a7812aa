//! Mutates the corpus of an entry point by chance: `fuzz --target session --seconds 60`.
//!
//! The plain way to look for bytes that break something, without the coverage that `tests/fuzz`
//! has, and on any compiler. An input that panics, or takes longer than five seconds, is written
//! to the current directory; the exit code is 1 if there was one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use tests::fuzz::{TARGETS, Target};
use tests::sim::rng::Rng;

/// Random mutations of a corpus.
#[derive(Parser)]
struct Arguments {
    /// The entry point.
    #[arg(long)]
    target: String,
    /// For how long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The first random number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Inputs to begin with.
    #[arg(long)]
    corpus: Option<PathBuf>,
}

/// Inputs stay shorter than this.
const MOST_BYTES: usize = 1 << 14;
/// An input that takes longer is a finding.
const MOST_TIME: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let target = TARGETS.iter().find(|target| target.name == arguments.target);
    let target = target.with_context(|| {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        format!("no target {}, there are: {}", arguments.target, names.join(", "))
    })?;
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let corpus = read_corpus(&arguments.corpus.unwrap_or(committed))?;
    let end = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut rng = Rng::new(arguments.seed);
    let (mut runs, mut findings) = (0_u64, 0_u32);
    while Instant::now() < end {
        let input = mutated(&corpus, &mut rng);
        runs += 1;
        let begun = Instant::now();
        let result = std::panic::catch_unwind(|| (target.run)(&input));
        if result.is_err() || begun.elapsed() > MOST_TIME {
            findings += 1;
            keep(target, runs, &input)?;
        }
    }
    eprintln!("{}: {runs} inputs, {findings} findings", target.name);
    Ok(if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_corpus(dir: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let act = || format!("read the corpus {}", dir.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(act)? {
        paths.push(entry.with_context(act)?.path());
    }
    paths.sort();
    let files = paths.iter().map(|path| std::fs::read(path).with_context(act));
    let mut corpus: Vec<Vec<u8>> = files.collect::<anyhow::Result<_>>()?;
    corpus.push(Vec::new());
    Ok(corpus)
}

fn keep(target: &Target, run: u64, input: &[u8]) -> anyhow::Result<()> {
    let name = format!("finding-{}-{run}", target.name);
    eprintln!("finding: {name}, {} bytes", input.len());
    std::fs::write(&name, input).with_context(|| format!("write {name}"))
}

fn index(rng: &mut Rng, length: usize) -> usize {
    let bound = u64::try_from(length.max(1)).expect("a short input");
    usize::try_from(rng.below(bound)).expect("an index")
}

fn byte(rng: &mut Rng) -> u8 {
    const LIKELY: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, 8];
    let any = rng.next().to_le_bytes()[0];
    if rng.chance(50) { LIKELY[index(rng, LIKELY.len())] } else { any }
}

/// A member of the corpus with a few changes.
fn mutated(corpus: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut input = corpus[index(rng, corpus.len())].clone();
    for _ in 0..=rng.below(8) {
        let at = index(rng, input.len() + 1);
        let length = index(rng, 16).min(input.len() - at);
        match rng.below(7) {
            0 | 1 => {
                if let Some(there) = input.get_mut(at) {
                    *there = byte(rng);
                }
            }
            2 => {
                if let Some(there) = input.get_mut(at) {
                    *there ^= 1 << rng.below(8);
                }
            }
            3 => input.insert(at, byte(rng)),
            4 => drop(input.drain(at..at + length)),
            5 => {
                let part = input[at..at + length].to_vec();
                let to = index(rng, input.len() + 1);
                input.splice(to..to, part);
            }
            _ => {
                let other = &corpus[index(rng, corpus.len())];
                let from = index(rng, other.len() + 1);
                let to = (from + index(rng, 200)).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    input.truncate(MOST_BYTES);
    input
}
