//! The bytes of files on the disk: pages at their places, zeros as holes, the rest of what a file is at its end.
//!
//! Synchronous, run on the CPU pool. No link is followed, whatever stands at a name; nothing is synced here, which
//! `run` does for whole file systems.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::disk::Owner;
use crate::repo::page_map::PAGE_SIZE;
use crate::restore::Error;
use crate::restore::batch::{Batch, FileTask, Place};

/// Writes files for an owner and remembers which are finished.
#[derive(Debug)]
pub(super) struct FileWriter {
    owner: Owner,
    finished: Mutex<Vec<u64>>,
    /// Bytes written to files; of a file in place only those that differed.
    pub written: AtomicU64,
}

/// The file that was written to last: neighbouring places are mostly of one file.
#[derive(Debug, Default)]
pub(super) struct OpenFile(Option<(u32, File)>);

impl FileWriter {
    pub(super) fn new(owner: Owner) -> Self {
        Self { owner, finished: Mutex::default(), written: AtomicU64::new(0) }
    }

    /// Takes the numbers of the files that were finished since the last call.
    pub(super) fn take_finished(&self) -> Vec<u64> {
        std::mem::take(&mut *self.finished.lock().expect("no holder of this lock panics"))
    }

    /// Writes what a chunk holds of a file; the last part finishes the file.
    ///
    /// Returns false where the chunk is too short.
    pub(super) fn write(
        &self,
        batch: &Batch,
        open: &mut OpenFile,
        raw: &[u8],
        place: &Place,
    ) -> Result<bool, Error> {
        let task = &batch.files[place.file as usize];
        let Some(bytes) = raw.get(place.at as usize..place.at as usize + place.len as usize) else {
            return Ok(false);
        };
        if open.0.as_ref().is_none_or(|(file, _)| *file != place.file) {
            open.0 = Some((place.file, open_file(task)?));
        }
        let (_, file) = open.0.as_ref().expect("it has just been opened");
        let written = match task.in_place {
            true => write_differing(file, bytes, place.offset),
            false => file.write_all_at(bytes, place.offset).map(|()| bytes.len() as u64),
        };
        let written = written.map_err(Error::at("write", &task.path))?;
        self.written.fetch_add(written, Ordering::Relaxed);
        let left = task.left.fetch_sub(u64::from(place.len), Ordering::AcqRel);
        if left == u64::from(place.len) {
            self.finish(task, file)?;
        }
        Ok(true)
    }

    /// Writes the files of which nothing has to be fetched, and the holes of those that are in place.
    pub(super) fn write_at_hand(&self, batch: &Batch) -> Result<(), Error> {
        for (file, range) in &batch.holes {
            let task = &batch.files[*file];
            punch(&open_file(task)?, range.start, range.end - range.start)
                .map_err(Error::at("make a hole in", &task.path))?;
        }
        for (file, bytes) in &batch.inline {
            let task = &batch.files[*file];
            let open = open_file(task)?;
            open.write_all_at(bytes, 0).map_err(Error::at("write", &task.path))?;
            self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.finish(task, &open)?;
        }
        let mut inline = batch.inline.iter().map(|(file, _)| *file).peekable();
        for (n, task) in batch.files.iter().enumerate() {
            if inline.next_if_eq(&n).is_none() && task.left.load(Ordering::Acquire) == 0 {
                self.finish(task, &open_file(task)?)?;
            }
        }
        Ok(())
    }

    fn finish(&self, task: &FileTask, file: &File) -> Result<(), Error> {
        let at = |action| Error::at(action, &task.path);
        file.set_len(task.size).map_err(at("set the size of"))?;
        set_attributes(file, &task.path, self.owner, task.mode, task.modified)?;
        self.finished.lock().expect("no holder of this lock panics").push(task.number);
        Ok(())
    }
}

/// Gives a file its owner, mode and time.
pub(super) fn set_attributes(
    file: &File,
    path: &Path,
    owner: Owner,
    mode: u32,
    modified: Timestamp,
) -> Result<(), Error> {
    let at = |action| Error::at(action, path);
    let metadata = file.metadata().map_err(at("look up"))?;
    if (metadata.uid(), metadata.gid()) != (owner.uid, owner.gid) {
        fchown(file, Some(owner.uid), Some(owner.gid)).map_err(at("change the owner of"))?;
    }
    file.set_permissions(Permissions::from_mode(mode)).map_err(at("set the mode of"))?;
    file.set_modified(system_time(modified)).map_err(at("set the time of"))
}

/// Returns a time as the system has it.
pub(super) fn system_time(time: Timestamp) -> SystemTime {
    let since = Duration::new(time.as_second().unsigned_abs(), 0);
    let nanoseconds = Duration::from_nanos(u64::from(time.subsec_nanosecond().unsigned_abs()));
    match time.as_second() < 0 || time.subsec_nanosecond() < 0 {
        true => SystemTime::UNIX_EPOCH - since - nanoseconds,
        false => SystemTime::UNIX_EPOCH + since + nanoseconds,
    }
}

fn open_file(task: &FileTask) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.write(true).read(task.in_place).create(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options.open(&task.path).map_err(Error::at("open", &task.path))
}

/// Writes the pages that are not there already, and returns how many bytes those were.
fn write_differing(file: &File, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let mut there = vec![0; bytes.len()];
    let mut read = 0;
    while read < there.len() {
        match file.read_at(&mut there[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let mut written = 0;
    for (n, page) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
        let at = n * PAGE_SIZE as usize;
        let same = at + page.len() <= read && there[at..at + page.len()] == *page;
        if !same {
            file.write_all_at(page, offset + at as u64)?;
            written += page.len() as u64;
        }
    }
    Ok(written)
}

/// Makes bytes of a file zero, without room on the disk where the file system can do that.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file.as_fd(), flags, offset as i64, len as i64) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            let zeros = vec![0; PAGE_SIZE as usize];
            let end = offset + len;
            (offset..end)
                .step_by(PAGE_SIZE as usize)
                .try_for_each(|at| file.write_all_at(&zeros[..(end - at).min(PAGE_SIZE) as usize], at))
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Names the first file that not all bytes came for.
pub(super) fn first_unfinished(batch: &Batch) -> Option<(&Path, u64)> {
    let left = |task: &FileTask| task.left.load(Ordering::Acquire);
    batch.files.iter().find(|task| left(task) > 0).map(|task| (&*task.path, left(task)))
}
