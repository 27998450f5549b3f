//! The next segments of a recovery, written where its server wants them before it asks.
//!
//! A fetch waits for nothing as long as for the writing of 16 MiB, and the server waits for the fetch. So the process that
//! reads ahead writes ahead as well, while the server replays or starts the next fetch: into files of `pg_wal` that
//! have no name, so that nothing is left whoever is killed when. Nothing is decided here. Who is asked for a segment
//! finds it as ever, and takes the file that was written only where that holds the very bytes that were found; so what
//! was superseded or read anew since is written anew. Whatever fails, there is no such file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::catalog::WalReader;
use crate::disk::unnamed_file::{begin_unnamed, may_replace};
use crate::disk::{self, Space};
use crate::pg::{ArchiveFileName, WalSegmentName};
use crate::repo::{self, Repository};
use crate::wal::archive::Archive;
use crate::wal::plan_file::owned_like;

/// What was written, or is being written, for the server of a data directory.
#[derive(Debug)]
pub struct WrittenAhead {
    data_directory: PathBuf,
    files: Mutex<Vec<AheadFile>>,
}

#[derive(Debug)]
struct AheadFile {
    segment: WalSegmentName,
    /// What is written, from the moment at which that begins. It is held, so that no other bytes come to lie there.
    content: Arc<OnceLock<Bytes>>,
    written: JoinHandle<Option<File>>,
}

/// One that is asked for next, and one that is written meanwhile: writing takes less than a fetch does.
const FILES_MAX: usize = 2;
/// What must be free in `pg_wal` for a segment to be written ahead: the last room is the server's own.
const FREE_BYTES_MIN: u64 = 1 << 30;

impl WrittenAhead {
    /// Begins with none.
    pub fn new(data_directory: &Path) -> Self {
        Self { data_directory: data_directory.to_owned(), files: Mutex::default() }
    }

    /// Has what comes behind a segment written as soon as it was read, and gives up everything else.
    pub async fn follow<O>(&self, segment: WalSegmentName, archive: &Archive<O>)
    where
        O: AsyncFn() -> Result<Repository, repo::Error>,
    {
        let Some((reader, behind)) = archive.behind(segment, FILES_MAX).await else { return };
        let mut files = self.lock();
        files.retain(|file| behind.contains(&file.segment));
        for segment in behind {
            if files.iter().all(|file| file.segment != segment) {
                files.push(AheadFile::begin(segment, reader.clone(), self.data_directory.clone()));
            }
        }
    }

    /// Returns the file that was written of what was found under a name, if that can become the file that is `wanted`;
    /// it is nobody else's from now on.
    pub async fn take(&self, name: ArchiveFileName, found: &Bytes, wanted: &File) -> Option<File> {
        let mut ahead = {
            let mut files = self.lock();
            let at = files.iter().position(|file| ArchiveFileName::Segment(file.segment) == name)?;
            files.swap_remove(at)
        };
        if !ahead.content.get().is_some_and(|written| is_same(written, found)) {
            return None;
        }
        // It has begun, so that this takes no longer than writing it here would.
        let file = (&mut ahead.written).await.ok()??;
        may_replace(&file, wanted).then_some(file)
    }

    /// Gives up everything: a file system that is to be unmounted must not be held by what nobody asks for.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AheadFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AheadFile {
    fn begin(segment: WalSegmentName, reader: Arc<WalReader>, data_directory: PathBuf) -> Self {
        let content: Arc<OnceLock<Bytes>> = Arc::default();
        let begun = content.clone();
        let written = tokio::spawn(async move {
            let bytes = reader.coming(ArchiveFileName::Segment(segment)).await?;
            let bytes = begun.get_or_init(|| bytes).clone();
            let written = spawn_blocking(move || write(&data_directory, &bytes)).await.ok()?;
            written.inspect_err(|error| tracing::debug!("{segment} is not written ahead: {error}")).ok()?
        });
        Self { segment, content, written }
    }
}

impl Drop for AheadFile {
    fn drop(&mut self) {
        self.written.abort();
    }
}

/// Writes a file without a name, or none where there is little room.
fn write(data_directory: &Path, content: &[u8]) -> Result<Option<File>, disk::Error> {
    let folder = data_directory.join("pg_wal");
    if Space::at(&folder)?.free_bytes < FREE_BYTES_MIN {
        return Ok(None);
    }
    let mut file = begin_unnamed(&folder, owned_like(data_directory)?)?;
    file.write_all(content).map_err(disk::Error::at("write a file in", &folder))?;
    Ok(Some(file))
}

/// Tells whether two are the same bytes at the same place, not only equal ones.
fn is_same(one: &Bytes, other: &Bytes) -> bool {
    one.as_ptr() == other.as_ptr() && one.len() == other.len()
}
