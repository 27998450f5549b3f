//! A WAL file of the mount: decoded when it is opened, or empty where it cannot be had.
//!
//! An error would be taken for the end of the archive by whoever copies the file for PostgreSQL. A file of length 0
//! is not: the server refuses it for its size, and can go on once the archive is repaired. So what is damaged, and
//! what is missing in the middle, is empty; what the store does not answer for is waited for.

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::catalog::wal_reader::{Found, Patience, WalReader};
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
    /// The content until it was read to its end, so that what is read ahead meanwhile does not push it out.
    held: Mutex<Option<(Bytes, OwnedSemaphorePermit)>>,
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
        let reader = WalFileReader { reader: self.reader.clone(), name: self.name, held: Mutex::default() };
        // The whole of it is verified before the first byte is given out.
        let content = reader.content().await?;
        if content.len() as u64 != self.size {
            return EmptyFile.open().await;
        }
        if let Ok(place) = self.held.clone().try_acquire_owned() {
            *reader.lock_held() = Some((content, place));
        }
        // A copy reads each byte once: pages of the kernel's cache would cost more than all else.
        Ok((Arc::new(reader), IoMode::Direct))
    }
}

#[async_trait::async_trait]
impl VirtualReader for WalFileReader {
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, LowerError> {
        let held = self.lock_held().as_ref().map(|(content, _)| content.clone());
        let content = match held {
            Some(content) => content,
            None => self.content().await?,
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
