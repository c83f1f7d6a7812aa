//! The control device: commands that create, change and remove block devices.
//!
//! Every call blocks until the kernel is done, and some wait for requests that the serving ring
//! must answer first. So the ring's thread never calls anything here; a [`Control`] can be moved
//! to a helper thread.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use replication_core::units::Sector;

use super::DeviceId;
use super::driver::{is_broken, kernel_release};
use super::error::{Act, Site, UblkError};
use super::params::{Params, check_size};
use super::sys::{
    self, ANY_DEVICE, CONTROL_PATH, CtrlCmd, Flags, MAX_IO_BYTES, MAX_QUEUE_DEPTH, RawDevInfo,
    RawParams,
};

/// Entries of the control ring. One command is under way at a time; the spare ones are for
/// commands that an earlier failure of the ring left behind.
const RING_ENTRIES: u32 = 8;

/// What a new device shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddDevice {
    /// Its number; `None` lets the kernel choose.
    pub id: Option<DeviceId>,
    /// Requests in flight, 1 to [`MAX_QUEUE_DEPTH`].
    pub queue_depth: u16,
    /// Bytes of the largest request: a multiple of 4096, at most [`MAX_IO_BYTES`].
    pub max_io_bytes: u32,
    /// Further flags, all of which must be accepted. [`Flags::RECOVERY`] is always asked for.
    pub flags: Flags,
}

/// What the kernel says about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub id: DeviceId,
    /// Its queues; ours have one.
    pub queues: u16,
    /// Tags of a queue.
    pub queue_depth: u16,
    /// Bytes of the largest request.
    pub max_io_bytes: u32,
    /// Its state.
    pub state: DeviceState,
    /// The process that serves it. Some kernels keep the number of a dead process: this says
    /// nothing about being alive.
    pub pid: i32,
    /// Its flags, among them some that nobody asked for.
    pub flags: Flags,
}

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, or stopped: there is no block device.
    Dead,
    /// In service.
    Live,
    /// Its process died: requests wait for a new one.
    Quiesced,
    /// Its process died: requests fail.
    FailIo,
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dead => "not started",
            Self::Live => "live",
            Self::Quiesced => "waiting for recovery",
            Self::FailIo => "failing all requests",
        })
    }
}

impl DeviceInfo {
    fn decode(raw: &RawDevInfo) -> Result<Self, UblkError> {
        let id = DeviceId(raw.dev_id);
        let state = match raw.state {
            sys::STATE_DEAD => DeviceState::Dead,
            sys::STATE_LIVE => DeviceState::Live,
            sys::STATE_QUIESCED => DeviceState::Quiesced,
            sys::STATE_FAIL_IO => DeviceState::FailIo,
            state => return Err(UblkError::UnknownState { device: id, state }),
        };
        Ok(Self {
            id,
            queues: raw.queues,
            queue_depth: raw.queue_depth,
            max_io_bytes: raw.max_io_bytes,
            state,
            pid: raw.pid,
            flags: Flags(raw.flags),
        })
    }
}

