//! Which file stands under a name: what was archived is remembered by this, and never by the name alone.
//!
//! PostgreSQL takes the files of old segments for new ones: the same name, or the same inode, comes back with other
//! content. Both times of the file tell, except for changes within one tick of the kernel's clock: of a file
//! that changed just now it cannot be said that it will be another one after the next change.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;

/// A file as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    /// Its size.
    pub(super) size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// How long after a change a file is left alone: many ticks of any kernel's clock.
pub(super) const SETTLING: Duration = Duration::from_millis(100);

impl FileIdentity {
    /// Looks at a file.
    ///
    /// # Errors
    /// Whatever is no file is refused: reading a pipe could wait for ever.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// Returns whether any later change of the file makes it another one.
    pub(super) fn is_settled(&self, now: Timestamp) -> bool {
        let last = self.changed.max(self.modified);
        match Timestamp::new(last.0, last.1 as i32) {
            Ok(last) => now.duration_since(last) >= SETTLING.try_into().unwrap_or_default(),
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_file_is_another_one_once_it_was_written_renamed_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("1"), folder.path().join("2"));
        fs::write(&path, "old").unwrap();
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        let now = Timestamp::now();
        assert!(!before.is_settled(now));
        assert!(before.is_settled(now + Duration::from_secs(1)));
        // As PostgreSQL recycles a segment: the same file under another name and back, the size as it was.
        std::thread::sleep(SETTLING);
        fs::rename(&path, &other).unwrap();
        fs::rename(&other, &path).unwrap();
        let renamed = FileIdentity::of(&path).unwrap();
        assert_ne!(renamed, before);
        std::thread::sleep(SETTLING);
        fs::write(&path, "new").unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), renamed);
        assert!(FileIdentity::of(folder.path()).is_err());
    }
}
