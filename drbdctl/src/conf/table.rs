//! Every option there is: its section, its kind of value, its range, its default, and whether it
//! has an effect.
//!
//! This table is the only place where an option is spelled. An option without an effect is
//! accepted with a warning; where ignoring it would endanger data it is refused. A value that
//! asks for nothing (`neutral`) is accepted in silence.
//! Rules: the option tables of the notes on the user's surface; `frontend`, `queue-depth`,
//! `max-io-size`, `nbd-address` and `flush-wait-peer` are ours.

use std::fmt;

use replication_core::limits;

use super::options::{
    AfterSb0Choice, AfterSb1Pri, AfterSb2Pri, CramHmacAlg, Frontend, OnIoError, OnNoDataAccessible,
    Protocol, UsageCount,
};

/// Prefix of the split-brain policy that names a host.
pub(crate) const DISCARD_NODE: &str = "discard-node-";

/// A section of options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    Global,
    Startup,
    Options,
    Disk,
    Net,
    Handlers,
    Syncer,
}

impl Section {
    /// All of them.
    pub(crate) const ALL: [Self; 7] = [
        Self::Global,
        Self::Startup,
        Self::Options,
        Self::Disk,
        Self::Net,
        Self::Handlers,
        Self::Syncer,
    ];

    /// The keyword.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Startup => "startup",
            Self::Options => "options",
            Self::Disk => "disk",
            Self::Net => "net",
            Self::Handlers => "handlers",
            Self::Syncer => "syncer",
        }
    }

    /// The options of this section.
    pub(crate) const fn specs(self) -> &'static [Spec] {
        match self {
            Self::Global => GLOBAL,
            Self::Startup => STARTUP,
            Self::Options => OPTIONS,
            Self::Disk => DISK,
            Self::Net => NET,
            Self::Handlers => HANDLERS,
            Self::Syncer => SYNCER,
        }
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The unit of a number. A bare number is in this unit, and so is the scaled one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A count; a suffix multiplies.
    One,
    Bytes,
    Kib,
    Sectors,
    /// Time: no suffix.
    Seconds,
    Tenths,
    Ms,
}

impl Unit {
    /// Bytes of one, or nothing for time.
    pub(crate) const fn bytes(self) -> Option<u64> {
        match self {
            Self::One | Self::Bytes => Some(1),
            Self::Kib => Some(1024),
            Self::Sectors => Some(512),
            Self::Seconds | Self::Tenths | Self::Ms => None,
        }
    }

    /// For messages.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::One => "a plain number",
            Self::Bytes => "bytes",
            Self::Kib => "KiB",
            Self::Sectors => "sectors of 512 bytes",
            Self::Seconds => "seconds",
            Self::Tenths => "tenths of a second",
            Self::Ms => "milliseconds",
        }
    }
}

/// The kind of value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// `yes`, `no`, or nothing.
    Flag { default: bool },
    Number {
        unit: Unit,
        min: u64,
        max: u64,
        default: u64,
        /// The scaled number is a multiple of this.
        step: u64,
        /// Numbers inside of the range and outside of this one are moved to its edge.
        clamp: Option<(u64, u64)>,
    },
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One of these words in either case.
    AnyCase(&'static [&'static str]),
    /// One of these words, or nothing between quotes.
    ChoiceOrEmpty(&'static [&'static str]),
    /// One of these words, or [`DISCARD_NODE`] and a host.
    ChoiceOrHost(&'static [&'static str]),
    /// Anything up to that many characters.
    Text(usize),
    /// `unix:/path` or `ADDRESS:PORT`.
    ListenAddress,
    /// One or more words.
    List,
}

/// Whether the option does something.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effect {
    /// It does.
    Live,
    /// Not yet. Values listed need no warning.
    Idle { neutral: &'static [&'static str] },
    /// Values other than these are refused.
    Refused { allowed: &'static [&'static str] },
    /// It does; the values listed are taken for another one.
    Replaced { values: &'static [&'static str], by: &'static str },
}

/// An option.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) effect: Effect,
}

const LIVE: Effect = Effect::Live;
/// Always worth a warning.
const IDLE: Effect = Effect::Idle { neutral: &[] };

const fn spec(name: &'static str, kind: Kind, effect: Effect) -> Spec {
    Spec { name, kind, effect }
}

const fn flag(name: &'static str, default: bool) -> Spec {
    spec(name, Kind::Flag { default }, LIVE)
}

/// A flag without an effect, whose default needs no warning.
const fn idle_flag(name: &'static str, default: bool) -> Spec {
    let neutral: &[&str] = if default { &["yes"] } else { &["no"] };
    spec(name, Kind::Flag { default }, Effect::Idle { neutral })
}

