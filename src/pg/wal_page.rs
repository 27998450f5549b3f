//! The header of a WAL page, and what the first page of a segment tells about the whole file.
//!
//! The archiver is handed file names; only the header says whether the file is what its name claims. A recycled
//! segment carries the address of its former life (failure 5), a truncated one is too short (failure 11).
//! Layout by xlog_internal.h: magic 2, info 2, timeline 4, page address 8, rest of a record 4; on a segment's first
//! page then, 8-aligned, system identifier 8, segment size 4, page size 4.

use crate::pg::lsn::Lsn;
use crate::pg::system_identifier::SystemIdentifier;
use crate::pg::timeline::TimelineId;
use crate::pg::wal_segment::{WalSegmentName, WalSegmentSize};

/// The header of a segment's first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Which release wrote it.
    pub magic: u16,
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// The position of its first byte.
    pub address: Lsn,
    /// The cluster it belongs to.
    pub system_identifier: SystemIdentifier,
    /// The size of the cluster's segments.
    pub segment_size: WalSegmentSize,
}

/// Why bytes are not the segment that their name claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// There is no header.
    #[error("{name} does not begin with a WAL page header")]
    NoHeader { name: String },
    /// A release that is not supported wrote it.
    #[error("{name} has WAL page magic {magic:#06x}, which no supported release of PostgreSQL writes")]
    UnknownMagic { name: String, magic: u16 },
    /// The file holds another part of the WAL: it was recycled and not yet written.
    #[error("{name} holds WAL from {found}, not from {expected}")]
    OtherAddress { name: String, found: Lsn, expected: Lsn },
    /// Another cluster wrote it.
    #[error("{name} belongs to the cluster with system identifier {found}, not {expected}")]
    OtherCluster { name: String, found: SystemIdentifier, expected: SystemIdentifier },
    /// The file is shorter or longer than a segment.
    #[error("{name} has {found} bytes, and a WAL segment of this cluster has {expected}")]
    OtherLength { name: String, found: u64, expected: u64 },
    /// The last part of the name is higher than segments of this size count.
    #[error("{name} is not a name of a WAL segment of {size} bytes")]
    InvalidName { name: String, size: u32 },
}

/// Magic numbers of 13, 14, 15, 16, 17 and 18.
const MAGICS: [u16; 6] = [0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118];
const LONG_HEADER: u16 = 0x0002;
/// Bytes that [`SegmentHeader::parse`] needs.
pub const SEGMENT_HEADER_LEN: usize = 40;

impl SegmentHeader {
    /// Reads the header at the front of a segment's bytes.
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, SegmentError> {
        let no_header = || SegmentError::NoHeader { name: name.to_owned() };
        let bytes: &[u8; SEGMENT_HEADER_LEN] = bytes.first_chunk().ok_or_else(no_header)?;
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at =
            |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("fields end before 40"));
        let u64_at =
            |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("fields end before 40"));
        let magic = u16_at(0);
        if magic == 0 {
            return Err(no_header());
        }
        if !MAGICS.contains(&magic) {
            return Err(SegmentError::UnknownMagic { name: name.to_owned(), magic });
        }
        if u16_at(2) & LONG_HEADER == 0 {
            return Err(no_header());
        }
        Ok(Self {
            magic,
            timeline: TimelineId::new(u32_at(4)).ok_or_else(no_header)?,
            address: Lsn(u64_at(8)),
            system_identifier: SystemIdentifier(u64_at(24)),
            segment_size: WalSegmentSize::new(u32_at(32)).map_err(|_| no_header())?,
        })
    }

    /// Checks that a file of `length` bytes with this header is the segment `segment`.
    ///
    /// A timeline in the header that is not the name's is accepted: after a switch the first segment of the new
    /// timeline begins with a copy of the old one's.
    pub fn check(&self, segment: WalSegmentName, length: u64) -> Result<(), SegmentError> {
        let name = || segment.to_string();
        let expected = u64::from(self.segment_size.bytes());
        if length != expected {
            return Err(SegmentError::OtherLength { name: name(), found: length, expected });
        }
        let size = self.segment_size;
        let expected = segment
            .start_lsn(size)
            .map_err(|_| SegmentError::InvalidName { name: name(), size: size.bytes() })?;
        if self.address != expected {
            return Err(SegmentError::OtherAddress { name: name(), found: self.address, expected });
        }
        Ok(())
    }

    /// Checks that the cluster with this identifier wrote the segment.
    pub fn check_cluster(
        &self,
        segment: WalSegmentName,
        expected: SystemIdentifier,
    ) -> Result<(), SegmentError> {
        if self.system_identifier != expected {
            let (name, found) = (segment.to_string(), self.system_identifier);
            return Err(SegmentError::OtherCluster { name, found, expected });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(address: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&0xD110u16.to_le_bytes());
        bytes.extend_from_slice(&LONG_HEADER.to_le_bytes());
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&77u64.to_le_bytes());
        bytes.extend_from_slice(&(16u32 << 20).to_le_bytes());
        bytes.extend_from_slice(&8192u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_segment_is_what_its_header_says() {
        let segment: WalSegmentName = "000000010000000000000002".parse().unwrap();
        let parsed = SegmentHeader::parse(&header(2 << 24), "x").unwrap();
        parsed.check(segment, 16 << 20).unwrap();
        parsed.check_cluster(segment, SystemIdentifier(77)).unwrap();
        assert!(matches!(
            parsed.check_cluster(segment, SystemIdentifier(78)),
            Err(SegmentError::OtherCluster { .. })
        ));
        // A new timeline's first segment begins with a copy of the old one's.
        let copied: WalSegmentName = "000000020000000000000002".parse().unwrap();
        parsed.check(copied, 16 << 20).unwrap();
    }

    /// Failure 5: a recycled segment with a future name was archived. Failure 11: so was a truncated one.
    #[test]
    fn a_recycled_or_truncated_segment_is_not_what_its_name_claims() {
        let segment: WalSegmentName = "000000010000000000000009".parse().unwrap();
        let recycled = SegmentHeader::parse(&header(2 << 24), "x").unwrap();
        assert!(matches!(recycled.check(segment, 16 << 20), Err(SegmentError::OtherAddress { .. })));
        let truncated = SegmentHeader::parse(&header(9 << 24), "x").unwrap();
        assert!(matches!(truncated.check(segment, 1 << 20), Err(SegmentError::OtherLength { .. })));
        assert!(matches!(SegmentHeader::parse(&[0; 64], "x"), Err(SegmentError::NoHeader { .. })));
        assert!(matches!(SegmentHeader::parse(&header(0)[..30], "x"), Err(SegmentError::NoHeader { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = SegmentHeader::parse(&bytes, "x");
        }
    }
}
