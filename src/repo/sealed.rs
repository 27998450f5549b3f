//! Objects that are sealed as a whole: manifest, WAL, history.
//!
//! ```text
//! header        plain; Key, Salt and Index sections at least
//! index frame   position 0: for each frame its stored length, raw length, codec, and without a cipher its tag
//! frames        positions 1..=n, each compressed, then sealed; the last one says so
//! ```
//! Header and index together are the *head*. Whoever trusts the head (a digest in `backup.json`, or a signed
//! header that holds the index's tag) can read any frame alone. Chunks in packs are not here but in `pack`.

use std::ops::Range;

use bytes::Bytes;

use crate::codec::{
    Cipher, CodecId, Compressor, Decompressor, Digest, FrameAad, FrameKey, Hasher, RandomExt, TAG_LEN,
};
use crate::repo::error::Error;
use crate::repo::header::{Header, HeaderBuilder, Section};
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::{ContentKey, KeyEnvelope, Keyring};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// What kind of bytes a frame holds; part of what is authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// The index of a sealed object.
    Index = 0,
    /// A frame of a sealed object.
    Body = 1,
    /// A chunk of pages or small files in a pack.
    Data = 2,
    /// A chunk of page-map blocks in a pack.
    Map = 3,
}

/// The largest raw frame of a sealed object.
pub const FRAME_RAW_MAX: usize = 1 << 20;
/// The largest stored frame: what does not become smaller is stored as it is.
const FRAME_STORED_MAX: usize = FRAME_RAW_MAX + TAG_LEN;
/// The largest index frame: a manifest of a million file-table blocks has a smaller one.
const INDEX_BYTES_MAX: u32 = 64 << 20;

/// A sealed object, complete and ready to be stored; a retry stores the same bytes.
#[derive(Debug, Clone)]
pub struct SealedObject {
    /// Header, index and frames.
    pub bytes: Bytes,
    /// Length of header and index.
    pub head_len: u64,
}

/// A frame that has been compressed and waits to be sealed.
#[derive(Debug, Clone)]
pub struct CompressedFrame {
    /// How `body` is compressed.
    pub codec: CodecId,
    /// Length before compression.
    pub raw_len: u32,
    /// The compressed bytes.
    pub body: Vec<u8>,
}

impl CompressedFrame {
    /// Compresses `raw`.
    pub fn compress(compressor: &mut Compressor, raw: &[u8]) -> Result<Self, Error> {
        let (codec, body) = compressor.compress(raw)?;
        Ok(Self { codec, raw_len: raw.len() as u32, body })
    }
}

/// Where one frame of a sealed object lies and how it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FrameEntry {
    offset: u64,
    stored_len: u32,
    raw_len: u32,
    codec: CodecId,
    tag: Option<[u8; TAG_LEN]>,
}

/// The opened head of a sealed object: which frames it has, and the key that opens them.
#[derive(Debug)]
pub struct SealedHead {
    key: FrameKey,
    frames: Vec<FrameEntry>,
    object: String,
}

/// What is sealed, and for whom.
#[derive(Debug)]
pub struct SealSpec<'a> {
    /// Keys, signer and randomness of this host.
    pub keyring: &'a Keyring,
    /// What the object is.
    pub identity: &'a Identity,
    /// The key to seal under.
    pub key: &'a ContentKey,
    /// How that key travels.
    pub envelope: &'a KeyEnvelope,
}

/// Seals frames into an object whose header is not signed: something signed pins its head.
pub fn seal(spec: &SealSpec<'_>, frames: Vec<CompressedFrame>) -> Result<SealedObject, Error> {
    let salt = spec.keyring.random().array();
    let body = SealedBody::seal(spec, &salt, frames.into_iter().map(Ok))?;
    let header = body.header(spec).finish();
    Ok(body.join(header))
}

/// Frames that were sealed, and the index of them: an object without its header.
#[derive(Debug)]
pub struct SealedBody {
    salt: [u8; 32],
    index: Vec<u8>,
    /// The frames, behind so many bytes for header and index, which are known last: frames are not copied to join them.
    room: usize,
    frames: Vec<u8>,
}

