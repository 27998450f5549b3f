//! The journal of a full basebackup under way: which files are done, and which packs the store has.
//!
//! ```text
//! frames, each: length 4, kind 1 and body, tag     first the facts, then files and packs as they come
//! ```
//! Beside the unfinished state, whose blocks its files name. Appended to, and synced with the state whenever the store
//! has another pack: what a kill leaves is read up to the first frame that is not whole. Its files are then given to the
//! unfinished state as its index, and that is read like any other. Where a file's maps stand is not known before
//! the end; a pack that is nobody's stands for it. Deliberately absent: whether the attempt may be gone on with.

use std::fs::{File, OpenOptions};
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

/// What a killed basebackup has left.
#[derive(Debug)]
pub struct Attempt {
    /// What is known of its pages.
    pub state: State,
    /// The packs that the store has acknowledged.
    pub packs: Vec<PackRecord>,
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

    /// Notes a pack that the store has; durable when this returns, as is all before it.
    pub fn push_pack(&mut self, pack: &PackRecord) -> Result<(), StateError> {
        let (seconds, random) = pack.id.origin.parts();
        let mut out = WireWriter::new();
        out.u64(seconds).u16(random).u32(pack.id.number).u32(pack.size);
        out.raw(&pack.salt).raw(pack.digest.as_bytes());
        self.append(PACK, &out.finish());
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

    fn flush(&mut self) -> Result<(), StateError> {
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

    /// Takes up what the last basebackup left that was killed; none where none was since the state that counts, or it
    /// had stored nothing.
    ///
    /// # Errors
    /// Where what it left cannot be used; the next [`StateFolder::begin`] removes it.
    pub fn take_up(&self, _held: &BackupLock) -> Result<Option<Attempt>, StateError> {
        let Some(id) = self.killed()? else {
            return Ok(None);
        };
        let path = self.journal(id);
        let file = File::open(&path).map_err(disk::Error::at("open the journal", &path))?;
        let mut writer = match StateWriter::reopen(self.clone(), id) {
            Err(StateError::Disk(error)) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        let (mut facts, mut packs) = (None, Vec::new());
        let mut frames = Frames { input: BufReader::new(file), id, offset: 0 };
        let damaged = |detail: &str| StateError::Damaged { path: path.clone(), detail: detail.to_owned() };
        while let Some((kind, body)) = frames.next().map_err(disk::Error::at("read the journal", &path))? {
            match kind {
                FACTS => facts = Some(decode_facts(&body).map_err(|_| damaged("its facts"))?),
                FILE => {
                    let file = decode_file(&body).map_err(|_| damaged("a file"))?;
                    if writer.holds(&file) {
                        writer.push_file(&file)?;
                    }
                }
                PACK => packs.push(decode_pack(&body).map_err(|_| damaged("a pack"))?),
                _ => return Err(damaged("a frame of a later release")),
            }
        }
        let Some(facts) = facts.filter(|_| !packs.is_empty()) else {
            return Ok(None);
        };
        writer.finish_unnamed(&facts)?;
        Ok(Some(Attempt { state: State::open(self.unfinished(id), id)?, packs }))
    }
}

/// The frames of a journal, up to the first that is not whole.
struct Frames {
    input: BufReader<File>,
    id: BasebackupId,
    offset: u64,
}

impl Frames {
    fn next(&mut self) -> std::io::Result<Option<(u8, Vec<u8>)>> {
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
    fn fill(&mut self, bytes: &mut [u8]) -> std::io::Result<bool> {
        match self.input.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn decode_pack(body: &[u8]) -> Result<PackRecord, WireError> {
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
    reader.finish().map(|()| record)
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
