//! The journal of a full basebackup under way: which files are done, and which packs the store has.
//!
//! ```text
//! frames, each: length 4, kind 1 and body, tag     first the facts, then files and packs as they come
//! ```
//! Beside the unfinished state, whose blocks its files name. Appended to, and synced with the state whenever the store
//! has another pack, which is noted with how long the state was then: what a kill leaves is believed up to the last pack,
//! because of what came behind it the disk may have any part, in any order. Its files are then given to the unfinished
//! state, cut to that length, as its index, and that is read like any other. Where a file's maps stand is not known before
//! the end; a pack that is nobody's stands for it. Deliberately absent: whether the attempt may be gone on with.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::backup::state::format::{
    INDEX_FRAME_BYTES_MAX, Part, decode_facts, decode_file, encode_facts, encode_file, objection_to_file,
    seal, unseal,
};
use crate::backup::state::{
    BackupLock, KnownContent, KnownFile, State, StateError, StateFacts, StateFolder, StateWriter,
};
use crate::codec::{CodecId, Digest, TAG_LEN};
use crate::disk::{self, durable::Create};
use crate::repo::{
    BasebackupId, PackId, PackRecord,
    chunk::ChunkRef,
    entry::{BlobRef, Content},
    page_map::MAP_BLOCK_BYTES,
    wire::{WireError, WireReader, WireWriter},
};

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    id: BasebackupId,
    buffer: Vec<u8>,
    written: u64,
}

/// What a killed basebackup has left, as its journal has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Attempt {
    /// What it said of itself when it began.
    pub facts: StateFacts,
    /// The packs that the store has acknowledged.
    pub packs: Vec<PackRecord>,
    durable: Durable,
}

/// How long the files of an attempt were when they were synced last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Durable {
    journal: u64,
    state: u64,
}

const FACTS: u8 = 0;
const FILE: u8 = 1;
const PACK: u8 = 2;
/// Files gather up to this; packs are rarer, and synced.
const BUFFER_BYTES: usize = 256 << 10;

