//! A file that is read in pieces, and has to be one and the same file all the while.
//!
//! PostgreSQL takes the files of old segments for new ones, so what was read of a file at different moments belongs
//! together only if nothing changed it in between. Size and both times of the open file tell, whatever has become of
//! its name. Deliberately absent: a change within one tick of the kernel's clock, which nobody can see.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::disk::Error;

/// An open file.
#[derive(Debug)]
pub struct SteadyFile {
    file: File,
    path: PathBuf,
    stamp: Stamp,
}

/// What changes with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The kernel is asked to have so much in memory soon; behind that it reads ahead by itself.
const WANTED_SOON_BYTES: i64 = 16 << 20;

impl SteadyFile {
    /// Opens a file, and has the kernel begin to read it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::at("open", path))?;
        let metadata = file.metadata().map_err(Error::at("examine", path))?;
        if !metadata.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a file");
            return Err(Error::at("read", path)(source));
        }
        // Hints: without them it is only slower.
        let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        let _ = posix_fadvise(file.as_fd(), 0, WANTED_SOON_BYTES, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        Ok(Self { stamp: Stamp::of(&metadata), file, path: path.to_owned() })
    }

    /// Returns its size, which is the same as long as it is steady.
    pub fn size(&self) -> u64 {
        self.stamp.size
    }

    /// Fills `into` with what stands at `offset`.
    ///
    /// # Errors
    /// `Changed` where there is less.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<(), Error> {
        self.file.read_exact_at(into, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::Changed { path: self.path.clone() },
            _ => Error::at("read", &self.path)(source),
        })
    }

    /// Makes sure that nothing has changed it since it was opened, so that all that was read belongs together.
    ///
    /// # Errors
    /// `Changed` where something has.
    pub fn confirm(&self) -> Result<(), Error> {
        let metadata = self.file.metadata().map_err(Error::at("examine", &self.path))?;
        if Stamp::of(&metadata) == self.stamp {
            return Ok(());
        }
        Err(Error::Changed { path: self.path.clone() })
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    /// Many ticks of any kernel's clock.
    const TICKS: Duration = Duration::from_millis(100);

    #[test]
    fn a_file_is_steady_until_it_is_written_renamed_or_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1");
        let rename = || fs::rename(&path, folder.path().join("2")).unwrap();
        let write = || fs::write(&path, "new").unwrap();
        let cut = || fs::File::options().write(true).open(&path).unwrap().set_len(1).unwrap();
        for change in [&rename as &dyn Fn(), &write, &cut] {
            fs::write(&path, "old").unwrap();
            std::thread::sleep(TICKS);
            let file = SteadyFile::open(&path).unwrap();
            let mut read = [0; 2];
            file.read_at(&mut read, 1).unwrap();
            assert_eq!((file.size(), &read), (3, b"ld"));
            file.confirm().unwrap();
            change();
            assert!(matches!(file.confirm(), Err(Error::Changed { .. })));
        }
        let file = SteadyFile::open(&path).unwrap();
        assert!(matches!(file.read_at(&mut [0; 4], 0), Err(Error::Changed { .. })));
        assert!(matches!(SteadyFile::open(folder.path()), Err(Error::Io { .. })));
    }
}
