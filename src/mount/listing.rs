//! An open directory: a listing that is read in steps and can be rewound.
//!
//! A volume's directory is listed whole at the first step and kept until the handle is rewound or closed. A virtual
//! directory is listed in batches, so a WAL directory with hundreds of thousands of names costs one batch of memory.
//! An entry's offset is its position; the kernel asks in order, and only `rewinddir` goes back, to the start.

use std::sync::Arc;

use nix::errno::Errno;
use tokio::sync::Mutex;

use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::fs::{FileKind, ListEntry, LocalId, Volume};
use crate::mount::tree::Ino;
use crate::mount::virtual_dir::{DynamicDir, LIST_BATCH};

/// What a listing reads from.
#[derive(Debug)]
pub(crate) enum DirectorySource {
    Volume { volume: Arc<dyn Volume>, id: LocalId, first_number: u64 },
    Virtual(Arc<dyn DynamicDir>),
}

/// An open directory.
#[derive(Debug)]
pub struct ListingHandle {
    ino: Ino,
    source: DirectorySource,
    window: Mutex<Window>,
}

/// The entries at hand and where the first of them stands.
#[derive(Debug, Default)]
struct Window {
    start: u64,
    entries: Vec<ListEntry<Ino>>,
    complete: bool,
}

impl ListingHandle {
    pub(crate) fn new(ino: Ino, source: DirectorySource) -> Self {
        Self { ino, source, window: Mutex::default() }
    }

    /// Hands entries from position `offset` on to `take`, until it returns false or the directory ends.
    ///
    /// `take` is given the offset of the entry after the one it gets.
    pub async fn read(
        &self,
        caller: &Caller,
        offset: u64,
        mut take: impl FnMut(u64, &ListEntry<Ino>) -> bool,
    ) -> Result<(), Errno> {
        let mut window = self.window.lock().await;
        if offset == 0 || offset < window.start {
            *window = Window::default();
        }
        let mut at = offset;
        loop {
            while at >= window.start + window.entries.len() as u64 {
                if window.complete {
                    return Ok(());
                }
                self.advance(caller, &mut window).await?;
            }
            let entry = &window.entries[(at - window.start) as usize];
            if !take(at + 1, entry) {
                return Ok(());
            }
            at += 1;
        }
    }

    /// Puts the next batch in place of the one at hand.
    async fn advance(&self, caller: &Caller, window: &mut Window) -> Result<(), Errno> {
        let dots = [b".".as_slice(), b"..".as_slice()];
        let first = window.start == 0 && window.entries.is_empty();
        let mut entries = Vec::new();
        if first {
            let dot =
                |name: &[u8]| ListEntry { name: name.to_vec(), id: self.ino, kind: FileKind::Directory };
            entries.extend(dots.map(dot));
        }
        let complete = match &self.source {
            DirectorySource::Volume { volume, id, first_number } => {
                let listed = volume.list(caller, *id).await?;
                entries.extend(listed.into_iter().map(|entry| ListEntry {
                    name: entry.name,
                    id: Ino(first_number | entry.id.0),
                    kind: entry.kind,
                }));
                true
            }
            DirectorySource::Virtual(directory) => {
                let last = window.entries.last().filter(|entry| !dots.contains(&entry.name.as_slice()));
                let after = last.map(|entry| entry.name.clone());
                let listed = caller
                    .killable(async {
                        let batch = directory.list(after.as_deref(), LIST_BATCH).await;
                        batch.map_err(|error| errno::of_lower(&error))
                    })
                    .await?;
                let complete = listed.len() < LIST_BATCH;
                // The number is made up: a name gets its own when it is looked up.
                entries.extend(listed.into_iter().map(|(name, kind)| ListEntry { name, id: self.ino, kind }));
                complete
            }
        };
        window.start += window.entries.len() as u64;
        (window.entries, window.complete) = (entries, complete);
        Ok(())
    }
}
