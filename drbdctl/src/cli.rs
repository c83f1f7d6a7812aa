//! The command line: verbs, options, and the historic orders of words.
//!
//! Today's form is `drbdctl [OPTION...] VERB [OPTION...] OBJECT...`. Two older ones are brought to
//! it before the parser sees them (sections 6.1 and 16 of the notes on the user's surface):
//!
//! | written | read as |
//! |---|---|
//! | `-- --overwrite-data-of-peer primary r0` | `primary --overwrite-data-of-peer r0` |
//! | `connect -- --discard-my-data r0` | `connect --discard-my-data r0` |

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::exit;

/// Everything that was said.
#[derive(Debug, Parser)]
#[command(
    name = "drbdctl",
    about = "Runs replicated block devices: metadata, up and down, roles, state",
    disable_version_flag = true,
    disable_help_subcommand = true,
    after_help = "OBJECT is a resource, RESOURCE/VOLUME, or 'all'. With several objects every one \
                  is tried, and the worst exit code is returned."
)]
pub struct Cli {
    /// Options of every verb.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

/// Options of every verb.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Configuration file; '-' reads standard input.
    #[arg(short = 'c', long, value_name = "FILE", global = true)]
    pub config_file: Option<PathBuf>,
    /// Another file, read after the configuration.
    #[arg(short = 't', long, value_name = "FILE")]
    pub config_to_test: Vec<PathBuf>,
    /// A file that 'include' leaves out.
    #[arg(short = 'E', long, value_name = "FILE")]
    pub config_to_exclude: Vec<PathBuf>,
    /// Act as this node instead of the one named by 'uname -n', with run-time files of its own.
    #[arg(long, value_name = "NAME", global = true)]
    pub node: Option<String>,
    /// Print what would be done and change nothing.
    #[arg(short = 'd', long, global = true)]
    pub dry_run: bool,
    /// Show more.
    #[arg(short = 'v', long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Colours in the status.
    #[arg(long, value_name = "WHEN", default_value = "auto", num_args = 0..=1,
          default_missing_value = "always", require_equals = true, global = true)]
    pub color: Color,
    /// Print versions in a form that a shell can evaluate.
    #[arg(short = 'V', long)]
    pub version: bool,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal.
    Auto,
    /// Yes.
    Always,
    /// No.
    Never,
}

/// One or more objects.
#[derive(Clone, Debug, Args)]
pub struct Objects {
    /// Resources, volumes, or 'all'.
    #[arg(value_name = "OBJECT", required = true)]
    pub objects: Vec<String>,
}

/// Objects, and consent to what may lose data or wait for nobody.
#[derive(Clone, Debug, Args)]
pub struct Forced {
    /// Go on where the verb would stop to be safe.
    #[arg(short = 'f', long)]
    pub force: bool,
    #[command(flatten)]
    pub on: Objects,
}

/// Options of the waiting verbs. Times are in seconds; 0 waits for ever.
#[derive(Clone, Debug, Args)]
pub struct Wait {
    /// Give up after this time; default: 'wfc-timeout' of the 'startup' section.
    #[arg(short = 't', long, value_name = "SECONDS")]
    pub wfc_timeout: Option<u32>,
    /// The same when this node was Primary without its peer before it went down.
    #[arg(long, value_name = "SECONDS")]
    pub degr_wfc_timeout: Option<u32>,
    /// The same while the peer's data are known to be outdated.
    #[arg(short = 'o', long, value_name = "SECONDS")]
    pub outdated_wfc_timeout: Option<u32>,
    /// Go on waiting when the node is StandAlone.
    #[arg(short = 'w', long, num_args = 0..=1, default_missing_value = "yes",
          require_equals = true, value_name = "yes|no")]
    pub wait_after_sb: Option<YesNo>,
    #[command(flatten)]
    pub on: Objects,
}

/// An explicit yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum YesNo {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// Options of `resize`.
#[derive(Clone, Debug, Args)]
pub struct ResizeArgs {
    /// Use only this much: a number of sectors, or with a suffix K, M, G or T.
    #[arg(short = 's', long, value_name = "SIZE")]
    pub size: Option<String>,
    /// The added space is known to be equal on both nodes.
    #[arg(long)]
    pub assume_clean: bool,
    /// Do not ask the absent peer whether it has room.
    #[arg(long)]
    pub assume_peer_has_space: bool,
    #[command(flatten)]
    pub on: Objects,
}

