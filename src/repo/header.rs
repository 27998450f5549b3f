//! The plain beginning that every binary object has.
//!
//! ```text
//! magic    6  "WALDEN"
//! kind     1  ObjectKind
//! version  1  1
//! required 4  feature bits a reader must know, or refuse the object
//! length   4  of the sections
//! sections    tag (1), length (4), bytes; ascending tags, from 0x80 on ignorable
//! ```
//! A signature, where there is one, is the last section and covers the identity and all bytes before it.

use crate::codec::SignerId;
use crate::repo::error::Error;
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::{Keyring, Trust};
use crate::repo::wire::{WireError, WireReader, WireWriter};

const MAGIC: &[u8; 6] = b"WALDEN";
const VERSION: u8 = 1;
/// The object supersedes others; a release that does not know that must not take either for the only one.
const FEATURE_SUPERSEDES: u32 = 1;
/// The object is the index of a file in parts.
const FEATURE_PARTS: u32 = 2;
/// Feature bits this release knows.
const KNOWN_FEATURES: u32 = FEATURE_SUPERSEDES | FEATURE_PARTS;
/// Bytes before the sections.
pub const PREFIX_LEN: usize = 16;
/// Wrapped keys for [`crate::repo::keyring::RECIPIENTS_MAX`] recipients fit.
const SECTIONS_BYTES_MAX: usize = 128 << 10;
const SECTION_HEAD_LEN: usize = 5;
const SIGNATURE_LEN: usize = 32 + 64;

/// What a section holds; numbers are part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Section {
    /// The envelope of the data key.
    Key = 1,
    /// The salt that the object's key is derived with.
    Salt = 2,
    /// Length and tag of the index frame.
    Index = 3,
    /// What a WAL object says of its content.
    Wal = 4,
    /// Parent timeline and switch point of a history file.
    History = 5,
    /// Digests of the objects that this one supersedes.
    Supersedes = 6,
    /// The parts of a file that is too large for one object.
    Parts = 7,
    /// Signer and signature.
    Signature = 127,
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What the object is.
    pub kind: ObjectKind,
    /// The length of the whole header; the body starts there.
    pub len: usize,
    sections: Vec<(u8, Vec<u8>)>,
}

/// Collects the sections of a header.
#[derive(Debug)]
pub struct HeaderBuilder {
    kind: ObjectKind,
    sections: Vec<(u8, Vec<u8>)>,
}

impl HeaderBuilder {
    /// Creates a header for an object of `kind`.
    pub fn new(kind: ObjectKind) -> Self {
        Self { kind, sections: Vec::new() }
    }

    /// Adds a section; sections are added in ascending order.
    pub fn section(mut self, section: Section, bytes: WireWriter) -> Self {
        debug_assert!(self.sections.last().is_none_or(|(tag, _)| *tag < section as u8));
        self.sections.push((section as u8, bytes.finish()));
        self
    }

    /// Returns the header's bytes without a signature.
    pub fn finish(self) -> Vec<u8> {
        self.encode(0).finish()
    }

    /// Returns the header's bytes, signed as the object of `identity` where this host signs.
    pub fn finish_signed(self, keyring: &Keyring, identity: &Identity) -> Vec<u8> {
        if !keyring.signs() {
            return self.finish();
        }
        let mut out = self.encode(SECTION_HEAD_LEN + SIGNATURE_LEN);
        let bytes = out.clone().finish();
        if let Some((signer, signature)) = keyring.sign(identity, &bytes) {
            out.u8(Section::Signature as u8).u32(SIGNATURE_LEN as u32).raw(&signer.0).raw(&signature);
        }
        out.finish()
    }

    fn encode(&self, reserved: usize) -> WireWriter {
        let length: usize = self.sections.iter().map(|(_, bytes)| SECTION_HEAD_LEN + bytes.len()).sum();
        let mut out = WireWriter::new();
        let required = self.sections.iter().fold(0, |required, (tag, _)| required | feature_of(*tag));
        out.raw(MAGIC).u8(self.kind as u8).u8(VERSION).u32(required).u32((length + reserved) as u32);
        for (tag, bytes) in &self.sections {
            out.u8(*tag).u32(bytes.len() as u32).raw(bytes);
        }
        out
    }
}

