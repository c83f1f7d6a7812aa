//! The order of host sections, which gives the nodes their numbers where none are written.

use std::net::IpAddr;

use super::{Config, resolve};

impl Config {
    /// Whether this node's host section is the first of the resource. `None` if the resource is
    /// not defined, or not for this node.
    #[must_use]
    pub fn is_first_host(&self, resource: &str, node: &str, addresses: &[IpAddr]) -> Option<bool> {
        let found = self.resources.iter().find(|found| found.name.text == resource)?;
        let own = resolve::local_host(found, node, addresses)?;
        Some(found.hosts.first().is_some_and(|first| first.at == own.at))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MemoryFiles, load};
    use std::path::Path;

    /// Each node knows its place, by name and by address; others have none.
    #[test]
    fn places() {
        let text = "resource r0 {
                device /dev/drbd0; disk /dev/a; meta-disk internal;
                on bob { address 10.0.0.2:7788; }
                floating 10.0.0.1:7788; }";
        let files = MemoryFiles::default().with("/drbd.conf", text);
        let (config, _) = load(Path::new("/drbd.conf"), &files).unwrap();
        let own = ["10.0.0.1".parse().unwrap()];
        assert_eq!(config.is_first_host("r0", "bob", &[]), Some(true));
        assert_eq!(config.is_first_host("r0", "alice", &own), Some(false));
        assert_eq!(config.is_first_host("r0", "carol", &[]), None);
        assert_eq!(config.is_first_host("r1", "bob", &[]), None);
    }
}
