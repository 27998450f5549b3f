//! Fetches whole trees into the upper, several files side by side.
//!
//! For what must not fail to be read later: in a critical section PostgreSQL turns a read error into a PANIC. Files
//! that are changed or removed meanwhile are not in the way: what was written is local already, and what is gone is
//! not needed. Deliberately absent: order and throttling, which are the hydrator's.

use futures::{StreamExt, TryStreamExt, stream};
use nix::errno::Errno;

use crate::mount::caller::Caller;
use crate::mount::fs::{FileKind, LocalId, Volume};
use crate::mount::upper::Upper;

/// Files fetched side by side: many are small, and a round trip each would add up.
const FILES_AT_ONCE: usize = 8;
/// A large file is fetched in parts of this size, so that little of it is in memory at once.
const PART_BYTES: u64 = 4 << 20;

impl Upper {
    /// Makes every file below the directory `name` of the root local; one that is not there has nothing to fetch.
    pub async fn make_local(&self, name: &str) -> Result<(), Errno> {
        let caller = Caller::internal();
        let mut held = Vec::new();
        let outcome = self.make_tree_local(&caller, name.as_bytes(), &mut held).await;
        held.into_iter().for_each(|directory| self.forget(directory, 1));
        outcome
    }

    /// Leaves the directories it still refers to in `held`.
    async fn make_tree_local(
        &self,
        caller: &Caller,
        name: &[u8],
        held: &mut Vec<LocalId>,
    ) -> Result<(), Errno> {
        let mut files = Vec::new();
        let mut directories = vec![(self.root(), name.to_vec())];
        while let Some((above, name)) = directories.pop() {
            let Some((directory, kind)) = self.entered(caller, above, &name).await? else { continue };
            held.push(directory);
            if kind != FileKind::Directory {
                continue;
            }
            for entry in self.list(caller, directory).await? {
                match entry.kind {
                    FileKind::File => files.push((directory, entry.name)),
                    FileKind::Directory => directories.push((directory, entry.name)),
                    FileKind::Symlink | FileKind::Fifo | FileKind::Socket => {}
                }
            }
        }
        let fetch = |(directory, name): (LocalId, Vec<u8>)| async move {
            self.make_file_local(caller, directory, &name).await
        };
        let fetches = files.into_iter().map(fetch);
        stream::iter(fetches).buffer_unordered(FILES_AT_ONCE).try_collect().await
    }

    async fn make_file_local(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<(), Errno> {
        let Some((id, _)) = self.entered(caller, directory, name).await? else { return Ok(()) };
        let opened = self.open_file(id);
        let size = self.attributes(caller, id).await.map(|entry| entry.attributes.size);
        self.forget(id, 1);
        let (file, size) = match (opened, size) {
            (Ok(file), Ok(size)) => (file, size),
            (Err(Errno::ENOENT), _) | (_, Err(Errno::ENOENT)) => return Ok(()),
            (Err(errno), _) | (_, Err(errno)) => return Err(errno),
        };
        let mut at = 0;
        while at < size {
            let end = at.saturating_add(PART_BYTES).min(size);
            file.ensure_range(caller, at..end).await?;
            at = end;
        }
        Ok(())
    }

    /// Looks a name up and holds a reference to what it found.
    async fn entered(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
    ) -> Result<Option<(LocalId, FileKind)>, Errno> {
        match self.lookup(caller, directory, name).await {
            Ok(entry) => Ok(Some((entry.id, entry.attributes.kind))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}
