//! How much resync to ask for.
//!
//! Every 100 ms the controller grants an amount for the next interval. With `c-plan-ahead` zero
//! the rate is fixed; otherwise corrections are spread over the plan so that the amount in flight
//! approaches the configured target. Of the grant, no more is under way at a time than receive
//! memory allows; what ends makes room for more within the interval, in batches. Limits bound
//! the speed, never the progress (RS-8). Source: section 12.8 of the protocol notes; that the
//! grant is drawn upon between the ticks is ours.

use std::collections::VecDeque;

use crate::config::RateConfig;
use crate::units::{SECTORS_PER_BLOCK, Span};

/// Time between two requests for more.
pub const TICK: Span = Span::from_ms(100);
/// Ticks in a second.
const TICKS_PER_SECOND: u64 = 10;
/// Sectors in a KiB.
const SECTORS_PER_KIB: u64 = 2;

/// The controller's memory.
#[derive(Debug)]
pub struct RateController {
    plan: VecDeque<i64>,
    planned: i64,
    arrived: u64,
    in_flight: u64,
    /// Sectors asked for whose memory may still be in use: not written, nor refused.
    under_way: u64,
    /// Blocks that may still be asked for in this interval.
    granted: u64,
    /// What the last tick granted, blocks.
    wanted: u64,
}

impl RateController {
    /// A controller at the start of a resync.
    #[must_use]
    pub fn new(config: &RateConfig) -> Self {
        let slots = usize::try_from(config.plan_ahead).expect("u32 fits");
        Self {
            plan: VecDeque::from(vec![0; slots]),
            planned: 0,
            arrived: 0,
            in_flight: 0,
            under_way: 0,
            granted: 0,
            wanted: 0,
        }
    }

    /// Sectors asked for and not yet received.
    #[must_use]
    pub const fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// The speed that was wanted in the last tick, KiB/s.
    #[must_use]
    pub const fn wanted_kib(&self) -> u64 {
        self.wanted * (SECTORS_PER_BLOCK / SECTORS_PER_KIB) * TICKS_PER_SECOND
    }

    /// Sectors were asked for.
    pub fn requested(&mut self, sectors: u64) {
        self.in_flight += sectors;
        self.under_way += sectors;
        self.granted = self.granted.saturating_sub(sectors.div_ceil(SECTORS_PER_BLOCK));
    }

    /// Sectors were received (or the request was answered in another way).
    pub fn received(&mut self, sectors: u64) {
        self.in_flight = self.in_flight.saturating_sub(sectors);
        self.arrived += sectors;
    }

    /// The memory of a request is free again: it was written, or will never come.
    pub fn ended(&mut self, sectors: u64) {
        self.under_way = self.under_way.saturating_sub(sectors);
    }

    /// A new interval begins; what is left of the old grant is void.
    ///
    /// # Panics
    /// Never: the plan's length is that of the configuration.
    pub fn tick(&mut self, config: &RateConfig) {
        let arrived = std::mem::take(&mut self.arrived);
        let blocks = if config.plan_ahead == 0 {
            let per_tick = u64::from(config.resync_rate_kib) * SECTORS_PER_KIB;
            per_tick / TICKS_PER_SECOND / SECTORS_PER_BLOCK
        } else {
            self.controlled(config, arrived) / SECTORS_PER_BLOCK
        };
        // A rate below one block a tick still makes progress (RS-8).
        self.granted = blocks.max(u64::from(self.in_flight == 0));
        self.wanted = self.granted;
    }

    /// The number of blocks to ask for now. `buffers` is the limit of receive memory in blocks
    /// (`max-buffers`): half of it may be under way.
    #[must_use]
    pub fn allowance(&self, buffers: u64) -> u64 {
        let room = (buffers / 2).saturating_sub(self.under_way / SECTORS_PER_BLOCK);
        self.granted.min(room)
    }

    /// Whether enough has ended since to ask for more within the interval: a batch, so that the
    /// source reads long runs, or the rest of the grant.
    #[must_use]
    pub fn may_refill(&self, buffers: u64) -> bool {
        let batch = (buffers / 8).max(1).min(self.granted);
        batch > 0 && self.allowance(buffers) >= batch
    }

    /// There is nothing more to ask for in this interval.
    pub fn forfeit(&mut self) {
        self.granted = 0;
    }

    fn controlled(&mut self, config: &RateConfig, arrived: u64) -> u64 {
        let steps = i64::from(config.plan_ahead);
        let wanted_steps = usize::try_from(config.plan_ahead).expect("u32 fits");
        if self.plan.len() != wanted_steps {
            // The option changed under a running resync: start a new plan.
            self.plan = VecDeque::from(vec![0; wanted_steps]);
            self.planned = 0;
        }
        let in_flight = signed(self.in_flight);
        let want = if self.in_flight == 0 && arrived == 0 {
            let per_second = i64::from(config.resync_rate_kib) * 2;
            per_second / 10 * steps
        } else if config.fill_target_sectors != 0 {
            i64::from(config.fill_target_sectors)
        } else {
            signed(arrived).saturating_mul(i64::from(config.delay_target))
        };
        let correction = want.saturating_sub(in_flight).saturating_sub(self.planned);
        let share = correction / steps;
        for slot in &mut self.plan {
            *slot = slot.saturating_add(share);
        }
        self.planned = self.planned.saturating_add(share.saturating_mul(steps));
        let due = self.plan.pop_front().expect("the plan has a slot for each step");
        self.plan.push_back(0);
        self.planned = self.planned.saturating_sub(due);
        let request = u64::try_from(signed(arrived).saturating_add(due)).unwrap_or(0);
        if config.max_rate_kib == 0 {
            return request;
        }
        request.min(u64::from(config.max_rate_kib) * SECTORS_PER_KIB / TICKS_PER_SECOND)
    }
}

