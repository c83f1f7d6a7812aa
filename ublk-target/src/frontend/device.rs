//! Block devices of the volumes, each with one ublk queue on the engine's ring.
//!
//! Making, starting, resizing and removing a device are steps on helper threads ([`super::steps`]);
//! between them this module compares what is with what is wanted and starts the next step. A device
//! that an engine left behind when it died is taken over with the requests that wait in it. If this
//! node was Primary then, it has to become Primary again before: else they would fail. From the
//! start of the engine on, such a device counts as one that may be in use; nothing but the end of
//! the resource takes it away. If it cannot be put into service, this process ends and leaves it
//! to the next one.
//!
//! Invariants kept: FE-1 (one size until a resize), FE-2 (requests of an engine that died are done
//! again), ORD-6 (the kernel copies a write into the slot's buffer before it is seen here, and the
//! buffer stays as it is until the answer).

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use replication_core::config::EngineConfig;
use replication_core::control::Command;
use replication_core::event::{Event, HostOp, HostRequest, HostTag, VolumeIx};
use replication_core::units::{Errno, Sector, SectorRange, Span, Time};

use super::Shape;
use super::steps::{Added, DeviceNews, Resize, Site};
use crate::engine::Shared;
use crate::holders::{Usage, Users};
use crate::ring::{Completion, Owner};
use crate::ublk::{DeviceId, Queue, Wakeup};
use crate::worker::{Mailbox, News};

/// Pause before a step that failed, or a promotion that was refused, is tried again.
const RETRY: Span = Span::from_secs(1);

/// Where a device is in its life. A helper thread is at work in the states that end in `-ing`.
#[derive(Debug)]
enum Phase {
    Absent,
    Adding,
    /// Taken over; requests wait until this node is Primary.
    Waiting,
    Starting,
    Live,
    Resizing(Shape),
    Stopping {
        /// Its tags are with the kernel.
        is_begun: bool,
    },
    /// The kernel gives the slots back.
    Stopped,
    Deleting,
}

/// What a request slot is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Not with the kernel.
    Idle,
    /// The kernel may put a request there.
    Parked,
    /// A request is with the core.
    Busy { bytes: u32, then_flush: bool },
}

#[derive(Debug)]
struct Device {
    site: Site,
    wanted: Shape,
    actual: Shape,
    phase: Phase,
    queue: Option<Rc<Queue>>,
    id: Option<DeviceId>,
    slots: Vec<Slot>,
    recovered: bool,
    /// Left by an engine that ended, and not looked at so far.
    left: Option<DeviceId>,
    /// This node was Primary when its last engine ended; unknown as long as no metadata was read.
    was_primary: Option<bool>,
    /// The kernel cannot resize it live.
    must_recreate: bool,
    retry_at: Option<Time>,
    error: String,
}

/// The block devices of all volumes.
#[derive(Debug)]
pub struct Devices {
    devices: Vec<Device>,
    mailbox: Mailbox,
    max_io: usize,
    stopping: bool,
    promoting: bool,
    promote_at: Option<Time>,
    refusal: String,
    /// A device that was taken over cannot be put into service.
    failure: Option<anyhow::Error>,
}

impl Devices {
    pub(super) fn new(
        config: &EngineConfig,
        users: Arc<Users>,
        mailbox: Mailbox,
        dev: &Path,
    ) -> Self {
        let device = |volume: (u8, &replication_core::config::VolumeConfig)| Device {
            site: Site::new(config, volume, &users, dev),
            wanted: NOTHING,
            actual: NOTHING,
            phase: Phase::Absent,
            queue: None,
            id: None,
            slots: vec![Slot::Idle; usize::from(config.queue_depth)],
            recovered: false,
            left: None,
            was_primary: None,
            must_recreate: false,
            retry_at: None,
            error: String::new(),
        };
        let volumes = &config.resource.volumes;
        let mut devices: Vec<_> = (0_u8..).zip(volumes).map(device).collect();
        for device in &mut devices {
            device.left = device.site.links.target();
            if let Some(id) = device.left {
                // Until it was taken over, nobody knows whether it is in use.
                users.set_device(device.site.volume.at(), Some(id.block_path()));
            }
        }
        Self {
            devices,
            mailbox,
            max_io: usize::try_from(config.max_io_size).expect("a size has 32 bits"),
            stopping: false,
            promoting: false,
            promote_at: None,
            refusal: String::new(),
            failure: None,
        }
    }