impl Journal {
    /// Creates the journal of the basebackup that `facts` are of; what of them its end alone knows is not used.
    pub(super) fn create(path: PathBuf, create: Create, facts: &StateFacts) -> Result<Self, StateError> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(create.mode);
        let file = options.open(&path).map_err(disk::Error::at("create the journal", &path))?;
        if let Some(owner) = create.owner {
            owner.give(&path)?;
        }
        let mut journal = Self { file, path, id: facts.basebackup, buffer: Vec::new(), written: 0 };
        journal.append(FACTS, &encode_facts(facts));
        Ok(journal)
    }

    /// Notes a file whose pages have been noted in the state; where its maps stand does not count.
    pub fn push_file(&mut self, file: &KnownFile) -> Result<(), StateError> {
        let mut file = file.clone();
        if let KnownContent::Pages { stands, .. } = &mut file.content {
            let blocks = file.size.div_ceil(MAP_BLOCK_BYTES) as usize;
            *stands = Content::Blocks(vec![nowhere(self.id); blocks]);
        }
        if let Some(what) = objection_to_file(&file) {
            return Err(StateError::Refused { file: file.path.to_string(), what });
        }
        self.append(FILE, &encode_file(&file));
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Notes a pack that the store has, and that so many bytes of the state are on the disk; durable when this returns, as
    /// is all before it.
    pub fn push_pack(&mut self, pack: &PackRecord, state_len: u64) -> Result<(), StateError> {
        self.append(PACK, &encode_pack(pack, state_len));
        self.flush()?;
        Ok(self.file.sync_data().map_err(disk::Error::at("fsync the journal", &self.path))?)
    }

    fn append(&mut self, kind: u8, body: &[u8]) {
        let offset = self.written + self.buffer.len() as u64;
        let mut payload = [&[kind], body].concat();
        seal(self.id, Part::Journal, offset, &mut payload);
        self.buffer.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(&payload);
    }

    pub(super) fn flush(&mut self) -> Result<(), StateError> {
        self.file.write_all(&self.buffer).map_err(disk::Error::at("write the journal", &self.path))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl StateFolder {
    /// Begins the journal of a basebackup whose state has begun.
    pub fn begin_journal(&self, _held: &BackupLock, facts: &StateFacts) -> Result<Journal, StateError> {
        Journal::create(self.journal(facts.basebackup), self.private_file()?, facts)
    }

    /// Looks at what the last basebackup left that was killed; none where none was since the state that counts, or it
    /// had stored nothing. Nothing is written.
    ///
    /// # Errors
    /// Where what it left cannot be used; the next [`StateFolder::begin`] removes it.
    pub fn attempt(&self, _held: &BackupLock) -> Result<Option<Attempt>, StateError> {
        let Some(id) = self.killed()? else {
            return Ok(None);
        };
        let (mut facts, mut packs, mut durable) = (None, Vec::new(), None);
        let mut frames = Frames::open(self.journal(id), id)?;
        while let Some((kind, body)) = frames.next()? {
            match kind {
                FACTS => {
                    let decoded = decode_facts(&body);
                    facts = Some(decoded.map_err(|_| frames.damaged("its facts cannot be taken apart"))?);
                }
                FILE => {}
                PACK => {
                    let (pack, state) =
                        decode_pack(&body).map_err(|_| frames.damaged("a pack cannot be taken apart"))?;
                    packs.push(pack);
                    durable = Some(Durable { journal: frames.offset, state });
                }
                _ => return Err(frames.damaged("it has a frame of a later release")),
            }
        }
        let (Some(facts), Some(durable)) = (facts, durable) else {
            return Ok(None);
        };
        if facts.basebackup != id {
            return Err(frames.damaged("it is that of another basebackup"));
        }
        let state = self.unfinished(id);
        match fs::symlink_metadata(&state) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(disk::Error::at("stat", &state)(error).into()),
            Ok(found) if found.len() < durable.state => {
                Err(frames.damaged("the state beside it is shorter than it was"))
            }
            Ok(_) => Ok(Some(Attempt { facts, packs, durable })),
        }
    }

    /// Gives an attempt's state its index, and opens it. Whoever does so again gets the same.
    ///
    /// # Errors
    /// Where what it left cannot be used.
    pub fn take_up(&self, _held: &BackupLock, attempt: &Attempt) -> Result<State, StateError> {
        let Attempt { facts, durable, .. } = attempt;
        let id = facts.basebackup;
        let mut writer = StateWriter::reopen(self.clone(), id, durable.state)?;
        let mut frames = Frames::open(self.journal(id), id)?;
        while frames.offset < durable.journal {
            let Some((kind, body)) = frames.next()? else {
                return Err(frames.damaged("it is shorter than it was"));
            };
            if kind == FILE {
                let file = decode_file(&body).map_err(|_| frames.damaged("a file cannot be taken apart"))?;
                if writer.holds(&file) {
                    writer.push_file(&file)?;
                }
            }
        }
        writer.finish_unnamed(facts)?;
        State::open(self.unfinished(id), id)
    }
}

/// The frames of a journal, up to the first that is not whole.
struct Frames {
    input: BufReader<File>,
    path: PathBuf,
    id: BasebackupId,
    offset: u64,
}

impl Frames {
    fn open(path: PathBuf, id: BasebackupId) -> Result<Self, StateError> {
        let file = File::open(&path).map_err(disk::Error::at("open the journal", &path))?;
        Ok(Self { input: BufReader::new(file), path, id, offset: 0 })
    }

    fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>, StateError> {
        let mut len = [0; 4];
        if !self.fill(&mut len)? {
            return Ok(None);
        }
        let len = u32::from_le_bytes(len);
        if len > INDEX_FRAME_BYTES_MAX {
            return Ok(None);
        }
        let mut payload = vec![0; len as usize];
        if !self.fill(&mut payload)? {
            return Ok(None);
        }
        let Ok(sealed) = unseal(self.id, Part::Journal, self.offset, &payload) else {
            return Ok(None);
        };
        self.offset += 4 + u64::from(len);
        Ok(sealed.split_first().map(|(kind, body)| (*kind, body.to_vec())))
    }

    /// Fills `bytes`; false where the file ends before.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<bool, StateError> {
        match self.input.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(disk::Error::at("read the journal", &self.path)(error).into()),
        }
    }

    fn damaged(&self, detail: &str) -> StateError {
        StateError::Damaged { path: self.path.clone(), detail: detail.to_owned() }
    }
}

pub(super) fn encode_pack(pack: &PackRecord, state_len: u64) -> Vec<u8> {
    let (seconds, random) = pack.id.origin.parts();
    let mut out = WireWriter::new();
    out.u64(seconds).u16(random).u32(pack.id.number).u32(pack.size);
    out.raw(&pack.salt).raw(pack.digest.as_bytes()).u64(state_len);
    out.finish()
}

pub(super) fn decode_pack(body: &[u8]) -> Result<(PackRecord, u64), WireError> {
    let mut reader = WireReader::new(body);
    let origin = BasebackupId::from_parts(reader.u64()?, reader.u16()?)
        .map_err(|_| WireError::Invalid { field: "basebackup id" })?;
    let record = PackRecord {
        id: PackId { origin, number: reader.u32()? },
        size: reader.u32()?,
        live: 0,
        key: 0,
        salt: reader.array()?,
        digest: Digest(reader.array()?),
    };
    let state_len = reader.u64()?;
    reader.finish().map(|()| (record, state_len))
}

/// Stands for a map that has no place yet, in a pack that is never written.
fn nowhere(origin: BasebackupId) -> BlobRef {
    let chunk = ChunkRef {
        pack: PackId { origin, number: u32::MAX },
        position: 0,
        offset: 0,
        stored_len: TAG_LEN as u32,
        raw_len: 0,
        codec: CodecId::None,
        tag: None,
    };
    BlobRef { chunk, at: 0, len: 0 }
}