/// The control device with a small ring of its own.
pub struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    file: File,
    path: PathBuf,
    kernel: String,
    features: Flags,
    /// Number of the last command, which names its completion.
    last: u64,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("path", &self.path)
            .field("kernel", &self.kernel)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Opens the control device and asks the driver what it can do.
    ///
    /// # Errors
    /// If the module is not loaded (see [`super::load_driver`]), the kernel is too old or known
    /// to be broken, rights are missing, or there is no `io_uring`.
    pub fn open() -> Result<Self, UblkError> {
        let mut control = Self::open_at(Path::new(CONTROL_PATH), kernel_release())?;
        control.load_features()?;
        Ok(control)
    }

    fn open_at(path: &Path, kernel: String) -> Result<Self, UblkError> {
        if is_broken(&kernel) {
            return Err(UblkError::BrokenKernel { kernel });
        }
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(UblkError::NoDriver { path: path.to_owned(), kernel });
            }
            Err(error) => {
                let site = Site { act: Act::Open, device: None, kernel: &kernel };
                return Err(site.error(path.to_owned(), error.raw_os_error().unwrap_or(libc::EIO)));
            }
        };
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder()
            .build(RING_ENTRIES)
            .map_err(|source| UblkError::NoRing { source })?;
        let path = path.to_owned();
        Ok(Self { ring, file, path, kernel, features: Flags::NONE, last: 0 })
    }

    fn load_features(&mut self) -> Result<(), UblkError> {
        let needed = Flags::RECOVERY | Flags::CMD_IOCTL_ENCODE;
        let found = match self.call_with(Act::Features, None, sys::GET_FEATURES, 0_u64) {
            Ok(bits) => Flags(bits),
            // Drivers from before the question existed cannot answer it.
            Err(UblkError::Unsupported { .. }) => Flags::NONE,
            Err(error) => return Err(error),
        };
        let missing = needed.without(found);
        if missing != Flags::NONE {
            return Err(UblkError::OldKernel { kernel: self.kernel.clone(), missing, found });
        }
        self.features = found;
        Ok(())
    }

    /// What the driver can do.
    #[must_use]
    pub fn features(&self) -> Flags {
        self.features
    }

    /// The running kernel's release.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Creates a device with one queue. Its character device exists afterwards, its block device
    /// only after [`Control::start`].
    ///
    /// # Errors
    /// [`UblkError::Exists`] if the number is taken; [`UblkError::FlagsRefused`] if the driver
    /// dropped a flag (the device is removed again).
    pub fn add_device(&mut self, wanted: AddDevice) -> Result<DeviceInfo, UblkError> {
        check_add(&wanted)?;
        let flags = wanted.flags | Flags::RECOVERY | Flags::CMD_IOCTL_ENCODE;
        let raw = RawDevInfo {
            queues: 1,
            queue_depth: wanted.queue_depth,
            max_io_bytes: wanted.max_io_bytes,
            dev_id: wanted.id.map_or(ANY_DEVICE, |id| id.0),
            pid: -1,
            flags: flags.0,
            ..RawDevInfo::default()
        };
        let raw = self.call_with(Act::Add, wanted.id, sys::ADD_DEV, raw)?;
        let info = DeviceInfo::decode(&raw)?;
        let missing = flags.without(info.flags);
        if missing != Flags::NONE {
            // The driver drops what it does not know without a word.
            self.delete(info.id)?;
            let kernel = self.kernel.clone();
            return Err(UblkError::FlagsRefused { device: info.id, kernel, missing });
        }
        Ok(info)
    }

    /// Sets size and limits, between [`Control::add_device`] and [`Control::start`].
    ///
    /// # Errors
    /// [`UblkError::BadParam`], or the kernel's refusal.
    pub fn set_params(&mut self, id: DeviceId, params: &Params) -> Result<(), UblkError> {
        let raw = params.encode()?;
        self.call_with(Act::SetParams, Some(id), sys::SET_PARAMS, raw).map(|_| ())
    }

    /// Size and limits as the kernel has them: a process that recovers a device learns here what
    /// its predecessor had set.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn get_params(&mut self, id: DeviceId) -> Result<Params, UblkError> {
        let raw = RawParams { len: sys::PARAMS_LEN, ..RawParams::default() };
        let raw = self.call_with(Act::GetParams, Some(id), sys::GET_PARAMS, raw)?;
        Params::decode(&raw)
    }

    /// Makes the block device appear. Returns when all tags were fetched and the ring has
    /// answered the reads of the partition scan.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn start(&mut self, id: DeviceId, pid: u32) -> Result<(), UblkError> {
        self.call(Act::Start, id, sys::START_DEV, u64::from(pid))
    }

    /// Makes the block device vanish. Returns when the ring has answered what was under way;
    /// every parked command is woken with [`super::Wakeup::Stopping`].
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn stop(&mut self, id: DeviceId) -> Result<(), UblkError> {
        self.call(Act::Stop, id, sys::STOP_DEV, 0)
    }

    /// Removes a stopped device. Returns when nobody has its character device open any more: drop
    /// the [`super::Queue`] first, and let no command of it be left in a ring.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete(&mut self, id: DeviceId) -> Result<(), UblkError> {
        self.call(Act::Delete, id, sys::DEL_DEV, 0)
    }

    /// Changes the size of a live device.
    ///
    /// # Errors
    /// [`UblkError::Unsupported`] before Linux 6.16: stop the device and start it anew.
    /// [`UblkError::WrongState`] if the device is not live.
    pub fn update_size(&mut self, id: DeviceId, sectors: Sector) -> Result<(), UblkError> {
        check_size(sectors)?;
        let act = Act::Resize;
        if !self.features.contains(Flags::UPDATE_SIZE) {
            let kernel = self.kernel.clone();
            return Err(UblkError::Unsupported { path: id.block_path(), act, kernel });
        }
        // The driver relies on a started block device here without looking.
        let state = self.get_info(id)?.state;
        if state != DeviceState::Live {
            return Err(UblkError::WrongState { device: id, act, state });
        }
        self.call(act, id, sys::UPDATE_SIZE, sectors.0)
    }

    /// Number, limits, state and flags of a device.
    ///
    /// # Errors
    /// [`UblkError::NoDevice`] if there is none.
    pub fn get_info(&mut self, id: DeviceId) -> Result<DeviceInfo, UblkError> {
        let raw = RawDevInfo { dev_id: id.0, ..RawDevInfo::default() };
        let raw = self.call_with(Act::Info, Some(id), sys::GET_DEV_INFO, raw)?;
        DeviceInfo::decode(&raw)
    }

    /// Announces that this process takes over a device whose process has died. Then open the
    /// queue, fetch every tag and call [`Control::end_recovery`].
    ///
    /// A predecessor may have died in the middle of this very procedure. Linux 7.2 can begin again
    /// at any time. Linux 6.12 can not if the predecessor had opened the queue and not fetched
    /// all tags ([`UblkError::HalfRecovered`]), so prepare everything else before this call, and
    /// fetch all tags in one submission.
    ///
    /// # Errors
    /// [`UblkError::Busy`] while the old process is not fully gone: try again later.
    /// [`UblkError::WrongState`] if the device was never in service, or is no more: delete it.
    pub fn start_recovery(&mut self, id: DeviceId) -> Result<(), UblkError> {
        let act = Act::StartRecovery;
        let refusal = match self.call(act, id, sys::START_USER_RECOVERY, 0) {
            Ok(()) => return Ok(()),
            Err(refusal @ UblkError::NoDevice { .. }) => return Err(refusal),
            Err(refusal) => refusal,
        };
        let info = self.get_info(id)?;
        recovery_refused(&info, refusal)
    }

    /// Puts a recovered device into service. Returns when all tags were fetched; requests that
    /// the old process had may arrive at once.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn end_recovery(&mut self, id: DeviceId, pid: u32) -> Result<(), UblkError> {
        self.call(Act::EndRecovery, id, sys::END_USER_RECOVERY, u64::from(pid))
    }

    /// Runs a command that carries nothing but a number.
    fn call(&mut self, act: Act, id: DeviceId, op: u32, data: u64) -> Result<(), UblkError> {
        let command = CtrlCmd { dev_id: id.0, data, ..CtrlCmd::default() };
        let result = self.wait_for(op, command).map_err(|e| self.lost(act, Some(id), e))?;
        self.judge(act, Some(id), result)
    }

    /// Runs a command with a structure that the kernel reads, writes or both.
    fn call_with<T: Payload>(
        &mut self,
        act: Act,
        device: Option<DeviceId>,
        op: u32,
        payload: T,
    ) -> Result<T, UblkError> {
        let payload = Box::into_raw(Box::new(payload));
        let dev_id = device.map_or(ANY_DEVICE, |id| id.0);
        let command = CtrlCmd { dev_id, len: T::LEN, addr: address(payload), data: 0 };
        // If the wait fails, the kernel may still write to the payload: it is never freed then.
        let result = self.wait_for(op, command).map_err(|e| self.lost(act, device, e))?;
        // SAFETY: the pointer came from Box::into_raw above and was handed to one command only,
        // which has completed, so nobody else uses it. T is a `Payload`, of which the kernel may
        // have overwritten any byte.
        let payload = unsafe { Box::from_raw(payload) };
        self.judge(act, device, result)?;
        Ok(*payload)
    }

    /// Submits a command and waits for its completion, however long that takes.
    fn wait_for(&mut self, op: u32, command: CtrlCmd) -> io::Result<i32> {
        self.last += 1;
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op)
            .cmd(command.to_bytes())
            .build()
            .user_data(self.last);
        // SAFETY: the file descriptor outlives the wait, as `self` owns it. A payload named by
        // the command is freed by `call_with` only after this function has seen the completion.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOBUFS))?;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // A completion of an older number belongs to a command whose wait had failed.
            let mine = self.ring.completion().find(|done| done.user_data() == self.last);
            if let Some(done) = mine {
                return Ok(done.result());
            }
        }
    }

    fn path_of(&self, device: Option<DeviceId>) -> PathBuf {
        device.map_or_else(|| self.path.clone(), DeviceId::char_path)
    }

    fn lost(&self, act: Act, device: Option<DeviceId>, source: io::Error) -> UblkError {
        UblkError::Wait { path: self.path_of(device), act, source }
    }

    fn judge(&self, act: Act, device: Option<DeviceId>, result: i32) -> Result<(), UblkError> {
        if result >= 0 {
            return Ok(());
        }
        let site = Site { act, device, kernel: &self.kernel };
        Err(site.error(self.path_of(device), result.saturating_neg()))
    }
}

