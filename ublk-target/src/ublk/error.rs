//! What can go wrong with ublk, and what the operator can do about it.

use std::io;
use std::path::PathBuf;
use std::{fmt, process};

use super::sys::Flags;
use super::{DeviceId, DeviceState};

/// What was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Ask the driver for its abilities.
    Features,
    /// Create a device.
    Add,
    /// Tell the kernel the device's size and limits.
    SetParams,
    /// Ask for them.
    GetParams,
    /// Make the block device appear.
    Start,
    /// Make the block device vanish.
    Stop,
    /// Remove the device.
    Delete,
    /// Change the size of a started device.
    Resize,
    /// Ask for a device's state.
    Info,
    /// Announce a new process for a device whose process has died.
    StartRecovery,
    /// Let the new process go on.
    EndRecovery,
    /// Open the character device of the queue.
    Open,
    /// Map the queue's descriptors.
    Map,
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Features => "ask for features",
            Self::Add => "add the device",
            Self::SetParams => "set parameters",
            Self::GetParams => "get parameters",
            Self::Start => "start the device",
            Self::Stop => "stop the device",
            Self::Delete => "delete the device",
            Self::Resize => "change the size",
            Self::Info => "ask for the state",
            Self::StartRecovery => "start recovery",
            Self::EndRecovery => "end recovery",
            Self::Open => "open",
            Self::Map => "map the descriptors",
        })
    }
}

/// A failure of the ublk frontend.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// The control device is missing.
    #[error(
        "{}: not there; the kernel module ublk_drv is not loaded (modprobe ublk_drv) or this \
         kernel ({kernel}) is built without CONFIG_BLK_DEV_UBLK; the nbd frontend works without",
        path.display()
    )]
    NoDriver {
        /// The control device.
        path: PathBuf,
        /// The running kernel.
        kernel: String,
    },
    /// The module could not be loaded.
    #[error("modprobe ublk_drv on kernel {kernel} failed ({status}): {message}")]
    NoModule {
        /// The running kernel.
        kernel: String,
        /// How modprobe ended.
        status: process::ExitStatus,
        /// What it said.
        message: String,
    },
    /// There is no modprobe to run.
    #[error("cannot run modprobe to load ublk_drv; load it by hand or install kmod")]
    NoModprobe {
        /// Why not.
        source: io::Error,
    },
    /// A kernel known to fail or to crash with ublk.
    #[error("kernel {kernel} has a broken ublk driver (6.17); use another kernel")]
    BrokenKernel {
        /// The running kernel.
        kernel: String,
    },
    /// The driver lacks something we need.
    #[error(
        "the ublk driver of kernel {kernel} lacks features {missing} (it has {found}); \
         Linux 6.5 or later is needed"
    )]
    OldKernel {
        /// The running kernel.
        kernel: String,
        /// What is missing.
        missing: Flags,
        /// What the driver says it has.
        found: Flags,
    },
    /// The driver made the device, but without something that was asked for.
    #[error("{device}: kernel {kernel} did not accept flags {missing}; the device was removed")]
    FlagsRefused {
        /// The device, which does not exist any more.
        device: DeviceId,
        /// The running kernel.
        kernel: String,
        /// What it dropped.
        missing: Flags,
    },
    /// No rights.
    #[error("{}: cannot {act}: permission denied; CAP_SYS_ADMIN is needed (run as root)",
        path.display())]
    Permission {
        /// The device.
        path: PathBuf,
        /// What was tried.
        act: Act,
    },
    /// The kernel gives us no ring.
    #[error("cannot set up an io_uring; see the sysctl kernel.io_uring_disabled")]
    NoRing {
        /// Why not.
        source: io::Error,
    },
    /// Waiting for a command failed; its outcome is not known.
    #[error("{}: cannot {act}: waiting for the outcome failed", path.display())]
    Wait {
        /// The device.
        path: PathBuf,
        /// What was tried.
        act: Act,
        /// Why.
        source: io::Error,
    },
    /// The device does not exist (any more).
    #[error("{device}: cannot {act}: there is no such device")]
    NoDevice {
        /// The device.
        device: DeviceId,
        /// What was tried.
        act: Act,
    },
    /// The number is taken.
    #[error("{device}: exists already; remove it or choose another device number")]
    Exists {
        /// The device.
        device: DeviceId,
    },
    /// Another process serves the device, or its remains are not cleared away yet: try again.
    #[error("{device}: cannot {act}: another process serves it, or has not fully ended yet")]
    Busy {
        /// The device.
        device: DeviceId,
        /// What was tried.
        act: Act,
    },
    /// A process died while it recovered the device, and this kernel does not let the next one
    /// begin again. It tells processes apart by a memory address that is soon used again, so
    /// that another process may well succeed.
    #[error(
        "{device}: a recovery was cut short, and kernel {kernel} hardly allows another one; \
         try again some times, or stop the device, which fails the requests that wait"
    )]
    HalfRecovered {
        /// The device.
        device: DeviceId,
        /// The running kernel.
        kernel: String,
    },
    /// This kernel cannot do that.
    #[error("{}: cannot {act}: kernel {kernel} does not support it", path.display())]
    Unsupported {
        /// The device.
        path: PathBuf,
        /// What was tried.
        act: Act,
        /// The running kernel.
        kernel: String,
    },
    /// The device is in a state in which that cannot be done.
    #[error("{device}: cannot {act}: the device is {state}")]
    WrongState {
        /// The device.
        device: DeviceId,
        /// What was tried.
        act: Act,
        /// Its state.
        state: DeviceState,
    },
    /// The kernel reports a state that we do not know.
    #[error("{device}: unknown state {state}; this kernel is newer than this program")]
    UnknownState {
        /// The device.
        device: DeviceId,
        /// The number of the state.
        state: u16,
    },
    /// A parameter outside of what ublk can do.
    #[error("{what} of {value} cannot be served: it must be {rule}")]
    BadParam {
        /// Which.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        rule: &'static str,
    },
    /// Any other refusal of the kernel.
    #[error("{}: cannot {act}", path.display())]
    Command {
        /// The device.
        path: PathBuf,
        /// What was tried.
        act: Act,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Where a failure happened: makes errors out of errno values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site<'a> {
    pub(super) act: Act,
    /// `None`: the control device itself.
    pub(super) device: Option<DeviceId>,
    pub(super) kernel: &'a str,
}

