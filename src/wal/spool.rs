//! The spool: WAL that was received and is not in the store yet, below `[paths] state`.
//!
//! One file for each segment, `<24 hex>.spool`, in which what came is appended as frames: place, length, checksum,
//! bytes. One fsync makes a frame durable together with the proof that it is whole, so that after a power cut exactly
//! the frames that check are believed, in order from the front; a raw segment would need a second file and a second
//! fsync to say how far it can be trusted (docs/decisions/1801-spool-frames.md). A segment's file exists only once the
//! one before it is durable. Nothing is padded here: what is missing from a segment is missing (failure 4).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use crate::disk::durable::{Create, TEMPORARY_PREFIX, create_dir_all, fsync_dir, write_file};
use crate::disk::{Error as DiskError, Owner};
use crate::pg::{Crc32c, Lsn, TimelineId, WalSegmentName, WalSegmentSize};
use crate::wal::Error;

/// A position on a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

/// What is in the spool and durable there; shared by who fills it and who empties it.
#[derive(Debug)]
pub(crate) struct Spool {
    folder: PathBuf,
    size: WalSegmentSize,
    owner: Option<Owner>,
    /// What is durable of each segment, from its beginning on, and of its file.
    segments: Mutex<BTreeMap<WalSegmentName, Whole>>,
    /// The segment that is being filled; taken by one writer at a time.
    open: Mutex<Option<OpenSegment>>,
    /// Where the last reading of a segment ended, as pieces follow each other.
    read: Mutex<Option<(WalSegmentName, Whole)>>,
    /// Timelines' history files that are not in the store yet.
    histories: Mutex<BTreeMap<TimelineId, Vec<u8>>>,
    /// Those that are, since this start; servers tell them at each connection.
    stored_histories: Mutex<BTreeMap<TimelineId, Vec<u8>>>,
}

#[derive(Debug)]
struct OpenSegment {
    name: WalSegmentName,
    file: File,
}

const SUFFIX: &str = ".spool";
const HISTORY_SUFFIX: &str = ".history";
/// `WSP1`; place and length in the segment; CRC-32C of the segment's name, place, length and bytes.
const FRAME_MAGIC: [u8; 4] = *b"WSP1";
const FRAME_HEADER_BYTES: usize = 16;
/// More than is ever written at once, and little enough to be read back at once.
const FRAME_BYTES_MAX: u32 = 8 << 20;
/// A history file has a line for each timeline.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

