//! One WAL record: its header, the pages it touches, and its main data.
//!
//! header (24 bytes) → a header for each page, a last one for the main data → images and data of the pages → main data
//! (`xlogrecord.h`). Page images are passed over: what matters here is which pages a replay will touch and whether it
//! must read them first. Flags of images moved in 15, so a record is read by the version of its page.
//!
//! Deliberately absent: putting records together from pages (`wal_record_stream`) and what they mean
//! (`wal_payload`).

use super::field_reader::FieldReader;
use super::lsn::Lsn;
use super::oid::Oid;
use super::relation_file::Fork;
use super::resource_manager::ResourceManager;
use super::timeline::TimelineId;
use super::transaction::TransactionId;
use super::version::MajorVersion;

/// A record whose checksum was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalRecord {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next one may begin.
    pub end: Lsn,
    /// The timeline of the page it begins on.
    pub timeline: TimelineId,
    pub version: MajorVersion,
    pub header: WalRecordHeader,
    /// The pages it touches, in the order of their numbers.
    pub blocks: Vec<BlockReference>,
    /// What the resource manager keeps beside pages; of a record that is too long to be kept whole only the beginning,
    /// see `main_data_is_whole`.
    pub main_data: Vec<u8>,
    pub main_data_is_whole: bool,
}

/// What every record begins with (`XLogRecord`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRecordHeader {
    /// Bytes of the whole record, this header too, page headers between its parts not.
    pub length: u32,
    /// The transaction that wrote it, 0 for none.
    pub transaction: TransactionId,
    /// Where the record before it begins.
    pub previous: Lsn,
    /// Which of the resource manager's records it is, in the high four bits.
    pub info: u8,
    pub resource_manager: ResourceManager,
    pub(super) crc: u32,
}

/// A relation by where its files are (`RelFileLocator`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationLocator {
    pub tablespace: Oid,
    /// `Oid::INVALID` for shared relations.
    pub database: Oid,
    pub relfilenode: Oid,
}

/// A page that a record touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockReference {
    /// Its number within the record, with gaps.
    pub id: u8,
    pub relation: RelationLocator,
    pub fork: Fork,
    /// The page, counted through the segments of the fork.
    pub block: u32,
    pub image: Option<PageImage>,
    /// Replay makes the page anew without reading it.
    pub will_init: bool,
}

/// The image of a page inside a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageImage {
    /// Whether replay puts it in place; otherwise it is there for `wal_consistency_checking` alone.
    pub apply: bool,
    pub compressed: bool,
    /// Bytes of it in the record.
    pub length: u16,
}

/// Why a record with a right checksum cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the WAL record at {lsn} has an invalid {what}")]
pub struct WalRecordError {
    pub lsn: Lsn,
    pub what: &'static str,
}

/// Bytes of a record's header.
pub(super) const RECORD_HEADER_LEN: usize = 24;
/// The part of the header that the checksum covers, after everything else.
pub(super) const CHECKED_HEADER_LEN: usize = 20;

const BLOCK_ID_MAX: u8 = 32;
const BLOCK_ID_DATA_SHORT: u8 = 255;
const BLOCK_ID_DATA_LONG: u8 = 254;
const BLOCK_ID_ORIGIN: u8 = 253;
const BLOCK_ID_TOP_LEVEL_TRANSACTION: u8 = 252;

const FORK_MASK: u8 = 0x0F;
const BLOCK_HAS_IMAGE: u8 = 0x10;
const BLOCK_HAS_DATA: u8 = 0x20;
const BLOCK_WILL_INIT: u8 = 0x40;
const BLOCK_SAME_RELATION: u8 = 0x80;

const IMAGE_HAS_HOLE: u8 = 0x01;

impl WalRecordHeader {
    /// Reads a header, none if a server of that version has no such resource manager.
    pub(super) fn parse(bytes: &[u8; RECORD_HEADER_LEN], version: MajorVersion) -> Option<Self> {
        let mut fields = FieldReader::new(bytes);
        let (length, transaction) = (fields.u32()?, TransactionId(fields.u32()?));
        let previous = Lsn(fields.u64()?);
        let (info, manager) = (fields.u8()?, fields.u8()?);
        fields.skip(2)?;
        let crc = fields.u32()?;
        let resource_manager = ResourceManager::from_number(manager, version)?;
        Some(Self { length, transaction, previous, info, resource_manager, crc })
    }
}

/// The parts of a record after its header.
pub(super) struct RecordBody {
    pub(super) blocks: Vec<BlockReference>,
    pub(super) main_data: Vec<u8>,
    pub(super) main_data_is_whole: bool,
}

