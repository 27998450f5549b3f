//! Files that need not be read because the server's WAL says that nothing in them has changed (PostgreSQL 17 and later).
//!
//! Asked for once the server is in backup mode, from the start of the basebackup that is built upon: what changed while
//! that one was taken is in the WAL as well, and what changes from now on will be. A hint only spares reading. A file of
//! which some blocks have changed is read as a whole, because `backup_manifest` has a checksum of all of it; every
//! seventh basebackup asks nobody and reads all.

use std::path::Path;
use std::time::Duration;

use crate::backup::changed_blocks::{ChangedBlocks, Hint};
use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::known_parent::KnownParent;
use crate::backup::live_directory::read_histories;
use crate::backup::run::blocking;
use crate::backup::source::{BackupSession, SourceError};
use crate::backup::state::KnownFile;
use crate::backup::wal_summaries::{NoSummaries, Summaries, WalSpan, read_summaries};
use crate::clock::Clock;
use crate::pg::Lsn;
use crate::repo::page_map::PAGE_SIZE;

/// What the WAL says of files.
#[derive(Debug)]
pub struct Hints {
    changed: ChangedBlocks,
    segment_pages: u32,
}

/// How long the newest summary may take: it is written a moment after the checkpoint that the basebackup begins with.
const PATIENCE: Duration = Duration::from_secs(10);

impl Hints {
    /// Asks the server what has changed since `parent` began; none where it cannot tell, or is not to be asked.
    ///
    /// # Errors
    /// Where the session is lost.
    pub async fn gather(
        session: &BackupSession,
        parent: &KnownParent,
        data_directory: &Path,
        segment_pages: u32,
        clock: &dyn Clock,
    ) -> Result<Option<Self>, Error> {
        if parent.reads_all() {
            return Ok(None);
        }
        let (facts, started) = (parent.facts(), session.started());
        if !reaches_behind(facts.stop_lsn, started.lsn) {
            let (start, stop) = (started.lsn, facts.stop_lsn);
            tracing::info!(
                "the server is not asked which blocks have changed: this basebackup begins at {start}, before the end of the last one at {stop}"
            );
            return Ok(None);
        }
        let directory = data_directory.to_owned();
        let histories = blocking(move || read_histories(&directory)).await?;
        let history = histories.iter().map(|(history, _)| history).find(|it| it.timeline == started.timeline);
        let (from, to) = ((facts.timeline, facts.start_lsn), (started.timeline, started.lsn));
        let Some(spans) = WalSpan::between(history, from, to) else {
            tracing::info!(
                "the server is not asked which blocks have changed: no history leads from {} of timeline {} to {} of timeline {}",
                from.1,
                from.0,
                to.1,
                to.0
            );
            return Ok(None);
        };
        let read = read_summaries(session.session(), &spans, clock, PATIENCE).await;
        match read.map_err(SourceError::from)? {
            Summaries::Known(changed) => Ok(Some(Self { changed, segment_pages })),
            Summaries::None(NoSummaries::TooOld(_) | NoSummaries::Off) => Ok(None),
            Summaries::None(why) => {
                tracing::info!("the server cannot say which blocks have changed: {why}");
                Ok(None)
            }
        }
    }

    /// Has them say what a test wants.
    #[cfg(test)]
    pub(super) fn of(changed: ChangedBlocks, segment_pages: u32) -> Self {
        Self { changed, segment_pages }
    }

    /// Returns whether every page of `file` is as it is `known`.
    pub fn vouch_for(&self, file: &SourceFile, known: &KnownFile) -> bool {
        let (Some(relation), true) = (file.relation(), file.size == known.size) else {
            return false;
        };
        let Ok(pages) = u32::try_from(file.size.div_ceil(PAGE_SIZE)) else {
            return false;
        };
        file.size.is_multiple_of(PAGE_SIZE)
            && self.changed.hint(&relation, self.segment_pages, pages, pages) == Hint::Unchanged
    }
}

/// Returns whether a basebackup that starts at `start` may take over pages unread of one that stopped at `stop`.
///
/// A standby may begin behind the stop of one that was taken from its primary. The pages of that may be newer than the
/// point at which this one is consistent, and nothing would replay them back.
pub(super) fn reaches_behind(stop: Lsn, start: Lsn) -> bool {
    stop <= start
}

#[cfg(test)]
mod tests {
    use crate::backup::changed_blocks::SummaryEntry;
    use crate::backup::data_directory::FileIdentity;
    use crate::backup::state::KnownContent;
    use crate::pg::{Crc32c, Fork, Oid};
    use crate::repo::entry::TreePath;

    use super::*;

    #[test]
    fn pages_of_the_future_are_not_taken_over() {
        assert!(reaches_behind(Lsn(0x500), Lsn(0x500)));
        assert!(reaches_behind(Lsn(0x500), Lsn(0x501)));
        assert!(!reaches_behind(Lsn(0x500), Lsn(0x4ff)));
    }

    #[test]
    fn only_relations_of_the_same_size_are_vouched_for() {
        let mut changed = ChangedBlocks::default();
        let mut change = |relfilenode: u32, block: u32, is_limit: bool| {
            let (tablespace, database, fork) = (Oid::DEFAULT_TABLESPACE, Oid(5), Fork::Main);
            let relfilenode = Oid(relfilenode);
            let entry = SummaryEntry { tablespace, database, relfilenode, fork, block, is_limit };
            changed.insert(&entry).unwrap();
        };
        change(16_386, 1, false);
        change(16_387, 1, true);
        change(16_388, 2, false);
        let hints = Hints::of(changed, 131_072);
        let file = |path: &str, size: u64| SourceFile {
            path: TreePath::new(path).unwrap(),
            root: 0,
            size,
            mode: 0o600,
            modified: jiff::Timestamp::UNIX_EPOCH,
            identity: None::<FileIdentity>,
        };
        let known = |size: u64| KnownFile {
            path: TreePath::root(),
            size,
            inode: 0,
            device: 0,
            changed: jiff::Timestamp::UNIX_EPOCH,
            crc: Some(Crc32c::default()),
            damaged_pages: 0,
            content: KnownContent::Inline(bytes::Bytes::new()),
        };
        assert!(hints.vouch_for(&file("data/base/5/16385", 16_384), &known(16_384)));
        // One of its pages has changed, it was cut to its first page, one behind its end has changed.
        assert!(!hints.vouch_for(&file("data/base/5/16386", 16_384), &known(16_384)));
        assert!(!hints.vouch_for(&file("data/base/5/16387", 16_384), &known(16_384)));
        assert!(hints.vouch_for(&file("data/base/5/16388", 16_384), &known(16_384)));
        assert!(!hints.vouch_for(&file("data/base/5/16385", 16_384), &known(8192)));
        assert!(!hints.vouch_for(&file("data/base/5/16385", 8192), &known(16_384)));
        assert!(!hints.vouch_for(&file("data/base/5/16385", 8000), &known(8000)));
        for path in ["data/base/5/16385_fsm", "data/pg_xact/0000", "data/base/5/PG_VERSION"] {
            assert!(!hints.vouch_for(&file(path, 8192), &known(8192)), "{path}");
        }
    }
}
