//! A modest number of seeded random runs; `simulate` runs more.

use tests::random::run;

/// Faults, then healing: both nodes agree and hold what was acknowledged.
#[test]
fn random_faults_heal() {
    let requests: u64 = (0..16).map(|seed| run(seed).requests).sum();
    assert!(requests > 2_000, "only {requests} requests were answered");
}

/// A seed gives the same run every time (LV-4).
#[test]
fn a_seed_replays() {
    assert_eq!(run(7).hash, run(7).hash);
}
