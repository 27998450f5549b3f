//! Runs operations on the tree for the kernel's requests.
//!
//! Every request becomes a future; it is polled once on the dispatcher's thread, so what needs no waiting is answered
//! there and then, and handed to tokio otherwise. Requests under way are bounded by the kernel: `MAX_BACKGROUND` and
//! one for each waiting thread.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use fuser::{BackingId, Errno as FuseErrno, FileHandle, Request};
use futures::FutureExt;
use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::fuse::modes::Modes;
use crate::mount::tree::{HandleId, Tree};

/// A tree, as the kernel's requests see it.
#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) tree: Arc<Tree>,
    pub(super) modes: Arc<Modes<BackingId>>,
    pub(super) is_writable: bool,
    runtime: tokio::runtime::Handle,
}

impl Adapter {
    /// Creates an adapter; on a writable mount files that are wholly local are passed through.
    pub(super) fn new(tree: Arc<Tree>, runtime: tokio::runtime::Handle, is_writable: bool) -> Self {
        Self { tree, modes: Arc::new(Modes::new()), is_writable, runtime }
    }

    /// Runs `work` here as far as it goes without waiting, and the rest on tokio; then replies.
    fn answer<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Errno>> + Send + 'static,
        reply: impl FnOnce(Result<T, FuseErrno>) + Send + 'static,
    ) {
        let outcome = |caught: std::thread::Result<Result<T, Errno>>| match caught {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(errno)) => Err(FuseErrno::from_i32(errno as i32)),
            Err(_) => {
                tracing::error!("a file system operation panicked");
                Err(FuseErrno::EIO)
            }
        };
        let mut work = Box::pin(AssertUnwindSafe(work).catch_unwind());
        let _runtime = self.runtime.enter();
        match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(caught) => reply(outcome(caught)),
            // Polled again at once by tokio, so no wake-up is lost on the waker that does nothing.
            Poll::Pending => drop(self.runtime.spawn(async move { reply(outcome(work.await)) })),
        }
    }

    /// Runs an operation on the tree for a caller; see [`Self::answer`].
    pub(super) fn with_tree<T, F>(
        &self,
        request: &Request,
        operation: impl FnOnce(Arc<Tree>, Caller) -> F,
        reply: impl FnOnce(Result<T, FuseErrno>) + Send + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T, Errno>> + Send + 'static,
    {
        let pid = Some(request.pid()).filter(|pid| *pid != 0);
        let owner = Owner { uid: request.uid(), gid: request.gid() };
        let caller = Caller { pid, owner, is_background: false };
        self.answer(operation(self.tree.clone(), caller), reply);
    }

    /// Notes that the kernel has seen the answer that gave it this handle; tells whether it is passed through.
    pub(super) fn used(&self, handle: FileHandle) -> bool {
        self.modes.used(HandleId(handle.0))
    }
}