impl RecordBody {
    /// Takes apart the bytes that follow the header. `kept` may lack the end of the `length` bytes there were.
    pub(super) fn parse(kept: &[u8], length: usize, version: MajorVersion) -> Result<Self, &'static str> {
        let mut fields = FieldReader::new(kept);
        let mut blocks: Vec<BlockReference> = Vec::new();
        // Bytes of images and data that the headers so far announced.
        let mut announced = 0usize;
        let mut main_length = 0usize;
        while length - (kept.len() - fields.left()) > announced {
            match fields.u8().ok_or("header")? {
                id @ 0..=BLOCK_ID_MAX => {
                    if blocks.last().is_some_and(|last| last.id >= id) {
                        return Err("order of pages");
                    }
                    let same = blocks.last().map(|last| last.relation);
                    let (block, bytes) = parse_block(id, same, version, &mut fields)?;
                    announced += bytes;
                    blocks.push(block);
                }
                BLOCK_ID_ORIGIN => fields.skip(2).ok_or("replication origin")?,
                BLOCK_ID_TOP_LEVEL_TRANSACTION => fields.skip(4).ok_or("transaction")?,
                // The header of the main data is the last.
                BLOCK_ID_DATA_SHORT => {
                    main_length = usize::from(fields.u8().ok_or("length")?);
                    break;
                }
                BLOCK_ID_DATA_LONG => {
                    main_length = fields.u32().ok_or("length")? as usize;
                    break;
                }
                _ => return Err("page number"),
            }
        }
        let after_headers = length - (kept.len() - fields.left());
        if announced.checked_add(main_length) != Some(after_headers) {
            return Err("length");
        }
        let main_data = fields.rest().get(announced..).unwrap_or_default().to_vec();
        let main_data_is_whole = main_data.len() == main_length;
        Ok(Self { blocks, main_data, main_data_is_whole })
    }
}

/// Reads the header of a page, and returns also how many bytes of image and data it announces.
fn parse_block(
    id: u8,
    same: Option<RelationLocator>,
    version: MajorVersion,
    fields: &mut FieldReader<'_>,
) -> Result<(BlockReference, usize), &'static str> {
    let flags = fields.u8().ok_or("page header")?;
    let fork = Fork::from_number(flags & FORK_MASK).ok_or("fork")?;
    let data_length = fields.u16().ok_or("page header")?;
    if (flags & BLOCK_HAS_DATA != 0) != (data_length > 0) {
        return Err("length of a page's data");
    }
    let image = if flags & BLOCK_HAS_IMAGE == 0 { None } else { Some(parse_image(version, fields)?) };
    let relation = if flags & BLOCK_SAME_RELATION == 0 {
        RelationLocator::read(fields).ok_or("relation")?
    } else {
        same.ok_or("relation")?
    };
    let block = fields.u32().ok_or("page header")?;
    let will_init = flags & BLOCK_WILL_INIT != 0;
    let bytes = usize::from(data_length) + image.map_or(0, |image| usize::from(image.length));
    Ok((BlockReference { id, relation, fork, block, image, will_init }, bytes))
}

