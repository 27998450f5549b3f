//! The page cache as it was: what only a backup has read is dropped again, what the server uses stays.
//!
//! A cluster larger than memory would otherwise push the server's hot pages out of the cache once a day; dropping
//! everything that was read would do the same at once. So `mincore` is asked when a file is opened, before
//! anything is read ahead. All of this is advice: where the kernel does not take it, nothing is wrong.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Which memory pages of a file were cached when it was opened.
#[derive(Debug, Default)]
pub struct Residency {
    /// One bit a page as the kernel gives it, one byte each; empty where nothing is known or nothing was cached.
    pages: Vec<u8>,
    /// False where it is not known, and everything is left as it is.
    known: bool,
}

/// A larger file is left to the kernel: the answer would take a byte for each 4 KiB.
const FILE_BYTES_MAX: u64 = 4 << 30;
const MEMORY_PAGE: u64 = 4096;

/// Asks the kernel to read ahead far.
pub fn read_sequentially(file: &File) {
    // Advice; a file system without it reads as it does.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
}

/// Drops a range that nobody but a backup has read or written, as far as it is on the disk.
pub fn forget(file: &File, range: Range<u64>) {
    let (offset, len) = (range.start as libc::off_t, (range.end - range.start) as libc::off_t);
    // Advice; what stays in the cache is no error.
    let _ = posix_fadvise(file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

impl Residency {
    /// Asks which pages of `file` are cached.
    pub fn of(file: &File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        if len == 0 || len > FILE_BYTES_MAX {
            return Ok(Self::default());
        }
        Ok(in_core(file, len as usize).map_or_else(Self::default, |pages| Self { pages, known: true }))
    }

    /// Drops those pages of `range` that were not cached.
    pub fn restore(&self, file: &File, range: Range<u64>) {
        if !self.known {
            return;
        }
        let (first, end) = (range.start / MEMORY_PAGE, range.end.div_ceil(MEMORY_PAGE));
        let was_cached = |page: u64| self.pages.get(page as usize).is_some_and(|byte| byte & 1 == 1);
        let mut page = first;
        while page < end {
            let cached = was_cached(page);
            let from = page;
            while page < end && was_cached(page) == cached {
                page += 1;
            }
            if !cached {
                forget(file, from * MEMORY_PAGE..page * MEMORY_PAGE);
            }
        }
    }
}

/// Asks `mincore` for the first `len` bytes of `file`.
#[expect(unsafe_code, reason = "mincore wants a mapping, which is made, asked about and removed here")]
fn in_core(file: &File, len: usize) -> Option<Vec<u8>> {
    let mut pages = vec![0; len.div_ceil(MEMORY_PAGE as usize)];
    // SAFETY: a fresh private mapping that nothing reads or writes; `pages` has a byte for each page of it, and it is
    // unmapped before its address is forgotten.
    unsafe {
        let address =
            libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), 0);
        if address == libc::MAP_FAILED {
            return None;
        }
        let answer = libc::mincore(address, len, pages.as_mut_ptr());
        libc::munmap(address, len);
        (answer == 0).then_some(pages)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    fn cached_pages(file: &File) -> usize {
        let len = file.metadata().unwrap().len() as usize;
        in_core(file, len).unwrap().iter().filter(|byte| **byte & 1 == 1).count()
    }

    #[test]
    fn what_was_not_cached_is_dropped_and_what_was_stays() {
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&[7; 64 * 4096]).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        // A file system that keeps its pages anyway (tmpfs) has nothing to restore.
        if cached_pages(&file) != 0 {
            return;
        }
        let mut byte = [0];
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        file.rewind().unwrap();
        file.read_exact(&mut byte).unwrap();
        let before = cached_pages(&file);
        assert!((1..60).contains(&before), "{before}");
        let residency = Residency::of(&file).unwrap();
        let mut all = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut all).unwrap();
        assert_eq!(cached_pages(&file), 64);
        residency.restore(&file, 0..all.len() as u64);
        assert_eq!(cached_pages(&file), before);
    }

    #[test]
    fn an_empty_file_has_nothing_to_restore() {
        let file = tempfile::tempfile().unwrap();
        Residency::of(&file).unwrap().restore(&file, 0..100);
    }
}
