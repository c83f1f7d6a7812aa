//! Each deliberate fault of the core is noticed by the checker that is meant for it.
//!
//! `cargo test -p tests --profile sim --features mutants --test mutants -- --nocapture` prints how
//! many seeds each one took; tests/README.md has the table. The same seeds without a mutant find
//! nothing.

#[path = "mutants/workloads.rs"]
mod workloads;

use std::panic::{AssertUnwindSafe, catch_unwind};

use replication_core::mutant::Mutant;
use tests::sim::rng::Rng;
use tests::sim::{Setup, World};
use workloads::Workload;

/// A mutant is noticed within this many seeds.
const MOST_SEEDS: u64 = 1_000;
/// So many seeds of each workload show that it finds nothing where nothing is wrong.
const CLEAN_SEEDS: u64 = 20;

/// Runs a seed and returns what a checker had to say.
fn run(workload: Workload, seed: u64, mutant: Option<Mutant>) -> Result<(), String> {
    let mut rng = Rng::new(seed ^ 0x5eed_0000);
    let mut setup = Setup::default();
    (workload.setup)(&mut setup, &mut rng);
    for node in &mut setup.nodes {
        node.mutant = mutant;
    }
    let mut w = World::new(seed, setup);
    let result = catch_unwind(AssertUnwindSafe(|| (workload.run)(&mut w, &mut rng)));
    if result.is_err() && mutant.is_none() {
        eprintln!("{}", w.report());
    }
    result.map_err(|payload| match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast::<&str>().map_or_else(|_| String::new(), |t| (*t).into()),
    })
}

/// A finding within [`MOST_SEEDS`] comes from one of these checkers, named by its invariant.
fn noticed(mutant: Mutant, workload: Workload, checkers: &[&str]) {
    let finding = (0..MOST_SEEDS).find_map(|seed| {
        let found = run(workload, seed, Some(mutant)).err()?;
        Some((seed, found))
    });
    let (seed, text) = finding.unwrap_or_else(|| panic!("{mutant:?}: no checker notices"));
    let by = checkers.iter().find(|id| text.contains(**id));
    let by = by.unwrap_or_else(|| panic!("{mutant:?}: not by {checkers:?}, but: {text}"));
    eprintln!("MUTANT {mutant:?}: {} after {} seeds", by, seed + 1);
    assert_eq!(run(workload, seed, None), Ok(()), "seed {seed} without the mutant");
}

/// Workloads find nothing in the core as it is.
#[test]
fn without_a_mutant_nothing_is_found() {
    for workload in workloads::ALL {
        for seed in 0..CLEAN_SEEDS {
            assert_eq!(run(workload, seed, None), Ok(()), "{} seed {seed}", workload.name);
        }
    }
}

macro_rules! noticed {
    ($($test:ident: $mutant:ident, $workload:ident, $checkers:expr;)*) => {
        $(
            #[test]
            fn $test() {
                noticed(Mutant::$mutant, workloads::$workload, &$checkers);
            }
        )*
    };
}

noticed! {
    skip_activity_log_wait: SkipActivityLogWait, PRIMARY_DIES, ["AL-2", "BM-2"];
    acknowledge_early: AcknowledgeEarly, PRIMARY_DIES, ["ACK-C", "RD-1", "DUR-5"];
    drop_barrier: DropBarrier, ONE_AFTER_THE_OTHER, ["ORD-1", "ORD-4"];
    ignore_epochs: IgnoreEpochs, ONE_AFTER_THE_OTHER, ["ORD-2", "ORD-4"];
    skip_epoch_flush: SkipEpochFlush, ONE_AFTER_THE_OTHER, ["DUR-3", "ORD-4", "BM-1"];
    clear_on_send: ClearOnSend, RESYNC_BREAKS, ["BM-1"];
    rotate_late: RotateLate, LONE_PRIMARY_DIES, ["GI-1"];
    answer_old_connection: AnswerOldConnection, OLD_WRITES_LINGER, ["ORD-7", "BM-1", "RS-1"];
    ignore_failed_flush: IgnoreFailedFlush, FLUSH_FAILS, ["DUR-5", "RD-1"];
    evict_without_bitmap: EvictWithoutBitmap, LONE_PRIMARY_DIES, ["BM-2"];
    evict_without_flush: EvictWithoutFlush, PRIMARY_DIES, ["BM-2"];
    finish_before_last_block: FinishBeforeLastBlock, RESYNC_BREAKS, ["RS-1"];
    ignore_neg_ack: IgnoreNegAck, PEER_WRITE_FAILS, ["RS-1"];
    release_log_at_answer: ReleaseLogAtAnswer, PRIMARY_DIES, ["BM-2"];
    save_bitmap_without_flush: SaveBitmapWithoutFlush, RESYNC_BREAKS, ["BM-1"];
    forget_unconfirmed: ForgetUnconfirmed, SECONDARY_DIES, ["BM-1"];
    read_marked_blocks: ReadMarkedBlocks, PRIMARY_IS_TARGET, ["RD-1"];
    return_memory_early: ReturnMemoryEarly, LINK_IS_CUT, ["ORD-6"];
    forget_primary_flag: ForgetPrimaryFlag, PRIMARY_DIES, ["AL-2", "AL-10", "BM-2"];
    ignore_conflicts: IgnoreConflicts, RECONNECT_UNDER_LOAD, ["ORD-5"];
    keep_old_generation: KeepOldGeneration, RESYNC_BREAKS, ["GI-8"];
}
