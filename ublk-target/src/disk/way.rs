//! Which way an operation is carried out, given what the device was found unable to do.

use replication_core::action::DiskOp;
use replication_core::units::Errno;

/// How an operation is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write { fua: bool },
    Flush,
    Punch,
    ZeroRange,
    DiscardCommand,
    WriteZeroes,
}

/// What a device can do, as far as it is known: everything until it says no.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    punch: bool,
    zero_range: bool,
    discard_command: bool,
}

impl Abilities {
    pub(super) fn new(is_block_device: bool) -> Self {
        Self { punch: true, zero_range: true, discard_command: is_block_device }
    }

    /// The best way; `None`: there is none.
    pub(super) fn way(self, op: DiskOp) -> Option<Way> {
        let zero_range = if self.zero_range { Way::ZeroRange } else { Way::WriteZeroes };
        match op {
            DiskOp::Read => Some(Way::Read),
            DiskOp::Write { fua } => Some(Way::Write { fua }),
            DiskOp::Flush => Some(Way::Flush),
            DiskOp::Discard if self.punch => Some(Way::Punch),
            DiskOp::Discard => self.discard_command.then_some(Way::DiscardCommand),
            DiskOp::Zeroes { unmap: true } if self.punch => Some(Way::Punch),
            DiskOp::Zeroes { .. } => Some(zero_range),
        }
    }

    /// Takes note of an error. Whether it means that the device cannot do it in this way, so that
    /// another one is to be tried.
    pub(super) fn learn(&mut self, way: Way, errno: Errno) -> bool {
        let unsupported = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY].contains(&errno.0);
        // A kernel without the discard command calls it an invalid argument.
        let unknown = way == Way::DiscardCommand && errno == Errno::EINVAL;
        if !unsupported && !unknown {
            return false;
        }
        match way {
            Way::Punch => self.punch = false,
            Way::ZeroRange => self.zero_range = false,
            Way::DiscardCommand => self.discard_command = false,
            Way::Read | Way::Write { .. } | Way::Flush | Way::WriteZeroes => return false,
        }
        true
    }
}

/// What became of an operation of `total` bytes, of which `done` were done before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It has ended.
    Ended(Result<(), Errno>),
    /// So many bytes are done; it goes on.
    Partial(u64),
    /// It failed with this error; perhaps there is another way.
    Failed(Errno),
}

/// Judges the result of one system call.
pub(super) fn judge(way: Way, done: u64, total: u64, result: Result<usize, Errno>) -> Outcome {
    let moves_data = match way {
        Way::Read | Way::Write { .. } | Way::WriteZeroes => true,
        Way::Flush | Way::Punch | Way::ZeroRange | Way::DiscardCommand => false,
    };
    match result {
        Ok(_) if !moves_data => Outcome::Ended(Ok(())),
        // The device ends before the range does, or does not go on: that is no success.
        Ok(0) => Outcome::Ended(Err(Errno::EIO)),
        Ok(bytes) => {
            let done = done + u64::try_from(bytes).expect("a transfer has less than 2^64 bytes");
            assert!(done <= total, "more was transferred than asked for");
            if done == total { Outcome::Ended(Ok(())) } else { Outcome::Partial(done) }
        }
        Err(Errno(libc::EINTR)) if moves_data => Outcome::Partial(done),
        Err(errno) => Outcome::Failed(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ways tried for `op` on a device that supports none of `refused`.
    fn tried(op: DiskOp, is_block_device: bool, refused: &[Way]) -> Vec<Option<Way>> {
        let mut abilities = Abilities::new(is_block_device);
        let mut tried = Vec::new();
        loop {
            let way = abilities.way(op);
            tried.push(way);
            match way {
                Some(way) if refused.contains(&way) => {
                    assert!(abilities.learn(way, Errno::EOPNOTSUPP));
                }
                Some(_) | None => return tried,
            }
        }
    }

    #[test]
    fn each_operation_falls_back_in_its_order() {
        use Way::{DiscardCommand, Punch, WriteZeroes, ZeroRange};
        let all = [Punch, ZeroRange, DiscardCommand];
        type Row<'a> = (DiskOp, bool, &'a [Way], &'a [Option<Way>]);
        let table: [Row<'_>; 7] = [
            (DiskOp::Discard, true, &[], &[Some(Punch)]),
            (DiskOp::Discard, true, &[Punch], &[Some(Punch), Some(DiscardCommand)]),
            (DiskOp::Discard, true, &all, &[Some(Punch), Some(DiscardCommand), None]),
            (DiskOp::Discard, false, &all, &[Some(Punch), None]),
            (DiskOp::Zeroes { unmap: true }, true, &[Punch], &[Some(Punch), Some(ZeroRange)]),
            (
                DiskOp::Zeroes { unmap: true },
                true,
                &all,
                &[Some(Punch), Some(ZeroRange), Some(WriteZeroes)],
            ),
            (DiskOp::Zeroes { unmap: false }, true, &all, &[Some(ZeroRange), Some(WriteZeroes)]),
        ];
        for (op, is_block_device, refused, expected) in table {
            assert_eq!(tried(op, is_block_device, refused), expected, "{op:?}");
        }
    }

    #[test]
    fn real_errors_and_flushes_have_no_other_way() {
        let mut abilities = Abilities::new(true);
        for way in [Way::Read, Way::Write { fua: true }, Way::Flush, Way::WriteZeroes] {
            assert!(!abilities.learn(way, Errno::EOPNOTSUPP), "{way:?}");
        }
        assert!(!abilities.learn(Way::Punch, Errno::EIO));
        assert!(!abilities.learn(Way::ZeroRange, Errno::EINVAL));
        assert!(abilities.learn(Way::DiscardCommand, Errno::EINVAL));
        assert_eq!(abilities.way(DiskOp::Discard), Some(Way::Punch));
    }

    #[test]
    fn short_transfers_go_on_and_dead_ones_fail() {
        let write = Way::Write { fua: false };
        assert_eq!(judge(write, 0, 4096, Ok(4096)), Outcome::Ended(Ok(())));
        assert_eq!(judge(Way::Read, 0, 4096, Ok(512)), Outcome::Partial(512));
        assert_eq!(judge(Way::Read, 512, 4096, Ok(3584)), Outcome::Ended(Ok(())));
        assert_eq!(judge(Way::Read, 512, 4096, Ok(0)), Outcome::Ended(Err(Errno::EIO)));
        assert_eq!(judge(write, 512, 4096, Err(Errno(libc::EINTR))), Outcome::Partial(512));
        assert_eq!(judge(Way::Flush, 0, 0, Ok(0)), Outcome::Ended(Ok(())));
        let interrupted = Err(Errno(libc::EINTR));
        assert_eq!(judge(Way::Flush, 0, 0, interrupted), Outcome::Failed(Errno(libc::EINTR)));
        assert_eq!(judge(write, 0, 512, Err(Errno::ENOSPC)), Outcome::Failed(Errno::ENOSPC));
    }
}
