//! Which node this is, which configuration holds, and where run-time files are.
//!
//! | file in the run-time directory | what |
//! |---|---|
//! | `RES.json` | the engine's configuration; holds the shared secret, so mode 0600 |
//! | `RES.sock` | the control socket of the engine |
//! | `RES.lock` | locked as long as an engine serves the resource; holds its process id |
//! | `RES.log` | what the engine says |
//! | `RES.tool` | locked as long as a drbdctl starts, ends or changes the engine |
//!
//! A file of its own, `RES-VOL.sizes`, survives a restart of the host: the sizes that the disk of a
//! volume with internal metadata has had ([`known_sizes_path`] says where). It goes when metadata
//! is created or erased.
//!
//! The directory is `/run/drbd`, or `/run/drbd/NODE` when the node is named by `--node` or by
//! `__DRBD_NODE__`, so that two nodes can live on one host. `DRBD_RUN_DIR` replaces `/run/drbd`.
//!
//! [`known_sizes_path`]: replication_core::config::known_sizes_path

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;

use crate::cli::{Color, Global};
use crate::conf::{Config, Inputs, Main, NodeView, RealFiles, Warning};
use crate::conf::{MAX_FILE_BYTES, default_config_path, load_inputs};
use crate::exit::{self, Failure};
use crate::object::{self, Named, Object};

/// Where run-time files are kept.
const RUN_DIR: &str = "/run/drbd";
/// Longest path of a unix socket (the system's limit without the final NUL).
const SOCKET_PATH_MAX: usize = 107;

/// Files of one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The engine's configuration.
    pub json: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Locked by the engine.
    pub lock: PathBuf,
    /// What the engine says.
    pub log: PathBuf,
    /// Locked by the tool.
    pub tool: PathBuf,
}

impl Paths {
    /// The files of a resource in a directory of run-time files.
    #[must_use]
    pub fn in_dir(dir: &Path, resource: &str) -> Self {
        let file = |suffix: &str| dir.join(format!("{resource}.{suffix}"));
        Self {
            json: file("json"),
            socket: file("sock"),
            lock: file("lock"),
            log: file("log"),
            tool: file("tool"),
        }
    }
}

/// Who we are and what holds.
#[derive(Debug)]
pub struct Context {
    /// Name of this node.
    pub node: String,
    /// Directory of run-time files.
    pub run_dir: PathBuf,
    /// Change nothing.
    pub dry_run: bool,
    /// How much to show.
    pub verbose: u8,
    /// When to use colours.
    pub color: Color,
    /// Addresses of the interfaces.
    addresses: Vec<IpAddr>,
    config: Result<(Config, Vec<Warning>), Failure>,
}

impl Context {
    /// Looks around: node name, addresses, configuration. A configuration that cannot be read is
    /// an error only for what needs it.
    ///
    /// # Errors
    /// If the system does not tell its name or its addresses, or the node is no file name.
    pub fn new(global: &Global) -> Result<Self, Failure> {
        let named = global.node.clone().or_else(|| variable("__DRBD_NODE__"));
        let base = PathBuf::from(variable("DRBD_RUN_DIR").unwrap_or_else(|| RUN_DIR.to_owned()));
        let (node, run_dir) = match named {
            Some(node) if node.is_empty() || node.starts_with('.') || node.contains('/') => {
                return Err(Failure::usage(format!("'{node}' is no name of a node")));
            }
            Some(node) => {
                let run_dir = base.join(&node);
                (node, run_dir)
            }
            None => (host_name()?, base),
        };
        Ok(Self {
            node,
            run_dir,
            dry_run: global.dry_run,
            verbose: global.verbose,
            color: global.color,
            addresses: own_addresses()?,
            config: read_config(global),
        })
    }