impl Header {
    /// Returns how long the header is that begins with `prefix` (at least [`PREFIX_LEN`] bytes).
    pub fn len_of(prefix: &[u8], object: &str) -> Result<usize, Error> {
        let mut reader = WireReader::new(prefix);
        let length = Self::read_prefix(&mut reader, None, object)?.1;
        Ok(PREFIX_LEN + length)
    }

    /// Parses the header at the front of `bytes`.
    ///
    /// # Errors
    /// `NewerFormat` for unknown versions, features or sections, `Damaged` for anything else that is not a
    /// header of `kind`.
    pub fn parse(bytes: &[u8], kind: ObjectKind, object: &str) -> Result<Self, Error> {
        let mut reader = WireReader::new(bytes);
        let (kind, length) = Self::read_prefix(&mut reader, Some(kind), object)?;
        let damaged = |error: WireError| Error::damaged(object, format!("its header {error}"));
        let mut sections = Vec::new();
        let mut rest = WireReader::new(reader.raw(length).map_err(damaged)?);
        while rest.left() > 0 {
            let tag = rest.u8().map_err(damaged)?;
            let len = rest.u32().map_err(damaged)? as usize;
            let bytes = rest.raw(len).map_err(damaged)?;
            if sections.last().is_some_and(|(last, _)| *last >= tag) {
                return Err(Error::damaged(object, "the sections of its header are out of order"));
            }
            if tag < 0x80 && !is_known(tag) {
                return Err(Error::NewerFormat { object: object.to_owned(), features: u32::from(tag) });
            }
            sections.push((tag, bytes.to_vec()));
        }
        Ok(Self { kind, len: PREFIX_LEN + length, sections })
    }

    /// Checks the signature of the header at the front of `bytes`, which `self` was parsed from.
    pub fn verify(
        &self,
        bytes: &[u8],
        keyring: &Keyring,
        identity: &Identity,
        object: &str,
    ) -> Result<Trust, Error> {
        let section = self.sections.iter().find(|(tag, _)| *tag == Section::Signature as u8);
        let Some((_, section)) = section else {
            return keyring.verify(identity, &bytes[..self.len], None, object);
        };
        let parse = |bytes: &[u8]| -> Result<(SignerId, [u8; 64]), WireError> {
            let mut reader = WireReader::new(bytes);
            let signature = (SignerId(reader.array()?), reader.array()?);
            reader.finish().map(|()| signature)
        };
        let signature =
            parse(section).map_err(|error| Error::damaged(object, format!("its signature {error}")))?;
        // Ignorable sections may follow in a later version; what is signed ends where the signature begins.
        let tail: usize = self
            .sections
            .iter()
            .filter(|(tag, _)| *tag >= Section::Signature as u8)
            .map(|(_, bytes)| SECTION_HEAD_LEN + bytes.len())
            .sum();
        keyring.verify(identity, &bytes[..self.len - tail], Some(&signature), object)
    }

    /// Returns whether a section is there.
    pub fn has(&self, section: Section) -> bool {
        self.sections.iter().any(|(tag, _)| *tag == section as u8)
    }

