//! Reading a state: opened by its end, then in order, by path, or block by block.
//!
//! In memory are the facts, the place and first path of each frame of the index, and a few frames that were looked at
//! last. Whatever is read is checked whole before it is used, and an error of the disk counts as damage: a state is
//! never worth failing a basebackup. All methods take `&self` and read at positions, so threads share one.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::backup::page_cache;
use crate::backup::state::format::{
    BLOCK_BYTES_MAX, DIRECTORY_BYTES_MAX, FACTS_BYTES_MAX, FOOTER_LEN, Flaw, Footer, HEADER_LEN, HeaderSays,
    INDEX_FRAME_BYTES_MAX, IndexFrame, Part, VERSION, decode_directory, decode_facts, decode_file,
    decode_hashes, decode_header, hashes_len, path_of_file, unseal,
};
use crate::backup::state::{KnownBlock, KnownContent, KnownFile, RecordAt, StateError, StateFacts};
use crate::disk;
use crate::repo::{
    BasebackupId,
    entry::TreePath,
    page_map::MapBlock,
    wire::{WireError, WireReader},
};

/// Frames of the index that look-ups keep: neighbours in a plan are mostly neighbours in the index.
const FRAMES_KEPT: usize = 32;
/// A larger one, with a file of a terabyte in it, is not kept.
const KEPT_BYTES_MAX: usize = 256 << 10;
/// What is smaller shares its memory pages with its neighbours.
const FORGOTTEN_BYTES_MIN: u32 = 64 << 10;
const MEMORY_PAGE: u64 = 4096;

/// What the last basebackup knew, open for reading.
#[derive(Debug)]
pub struct State {
    file: File,
    path: PathBuf,
    len: u64,
    facts: StateFacts,
    frames: Vec<IndexFrame>,
    file_count: u64,
    kept: Mutex<VecDeque<(usize, Arc<Frame>)>>,
}

/// A frame of the index, taken apart into its records.
#[derive(Debug)]
struct Frame {
    payload: Vec<u8>,
    records: Vec<Range<usize>>,
}

/// The known files in order.
#[derive(Debug)]
struct Files<'a> {
    state: &'a State,
    next_frame: usize,
    frame: Option<Frame>,
    next_record: usize,
}

