//! Options as the rest of the program sees them: typed, scaled, with defaults filled in.
//!
//! Numbers are in the unit their name ends in. Which names exist, their ranges and their defaults
//! stand in one place only, the table in `table.rs`; the structs here are filled from it.
//! Option values that name a policy are enums of their own, because the words of the
//! configuration language outlive the words of the engine; the commands translate.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::ast::{Setting, Value};
use super::table::{self, Section};

/// Declares an enum whose variants have names in the configuration language.
macro_rules! choices {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            /// All names, as allowed in a configuration.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The value of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                [$(Self::$variant),+].into_iter().find(|value| value.name() == name)
            }

            /// The name in a configuration.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

choices! {
    /// When a write is complete.
    Protocol {
        /// On the local disk and in the send buffer.
        A = "A",
        /// On the local disk and received by the peer.
        B = "B",
        /// On both disks.
        C = "C",
    }
}

choices! {
    /// Split-brain recovery when neither node is Primary, apart from `discard-node-HOST`.
    AfterSb0Choice {
        /// Stay apart.
        Disconnect = "disconnect",
        /// The one that became Primary later loses.
        DiscardYoungerPrimary = "discard-younger-primary",
        /// The one that became Primary earlier loses.
        DiscardOlderPrimary = "discard-older-primary",
        /// The one that wrote nothing loses, if there is exactly one.
        DiscardZeroChanges = "discard-zero-changes",
        /// The one that wrote less loses.
        DiscardLeastChanges = "discard-least-changes",
        /// This node loses.
        DiscardLocal = "discard-local",
        /// The peer loses.
        DiscardRemote = "discard-remote",
    }
}

/// Split-brain recovery when neither node is Primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterSb0Pri {
    /// One of the fixed policies.
    Choice(AfterSb0Choice),
    /// The named host loses.
    DiscardNode(String),
}

choices! {
    /// Split-brain recovery when one node is Primary.
    AfterSb1Pri {
        /// Stay apart.
        Disconnect = "disconnect",
        /// The Secondary loses if the policy for no Primary agrees.
        Consensus = "consensus",
        /// What the policy for no Primary says, even against the Primary.
        ViolentlyAs0p = "violently-as0p",
        /// The Secondary loses.
        DiscardSecondary = "discard-secondary",
        /// As `consensus`; if the Primary loses, its handler runs.
        CallPriLostAfterSb = "call-pri-lost-after-sb",
    }
}

choices! {
    /// Split-brain recovery when both nodes are Primary.
    AfterSb2Pri {
        /// Stay apart.
        Disconnect = "disconnect",
        /// What the policy for no Primary says, even against a Primary.
        ViolentlyAs0p = "violently-as0p",
        /// The loser's handler runs.
        CallPriLostAfterSb = "call-pri-lost-after-sb",
    }
}

choices! {
    /// What to do when the direction of a resync contradicts the roles.
    RrConflict {
        /// Stay apart.
        Disconnect = "disconnect",
        /// Resync onto the Primary.
        Violently = "violently",
        /// The Primary's handler runs.
        CallPriLost = "call-pri-lost",
    }
}

choices! {
    /// Digest of the mutual authentication.
    CramHmacAlg {
        /// HMAC-MD5.
        Md5 = "md5",
        /// HMAC-SHA-1.
        Sha1 = "sha1",
        /// HMAC-SHA-256.
        Sha256 = "sha256",
        /// HMAC-SHA-512.
        Sha512 = "sha512",
    }
}

choices! {
    /// Reaction to an error of the backing disk.
    OnIoError {
        /// Mark out of sync and return the error.
        PassOn = "pass_on",
        /// Run the handler.
        CallLocalIoError = "call-local-io-error",
        /// Drop the disk and go on with the peer's.
        Detach = "detach",
    }
}

choices! {
    /// What a Primary does that has lost its last good copy.
    OnNoDataAccessible {
        /// Fail requests.
        IoError = "io-error",
        /// Keep requests until data are back.
        SuspendIo = "suspend-io",
    }
}

choices! {
    /// How the device is offered to this host. Ours.
    Frontend {
        /// A block device `/dev/ublkbN`.
        Ublk = "ublk",
        /// A network block device server.
        Nbd = "nbd",
    }
}

choices! {
    /// The answer to the usage survey, which nothing here ever sends.
    UsageCount {
        /// Consent.
        Yes = "yes",
        /// Refusal.
        No = "no",
        /// Undecided.
        Ask = "ask",
    }
}

/// Where the NBD server listens. Ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A socket in the file system, an absolute path.
    Unix(PathBuf),
    /// An address and port of the loopback interface.
    Tcp(SocketAddr),
}

