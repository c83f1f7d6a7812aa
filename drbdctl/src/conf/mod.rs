//! The configuration language: from files to what one node has to know about one resource.
//!
//! `load` reads the main file with everything it includes, checks it as a whole, and gives a
//! [`Config`]; [`Config::for_node`] applies inheritance and defaults. Nothing here opens a
//! device, asks the network or changes anything.
//!
//! Kept: an option that is accepted and does nothing is told (one warning each); one whose
//! absence would endanger data is refused; no input makes the parser panic.
//! Rules: the language sections of the notes on the user's surface; extensions are marked "ours".

mod ast;
mod check;
mod dump;
mod error;
mod glob;
mod hosts;
mod legacy;
mod lexer;
mod options;
mod parser;
mod resolve;
mod source;
mod table;
mod value;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

pub use error::{ConfError, EXIT_CONFIG, EXIT_NOT_DEFINED, Problem, ValueFault, Warning};
pub use options::{
    AfterSb0Choice, AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, BecomePrimaryOn, CramHmacAlg,
    DiskOptions, Frontend, GlobalOptions, NbdAddress, NetOptions, OnIoError, OnNoDataAccessible,
    Protocol, ResourceOptions, RrConflict, Secret, StartupOptions, UsageCount,
};
pub use resolve::{MetaDisk, NodeView, VolumeView, is_same_host};
pub use source::{Files, MAX_FILE_BYTES, MemoryFiles, Place, RealFiles};

use ast::{Resource, Scope, Setting};
use error::{Fault, Outcome};
use options::Layers;
use parser::Parser;
use source::Sources;

/// Files that are looked for when the operator names none, best first.
const SEARCH: [&str; 6] = [
    "/etc/drbd-90.conf",
    "/etc/drbd-84.conf",
    "/etc/drbd-83.conf",
    "/etc/drbd-82.conf",
    "/etc/drbd-08.conf",
    "/etc/drbd.conf",
];

/// The main file when the operator names none: the first that exists, else the last of the list.
#[must_use]
pub fn default_config_path(files: &dyn Files) -> PathBuf {
    let found = SEARCH.iter().find(|path| files.real_path(Path::new(path)).is_ok());
    PathBuf::from(found.unwrap_or(&SEARCH[SEARCH.len() - 1]))
}

/// Where the main part of a configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Main {
    /// A file.
    File(PathBuf),
    /// Text, such as that of standard input.
    Text {
        /// Name in messages.
        name: PathBuf,
        /// The text.
        bytes: Vec<u8>,
        /// Where `include` starts.
        dir: PathBuf,
    },
}

/// What to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// The main part.
    pub main: Main,
    /// Files read after it.
    pub also: Vec<PathBuf>,
    /// Files that `include` leaves out.
    pub exclude: Vec<PathBuf>,
}

/// A configuration that was read and checked.
#[derive(Clone, Debug)]
pub struct Config {
    main: PathBuf,
    sources: Sources,
    global_settings: Vec<Setting>,
    common: Scope,
    resources: Vec<Resource>,
}

/// Reads and checks the configuration in `main`.
///
/// # Errors
/// On the first thing that is wrong; see [`ConfError`].
pub fn load(main: &Path, files: &dyn Files) -> Result<(Config, Vec<Warning>), ConfError> {
    let main = Main::File(main.to_path_buf());
    load_inputs(Inputs { main, also: Vec::new(), exclude: Vec::new() }, files)
}

/// Reads and checks a configuration of several parts.
///
/// # Errors
/// On the first thing that is wrong; see [`ConfError`].
pub fn load_inputs(inputs: Inputs, files: &dyn Files) -> Result<(Config, Vec<Warning>), ConfError> {
    let mut parser = Parser::new(files, &inputs.exclude);
    let main = match &inputs.main {
        Main::File(path) => path.clone(),
        Main::Text { name, .. } => name.clone(),
    };
    match read_all(&mut parser, inputs) {
        Ok(()) => {}
        Err(fault) => return Err(fault.report(&parser.sources)),
    }
    let config = Config {
        main,
        sources: parser.sources,
        global_settings: parser.global,
        common: parser.common,
        resources: parser.resources,
    };
    Ok((config, parser.warnings))
}

