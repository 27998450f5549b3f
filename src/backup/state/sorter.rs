//! Known files in any order, to an index in order, with bounded memory.
//!
//! Files gather up to a limit, are then sorted and written as a run; at the end the runs are merged. A cluster of a
//! hundred thousand files takes no run at all. The runs stand in the same file before the index and are never read
//! again. An index names no path twice: of two files of one path, one would be compared with the other's pages.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::mem;

use crate::backup::state::format::{Flaw, INDEX_FRAME_BYTES, IndexFrame, Part, path_of_file};
use crate::backup::state::writer::Output;
use crate::backup::state::{RecordAt, StateError};
use crate::repo::{
    entry::TreePath,
    wire::{WireReader, WireWriter},
};

/// What gathers before a run is written: some hundred thousand files.
const GATHERED_BYTES_MAX: usize = 16 << 20;
/// What a gathered file takes beside its path and its record.
const FILE_OVERHEAD: usize = size_of::<Gathered>() + 32;

/// Puts files in order.
#[derive(Debug)]
pub(super) struct FileSorter {
    gathered: Vec<Gathered>,
    bytes: usize,
    bytes_max: usize,
    runs: Vec<Vec<RecordAt>>,
}

#[derive(Debug)]
struct Gathered {
    path: TreePath,
    record: Vec<u8>,
}

impl Default for FileSorter {
    fn default() -> Self {
        Self::with_limit(GATHERED_BYTES_MAX)
    }
}

impl FileSorter {
    /// Creates a sorter that holds about so many bytes.
    pub(super) fn with_limit(bytes_max: usize) -> Self {
        Self { gathered: Vec::new(), bytes: 0, bytes_max, runs: Vec::new() }
    }

    /// Takes the record of a file.
    pub(super) fn push(
        &mut self,
        path: TreePath,
        record: Vec<u8>,
        out: &mut Output,
    ) -> Result<(), StateError> {
        self.bytes += path.as_bytes().len() + record.len() + FILE_OVERHEAD;
        self.gathered.push(Gathered { path, record });
        if self.bytes > self.bytes_max { self.write_run(out) } else { Ok(()) }
    }

    /// Returns how many bytes it holds, about.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.bytes
    }

    /// Writes the index; returns its frames.
    pub(super) fn finish(mut self, out: &mut Output) -> Result<Vec<IndexFrame>, StateError> {
        let mut index = FrameWriter::new(Part::Index);
        if self.runs.is_empty() {
            for Gathered { path, record } in self.take_sorted() {
                index.push(path, &record, out)?;
            }
        } else {
            self.write_run(out)?;
            let mut merge = Merge::new(self.runs, out)?;
            while let Some((path, record)) = merge.next(out)? {
                index.push(path, &record, out)?;
            }
        }
        index.finish(out)
    }

    fn write_run(&mut self, out: &mut Output) -> Result<(), StateError> {
        let mut run = FrameWriter::new(Part::Run);
        for Gathered { path, record } in self.take_sorted() {
            run.push(path, &record, out)?;
        }
        self.runs.push(run.finish(out)?.into_iter().map(|frame| frame.at).collect());
        Ok(())
    }

    fn take_sorted(&mut self) -> Vec<Gathered> {
        self.bytes = 0;
        let mut gathered = mem::take(&mut self.gathered);
        gathered.sort_unstable_by(|a, b| a.path.split().cmp(&b.path.split()));
        gathered
    }
}

/// Puts records that come in order into frames.
struct FrameWriter {
    part: Part,
    payload: WireWriter,
    first: Option<TreePath>,
    last: Option<TreePath>,
    files: u32,
    frames: Vec<IndexFrame>,
}

impl FrameWriter {
    fn new(part: Part) -> Self {
        let (payload, frames) = (WireWriter::new(), Vec::new());
        Self { part, payload, first: None, last: None, files: 0, frames }
    }

    fn push(&mut self, path: TreePath, record: &[u8], out: &mut Output) -> Result<(), StateError> {
        if self.last.as_ref().is_some_and(|last| last.split() >= path.split()) {
            return Err(StateError::Refused { file: path.to_string(), what: "it is named twice" });
        }
        self.payload.bytes(record);
        self.files += 1;
        self.first.get_or_insert_with(|| path.clone());
        self.last = Some(path);
        if self.payload.len() >= INDEX_FRAME_BYTES { self.close(out) } else { Ok(()) }
    }

    fn close(&mut self, out: &mut Output) -> Result<(), StateError> {
        if let Some(first) = self.first.take() {
            let at = out.append(self.part, mem::take(&mut self.payload).finish())?;
            self.frames.push(IndexFrame { at, files: mem::take(&mut self.files), first });
        }
        Ok(())
    }

    fn finish(mut self, out: &mut Output) -> Result<Vec<IndexFrame>, StateError> {
        self.close(out)?;
        Ok(self.frames)
    }
}

/// Takes the files of several runs in order, one frame of each in memory.
struct Merge {
    runs: Vec<RunReader>,
    heads: BinaryHeap<Head>,
}

struct RunReader {
    frames: std::vec::IntoIter<RecordAt>,
    payload: Vec<u8>,
    at: usize,
}

/// The next file of a run; the greatest in the heap is the first by path.
struct Head {
    path: TreePath,
    record: Vec<u8>,
    run: usize,
}

impl Merge {
    fn new(runs: Vec<Vec<RecordAt>>, out: &mut Output) -> Result<Self, StateError> {
        let reader = |run: Vec<RecordAt>| RunReader { frames: run.into_iter(), payload: Vec::new(), at: 0 };
        let mut merge = Self { runs: runs.into_iter().map(reader).collect(), heads: BinaryHeap::new() };
        for run in 0..merge.runs.len() {
            merge.advance(run, out)?;
        }
        Ok(merge)
    }

    fn next(&mut self, out: &mut Output) -> Result<Option<(TreePath, Vec<u8>)>, StateError> {
        let Some(Head { path, record, run }) = self.heads.pop() else {
            return Ok(None);
        };
        self.advance(run, out)?;
        Ok(Some((path, record)))
    }

    fn advance(&mut self, run: usize, out: &mut Output) -> Result<(), StateError> {
        if let Some(record) = self.runs[run].next(out)? {
            let path = path_of_file(&record).map_err(|flaw| out.damaged(Part::Run, &flaw))?;
            self.heads.push(Head { path, record, run });
        }
        Ok(())
    }
}

impl RunReader {
    fn next(&mut self, out: &mut Output) -> Result<Option<Vec<u8>>, StateError> {
        while self.at == self.payload.len() {
            let Some(at) = self.frames.next() else {
                return Ok(None);
            };
            (self.payload, self.at) = (out.read(Part::Run, at)?, 0);
        }
        let mut reader = WireReader::new(&self.payload[self.at..]);
        let record = reader.bytes().map_err(|error| out.damaged(Part::Run, &Flaw::Wire(error)))?.to_vec();
        self.at = self.payload.len() - reader.left();
        Ok(Some(record))
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        other.path.split().cmp(&self.path.split()).then(other.run.cmp(&self.run))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}