    pub(super) fn set_shape(&mut self, volume: VolumeIx, shape: Shape) {
        let device = &mut self.devices[volume.at()];
        device.wanted = shape;
        device.retry_at = None;
    }

    pub(super) fn set_was_primary(&mut self, volume: VolumeIx, was_primary: bool) {
        self.devices[volume.at()].was_primary = Some(was_primary);
    }

    pub(super) fn check_block_size(
        &self,
        volume: VolumeIx,
        logical_block: u32,
    ) -> Result<(), String> {
        let device = &self.devices[volume.at()];
        // A device that is being made goes by the size that the disk had then.
        let promised = match device.phase {
            Phase::Absent | Phase::Deleting => return Ok(()),
            Phase::Adding => device.wanted.logical_block,
            Phase::Waiting
            | Phase::Starting
            | Phase::Live
            | Phase::Resizing(_)
            | Phase::Stopping { .. }
            | Phase::Stopped => device.actual.logical_block,
        };
        if logical_block <= promised {
            return Ok(());
        }
        Err(format!(
            "the disk has blocks of {logical_block} bytes, the block device that is in service \
             has blocks of {promised}: take the resource down and up again to attach it"
        ))
    }

    pub(super) fn failure(&mut self) -> Option<anyhow::Error> {
        self.failure.take()
    }

    pub(super) fn stop(&mut self) {
        self.stopping = true;
        for device in &mut self.devices {
            device.wanted = NOTHING;
            device.retry_at = None;
        }
    }

    /// Whether requests of a device are taken.
    pub(super) fn is_live(&self, volume: VolumeIx) -> bool {
        matches!(self.devices[volume.at()].phase, Phase::Live | Phase::Resizing(_))
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopping && self.devices.iter().all(|device| matches!(device.phase, Phase::Absent))
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let retries = self.devices.iter().filter_map(|device| device.retry_at);
        retries.chain(self.promote_at).min()
    }

    /// Starts the next step wherever what is differs from what is wanted.
    pub(super) fn pump(&mut self, shared: &mut Shared) -> bool {
        let mut progress = false;
        for device in &mut self.devices {
            if device.retry_at.is_some_and(|at| at > shared.now()) {
                continue;
            }
            device.retry_at = None;
            progress |= device.step(&self.mailbox, shared.now(), self.stopping);
        }
        progress
    }

    /// This node has to be Primary before the requests of a device that was taken over may come.
    pub(super) fn next_command(&mut self, shared: &Shared) -> Option<Command> {
        let due = self.promote_at.is_none_or(|at| at <= shared.now());
        let waiting = self.devices.iter().any(|device| matches!(device.phase, Phase::Waiting));
        if !waiting || self.promoting || self.stopping || !due {
            return None;
        }
        self.promoting = true;
        self.promote_at = None;
        Some(Command::Primary { force: false })
    }

    pub(super) fn on_reply(&mut self, shared: &mut Shared, result: Result<(), String>) {
        self.promoting = false;
        match result {
            Ok(()) => {
                for index in 0..self.devices.len() {
                    if matches!(self.devices[index].phase, Phase::Waiting) {
                        self.begin(shared, index);
                    }
                }
            }
            Err(refusal) => {
                if refusal != self.refusal {
                    tracing::error!(
                        "requests wait in a device that was taken over, but this node cannot \
                         become Primary: {refusal}; trying again"
                    );
                    self.refusal = refusal;
                }
                self.promote_at = Some(shared.now() + RETRY);
            }
        }
    }

