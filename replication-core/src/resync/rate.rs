//! How much resync to ask for in a tick.
//!
//! The target asks every 100 ms. With `c-plan-ahead` zero the rate is fixed; otherwise a
//! controller spreads corrections over the plan so that the amount in flight approaches the
//! configured target. Limits bound the speed, never the progress (RS-8). Source: section 12.8 of
//! the protocol notes.

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
}

impl RateController {
    /// A controller at the start of a resync.
    #[must_use]
    pub fn new(config: &RateConfig) -> Self {
        let slots = usize::try_from(config.plan_ahead).expect("u32 fits");
        Self { plan: VecDeque::from(vec![0; slots]), planned: 0, arrived: 0, in_flight: 0 }
    }

    /// Sectors asked for and not yet received.
    #[must_use]
    pub const fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Sectors were asked for.
    pub fn requested(&mut self, sectors: u64) {
        self.in_flight += sectors;
    }

    /// Sectors were received (or the request was answered in another way).
    pub fn received(&mut self, sectors: u64) {
        self.in_flight = self.in_flight.saturating_sub(sectors);
        self.arrived += sectors;
    }

    /// The number of blocks to ask for in this tick. `buffers` is the limit of receive memory in
    /// blocks (`max-buffers`).
    ///
    /// # Panics
    /// Never: the plan's length is that of the configuration.
    pub fn tick(&mut self, config: &RateConfig, buffers: u64) -> u64 {
        let arrived = std::mem::take(&mut self.arrived);
        let blocks = if config.plan_ahead == 0 {
            let per_tick = u64::from(config.resync_rate_kib) * SECTORS_PER_KIB;
            per_tick / TICKS_PER_SECOND / SECTORS_PER_BLOCK
        } else {
            self.controlled(config, arrived) / SECTORS_PER_BLOCK
        };
        let room = (buffers / 2).saturating_sub(self.in_flight / SECTORS_PER_BLOCK);
        // A rate below one block a tick still makes progress (RS-8).
        let floor = u64::from(self.in_flight == 0);
        blocks.max(floor).min(room)
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

    #[test]
    fn a_fixed_rate_is_spread_over_the_ticks() {
        let config = RateConfig { resync_rate_kib: 4000, ..config(0) };
        let mut rate = RateController::new(&config);
        assert_eq!(rate.tick(&config, 10_000), 100, "4000 KiB/s are 100 blocks a tick");
        rate.requested(800);
        assert_eq!(rate.tick(&config, 150), 0, "half of the buffers are in use");
        rate.received(800);
        assert_eq!(rate.tick(&config, 150), 75);
    }

    /// Shows RS-8: the slowest rate still asks for a block when nothing is under way.
    #[test]
    fn the_slowest_rate_makes_progress() {
        for plan in [0, 20] {
            let config = RateConfig { resync_rate_kib: 1, ..config(plan) };
            let mut rate = RateController::new(&config);
            assert_eq!(rate.tick(&config, 2048), 1);
            rate.requested(8);
            assert_eq!(rate.tick(&config, 2048), 0);
        }
    }

    #[test]
    fn the_controller_grows_with_a_fast_peer_and_stops_at_the_maximum() {
        let config = RateConfig { fill_target_sectors: 20_000, ..config(20) };
        let mut rate = RateController::new(&config);
        let mut most = 0;
        let mut first = 0;
        for tick in 0..200 {
            let blocks = rate.tick(&config, 1 << 20);
            if tick == 0 {
                first = blocks;
            }
            most = most.max(blocks);
            let sectors = blocks * SECTORS_PER_BLOCK;
            rate.requested(sectors);
            rate.received(sectors);
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
            let blocks = rate.tick(&config, 1 << 20);
            total += blocks;
            rate.requested(blocks * SECTORS_PER_BLOCK);
        }
        // The first tick plans for resync-rate over the plan; after that the target rules.
        assert!(total * SECTORS_PER_BLOCK <= 2 * 250 / 10 * 20 + 100, "{total}");
    }
}
