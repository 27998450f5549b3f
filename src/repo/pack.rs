//! Packs: sealed chunks one after the other, stored by one PUT.
//!
//! A chunk's position in its pack is its nonce, so chunks are sealed in the order in which they are appended, by
//! the one builder that owns the pack. Nothing in a pack says where a chunk begins: page maps do.

use bytes::Bytes;

use crate::codec::{Cipher, CodecId, Decompressor, Digest, FrameAad, FrameKey, Hasher, TAG_LEN};
use crate::repo::chunk::{ChunkRef, PACK_BYTES_MAX};
use crate::repo::error::Error;
use crate::repo::header::{HeaderBuilder, Section};
use crate::repo::id::{ClusterId, PackId};
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::{ContentKey, KeyEnvelope};
use crate::repo::sealed::{CompressedFrame, FrameKind};
use crate::repo::wire::WireWriter;

/// A pack under construction.
#[derive(Debug)]
pub struct PackBuilder {
    id: PackId,
    salt: [u8; 32],
    key: FrameKey,
    bytes: Vec<u8>,
    digester: Hasher,
    chunks: u32,
}

/// A complete pack, kept in memory until the store has it; a retry stores the same bytes.
#[derive(Debug, Clone)]
pub struct Pack {
    /// Which pack it is.
    pub id: PackId,
    /// What its key was derived with; its first four bytes are part of its name.
    pub salt: [u8; 32],
    /// BLAKE3 of `bytes`.
    pub digest: Digest,
    /// Header and chunks.
    pub bytes: Bytes,
}

/// A data chunk larger than this does not exist, so a pack with this much room takes any chunk.
const CHUNK_ROOM: usize = 2 << 20;

impl PackBuilder {
    /// Starts the pack `id`, sealed under `key` with a freshly drawn `salt`.
    pub fn new(
        identity: &Identity,
        id: PackId,
        salt: [u8; 32],
        key: &ContentKey,
        envelope: &KeyEnvelope,
    ) -> Self {
        let (mut section_key, mut section_salt) = (WireWriter::new(), WireWriter::new());
        envelope.encode(&mut section_key);
        section_salt.raw(&salt);
        let bytes = HeaderBuilder::new(ObjectKind::Pack)
            .section(Section::Key, section_key)
            .section(Section::Salt, section_salt)
            .finish();
        let mut digester = Hasher::new();
        digester.update(&bytes);
        Self { id, salt, key: key.frame_key(&salt, identity), bytes, digester, chunks: 0 }
    }

    /// Returns which pack it will be.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Returns whether another chunk still fits.
    pub fn has_room(&self) -> bool {
        self.bytes.len() + CHUNK_ROOM <= PACK_BYTES_MAX as usize
    }

    /// Returns whether nothing has been appended yet.
    pub fn is_empty(&self) -> bool {
        self.chunks == 0
    }

    /// Returns how many bytes the pack has by now.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Seals a chunk at the next position.
    pub fn append(&mut self, kind: FrameKind, frame: CompressedFrame) -> ChunkRef {
        let CompressedFrame { codec, raw_len, body } = frame;
        let aad = chunk_aad(kind, self.chunks, codec, raw_len);
        let stored = self.key.seal(&aad, body);
        let tag = (self.key.cipher() == Cipher::None).then(|| tag_of(&stored));
        let chunk = ChunkRef {
            pack: self.id,
            position: self.chunks,
            offset: self.bytes.len() as u32,
            stored_len: stored.len() as u32,
            raw_len,
            codec,
            tag,
        };
        self.digester.update(&stored);
        self.bytes.extend_from_slice(&stored);
        self.chunks += 1;
        chunk
    }

    /// Completes the pack.
    pub fn finish(self) -> Pack {
        Pack { id: self.id, salt: self.salt, digest: self.digester.finish(), bytes: self.bytes.into() }
    }
}

/// Opens a chunk from its stored bytes.
///
/// # Errors
/// `Damaged`, naming the pack and the chunk, where the bytes are not the ones that were sealed.
pub fn open_chunk(
    key: &FrameKey,
    kind: FrameKind,
    chunk: &ChunkRef,
    stored: &[u8],
) -> Result<Vec<u8>, Error> {
    let damaged = |detail: &str| Error::damaged(chunk.pack, format!("chunk {} {detail}", chunk.position));
    if stored.len() != chunk.stored_len as usize || stored.len() < TAG_LEN {
        return Err(damaged("is cut off"));
    }
    if chunk.tag.is_some_and(|tag| tag != tag_of(stored))
        || (key.cipher() == Cipher::None && chunk.tag.is_none())
    {
        return Err(damaged("is not the one the page map names"));
    }
    let aad = chunk_aad(kind, chunk.position, chunk.codec, chunk.raw_len);
    let body = key.open(&aad, stored.to_vec()).map_err(|_| damaged("does not authenticate"))?;
    let raw_len = chunk.raw_len as usize;
    Decompressor::on_this_thread(|decompressor| decompressor.decompress(chunk.codec, &body, raw_len))
        .map_err(|_| damaged("does not decompress"))
}

/// The identity a pack is sealed under: the basebackup that wrote it and its number.
pub fn pack_identity(site: uuid::Uuid, cluster: ClusterId, pack: PackId) -> Identity {
    Identity {
        kind: ObjectKind::Pack,
        site,
        cluster,
        timeline: None,
        name: pack.origin.to_string(),
        part: pack.number.to_string(),
    }
}

fn chunk_aad(kind: FrameKind, position: u32, codec: CodecId, raw_len: u32) -> FrameAad {
    FrameAad { kind: kind as u8, position: u64::from(position), last: false, codec, raw_len }
}

fn tag_of(stored: &[u8]) -> [u8; TAG_LEN] {
    let (_, tag) = stored.split_last_chunk().expect("a sealed chunk ends in its tag");
    *tag
}
