//! What `check` says of WAL that was left out of the archive by `queue_max`: a failure until a basebackup lies behind.
//! Read only: a basebackup from this host forgets what lies before it, and one from elsewhere is seen in the repository.

use crate::catalog::basebackups;
use crate::config::{Config, SiteConfig};
use crate::repo::Repository;
use crate::site::{Item, describe};
use crate::wal::left_out::{Gap, LeftOut, RecoveryStart, file_of};

const NAME: &str = "WAL left out";

/// Looks for gaps that no basebackup lies behind; nothing to say where nothing was ever left out.
pub(super) async fn check_left_out(
    config: &Config,
    site: &SiteConfig,
    repository: Option<&Repository>,
) -> Option<Item> {
    let path = file_of(&config.paths.state, &site.name);
    let left_out = match LeftOut::load(&path) {
        Ok(left_out) => left_out,
        Err(error) => {
            let hint = "Take a basebackup, and remove the file.";
            return Some(Item::failed(NAME, describe(&error), hint));
        }
    };
    if left_out.gaps.is_empty() {
        return site.queue_max_bytes.map(|_| Item::ok(NAME, "none on this host"));
    }
    // What cannot be listed is behind nothing.
    let listed = match repository {
        Some(repository) => basebackups::list(repository).await.unwrap_or_default(),
        None => basebackups::BasebackupList::default(),
    };
    let starts: Vec<_> = listed.complete.iter().map(|listed| RecoveryStart::of(&listed.record)).collect();
    let open = |gap: &&Gap| !starts.iter().any(|start| gap.lies_before(start));
    let gaps: Vec<&Gap> = left_out.gaps.iter().filter(open).collect();
    Some(match gaps.last() {
        None => Item::ok(NAME, format!("{} gaps, all before a basebackup", left_out.gaps.len())),
        Some(gap) => {
            let count = left_out.gaps.iter().filter(open).count();
            let others =
                if count > 1 { format!(", and {} gaps before it", count - 1) } else { String::new() };
            let detail = format!(
                "{} to {} ({} files) since {}, because more waited than queue_max{others}",
                gap.first, gap.last, gap.files, gap.since
            );
            Item::failed(NAME, detail, "Take a basebackup: nothing is recovered across the gap.")
        }
    })
}
