//! Each deliberate fault of the core is noticed by the checker that is meant for it.
//!
//! `cargo test -p tests --profile sim --features mutants --test mutants -- --nocapture` prints how
//! many seeds each one took; tests/README.md has the table. The same seeds without a mutant find
//! nothing.

#[path = "mutants/common.rs"]
mod common;
#[path = "mutants/histories.rs"]
mod histories;
#[path = "mutants/moments.rs"]
mod moments;
#[path = "mutants/refusals.rs"]
mod refusals;
#[path = "mutants/workloads.rs"]
mod workloads;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::Workload;
use replication_core::mutant::Mutant;
use tests::sim::Setup;

/// A mutant is noticed within this many seeds.
const MOST_SEEDS: u64 = 1_000;
/// So many seeds of each workload show that it finds nothing where nothing is wrong.
const CLEAN_SEEDS: u64 = 20;

/// Seeds within which a history of crash points notices a mutant.
const MOST_HISTORIES: u64 = 10;

/// Runs a seed and returns what a checker had to say.
fn run(workload: Workload, seed: u64, mutant: Option<Mutant>) -> Result<(), String> {
    let (mut w, mut rng) = workload.world(seed, |setup| {
        for node in &mut setup.nodes {
            node.mutant = mutant;
        }
    });
    let result = words_of(|| (workload.run)(&mut w, &mut rng));
    if result.is_err() && mutant.is_none() {
        eprintln!("{}", w.report());
    }
    result
}