    pub(super) fn on_news(&mut self, shared: &mut Shared, news: DeviceNews) {
        let now = shared.now();
        match news {
            DeviceNews::Added { volume, result } => {
                let device = &mut self.devices[volume.at()];
                match result {
                    Ok(Added { queue, shape, recovered }) => {
                        device.id = Some(queue.id());
                        device.queue = Some(Rc::new(queue));
                        device.actual = shape;
                        device.recovered = recovered.is_some();
                        device.left = None;
                        device.error.clear();
                        device.phase = Phase::Waiting;
                        let waits =
                            recovered.is_some_and(|usage| needs_primary(usage, device.was_primary));
                        if !waits {
                            self.begin(shared, volume.at());
                        }
                    }
                    Err(error) => device.fail(Phase::Absent, &error, now),
                }
            }
            DeviceNews::Started { volume, result } => match result {
                Ok(()) => self.devices[volume.at()].phase = Phase::Live,
                Err(error) => self.on_start_failed(volume.at(), error, now),
            },
            DeviceNews::Resized { volume, result } => self.on_resized(volume, result, now),
            DeviceNews::Stopped { volume, result } => {
                let device = &mut self.devices[volume.at()];
                let Phase::Stopping { is_begun } = device.phase else {
                    panic!("{volume:?} was being stopped")
                };
                match result {
                    Ok(()) => device.phase = Phase::Stopped,
                    Err(error) => {
                        let phase = if is_begun { Phase::Live } else { Phase::Waiting };
                        device.fail(phase, &error, now);
                    }
                }
            }
            DeviceNews::Deleted { volume, result } => {
                let device = &mut self.devices[volume.at()];
                device.phase = Phase::Absent;
                device.id = None;
                device.actual = NOTHING;
                device.must_recreate = false;
                if let Err(error) = result {
                    device.fail(Phase::Absent, &error, now);
                }
            }
        }
    }

    fn on_resized(&mut self, volume: VolumeIx, result: Result<Resize>, now: Time) {
        let device = &mut self.devices[volume.at()];
        let Phase::Resizing(shape) = device.phase else { panic!("{volume:?} was being resized") };
        device.phase = Phase::Live;
        match result {
            Ok(Resize::Done) => device.actual = shape,
            Ok(Resize::Recreate) => device.must_recreate = true,
            Ok(Resize::InUse(holder)) => {
                let error = anyhow::anyhow!(
                    "the new size waits until the device is closed ({holder}): this kernel cannot \
                     resize it in use"
                );
                device.fail(Phase::Live, &error, now);
            }
            Err(error) => device.fail(Phase::Live, &error, now),
        }
    }

    /// Parks all tags, then lets the device appear.
    fn begin(&mut self, shared: &mut Shared, index: usize) {
        let device = &mut self.devices[index];
        let queue = Rc::clone(device.queue.as_ref().expect("an added device has a queue"));
        device.phase = Phase::Starting;
        for tag in 0..queue.depth() {
            device.park(shared, &queue, HostTag(tag), None, self.max_io);
        }
        let (site, volume) = (device.site.clone(), device.site.volume);
        let (id, recovered) = (queue.id(), device.recovered);
        let work = move || {
            let result = site.start(id, recovered);
            News::Device(DeviceNews::Started { volume, result })
        };
        if let Err(error) = self.mailbox.spawn("ublk start", work) {
            self.on_start_failed(index, error, shared.now());
        }
    }

    /// A new device is made once more. One that was taken over is not touched: requests wait in
    /// it, and only the end of this process gives it back to the kernel as it was.
    fn on_start_failed(&mut self, index: usize, error: anyhow::Error, now: Time) {
        let device = &mut self.devices[index];
        if device.recovered {
            let text = "a device with requests stays as it is for the next engine";
            self.failure = Some(error.context(text));
            return;
        }
        device.fail(Phase::Live, &error, now);
        device.must_recreate = true;
    }

    /// A command of a queue has completed.
    pub(super) fn on_command(
        &mut self,
        shared: &mut Shared,
        volume: VolumeIx,
        tag: HostTag,
        completion: &Completion,
    ) {
        let device = &mut self.devices[volume.at()];
        let place = usize::from(tag.0);
        assert!(device.slots[place] == Slot::Parked, "only parked tags are woken");
        device.slots[place] = Slot::Idle;
        match Wakeup::from_result(completion.result) {
            Wakeup::Request => self.on_request(shared, volume, tag),
            Wakeup::Stopping => {}
            Wakeup::Failed { result } => {
                tracing::error!(
                    "drbd{}: ublk command of tag {} failed: errno {}",
                    device.site.minor,
                    tag.0,
                    result.saturating_neg()
                );
            }
        }
    }

