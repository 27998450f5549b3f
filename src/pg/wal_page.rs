//! The header of a WAL page, and what the first page of a segment tells about the whole file.
//!
//! The archiver is handed file names; only the header says whether the file is what its name claims. A recycled
//! segment carries the address of its former life (failure 5), a truncated one is too short (failure 11).
//! Layout by `xlog_internal.h`: magic 2, flags 2, timeline 4, page address 8, rest of a record 4, padding 4; on a
//! segment's first page then system identifier 8, segment size 4, page size 4.

use super::field_reader::FieldReader;
use super::lsn::Lsn;
use super::system_identifier::SystemIdentifier;
use super::timeline::TimelineId;
use super::version::MajorVersion;
use super::wal_segment::{WalSegmentName, WalSegmentSize};

/// The header of any WAL page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPageHeader {
    /// Which release wrote it, by the magic number.
    pub version: MajorVersion,
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// The position of its first byte.
    pub address: Lsn,
    /// How many bytes of a record that began earlier are still to come, those on later pages too; none if the page
    /// begins with a record of its own.
    pub continuation: Option<u32>,
    /// The record that would continue here was never completed: a new one stands in its place (14 and later, and
    /// late releases of 13).
    pub overwrites_continuation: bool,
    /// What only the first page of a segment says.
    pub long: Option<WalLongHeader>,
}

/// What only the first page of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalLongHeader {
    pub system_identifier: SystemIdentifier,
    pub segment_size: WalSegmentSize,
    /// Bytes of a WAL page.
    pub page_bytes: u32,
}

/// Why bytes are not the header of a WAL page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalPageError {
    #[error("there is no WAL page header")]
    NoHeader,
    #[error("the WAL page magic {magic:#06x} is of no supported release of PostgreSQL")]
    UnknownMagic { magic: u16 },
    #[error("the WAL page header has unknown flags {flags:#06x}")]
    UnknownFlags { flags: u16 },
    #[error("the WAL page header has an invalid {what}")]
    Field { what: &'static str },
}

/// The header of a segment's first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Which release wrote it.
    pub version: MajorVersion,
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// The position of its first byte.
    pub address: Lsn,
    /// The cluster it belongs to.
    pub system_identifier: SystemIdentifier,
    /// The size of the cluster's segments.
    pub segment_size: WalSegmentSize,
    /// Bytes of a WAL page.
    pub page_bytes: u32,
}

/// Why bytes are not the segment that their name claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("{name} does not begin with the header of a WAL segment")]
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
    #[error("{name} is of a cluster with segments of {found} bytes, not {expected}")]
    OtherSegmentSize { name: String, found: u32, expected: u32 },
    /// The file is shorter or longer than a segment.
    #[error("{name} has {found} bytes, and a WAL segment of this cluster has {expected}")]
    OtherLength { name: String, found: u64, expected: u64 },
    /// The last part of the name is higher than segments of this size count.
    #[error("{name} is not a name of a WAL segment of {size} bytes")]
    InvalidName { name: String, size: u32 },
}

const CONTINUATION: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
const REMOVABLE: u16 = 0x0004;
const OVERWRITES_CONTINUATION: u16 = 0x0008;
/// Bytes of the header of a page inside a segment.
const SHORT_HEADER_LEN: usize = 24;
/// Bytes that [`SegmentHeader::parse`] needs.
pub const SEGMENT_HEADER_LEN: usize = 40;

