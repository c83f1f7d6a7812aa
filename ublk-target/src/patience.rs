//! Waiting for what another process is about to let go of.

use std::time::{Duration, Instant};

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Tries again while the answer is "in use", until a time has come.
pub(crate) fn patiently<T, E>(
    until: Instant,
    mut try_once: impl FnMut() -> Result<T, E>,
    is_busy: impl Fn(&E) -> bool,
) -> Result<T, E> {
    loop {
        match try_once() {
            Err(error) if is_busy(&error) && Instant::now() < until => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_let_go_of_a_moment_later_is_taken() {
        let mut tries = 0;
        let until = Instant::now() + Duration::from_secs(3600);
        let try_once = || {
            tries += 1;
            if tries < 3 { Err("busy") } else { Ok(tries) }
        };
        assert_eq!(patiently(until, try_once, |error| *error == "busy"), Ok(3));
        let mut tries = 0;
        let broken = || {
            tries += 1;
            Err::<(), _>("broken")
        };
        assert_eq!(patiently(until, broken, |error| *error == "busy"), Err("broken"));
        let past = Instant::now();
        assert_eq!(patiently(past, || Err::<(), _>("busy"), |_| true), Err("busy"));
        assert_eq!(tries, 1);
    }
}