impl NbdAddress {
    /// Reads `unix:/path` or `127.0.0.1:port`, `[::1]:port`.
    ///
    /// NBD has no authentication, so addresses other hosts can reach are no addresses.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            return path.starts_with('/').then(|| Self::Unix(PathBuf::from(path)));
        }
        let address: SocketAddr = text.parse().ok()?;
        (address.ip().is_loopback() && address.port() != 0).then_some(Self::Tcp(address))
    }
}

/// A secret that does not show in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The bytes of the secret.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Options of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// When a write is complete.
    pub protocol: Protocol,
    /// The peer must answer a request within this, in tenths of a second.
    pub timeout_tenths: u32,
    /// Time of silence before a ping, in seconds.
    pub ping_int_s: u32,
    /// Time for the answer to a ping, in tenths of a second.
    pub ping_timeout_tenths: u32,
    /// Time between attempts to connect, in seconds.
    pub connect_int_s: u32,
    /// Time for the check of a second connection, in tenths of a second; 0 = `ping_timeout`.
    pub socket_check_timeout_tenths: u32,
    /// Timeouts without progress before the peer is given up; 0 = never.
    pub ko_count: u32,
    /// Most writes between two barriers.
    pub max_epoch_size: u32,
    /// Receive buffers, in pages of 4 KiB.
    pub max_buffers_pages: u32,
    /// Send buffer of the socket, in bytes; 0 = the system decides.
    pub sndbuf_size_bytes: u32,
    /// Receive buffer of the socket, in bytes; 0 = the system decides.
    pub rcvbuf_size_bytes: u32,
    /// Digest of the mutual authentication; none = no authentication.
    pub cram_hmac_alg: Option<CramHmacAlg>,
    /// Secret of the mutual authentication.
    pub shared_secret: Option<Secret>,
    /// Split-brain recovery without a Primary.
    pub after_sb_0pri: AfterSb0Pri,
    /// Split-brain recovery with one Primary.
    pub after_sb_1pri: AfterSb1Pri,
    /// Split-brain recovery with two Primaries.
    pub after_sb_2pri: AfterSb2Pri,
    /// Resync direction against roles.
    pub rr_conflict: RrConflict,
    /// Apply the policies even to data that never had a common ancestor.
    pub always_asbp: bool,
    /// Run-length coded bitmap exchange.
    pub use_rle: bool,
    /// Digest announced for online verify.
    pub verify_alg: Option<String>,
    /// Collect packets before sending.
    pub tcp_cork: bool,
    /// A flush waits for the peer's disk. Ours; default yes with protocol C, no with A and B.
    pub flush_wait_peer: bool,
}

/// Options of one volume's disk and of its resync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Upper limit of the usable size, in sectors; 0 = all.
    pub size_sectors: u64,
    /// Reaction to an error.
    pub on_io_error: OnIoError,
    /// Order write epochs by flushes.
    pub disk_flushes: bool,
    /// Order write epochs by waiting.
    pub disk_drain: bool,
    /// Flush metadata writes.
    pub md_flushes: bool,
    /// Active extents of 4 MiB.
    pub al_extents: u32,
    /// Keep the activity log up to date.
    pub al_updates: bool,
    /// Fixed resync rate, KiB/s.
    pub resync_rate_kib: u32,
    /// Look-ahead of the controller, in tenths of a second; 0 = fixed rate.
    pub c_plan_ahead_tenths: u32,
    /// Delay aimed at, in tenths of a second, used when the fill target is 0.
    pub c_delay_target_tenths: u32,
    /// Data in flight aimed at, in sectors.
    pub c_fill_target_sectors: u32,
    /// Most resync, KiB/s; 0 = no limit.
    pub c_max_rate_kib: u32,
    /// Least resync under application load, KiB/s; 0 = never throttled.
    pub c_min_rate_kib: u32,
}

/// Options of the resource as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceOptions {
    /// Last good copy lost.
    pub on_no_data_accessible: OnNoDataAccessible,
    /// How the device is offered. Ours.
    pub frontend: Frontend,
    /// Requests in flight per queue. Ours.
    pub queue_depth: u16,
    /// Largest request, in bytes, a multiple of 4096. Ours.
    pub max_io_size_bytes: u32,
    /// Where the NBD server listens; none = the engine's own choice. Ours.
    pub nbd_address: Option<NbdAddress>,
}

/// Who is made Primary at boot, by the historic `become-primary-on`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BecomePrimaryOn {
    /// Nobody.
    Nobody,
    /// Both nodes.
    Both,
    /// The named hosts.
    Hosts(Vec<String>),
}

