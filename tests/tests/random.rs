//! A modest number of seeded random runs; `simulate` runs more. And `simulate` itself: what it
//! says about a run that fails.

use std::process::{Command, Output};

use tests::random::{Case, Kind, Kinds, run};

/// Faults, then healing: both nodes agree and hold what was acknowledged.
#[test]
fn random_faults_heal() {
    let requests: u64 = (0..16).map(|seed| run(&Case::of(seed)).requests).sum();
    assert!(requests > 2_000, "only {requests} requests were answered");
}

/// Situations that are rare and legal, and that a check or the operator of a run once took for
/// wrong: I/O frozen by options that the configuration has no more (1200), a power cut and the
/// failure of the other disk (1561), a Primary that has to step down while its peer waits (2096), a
/// write refused for want of a disk (2236), a source that dies at the end of a resync (11679),
/// another protocol in force than configured (11867), failures of both disks (4290, 5000333), a
/// read that ends late (3318), a link cut for a moment (41034). Kinds that came later would make
/// other runs of these seeds. With them: a promotion that waits for the end of the connection while
/// the other node could be promoted (411862); a cut that holds back so much, byte by byte, that its
/// end takes more than a hundred thousand steps of one moment (605682); a disk that was about to fail
/// a write of metadata, and did so as a stranger left (835200); and the data of a Primary thrown
/// away with what protocol A had not got to its peer (862537).
#[test]
fn rare_situations_are_judged_rightly() {
    let mut without = Kinds::default();
    Kind::LATER.iter().for_each(|kind| without.insert(*kind));
    for seed in [1200, 1561, 2096, 2236, 3318, 4290, 11_679, 11_867, 41_034, 5_000_333] {
        run(&Case { without, ..Case::of(seed) });
    }
    for seed in [411_862, 605_682, 835_200, 862_537, 917_928, 922_332, 1_005_783, 1_008_357] {
        run(&Case::of(seed));
    }
}

/// A seed gives the same run every time (LV-4).
#[test]
fn a_seed_replays() {
    assert_eq!(run(&Case::of(7)).hash, run(&Case::of(7)).hash);
}

fn simulate(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_simulate");
    Command::new(program).args(arguments).output().expect("simulate runs")
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The output depends on the seeds alone, not on the number of threads (LV-4).
#[test]
fn threads_change_nothing() {
    let one = simulate(&["--seeds", "6", "--verbose", "--threads", "1"]);
    let three = simulate(&["--seeds", "6", "--verbose", "--threads", "3"]);
    assert!(one.status.success(), "{}", words(&one));
    assert_eq!(words(&one), words(&three));
}

/// Disks that lie about flushes are found. The finding tells the last events, is shrunk, and the
/// command that it prints fails in the same way.
#[test]
fn a_finding_is_shrunk_and_replayed() {
    let found = simulate(&["--focus", "lying-disk", "--seeds", "50", "--shrink"]);
    let report = words(&found);
    assert_eq!(found.status.code(), Some(1), "{report}");
    let line = |begin: &str| report.lines().find(|line| line.starts_with(begin));
    let replay = line("replay: ").expect("a command that replays it");
    assert!(replay.contains("--rounds="), "rounds were left out: {replay}");
    let (_, arguments) = replay.split_once(" -- ").expect("arguments");
    let again = simulate(&arguments.split_whitespace().collect::<Vec<_>>());
    assert_eq!(again.status.code(), Some(1));
    let fails = report.lines().rfind(|line| line.contains(" fails after "));
    assert!(words(&again).contains(fails.expect("where it fails")), "{}", words(&again));
    assert!(report.contains("--- states before step "), "the states are shown");
}

/// What cannot be run is refused with the reason.
#[test]
fn dual_primary_is_refused() {
    let refused = simulate(&["--focus", "dual-primary"]);
    assert_eq!(refused.status.code(), Some(2));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("refuses allow-two-primaries"), "{why}");
}
