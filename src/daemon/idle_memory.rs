//! Gives memory back to the machine once a site has nothing to archive: looked for now and then, because the allocator
//! keeps it and nobody waits for it.

use std::sync::Arc;
use std::time::Duration;

use crate::memory;

use super::site_push::SitePush;

/// Long enough that a load of single segments does not have its memory taken between them.
const IDLE_LOOK_EVERY: Duration = Duration::from_secs(5);

/// Looks now and then; never returns.
pub(super) async fn give_back(site: Arc<SitePush>) {
    loop {
        tokio::time::sleep(IDLE_LOOK_EVERY).await;
        if site.has_become_idle() {
            let _ = tokio::task::spawn_blocking(memory::give_back).await;
        }
    }
}
