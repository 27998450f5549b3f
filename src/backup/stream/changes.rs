//! What the server's changes are changes of, where it was asked for changes alone.
//!
//! A server says of a file which of its pages have changed; the rest is what the last basebackup knew of it, but for what the
//! relation was cut by since: that the WAL summaries alone tell.

use std::fmt;
use std::sync::Arc;

use crate::backup::changed_blocks::ChangedBlocks;
use crate::backup::data_directory::SourceFile;
use crate::backup::state::KnownFile;
use crate::repo::entry::TreePath;

/// Tells what is known of a file, if anything.
pub type LookUp = dyn Fn(&TreePath) -> Option<KnownFile> + Send + Sync;

/// What changes are changes of.
pub struct Changes {
    /// Looks up what is known of a file.
    pub known: Box<LookUp>,
    /// What the server's summaries say, of which its archives do not tell from where a relation was cut.
    pub summaries: Arc<ChangedBlocks>,
    /// Pages of a relation's file.
    pub segment_pages: u32,
}

impl Changes {
    /// Returns from which page of a file on nothing holds of what is known.
    pub(super) fn cut_at(&self, file: &SourceFile) -> Option<u32> {
        self.summaries.cut_at(&file.relation()?, self.segment_pages)
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("segment_pages", &self.segment_pages).finish_non_exhaustive()
    }
}