impl Spool {
    /// Opens the spool in a folder, which is created if need be; what a crash left half written is cut off.
    pub fn open(folder: &Path, size: WalSegmentSize, owner: Option<Owner>) -> Result<Self, Error> {
        create_dir_all(folder, Create { owner, ..Create::PRIVATE_DIRECTORY })?;
        let mut segments = BTreeMap::new();
        for entry in fs::read_dir(folder).map_err(DiskError::at("list", folder))? {
            let path = entry.map_err(DiskError::at("list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY_PREFIX) {
                let _ = fs::remove_file(&path);
            }
            let Some(Ok(segment)) = name.strip_suffix(SUFFIX).map(WalSegmentName::parse) else { continue };
            let whole =
                scan(&path, segment, size, Whole::default(), |_| ()).map_err(DiskError::at("read", &path))?;
            let file = OpenOptions::new().write(true).open(&path).map_err(DiskError::at("open", &path))?;
            let length = file.metadata().map_err(DiskError::at("stat", &path))?.len();
            if length > whole.file_bytes {
                tracing::warn!("cutting off {} bytes of {name} that a crash left", length - whole.file_bytes);
                file.set_len(whole.file_bytes).map_err(DiskError::at("truncate", &path))?;
            }
            // Whoever wrote it may have died before the fsync; from here on it is counted as durable.
            file.sync_all().map_err(DiskError::at("fsync", &path))?;
            segments.insert(segment, whole);
        }
        fsync_dir(folder)?;
        Ok(Self {
            histories: Mutex::new(histories(folder)?),
            stored_histories: Mutex::default(),
            folder: folder.to_owned(),
            size,
            owner,
            segments: Mutex::new(segments),
            open: Mutex::new(None),
            read: Mutex::new(None),
        })
    }

    /// Appends WAL, and returns once it is durable. Bytes that do not follow what is there are refused.
    pub fn append(&self, at: Position, mut bytes: &[u8]) -> Result<Position, Error> {
        let mut at = at;
        while !bytes.is_empty() {
            let segment = WalSegmentName::containing(at.timeline, at.lsn, self.size);
            let offset = self.size.offset_of(at.lsn);
            let room = (u64::from(self.size.bytes()) - offset).min(u64::from(FRAME_BYTES_MAX));
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.append_frame(segment, offset as u32, now)?;
            at.lsn = at.lsn + now.len() as u64;
            bytes = later;
        }
        Ok(at)
    }

    fn append_frame(&self, segment: WalSegmentName, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let known = self.durable(segment).unwrap_or_default();
        if known.bytes != offset {
            return Err(Error::SpoolGap { segment, known: known.bytes, offset });
        }
        let mut open = self.open.lock().expect("no holder of this lock panics");
        let path = self.path(segment);
        if open.as_ref().is_none_or(|open| open.name != segment) {
            *open = Some(self.open_segment(segment, &path)?);
        }
        let current = open.as_mut().expect("it has just been opened");
        let frame = frame_of(segment, offset, bytes);
        let written = current.file.write_all(&frame).and_then(|()| current.file.sync_data());
        if let Err(error) = written {
            // What a failed fsync left in memory is no proof of what is on the disk: it is cut off and comes again.
            // Where that fails too, nothing is appended before it has succeeded.
            let _ = current.file.set_len(known.file_bytes);
            *open = None;
            return Err(DiskError::at("write", &path)(error).into());
        }
        let whole =
            Whole { bytes: offset + bytes.len() as u32, file_bytes: known.file_bytes + frame.len() as u64 };
        self.index().insert(segment, whole);
        Ok(())
    }

    /// Opens the file of a segment to append to what is durable of it: nothing is behind that.
    fn open_segment(&self, name: WalSegmentName, path: &Path) -> Result<OpenSegment, Error> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(DiskError::at("open", path))?;
        let known = self.durable(name);
        // By what is durable, not by what is there: an attempt that failed before the sync leaves a file as well.
        if known.is_none() {
            self.owner.map_or(Ok(()), |owner| owner.give(path))?;
            fsync_dir(&self.folder)?;
        }
        let file_bytes = known.unwrap_or_default().file_bytes;
        let found = file.metadata().map_err(DiskError::at("stat", path))?.len();
        if found > file_bytes {
            file.set_len(file_bytes).map_err(DiskError::at("truncate", path))?;
        }
        if found < file_bytes {
            let detail = format!("{found} bytes are left of {file_bytes}");
            return Err(DiskError::Malformed { path: path.to_owned(), what: "spooled WAL", detail }.into());
        }
        Ok(OpenSegment { name, file })
    }

    /// Returns where the newest WAL of the spool ends.
    pub fn end(&self) -> Option<Position> {
        let (segment, whole) = self.index().last_key_value().map(|(name, whole)| (*name, *whole))?;
        let start = segment.start_lsn(self.size).ok()?;
        Some(Position { timeline: segment.timeline(), lsn: start + u64::from(whole.bytes) })
    }

    /// Returns the oldest segments, at most `count`, with the bytes there are of each.
    pub fn oldest(&self, count: usize) -> Vec<(WalSegmentName, u32)> {
        self.index().iter().take(count).map(|(name, whole)| (*name, whole.bytes)).collect()
    }

    /// Returns the newest segment.
    pub fn newest(&self) -> Option<WalSegmentName> {
        self.index().last_key_value().map(|(name, _)| *name)
    }

    /// Returns whether there is no WAL in it.
    pub fn is_empty(&self) -> bool {
        self.index().is_empty()
    }