const fn range(unit: Unit, min: u64, max: u64, default: u64) -> Kind {
    Kind::Number { unit, min, max, default, step: 1, clamp: None }
}

const fn number(name: &'static str, unit: Unit, min: u64, max: u64, default: u64) -> Spec {
    spec(name, range(unit, min, max, default), LIVE)
}

const fn idle_number(name: &'static str, unit: Unit, min: u64, max: u64, default: u64) -> Spec {
    spec(name, range(unit, min, max, default), IDLE)
}

const fn choice(name: &'static str, names: &'static [&'static str]) -> Spec {
    spec(name, Kind::Choice(names), LIVE)
}

const fn idle_choice(
    name: &'static str,
    names: &'static [&'static str],
    neutral: &'static [&'static str],
) -> Spec {
    spec(name, Kind::Choice(names), Effect::Idle { neutral })
}

const fn idle_text(name: &'static str, max: usize) -> Spec {
    spec(name, Kind::Text(max), Effect::Idle { neutral: &[""] })
}

/// Longest command line of a handler.
const HANDLER_MAX: usize = 255;

/// A handler that runs.
const fn handler(name: &'static str) -> Spec {
    spec(name, Kind::Text(HANDLER_MAX), LIVE)
}

/// Options of `global`.
const GLOBAL: &[Spec] = &[
    idle_choice("usage-count", UsageCount::NAMES, &["no"]),
    idle_number("minor-count", Unit::One, 1, 255, 32),
    number("dialog-refresh", Unit::Seconds, 0, 600, 1),
    flag("disable-ip-verification", false),
    flag("udev-always-use-vnr", false),
    idle_number("cmd-timeout-short", Unit::Seconds, 0, 900, 5),
    idle_number("cmd-timeout-medium", Unit::Seconds, 0, 900, 121),
    idle_number("cmd-timeout-long", Unit::Seconds, 0, 900, 600),
];

/// Options of `startup`.
const STARTUP: &[Spec] = &[
    number("wfc-timeout", Unit::Seconds, 0, 300_000, 0),
    number("degr-wfc-timeout", Unit::Seconds, 0, 300_000, 0),
    number("outdated-wfc-timeout", Unit::Seconds, 0, 300_000, 0),
    flag("wait-after-sb", false),
    idle_flag("stacked-timeouts", false),
    spec("become-primary-on", Kind::List, IDLE),
    // Historic, of version 0.6; negative numbers had a meaning of their own.
    idle_text("inittimeout", 16),
    idle_flag("load-only", false),
];

const QUORUM_OFF: Effect = Effect::Refused { allowed: &["off"] };

/// Options of `options`.
const OPTIONS: &[Spec] = &[
    idle_text("cpu-mask", 256),
    choice("on-no-data-accessible", OnNoDataAccessible::NAMES),
    idle_flag("auto-promote", false),
    idle_number("auto-promote-timeout", Unit::Tenths, 0, 600, 20),
    idle_number("peer-ack-window", Unit::Sectors, 2048, 204_800, 4096),
    idle_number("peer-ack-delay", Unit::Ms, 1, 10_000, 100),
    idle_number("twopc-timeout", Unit::Tenths, 50, 600, 300),
    idle_number("twopc-retry-timeout", Unit::Tenths, 1, 50, 1),
    idle_number("max-io-depth", Unit::One, 4, 4_294_967_295, 8000),
    spec("quorum", Kind::Text(16), QUORUM_OFF),
    idle_choice("on-no-quorum", OnNoDataAccessible::NAMES, &[]),
    spec("quorum-minimum-redundancy", Kind::Text(16), QUORUM_OFF),
    idle_choice("on-suspended-primary-outdated", &["disconnect", "force-secondary"], &[]),
    idle_flag("drbd8-api-compatibility", false),
    choice("frontend", Frontend::NAMES),
    number("queue-depth", Unit::One, 1, 4096, 64),
    spec(
        "max-io-size",
        Kind::Number {
            unit: Unit::Bytes,
            min: 4096,
            max: 1 << 20,
            default: 512 << 10,
            step: 4096,
            clamp: None,
        },
        LIVE,
    ),
    spec("nbd-address", Kind::ListenAddress, LIVE),
];

#[allow(clippy::cast_lossless, reason = "`u64::from` cannot be called in a constant")]
const fn wide(limit: u16) -> u64 {
    limit as u64
}

const AL_EXTENTS: Kind = Kind::Number {
    unit: Unit::One,
    min: 1,
    max: 65_536,
    default: wide(limits::AL_EXTENTS_DEFAULT),
    step: 1,
    clamp: Some((wide(limits::AL_EXTENTS_MIN), wide(limits::AL_EXTENTS_MAX))),
};

