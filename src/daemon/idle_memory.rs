//! Gives memory back to the machine once a site has nothing to archive.
//!
//! The allocator keeps what segments were read into for the next ones, up to the whole budget; a daemon that waits for
//! the next segment for minutes has no use for it.

use std::sync::Arc;
use std::time::Duration;

use super::site_push::SitePush;

/// Long enough that a load of single segments does not have its memory taken between them.
const IDLE_LOOK_EVERY: Duration = Duration::from_secs(5);

/// Looks now and then; never returns.
pub(super) async fn give_back(site: Arc<SitePush>) {
    loop {
        tokio::time::sleep(IDLE_LOOK_EVERY).await;
        if site.has_become_idle() {
            // It may take milliseconds.
            let _ = tokio::task::spawn_blocking(trim).await;
        }
    }
}

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "only the C library knows what its allocator keeps")]
fn trim() {
    // SAFETY: malloc_trim takes no pointer, and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
