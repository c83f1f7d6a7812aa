//! One scenario for each invariant that random runs hardly meet, or do not look at.
//!
//! `tests/mutants/moments.rs` has the scripts; `tests/mutants.rs` runs them against cores that break
//! the rule.

#[path = "mutants/common.rs"]
mod common;
#[path = "mutants/moments.rs"]
mod moments;

use common::Workload;

/// Seeds of each scenario.
const SEEDS: u64 = 12;

fn holds(scenario: Workload) {
    for seed in 0..SEEDS {
        eprintln!("{} seed {seed}", scenario.name);
        let (mut w, mut rng) = scenario.world(seed, |_| {});
        (scenario.run)(&mut w, &mut rng);
    }
}

macro_rules! holds {
    ($($test:ident: $scenario:ident;)*) => {
        $(
            #[test]
            fn $test() {
                holds(moments::$scenario);
            }
        )*

        /// None is left out.
        #[test]
        fn all_are_run() {
            let run = [$(moments::$scenario.name),*];
            assert_eq!(run, moments::ALL.map(|moment| moment.name));
        }
    };
}

holds! {
    ack_a_success_waits_for_the_socket_and_the_local_disk: ACK_A;
    ack_b_success_waits_for_the_peers_memory: ACK_B;
    dur_2_fua_is_durable: DUR_2;
    rd_4_a_failed_remote_read_is_an_error: RD_4;
    rd_5_reads_change_nothing: RD_5;
    al_9_the_log_changes_between_crashes: AL_9;
    bm_8_a_grown_part_is_copied: BM_8;
    gi_6_a_split_brain_is_told_and_left_alone: GI_6;
    gi_7_a_lost_start_of_a_resync_costs_nothing: GI_7;
    gi_10_a_crashed_primary_copies_what_its_log_covers: GI_10;
    st_3_roles_are_known: ST_3;
    st_4_one_of_two_promotions_wins: ST_4;
    st_7_refused_commands_change_nothing: ST_7;
    rs_5_what_the_source_cannot_read_stays_marked: RS_5;
    md_4_failed_metadata_fails_the_disk: MD_4;
    wp_2_a_stranger_changes_nothing: WP_2;
    wp_4_offsets_are_checked: WP_4;
    wp_7_crossed_connections_settle_at_once: WP_7;
    lv_5_a_forced_detach_returns: LV_5;
    fe_1_the_agreed_size_is_exposed: FE_1;
}
