//! Gives memory back to the machine once a site has nothing to archive.
//!
//! Left to itself the allocator keeps what segments were read into, up to the whole budget, and part of it even when
//! it is told to give back (the ends of its arenas). So segments are mapped one by one, which goes back when they are
//! freed, and what is left of small things is given back once a site has become idle.

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

/// Everything larger is a mapping of its own: segments are, whatever their size, and what is counted in kilobytes is not.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: i32 = 512 << 10;

/// Has large things mapped one by one, from now on and in the whole process.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "only the C library's allocator can be told")]
pub(super) fn map_large_things() {
    // SAFETY: mallopt takes no pointer, and may be called at any time from any thread.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN) };
}

#[cfg(not(target_env = "gnu"))]
pub(super) fn map_large_things() {}

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "only the C library knows what its allocator keeps")]
fn trim() {
    // SAFETY: malloc_trim takes no pointer, and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