impl WalPageHeader {
    /// Reads the header at the front of a page's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, WalPageError> {
        let mut fields = FieldReader::new(bytes);
        let magic = fields.u16().filter(|magic| *magic != 0).ok_or(WalPageError::NoHeader)?;
        let version = MajorVersion::from_wal_page_magic(magic).ok_or(WalPageError::UnknownMagic { magic })?;
        let flags = fields.u16().ok_or(WalPageError::NoHeader)?;
        if flags & !(CONTINUATION | LONG_HEADER | REMOVABLE | OVERWRITES_CONTINUATION) != 0 {
            return Err(WalPageError::UnknownFlags { flags });
        }
        let timeline = fields.u32().ok_or(WalPageError::NoHeader)?;
        let address = Lsn(fields.u64().ok_or(WalPageError::NoHeader)?);
        let continuation = fields.u32().ok_or(WalPageError::NoHeader)?;
        fields.skip(4).ok_or(WalPageError::NoHeader)?;
        let long = (flags & LONG_HEADER != 0).then(|| WalLongHeader::read(&mut fields)).transpose()?;
        Ok(Self {
            version,
            timeline: TimelineId::new(timeline).ok_or(WalPageError::Field { what: "timeline" })?,
            address,
            continuation: (flags & CONTINUATION != 0).then_some(continuation),
            overwrites_continuation: flags & OVERWRITES_CONTINUATION != 0,
            long,
        })
    }

    /// Returns the bytes of the header itself.
    pub fn header_len(&self) -> usize {
        if self.long.is_some() { SEGMENT_HEADER_LEN } else { SHORT_HEADER_LEN }
    }
}

impl WalLongHeader {
    fn read(fields: &mut FieldReader<'_>) -> Result<Self, WalPageError> {
        let system_identifier = SystemIdentifier(fields.u64().ok_or(WalPageError::NoHeader)?);
        let segment_size = fields.u32().ok_or(WalPageError::NoHeader)?;
        let segment_size =
            WalSegmentSize::new(segment_size).map_err(|_| WalPageError::Field { what: "segment size" })?;
        let page_bytes = fields.u32().ok_or(WalPageError::NoHeader)?;
        let valid = page_bytes.is_power_of_two() && (1 << 10..=1 << 16).contains(&page_bytes);
        if !valid {
            return Err(WalPageError::Field { what: "page size" });
        }
        Ok(Self { system_identifier, segment_size, page_bytes })
    }
}

