//! Writing a state: appended to while the basebackup runs, given its name after the commit.
//!
//! blocks, in the order in which they come → index → directory, facts, end → fsync → name → older states removed.
//! Until it has its name nobody reads it, so a crash at any point leaves the state before or this one. An error leaves
//! the file in parts, so the writer takes nothing more after one; dropped without `finish`, it removes the file.
//! What a killed attempt has left gets its end from its journal (`journal`), and no name.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::mem;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use crate::backup::page_cache;
use crate::backup::state::format::{
    BLOCK_BYTES_MAX, DIRECTORY_BYTES_MAX, FACTS_BYTES_MAX, FILE_BYTES_MAX, Flaw, Footer, Part, TAG_LEN,
    encode_directory, encode_facts, encode_file, encode_hashes, encode_header, objection_to_block,
    objection_to_file, seal,
};
use crate::backup::state::reader::PartSource;
use crate::backup::state::sorter::FileSorter;
use crate::backup::state::{
    KnownBlock, KnownContent, KnownFile, RecordAt, State, StateError, StateFacts, StateFolder,
};
use crate::disk::{
    self,
    durable::{self, Create},
};
use crate::repo::BasebackupId;

/// What gathers before it is written.
const BUFFER_BYTES: usize = 1 << 20;

/// The state of a basebackup that is being taken.
#[derive(Debug)]
pub struct StateWriter {
    folder: StateFolder,
    id: BasebackupId,
    out: Output,
    files: FileSorter,
    file_count: u64,
    /// Whether the file stays when this is dropped.
    stays: bool,
    /// What is believed of an attempt that died, when that is taken up.
    held: u64,
}

/// What has been done of a finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FinishStep {
    /// Everything is in the file.
    Written,
    /// It is on the disk.
    Synced,
    /// It has its name.
    Named,
    /// The others are gone.
    Tidied,
}

impl StateWriter {
    pub(super) fn create(folder: StateFolder, id: BasebackupId, create: Create) -> Result<Self, StateError> {
        let out = Output::create(folder.unfinished(id), id, create)?;
        Ok(Self { folder, id, out, files: FileSorter::default(), file_count: 0, stays: false, held: 0 })
    }

    /// Opens what a killed attempt has left, to be given the index it lacks behind the `held` bytes that had been synced:
    /// what stands behind them is cut off, be it an index that was given before.
    pub(super) fn reopen(folder: StateFolder, id: BasebackupId, held: u64) -> Result<Self, StateError> {
        let path = folder.unfinished(id);
        let opened = OpenOptions::new().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = opened.map_err(disk::Error::at("open the state", &path))?;
        let found = file.metadata().map_err(disk::Error::at("stat", &path))?.len();
        if found < held {
            return Err(StateError::Damaged { path, detail: "it is shorter than it was".to_owned() });
        }
        file.set_len(held).map_err(disk::Error::at("truncate", &path))?;
        let out = Output { file, path, id, buffer: Vec::new(), written: held, failed: false };
        // It stays where it is, whatever comes of it.
        Ok(Self { folder, id, out, files: FileSorter::default(), file_count: 0, stays: true, held })
    }

    /// Returns whether the blocks of a file are among what is believed of what was reopened.
    pub(super) fn holds(&self, file: &KnownFile) -> bool {
        let KnownContent::Pages { records, .. } = &file.content else {
            return true;
        };
        let end = |at: &RecordAt| at.offset.checked_add(u64::from(at.len));
        records.iter().all(|at| end(at).is_some_and(|end| end <= self.held))
    }

    /// Gives what was reopened its end, without a name.
    pub(super) fn finish_unnamed(mut self, facts: &StateFacts) -> Result<(), StateError> {
        self.write_end(facts)?;
        self.out.flush()
    }

    /// Has what was noted so far on the disk, where it stays though the basebackup may fail; returns how many bytes.
    pub fn keep(&mut self) -> Result<u64, StateError> {
        self.stays = true;
        self.out.flush()?;
        self.out.file.sync_data().map_err(disk::Error::at("fsync the state", &self.out.path))?;
        Ok(self.out.written)
    }

    /// Notes what is known of up to 16384 pages; what is returned belongs into the file's `records`.
    pub fn push_block(&mut self, block: &KnownBlock) -> Result<RecordAt, StateError> {
        if let Some(what) = objection_to_block(block) {
            return Err(StateError::Refused { file: "a block of pages".to_owned(), what });
        }
        self.append_block(encode_hashes(&block.hashes), block.map.encode())
    }

    /// Takes over what another state knows of the `n`th pages of a file.
    pub fn copy_block(&mut self, from: &State, file: &KnownFile, n: u64) -> Result<RecordAt, StateError> {
        let (hashes, map) = from.raw_block(file, n)?;
        self.append_block(hashes, map)
    }

    fn append_block(&mut self, hashes: Vec<u8>, map: Vec<u8>) -> Result<RecordAt, StateError> {
        if hashes.len() + map.len() + 2 * TAG_LEN > BLOCK_BYTES_MAX as usize {
            let file = "a block of pages".to_owned();
            return Err(StateError::Refused { file, what: "its page map is too large" });
        }
        // Side by side: a reader finds the map behind as many hashes as there are pages.
        let first = self.out.append(Part::Hashes, hashes)?;
        let second = self.out.append(Part::Map, map)?;
        Ok(RecordAt { offset: first.offset, len: first.len + second.len })
    }