/// Room for a header: its sections, and a key wrapped for some recipients. A longer one costs a copy of the frames.
const HEADER_ROOM: usize = 8 << 10;
/// Room for an index is left by what an entry is as a rule: two lengths of at most three bytes, and a codec.
const INDEX_ENTRY_ROOM: usize = 7;

impl SealedBody {
    /// Seals frames one after the other as they are made.
    pub fn seal(
        spec: &SealSpec<'_>,
        salt: &[u8; 32],
        frames: impl ExactSizeIterator<Item = Result<CompressedFrame, Error>>,
    ) -> Result<Self, Error> {
        let key = spec.key.frame_key(salt, spec.identity);
        let last = frames.len() as u64;
        let entry = INDEX_ENTRY_ROOM + if key.cipher() == Cipher::None { TAG_LEN } else { 0 };
        let room = HEADER_ROOM + frames.len() * entry;
        let mut sealed = vec![0; room];
        let mut index = WireWriter::new();
        index.varint(last);
        for (position, frame) in (1u64..).zip(frames) {
            let frame = frame?;
            let aad = FrameAad {
                kind: FrameKind::Body as u8,
                position,
                last: position == last,
                codec: frame.codec,
                raw_len: frame.raw_len,
            };
            let stored = key.seal(&aad, frame.body);
            index.varint(stored.len() as u64).varint(u64::from(frame.raw_len)).u8(frame.codec as u8);
            if key.cipher() == Cipher::None {
                index.raw(&stored[stored.len() - TAG_LEN..]);
            }
            sealed.extend_from_slice(&stored);
        }
        Ok(Self { salt: *salt, index: seal_index(&key, index.finish()), room, frames: sealed })
    }

    /// Computes the BLAKE3 of index and frames as they are stored.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        hasher.update(&self.index).update(&self.frames[self.room..]);
        hasher.finish()
    }

    /// Makes it an object with a signed header that says more about its content.
    pub fn finish_signed(
        self,
        spec: &SealSpec<'_>,
        further: impl IntoIterator<Item = (Section, WireWriter)>,
    ) -> SealedObject {
        let mut header = self.header(spec);
        for (section, bytes) in further {
            header = header.section(section, bytes);
        }
        let header = header.finish_signed(spec.keyring, spec.identity);
        self.join(header)
    }

    fn header(&self, spec: &SealSpec<'_>) -> HeaderBuilder {
        let (mut key, mut salt, mut index) = (WireWriter::new(), WireWriter::new(), WireWriter::new());
        spec.envelope.encode(&mut key);
        salt.raw(&self.salt);
        index.u32(self.index.len() as u32).raw(&self.index[self.index.len() - TAG_LEN..]);
        HeaderBuilder::new(spec.identity.kind)
            .section(Section::Key, key)
            .section(Section::Salt, salt)
            .section(Section::Index, index)
    }

    fn join(self, mut head: Vec<u8>) -> SealedObject {
        let Self { index, room, mut frames, .. } = self;
        head.extend_from_slice(&index);
        let head_len = head.len() as u64;
        let bytes = if let Some(start) = room.checked_sub(head.len()) {
            frames[start..room].copy_from_slice(&head);
            Bytes::from(frames).slice(start..)
        } else {
            head.extend_from_slice(&frames[room..]);
            head.into()
        };
        SealedObject { bytes, head_len }
    }
}

fn seal_index(key: &FrameKey, raw: Vec<u8>) -> Vec<u8> {
    let aad = index_aad(raw.len() as u32);
    key.seal(&aad, raw)
}

fn index_aad(raw_len: u32) -> FrameAad {
    FrameAad { kind: FrameKind::Index as u8, position: 0, last: false, codec: CodecId::None, raw_len }
}