    /// Returns how many bytes of WAL are in it.
    pub fn bytes(&self) -> u64 {
        self.index().values().map(|whole| u64::from(whole.bytes)).sum()
    }

    /// Reads bytes of a segment, each frame checked again.
    pub fn read(&self, segment: WalSegmentName, range: Range<u32>) -> Result<Vec<u8>, Error> {
        let path = self.path(segment);
        let known = self.read.lock().expect("no holder of this lock panics").take();
        let known = known.filter(|(name, at)| *name == segment && at.bytes <= range.start);
        let begin = known.map_or_else(Whole::default, |(_, at)| at);
        let mut content = Vec::with_capacity(range.len());
        let mut skip = (range.start - begin.bytes) as usize;
        let add = |bytes: &[u8]| {
            // What is behind the range is for the next time.
            let wanted = &bytes[skip.min(bytes.len())..];
            content.extend_from_slice(&wanted[..wanted.len().min(range.len() - content.len())]);
            skip = skip.saturating_sub(bytes.len());
        };
        let end = scan_to(&path, segment, self.size, begin, range.end, add);
        let end = end.map_err(DiskError::at("read", &path))?;
        if content.len() < range.len() {
            let detail = format!("{} of {} bytes can be read", end.bytes, range.end);
            return Err(DiskError::Malformed { path, what: "spooled WAL", detail }.into());
        }
        if end.bytes == range.end {
            *self.read.lock().expect("no holder of this lock panics") = Some((segment, end));
        }
        Ok(content)
    }

    /// Forgets a segment that is in the store. One that comes back after a crash is stored again, as the same.
    pub fn remove(&self, segment: WalSegmentName) -> Result<(), Error> {
        let path = self.path(segment);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DiskError::at("remove", &path)(error).into());
            }
            _ => {}
        }
        self.index().remove(&segment);
        Ok(())
    }

    /// Keeps a timeline's history file until it is in the store; nothing to do for one of which it is known that it waits
    /// or is there.
    pub fn put_history(&self, timeline: TimelineId, content: &[u8]) -> Result<(), Error> {
        let is_content = |known: Option<&Vec<u8>>| known.is_some_and(|known| known == content);
        let is_stored = is_content(self.lock_stored_histories().get(&timeline));
        if is_stored || is_content(self.waiting_histories().get(&timeline)) {
            return Ok(());
        }
        let path = self.history_path(timeline);
        write_file(&path, content, Create { owner: self.owner, ..Create::PRIVATE_FILE })?;
        self.waiting_histories().insert(timeline, content.to_owned());
        Ok(())
    }

    /// Returns the history files that are not in the store yet.
    pub fn histories(&self) -> BTreeMap<TimelineId, Vec<u8>> {
        self.waiting_histories().clone()
    }

    /// Returns a timeline's history file, one that waits or was stored since this start.
    pub fn history(&self, timeline: TimelineId) -> Option<Vec<u8>> {
        let waiting = self.waiting_histories().get(&timeline).cloned();
        waiting.or_else(|| self.lock_stored_histories().get(&timeline).cloned())
    }

    /// Tells whether a timeline's history file waits.
    pub fn has_history(&self, timeline: TimelineId) -> bool {
        self.waiting_histories().contains_key(&timeline)
    }

    /// Lets a history file go that is in the store.
    pub fn remove_history(&self, timeline: TimelineId) -> Result<(), Error> {
        crate::disk::durable::remove_file(&self.history_path(timeline))?;
        let stored = self.waiting_histories().remove(&timeline);
        self.lock_stored_histories().extend(stored.map(|content| (timeline, content)));
        Ok(())
    }

    /// Returns each segment that ends too early, with the one that follows on the same timeline: what is between was
    /// lost on this disk, or never received.
    pub fn holes(&self) -> Vec<(Position, Lsn)> {
        let index = self.index();
        let mut holes = Vec::new();
        for ((segment, whole), (next, _)) in index.iter().zip(index.iter().skip(1)) {
            let (Ok(start), Ok(to)) = (segment.start_lsn(self.size), next.start_lsn(self.size)) else {
                continue;
            };
            let end = Position { timeline: segment.timeline(), lsn: start + u64::from(whole.bytes) };
            if segment.timeline() == next.timeline() && end.lsn < to {
                holes.push((end, to));
            }
        }
        holes
    }

    /// Returns how far WAL follows from a position on, at most to another one.
    pub fn reach(&self, from: Position, to: Lsn) -> Lsn {
        let (index, mut end) = (self.index(), from.lsn);
        while end < to {
            let segment = WalSegmentName::containing(from.timeline, end, self.size);
            let start = Lsn(end.0 - self.size.offset_of(end));
            let next = start + index.get(&segment).map_or(0, |whole| u64::from(whole.bytes));
            if next <= end {
                break;
            }
            end = next;
        }
        end
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn waiting_histories(&self) -> MutexGuard<'_, BTreeMap<TimelineId, Vec<u8>>> {
        self.histories.lock().expect("no holder of this lock panics")
    }

    fn lock_stored_histories(&self) -> MutexGuard<'_, BTreeMap<TimelineId, Vec<u8>>> {
        self.stored_histories.lock().expect("no holder of this lock panics")
    }

    fn index(&self) -> MutexGuard<'_, BTreeMap<WalSegmentName, Whole>> {
        self.segments.lock().expect("no holder of this lock panics")
    }

    /// Returns what there is of a segment.
    fn durable(&self, segment: WalSegmentName) -> Option<Whole> {
        self.index().get(&segment).copied()
    }

    fn path(&self, segment: WalSegmentName) -> PathBuf {
        self.folder.join(format!("{segment}{SUFFIX}"))
    }

    fn history_path(&self, timeline: TimelineId) -> PathBuf {
        self.folder.join(format!("{}{HISTORY_SUFFIX}", timeline.hex8()))
    }
}