impl State {
    /// Opens the state of basebackup `id`.
    pub(super) fn open(path: PathBuf, id: BasebackupId) -> Result<Self, StateError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(disk::Error::at("open the state", &path))?;
        let len = file.metadata().map_err(disk::Error::at("stat", &path))?.len();
        let flawed = |part: Part| {
            let path = path.clone();
            move |flaw: Flaw| StateError::damaged(&path, part.name(), &flaw)
        };
        let mut header = [0; HEADER_LEN];
        let whole = (HEADER_LEN + FOOTER_LEN) as u64;
        if len < whole {
            return Err(flawed(Part::Header)(Flaw::Place));
        }
        file.read_exact_at(&mut header, 0)
            .map_err(|error| flawed(Part::Header)(Flaw::Unreadable(error.to_string())))?;
        match decode_header(&header).map_err(flawed(Part::Header))? {
            HeaderSays::Ours(found) if found == id => {}
            HeaderSays::Ours(_) => {
                return Err(flawed(Part::Header)(Flaw::Contradiction("is of another basebackup")));
            }
            HeaderSays::Other { version } => {
                return Err(StateError::Unsupported { path, version, supported: VERSION });
            }
        }
        let source = PartSource { file: &file, id, end: len };
        let footer = RecordAt { offset: len - FOOTER_LEN as u64, len: FOOTER_LEN as u32 };
        let footer = source.read(Part::Footer, footer).and_then(|payload| Footer::decode(&payload));
        let footer = footer.map_err(flawed(Part::Footer))?;
        let facts = source.read(Part::Facts, footer.facts).and_then(|payload| decode_facts(&payload));
        let facts = facts.map_err(flawed(Part::Facts))?;
        if facts.basebackup != id {
            return Err(flawed(Part::Facts)(Flaw::Contradiction("is that of another one")));
        }
        let frames = source.read(Part::Directory, footer.directory);
        let frames =
            frames.and_then(|payload| decode_directory(&payload)).map_err(flawed(Part::Directory))?;
        if frames.iter().map(|frame| u64::from(frame.files)).sum::<u64>() != footer.files {
            return Err(flawed(Part::Directory)(Flaw::Contradiction("has another number of files")));
        }
        let kept = Mutex::new(VecDeque::with_capacity(FRAMES_KEPT));
        Ok(Self { file, path, len, facts, frames, file_count: footer.files, kept })
    }

    /// Returns what is known of the basebackup as a whole.
    pub fn facts(&self) -> &StateFacts {
        &self.facts
    }

    /// Returns where the state is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns how many files are known.
    pub fn file_count(&self) -> u64 {
        self.file_count
    }

    /// Returns the known files, ascending by directory, then by name; ends behind the first error.
    pub fn files(&self) -> impl Iterator<Item = Result<KnownFile, StateError>> + '_ {
        Files { state: self, next_frame: 0, frame: None, next_record: 0 }
    }

    /// Looks a file up.
    pub fn find(&self, path: &TreePath) -> Result<Option<KnownFile>, StateError> {
        let behind = self.frames.partition_point(|frame| frame.first.split() <= path.split());
        let Some(number) = behind.checked_sub(1) else {
            return Ok(None);
        };
        let frame = self.kept_frame(number)?;
        let found = frame.find(path).and_then(|record| record.map(decode_file).transpose());
        found.map_err(|flaw| self.damaged(Part::Index, &flaw))
    }

    /// Reads what is known of the pages of the `n`th [`crate::repo::page_map::MAP_BLOCK_PAGES`] of a file.
    pub fn block(&self, file: &KnownFile, n: u64) -> Result<KnownBlock, StateError> {
        let (hashes, map) = self.raw_block(file, n)?;
        let hashes = decode_hashes(&hashes).map_err(|flaw| self.damaged(Part::Hashes, &flaw))?;
        Ok(KnownBlock { map: self.decode_map(&map, file, n)?, hashes })
    }

    /// Reads where those pages stand, without their hashes: a tenth of the bytes.
    pub fn map(&self, file: &KnownFile, n: u64) -> Result<MapBlock, StateError> {
        let at = self.place_of(file, n).and_then(|at| {
            let hashes_len = hashes_len(file.pages_of_block(n));
            let len = at.len.checked_sub(hashes_len).ok_or(Flaw::Place)?;
            Ok(RecordAt { offset: at.offset.saturating_add(u64::from(hashes_len)), len })
        });
        let map = at.and_then(|at| self.source().read(Part::Map, at));
        self.decode_map(&map.map_err(|flaw| self.damaged(Part::Map, &flaw))?, file, n)
    }

    /// Returns hashes and map of a block, checked but not taken apart.
    pub(super) fn raw_block(&self, file: &KnownFile, n: u64) -> Result<(Vec<u8>, Vec<u8>), StateError> {
        let at = self.place_of(file, n).map_err(|flaw| self.damaged(Part::Hashes, &flaw))?;
        let hashes_len = hashes_len(file.pages_of_block(n));
        let raw = self.source().read_two(Part::Hashes, Part::Map, at, hashes_len);
        let raw = raw.map_err(|(part, flaw)| self.damaged(part, &flaw))?;
        if at.len >= FORGOTTEN_BYTES_MIN {
            // A terabyte's state would push a gigabyte of what the server uses out of the cache.
            let first = at.offset.next_multiple_of(MEMORY_PAGE);
            let end = (at.offset + u64::from(at.len)) / MEMORY_PAGE * MEMORY_PAGE;
            page_cache::forget(&self.file, first..end.max(first));
        }
        Ok(raw)
    }

    fn place_of(&self, file: &KnownFile, n: u64) -> Result<RecordAt, Flaw> {
        let KnownContent::Pages { records, .. } = &file.content else {
            return Err(Flaw::Contradiction("is asked for of a file without any"));
        };
        usize::try_from(n).ok().and_then(|n| records.get(n)).copied().ok_or(Flaw::Place)
    }

    fn decode_map(&self, payload: &[u8], file: &KnownFile, n: u64) -> Result<MapBlock, StateError> {
        let map = MapBlock::decode(payload).map_err(Flaw::from).and_then(|map| {
            let fits = map.page_count() == file.pages_of_block(n);
            if fits { Ok(map) } else { Err(Flaw::Contradiction("has not the pages of its file")) }
        });
        map.map_err(|flaw| self.damaged(Part::Map, &flaw))
    }

    fn kept_frame(&self, number: usize) -> Result<Arc<Frame>, StateError> {
        let kept = |kept: &VecDeque<(usize, Arc<Frame>)>| {
            kept.iter().find(|(found, _)| *found == number).map(|(_, frame)| frame.clone())
        };
        if let Some(frame) = kept(&self.kept.lock().expect("no holder of this lock panics")) {
            return Ok(frame);
        }
        let frame = Arc::new(self.read_frame(number)?);
        if frame.payload.len() <= KEPT_BYTES_MAX {
            let mut kept = self.kept.lock().expect("no holder of this lock panics");
            if kept.len() == FRAMES_KEPT {
                kept.pop_front();
            }
            kept.push_back((number, frame.clone()));
        }
        Ok(frame)
    }

    fn read_frame(&self, number: usize) -> Result<Frame, StateError> {
        let IndexFrame { at, files, .. } = &self.frames[number];
        let frame = self.source().read(Part::Index, *at).and_then(Frame::parse);
        let frame = frame.and_then(|frame| {
            let fits = frame.records.len() as u64 == u64::from(*files);
            if fits { Ok(frame) } else { Err(Flaw::Contradiction("has another number of files")) }
        });
        frame.map_err(|flaw| self.damaged(Part::Index, &flaw))
    }

    fn source(&self) -> PartSource<'_> {
        PartSource { file: &self.file, id: self.facts.basebackup, end: self.len }
    }

    fn damaged(&self, part: Part, flaw: &Flaw) -> StateError {
        StateError::damaged(&self.path, part.name(), flaw)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        page_cache::forget(&self.file, 0..self.len);
    }
}

