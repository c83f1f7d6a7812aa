//! The NBD server's listening socket.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use replication_core::config::NbdAddress;

use crate::holders;
use crate::ring::Fd;

/// A listening socket; a unix socket's file goes with it.
#[derive(Debug)]
pub(super) struct Listener {
    fd: Fd,
    name: String,
    file: Option<PathBuf>,
}

impl Listener {
    pub(super) fn open(address: &NbdAddress) -> Result<Self> {
        match address {
            NbdAddress::Unix(path) => Self::open_unix(Path::new(path)),
            NbdAddress::Tcp(address) => Self::open_tcp(*address),
        }
    }

    pub(super) fn fd(&self) -> &Fd {
        &self.fd
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Small replies leave at once.
    pub(super) fn set_options(&self, fd: &Fd) {
        if self.file.is_none()
            && let Err(errno) = setsockopt(fd, sockopt::TcpNoDelay, &true)
        {
            tracing::warn!("NBD server: TCP_NODELAY: {errno}");
        }
    }

    fn open_unix(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        if path.exists() {
            // Whoever listens there must not lose its socket; a file left over may go.
            if UnixStream::connect(path).is_ok() {
                bail!("listen on {name}: another process listens there");
            }
            std::fs::remove_file(path).with_context(|| format!("remove old socket {name}"))?;
        }
        let listener = UnixListener::bind(path).with_context(|| format!("listen on {name}"))?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, mode).with_context(|| format!("restrict {name}"))?;
        let fd = Rc::new(OwnedFd::from(listener));
        Ok(Self { fd, name, file: Some(path.to_owned()) })
    }

    fn open_tcp(address: SocketAddr) -> Result<Self> {
        ensure!(
            address.ip().is_loopback(),
            "listen on {address}: NBD is served on this machine alone, \
             use a loopback address or a unix socket"
        );
        let listener =
            TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        let name = listener.local_addr().context("own address")?.to_string();
        Ok(Self { fd: Rc::new(OwnedFd::from(listener)), name, file: None })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && let Err(error) = std::fs::remove_file(file)
        {
            tracing::warn!("remove {}: {error}", file.display());
        }
    }
}

/// Who is at the other end.
pub(super) fn describe(fd: &Fd) -> String {
    if let Ok(credentials) = getsockopt(&fd.as_fd(), sockopt::PeerCredentials)
        && credentials.pid() > 0
    {
        return format!("client {}", holders::process_name(credentials.pid().unsigned_abs()));
    }
    let address = nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(
        std::os::fd::AsRawFd::as_raw_fd(fd),
    );
    address.map_or_else(|_| "client".to_owned(), |address| format!("client at {address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_served() {
        let any = NbdAddress::Tcp("0.0.0.0:0".parse().unwrap());
        let error = Listener::open(&any).unwrap_err();
        assert!(format!("{error:#}").contains("loopback"), "{error:#}");
        let loopback = NbdAddress::Tcp("127.0.0.1:0".parse().unwrap());
        let listener = Listener::open(&loopback).unwrap();
        assert!(listener.name().starts_with("127.0.0.1:"));
    }

    #[test]
    fn an_old_socket_file_is_replaced_and_a_live_one_respected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let address = NbdAddress::Unix(path.to_str().unwrap().to_owned());
        let old = UnixListener::bind(&path).unwrap();
        let error = Listener::open(&address).unwrap_err();
        assert!(format!("{error:#}").contains("another process"), "{error:#}");
        drop(old);
        let listener = Listener::open(&address).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }
}