fn parse_image(version: MajorVersion, fields: &mut FieldReader<'_>) -> Result<PageImage, &'static str> {
    let (length, _hole_offset) = (fields.u16().ok_or("page image")?, fields.u16().ok_or("page image")?);
    let flags = fields.u8().ok_or("page image")?;
    let (apply, compressed) = if version < MajorVersion::V15 { (0x04, 0x02) } else { (0x02, 0x1C) };
    let (apply, compressed) = (flags & apply != 0, flags & compressed != 0);
    // Without compression the length of the hole is what the image lacks of a page.
    if compressed && flags & IMAGE_HAS_HOLE != 0 {
        fields.skip(2).ok_or("page image")?;
    }
    Ok(PageImage { apply, compressed, length })
}

impl RelationLocator {
    pub(super) fn read(fields: &mut FieldReader<'_>) -> Option<Self> {
        Some(Self {
            tablespace: Oid(fields.u32()?),
            database: Oid(fields.u32()?),
            relfilenode: Oid(fields.u32()?),
        })
    }
}

impl BlockReference {
    /// Tells whether replay reads the page as it is, and so would fetch it.
    pub fn is_read(&self) -> bool {
        !self.will_init && !self.image.is_some_and(|image| image.apply)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wal_samples::{SEGMENT_BYTES, STARTS, read};
    use super::*;

    const RELATION: RelationLocator =
        RelationLocator { tablespace: Oid(1663), database: Oid(5), relfilenode: Oid(16384) };

    fn parse(version: MajorVersion, parts: &[&[u8]]) -> Result<RecordBody, &'static str> {
        let bytes = parts.concat();
        RecordBody::parse(&bytes, bytes.len(), version)
    }

    fn locator() -> Vec<u8> {
        [1663u32, 5, 16384].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The servers compressed their images; 13 and 14 say so with the bit that later means *apply*.
    #[test]
    fn images_of_every_version_are_applied_and_most_compressed() {
        for start in STARTS {
            let (records, _) = read(start.lsn, start.bytes, SEGMENT_BYTES);
            let blocks = records.iter().flat_map(|record| &record.blocks);
            let images: Vec<_> = blocks.filter(|block| block.image.is_some()).collect();
            assert!(images.len() > 5, "{}", start.version);
            // Where compression gains nothing the server leaves it.
            let compressed = images.iter().filter(|block| block.image.is_some_and(|image| image.compressed));
            assert!(compressed.count() > images.len() / 2, "{}: {images:?}", start.version);
            assert!(
                images.iter().all(|block| block.image.is_some_and(|image| image.apply) && !block.is_read())
            );
        }
    }

    #[test]
    fn flags_of_images_moved_in_15() {
        let flags = |version, flags: u8| {
            let image =
                [&[0, BLOCK_HAS_IMAGE, 0, 0, 3, 0, 0, 0, flags][..], &locator(), &[7, 0, 0, 0], b"img"];
            let body = parse(version, &image).unwrap();
            body.blocks[0].image.map(|image| (image.apply, image.compressed)).unwrap()
        };
        assert_eq!(flags(MajorVersion::V14, 0x04), (true, false));
        assert_eq!(flags(MajorVersion::V14, 0x02), (false, true));
        assert_eq!(flags(MajorVersion::V15, 0x02), (true, false));
        for method in [0x04, 0x08, 0x10] {
            assert_eq!(flags(MajorVersion::V15, method), (false, true));
        }
    }

    #[test]
    fn a_page_may_be_of_the_same_relation_and_may_be_made_anew() {
        let body = parse(
            MajorVersion::V15,
            &[
                &[0, BLOCK_WILL_INIT | BLOCK_HAS_DATA, 2, 0],
                &locator(),
                &[9, 0, 0, 0],
                &[3, BLOCK_SAME_RELATION | 2, 0, 0, 4, 0, 0, 0],
                &[BLOCK_ID_ORIGIN, 1, 0, BLOCK_ID_TOP_LEVEL_TRANSACTION, 1, 0, 0, 0],
                &[BLOCK_ID_DATA_SHORT, 4],
                b"ab",
                b"main",
            ],
        )
        .unwrap();
        let [first, second] = body.blocks.as_slice() else { panic!("{:?}", body.blocks) };
        assert_eq!((first.id, first.relation, first.fork, first.block), (0, RELATION, Fork::Main, 9));
        assert!(first.will_init && !first.is_read());
        assert_eq!((second.id, second.relation, second.fork), (3, RELATION, Fork::VisibilityMap));
        assert!(second.is_read() && second.image.is_none());
        assert_eq!((body.main_data.as_slice(), body.main_data_is_whole), (&b"main"[..], true));
    }

    #[test]
    fn headers_that_contradict_themselves_are_refused() {
        let refused = |parts: &[&[u8]]| parse(MajorVersion::V15, parts).err();
        assert_eq!(refused(&[&[0, BLOCK_SAME_RELATION, 0, 0, 4, 0, 0, 0]]), Some("relation"));
        assert_eq!(refused(&[&[0, 5, 0, 0]]), Some("fork"));
        assert_eq!(refused(&[&[0, BLOCK_HAS_DATA, 0, 0]]), Some("length of a page's data"));
        assert_eq!(refused(&[&[0, 0, 1, 0]]), Some("length of a page's data"));
        assert_eq!(refused(&[&[33, 0, 0, 0]]), Some("page number"));
        assert_eq!(refused(&[&[BLOCK_ID_DATA_SHORT, 4], b"mai"]), Some("length"));
        assert_eq!(refused(&[&[BLOCK_ID_DATA_LONG, 255, 255, 255, 255], b"main"]), Some("length"));
        let page: &[&[u8]] = &[&[1, 0, 0, 0], &locator(), &[9, 0, 0, 0]];
        assert_eq!(refused(&[page, page].concat()), Some("order of pages"));
        assert!(parse(MajorVersion::V15, &[]).unwrap().blocks.is_empty());
    }
}