/// Structures that the kernel may fill with any bytes.
///
/// # Safety
/// Every bit pattern is a value of the type, it has no padding, and `LEN` is its size.
unsafe trait Payload {
    const LEN: u16;
}

// SAFETY: an integer of eight bytes.
unsafe impl Payload for u64 {
    const LEN: u16 = 8;
}

// SAFETY: `repr(C)`, integers only, their sizes add up to 64, which is asserted beside the type.
unsafe impl Payload for RawDevInfo {
    const LEN: u16 = 64;
}

// SAFETY: `repr(C)`, integers only, their sizes add up to 136, which is asserted beside the type.
unsafe impl Payload for RawParams {
    const LEN: u16 = 136;
}

fn address<T>(pointer: *mut T) -> u64 {
    u64::try_from(pointer.expose_provenance()).expect("an address has at most 64 bits")
}

/// What a refused start of a recovery means for a device in this state.
fn recovery_refused(info: &DeviceInfo, refusal: UblkError) -> Result<(), UblkError> {
    let invalid = matches!(&refusal, UblkError::Command { source, .. }
        if source.raw_os_error() == Some(libc::EINVAL));
    match info.state {
        // Linux 6.12 refuses so to begin again what was begun and not finished. The device is
        // ready for the next step then.
        DeviceState::Quiesced if invalid && info.flags.contains(Flags::RECOVERY) => Ok(()),
        // Refused as invalid by some kernels and as busy by others.
        DeviceState::Dead => {
            let (device, state) = (info.id, info.state);
            Err(UblkError::WrongState { device, act: Act::StartRecovery, state })
        }
        DeviceState::Quiesced | DeviceState::Live | DeviceState::FailIo => Err(refusal),
    }
}

