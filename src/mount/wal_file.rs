//! A WAL file of the mount: decoded when it is opened, or empty where it cannot be had.
//!
//! An error would be taken for the end of the archive by whoever copies the file for PostgreSQL. A file of length 0
//! is not: the server refuses it for its size, and can go on once the archive is repaired. So what is damaged, and
//! what is missing in the middle, is empty; what the store does not answer for is waited for.

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::catalog::wal_reader::{Found, Patience, WalReader};
use crate::codec::Digest;
use crate::mount::fs::IoMode;
use crate::mount::lower::LowerError;
use crate::mount::repo_lower::lower_error;
use crate::mount::virtual_dir::{VirtualFile, VirtualReader};
use crate::pg::ArchiveFileName;

/// A file that is in the archive and never changes: a segment, a history.
#[derive(Debug)]
pub(crate) struct WalFile {
    pub(crate) reader: Arc<WalReader>,
    pub(crate) name: ArchiveFileName,
    pub(crate) size: u64,
    /// Places for files that are kept while they are being copied.
    pub(crate) held: Arc<Semaphore>,
    /// Is told of the file when it is opened, before it is read.
    pub(crate) opened: Arc<dyn Opened>,
}

/// Who wants to know which files are opened.
pub(crate) trait Opened: Send + Sync + std::fmt::Debug {
    fn opened(&self, name: ArchiveFileName);
}

/// A file of length 0, which stands for *cannot tell*.
#[derive(Debug)]
pub(crate) struct EmptyFile;

/// A partial segment as it is now; a later one may hold more.
#[derive(Debug, Clone)]
pub(crate) struct PartialFile {
    pub(crate) content: Bytes,
    pub(crate) identity: u64,
}

#[derive(Debug)]
struct WalFileReader {
    reader: Arc<WalReader>,
    name: ArchiveFileName,
    size: u64,
    /// The content until it was read to its end, so that what is read ahead meanwhile does not push it out.
    held: Mutex<Option<(Bytes, OwnedSemaphorePermit)>>,
    /// What was opened, where there was no place to hold it.
    opened: Option<Digest>,
}

/// `cp` gives a copy the mode of the original, and PostgreSQL opens its copy for writing.
const MODE: u32 = 0o600;
/// `cp` reads so much at a time; it is the largest request there is, and each costs two changes between processes.
const IO_BYTES: u32 = 1 << 20;
/// No file that is there has this identity.
const EMPTY: u64 = 1;

impl WalFileReader {
    fn lock_held(&self) -> MutexGuard<'_, Option<(Bytes, OwnedSemaphorePermit)>> {
        self.held.lock().expect("no holder of this lock panics")
    }

    /// Returns the content, or nothing of it; waits for the store however long that takes.
    async fn content(&self) -> Result<Bytes, LowerError> {
        let object = self.name;
        match self.reader.read(object, Patience::Forever).await {
            Ok(Found::Present(bytes)) => Ok(bytes),
            Ok(Found::Absent) => {
                tracing::error!("WAL file {object} has gone from the archive and is served with length 0");
                Ok(Bytes::new())
            }
            Ok(Found::Unreadable(error)) => {
                tracing::error!("WAL file {object} is served with length 0: {error}");
                Ok(Bytes::new())
            }
            Err(error) => Err(lower_error(&error)),
        }
    }

    /// Returns what was opened, or nothing where the segment has been superseded since: one copy is of one form, and
    /// PostgreSQL refuses one that is too short.
    async fn content_as_opened(&self) -> Result<Bytes, LowerError> {
        let content = self.content().await?;
        if self.opened.is_none_or(|opened| opened == Digest::of(&content)) {
            return Ok(content);
        }
        tracing::error!(
            "WAL file {} was superseded while it was copied, and the copy is cut short",
            self.name
        );
        Ok(Bytes::new())
    }
}

