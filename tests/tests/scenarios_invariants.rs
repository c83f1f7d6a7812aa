//! One scenario for each invariant that random runs hardly meet, or do not look at.
//!
//! `tests/mutants/moments.rs` and `refusals.rs` have the scripts; `tests/mutants.rs` runs them
//! against cores that break the rule.

#[path = "mutants/common.rs"]
mod common;
#[path = "mutants/moments.rs"]
mod moments;
#[path = "mutants/refusals.rs"]
mod refusals;

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
    ($($test:ident: $scenario:path;)*) => {
        $(
            #[test]
            fn $test() {
                holds($scenario);
            }
        )*

        /// None is left out.
        #[test]
        fn all_are_run() {
            let run = [$($scenario.name),*];
            let all = moments::ALL.into_iter().chain(refusals::ALL);
            assert!(all.map(|scenario| scenario.name).eq(run));
        }
    };
}

holds! {
    ack_a_success_waits_for_the_socket_and_the_local_disk: moments::ACK_A;
    ack_b_success_waits_for_the_peers_memory: moments::ACK_B;
    ack_2_a_bad_copy_does_not_count: moments::ACK_2;
    dur_2_fua_is_durable: moments::DUR_2;
    dur_5_what_the_peer_may_not_know_is_not_done: moments::DUR_5;
    rd_3_the_peer_answers_what_cannot_be_read_here: moments::RD_3;
    rd_4_a_failed_remote_read_is_an_error: moments::RD_4;
    rd_5_reads_change_nothing: moments::RD_5;
    al_4_nothing_is_written_after_a_failed_log: moments::AL_4;
    al_9_the_log_changes_between_crashes: moments::AL_9;
    bm_8_a_grown_part_is_copied: moments::BM_8;
    gi_6_a_split_brain_is_told_and_left_alone: moments::GI_6;
    gi_7_a_lost_start_of_a_resync_costs_nothing: moments::GI_7;
    gi_10_a_crashed_primary_copies_what_its_log_covers: moments::GI_10;
    st_3_roles_are_known: moments::ST_3;
    st_4_one_of_two_promotions_wins: moments::ST_4;
    st_7_refused_commands_change_nothing: moments::ST_7;
    rs_5_what_the_source_cannot_read_stays_marked: moments::RS_5;
    md_4_failed_metadata_fails_the_disk: moments::MD_4;
    wp_2_a_stranger_changes_nothing: moments::WP_2;
    wp_4_offsets_are_checked: moments::WP_4;
    wp_6_a_silent_peer_is_given_up: moments::WP_6;
    wp_7_crossed_connections_settle_at_once: moments::WP_7;
    lv_5_a_forced_detach_returns: moments::LV_5;
    fe_1_the_agreed_size_is_exposed: moments::FE_1;
    gi_4_bitmaps_of_other_generations_do_not_count: refusals::GI_4;
    gi_5_unrelated_data_is_refused: refusals::GI_5;
    st_1_a_second_primary_is_refused: refusals::ST_1;
    st_5_a_promotion_without_good_data_is_refused: refusals::ST_5;
    md_2_foreign_metadata_is_refused: refusals::MD_2;
    wp_8_other_options_are_refused: refusals::WP_8;
}
