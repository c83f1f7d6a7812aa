//! Figures that are derived from a state: how far a resync is, how fast, how long.
//!
//! Whole numbers in, whole numbers out; percentages and rates are in hundredths. Nothing
//! is called complete before it is.

use std::fmt;

use replication_core::control::{ResyncStatus, VolumeStatus};

/// Sectors of a MiB.
const SECTORS_PER_MIB: u128 = 2048;

/// A number with two decimals, kept in hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hundredths(pub u64);

impl fmt::Display for Hundredths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

fn saturated(number: u128) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// `part` of `whole` in percent, rounded to the nearest but not up to 100; an empty whole is
/// complete.
fn percent(part: u64, whole: u64) -> Hundredths {
    if part >= whole {
        return Hundredths(10_000);
    }
    let (part, whole) = (u128::from(part), u128::from(whole));
    Hundredths(saturated((part * 10_000 + whole / 2) / whole).min(9999))
}

/// MiB/s, rounded to the nearest; zero without a time.
fn rate(sectors: u64, ms: u64) -> Hundredths {
    if ms == 0 {
        return Hundredths(0);
    }
    let unit = SECTORS_PER_MIB * u128::from(ms);
    Hundredths(saturated((u128::from(sectors) * 100 * 1000 + unit / 2) / unit))
}

/// How much of a resync is done.
#[must_use]
pub fn resync_done(resync: &ResyncStatus) -> Hundredths {
    percent(resync.total_sectors.saturating_sub(resync.left_sectors), resync.total_sectors)
}

/// How much of a volume is in sync.
#[must_use]
pub fn in_sync(volume: &VolumeStatus) -> Hundredths {
    percent(volume.size_kib.saturating_sub(volume.out_of_sync_kib), volume.size_kib)
}

/// Speed of the last window, MiB/s.
#[must_use]
pub fn window_rate(resync: &ResyncStatus) -> Hundredths {
    rate(resync.window_sectors, resync.window_ms)
}

/// The speed that the target asks for, MiB/s.
#[must_use]
pub fn wanted_rate(resync: &ResyncStatus) -> Hundredths {
    rate(resync.want_kib.saturating_mul(2), 1000)
}

/// Speed since the start, without pauses, MiB/s.
#[must_use]
pub fn average_rate(resync: &ResyncStatus) -> Hundredths {
    rate(resync.total_sectors.saturating_sub(resync.left_sectors), resync.elapsed_ms)
}

/// Seconds to the end at the speed of the last window, without one at that since the start;
/// `None` if nothing moves.
#[must_use]
pub fn eta_seconds(resync: &ResyncStatus) -> Option<u64> {
    let done = resync.total_sectors.saturating_sub(resync.left_sectors);
    let window = (resync.window_sectors, resync.window_ms);
    let (sectors, ms) =
        if window.0 > 0 && window.1 > 0 { window } else { (done, resync.elapsed_ms) };
    if sectors == 0 || ms == 0 {
        return None;
    }
    let ms_left = u128::from(resync.left_sectors) * u128::from(ms) / u128::from(sectors);
    Some(saturated(ms_left.div_ceil(1000)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of the reference display, and its edges.
    #[test]
    fn figures() {
        let resync = ResyncStatus {
            total_sectors: 20_971_448,
            left_sectors: 7_864_320,
            failed_sectors: 0,
            elapsed_ms: 60_000,
            paused_ms: 0,
            window_ms: 3000,
            window_sectors: 262_144,
            want_kib: 102_400,
        };
        assert_eq!(wanted_rate(&resync).to_string(), "100.00");
        assert_eq!(resync_done(&resync).to_string(), "62.50");
        assert_eq!(window_rate(&resync).to_string(), "42.67");
        assert_eq!(average_rate(&resync).to_string(), "106.67");
        assert_eq!(eta_seconds(&resync), Some(90));
        let still = ResyncStatus { window_sectors: 0, elapsed_ms: 0, ..resync };
        assert_eq!(eta_seconds(&still), None);
        assert_eq!(resync_done(&ResyncStatus::default()).to_string(), "100.00");
        assert_eq!(window_rate(&ResyncStatus::default()).to_string(), "0.00");
    }

    /// One block that differs is not "100.00".
    #[test]
    fn complete_means_complete() {
        let volume = |out_of_sync_kib| VolumeStatus {
            size_kib: 1 << 40,
            out_of_sync_kib,
            ..VolumeStatus::default()
        };
        assert_eq!(in_sync(&volume(4)).to_string(), "99.99");
        assert_eq!(in_sync(&volume(0)).to_string(), "100.00");
    }

    /// Numbers from an engine cannot overflow anything.
    #[test]
    fn extremes() {
        let resync = ResyncStatus {
            total_sectors: u64::MAX,
            left_sectors: 0,
            failed_sectors: 0,
            elapsed_ms: 1,
            paused_ms: 0,
            window_ms: u64::MAX,
            window_sectors: 1,
            want_kib: 0,
        };
        let expected = saturated((u128::from(u64::MAX) * 100_000 + 1024) / 2048);
        assert_eq!(average_rate(&resync), Hundredths(expected));
        let late = ResyncStatus { left_sectors: u64::MAX, ..resync };
        assert_eq!(eta_seconds(&late), Some(u64::MAX));
    }
}