/// Options of waiting at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartupOptions {
    /// Wait for the peer, in seconds; 0 = for ever.
    pub wfc_timeout_s: u32,
    /// The same if the node was alone before the reboot; 0 = for ever.
    pub degr_wfc_timeout_s: u32,
    /// The same if the peer was outdated; 0 = for ever.
    pub outdated_wfc_timeout_s: u32,
    /// Go on waiting after a split brain.
    pub wait_after_sb: bool,
    /// Promotion at boot. Not acted upon; kept for a boot unit that opts in.
    pub become_primary_on: BecomePrimaryOn,
}

/// Options of the `global` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalOptions {
    /// The answer to a survey that is never sent.
    pub usage_count: UsageCount,
    /// Do not require the local address on an interface.
    pub disable_ip_verification: bool,
    /// Links by resource name always end in a volume number.
    pub udev_always_use_vnr: bool,
    /// Time between redraws of the boot dialog, in seconds; 0 = none.
    pub dialog_refresh_s: u32,
    /// Historic module parameter, printed by a script command.
    pub minor_count: u32,
}

/// The settings that hold for one object, after inheritance.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layers<'a> {
    settings: BTreeMap<&'static str, &'a Setting>,
}

impl<'a> Layers<'a> {
    /// Lays `settings` over what is there.
    pub(crate) fn over(mut self, settings: &'a [Setting]) -> Self {
        self.settings.extend(settings.iter().map(|setting| (setting.spec.name, setting)));
        self
    }

    /// The setting of that name.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Setting> {
        self.settings.get(name).copied()
    }

    fn flag(&self, section: Section, name: &str) -> bool {
        match self.get(name).map(|setting| &setting.value) {
            Some(Value::Flag(flag)) => *flag,
            Some(_) => unreachable!("the table says that {name} is a flag"),
            None => table::default_flag(section, name),
        }
    }

    fn wide(&self, section: Section, name: &str) -> u64 {
        match self.get(name).map(|setting| &setting.value) {
            Some(Value::Number(number)) => *number,
            Some(_) => unreachable!("the table says that {name} is a number"),
            None => table::default_number(section, name),
        }
    }

    fn number(&self, section: Section, name: &str) -> u32 {
        let number = self.wide(section, name);
        u32::try_from(number).expect("the range in the table ends below 2^32")
    }

    /// The text of a setting; an empty one counts as not given.
    fn text(&self, name: &str) -> Option<&'a str> {
        match self.get(name).map(|setting| &setting.value) {
            Some(Value::Text(text)) => Some(text.as_str()).filter(|text| !text.is_empty()),
            Some(_) => unreachable!("the table says that {name} is text"),
            None => None,
        }
    }

    /// The choice taken, or the default. The table lists the names of the same enum.
    fn choice<T>(&self, name: &str, from_name: fn(&str) -> Option<T>, default: T) -> T {
        let Some(text) = self.text(name) else { return default };
        from_name(text).expect("the table allows the names of this enum only")
    }
}

impl NetOptions {
    /// Fills the struct.
    pub(crate) fn new(net: &Layers<'_>) -> Self {
        let flag = |name| net.flag(Section::Net, name);
        let number = |name| net.number(Section::Net, name);
        let protocol = net.choice("protocol", Protocol::from_name, Protocol::C);
        let flush_wait_peer = match net.get("flush-wait-peer") {
            Some(_) => flag("flush-wait-peer"),
            None => protocol == Protocol::C,
        };
        Self {
            protocol,
            timeout_tenths: number("timeout"),
            ping_int_s: number("ping-int"),
            ping_timeout_tenths: number("ping-timeout"),
            connect_int_s: number("connect-int"),
            socket_check_timeout_tenths: number("socket-check-timeout"),
            ko_count: number("ko-count"),
            max_epoch_size: number("max-epoch-size"),
            max_buffers_pages: number("max-buffers"),
            sndbuf_size_bytes: number("sndbuf-size"),
            rcvbuf_size_bytes: number("rcvbuf-size"),
            cram_hmac_alg: net.text("cram-hmac-alg").and_then(CramHmacAlg::from_name),
            shared_secret: net.text("shared-secret").map(|text| Secret(text.to_owned())),
            after_sb_0pri: after_sb_0pri(net),
            after_sb_1pri: net.choice(
                "after-sb-1pri",
                AfterSb1Pri::from_name,
                AfterSb1Pri::Disconnect,
            ),
            after_sb_2pri: net.choice(
                "after-sb-2pri",
                AfterSb2Pri::from_name,
                AfterSb2Pri::Disconnect,
            ),
            // Two more names of version 9 are in the table; both are warned about and mean this.
            rr_conflict: net
                .text("rr-conflict")
                .and_then(RrConflict::from_name)
                .unwrap_or(RrConflict::Disconnect),
            always_asbp: flag("always-asbp"),
            use_rle: flag("use-rle"),
            verify_alg: net.text("verify-alg").map(str::to_owned),
            tcp_cork: flag("tcp-cork"),
            flush_wait_peer,
        }
    }
}