    /// Notes what is known of a file whose blocks have been noted; files may come in any order, each once.
    pub fn push_file(&mut self, file: &KnownFile) -> Result<(), StateError> {
        let refused = |what| StateError::Refused { file: file.path.to_string(), what };
        if let Some(what) = objection_to_file(file) {
            return Err(refused(what));
        }
        let record = encode_file(file);
        if record.len() > FILE_BYTES_MAX {
            return Err(refused("its list of blocks is too long"));
        }
        self.file_count += 1;
        self.files.push(file.path.clone(), record, &mut self.out)
    }

    /// Makes this the state that the next basebackup compares with; only after the commit.
    ///
    /// Syncs: not for an async thread. Where the older states cannot be removed it warns; they count no more.
    pub fn finish(self, facts: &StateFacts) -> Result<(), StateError> {
        self.finish_by_steps(facts, &mut |_| ())
    }

    /// The same, and tells of each step that it has taken.
    pub(super) fn finish_by_steps(
        mut self,
        facts: &StateFacts,
        taken: &mut dyn FnMut(FinishStep),
    ) -> Result<(), StateError> {
        self.write_end(facts)?;
        taken(FinishStep::Written);
        self.out.sync()?;
        taken(FinishStep::Synced);
        durable::rename(&self.out.path, &self.folder.finished(self.id))?;
        self.stays = true;
        taken(FinishStep::Named);
        if let Err(error) = self.folder.remove_others(self.id) {
            tracing::warn!("cannot remove an older state: {error}");
        }
        taken(FinishStep::Tidied);
        Ok(())
    }

    fn write_end(&mut self, facts: &StateFacts) -> Result<(), StateError> {
        let refused = |what| StateError::Refused { file: "the basebackup".to_owned(), what };
        if facts.basebackup != self.id {
            return Err(refused("its facts are of another one"));
        }
        let frames = mem::take(&mut self.files).finish(&mut self.out)?;
        let (directory, said) = (encode_directory(&frames), encode_facts(facts));
        let fits = |payload: &[u8], bytes_max: u32| payload.len() + TAG_LEN <= bytes_max as usize;
        if !fits(&directory, DIRECTORY_BYTES_MAX) || !fits(&said, FACTS_BYTES_MAX) {
            return Err(refused("it has too many files, or too long a data directory"));
        }
        let directory = self.out.append(Part::Directory, directory)?;
        let facts = self.out.append(Part::Facts, said)?;
        let footer = Footer { directory, facts, files: self.file_count };
        self.out.append(Part::Footer, footer.encode())?;
        Ok(())
    }

    /// Has files gather in no more than so many bytes.
    #[cfg(test)]
    pub(super) fn gathering_at_most(mut self, bytes_max: usize) -> Self {
        self.files = FileSorter::with_limit(bytes_max);
        self
    }

    /// Has it write to another file, which may refuse.
    #[cfg(test)]
    pub(super) fn write_to(&mut self, file: File) {
        self.out.file = file;
    }

    /// Returns how many bytes of files it holds, about.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.files.held_bytes()
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        if !self.stays {
            // What stays is removed by the next attempt.
            let _ = fs::remove_file(&self.out.path);
        }
    }
}

/// The file that is appended to.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    path: PathBuf,
    id: BasebackupId,
    buffer: Vec<u8>,
    /// Bytes of the file, without the buffer.
    written: u64,
    failed: bool,
}

impl Output {
    fn create(path: PathBuf, id: BasebackupId, create: Create) -> Result<Self, StateError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(create.mode)
            .open(&path)
            .map_err(disk::Error::at("create the state", &path))?;
        file.set_permissions(Permissions::from_mode(create.mode))
            .map_err(disk::Error::at("set the mode of", &path))?;
        if let Some(owner) = create.owner {
            owner.give(&path)?;
        }
        Ok(Self { file, path, id, buffer: encode_header(id), written: 0, failed: false })
    }

    /// Appends a part; returns where it stands.
    pub(super) fn append(&mut self, part: Part, mut payload: Vec<u8>) -> Result<RecordAt, StateError> {
        if self.failed {
            return Err(self.given_up());
        }
        let offset = self.written + self.buffer.len() as u64;
        seal(self.id, part, offset, &mut payload);
        self.buffer.extend_from_slice(&payload);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(RecordAt { offset, len: payload.len() as u32 })
    }

    /// Reads a part again.
    pub(super) fn read(&mut self, part: Part, at: RecordAt) -> Result<Vec<u8>, StateError> {
        self.flush()?;
        let source = PartSource { file: &self.file, id: self.id, end: self.written };
        source.read(part, at).map_err(|flaw| self.damaged(part, &flaw))
    }

    /// Says of this file what is wrong with a part.
    pub(super) fn damaged(&self, part: Part, flaw: &Flaw) -> StateError {
        StateError::damaged(&self.path, part.name(), flaw)
    }

    fn given_up(&self) -> StateError {
        StateError::GivenUp { path: self.path.clone() }
    }

    fn flush(&mut self) -> Result<(), StateError> {
        if self.failed {
            return Err(self.given_up());
        }
        if let Err(error) = self.file.write_all(&self.buffer) {
            self.failed = true;
            return Err(disk::Error::at("write the state", &self.path)(error).into());
        }
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StateError> {
        self.flush()?;
        self.file.sync_all().map_err(disk::Error::at("fsync the state", &self.path))?;
        page_cache::forget(&self.file, 0..self.written);
        Ok(())
    }
}