const READ_BALANCING: &[&str] = &[
    "prefer-local",
    "prefer-remote",
    "round-robin",
    "least-pending",
    "when-congested-remote",
    "32K-striping",
    "64K-striping",
    "128K-striping",
    "256K-striping",
    "512K-striping",
    "1M-striping",
];

/// Largest device, 1 PiB, in sectors.
const MAX_DEVICE_SECTORS: u64 = 1 << 41;

/// Options of `disk`.
const DISK: &[Spec] = &[
    number("size", Unit::Sectors, 0, MAX_DEVICE_SECTORS, 0),
    choice("on-io-error", OnIoError::NAMES),
    idle_flag("disk-barrier", false),
    flag("disk-flushes", true),
    flag("disk-drain", true),
    flag("md-flushes", true),
    idle_text("resync-after", 128),
    spec("al-extents", AL_EXTENTS, LIVE),
    flag("al-updates", true),
    idle_flag("discard-zeroes-if-aligned", true),
    idle_flag("disable-write-same", false),
    spec("disk-timeout", range(Unit::Tenths, 0, 6000, 0), Effect::Idle { neutral: &["0"] }),
    idle_choice("read-balancing", READ_BALANCING, &["prefer-local"]),
    spec(
        "rs-discard-granularity",
        range(Unit::Bytes, 0, 1 << 20, 0),
        Effect::Idle { neutral: &["0"] },
    ),
    number("resync-rate", Unit::Kib, 1, 8_388_608, 250),
    number("c-plan-ahead", Unit::Tenths, 0, 300, 20),
    number("c-delay-target", Unit::Tenths, 1, 100, 10),
    number("c-fill-target", Unit::Sectors, 0, 1_048_576, 100),
    number("c-max-rate", Unit::Kib, 0, 4_194_304, 102_400),
    number("c-min-rate", Unit::Kib, 0, 4_194_304, 250),
    idle_flag("bitmap", true),
    idle_flag("resync-without-replication", true),
    idle_flag("peer-tiebreaker", true),
    idle_number("max-bio-size", Unit::Bytes, 512, 1 << 20, 1 << 20),
    spec("block-size", range(Unit::Bytes, 512, 4096, 512), Effect::Idle { neutral: &["512"] }),
    idle_number("discard-granularity", Unit::Bytes, 0, 4_294_967_295, 4_294_967_295),
    spec("max-bio-bvecs", range(Unit::One, 0, 128, 0), Effect::Idle { neutral: &["0"] }),
    idle_flag("use-bmbv", false),
];

const RR_CONFLICT: &[&str] =
    &["disconnect", "violently", "call-pri-lost", "retry-connect", "auto-discard"];
const ON_CONGESTION: &[&str] = &["block", "pull-ahead", "disconnect"];
const FENCING: &[&str] = &["dont-care", "resource-only", "resource-and-stonith"];
const MAX_SOCKET_BUFFER: u64 = 128 << 20;