impl SegmentHeader {
    /// Reads the header at the front of a segment's bytes.
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, SegmentError> {
        let no_header = || SegmentError::NoHeader { name: name.to_owned() };
        let page = WalPageHeader::parse(bytes).map_err(|error| match error {
            WalPageError::UnknownMagic { magic } => {
                SegmentError::UnknownMagic { name: name.to_owned(), magic }
            }
            _ => no_header(),
        })?;
        let long = page.long.ok_or_else(no_header)?;
        Ok(Self {
            version: page.version,
            timeline: page.timeline,
            address: page.address,
            system_identifier: long.system_identifier,
            segment_size: long.segment_size,
            page_bytes: long.page_bytes,
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

/// Checks all a header can tell: that a file of `length` bytes beginning with `bytes` is the segment `name` of the
/// cluster expected.
pub fn check_segment_header(
    bytes: &[u8],
    length: u64,
    name: WalSegmentName,
    expected: (SystemIdentifier, WalSegmentSize),
) -> Result<SegmentHeader, SegmentError> {
    let header = SegmentHeader::parse(bytes, &name.to_string())?;
    header.check_cluster(name, expected.0)?;
    let (found, expected) = (header.segment_size.bytes(), expected.1.bytes());
    if found != expected {
        return Err(SegmentError::OtherSegmentSize { name: name.to_string(), found, expected });
    }
    header.check(name, length)?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u32 = 16 << 20;
    const CLUSTER: SystemIdentifier = SystemIdentifier(77);

    fn header(address: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&0xD110u16.to_le_bytes());
        bytes.extend_from_slice(&LONG_HEADER.to_le_bytes());
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&CLUSTER.0.to_le_bytes());
        bytes.extend_from_slice(&SIZE.to_le_bytes());
        bytes.extend_from_slice(&8192u32.to_le_bytes());
        bytes
    }

    fn check(bytes: &[u8], length: u64, name: &str) -> Result<SegmentHeader, SegmentError> {
        let size = WalSegmentSize::new(SIZE).unwrap();
        check_segment_header(bytes, length, name.parse().unwrap(), (CLUSTER, size))
    }

    #[test]
    fn segments_of_real_servers_are_what_they_are() {
        let samples: [(MajorVersion, &[u8], &str); 6] = [
            (MajorVersion::V13, include_bytes!("../../tests/data/wal/13-start"), "00000001000000000000000A"),
            (MajorVersion::V14, include_bytes!("../../tests/data/wal/14-start"), "00000001000000000000000B"),
            (MajorVersion::V15, include_bytes!("../../tests/data/wal/15-start"), "000000010000000000000009"),
            (MajorVersion::V16, include_bytes!("../../tests/data/wal/16-start"), "000000010000000000000009"),
            (MajorVersion::V17, include_bytes!("../../tests/data/wal/17-start"), "000000010000000000000009"),
            (MajorVersion::V18, include_bytes!("../../tests/data/wal/18-start"), "000000010000000000000009"),
        ];
        for (version, bytes, name) in samples {
            let header = SegmentHeader::parse(bytes, name).unwrap();
            assert_eq!((header.version, header.timeline), (version, TimelineId::FIRST));
            assert_eq!((header.segment_size.bytes(), header.page_bytes), (1 << 20, 8192));
            header.check(name.parse().unwrap(), 1 << 20).unwrap();
            let second = WalPageHeader::parse(&bytes[8192..]).unwrap();
            assert_eq!(second.address, header.address + 8192);
            assert_eq!((second.version, second.long, second.header_len()), (version, None, 24));
        }
    }

    #[test]
    fn a_segment_is_what_its_header_says() {
        let parsed = check(&header(2 << 24), SIZE.into(), "000000010000000000000002").unwrap();
        assert_eq!((parsed.version, parsed.address), (MajorVersion::V15, Lsn(2 << 24)));
        // A new timeline's first segment begins with a copy of the old one's.
        check(&header(2 << 24), SIZE.into(), "000000020000000000000002").unwrap();
    }

    /// Failure 5: a recycled segment with a future name was archived. Failure 11: so was a truncated one.
    #[test]
    fn a_file_that_is_not_what_its_name_claims_is_refused() {
        let name = "000000010000000000000009";
        let error = |bytes: &[u8], length| check(bytes, length, name).unwrap_err();
        let good = header(9 << 24);
        assert!(matches!(error(&header(2 << 24), SIZE.into()), SegmentError::OtherAddress { .. }));
        assert!(matches!(error(&good, 1 << 20), SegmentError::OtherLength { .. }));
        assert!(matches!(error(&[0; 64], SIZE.into()), SegmentError::NoHeader { .. }));
        assert!(matches!(error(&good[..30], SIZE.into()), SegmentError::NoHeader { .. }));
        let altered = |at: usize, bytes: &[u8]| {
            let mut header = good.clone();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            error(&header, SIZE.into())
        };
        assert!(matches!(altered(0, &[0x01, 0xD1]), SegmentError::UnknownMagic { magic: 0xD101, .. }));
        assert!(matches!(altered(2, &[0]), SegmentError::NoHeader { .. }));
        assert!(matches!(altered(3, &[1]), SegmentError::NoHeader { .. }));
        assert!(matches!(altered(4, &[0]), SegmentError::NoHeader { .. }));
        assert!(matches!(altered(24, &[78]), SegmentError::OtherCluster { .. }));
        assert!(matches!(altered(32, &(32u32 << 20).to_le_bytes()), SegmentError::OtherSegmentSize { .. }));
        assert!(matches!(altered(32, &[1]), SegmentError::NoHeader { .. }));
        assert!(matches!(
            check(&good, SIZE.into(), "000000010000000000000100").unwrap_err(),
            SegmentError::InvalidName { .. }
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = SegmentHeader::parse(&bytes, "x");
            if bytes.len() > 3 {
                bytes[..4].copy_from_slice(&[0x10, 0xD1, 0x02, 0x00]);
                let _ = SegmentHeader::parse(&bytes, "x");
            }
        }
    }
}