/// What a panic has to say.
fn words_of(run: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| match payload.downcast::<String>() {
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
    for workload in workloads::ALL.into_iter().chain(moments::ALL).chain(refusals::ALL) {
        for seed in 0..CLEAN_SEEDS {
            assert_eq!(run(workload, seed, None), Ok(()), "{} seed {seed}", workload.name);
        }
    }
}

/// The crash points notice that cleared bits are on the disk before their data is.
#[test]
fn save_bitmap_without_flush_at_crash_points() {
    let mutant = Mutant::SaveBitmapWithoutFlush;
    let found = (0..MOST_HISTORIES).find_map(|seed| {
        let break_it = |setup: &mut Setup| {
            for node in &mut setup.nodes {
                node.mutant = Some(mutant);
            }
        };
        let run = || {
            histories::broken_resync(seed, break_it);
        };
        Some((seed, words_of(run).err()?))
    });
    let (seed, text) = found.expect("no crash point notices");
    assert!(text.contains("BM-2"), "not by BM-2, but: {text}");
    eprintln!("MUTANT {mutant:?} at crash points: BM-2 after {} seeds", seed + 1);
    let run = || {
        histories::broken_resync(seed, |_| {});
    };
    assert_eq!(words_of(run), Ok(()), "seed {seed} without the mutant");
}

macro_rules! noticed {
    ($($test:ident: $mutant:ident, $workload:path, $checkers:expr;)*) => {
        $(
            #[test]
            fn $test() {
                noticed(Mutant::$mutant, $workload, &$checkers);
            }
        )*
    };
}

noticed! {
    skip_activity_log_wait: SkipActivityLogWait, workloads::PRIMARY_DIES, ["AL-2", "BM-2"];
    acknowledge_early: AcknowledgeEarly, workloads::PRIMARY_DIES, ["ACK-C", "RD-1", "DUR-5"];
    drop_barrier: DropBarrier, workloads::ONE_AFTER_THE_OTHER, ["ORD-1", "ORD-4"];
    ignore_epochs: IgnoreEpochs, workloads::ONE_AFTER_THE_OTHER, ["ORD-2", "ORD-4"];
    skip_epoch_flush: SkipEpochFlush, workloads::ONE_AFTER_THE_OTHER, ["DUR-3", "ORD-4", "BM-1"];
    clear_on_send: ClearOnSend, workloads::RESYNC_BREAKS, ["BM-1"];
    rotate_late: RotateLate, workloads::LONE_PRIMARY_DIES, ["GI-1"];
    answer_old_connection: AnswerOldConnection, workloads::OLD_WRITES_LINGER,
        ["ORD-7", "BM-1", "RS-1"];
    ignore_failed_flush: IgnoreFailedFlush, workloads::FLUSH_FAILS, ["DUR-5", "RD-1"];
    evict_without_bitmap: EvictWithoutBitmap, workloads::LONE_PRIMARY_DIES, ["BM-2"];
    evict_without_flush: EvictWithoutFlush, workloads::PRIMARY_DIES, ["BM-2"];
    finish_before_last_block: FinishBeforeLastBlock, workloads::RESYNC_BREAKS, ["RS-1"];
    ignore_neg_ack: IgnoreNegAck, workloads::PEER_WRITE_FAILS, ["RS-1"];
    release_log_at_answer: ReleaseLogAtAnswer, workloads::PRIMARY_DIES, ["BM-2"];
    save_bitmap_without_flush: SaveBitmapWithoutFlush, workloads::RESYNC_BREAKS, ["BM-1"];
    forget_unconfirmed: ForgetUnconfirmed, workloads::SECONDARY_DIES, ["BM-1"];
    read_marked_blocks: ReadMarkedBlocks, workloads::PRIMARY_IS_TARGET, ["RD-1"];
    return_memory_early: ReturnMemoryEarly, workloads::LINK_IS_CUT, ["ORD-6"];
    forget_primary_flag: ForgetPrimaryFlag, workloads::PRIMARY_DIES, ["AL-2", "AL-10", "BM-2"];
    ignore_conflicts: IgnoreConflicts, workloads::RECONNECT_UNDER_LOAD, ["ORD-5"];
    keep_old_generation: KeepOldGeneration, workloads::RESYNC_BREAKS, ["GI-8"];
    answer_unsent: AnswerUnsent, moments::ACK_A, ["ACK-A"];
    acknowledge_unreceived: AcknowledgeEarly, moments::ACK_B, ["ACK-B"];
    drop_fua: DropFua, moments::DUR_2, ["DUR-2"];
    believe_failed_read: BelieveFailedRead, moments::RD_4, ["RD-1"];
    log_reads: LogReads, moments::RD_5, ["RD-5"];
    skip_log_replay: SkipLogReplay, moments::AL_9, ["RS-1", "BM-1", "BM-2"];
    forget_log_is_off: ForgetLogIsOff, moments::AL_9, ["AL-2", "BM-2"];
    skip_notices: SkipNotices, workloads::RECONNECT_UNDER_LOAD, ["RS-4"];
    slip_through: SlipThrough, workloads::RECONNECT_UNDER_LOAD, ["RS-4", "BM-1", "RS-1"];
    grow_unmarked: GrowUnmarked, moments::BM_8, ["RS-1", "BM-1"];
    merge_split_brain: MergeSplitBrain, moments::GI_6, ["GI-6"];
    forget_lost_start: ForgetLostStart, moments::GI_7, ["GI-7"];
    forget_crash: ForgetCrash, moments::GI_10, ["GI-10"];
    hide_role: HideRole, moments::ST_3, ["ST-3"];
    agree_meanwhile: AgreeMeanwhile, moments::ST_4, ["ST-4"];
    refuse_too_late: RefuseTooLate, moments::ST_7, ["ST-7"];
    clear_failed_blocks: ClearFailedBlocks, moments::RS_5, ["RS-5"];
    ignore_failed_metadata: IgnoreFailedMetadata, moments::MD_4, ["MD-4"];
    trust_anybody: TrustAnybody, moments::WP_2, ["WP-2"];
    trust_offsets: TrustOffsets, moments::WP_4, ["WP-4", "beyond the data area"];
    keep_own_dial: KeepOwnDial, moments::WP_7, ["WP-7"];
    wait_for_hung_disk: WaitForHungDisk, moments::LV_5, ["LV-5"];
    expose_own_size: ExposeOwnSize, moments::FE_1, ["FE-1"];
    count_bad_copy: CountBadCopy, moments::ACK_2, ["ACK-2"];
    trust_unaware_peer: TrustUnawarePeer, moments::DUR_5, ["DUR-5", "RD-1"];
    miscount_epoch: MiscountEpoch, workloads::LINK_IS_CUT, ["ORD-3"];
    keep_read_error: KeepReadError, moments::RD_3, ["RD-3"];
    write_after_failed_log: WriteAfterFailedLog, moments::AL_4, ["AL-4"];
    trust_old_bitmap: TrustOldBitmap, refusals::GI_4, ["GI-4"];
    accept_unrelated: AcceptUnrelated, refusals::GI_5, ["GI-5"];
    allow_two_primaries: AllowTwoPrimaries, refusals::ST_1, ["ST-1"];
    promote_anything: PromoteAnything, refusals::ST_5, ["ST-5"];
    accept_foreign_metadata: AcceptForeignMetadata, refusals::MD_2, ["MD-2"];
    wait_for_ever: WaitForEver, moments::WP_6, ["WP-6"];
    ignore_options: IgnoreOptions, refusals::WP_8, ["WP-8"];
}