/// Options of `net`.
const NET: &[Spec] = &[
    spec("protocol", Kind::AnyCase(Protocol::NAMES), LIVE),
    number("timeout", Unit::Tenths, 1, 600, 60),
    number("ping-int", Unit::Seconds, 1, 120, 10),
    number("ping-timeout", Unit::Tenths, 1, 300, 5),
    number("connect-int", Unit::Seconds, 1, 120, 10),
    number("socket-check-timeout", Unit::Tenths, 0, 300, 0),
    number("ko-count", Unit::One, 0, 200, 7),
    number("max-epoch-size", Unit::One, 1, 20_000, 2048),
    number("max-buffers", Unit::One, 32, 131_072, 2048),
    idle_number("unplug-watermark", Unit::One, 1, 131_072, 128),
    number("sndbuf-size", Unit::Bytes, 0, MAX_SOCKET_BUFFER, 0),
    number("rcvbuf-size", Unit::Bytes, 0, MAX_SOCKET_BUFFER, 0),
    spec(
        "allow-two-primaries",
        Kind::Flag { default: false },
        Effect::Refused { allowed: &["no"] },
    ),
    idle_flag("allow-remote-read", true),
    spec("cram-hmac-alg", Kind::ChoiceOrEmpty(CramHmacAlg::NAMES), LIVE),
    spec("shared-secret", Kind::Text(63), LIVE),
    spec("data-integrity-alg", Kind::Text(63), Effect::Refused { allowed: &[""] }),
    idle_text("verify-alg", 63),
    idle_text("csums-alg", 63),
    idle_flag("csums-after-crash-only", false),
    flag("use-rle", true),
    flag("tcp-cork", true),
    spec("on-congestion", Kind::Choice(ON_CONGESTION), Effect::Refused { allowed: &["block"] }),
    idle_number("congestion-fill", Unit::Sectors, 0, 20_971_520, 0),
    idle_number("congestion-extents", Unit::One, 67, 65_534, 1237),
    spec("fencing", Kind::Choice(FENCING), Effect::Refused { allowed: &["dont-care"] }),
    spec("after-sb-0pri", Kind::ChoiceOrHost(AfterSb0Choice::NAMES), LIVE),
    choice("after-sb-1pri", AfterSb1Pri::NAMES),
    choice("after-sb-2pri", AfterSb2Pri::NAMES),
    flag("always-asbp", false),
    spec(
        "rr-conflict",
        Kind::Choice(RR_CONFLICT),
        Effect::Replaced { values: &["retry-connect", "auto-discard"], by: "disconnect" },
    ),
    spec("transport", Kind::Text(16), Effect::Refused { allowed: &["", "tcp"] }),
    idle_flag("load-balance-paths", false),
    spec("tls", Kind::Flag { default: false }, Effect::Refused { allowed: &["no"] }),
    idle_text("tls-keyring", 63),
    idle_text("tls-privkey", 63),
    idle_text("tls-certificate", 63),
    idle_number("rdma-ctrl-rcvbuf-size", Unit::Bytes, 0, MAX_SOCKET_BUFFER, 0),
    idle_number("rdma-ctrl-sndbuf-size", Unit::Bytes, 0, MAX_SOCKET_BUFFER, 0),
    idle_text("_name", 128),
    flag("flush-wait-peer", true),
    // Historic; the same wish is an argument of the command that connects.
    idle_flag("discard-my-data", false),
    idle_choice("on-disconnect", &["reconnect", "stand_alone", "freeze_io"], &["reconnect"]),
    idle_number("tl-size", Unit::One, 1, 1_000_000, 256),
];

/// Names of `handlers`. `before-resync-target` may forbid a resync by its exit code.
const HANDLERS: &[Spec] = &[
    handler("pri-on-incon-degr"),
    idle_text("pri-lost-after-sb", HANDLER_MAX),
    idle_text("pri-lost", HANDLER_MAX),
    handler("initial-split-brain"),
    handler("split-brain"),
    idle_text("fence-peer", HANDLER_MAX),
    idle_text("unfence-peer", HANDLER_MAX),
    handler("local-io-error"),
    spec("before-resync-target", Kind::Text(HANDLER_MAX), Effect::Refused { allowed: &[""] }),
    handler("after-resync-target"),
    idle_text("before-resync-source", HANDLER_MAX),
    idle_text("out-of-sync", HANDLER_MAX),
    idle_text("quorum-lost", HANDLER_MAX),
    idle_text("disconnected", HANDLER_MAX),
];

/// Options that only the historic `syncer` section has; the others are moved, see `legacy.rs`.
const SYNCER: &[Spec] = &[
    idle_number("group", Unit::One, 0, 1_000_000, 0),
    idle_flag("skip-sync", false),
    idle_flag("use-csums", false),
];

/// The option of that name in that section.
pub(crate) fn find(section: Section, name: &str) -> Option<&'static Spec> {
    section.specs().iter().find(|spec| spec.name == name)
}

/// The default of a flag.
///
/// # Panics
/// If there is no such flag: names of options in this program are constants.
pub(crate) fn default_flag(section: Section, name: &str) -> bool {
    match find(section, name).map(|spec| spec.kind) {
        Some(Kind::Flag { default }) => default,
        other => panic!("{section} has no flag {name}: {other:?}"),
    }
}

/// The default of a number, in its unit.
///
/// # Panics
/// If there is no such number: names of options in this program are constants.
pub(crate) fn default_number(section: Section, name: &str) -> u64 {
    match find(section, name).map(|spec| spec.kind) {
        Some(Kind::Number { default, .. }) => default,
        other => panic!("{section} has no number {name}: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names are unique in a section, defaults lie in their ranges.
    #[test]
    fn table_is_consistent() {
        for section in Section::ALL {
            let specs = section.specs();
            for (n, spec) in specs.iter().enumerate() {
                assert!(specs[..n].iter().all(|other| other.name != spec.name), "{}", spec.name);
                if let Kind::Number { min, max, default, step, .. } = spec.kind {
                    assert!((min..=max).contains(&default), "{}", spec.name);
                    assert_eq!(default % step, 0, "{}", spec.name);
                }
            }
        }
    }
}
