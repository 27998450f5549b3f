//! One file's content: which of it is local, and the local file it is in.
//!
//! The rules, in the order of their importance:
//! - a unit is marked local only after all of its bytes were written here, by a client or from the lower;
//! - what the lower sends is written only where the unit is not local yet, so a client's write is never undone;
//! - a write that covers only a part of a unit waits until the unit is local, because the local file would show a hole
//!   around it as zeros, and as data after the next start;
//! - the base length is lowered on stable storage before the file is cut.
//!
//! Everything here is synchronous and done under one lock for each file; fetching is `fetch`'s.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Bytes, BytesMut};

use crate::mount::fs::Seek;
use crate::mount::lower::{NodeId, Piece};
use crate::mount::upper::local_disk::{LocalFile, Times};
use crate::mount::upper::local_map::{LocalMap, UNIT};
use crate::mount::upper::origin::Origin;
use crate::mount::upper::stable::Stable;

/// A file's content.
#[derive(Debug)]
pub(crate) struct Content {
    /// The lower's file and its path, where there is one.
    lower: Option<(NodeId, Vec<u8>)>,
    state: Mutex<State>,
    /// Held by who cuts the file, also while the disk works; the state is not.
    cut: Mutex<()>,
}

#[derive(Debug)]
struct State {
    /// The file in the upper, while somebody has it open.
    file: Option<Arc<dyn LocalFile>>,
    /// What is local; unknown until the file in the upper was looked at.
    map: Option<LocalMap>,
    /// Nothing has to come from the lower any more; found out once, and stays so.
    is_whole: bool,
}

/// What came of a write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Written {
    Done,
    /// These bytes have to become local first.
    Needs(Range<u64>),
}

impl Content {
    /// Creates the content of a file made here, which is open already if `file` is given.
    pub(crate) fn native(file: Option<Arc<dyn LocalFile>>) -> Self {
        Self::new(None, State::new(file, Some(LocalMap::new(0))))
    }

    /// Creates the content of a file of the lower that is not in the upper yet.
    pub(crate) fn of_lower(node: NodeId, path: Vec<u8>, size: u64) -> Self {
        Self::new(Some((node, path)), State::new(None, Some(LocalMap::new(size))))
    }

    /// Creates the content of a file of the lower that the upper has a part of.
    pub(crate) fn partly_local(node: NodeId, path: Vec<u8>) -> Self {
        Self::new(Some((node, path)), State::new(None, None))
    }

    fn new(lower: Option<(NodeId, Vec<u8>)>, state: State) -> Self {
        Self { lower, state: Mutex::new(state), cut: Mutex::new(()) }
    }

    /// Returns the lower's file, if bytes can come from one.
    pub(crate) fn lower_node(&self) -> Option<NodeId> {
        self.lower.as_ref().map(|(node, _)| *node)
    }

    /// Returns the open file in the upper.
    pub(crate) fn file(&self) -> Option<Arc<dyn LocalFile>> {
        self.lock().file.clone()
    }

    /// Tells whether it is known which bytes are local.
    pub(crate) fn is_mapped(&self) -> bool {
        self.lock().map.is_some()
    }

    /// Tells whether nothing of the file has to come from the lower any more; false while that is not known.
    ///
    /// Once true it stays true: units are only ever added to what is local, and the base length only falls. So whoever
    /// writes into the local file from then on without passing by here takes nothing from the rules above. An empty
    /// file of the lower is whole although the upper may not have it.
    pub(crate) fn is_whole(&self) -> bool {
        let mut state = self.lock();
        if !state.is_whole {
            state.is_whole =
                state.map.as_ref().is_some_and(|map| map.first_missing(&(0..u64::MAX)).is_none());
        }
        state.is_whole
    }

    /// Returns how many bytes from the start are the lower's where they are not local.
    pub(crate) fn base_length(&self) -> u64 {
        self.lock().map.as_ref().map_or(0, LocalMap::base_length)
    }

    /// Puts the file of the upper in use; its holes below `base_length` are what is not local.
    pub(crate) fn attach(&self, file: Arc<dyn LocalFile>, base_length: u64) -> io::Result<()> {
        let mut state = self.lock();
        if state.map.is_none() {
            state.map = Some(map_of(&*file, base_length)?);
        }
        state.file = Some(file);
        Ok(())
    }

    /// Closes the file in the upper; what is local stays known.
    pub(crate) fn detach(&self) {
        self.lock().file = None;
    }