#[async_trait::async_trait]
impl VirtualFile for WalFile {
    fn identity(&self) -> u64 {
        0
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn mode(&self) -> u32 {
        MODE
    }

    fn io_bytes(&self) -> u32 {
        IO_BYTES
    }

    async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError> {
        self.opened.opened(self.name);
        let (reader, name, size) = (self.reader.clone(), self.name, self.size);
        let mut reader = WalFileReader { reader, name, size, held: Mutex::default(), opened: None };
        // The whole of it is verified before the first byte is given out.
        let content = reader.content().await?;
        if content.len() as u64 != self.size {
            return EmptyFile.open().await;
        }
        match self.held.clone().try_acquire_owned() {
            Ok(place) => *reader.lock_held() = Some((content, place)),
            Err(_) => reader.opened = Some(Digest::of(&content)),
        }
        // A copy reads each byte once: pages of the kernel's cache would cost more than all else.
        Ok((Arc::new(reader), IoMode::Direct))
    }
}

#[async_trait::async_trait]
impl VirtualReader for WalFileReader {
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, LowerError> {
        // How a copy learns that it has everything, when nothing is held any more.
        if offset >= self.size {
            return Ok(Bytes::new());
        }
        let held = self.lock_held().as_ref().map(|(content, _)| content.clone());
        let content = match held {
            Some(content) => content,
            None => self.content_as_opened().await?,
        };
        if offset.saturating_add(length.into()) >= content.len() as u64 {
            *self.lock_held() = None;
        }
        Ok(part(&content, offset, length))
    }
}

#[async_trait::async_trait]
impl VirtualFile for EmptyFile {
    fn identity(&self) -> u64 {
        EMPTY
    }

    fn size(&self) -> u64 {
        0
    }

    fn mode(&self) -> u32 {
        MODE
    }

    async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError> {
        Ok((Arc::new(EmptyFile), IoMode::Direct))
    }
}

#[async_trait::async_trait]
impl VirtualReader for EmptyFile {
    async fn read(&self, _offset: u64, _length: u32) -> Result<Bytes, LowerError> {
        Ok(Bytes::new())
    }
}

#[async_trait::async_trait]
impl VirtualFile for PartialFile {
    fn identity(&self) -> u64 {
        self.identity
    }

    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn mode(&self) -> u32 {
        MODE
    }

    async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError> {
        Ok((Arc::new(self.clone()), IoMode::Direct))
    }
}

#[async_trait::async_trait]
impl VirtualReader for PartialFile {
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, LowerError> {
        Ok(part(&self.content, offset, length))
    }
}

fn part(content: &Bytes, offset: u64, length: u32) -> Bytes {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
    content.slice(start..start.saturating_add(length as usize).min(content.len()))
}

#[cfg(test)]
mod tests {
    use crate::clock::ManualClock;
    use crate::codec::Compression;
    use crate::pg::{TimelineId, WalSegmentName, WalSegmentNumber};
    use crate::repo::forced_index::LISTING_AGE_MAX;
    use crate::repo::layout::WalObjectName;
    use crate::repo::wal_object::{Replace, WalKey, archive_wal, supersede_wal};
    use crate::repo::{ClusterId, testing};
    use crate::storage::MemoryStore;

    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl Opened for Nobody {
        fn opened(&self, _name: ArchiveFileName) {}
    }

    /// Opens a segment, reads half of it, has it superseded and forgotten, and returns all that a copy gets.
    async fn copy_over_a_force(places: usize) -> Bytes {
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let repository = testing::site(MemoryStore::new(), clock.clone()).await;
        let cluster: ClusterId = "7301234567890123456-1".parse().unwrap();
        let segment = WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(3), cluster.segment_size);
        let key = WalKey::create(repository.keyring()).unwrap();
        let (object, none) = (WalObjectName::Segment(segment), Compression::NONE);
        archive_wal(&repository, cluster, object, b"before", &key, none).await.unwrap();
        let reader = Arc::new(WalReader::new(repository.clone(), cluster, Arc::new(clock.clone()), 1 << 20));
        let file = WalFile {
            reader: reader.clone(),
            name: ArchiveFileName::Segment(segment),
            size: 6,
            held: Arc::new(Semaphore::new(places)),
            opened: Arc::new(Nobody),
        };
        let (copied, _) = file.open().await.unwrap();
        let first = copied.read(0, 3).await.unwrap();
        let (behind, replace) = (b"behind".to_vec().into(), Replace::Anything);
        supersede_wal(&repository, cluster, segment, replace, &behind, &key, none).await.unwrap();
        clock.advance(LISTING_AGE_MAX);
        reader.forget_served();
        let rest = copied.read(3, 3).await.unwrap();
        assert_eq!(copied.read(6, 3).await.unwrap(), Bytes::new());
        [first, rest].concat().into()
    }

    #[tokio::test]
    async fn a_copy_is_of_one_form_or_too_short() {
        assert_eq!(copy_over_a_force(1).await, &b"before"[..]);
        assert_eq!(copy_over_a_force(0).await, &b"bef"[..]);
    }
}