/// Reads the history files of a spool.
fn histories(folder: &Path) -> Result<BTreeMap<TimelineId, Vec<u8>>, Error> {
    let mut histories = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(DiskError::at("list", folder))? {
        let path = entry.map_err(DiskError::at("list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let timeline =
            name.strip_suffix(HISTORY_SUFFIX).and_then(|digits| TimelineId::from_hex8(digits).ok());
        let Some(timeline) = timeline else { continue };
        let mut content = Vec::new();
        let file = File::open(&path).map_err(DiskError::at("open", &path))?;
        file.take(HISTORY_BYTES_MAX).read_to_end(&mut content).map_err(DiskError::at("read", &path))?;
        histories.insert(timeline, content);
    }
    Ok(histories)
}

/// How far a file's frames check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Whole {
    /// Bytes of the segment.
    bytes: u32,
    /// Bytes of the file.
    file_bytes: u64,
}

fn frame_of(segment: WalSegmentName, offset: u32, bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u32;
    let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + bytes.len());
    frame.extend_from_slice(&FRAME_MAGIC);
    frame.extend_from_slice(&offset.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&checksum(segment, offset, bytes).to_le_bytes());
    frame.extend_from_slice(bytes);
    frame
}

fn checksum(segment: WalSegmentName, offset: u32, bytes: &[u8]) -> u32 {
    let mut front = segment.to_string().into_bytes();
    front.extend_from_slice(&offset.to_le_bytes());
    front.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    Crc32c::of(&front).then(Crc32c::of(bytes), bytes.len() as u64).0
}

/// Goes through the frames of a file up to the first that is not whole or does not follow.
fn scan(
    path: &Path,
    segment: WalSegmentName,
    size: WalSegmentSize,
    from: Whole,
    each: impl FnMut(&[u8]),
) -> io::Result<Whole> {
    scan_to(path, segment, size, from, u32::MAX, each)
}