    /// Returns a reader over a section that this kind of object must have.
    pub fn section(&self, section: Section, object: &str) -> Result<WireReader<'_>, Error> {
        self.sections
            .iter()
            .find(|(tag, _)| *tag == section as u8)
            .map(|(_, bytes)| WireReader::new(bytes))
            .ok_or_else(|| Error::damaged(object, format!("its header has no {section:?} section")))
    }

    fn read_prefix(
        reader: &mut WireReader<'_>,
        expected: Option<ObjectKind>,
        object: &str,
    ) -> Result<(ObjectKind, usize), Error> {
        let damaged = |detail: &str| Error::damaged(object, detail);
        let mut fields = || -> Result<([u8; 6], u8, u8, u32, u32), WireError> {
            Ok((reader.array()?, reader.u8()?, reader.u8()?, reader.u32()?, reader.u32()?))
        };
        let (magic, kind, version, required, length) = fields().map_err(|_| damaged("it has no header"))?;
        if &magic != MAGIC {
            return Err(damaged("it does not begin as an object of walden"));
        }
        let features = required & !KNOWN_FEATURES;
        if version != VERSION || features != 0 {
            return Err(Error::NewerFormat { object: object.to_owned(), features });
        }
        let kind = kind_of(kind).ok_or_else(|| damaged("it is of an unknown kind"))?;
        if expected.is_some_and(|expected| expected != kind) {
            return Err(Error::damaged(object, format!("it is of another kind, {kind:?}")));
        }
        let length = length as usize;
        if length > SECTIONS_BYTES_MAX {
            return Err(Error::damaged(object, format!("its header claims {length} bytes")));
        }
        Ok((kind, length))
    }
}

fn is_known(tag: u8) -> bool {
    [
        Section::Key,
        Section::Salt,
        Section::Index,
        Section::Wal,
        Section::History,
        Section::Supersedes,
        Section::Parts,
        Section::Signature,
    ]
    .iter()
    .any(|section| *section as u8 == tag)
}

/// Returns the feature that a reader of a section must know.
fn feature_of(tag: u8) -> u32 {
    match tag {
        tag if tag == Section::Supersedes as u8 => FEATURE_SUPERSEDES,
        tag if tag == Section::Parts as u8 => FEATURE_PARTS,
        _ => 0,
    }
}

fn kind_of(kind: u8) -> Option<ObjectKind> {
    [ObjectKind::Manifest, ObjectKind::Refs, ObjectKind::Pack, ObjectKind::Wal, ObjectKind::History]
        .into_iter()
        .find(|known| *known as u8 == kind)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Vec<u8> {
        let mut salt = WireWriter::new();
        salt.raw(&[7; 32]);
        HeaderBuilder::new(ObjectKind::Pack).section(Section::Salt, salt).finish()
    }

    #[test]
    fn a_header_comes_back_with_its_sections() {
        let bytes = header();
        assert_eq!(Header::len_of(&bytes, "x").unwrap(), bytes.len());
        let parsed = Header::parse(&bytes, ObjectKind::Pack, "x").unwrap();
        assert_eq!(parsed.section(Section::Salt, "x").unwrap().array::<32>().unwrap(), [7; 32]);
        assert!(parsed.section(Section::Key, "x").is_err());
        assert!(Header::parse(&bytes, ObjectKind::Wal, "x").is_err());
    }

    #[test]
    fn an_unknown_feature_or_section_is_refused_and_an_ignorable_one_is_not() {
        let mut bytes = header();
        bytes[8] = 7;
        assert!(matches!(
            Header::parse(&bytes, ObjectKind::Pack, "x"),
            Err(Error::NewerFormat { features: 4, .. })
        ));
        let mut bytes = header();
        bytes[PREFIX_LEN] = 9;
        assert!(matches!(Header::parse(&bytes, ObjectKind::Pack, "x"), Err(Error::NewerFormat { .. })));
        bytes[PREFIX_LEN] = 0x80;
        Header::parse(&bytes, ObjectKind::Pack, "x").unwrap();
    }

    #[test]
    fn what_an_older_release_would_misread_asks_for_a_feature_it_does_not_know() {
        let required = |section| {
            let bytes = HeaderBuilder::new(ObjectKind::Wal).section(section, WireWriter::new()).finish();
            Header::parse(&bytes, ObjectKind::Wal, "x").unwrap();
            u32::from_le_bytes(bytes[8..12].try_into().unwrap())
        };
        assert_eq!(required(Section::Wal), 0);
        assert_eq!(required(Section::Supersedes), 1);
        assert_eq!(required(Section::Parts), 2);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, flip in 0usize..53) {
            let _ = Header::parse(&bytes, ObjectKind::Pack, "x");
            let mut bytes = header();
            let at = flip % bytes.len();
            bytes[at] ^= 0xff;
            let _ = Header::parse(&bytes, ObjectKind::Pack, "x");
        }
    }
}