    /// Returns the stretches of `range` that have to come from the lower.
    pub(crate) fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        self.lock().map.as_ref().map_or_else(Vec::new, |map| map.missing(range))
    }

    /// Returns the first stretch of `range` that has to come from the lower.
    pub(crate) fn first_missing(&self, range: &Range<u64>) -> Option<Range<u64>> {
        self.lock().map.as_ref().and_then(|map| map.first_missing(range))
    }

    /// Writes what the lower sent wherever it is not local yet, and returns how many bytes that were.
    pub(crate) fn fill(&self, pieces: &[Piece]) -> io::Result<u64> {
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        let modified = file.stat()?.attributes.mtime;
        let mut filled = 0;
        for run in joined(pieces) {
            let covered = map.covered_units(&run.range());
            let whole = covered.start * UNIT..(covered.end * UNIT).min(map.base_length());
            for missing in map.missing(&whole) {
                run.write(file, &missing).inspect_err(|_| give_back(file, &missing))?;
                filled += missing.end - missing.start;
                map.set(missing);
            }
        }
        if filled > 0 {
            // Looking at a file must not make it look changed.
            file.set_times(Times::modified(modified))?;
        }
        Ok(filled)
    }

    /// Writes a client's bytes, unless a part of the lower has to be there first.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<Written> {
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        let end = offset.checked_add(data.len() as u64).ok_or_else(too_large)?;
        if data.is_empty() {
            return Ok(Written::Done);
        }
        let covered = map.covered_units(&(offset..end));
        for byte in [offset, end - 1] {
            let unit = byte / UNIT;
            if !covered.contains(&unit) && !map.is_local(byte) {
                return Ok(Written::Needs(unit * UNIT..(unit + 1) * UNIT));
            }
        }
        file.write_at(data, offset).inspect_err(|_| {
            for missing in map.missing(&(offset..end)) {
                give_back(file, &missing);
            }
        })?;
        map.set(offset..end);
        Ok(Written::Done)
    }

    /// Reads what is local; the caller has made sure that the range is.
    pub(crate) fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        // Nothing of it is in the upper, so the range is beyond the end.
        let Some(file) = self.file() else { return Ok(Bytes::new()) };
        let mut buffer = BytesMut::zeroed(length as usize);
        let read = file.read_at(&mut buffer, offset)?;
        buffer.truncate(read);
        Ok(buffer.freeze())
    }

    /// Reads a range of which parts came from the lower just now and could not be kept.
    ///
    /// Returns `None` if the pieces do not cover what is missing.
    pub(crate) fn read_with(&self, offset: u64, length: u32, pieces: &[Piece]) -> io::Result<Option<Bytes>> {
        let missing = self.missing(&(offset..offset.saturating_add(u64::from(length))));
        let Some(last) = missing.last() else { return self.read(offset, length).map(Some) };
        let mut buffer = BytesMut::from(&self.read(offset, length)?[..]);
        // A file that never got a place in the upper has no length there either.
        let end = last.end.min(offset + u64::from(length));
        buffer.resize(buffer.len().max((end - offset) as usize), 0);
        let runs = joined(pieces);
        for gap in missing {
            let wanted = gap.start.max(offset)..gap.end.min(offset + u64::from(length));
            let Some(run) =
                runs.iter().find(|run| run.range().start <= wanted.start && wanted.end <= run.range().end)
            else {
                return Ok(None);
            };
            run.copy(&wanted, &mut buffer[(wanted.start - offset) as usize..(wanted.end - offset) as usize]);
        }
        Ok(Some(buffer.freeze()))
    }

    /// Cuts or extends the file.
    pub(crate) fn set_length(&self, length: u64, stable: &Stable) -> io::Result<()> {
        // Two at once could raise what stands on the disk.
        let _alone = self.cut.lock().expect("no holder of this lock panics");
        if let Some(file) = self.announce_cut(length)? {
            // Not only the data: the attribute has to be down before the cut.
            stable.sync(|| file.sync(false))?;
        }
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        map.truncate(length);
        file.set_length(length)
    }

    /// Lowers the base length in the file, if a cut takes something from it, and returns what has to be synced then.
    fn announce_cut(&self, length: u64) -> io::Result<Option<Arc<dyn LocalFile>>> {
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        let Some((_, path)) = self.lower.as_ref().filter(|_| length < map.base_length()) else {
            return Ok(None);
        };
        file.set_origin(&Origin { base_length: length, path: path.clone() }.to_bytes()?)?;
        Ok(state.file.clone())
    }

    /// Reserves room; where something has yet to come from the lower, only beyond what can.
    ///
    /// Room that is reserved and not written is a hole only until the page is in the kernel's cache, for which reading
    /// its neighbours is enough. Then it is data, and the next process would take its zeros for content.
    pub(crate) fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        let end = offset.checked_add(length).ok_or_else(too_large)?;
        // The file system allocates whole units: with its end also the beginning of one that has yet to come.
        let from = match map.first_missing(&(offset / UNIT * UNIT..end)) {
            None => offset,
            Some(_) => offset.max(map.base_length().next_multiple_of(UNIT)),
        };
        if from < end {
            return file.allocate(from, end - from, keep_size);
        }
        if !keep_size && end > file.stat()?.attributes.size {
            file.set_length(end)?;
        }
        Ok(())
    }

    /// Finds the next data or hole; what has yet to come from the lower is data.
    pub(crate) fn seek(&self, offset: u64, what: Seek) -> io::Result<u64> {
        let mut state = self.lock();
        let (file, map) = state.parts()?;
        let no_such = || io::Error::from_raw_os_error(libc::ENXIO);
        if offset >= file.stat()?.attributes.size {
            return Err(no_such());
        }
        let base = map.base_length();
        match what {
            Seek::Data if offset < base => Ok(offset),
            Seek::Data => file.next_data(offset)?.ok_or_else(no_such),
            Seek::Hole if file.stat()?.attributes.size <= base => Ok(base),
            Seek::Hole => file.next_hole(offset.max(base)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl State {
    fn new(file: Option<Arc<dyn LocalFile>>, map: Option<LocalMap>) -> Self {
        Self { file, map, is_whole: false }
    }

    /// Returns the file and its map; whoever gets here has attached them.
    fn parts(&mut self) -> io::Result<(&dyn LocalFile, &mut LocalMap)> {
        match (&self.file, &mut self.map) {
            (Some(file), Some(map)) => Ok((&**file, map)),
            _ => Err(io::Error::other("bug: the file in the upper is not open")),
        }
    }
}

/// Reads from a file's holes what of it is local.
fn map_of(file: &dyn LocalFile, base_length: u64) -> io::Result<LocalMap> {
    let mut map = LocalMap::new(base_length);
    let mut at = 0;
    while at < base_length {
        let Some(data) = file.next_data(at)? else { break };
        if data >= base_length {
            break;
        }
        at = file.next_hole(data)?;
        map.set(data..at);
    }
    Ok(map)
}

/// Makes a range a hole again after a write to it failed half-way: it is not local, so nobody may take it for data.
fn give_back(file: &dyn LocalFile, range: &Range<u64>) {
    if let Err(error) = file.make_hole(range.start, range.end - range.start) {
        tracing::error!(?range, "could not give back a range after a failed write: {error}");
    }
}

/// Pieces that touch, as one.
struct Run<'a> {
    offset: u64,
    parts: Vec<&'a Bytes>,
    length: u64,
}

fn joined(pieces: &[Piece]) -> Vec<Run<'_>> {
    let mut sorted: Vec<&Piece> = pieces.iter().filter(|piece| !piece.bytes.is_empty()).collect();
    sorted.sort_by_key(|piece| piece.offset);
    let mut runs: Vec<Run<'_>> = Vec::new();
    for piece in sorted {
        let length = piece.bytes.len() as u64;
        match runs.last_mut() {
            Some(run) if run.offset + run.length == piece.offset => {
                run.parts.push(&piece.bytes);
                run.length += length;
            }
            // A lower that repeats itself is taken at its first word.
            Some(run) if piece.offset < run.offset + run.length => {}
            _ => runs.push(Run { offset: piece.offset, parts: vec![&piece.bytes], length }),
        }
    }
    runs
}

impl Run<'_> {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }

    /// Calls `each` with the slices that make up `range`, which lies within the run, and where each belongs.
    fn slices(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut start = self.offset;
        for part in &self.parts {
            let end = start + part.len() as u64;
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                each(from, &part[(from - start) as usize..(to - start) as usize])?;
            }
            start = end;
        }
        Ok(())
    }

    fn write(&self, file: &dyn LocalFile, range: &Range<u64>) -> io::Result<()> {
        self.slices(range, |offset, bytes| file.write_at(bytes, offset))
    }

    fn copy(&self, range: &Range<u64>, target: &mut [u8]) {
        let _ = self.slices(range, |offset, bytes| {
            let at = (offset - range.start) as usize;
            target[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        });
    }
}

fn too_large() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}
