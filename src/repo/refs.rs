//! `refs`: every pack that a basebackup names, its own and those of earlier ones.
//!
//! Plain, so that a host without the private key can sweep and scrub; pinned by its digest in `backup.json`.
//!
//! ```text
//! header   sections: none
//! count    4
//! records  90 each, ascending by origin and number:
//!          origin seconds 8, origin digits 2, number 4, size 4, live bytes 4, key 4, salt 32, digest 32
//! ```

use crate::codec::Digest;
use crate::repo::chunk::PACK_BYTES_MAX;
use crate::repo::error::Error;
use crate::repo::header::{Header, HeaderBuilder};
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::identity::ObjectKind;
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// 2^20 packs of 32 MiB are 32 TiB stored.
pub const REFS_BYTES_MAX: u64 = (RECORD_LEN as u64) << 20;
const RECORD_LEN: usize = 90;

/// What a basebackup says of one pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRecord {
    /// Which pack.
    pub id: PackId,
    /// Its size in the store.
    pub size: u32,
    /// Stored bytes of it that this basebackup names.
    pub live: u32,
    /// Which of the basebackup's keys opens it.
    pub key: u32,
    /// What its key is derived with.
    pub salt: [u8; 32],
    /// BLAKE3 of the whole pack.
    pub digest: Digest,
}

/// The packs of a basebackup, ascending by id.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refs {
    records: Vec<PackRecord>,
}

impl Refs {
    /// Creates the list from records in any order.
    pub fn new(mut records: Vec<PackRecord>) -> Self {
        records.sort_by_key(|record| record.id);
        Self { records }
    }

    /// Returns the records, ascending by id.
    pub fn records(&self) -> &[PackRecord] {
        &self.records
    }

    /// Returns what is said of `pack`.
    pub fn find(&self, pack: PackId) -> Option<&PackRecord> {
        let at = self.records.binary_search_by_key(&pack, |record| record.id).ok()?;
        Some(&self.records[at])
    }

    /// Returns the object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = WireWriter::new();
        out.raw(&HeaderBuilder::new(ObjectKind::Refs).finish()).u32(self.records.len() as u32);
        for record in &self.records {
            let (seconds, random) = record.id.origin.parts();
            out.u64(seconds)
                .u16(random)
                .u32(record.id.number)
                .u32(record.size)
                .u32(record.live)
                .u32(record.key);
            out.raw(&record.salt).raw(record.digest.as_bytes());
        }
        out.finish()
    }

    /// Parses the object, whose digest the caller has checked.
    pub fn decode(bytes: &[u8], object: &str) -> Result<Self, Error> {
        let header = Header::parse(bytes, ObjectKind::Refs, object)?;
        Self::decode_records(&bytes[header.len..]).map_err(|error| Error::damaged(object, error))
    }

    fn decode_records(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = WireReader::new(bytes);
        let count = reader.u32()? as usize;
        if count.checked_mul(RECORD_LEN) != Some(reader.left()) {
            return Err(WireError::Invalid { field: "record count" });
        }
        // All of them are there: the count is that of the bytes.
        let mut records: Vec<PackRecord> = Vec::with_capacity(count);
        for _ in 0..count {
            let origin = BasebackupId::from_parts(reader.u64()?, reader.u16()?)
                .map_err(|_| WireError::Invalid { field: "basebackup id" })?;
            let record = PackRecord {
                id: PackId { origin, number: reader.u32()? },
                size: reader.u32()?,
                live: reader.u32()?,
                key: reader.u32()?,
                salt: reader.array()?,
                digest: Digest(reader.array()?),
            };
            if record.size > PACK_BYTES_MAX || records.last().is_some_and(|last| last.id >= record.id) {
                return Err(WireError::Invalid { field: "record" });
            }
            records.push(record);
        }
        reader.finish().map(|()| Self { records })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seconds: u64, number: u32) -> PackRecord {
        PackRecord {
            id: PackId { origin: BasebackupId::from_parts(seconds, 1).unwrap(), number },
            size: 1000,
            live: 900,
            key: 0,
            salt: [number as u8; 32],
            digest: Digest::of(b"pack"),
        }
    }

    #[test]
    fn records_come_back_sorted_and_are_found() {
        let refs = Refs::new(vec![record(2, 0), record(1, 1), record(1, 0)]);
        let decoded = Refs::decode(&refs.encode(), "refs").unwrap();
        assert_eq!(decoded, refs);
        assert_eq!(decoded.find(record(1, 1).id), Some(&record(1, 1)));
        assert_eq!(decoded.find(record(3, 1).id), None);
    }

    #[test]
    fn a_count_that_is_not_the_length_is_refused() {
        let mut bytes = Refs::new(vec![record(1, 0)]).encode();
        bytes.push(0);
        assert!(Refs::decode(&bytes, "refs").is_err());
        bytes.truncate(40);
        assert!(Refs::decode(&bytes, "refs").is_err());
    }
}
