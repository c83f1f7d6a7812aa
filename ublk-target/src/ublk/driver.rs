//! The kernel side as a whole: which kernel runs, and whether its ublk module is loaded.

use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, io};

use super::error::UblkError;
use super::sys::{CONTROL_PATH, PR_SET_IO_FLUSHER};

/// Where modprobe is looked for: a service's search path may lack the system directories.
const MODPROBE: [&str; 3] = ["/usr/sbin/modprobe", "/sbin/modprobe", "modprobe"];

/// Makes sure that the control device exists, by loading the kernel module if it does not.
///
/// # Errors
/// If the module cannot be loaded, or the device is still missing afterwards.
pub fn load_driver() -> Result<(), UblkError> {
    load_driver_for(Path::new(CONTROL_PATH), &MODPROBE)
}

fn load_driver_for(control: &Path, programs: &[&str]) -> Result<(), UblkError> {
    if control.exists() {
        return Ok(());
    }
    modprobe(programs)?;
    if control.exists() {
        return Ok(());
    }
    Err(UblkError::NoDriver { path: control.to_owned(), kernel: kernel_release() })
}

fn modprobe(programs: &[&str]) -> Result<(), UblkError> {
    let mut missing = io::Error::from(io::ErrorKind::NotFound);
    for program in programs {
        match Command::new(program).arg("ublk_drv").stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                let kernel = kernel_release();
                return Err(UblkError::NoModule { kernel, status: output.status, message });
            }
            Err(error) => missing = error,
        }
    }
    Err(UblkError::NoModprobe { source: missing })
}

/// Marks the calling thread as one that block devices depend on: when it needs memory, the kernel
/// does not try to free some by writing to a device, which might be the one that waits for this
/// thread. For every thread that serves requests.
///
/// # Errors
/// Without CAP_SYS_RESOURCE.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: this call takes numbers only and changes an attribute of the calling thread.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The running kernel's release, as in `uname -r`.
pub(super) fn kernel_release() -> String {
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(text) => text.trim().to_owned(),
        // Without /proc the release is unknown; it only decorates messages then.
        Err(_) => "of unknown release".to_owned(),
    }
}

/// Whether ublk is known to be broken in this release: all of 6.17.
pub(super) fn is_broken(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']);
    numbers.next() == Some("6") && numbers.next() == Some("17")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_broken_series_is_refused() {
        let table = [
            ("6.17.0", true),
            ("6.17.8+deb13-amd64", true),
            ("6.17-rc1", true),
            ("6.1.17", false),
            ("6.12.95+deb13-cloud-amd64", false),
            ("7.2.13", false),
            ("16.17.0", false),
            ("6", false),
            ("", false),
        ];
        for (release, broken) in table {
            assert_eq!(is_broken(release), broken, "{release:?}");
        }
    }

    #[test]
    fn a_loaded_driver_needs_no_modprobe() {
        load_driver_for(Path::new("/dev/null"), &["/nonexistent/modprobe"]).unwrap();
    }

    #[test]
    fn a_driver_that_cannot_be_loaded_is_an_error_with_its_reason() {
        let nowhere = Path::new("/nonexistent/ublk-control");
        let error = load_driver_for(nowhere, &["/nonexistent/modprobe"]).unwrap_err();
        assert!(matches!(error, UblkError::NoModprobe { .. }), "{error:?}");

        let error = load_driver_for(nowhere, &["/nonexistent/modprobe", "false"]).unwrap_err();
        assert!(matches!(error, UblkError::NoModule { .. }), "{error:?}");

        let error = load_driver_for(nowhere, &["true"]).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/ublk-control: not there"), "{error}");
    }
}