fn check_add(wanted: &AddDevice) -> Result<(), UblkError> {
    if !(1..=MAX_QUEUE_DEPTH).contains(&wanted.queue_depth) {
        let value = u64::from(wanted.queue_depth);
        return Err(UblkError::BadParam { what: "queue depth", value, rule: "1 to 4096" });
    }
    let bytes = wanted.max_io_bytes;
    if !(4096..=MAX_IO_BYTES).contains(&bytes) || !bytes.is_multiple_of(4096) {
        let rule = "a multiple of 4096, at most 32 MiB";
        return Err(UblkError::BadParam { what: "largest request", value: bytes.into(), rule });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_can_move_to_a_helper_thread() {
        fn is_send<T: Send>() {}
        is_send::<Control>();
        is_send::<UblkError>();
    }

    #[test]
    fn a_missing_driver_is_named_with_its_cure() {
        let path = Path::new("/nonexistent/ublk-control");
        let text = Control::open_at(path, "6.1.0".to_owned()).unwrap_err().to_string();
        for part in ["/nonexistent/ublk-control", "modprobe ublk_drv", "6.1.0", "nbd"] {
            assert!(text.contains(part), "{part:?} is missing in {text:?}");
        }
    }

    #[test]
    fn a_broken_kernel_is_refused_before_anything_is_touched() {
        let error = Control::open_at(Path::new("/dev/null"), "6.17.3".to_owned()).unwrap_err();
        assert!(matches!(error, UblkError::BrokenKernel { .. }), "{error:?}");
    }

    #[test]
    fn a_file_that_takes_no_commands_looks_like_an_old_driver() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut control = Control::open_at(file.path(), "5.19".to_owned()).unwrap();
        let error = control.load_features().unwrap_err();
        assert!(matches!(error, UblkError::OldKernel { .. }), "{error:?}");
        for _ in 0..3 * RING_ENTRIES {
            let error = control.get_info(DeviceId(1)).unwrap_err();
            assert!(matches!(error, UblkError::Unsupported { act: Act::Info, .. }), "{error:?}");
        }
        let error = control.update_size(DeviceId(1), Sector(8)).unwrap_err();
        assert!(matches!(error, UblkError::Unsupported { act: Act::Resize, .. }), "{error:?}");
        let error = control.update_size(DeviceId(1), Sector(0)).unwrap_err();
        assert!(matches!(error, UblkError::BadParam { .. }), "{error:?}");
    }

    #[test]
    fn limits_are_checked_before_the_kernel_is_asked() {
        let good = AddDevice {
            id: None,
            queue_depth: 4096,
            max_io_bytes: MAX_IO_BYTES,
            flags: Flags::NONE,
        };
        check_add(&good).unwrap();
        check_add(&AddDevice { queue_depth: 1, max_io_bytes: 4096, ..good }).unwrap();
        for bad in [
            AddDevice { queue_depth: 0, ..good },
            AddDevice { queue_depth: 4097, ..good },
            AddDevice { max_io_bytes: 0, ..good },
            AddDevice { max_io_bytes: 4097, ..good },
            AddDevice { max_io_bytes: MAX_IO_BYTES + 4096, ..good },
        ] {
            assert!(matches!(check_add(&bad), Err(UblkError::BadParam { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_refused_recovery_is_judged_by_the_state_of_the_device() {
        let info = |state, flags| DeviceInfo {
            id: DeviceId(4),
            queues: 1,
            queue_depth: 64,
            max_io_bytes: 1 << 20,
            state,
            pid: -1,
            flags,
        };
        let refusal = |errno| {
            let act = Act::StartRecovery;
            let site = Site { act, device: Some(DeviceId(4)), kernel: "6.12" };
            site.error(DeviceId(4).char_path(), errno)
        };
        let begun = info(DeviceState::Quiesced, Flags::RECOVERY | Flags::CMD_IOCTL_ENCODE);
        recovery_refused(&begun, refusal(libc::EINVAL)).unwrap();
        let error = recovery_refused(&begun, refusal(libc::EBUSY)).unwrap_err();
        assert!(matches!(error, UblkError::Busy { .. }), "{error:?}");
        let foreign = info(DeviceState::Quiesced, Flags::USER_RECOVERY);
        let error = recovery_refused(&foreign, refusal(libc::EINVAL)).unwrap_err();
        assert!(matches!(error, UblkError::Command { .. }), "{error:?}");
        for errno in [libc::EINVAL, libc::EBUSY] {
            let dead = info(DeviceState::Dead, Flags::RECOVERY);
            let error = recovery_refused(&dead, refusal(errno)).unwrap_err();
            assert!(matches!(error, UblkError::WrongState { .. }), "{error:?}");
            let live = info(DeviceState::Live, Flags::RECOVERY);
            recovery_refused(&live, refusal(errno)).unwrap_err();
        }
    }

    #[test]
    fn states_are_known_or_refused() {
        let table = [
            (0, Some(DeviceState::Dead)),
            (1, Some(DeviceState::Live)),
            (2, Some(DeviceState::Quiesced)),
            (3, Some(DeviceState::FailIo)),
            (4, None),
            (u16::MAX, None),
        ];
        for (state, expected) in table {
            let raw = RawDevInfo { state, dev_id: 9, flags: 0x18, ..RawDevInfo::default() };
            match (DeviceInfo::decode(&raw), expected) {
                (Ok(info), Some(expected)) => {
                    assert_eq!(info.state, expected);
                    assert_eq!((info.id, info.flags), (DeviceId(9), Flags::RECOVERY));
                }
                (Err(UblkError::UnknownState { state: found, .. }), None) => {
                    assert_eq!(found, state);
                }
                (found, _) => panic!("{state}: {found:?}"),
            }
        }
    }
}