    fn on_request(&mut self, shared: &mut Shared, volume: VolumeIx, tag: HostTag) {
        let max_io = self.max_io;
        let device = &mut self.devices[volume.at()];
        let queue = Rc::clone(device.queue.as_ref().expect("a woken tag has its queue"));
        let request = match queue.descriptor(tag.0) {
            Ok(request) => request,
            Err(refused) => {
                tracing::warn!("{}: {refused}", queue.id());
                device.park(shared, &queue, tag, Some(Err(refused.errno())), max_io);
                return;
            }
        };
        let bytes = request.range.bytes();
        let carries_data = matches!(request.op, HostOp::Read | HostOp::Write { .. });
        let too_long = carries_data && usize::try_from(bytes).is_ok_and(|bytes| bytes > max_io);
        if request.range.end > device.limit().0 || too_long {
            device.park(shared, &queue, tag, Some(Err(Errno::EIO)), max_io);
            return;
        }
        let is_write = matches!(request.op, HostOp::Write { .. });
        let then_flush = request.fua && !is_write && request.op != HostOp::Flush;
        let bytes = if carries_data { u32::try_from(bytes).expect("bounded by max_io") } else { 0 };
        device.slots[usize::from(tag.0)] = Slot::Busy { bytes, then_flush };
        let buf = shared.ring.arena().layout().tag_buf(volume, tag);
        let range = request.range;
        shared.tell(Event::Host(HostRequest { volume, tag, op: request.op, range, buf }));
    }

    pub(super) fn complete(
        &mut self,
        shared: &mut Shared,
        volume: VolumeIx,
        tag: HostTag,
        result: Result<(), Errno>,
    ) {
        let device = &mut self.devices[volume.at()];
        let place = usize::from(tag.0);
        let Slot::Busy { bytes, then_flush } = device.slots[place] else {
            panic!("slot {place} was completed but is {:?}", device.slots[place]);
        };
        if then_flush && result.is_ok() {
            device.slots[place] = Slot::Busy { bytes, then_flush: false };
            let buf = shared.ring.arena().layout().tag_buf(volume, tag);
            let range = SectorRange::default();
            shared.tell(Event::Host(HostRequest { volume, tag, op: HostOp::Flush, range, buf }));
            return;
        }
        let queue = Rc::clone(device.queue.as_ref().expect("a busy slot has its queue"));
        device.park(shared, &queue, tag, Some(result.map(|()| bytes)), self.max_io);
    }
}

/// No device.
const NOTHING: Shape =
    Shape { sectors: Sector(0), logical_block: 512, physical_block: 4096, discard: false };

/// Whether this node has to be Primary before a device is put into service that an engine which
/// died has left. Whoever claimed it (a file system, a device on top) has got data through it, so
/// this node was Primary, whatever the disk says: it may have been lost on the way. That somebody
/// has it merely open says so only if there is no metadata to ask.
fn needs_primary(usage: Usage, was_primary: Option<bool>) -> bool {
    match (usage, was_primary) {
        (Usage::Claimed, _) | (_, Some(true)) | (Usage::Open, None) => true,
        (Usage::Open, Some(false)) | (Usage::Unused, None | Some(false)) => false,
    }
}

impl Device {
    /// Where the device may end for the kernel: from the moment a new size is being set, requests
    /// can come for it.
    fn limit(&self) -> Sector {
        match self.phase {
            Phase::Resizing(shape) => shape.sectors.max(self.actual.sectors),
            Phase::Absent
            | Phase::Adding
            | Phase::Waiting
            | Phase::Starting
            | Phase::Live
            | Phase::Stopping { .. }
            | Phase::Stopped
            | Phase::Deleting => self.actual.sectors,
        }
    }

    fn park(
        &mut self,
        shared: &mut Shared,
        queue: &Rc<Queue>,
        tag: HostTag,
        answer: Option<Result<u32, Errno>>,
        max_io: usize,
    ) {
        let volume = self.site.volume;
        let buf = shared.ring.arena().layout().tag_buf(volume, tag);
        let owner = Owner::Ublk { volume, tag };
        shared.ring.push_command(queue, tag.0, answer, (buf, max_io), owner);
        self.slots[usize::from(tag.0)] = Slot::Parked;
    }