/// The policy for no Primary, with the name of a host in it or not.
fn after_sb_0pri(net: &Layers<'_>) -> AfterSb0Pri {
    let Some(text) = net.text("after-sb-0pri") else {
        return AfterSb0Pri::Choice(AfterSb0Choice::Disconnect);
    };
    match AfterSb0Choice::from_name(text) {
        Some(choice) => AfterSb0Pri::Choice(choice),
        None => {
            let host = text.strip_prefix(table::DISCARD_NODE);
            AfterSb0Pri::DiscardNode(host.expect("the table allows nothing else").to_owned())
        }
    }
}

impl DiskOptions {
    /// Fills the struct.
    pub(crate) fn new(disk: &Layers<'_>) -> Self {
        let flag = |name| disk.flag(Section::Disk, name);
        let number = |name| disk.number(Section::Disk, name);
        Self {
            size_sectors: disk.wide(Section::Disk, "size"),
            on_io_error: disk.choice("on-io-error", OnIoError::from_name, OnIoError::Detach),
            disk_flushes: flag("disk-flushes"),
            disk_drain: flag("disk-drain"),
            md_flushes: flag("md-flushes"),
            al_extents: number("al-extents"),
            al_updates: flag("al-updates"),
            resync_rate_kib: number("resync-rate"),
            c_plan_ahead_tenths: number("c-plan-ahead"),
            c_delay_target_tenths: number("c-delay-target"),
            c_fill_target_sectors: number("c-fill-target"),
            c_max_rate_kib: number("c-max-rate"),
            c_min_rate_kib: number("c-min-rate"),
        }
    }
}

impl ResourceOptions {
    /// Fills the struct.
    pub(crate) fn new(options: &Layers<'_>) -> Self {
        let depth = options.number(Section::Options, "queue-depth");
        Self {
            on_no_data_accessible: options.choice(
                "on-no-data-accessible",
                OnNoDataAccessible::from_name,
                OnNoDataAccessible::IoError,
            ),
            frontend: options.choice("frontend", Frontend::from_name, Frontend::Ublk),
            queue_depth: u16::try_from(depth).expect("the range in the table ends at 4096"),
            max_io_size_bytes: options.number(Section::Options, "max-io-size"),
            nbd_address: options.text("nbd-address").and_then(NbdAddress::parse),
        }
    }
}

impl StartupOptions {
    /// Fills the struct.
    pub(crate) fn new(startup: &Layers<'_>) -> Self {
        let number = |name| startup.number(Section::Startup, name);
        Self {
            wfc_timeout_s: number("wfc-timeout"),
            degr_wfc_timeout_s: number("degr-wfc-timeout"),
            outdated_wfc_timeout_s: number("outdated-wfc-timeout"),
            wait_after_sb: startup.flag(Section::Startup, "wait-after-sb"),
            become_primary_on: become_primary_on(startup),
        }
    }
}

/// The hosts of `become-primary-on`.
fn become_primary_on(startup: &Layers<'_>) -> BecomePrimaryOn {
    match startup.get("become-primary-on").map(|setting| &setting.value) {
        None => BecomePrimaryOn::Nobody,
        Some(Value::List(hosts)) if hosts.iter().any(|host| host == "both") => {
            BecomePrimaryOn::Both
        }
        Some(Value::List(hosts)) => BecomePrimaryOn::Hosts(hosts.clone()),
        Some(_) => unreachable!("the table says that become-primary-on is a list"),
    }
}

impl GlobalOptions {
    /// Fills the struct.
    pub(crate) fn new(global: &Layers<'_>) -> Self {
        let flag = |name| global.flag(Section::Global, name);
        Self {
            usage_count: global.choice("usage-count", UsageCount::from_name, UsageCount::Ask),
            disable_ip_verification: flag("disable-ip-verification"),
            udev_always_use_vnr: flag("udev-always-use-vnr"),
            dialog_refresh_s: global.number(Section::Global, "dialog-refresh"),
            minor_count: global.number(Section::Global, "minor-count"),
        }
    }
}
