//! The raw bytes of a file that is archived: in memory, or in the file itself, read as far as they are needed.
//!
//! A segment of 1 GiB is never whole in memory, and one of 16 MiB is hashed and compressed frame by frame while it is in
//! the processor's cache. Whoever has read to the end confirms it before anything is told or committed: what was read
//! at different moments may be of different files.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::codec::{Digest, Hasher};
use crate::disk::SteadyFile;
use crate::repo::error::Error;

/// What is to be archived, or compared with what is.
#[derive(Debug, Clone)]
pub enum RawContent {
    /// All of it.
    Memory(Bytes),
    /// Where it is read.
    File(Arc<SteadyFile>),
}

/// What is read at a time where it is only hashed.
const STEP_BYTES: u64 = 128 << 10;

impl RawContent {
    /// Returns its size.
    pub fn size(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.size(),
        }
    }

    /// Returns a range of it, which lies within its size; `buffer` is for what has to be read first.
    pub(crate) fn read<'a>(&'a self, range: Range<u64>, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], Error> {
        match self {
            Self::Memory(bytes) => Ok(&bytes[range.start as usize..range.end as usize]),
            Self::File(file) => {
                buffer.resize((range.end - range.start) as usize, 0);
                file.read_at(buffer, range.start)?;
                Ok(buffer)
            }
        }
    }

    /// Makes sure that all that was read belongs together.
    pub(crate) fn confirm(&self) -> Result<(), Error> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::File(file) => Ok(file.confirm()?),
        }
    }

    /// Does what reads it: of a file on a thread that may wait for the file's volume for ever, and holds up nobody else.
    pub(crate) async fn apart<T, E>(
        &self,
        job: impl FnOnce(&Self) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let Self::File(_) = self else { return job(self) };
        let content = self.clone();
        let done = tokio::task::spawn_blocking(move || job(&content)).await;
        done.unwrap_or_else(|error| Err(Error::Internal(error.to_string()).into()))
    }

    /// Computes a digest of all of it.
    pub fn digest(&self, mut hasher: Hasher) -> Result<Digest, Error> {
        let mut buffer = Vec::new();
        for range in steps(0..self.size(), STEP_BYTES) {
            hasher.update(self.read(range, &mut buffer)?);
        }
        self.confirm()?;
        Ok(hasher.finish())
    }
}

impl<T: Into<Bytes>> From<T> for RawContent {
    fn from(bytes: T) -> Self {
        Self::Memory(bytes.into())
    }
}

/// Divides a range into ranges of `step`, of which the last may be shorter.
pub(crate) fn steps(range: Range<u64>, step: u64) -> impl ExactSizeIterator<Item = Range<u64>> {
    let count = (range.end - range.start).div_ceil(step) as usize;
    (0..count).map(move |number| {
        let start = range.start + number as u64 * step;
        start..range.end.min(start + step)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Before a test that waits for a thread fails.
    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_file_that_hangs_holds_up_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1");
        std::fs::write(&path, "WAL").unwrap();
        let file = RawContent::File(Arc::new(SteadyFile::open(&path).unwrap()));
        let (volume_is_back, waits) = mpsc::channel();
        let read = file.apart(move |file| {
            waits.recv_timeout(DEADLINE).map_err(|error| Error::Internal(error.to_string()))?;
            file.digest(Hasher::new())
        });
        // On the one thread that both have.
        let (read, sent) = tokio::join!(read, async { volume_is_back.send(()) });
        sent.unwrap();
        assert_eq!(read.unwrap(), Digest::of(b"WAL"));
        let failed: Result<(), Error> = file.apart(|_| panic!("it fails")).await;
        assert!(matches!(failed, Err(Error::Internal(_))), "{failed:?}");
    }

    #[test]
    fn a_file_and_its_bytes_are_the_same_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1");
        for length in [0, 1, STEP_BYTES, STEP_BYTES + 1, 3 * STEP_BYTES - 1] {
            let bytes: Vec<u8> = (0..length).map(|n| (n / 7) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let file = RawContent::File(Arc::new(SteadyFile::open(&path).unwrap()));
            let memory = RawContent::from(bytes.clone());
            assert_eq!((file.size(), memory.size()), (length, length));
            for content in [&file, &memory] {
                assert_eq!(content.digest(Hasher::new()).unwrap(), Digest::of(&bytes));
                let mut read = Vec::new();
                for range in steps(0..length, 1000) {
                    read.extend_from_slice(content.read(range, &mut Vec::new()).unwrap());
                }
                assert!(read == bytes);
            }
        }
    }
}