/// Parses all parts, then checks them together.
fn read_all(parser: &mut Parser<'_>, inputs: Inputs) -> Outcome<()> {
    match inputs.main {
        Main::File(path) => parser.main_file(&path)?,
        Main::Text { name, bytes, dir } => parser.main_text(&name, bytes, &dir)?,
    }
    for path in &inputs.also {
        parser.main_file(path)?;
    }
    let Parser { common, resources, sources, warnings, .. } = parser;
    check::check(common, resources, sources, warnings)
}

impl Config {
    /// The file that includes all others.
    #[must_use]
    pub fn main(&self) -> &Path {
        &self.main
    }

    /// Names of all resources, in the order of the files.
    #[must_use]
    pub fn resources(&self) -> Vec<&str> {
        self.resources.iter().map(|resource| resource.name.text.as_str()).collect()
    }

    /// Names of the resources that concern a node, in the order of the files. `addresses` are
    /// those of the node, for floating host sections.
    #[must_use]
    pub fn resources_on(&self, node: &str, addresses: &[IpAddr]) -> Vec<&str> {
        let here = self
            .resources
            .iter()
            .filter(|resource| resolve::local_host(resource, node, addresses).is_some());
        here.map(|resource| resource.name.text.as_str()).collect()
    }

    /// Options of the `global` section.
    #[must_use]
    pub fn global(&self) -> GlobalOptions {
        GlobalOptions::new(&Layers::default().over(&self.global_settings))
    }

    /// The resource as the node of that name sees it.
    ///
    /// # Errors
    /// If it is not defined for this node, or needs what is not available (stacking, more than
    /// two nodes).
    pub fn for_node(&self, resource: &str, node: &str) -> Result<NodeView, ConfError> {
        self.for_host(resource, node, &[])
    }

    /// The same for a node whose addresses are known, which floating host sections need.
    ///
    /// # Errors
    /// As [`Self::for_node`].
    pub fn for_host(
        &self,
        resource: &str,
        node: &str,
        addresses: &[IpAddr],
    ) -> Result<NodeView, ConfError> {
        let view = self.find(resource).and_then(|found| {
            let (file, line) = self.defined_at(found);
            resolve::node_view(&self.common, found, node, addresses, (file, line))
        });
        view.map_err(|fault| fault.report(&self.sources))
    }

    /// Checks that the address of the node is one of `addresses`, those of its interfaces.
    /// `disable-ip-verification` switches the check off.
    ///
    /// # Errors
    /// If it is not, and as [`Self::for_node`].
    pub fn check_local_address(
        &self,
        resource: &str,
        node: &str,
        addresses: &[IpAddr],
    ) -> Result<(), ConfError> {
        let view = self.for_host(resource, node, addresses)?;
        let ip = view.local.ip();
        if self.global().disable_ip_verification || addresses.contains(&ip) {
            return Ok(());
        }
        let problem = Problem::ForeignAddress {
            resource: view.resource,
            host: view.node,
            address: ip.to_string(),
        };
        let found = self.find(resource).map_err(|fault| fault.report(&self.sources))?;
        let host = resolve::local_host(found, node, addresses);
        let host = host.expect("the view was made from this host section");
        let at = host.address.as_ref().map_or(host.at, |address| address.at);
        Err(Fault::new(at, problem).report(&self.sources))
    }

    /// The resource of that name.
    fn find(&self, name: &str) -> Outcome<&Resource> {
        let found = self.resources.iter().find(|resource| resource.name.text == name);
        found.ok_or_else(|| {
            let resource = name.to_owned();
            let fault = Fault::nowhere(Problem::NotDefined { resource });
            let names = self.resources.iter().map(|resource| resource.name.text.as_str());
            match value::nearest(name, names) {
                Some(near) => fault.help(format!("did you mean '{near}'?")),
                None => fault,
            }
        })
    }

