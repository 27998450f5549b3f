//! Pieces in the store that nobody can use, and in whose place ours were to go: each is told, and gone round.
//!
//! A piece is named after its range, so that the same bytes find another place as soon as they are cut otherwise, and
//! whoever reads pieces passes over those that are damaged. It is told until the segment leaves the spool: the store has
//! all of it then.

use std::collections::BTreeMap;

use crate::pg::WalSegmentName;
use crate::wal::Error;
use crate::wal::receive::plan::{Upload, plan_around};
use crate::wal::receive::upload::{Progress, Work};

/// Those of the segments in the spool: what is told of each, by segment, beginning and end.
#[derive(Debug, Default)]
pub(super) struct SpoiledPieces(BTreeMap<(WalSegmentName, u32, u32), String>);

impl SpoiledPieces {
    /// Decides how to store something without meeting any of them again.
    pub fn go_round(&self, upload: Upload, is_whole: bool) -> Option<Upload> {
        let Upload::Piece { segment, from, .. } = upload else { return Some(upload) };
        plan_around(upload, is_whole, |to| self.0.contains_key(&(segment, from, to)))
    }

    /// Returns what is told of the first.
    pub fn message(&self) -> Option<&str> {
        self.0.values().next().map(String::as_str)
    }

    /// Forgets those of a segment.
    pub fn forget(&mut self, segment: WalSegmentName) {
        self.0.retain(|(other, ..), _| *other != segment);
    }
}

impl Progress {
    /// Takes note of a piece that could not be stored because something that nobody can use stands in its place.
    ///
    /// # Errors
    /// All others.
    pub(super) fn meet(&mut self, work: Work, error: Error) -> Result<(), Error> {
        match work {
            Work::Upload(Upload::Piece { segment, from, to }) if is_unusable(&error) => {
                let message = format!("{error}; what belongs there is stored beside it");
                self.spoiled.0.insert((segment, from, to), message);
                Ok(())
            }
            _ => Err(error),
        }
    }
}

/// Tells whether what stands in the place of a file can be used by nobody.
pub(super) fn is_unusable(error: &Error) -> bool {
    match error {
        Error::Repository(error) => error.is_unusable(),
        _ => false,
    }
}