    fn fail(&mut self, phase: Phase, error: &anyhow::Error, now: Time) {
        let text = format!("{error:#}");
        if text != self.error {
            tracing::error!("drbd{}: {text}", self.site.minor);
            self.error = text;
        }
        self.phase = phase;
        self.retry_at = Some(now + RETRY);
    }

    /// Starts the next step, if one is due. Whether it did.
    fn step(&mut self, mailbox: &Mailbox, now: Time, stopping: bool) -> bool {
        let wanted = self.wanted;
        let must_go = wanted.sectors.0 == 0 || self.must_recreate;
        match self.phase {
            Phase::Absent if stopping && self.left.is_some() => {
                let id = self.left.take().expect("just seen");
                self.spawn(mailbox, now, Phase::Deleting, move |site| DeviceNews::Deleted {
                    volume: site.volume,
                    result: site.remove_left(id),
                });
                true
            }
            Phase::Absent if wanted.sectors.0 > 0 => {
                self.spawn(mailbox, now, Phase::Adding, move |site| DeviceNews::Added {
                    volume: site.volume,
                    result: site.add(wanted),
                });
                true
            }
            Phase::Live | Phase::Waiting if must_go => {
                let id = self.id.expect("a device that exists has a number");
                let phase = Phase::Stopping { is_begun: matches!(self.phase, Phase::Live) };
                self.spawn(mailbox, now, phase, move |site| DeviceNews::Stopped {
                    volume: site.volume,
                    result: site.stop(id),
                });
                true
            }
            Phase::Live if wanted.sectors != self.actual.sectors => {
                let id = self.id.expect("a device that exists has a number");
                let phase = Phase::Resizing(wanted);
                self.spawn(mailbox, now, phase, move |site| DeviceNews::Resized {
                    volume: site.volume,
                    result: site.resize(id, wanted),
                });
                true
            }
            Phase::Stopped if self.slots.iter().all(|slot| *slot == Slot::Idle) => {
                // The kernel removes a device when its queue is closed, and the last command that
                // kept it open has completed.
                self.queue = None;
                let id = self.id.expect("a device that exists has a number");
                self.spawn(mailbox, now, Phase::Deleting, move |site| DeviceNews::Deleted {
                    volume: site.volume,
                    result: Site::delete(id),
                });
                true
            }
            Phase::Absent
            | Phase::Adding
            | Phase::Waiting
            | Phase::Starting
            | Phase::Live
            | Phase::Resizing(_)
            | Phase::Stopping { .. }
            | Phase::Stopped
            | Phase::Deleting => false,
        }
    }