/// Options of `status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// As JSON.
    #[arg(short = 'j', long)]
    pub json: bool,
    /// With counters.
    #[arg(short = 's', long)]
    pub statistics: bool,
    /// Resources; none: all that run.
    #[arg(value_name = "OBJECT")]
    pub objects: Vec<String>,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Write new metadata, which declares the local data inconsistent.
    CreateMd(Forced),
    /// Erase the metadata.
    WipeMd(Forced),
    /// Print the metadata as text.
    DumpMd(Forced),
    /// Print the generation identifiers in one line.
    GetGi(Objects),
    /// Print the generation identifiers with an explanation.
    ShowGi(Objects),
    /// Start the engine, attach the disks and connect.
    Up(Objects),
    /// Disconnect, detach and end the engine.
    Down(Forced),
    /// Replace the running engine by another program, under devices in use.
    Upgrade(Objects),
    /// Attach the disk.
    Attach(Objects),
    /// Detach the disk and go on with the peer's.
    Detach(Forced),
    /// Connect to the peer.
    Connect {
        /// On split brain, throw away what was changed on this node.
        #[arg(long)]
        discard_my_data: bool,
        #[command(flatten)]
        on: Objects,
    },
    /// Disconnect and stay so.
    Disconnect(Forced),
    /// Become Primary: the device may be used on this node.
    Primary {
        /// Take the local data as good even where it is not known to be.
        #[arg(short = 'f', long, visible_alias = "overwrite-data-of-peer", short_alias = 'o')]
        force: bool,
        #[command(flatten)]
        on: Objects,
    },
    /// Become Secondary.
    Secondary(Objects),
    /// Throw away the local data and sync it from the peer.
    Invalidate(Objects),
    /// Sync the peer in full from the local data.
    InvalidateRemote(Objects),
    /// Show the state.
    Status(StatusArgs),
    /// Print own and peer's role, one line for each volume.
    #[command(alias = "state")]
    Role(Objects),
    /// Print the peer's role, one line for each volume.
    PeerRole(Objects),
    /// Print the connection state, one line for each volume.
    Cstate(Objects),
    /// Print own and peer's disk state, one line for each volume.
    Dstate(Objects),
    /// Wait until the peer is connected.
    WaitConnect(Wait),
    /// Wait until the peer is connected and no resync runs.
    WaitSync(Wait),
    /// Take up a changed size of the backing devices.
    Resize(ResizeArgs),
    /// Move internal metadata to the end of a disk that has grown while it was not attached.
    CheckResize(Objects),
    /// Bring what runs in line with the configuration.
    Adjust(Objects),
    /// Mark the local data as outdated.
    Outdate(Objects),
    /// Pause resync.
    PauseSync(Objects),
    /// Continue resync.
    ResumeSync(Objects),
    /// Start a new data generation.
    NewCurrentUuid {
        /// Declare the data of both nodes equal: skips the initial sync.
        #[arg(long)]
        clear_bitmap: bool,
        #[command(flatten)]
        on: Objects,
    },
    /// Print the configuration in its normal form.
    Dump {
        /// Resources; none: all.
        #[arg(value_name = "RESOURCE")]
        objects: Vec<String>,
    },
    /// Check the configuration.
    ShNop,
    /// Print the names of this node's resources.
    ShResources,
    /// Print the device of each volume.
    ShDev(Objects),
    /// Print the backing disk of each volume.
    ShLlDev(Objects),
    /// Print the minor number of each volume.
    ShMinor(Objects),
    /// Print the device that carries the metadata of each volume.
    ShMdDev(Objects),
    /// Print 'internal', 'flexible' or the index of the metadata of each volume.
    ShMdIdx(Objects),
    /// Print this node's address.
    ShIp(Objects),
    /// Print the name of the resource.
    ShResource(Objects),
    /// Print the options that a kernel module would be loaded with.
    ShModParms,
    /// Become the leader of a session, then the program that is named. Used by 'up'.
    #[command(hide = true)]
    ShDetached {
        /// Program and arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

/// Verbs that operators know from 8.4, or from the tools around it, and that are not built: they
/// are refused by name, because a script must not take them for a slip of the pen.
const NOT_BUILT: [&str; 56] = [
    "adjust-with-progress",
    "after-resync-target",
    "apply-al",
    "before-resync-source",
    "before-resync-target",
    "del-minor",
    "del-path",
    "del-peer",
    "del-resource",
    "disconnected",
    "disk-options",
    "dump-superblock",
    "dump-xml",
    "events",
    "events2",
    "fence-peer",
    "forget-peer",
    "hidden-commands",
    "initial-split-brain",
    "local-io-error",
    "net-options",
    "new-minor",
    "new-path",
    "new-peer",
    "new-resource",
    "out-of-sync",
    "outdate-peer",
    "peer-device-options",
    "pri-lost",
    "pri-lost-after-sb",
    "pri-on-incon-degr",
    "quorum-lost",
    "repair-md",
    "resource-options",
    "restore-md",
    "resume-io",
    "set-gi",
    "sh-b-pri",
    "sh-list-adjustable",
    "sh-list-config-file",
    "sh-lr-of",
    "sh-status",
    "sh-udev",
    "show",
    "split-brain",
    "suspend-io",
    "udev",
    "unfence-peer",
    "verify",
    "wait-con-int",
    "wait-connect-connection",
    "wait-connect-resource",
    "wait-connect-volume",
    "wait-sync-connection",
    "wait-sync-resource",
    "wait-sync-volume",
];
/// Verbs of products or versions that this tool does not replace, and what to do instead.
const NEVER_BUILT: [(&str, &str); 4] = [
    ("load-only", "use attach and connect"),
    ("proxy-down", "there is no proxy"),
    ("proxy-up", "there is no proxy"),
    ("syncer", "set the resync options in the 'disk' section and use adjust"),
];

/// Whether a verb is known by name without being built; why not, in words.
fn not_built(verb: &str) -> Option<String> {
    if NOT_BUILT.contains(&verb) {
        return Some(format!("drbdctl: '{verb}' is not built yet\n"));
    }
    let (_, advice) = NEVER_BUILT.iter().find(|(known, _)| *known == verb)?;
    Some(format!("drbdctl: '{verb}' is not supported: {advice}\n"))
}

/// What the parser has to say instead of a command: help, or a complaint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The exit code.
    pub exit: u8,
    /// The text, for standard output if `exit` is zero.
    pub text: String,
}