/// Goes through the frames of a file from one that checked on, until `enough` bytes of the segment were seen.
fn scan_to(
    path: &Path,
    segment: WalSegmentName,
    size: WalSegmentSize,
    from: Whole,
    enough: u32,
    mut each: impl FnMut(&[u8]),
) -> io::Result<Whole> {
    let mut file = BufReader::new(File::open(path)?);
    if from.file_bytes > 0 {
        file.seek(SeekFrom::Start(from.file_bytes))?;
    }
    let mut whole = from;
    let mut bytes = Vec::new();
    while whole.bytes < enough {
        let mut header = [0; FRAME_HEADER_BYTES];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(whole),
            read => read?,
        }
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (offset, length, expected) = (word(4), word(8), word(12));
        let room = size.bytes() - whole.bytes;
        let follows = header[..4] == FRAME_MAGIC && offset == whole.bytes;
        if !follows || length == 0 || length > room.min(FRAME_BYTES_MAX) {
            return Ok(whole);
        }
        bytes.clear();
        (&mut file).take(length.into()).read_to_end(&mut bytes)?;
        if bytes.len() < length as usize || checksum(segment, offset, &bytes) != expected {
            return Ok(whole);
        }
        each(&bytes);
        whole.bytes += length;
        whole.file_bytes += (FRAME_HEADER_BYTES as u64) + u64::from(length);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: WalSegmentSize = WalSegmentSize::MIN;

    fn open(folder: &Path) -> Spool {
        Spool::open(folder, SIZE, None).unwrap()
    }

    fn at(lsn: u64) -> Position {
        Position { timeline: TimelineId::FIRST, lsn: Lsn(lsn) }
    }

    fn wal(from: u64, length: usize) -> Vec<u8> {
        (from..from + length as u64).map(|at| (at * 7 % 253) as u8).collect()
    }

    #[test]
    fn wal_is_cut_into_segments_and_read_back_from_anywhere() {
        let scratch = tempfile::tempdir().unwrap();
        let spool = open(scratch.path());
        let mib = u64::from(SIZE.bytes());
        let end = spool.append(at(mib), &wal(mib, 3 << 20)).unwrap();
        assert_eq!((end, spool.end()), (at(4 * mib), Some(at(4 * mib))));
        let end = spool.append(end, b"abc").unwrap();
        assert_eq!(spool.append(end, b"def").unwrap(), at(4 * mib + 6));
        let oldest = spool.oldest(9);
        assert_eq!(
            oldest.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>(),
            [1 << 20, 1 << 20, 1 << 20, 6]
        );
        assert_eq!(spool.read(oldest[1].0, 0..1 << 20).unwrap(), wal(2 * mib, 1 << 20));
        assert_eq!(spool.read(oldest[1].0, 1000..5000).unwrap(), wal(2 * mib, 5000)[1000..]);
        for (range, expected) in [(2..6, "cdef"), (0..3, "abc"), (3..5, "de"), (5..6, "f"), (1..4, "bcd")] {
            assert_eq!(spool.read(oldest[3].0, range).unwrap(), expected.as_bytes());
        }
        assert!(spool.read(oldest[3].0, 0..7).is_err());
        spool.remove(oldest[0].0).unwrap();
        assert_eq!((spool.oldest(1)[0].0, spool.bytes()), (oldest[1].0, 2 * mib + 6));
        // Another start sees the same, and nothing that does not follow is taken.
        drop(spool);
        let spool = open(scratch.path());
        assert_eq!((spool.end(), spool.bytes()), (Some(at(4 * mib + 6)), 2 * mib + 6));
        for lsn in [4 * mib + 5, 4 * mib + 7, 5 * mib + 1] {
            assert!(matches!(spool.append(at(lsn), b"x"), Err(Error::SpoolGap { .. })), "{lsn}");
        }
        assert_eq!(spool.append(at(4 * mib + 6), b"x").unwrap(), at(4 * mib + 7));
    }

    #[test]
    fn a_segment_that_lost_its_end_is_a_hole_and_the_end_of_a_timeline_is_none() {
        let scratch = tempfile::tempdir().unwrap();
        let mib = u64::from(SIZE.bytes());
        let spool = open(scratch.path());
        let end = spool.append(at(mib), &wal(mib, 500)).unwrap();
        let end = spool.append(end, &wal(end.lsn.0, (2 << 20) - 500)).unwrap();
        let two = TimelineId::new(2).unwrap();
        spool.append(end, b"x").unwrap();
        spool.append(Position { timeline: two, ..end }, b"x").unwrap();
        assert_eq!(spool.holes(), []);
        let first = spool.oldest(1)[0].0;
        let file = OpenOptions::new().write(true).open(spool.path(first)).unwrap();
        file.set_len(FRAME_HEADER_BYTES as u64 + 600).unwrap();
        let spool = open(scratch.path());
        assert_eq!(spool.holes(), [(at(mib + 500), Lsn(2 * mib))]);
        // It can be filled, and nothing but it.
        let reach = |spool: &Spool| spool.reach(at(mib), Lsn(3 * mib)).0;
        assert_eq!(reach(&spool), mib + 500);
        spool.append(at(mib + 500), &wal(mib + 500, 700)).unwrap();
        assert_eq!(reach(&spool), mib + 1200);
        let rest = (1 << 20) - 1200;
        assert!(spool.append(at(mib + 1200), &wal(mib + 1200, rest + 1)).is_err());
        assert_eq!((reach(&spool), spool.holes()), (3 * mib, vec![]));
        assert_eq!(spool.read(first, 0..1 << 20).unwrap(), wal(mib, 1 << 20));
    }

    #[test]
    fn what_a_failed_write_left_is_cut_off_before_anything_is_appended() {
        let scratch = tempfile::tempdir().unwrap();
        let spool = open(scratch.path());
        let mib = u64::from(SIZE.bytes());
        let end = spool.append(at(mib), b"first, ").unwrap();
        let segment = spool.newest().unwrap();
        let path = spool.path(segment);
        // A frame of which it is not known whether it is on the disk, and a file that takes neither bytes nor a cut.
        let doubtful = frame_of(segment, 7, b"doubtful");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&doubtful).unwrap();
        spool.open.lock().unwrap().as_mut().unwrap().file = File::open(&path).unwrap();
        spool.append(end, b"never written").unwrap_err();
        assert_eq!(spool.end(), Some(end));
        let end = spool.append(end, b"longer than what was doubtful").unwrap();
        assert_eq!(spool.end(), Some(end));
        drop(spool);
        let spool = open(scratch.path());
        assert_eq!(spool.end(), Some(end), "what was acknowledged");
        let content = spool.read(segment, 0..spool.durable(segment).unwrap().bytes).unwrap();
        assert_eq!(content, b"first, longer than what was doubtful");
        // Nothing follows what is no longer there.
        let (end, shorter) = (spool.end().unwrap(), OpenOptions::new().write(true).open(&path).unwrap());
        shorter.set_len(FRAME_HEADER_BYTES as u64 + 7).unwrap();
        spool.append(end, b"behind a hole").unwrap_err();
        assert_eq!(spool.end(), Some(end));
    }

    /// The folder is synced for it, too, which only the owner that it is given shows.
    #[test]
    fn a_file_left_by_an_attempt_that_failed_is_treated_as_a_new_one() {
        if !Owner::current().is_root() {
            eprintln!("SKIPPED: only root gives files away");
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let owner = Owner { uid: 1234, gid: 1235 };
        let folder = scratch.path().join("main/7-1");
        let spool = Spool::open(&folder, SIZE, Some(owner)).unwrap();
        let mib = u64::from(SIZE.bytes());
        let path = spool.path(WalSegmentName::containing(TimelineId::FIRST, Lsn(mib), SIZE));
        fs::write(&path, b"half a frame").unwrap();
        spool.append(at(mib), b"abc").unwrap();
        spool.put_history(TimelineId::new(2).unwrap(), b"1\t0/3000000\tx\n").unwrap();
        assert_eq!(spool.read(spool.newest().unwrap(), 0..3).unwrap(), b"abc");
        let history = spool.history_path(TimelineId::new(2).unwrap());
        for path in [&path, &history, &folder, &folder.parent().unwrap().to_owned()] {
            assert_eq!(Owner::of(path).unwrap(), owner, "{}", path.display());
        }
        assert_ne!(Owner::of(scratch.path()).unwrap(), owner, "which was there before");
    }

    #[test]
    fn nobody_else_reads_what_is_spooled() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("main/7-1");
        let spool = Spool::open(&folder, SIZE, None).unwrap();
        let two = TimelineId::new(2).unwrap();
        spool.append(at(u64::from(SIZE.bytes())), b"abc").unwrap();
        spool.put_history(two, b"1\t0/3000000\tx\n").unwrap();
        let file = spool.path(spool.newest().unwrap());
        let folders = [(folder.parent().unwrap(), 0o700), (&*folder, 0o700)];
        for (path, mode) in folders.into_iter().chain([(&*file, 0o600), (&*spool.history_path(two), 0o600)]) {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, mode, "{}", path.display());
        }
    }

    #[test]
    fn history_files_wait_beside_the_segments() {
        let scratch = tempfile::tempdir().unwrap();
        let spool = open(scratch.path());
        let two = TimelineId::new(2).unwrap();
        let content = b"1\t0/3000000\tx\n";
        spool.put_history(two, content).unwrap();
        assert_eq!(open(scratch.path()).histories()[&two], content);
        assert!(spool.has_history(two) && !spool.has_history(TimelineId::FIRST));
        spool.remove_history(two).unwrap();
        let nothing_waits = |spool: &Spool| spool.histories().is_empty() && !spool.has_history(two);
        assert!(nothing_waits(&spool) && nothing_waits(&open(scratch.path())) && spool.is_empty());
        // It is told again at each connection, and by another server perhaps another one.
        spool.put_history(two, content).unwrap();
        assert!(nothing_waits(&spool) && nothing_waits(&open(scratch.path())));
        spool.put_history(two, b"1\t0/4000000\tx\n").unwrap();
        assert_eq!(open(scratch.path()).histories()[&two], b"1\t0/4000000\tx\n");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        /// A power cut leaves any prefix of the last frames, or zeros or old bytes in their place: what is believed is
        /// always a prefix of what was written, all of it that had been synced, and can be continued.
        #[test]
        fn whatever_a_power_cut_leaves_a_true_beginning_is_found(
            lengths in proptest::collection::vec(1usize..5000, 1..8),
            cut in 0.0f64..1.0,
            damage in proptest::option::of((0.0f64..1.0, 1u8..)),
        ) {
            let scratch = tempfile::tempdir().unwrap();
            let spool = open(scratch.path());
            let mut end = at(u64::from(SIZE.bytes()));
            let start = end.lsn.0;
            for length in &lengths {
                end = spool.append(end, &wal(end.lsn.0, *length)).unwrap();
            }
            let segment = spool.newest().unwrap();
            let path = spool.path(segment);
            drop(spool);
            let mut bytes = fs::read(&path).unwrap();
            let kept = (bytes.len() as f64 * cut) as usize;
            bytes[kept..].fill(0);
            let mut untouched = kept;
            if let Some((place, flip)) = damage {
                let place = (bytes.len() as f64 * place) as usize;
                bytes[place] ^= flip;
                untouched = untouched.min(place);
            }
            fs::write(&path, &bytes).unwrap();
            let (mut sure, mut file_bytes) = (0, 0);
            for length in &lengths {
                file_bytes += FRAME_HEADER_BYTES + length;
                sure += if file_bytes <= untouched { *length } else { 0 };
            }
            let spool = open(scratch.path());
            let found = spool.durable(segment).unwrap().bytes as usize;
            prop_assert!(found >= sure);
            prop_assert_eq!(spool.read(segment, 0..found as u32).unwrap(), wal(start, found));
            let more = wal(start + found as u64, 100);
            spool.append(at(start + found as u64), &more).unwrap();
            prop_assert_eq!(spool.read(segment, 0..found as u32 + 100).unwrap(), wal(start, found + 100));
        }
    }
}