    fn spawn(
        &mut self,
        mailbox: &Mailbox,
        now: Time,
        phase: Phase,
        step: impl FnOnce(&Site) -> DeviceNews + Send + 'static,
    ) {
        let site = self.site.clone();
        match mailbox.spawn("ublk", move || News::Device(step(&site))) {
            Ok(()) => self.phase = phase,
            Err(error) => {
                tracing::error!("drbd{}: {error:#}", self.site.minor);
                self.retry_at = Some(now + RETRY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::worker::channel;

    fn config(dir: &Path) -> EngineConfig {
        let mut config = crate::settings::tests::config(dir);
        config.frontend = replication_core::config::Frontend::Ublk;
        config
    }

    /// The devices of an engine that finds `/dev` as it is in `dir`.
    fn devices(dir: &Path) -> (Devices, Arc<Users>, crate::worker::Inbox) {
        let (mailbox, inbox) = channel().unwrap();
        let users = Arc::new(Users::default());
        let devices = Devices::new(&config(dir), Arc::clone(&users), mailbox, dir);
        (devices, users, inbox)
    }

    const SHAPE: Shape =
        Shape { sectors: Sector(2048), logical_block: 512, physical_block: 4096, discard: true };

    /// Before its recovery has begun, a device that was left behind counts as one of ours.
    #[test]
    fn a_device_that_was_left_behind_is_known_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(devices(dir.path()).1.device_of(0), None);
        symlink("/dev/ublkb4077", dir.path().join("drbd0")).unwrap();
        let (_, users, _) = devices(dir.path());
        assert_eq!(users.device_of(0), Some(DeviceId(4077).block_path()));
    }

    /// A resource that ends takes the device away which no engine has taken over, or says so.
    #[test]
    fn a_device_that_was_left_behind_is_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/dev/ublkb4077", dir.path().join("drbd0")).unwrap();
        let mut shared = Shared::new(&config(dir.path())).unwrap();
        let (mut devices, _, _inbox) = devices(dir.path());
        devices.stop();
        assert!(devices.pump(&mut shared));
        assert!(!devices.is_stopped(), "its removal is under way");
        let result = Err(anyhow::anyhow!("there is no driver"));
        devices.on_news(&mut shared, DeviceNews::Deleted { volume: VolumeIx(0), result });
        assert!(devices.devices[0].error.contains("no driver"));
        assert!(!devices.pump(&mut shared));
        assert!(devices.is_stopped());
    }

    #[test]
    fn who_holds_a_device_decides_together_with_the_metadata() {
        let table = [
            (Usage::Claimed, None, true),
            (Usage::Claimed, Some(false), true),
            (Usage::Claimed, Some(true), true),
            (Usage::Open, None, true),
            (Usage::Open, Some(false), false),
            (Usage::Open, Some(true), true),
            (Usage::Unused, None, false),
            (Usage::Unused, Some(false), false),
            (Usage::Unused, Some(true), true),
        ];
        for (usage, was_primary, waits) in table {
            assert_eq!(needs_primary(usage, was_primary), waits, "{usage:?} {was_primary:?}");
        }
    }

    /// A device with requests in it is never made anew: the process gives it back instead.
    #[test]
    fn a_device_that_was_taken_over_is_not_removed_when_it_cannot_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut shared = Shared::new(&config(dir.path())).unwrap();
        for recovered in [false, true] {
            let (mut devices, _, _inbox) = devices(dir.path());
            devices.set_shape(VolumeIx(0), SHAPE);
            let device = &mut devices.devices[0];
            device.phase = Phase::Starting;
            device.id = Some(DeviceId(4077));
            device.recovered = recovered;
            let result = Err(anyhow::anyhow!("refused"));
            let volume = VolumeIx(0);
            devices.on_news(&mut shared, DeviceNews::Started { volume, result });
            assert_eq!(devices.devices[0].must_recreate, !recovered);
            assert_eq!(devices.failure().is_some(), recovered);
        }
    }

    #[test]
    fn while_the_size_changes_requests_up_to_the_larger_one_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (mut devices, _, _inbox) = devices(dir.path());
        let device = &mut devices.devices[0];
        device.actual = SHAPE;
        device.phase = Phase::Live;
        assert_eq!(device.limit(), Sector(2048));
        for (new, limit) in [(4096, 4096), (1024, 2048)] {
            device.phase = Phase::Resizing(Shape { sectors: Sector(new), ..SHAPE });
            assert_eq!(device.limit(), Sector(limit));
        }
    }

    #[test]
    fn a_disk_with_larger_blocks_than_the_device_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut devices, _, _inbox) = devices(dir.path());
        devices.check_block_size(VolumeIx(0), 4096).unwrap();
        devices.devices[0].actual = SHAPE;
        devices.devices[0].phase = Phase::Live;
        devices.check_block_size(VolumeIx(0), 512).unwrap();
        let refusal = devices.check_block_size(VolumeIx(0), 4096).unwrap_err();
        assert!(refusal.contains("blocks of 4096 bytes"), "{refusal}");
    }

    /// A device whose tags were never with the kernel does not become a live one by that.
    #[test]
    fn a_device_that_waited_goes_on_waiting_if_it_cannot_be_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let mut shared = Shared::new(&config(dir.path())).unwrap();
        for is_begun in [false, true] {
            let (mut devices, _, _inbox) = devices(dir.path());
            devices.devices[0].id = Some(DeviceId(4077));
            devices.devices[0].phase = if is_begun { Phase::Live } else { Phase::Waiting };
            devices.pump(&mut shared);
            let result = Err(anyhow::anyhow!("refused"));
            let volume = VolumeIx(0);
            devices.on_news(&mut shared, DeviceNews::Stopped { volume, result });
            let phase = &devices.devices[0].phase;
            assert_eq!(matches!(phase, Phase::Live), is_begun);
            assert_eq!(matches!(phase, Phase::Waiting), !is_begun);
        }
    }
}