impl Frame {
    fn parse(payload: Vec<u8>) -> Result<Self, Flaw> {
        let mut records = Vec::new();
        let mut reader = WireReader::new(&payload);
        while reader.left() > 0 {
            let len = reader.bytes()?.len();
            let end = payload.len() - reader.left();
            records.push(end - len..end);
        }
        Ok(Self { payload, records })
    }

    fn find(&self, path: &TreePath) -> Result<Option<&[u8]>, Flaw> {
        let (mut low, mut high) = (0, self.records.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let record = &self.payload[self.records[middle].clone()];
            match path_of_file(record)?.split().cmp(&path.split()) {
                std::cmp::Ordering::Equal => return Ok(Some(record)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

impl Files<'_> {
    fn step(&mut self) -> Result<Option<KnownFile>, StateError> {
        loop {
            if let Some(frame) = &self.frame
                && let Some(range) = frame.records.get(self.next_record)
            {
                self.next_record += 1;
                let file = decode_file(&frame.payload[range.clone()]);
                return file.map(Some).map_err(|flaw| self.state.damaged(Part::Index, &flaw));
            }
            if self.next_frame == self.state.frames.len() {
                return Ok(None);
            }
            self.frame = Some(self.state.read_frame(self.next_frame)?);
            (self.next_frame, self.next_record) = (self.next_frame + 1, 0);
        }
    }
}

impl Iterator for Files<'_> {
    type Item = Result<KnownFile, StateError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            (self.frame, self.next_frame) = (None, self.state.frames.len());
        }
        step.transpose()
    }
}

/// A file with parts, which ends at `end`.
pub(super) struct PartSource<'a> {
    pub(super) file: &'a File,
    pub(super) id: BasebackupId,
    pub(super) end: u64,
}

impl PartSource<'_> {
    /// Reads a part, checks it and returns it without its tag.
    pub(super) fn read(&self, part: Part, at: RecordAt) -> Result<Vec<u8>, Flaw> {
        let bytes = self.read_bytes(part, at)?;
        self.unsealed(part, at.offset, bytes)
    }

    /// Reads two parts that stand side by side, the first of which has `first_len` bytes, at once.
    fn read_two(
        &self,
        first: Part,
        second: Part,
        at: RecordAt,
        first_len: u32,
    ) -> Result<(Vec<u8>, Vec<u8>), (Part, Flaw)> {
        let mut bytes = self.read_bytes(second, at).map_err(|flaw| (first, flaw))?;
        if at.len < first_len {
            return Err((first, Flaw::Place));
        }
        let behind = bytes.split_off(first_len as usize);
        let bytes = self.unsealed(first, at.offset, bytes).map_err(|flaw| (first, flaw))?;
        let behind_at = at.offset + u64::from(first_len);
        let behind = self.unsealed(second, behind_at, behind).map_err(|flaw| (second, flaw))?;
        Ok((bytes, behind))
    }

    fn read_bytes(&self, part: Part, at: RecordAt) -> Result<Vec<u8>, Flaw> {
        let end = at.offset.checked_add(u64::from(at.len)).ok_or(Flaw::Place)?;
        let len_max = match part {
            Part::Header => HEADER_LEN as u32,
            Part::Hashes | Part::Map => BLOCK_BYTES_MAX,
            Part::Run | Part::Index => INDEX_FRAME_BYTES_MAX,
            Part::Directory => DIRECTORY_BYTES_MAX,
            Part::Facts => FACTS_BYTES_MAX,
            Part::Footer => FOOTER_LEN as u32,
        };
        if end > self.end {
            return Err(Flaw::Place);
        }
        if at.len > len_max {
            let (value, max) = (u64::from(at.len), u64::from(len_max));
            return Err(WireError::OutOfRange { field: "length", value, max }.into());
        }
        let mut bytes = vec![0; at.len as usize];
        let read = self.file.read_exact_at(&mut bytes, at.offset);
        read.map_err(|error| Flaw::Unreadable(error.to_string()))?;
        Ok(bytes)
    }

    fn unsealed(&self, part: Part, offset: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>, Flaw> {
        let len = unseal(self.id, part, offset, &bytes)?.len();
        bytes.truncate(len);
        Ok(bytes)
    }
}
