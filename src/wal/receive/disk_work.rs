//! What waits for a disk, on a thread of its own.
//!
//! The volume of the state folder may hang. A thread of the runtime that waits for it is gone for everybody: where none is
//! left nobody hears SIGTERM, and the other sites stop as well. What waits here is given up by whoever stops waiting for it,
//! and its thread is left behind.

use crate::repo;
use crate::wal::Error;

/// Does something with a disk, however long that takes.
pub(super) async fn on_disk<T, F>(work: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Error> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| repo::Error::Internal(error.to_string()))?
}