impl SealedHead {
    /// Opens the head at the front of `bytes`, whose header the caller has already parsed and trusts.
    pub fn open(
        bytes: &[u8],
        header: &Header,
        keyring: &Keyring,
        identity: &Identity,
        object: &str,
    ) -> Result<Self, Error> {
        let damaged = |error: WireError| Error::damaged(object, format!("its header {error}"));
        let envelope = KeyEnvelope::decode(&mut header.section(Section::Key, object)?).map_err(damaged)?;
        let salt = header.section(Section::Salt, object)?.array::<32>().map_err(damaged)?;
        let mut section = header.section(Section::Index, object)?;
        let (index_len, index_tag) =
            (section.u32().map_err(damaged)?, section.array::<TAG_LEN>().map_err(damaged)?);
        let key = keyring.open_key(&envelope, object)?.frame_key(&salt, identity);
        let start = header.len;
        let end = start + index_len as usize;
        if index_len > INDEX_BYTES_MAX || (index_len as usize) < TAG_LEN || bytes.len() < end {
            return Err(Error::damaged(object, "its index is cut off"));
        }
        let stored = &bytes[start..end];
        if stored[stored.len() - TAG_LEN..] != index_tag {
            return Err(Error::damaged(object, "its index is not the one its header names"));
        }
        let aad = index_aad(index_len - TAG_LEN as u32);
        let index = key
            .open(&aad, stored.to_vec())
            .map_err(|_| Error::damaged(object, "its index does not authenticate"))?;
        let frames = parse_index(&index, end as u64, key.cipher())
            .map_err(|error| Error::damaged(object, format!("its index {error}")))?;
        Ok(Self { key, frames, object: object.to_owned() })
    }

    /// Returns how many frames the object has.
    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    /// Returns where frames `first..end` lie in the object.
    pub fn range(&self, frames: Range<usize>) -> Option<Range<u64>> {
        let (first, last) = (self.frames.get(frames.start)?, self.frames.get(frames.end.checked_sub(1)?)?);
        Some(first.offset..last.offset + u64::from(last.stored_len))
    }

    /// Returns how large the object is.
    pub fn object_size(&self) -> Option<u64> {
        self.range(0..self.frames.len()).map(|range| range.end)
    }

    /// Returns how many bytes all frames have once inflated.
    fn raw_size(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.raw_len)).sum()
    }

    /// Opens frame `n`, given the object's bytes from offset `base` on.
    pub fn open_frame(&self, n: usize, base: u64, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let frame = self.frame(n)?;
        let body = self.open_body(n, frame, base, bytes)?;
        Decompressor::on_this_thread(|inflate| inflate.decompress(frame.codec, &body, frame.raw_len as usize))
            .map_err(|_| self.damaged(n, "does not decompress"))
    }

    /// Opens frame `n` to the front of `raw`, given the whole object; returns how many bytes it has.
    fn open_frame_into(&self, n: usize, bytes: &[u8], raw: &mut [u8]) -> Result<usize, Error> {
        let frame = self.frame(n)?;
        let body = self.open_body(n, frame, 0, bytes)?;
        let raw_len = frame.raw_len as usize;
        let raw = raw.get_mut(..raw_len).ok_or_else(|| self.damaged(n, "is one too many"))?;
        Decompressor::on_this_thread(|inflate| inflate.decompress_into(frame.codec, &body, raw))
            .map_err(|_| self.damaged(n, "does not decompress"))?;
        Ok(raw_len)
    }

    fn frame(&self, n: usize) -> Result<&FrameEntry, Error> {
        self.frames.get(n).ok_or_else(|| self.damaged(n, "does not exist"))
    }

    fn damaged(&self, n: usize, detail: &str) -> Error {
        Error::damaged(&self.object, format!("frame {} {detail}", n + 1))
    }

    /// Opens the body of a frame, which is compressed still.
    fn open_body(&self, n: usize, frame: &FrameEntry, base: u64, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let stored = frame
            .offset
            .checked_sub(base)
            .and_then(|start| bytes.get(start as usize..)?.get(..frame.stored_len as usize))
            .ok_or_else(|| self.damaged(n, "is cut off"))?;
        if frame.tag.is_some_and(|tag| stored[stored.len() - TAG_LEN..] != tag) {
            return Err(self.damaged(n, "is not the one the index names"));
        }
        let aad = FrameAad {
            kind: FrameKind::Body as u8,
            position: n as u64 + 1,
            last: n + 1 == self.frames.len(),
            codec: frame.codec,
            raw_len: frame.raw_len,
        };
        self.key.open(&aad, stored.to_vec()).map_err(|_| self.damaged(n, "does not authenticate"))
    }
}

