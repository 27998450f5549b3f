//! `pg_filenode.map`: the file numbers of the catalogs that cannot be looked up in a catalog.
//!
//! Magic, count, a fixed number of pairs (62 up to PostgreSQL 15, 64 from 16 on), CRC-32C (`relmapper.c`). A server
//! up to 15 overwrites the file in place, so whoever reads it while the server runs reads it again on a wrong CRC.

use super::crc32c::Crc32c;
use super::oid::Oid;

/// The map of one database, or of the shared catalogs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationMap {
    /// Each mapped catalog's OID and its file number.
    pub mappings: Vec<(Oid, Oid)>,
}

/// Why bytes are not such a map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RelationMapError {
    #[error("it has {0} bytes")]
    Size(usize),
    #[error("its magic number is {0:#x}")]
    Magic(u32),
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it claims {0} mappings")]
    Count(u32),
}

/// `RELMAPPER_FILEMAGIC`
const MAGIC: u32 = 0x0059_2717;
const HEADER_LEN: usize = 8;
const MAPPING_LEN: usize = 8;
/// Length of the file and how many mappings it has room for.
const FORMS: [(usize, usize); 2] = [(512, 62), (524, 64)];

impl RelationMap {
    /// Reads a map.
    pub fn parse(bytes: &[u8]) -> Result<Self, RelationMapError> {
        let form = FORMS.iter().find(|(len, _)| *len == bytes.len());
        let (_, room) = form.ok_or(RelationMapError::Size(bytes.len()))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != MAGIC {
            return Err(RelationMapError::Magic(word(0)));
        }
        let crc_at = HEADER_LEN + room * MAPPING_LEN;
        if Crc32c::of(&bytes[..crc_at]) != Crc32c(word(crc_at)) {
            return Err(RelationMapError::Checksum);
        }
        let count = word(4);
        if count as usize > *room {
            return Err(RelationMapError::Count(count));
        }
        let at = |n: usize| HEADER_LEN + n * MAPPING_LEN;
        let mappings = (0..count as usize).map(|n| (Oid(word(at(n))), Oid(word(at(n) + 4)))).collect();
        Ok(Self { mappings })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file((len, room): (usize, usize), pairs: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(pairs.len() as u32).to_le_bytes());
        for (n, (oid, number)) in pairs.iter().enumerate() {
            bytes[8 + n * 8..12 + n * 8].copy_from_slice(&oid.to_le_bytes());
            bytes[12 + n * 8..16 + n * 8].copy_from_slice(&number.to_le_bytes());
        }
        let crc_at = 8 + room * 8;
        let crc = Crc32c::of(&bytes[..crc_at]).0;
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn both_forms_are_read_and_half_written_ones_refused() {
        for form in FORMS {
            let mut bytes = file(form, &[(1259, 1259), (1249, 16_500)]);
            let map = RelationMap::parse(&bytes).unwrap();
            assert_eq!(map.mappings, [(Oid(1259), Oid(1259)), (Oid(1249), Oid(16_500))]);
            bytes[20] ^= 1;
            assert_eq!(RelationMap::parse(&bytes), Err(RelationMapError::Checksum));
        }
        assert_eq!(RelationMap::parse(&[0; 512]), Err(RelationMapError::Magic(0)));
        assert_eq!(RelationMap::parse(&[]), Err(RelationMapError::Size(0)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 524), long: bool) {
            bytes.truncate(if long { 524 } else { 512 });
            let _ = RelationMap::parse(&bytes);
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            let crc_at = bytes.len() / 524 * 16 + 504;
            let crc = Crc32c::of(&bytes[..crc_at]).0;
            bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
            let _ = RelationMap::parse(&bytes);
        }
    }
}
