//! The FUSE adapter: the only folder that names fuser.
//!
//! ```text
//! requests    each of the kernel's requests      adapter    runs its operation      reply    answers in FUSE's terms
//! modes       which open file is used how: direct or passed through
//! ```

mod adapter;
mod modes;
mod reply;
mod requests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};

use crate::mount::fuse::adapter::Adapter;
use crate::mount::tree::Tree;

/// Threads that read requests: more than two gain nothing, since whatever waits is handed to tokio.
const DISPATCHERS: usize = 2;

/// What the names of the threads that answer requests begin with: fuser numbers them.
pub(crate) const ANSWERING_THREADS: &str = "fuser-";

/// A mount's loop: it answers requests until the file system is unmounted.
#[derive(Debug)]
pub(crate) struct Loop {
    thread: std::thread::JoinHandle<io::Result<()>>,
}

/// Who may use a mount, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    /// Other users are let in.
    pub(crate) anyone: bool,
    /// Files can be changed, so those that are wholly local are passed through.
    pub(crate) writable: bool,
}

impl Loop {
    /// Shakes hands with the kernel over an already mounted device and starts answering.
    pub(crate) fn start(
        tree: Arc<Tree>,
        device: OwnedFd,
        access: Access,
        runtime: tokio::runtime::Handle,
    ) -> io::Result<Self> {
        let acl = if access.anyone { SessionACL::All } else { SessionACL::Owner };
        let mut config = Config::default();
        config.acl = acl;
        config.n_threads = Some(DISPATCHERS);
        let session = Session::from_fd(Adapter::new(tree, runtime, access.writable), device, acl, config)?;
        let thread = std::thread::Builder::new().name("walden-fuse".into()).spawn(move || session.run())?;
        Ok(Self { thread })
    }

    /// Waits until the file system is unmounted.
    pub(crate) fn join(self) -> io::Result<()> {
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that answers FUSE requests panicked")))
    }
}
