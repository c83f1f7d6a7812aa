//! Verbs that change the state of a running resource: one command each.

use replication_core::control::Command;
use replication_core::units::{SECTOR_SIZE, Sector};

use super::metadata::Engine;
use super::{Idle, Session, change, volume_of};
use crate::cli::Verb;
use crate::exit::Failure;
use crate::guard::Manner;

impl Session<'_> {
    /// Sends the command of a verb for each object.
    pub(super) fn change(&mut self, verb: &Verb) -> Result<u8, Failure> {
        match verb {
            Verb::Attach(on) => self.each_part(&on.objects, |me, on| {
                let command = Command::Attach(volume_of(on));
                me.guarded(on, Manner::Change, |me| {
                    me.check_before_attach(on, Engine::MayRun)?;
                    me.send(on, &command, Idle::Needed)
                })
            }),
            Verb::Detach(args) => self.each_part(&args.on.objects, |me, on| {
                let command = Command::Detach { volume: volume_of(on), force: args.force };
                me.guarded(on, change(args.force), |me| me.send(on, &command, Idle::Fine))
            }),
            Verb::Invalidate(on) => self.each_part(&on.objects, |me, on| {
                me.send(on, &Command::Invalidate(volume_of(on)), Idle::Needed)
            }),
            Verb::InvalidateRemote(on) => self.each_part(&on.objects, |me, on| {
                me.send(on, &Command::InvalidateRemote(volume_of(on)), Idle::Needed)
            }),
            Verb::NewCurrentUuid { clear_bitmap, on } => {
                let clear_bitmap = *clear_bitmap;
                self.each_part(&on.objects, |me, on| {
                    let volume = volume_of(on);
                    let command = Command::NewCurrentUuid { volume, clear_bitmap };
                    me.send(on, &command, Idle::Needed)
                })
            }
            Verb::Resize(args) => {
                let size = args.size.as_deref().map(size).transpose()?;
                self.each_part(&args.on.objects, |me, on| {
                    let command = Command::Resize {
                        volume: volume_of(on),
                        size,
                        assume_clean: args.assume_clean,
                        assume_peer_has_space: args.assume_peer_has_space,
                    };
                    me.send(on, &command, Idle::Needed)
                })
            }
            other => self.change_whole(other),
        }
    }

    /// The verbs for whole resources.
    fn change_whole(&mut self, verb: &Verb) -> Result<u8, Failure> {
        let (name, on, command, idle) = match verb {
            Verb::Connect { discard_my_data, on } => {
                let command = Command::Connect { discard_my_data: *discard_my_data };
                ("connect", on, command, Idle::Needed)
            }
            Verb::Disconnect(args) => {
                let command = Command::Disconnect { force: args.force };
                ("disconnect", &args.on, command, Idle::Fine)
            }
            Verb::Primary { force, on } => {
                ("primary", on, Command::Primary { force: *force }, Idle::Needed)
            }
            Verb::Secondary(on) => {
                ("secondary", on, Command::Secondary { holder: None }, Idle::Fine)
            }
            Verb::Outdate(on) => ("outdate", on, Command::Outdate, Idle::Needed),
            Verb::PauseSync(on) => ("pause-sync", on, Command::PauseSync(true), Idle::Needed),
            Verb::ResumeSync(on) => ("resume-sync", on, Command::PauseSync(false), Idle::Needed),
            Verb::Attach(_)
            | Verb::Detach(_)
            | Verb::Invalidate(_)
            | Verb::InvalidateRemote(_)
            | Verb::NewCurrentUuid { .. }
            | Verb::Resize(_)
            | Verb::CreateMd(_)
            | Verb::WipeMd(_)
            | Verb::CheckResize(_)
            | Verb::DumpMd(_)
            | Verb::GetGi(_)
            | Verb::ShowGi(_)
            | Verb::Up(_)
            | Verb::Upgrade(_)
            | Verb::Down(_)
            | Verb::Adjust(_)
            | Verb::Status(_)
            | Verb::Role(_)
            | Verb::PeerRole(_)
            | Verb::Cstate(_)
            | Verb::Dstate(_)
            | Verb::WaitConnect(_)
            | Verb::WaitSync(_)
            | Verb::Dump { .. }
            | Verb::ShNop
            | Verb::ShResources
            | Verb::ShDev(_)
            | Verb::ShLlDev(_)
            | Verb::ShMinor(_)
            | Verb::ShMdDev(_)
            | Verb::ShMdIdx(_)
            | Verb::ShIp(_)
            | Verb::ShResource(_)
            | Verb::ShModParms
            | Verb::ShDetached { .. } => unreachable!("only state verbs come here"),
        };
        self.each_whole(name, &on.objects, |me, on| me.send(on, &command, idle))
    }
}

/// Reads a size: sectors, or a number with a suffix.
fn size(word: &str) -> Result<Sector, Failure> {
    let bad = || {
        Failure::usage(format!(
            "--size {word}: a number of sectors, or a number with one of s, K, M, G, T; \
             a multiple of 4 KiB"
        ))
    };
    let unit = |shift: u32| (&word[..word.len() - 1], 1_u64 << shift);
    let (digits, bytes) = match word.as_bytes().last() {
        Some(b's') => (&word[..word.len() - 1], SECTOR_SIZE),
        Some(b'k' | b'K') => unit(10),
        Some(b'm' | b'M') => unit(20),
        Some(b'g' | b'G') => unit(30),
        Some(b't' | b'T') => unit(40),
        Some(b'0'..=b'9') => (word, SECTOR_SIZE),
        Some(_) | None => return Err(bad()),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let bytes = number.checked_mul(bytes).filter(|bytes| *bytes > 0 && bytes % 4096 == 0);
    bytes.map(|bytes| Sector(bytes / SECTOR_SIZE)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units, and words that are no size.
    #[test]
    fn sizes() {
        let table = [
            ("8", Some(8)),
            ("16s", Some(16)),
            ("4k", Some(8)),
            ("4K", Some(8)),
            ("1M", Some(2048)),
            ("1G", Some(2_097_152)),
            ("1t", Some(2_147_483_648)),
            ("7", None),
            ("0", None),
            ("1K", None),
            ("", None),
            ("K", None),
            ("+8", None),
            ("1.5G", None),
            ("18446744073709551615", None),
            ("99999999T", None),
        ];
        for (word, sectors) in table {
            assert_eq!(size(word).ok().map(|sector| sector.0), sectors, "{word:?}");
        }
    }
}