fn signed(sectors: u64) -> i64 {
    i64::try_from(sectors).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(plan_ahead: u32) -> RateConfig {
        RateConfig { plan_ahead, ..RateConfig::default() }
    }

    /// What is asked for in a tick.
    fn tick(rate: &mut RateController, config: &RateConfig, buffers: u64) -> u64 {
        rate.tick(config);
        rate.allowance(buffers)
    }

    fn arrive(rate: &mut RateController, sectors: u64) {
        rate.received(sectors);
        rate.ended(sectors);
    }

    #[test]
    fn a_fixed_rate_is_spread_over_the_ticks() {
        let config = RateConfig { resync_rate_kib: 4000, ..config(0) };
        let mut rate = RateController::new(&config);
        assert_eq!(rate.wanted_kib(), 0, "nothing was asked for yet");
        assert_eq!(tick(&mut rate, &config, 10_000), 100, "4000 KiB/s are 100 blocks a tick");
        assert_eq!(rate.wanted_kib(), 4000);
        rate.requested(800);
        assert_eq!(tick(&mut rate, &config, 150), 0, "half of the buffers are in use");
        assert_eq!(rate.wanted_kib(), 4000, "what is wanted does not depend on memory");
        arrive(&mut rate, 800);
        assert_eq!(tick(&mut rate, &config, 150), 75);
    }

    /// Shows RS-8: the slowest rate still asks for a block when nothing is under way.
    #[test]
    fn the_slowest_rate_makes_progress() {
        for plan in [0, 20] {
            let config = RateConfig { resync_rate_kib: 1, ..config(plan) };
            let mut rate = RateController::new(&config);
            assert_eq!(tick(&mut rate, &config, 2048), 1);
            rate.requested(8);
            assert_eq!(tick(&mut rate, &config, 2048), 0);
        }
    }

    /// Between two ticks, memory that becomes free is used again, in batches, until the grant is
    /// used up; a block that came but is not yet written holds its memory.
    #[test]
    fn a_grant_is_drawn_upon_as_memory_becomes_free() {
        let config = RateConfig { resync_rate_kib: 4000, ..config(0) };
        let mut rate = RateController::new(&config);
        assert_eq!(tick(&mut rate, &config, 80), 40, "of 100 granted");
        rate.requested(40 * SECTORS_PER_BLOCK);
        rate.received(40 * SECTORS_PER_BLOCK);
        assert!(!rate.may_refill(80), "nothing is written");
        rate.ended(9 * SECTORS_PER_BLOCK);
        assert!(!rate.may_refill(80), "less than a batch of 10");
        rate.ended(31 * SECTORS_PER_BLOCK);
        assert!(rate.may_refill(80));
        rate.requested(40 * SECTORS_PER_BLOCK);
        arrive(&mut rate, 40 * SECTORS_PER_BLOCK);
        assert_eq!(rate.allowance(80), 20, "the rest of the grant");
        rate.requested(20 * SECTORS_PER_BLOCK);
        arrive(&mut rate, 20 * SECTORS_PER_BLOCK);
        assert!(!rate.may_refill(80), "the grant is used up");
        assert_eq!(tick(&mut rate, &config, 80), 40);
    }

    #[test]
    fn the_controller_grows_with_a_fast_peer_and_stops_at_the_maximum() {
        let config = RateConfig { fill_target_sectors: 20_000, ..config(20) };
        let mut rate = RateController::new(&config);
        let mut most = 0;
        let mut first = 0;
        for round in 0..200 {
            let blocks = tick(&mut rate, &config, 1 << 20);
            if round == 0 {
                first = blocks;
            }
            most = most.max(blocks);
            let sectors = blocks * SECTORS_PER_BLOCK;
            rate.requested(sectors);
            arrive(&mut rate, sectors);
        }
        let cap = u64::from(config.max_rate_kib) * 2 / 10 / SECTORS_PER_BLOCK;
        assert!(first < most, "it speeds up: {first} then {most}");
        assert_eq!(most, cap);
    }

    #[test]
    fn a_stalled_peer_gets_no_more_than_the_fill_target() {
        let config = config(20);
        let mut rate = RateController::new(&config);
        let mut total = 0;
        for _ in 0..100 {
            let blocks = tick(&mut rate, &config, 1 << 20);
            total += blocks;
            rate.requested(blocks * SECTORS_PER_BLOCK);
        }
        // The first tick plans for resync-rate over the plan; after that the target rules.
        assert!(total * SECTORS_PER_BLOCK <= 2 * 250 / 10 * 20 + 100, "{total}");
    }
}