/// Reads the command line; the first word is the program's name.
///
/// # Errors
/// If it is malformed, or asks for help.
pub fn parse(arguments: Vec<OsString>) -> Result<Cli, Said> {
    Cli::try_parse_from(reorder(arguments)).map_err(|error| said(&error))
}

/// The text of an error of the parser, and the exit code that scripts expect.
fn said(error: &clap::Error) -> Said {
    let exit = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => exit::DONE,
        ErrorKind::InvalidSubcommand => {
            let word = error.get(clap::error::ContextKind::InvalidSubcommand);
            let word = word.map_or_else(String::new, ToString::to_string);
            if let Some(text) = not_built(&word) {
                return Said { exit: exit::FAILURE, text };
            }
            let text = format!("drbdctl: Unknown command '{}'\n", word.escape_default());
            return Said { exit: exit::USAGE, text };
        }
        ErrorKind::MissingRequiredArgument
        | ErrorKind::MissingSubcommand
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => exit::USAGE,
        // The enum is clap's and may grow; everything else is a malformed line.
        _ => exit::SYNTAX,
    };
    Said { exit, text: error.to_string() }
}

/// Brings the historic orders of words to today's.
fn reorder(mut words: Vec<OsString>) -> Vec<OsString> {
    let known = Cli::command();
    let is_known = |word: &str| not_built(word).is_some();
    let is_verb = |word: &OsString| {
        known.find_subcommand(word).is_some() || word.to_str().is_some_and(is_known)
    };
    let Some(mark) = words.iter().position(|word| word == "--") else {
        return words;
    };
    let before = &words[..mark];
    if before.iter().any(|word| word == "sh-detached") {
        return words;
    }
    let has_verb = before.iter().skip(1).any(is_verb);
    words.remove(mark);
    if !has_verb && let Some(verb) = words[mark..].iter().position(is_verb) {
        words[mark..=mark + verb].rotate_right(1);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn parsed(line: &str) -> Verb {
        match parse(words(&format!("drbdctl {line}"))) {
            Ok(cli) => cli.verb.unwrap(),
            Err(said) => panic!("{line}: {}", said.text),
        }
    }

    /// Clap's own consistency check.
    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Options before `--`, after it, and behind the verb mean the same.
    #[test]
    fn historic_orders() {
        let table = [
            ("-- --overwrite-data-of-peer primary r0", "primary r0 --overwrite-data-of-peer"),
            ("-vvv -- --force primary r0", "-vvv primary --force r0"),
            ("connect -- --discard-my-data r0", "connect --discard-my-data r0"),
            ("connect r0 -- --discard-my-data", "connect --discard-my-data r0"),
            ("-- --assume-clean resize r0/0", "resize --assume-clean r0/0"),
            ("-- -t 30 wait-connect r0", "wait-connect -t 30 r0"),
            ("-- --clear-bitmap new-current-uuid r0/0", "new-current-uuid --clear-bitmap r0/0"),
        ];
        for (old, new) in table {
            assert_eq!(format!("{:?}", parsed(old)), format!("{:?}", parsed(new)), "{old}");
        }
        match parsed("-- --overwrite-data-of-peer primary r0") {
            Verb::Primary { force, on } => assert_eq!((force, on.objects.len()), (true, 1)),
            other => panic!("{other:?}"),
        }
    }

    /// Exit codes of lines that are not understood.
    #[test]
    fn complaints() {
        let table = [
            ("frobnicate r0", exit::USAGE, "drbdctl: Unknown command 'frobnicate'\n"),
            ("up", exit::USAGE, "required arguments"),
            ("up --no-such-option r0", exit::SYNTAX, "--no-such-option"),
            ("--help", exit::DONE, "create-md"),
            ("primary --help", exit::DONE, "--overwrite-data-of-peer"),
        ];
        for (line, exit, part) in table {
            let said = parse(words(&format!("drbdctl {line}"))).unwrap_err();
            assert_eq!(said.exit, exit, "{line}");
            assert!(said.text.contains(part), "{line}: {}", said.text);
        }
    }

    /// A verb is built, or refused by name, never both; each line says which one is meant.
    #[test]
    fn verbs_that_are_not_built() {
        let known = Cli::command();
        let never = NEVER_BUILT.iter().map(|(verb, _)| *verb);
        for verb in NOT_BUILT.into_iter().chain(never) {
            assert!(known.find_subcommand(verb).is_none(), "{verb} is built");
            let lines = [format!("{verb} r0"), verb.to_owned(), format!("-- --start 8 {verb} r0")];
            for line in lines {
                let said = parse(words(&format!("drbdctl {line}"))).unwrap_err();
                assert_eq!(said.exit, exit::FAILURE, "{line}");
                let start = format!("drbdctl: '{verb}' is not ");
                assert!(said.text.starts_with(&start), "{line}: {}", said.text);
            }
        }
        // Every verb of the 8.4 tool is one or the other.
        let stock = "attach detach connect disconnect syncer up down primary secondary \
                     invalidate invalidate-remote resize check-resize create-md get-gi show-gi \
                     dump-md wipe-md outdate adjust wait-connect wait-con-int role state cstate \
                     dstate dump dump-xml verify pause-sync resume-sync new-current-uuid \
                     hidden-commands status apply-al suspend-io resume-io set-gi new-resource \
                     new-minor sh-nop sh-resources sh-resource sh-mod-parms sh-udev sh-minor \
                     sh-dev sh-ll-dev sh-md-dev sh-md-idx sh-ip sh-lr-of sh-b-pri sh-status \
                     proxy-up proxy-down before-resync-target after-resync-target \
                     before-resync-source pri-on-incon-degr pri-lost-after-sb fence-peer \
                     unfence-peer local-io-error pri-lost initial-split-brain split-brain \
                     out-of-sync load-only wait-sync";
        for verb in stock.split_whitespace() {
            let is_built = known.find_subcommand(verb).is_some();
            assert!(is_built || not_built(verb).is_some(), "{verb} is forgotten");
        }
    }

    /// Options of all verbs are understood on both sides of the verb.
    #[test]
    fn global_options() {
        let cli = parse(words("drbdctl -c x status --json --node bob -v --color")).unwrap();
        assert_eq!(cli.global.config_file, Some(PathBuf::from("x")));
        assert_eq!((cli.global.node.as_deref(), cli.global.verbose), (Some("bob"), 1));
        assert_eq!(cli.global.color, Color::Always);
    }
}