impl Site<'_> {
    /// The error for a command that failed with `errno`.
    pub(super) fn error(self, path: PathBuf, errno: i32) -> UblkError {
        let act = self.act;
        let source = || io::Error::from_raw_os_error(errno);
        match (errno, self.device) {
            (libc::EPERM | libc::EACCES, _) => UblkError::Permission { path, act },
            (libc::EOPNOTSUPP, _) => {
                UblkError::Unsupported { path, act, kernel: self.kernel.to_owned() }
            }
            (libc::EEXIST, Some(device)) if act == Act::Add => UblkError::Exists { device },
            (libc::EBUSY, Some(device)) => UblkError::Busy { device, act },
            (libc::ENODEV | libc::ENXIO | libc::ENOENT, Some(device)) => {
                UblkError::NoDevice { device, act }
            }
            (_, _) => UblkError::Command { path, act, source: source() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(act: Act, errno: i32) -> String {
        let device = DeviceId(3);
        let site = Site { act, device: Some(device), kernel: "6.12.95" };
        site.error(device.char_path(), errno).to_string()
    }

    #[test]
    fn errors_say_what_happened_to_what_and_what_to_do() {
        let table = [
            (Act::Add, libc::EEXIST, "/dev/ublkb3: exists already"),
            (Act::StartRecovery, libc::EBUSY, "/dev/ublkb3: cannot start recovery: another"),
            (Act::Delete, libc::ENODEV, "/dev/ublkb3: cannot delete the device: there is no"),
            (Act::Open, libc::ENOENT, "/dev/ublkb3: cannot open: there is no such device"),
            (Act::Open, libc::EACCES, "/dev/ublkc3: cannot open: permission denied"),
            (Act::Resize, libc::EOPNOTSUPP, "/dev/ublkc3: cannot change the size: kernel 6.12.95"),
            (Act::SetParams, libc::EINVAL, "/dev/ublkc3: cannot set parameters"),
        ];
        for (act, errno, start) in table {
            let text = text(act, errno);
            assert!(text.starts_with(start), "{text:?} should start with {start:?}");
        }
    }

    #[test]
    fn an_existing_device_is_only_in_the_way_of_a_new_one() {
        let site = Site { act: Act::Start, device: Some(DeviceId(0)), kernel: "7.2" };
        let error = site.error(DeviceId(0).char_path(), libc::EEXIST);
        assert!(matches!(error, UblkError::Command { act: Act::Start, .. }), "{error:?}");
    }
}