    /// The configuration.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn config(&self) -> Result<&Config, Failure> {
        self.config.as_ref().map(|(config, _)| config).map_err(Clone::clone)
    }

    /// What was accepted in the configuration and is yet worth a line.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        self.config.as_ref().map_or(&[], |(_, warnings)| warnings)
    }

    /// Addresses of this node.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Names of this node's resources.
    ///
    /// # Errors
    /// If the configuration cannot be used.
    pub fn resources(&self) -> Result<Vec<String>, Failure> {
        let names = self.config()?.resources_on(&self.node, &self.addresses);
        Ok(names.into_iter().map(str::to_owned).collect())
    }

    /// A resource as this node sees it.
    ///
    /// # Errors
    /// If it is not defined for this node, or the configuration cannot be used.
    pub fn view(&self, resource: &str) -> Result<NodeView, Failure> {
        Ok(self.config()?.for_host(resource, &self.node, &self.addresses)?)
    }

    /// Checks that the resource's own address is one of this node. Loopback addresses are local
    /// without an interface that carries them.
    ///
    /// # Errors
    /// If it is not.
    pub fn check_address(&self, view: &NodeView) -> Result<(), Failure> {
        let mut addresses = self.addresses.clone();
        if view.local.ip().is_loopback() {
            addresses.push(view.local.ip());
        }
        Ok(self.config()?.check_local_address(&view.resource, &self.node, &addresses)?)
    }

    /// Node ids for displays: as configured, else 0 for the first host section of the file and 1
    /// for the other. Without a configuration the lower of the two addresses gets 0.
    #[must_use]
    pub fn node_ids(&self, resource: &str, is_lower: bool) -> (u32, u32) {
        let by_rank = |is_first: bool| if is_first { (0, 1) } else { (1, 0) };
        let Ok(view) = self.view(resource) else {
            return by_rank(is_lower);
        };
        match view.node_ids {
            (Some(own), Some(peer)) => (own, peer),
            (None | Some(_), None) | (None, Some(_)) => {
                let config = self.config().ok();
                let is_first = config
                    .and_then(|config| config.is_first_host(resource, &self.node, &self.addresses));
                by_rank(is_first.unwrap_or(is_lower))
            }
        }
    }

    /// The objects of a verb, `all` replaced by names. Nothing is looked up.
    ///
    /// # Errors
    /// If a word is no object, or `all` means nothing.
    pub fn objects(&self, words: &[String]) -> Result<Vec<Named>, Failure> {
        let mut objects: Vec<Named> = Vec::new();
        for word in words {
            match object::parse(word)? {
                Object::Named(named) => objects.push(named),
                Object::All => {
                    let names = self.resources()?;
                    if names.is_empty() {
                        return Err(Failure::usage("no resources defined!"));
                    }
                    objects.extend(names.into_iter().map(Named::whole));
                }
            }
        }
        Ok(objects)
    }

    /// Files of a resource.
    ///
    /// # Errors
    /// If the path of the socket is longer than the system allows.
    pub fn paths(&self, resource: &str) -> Result<Paths, Failure> {
        let paths = Paths::in_dir(&self.run_dir, resource);
        let socket = &paths.socket;
        let len = socket.as_os_str().len();
        if len > SOCKET_PATH_MAX {
            return Err(Failure::new(
                exit::SYSTEM,
                format!(
                    "{}: {len} bytes are more than the {SOCKET_PATH_MAX} of a socket's path",
                    socket.display()
                ),
            ));
        }
        Ok(paths)
    }

    /// Names of the resources that have run-time files, in alphabetical order.
    ///
    /// # Errors
    /// If the directory is there and cannot be read.
    pub fn running(&self) -> Result<Vec<String>, Failure> {
        let fail = |error| Failure::system(format!("read {}", self.run_dir.display()), &error);
        let entries = match std::fs::read_dir(&self.run_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let is_socket = path.extension().is_some_and(|extension| extension == "sock");
            if let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
                && is_socket
            {
                names.push(stem.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }
}

/// An environment variable, if it is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn host_name() -> Result<String, Failure> {
    let name = nix::unistd::gethostname()
        .map_err(|errno| Failure::system("ask for the name of this host", &errno))?;
    name.into_string()
        .map_err(|name| Failure::new(exit::SYSTEM, format!("the host name {name:?} is no text")))
}

fn own_addresses() -> Result<Vec<IpAddr>, Failure> {
    let interfaces = getifaddrs()
        .map_err(|errno| Failure::system("ask for the addresses of this host", &errno))?;
    let mut addresses = Vec::new();
    for address in interfaces.filter_map(|interface| interface.address) {
        if let Some(v4) = address.as_sockaddr_in() {
            addresses.push(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            addresses.push(IpAddr::V6(v6.ip()));
        }
    }
    Ok(addresses)
}

/// Reads and checks the configuration.
fn read_config(global: &Global) -> Result<(Config, Vec<Warning>), Failure> {
    let main = match &global.config_file {
        Some(path) if path == Path::new("-") => {
            let limit = u64::try_from(MAX_FILE_BYTES + 1)
                .map_err(|error| Failure::system("read standard input", &error))?;
            let mut bytes = Vec::new();
            std::io::stdin()
                .take(limit)
                .read_to_end(&mut bytes)
                .map_err(|error| Failure::system("read standard input", &error))?;
            let name = PathBuf::from("(standard input)");
            Main::Text { name, bytes, dir: PathBuf::from(".") }
        }
        Some(path) => Main::File(path.clone()),
        None => Main::File(default_config_path(&RealFiles)),
    };
    let also = global.config_to_test.clone();
    let exclude = global.config_to_exclude.clone();
    Ok(load_inputs(Inputs { main, also, exclude }, &RealFiles)?)
}