    /// File and line of a resource.
    fn defined_at(&self, resource: &Resource) -> (PathBuf, usize) {
        let file = self.sources.file(resource.at).to_path_buf();
        (file, self.sources.line(resource.at))
    }
}

#[cfg(test)]
mod tests {
    use super::table::{Effect, Kind, Section, Spec};
    use super::*;

    /// Parses one option in its section.
    fn parse(section: Section, text: &str) -> Result<(Config, Vec<Warning>), ConfError> {
        let text = match section {
            Section::Global => format!("global {{ {text} }}"),
            Section::Startup
            | Section::Options
            | Section::Disk
            | Section::Net
            | Section::Handlers
            | Section::Syncer => format!("common {{ {section} {{ {text} }} }}"),
        };
        let main = Main::Text { name: "t".into(), bytes: text.into(), dir: ".".into() };
        let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
        load_inputs(inputs, &MemoryFiles::default())
    }

    /// A value of the option: `n` chooses.
    fn sample(spec: &Spec, n: usize) -> String {
        match spec.kind {
            Kind::Flag { .. } => ["yes", "no"][n % 2].to_owned(),
            Kind::Number { min, max, step, .. } => [min, max / step * step][n % 2].to_string(),
            Kind::Choice(names)
            | Kind::AnyCase(names)
            | Kind::ChoiceOrEmpty(names)
            | Kind::ChoiceOrHost(names) => names[n % names.len()].to_owned(),
            Kind::Text(_) => ["some-word", "other"][n % 2].to_owned(),
            Kind::ListenAddress => "\"[::1]:10809\"".to_owned(),
            Kind::List => ["a b", "both"][n % 2].to_owned(),
        }
    }

    /// The effect of a value in the table is what parsing does: nothing, one warning, or refusal.
    /// A number of more than eight digits cannot be written, so the largest of some cannot.
    #[test]
    fn every_option_is_accepted_warned_of_or_refused() {
        let cases = Section::ALL.into_iter().flat_map(|s| s.specs().iter().map(move |x| (s, x)));
        let mut seen = [0; 3];
        for ((section, spec), n) in cases.flat_map(|case| (0..11).map(move |n| (case, n))) {
            let value = sample(spec, n);
            if value.len() > value::MAX_DIGITS && matches!(spec.kind, Kind::Number { .. }) {
                continue;
            }
            let clamped = u32::from(matches!(spec.kind, Kind::Number { clamp: Some(_), .. }));
            let result = parse(section, &format!("{} {value};", spec.name));
            let expected = match spec.effect {
                Effect::Live => 0,
                Effect::Idle { neutral } => u32::from(!neutral.contains(&value.as_str())),
                Effect::Refused { allowed } if allowed.contains(&value.as_str()) => 0,
                Effect::Refused { .. } => 2,
                Effect::Replaced { values, .. } => u32::from(values.contains(&value.as_str())),
            } + clamped;
            let found = match &result {
                Ok((_, warnings)) => u32::try_from(warnings.len()).expect("few"),
                Err(error) if matches!(error.problem(), Problem::NotAvailable { .. }) => 2,
                Err(error) => panic!("{section} {} {value}: {error}", spec.name),
            };
            assert_eq!(found, expected, "{section} {} {value}", spec.name);
            seen[usize::try_from(found).expect("below 3")] += 1;
        }
        assert!(seen.iter().all(|&count| count > 0), "{seen:?}");
    }

    /// A flag without a value is yes, with `no-` before it no.
    #[test]
    fn spellings_of_flags() {
        let dump = |text: &str| parse(Section::Net, text).map(|(config, _)| config.dump());
        let yes = dump("tcp-cork yes;").expect("correct");
        let no = dump("tcp-cork no;").expect("correct");
        assert_eq!(dump("tcp-cork;").expect("correct"), yes);
        assert_eq!(dump("no-tcp-cork;").expect("correct"), no);
        assert_ne!(yes, no);
    }
}