fn parse_index(bytes: &[u8], mut offset: u64, cipher: Cipher) -> Result<Vec<FrameEntry>, WireError> {
    let mut reader = WireReader::new(bytes);
    // Two lengths and a codec: an entry in memory takes about sixteen times what it takes in an index.
    let count = reader.count_of("frame count", 3)?;
    let mut frames = Vec::with_capacity(count);
    for _ in 0..count {
        let stored_len = reader.bounded("stored length", FRAME_STORED_MAX as u64)? as u32;
        let raw_len = reader.bounded("raw length", FRAME_RAW_MAX as u64)? as u32;
        let codec = CodecId::try_from(reader.u8()?).map_err(|_| WireError::Invalid { field: "codec" })?;
        let tag = if cipher == Cipher::None { Some(reader.array()?) } else { None };
        if (stored_len as usize) < TAG_LEN {
            return Err(WireError::Invalid { field: "stored length" });
        }
        frames.push(FrameEntry { offset, stored_len, raw_len, codec, tag });
        offset += u64::from(stored_len);
    }
    reader.finish().map(|()| frames)
}

/// Opens the whole of a sealed object of `identity` whose header the caller trusts, and says that it has `raw_size`
/// bytes once inflated, the length of `raw`, which they fill. An index of few bytes can name a great many, so nothing is
/// inflated where the two differ. `digest` takes in what was inflated.
pub fn open_all(
    bytes: &[u8],
    header: &Header,
    keyring: &Keyring,
    identity: &Identity,
    object: &str,
    raw: &mut [u8],
    digest: &mut Hasher,
) -> Result<(), Error> {
    debug_assert!(!matches!(identity.kind, ObjectKind::Pack));
    let head = SealedHead::open(bytes, header, keyring, identity, object)?;
    if head.object_size().is_some_and(|size| size != bytes.len() as u64) {
        return Err(Error::damaged(object, "its length is not the one its index names"));
    }
    if head.raw_size() != raw.len() as u64 {
        return Err(Error::damaged(object, "its frames do not make up the size that its header names"));
    }
    // The index was sealed, and agrees with the header: this is what the frames hold.
    let mut at = 0;
    for n in 0..head.frame_count() {
        let end = at + head.open_frame_into(n, bytes, &mut raw[at..])?;
        // While it is in the processor's cache.
        digest.update(&raw[at..end]);
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use crate::codec::{Compression, SeededRandom};
    use crate::repo::id::ClusterId;
    use crate::repo::keyring::Audience;

    use super::*;

    const ALGORITHMS: [CodecId; 4] = [CodecId::None, CodecId::Zstd, CodecId::Snappy, CodecId::Lz4];

    fn identity() -> Identity {
        Identity {
            kind: ObjectKind::Wal,
            site: uuid::Uuid::nil(),
            cluster: ClusterId::UNKNOWN,
            timeline: None,
            name: "x".to_owned(),
            part: String::new(),
        }
    }

    fn keyring() -> Keyring {
        Keyring::unencrypted(Arc::new(SeededRandom::new(7)))
    }

    fn compressed(algorithm: CodecId, raw: &[u8]) -> CompressedFrame {
        let level = if algorithm == CodecId::Zstd { 3 } else { 0 };
        CompressedFrame::compress(&mut Compressor::new(Compression { algorithm, level }), raw).unwrap()
    }

    /// Seals frames as they are, whatever they say of themselves, and opens the object as one of `raw_size`.
    fn sealed_and_opened(frames: Vec<CompressedFrame>, raw_size: u64) -> Result<Vec<u8>, Error> {
        let (keyring, identity) = (keyring(), identity());
        let (key, envelope) = keyring.create_key(Audience::Wal).unwrap();
        let spec = SealSpec { keyring: &keyring, identity: &identity, key: &key, envelope: &envelope };
        let bytes = seal(&spec, frames).unwrap().bytes;
        let header = Header::parse(&bytes, ObjectKind::Wal, "x").unwrap();
        let mut raw = vec![0; raw_size as usize];
        open_all(&bytes, &header, &keyring, &identity, "x", &mut raw, &mut Hasher::new())?;
        Ok(raw)
    }

    #[test]
    fn a_frame_that_lies_about_its_length_is_refused_by_every_codec() {
        for algorithm in ALGORITHMS {
            let raw = [5; 1000];
            let honest = compressed(algorithm, &raw);
            assert_eq!(honest.codec, algorithm);
            assert_eq!(sealed_and_opened(vec![honest.clone(), honest.clone()], 2000).unwrap(), [5; 2000]);
            for raw_len in [0, 1, 999, 1001, FRAME_RAW_MAX as u32] {
                let lying = CompressedFrame { raw_len, ..honest.clone() };
                let error = sealed_and_opened(vec![lying], u64::from(raw_len)).unwrap_err();
                assert!(
                    error.to_string().contains("does not decompress"),
                    "{algorithm:?} {raw_len}: {error}"
                );
            }
            for raw_len in [FRAME_RAW_MAX as u32 + 1, u32::MAX] {
                let lying = CompressedFrame { raw_len, ..honest.clone() };
                let error = sealed_and_opened(vec![lying], u64::from(raw_len)).unwrap_err();
                assert!(error.to_string().contains("raw length"), "{algorithm:?} {raw_len}: {error}");
            }
        }
    }

    #[test]
    fn nothing_is_inflated_of_frames_that_make_up_another_size_than_the_header_names() {
        let frame = compressed(CodecId::Zstd, &vec![0; FRAME_RAW_MAX]);
        assert!(frame.body.len() < 200, "a small object can name a great many bytes");
        // What it would inflate to is cut, so that the message tells which check came first.
        let cut = CompressedFrame { body: frame.body[..20].to_vec(), ..frame };
        let error = sealed_and_opened(vec![cut; 2000], 1 << 20).unwrap_err();
        assert!(error.to_string().contains("do not make up the size"), "{error}");
    }

    #[test]
    fn a_stored_length_that_no_frame_has_is_refused_before_it_is_fetched() {
        let index = |stored_len: u64| {
            let mut out = WireWriter::new();
            out.varint(1).varint(stored_len).varint(1).u8(CodecId::Zstd as u8);
            parse_index(&out.finish(), 0, Cipher::Aes256Gcm)
        };
        assert!(index(FRAME_STORED_MAX as u64).is_ok());
        assert!(index(FRAME_STORED_MAX as u64 + 1).is_err());
        assert!(index(TAG_LEN as u64 - 1).is_err());
    }

    proptest! {
        #[test]
        fn any_index_is_read_or_refused_and_so_are_its_frames(
            entries in prop::collection::vec((0u64..1 << 21, 0u64..1 << 21, 0u8..5), 0..8),
            cut in 0usize..60,
            flip in any::<(usize, u8)>(),
            body in prop::collection::vec(any::<u8>(), 0..200),
            base in 0u64..100,
        ) {
            let mut out = WireWriter::new();
            out.varint(entries.len() as u64);
            for (stored_len, raw_len, codec) in &entries {
                out.varint(stored_len % 60).varint(*raw_len).u8(*codec);
            }
            let mut bytes = out.finish();
            bytes.truncate(1.max(bytes.len().saturating_sub(cut)));
            let at = flip.0 % bytes.len();
            bytes[at] ^= flip.1;
            let key = FrameKey::unencrypted(&[0; 32], b"x");
            for cipher in [Cipher::None, Cipher::Aes256Gcm] {
                let Ok(frames) = parse_index(&bytes, 40, cipher) else { continue };
                let head = SealedHead { key: key.clone(), frames, object: "x".to_owned() };
                let _ = (head.object_size(), head.raw_size(), head.range(0..0), head.range(1..3));
                for n in 0..=head.frame_count() {
                    prop_assert!(head.open_frame(n, base, &body).is_err());
                }
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_index_or_one_in_bounds(bytes: Vec<u8>, offset in 0u64..1 << 40) {
            for cipher in [Cipher::None, Cipher::Aes256Gcm] {
                let frames = parse_index(&bytes, offset, cipher).unwrap_or_default();
                prop_assert!(frames.capacity() <= bytes.len() / 3);
            }
        }
    }
}
