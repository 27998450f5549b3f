//! What the server's WAL summaries say of each block: changed since the last basebackup began, or not.
//!
//! Follows `GetFileBackupMethod` of the server's `basebackup_incremental.c`, and says less where that trusts more than
//! it may: a visibility map is never narrowed, because clearing a bit is replayed from the heap's record and no
//! summary names the map's page (seen on 18; `docs/decisions/2102-wal-summaries.md`). A free space map is not logged at
//! all. Pure, and bounded: where too many blocks have changed, neighbours count as changed with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use crate::pg::{Fork, Oid, RelationFile};

/// A bit for each page of 4 TB.
const BYTES_MAX: usize = 64 << 20;
/// Blocks that are kept together, and counted as changed together where memory is short.
const UNIT_BLOCKS: u32 = 1 << 14;
/// As many take the room of a bit for each.
const FEW_MAX: usize = UNIT_BLOCKS as usize / 16;
/// What a fork and a unit take beside their blocks.
const FORK_BYTES: usize = 160;
const UNIT_BYTES: usize = 64;

/// One line of a summary, as `pg_wal_summary_contents` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SummaryEntry {
    /// The relation's tablespace.
    pub tablespace: Oid,
    /// Its database; [`Oid::INVALID`] for shared relations.
    pub database: Oid,
    /// Its file number; [`Oid::INVALID`] where a whole database was made or copied.
    pub relfilenode: Oid,
    /// Its fork.
    pub fork: Fork,
    /// A block that was changed, or the length to which the fork was cut.
    pub block: u32,
    /// Whether it is the latter.
    pub is_limit: bool,
}

/// What has to be read of a file of which an older state is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hint {
    /// Nothing: every page is as it was, but for hint bits.
    Unchanged,
    /// These of its pages, ascending, counted within the file.
    Blocks(Vec<Range<u32>>),
    /// All of it.
    ReadAll,
}

/// The blocks that summaries name.
#[derive(Debug)]
pub struct ChangedBlocks {
    forks: HashMap<ForkOf, Changes>,
    databases: BTreeSet<(Oid, Oid)>,
    bytes: usize,
    bytes_max: usize,
}

/// More forks of relations have changed than are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the summaries name more than {forks} forks of relations")]
pub struct TooManyForks {
    /// How many were taken in.
    pub forks: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ForkOf {
    tablespace: Oid,
    database: Oid,
    relfilenode: Oid,
    fork: Fork,
}

/// What is known of one fork.
#[derive(Debug, Default)]
struct Changes {
    /// The shortest it has been.
    limit: Option<u32>,
    units: BTreeMap<u32, Unit>,
}

#[derive(Debug)]
enum Unit {
    Few(Vec<u16>),
    Many(Box<[u64; UNIT_BLOCKS as usize / 64]>),
    All,
}

impl Default for ChangedBlocks {
    fn default() -> Self {
        Self::with_limit(BYTES_MAX)
    }
}

impl ChangedBlocks {
    fn with_limit(bytes_max: usize) -> Self {
        Self { forks: HashMap::new(), databases: BTreeSet::new(), bytes: 0, bytes_max }
    }

    /// Takes in an entry of any of the summaries, in any order.
    pub fn insert(&mut self, entry: &SummaryEntry) -> Result<(), TooManyForks> {
        let SummaryEntry { tablespace, database, relfilenode, fork, block, is_limit } = *entry;
        if relfilenode == Oid::INVALID {
            if self.databases.insert((tablespace, database)) {
                self.bytes += UNIT_BYTES;
            }
            return Ok(());
        }
        let too_many = TooManyForks { forks: self.forks.len() };
        let (bytes, bytes_max) = (&mut self.bytes, self.bytes_max);
        let changes =
            self.forks.entry(ForkOf { tablespace, database, relfilenode, fork }).or_insert_with(|| {
                *bytes += FORK_BYTES;
                Changes::default()
            });
        if is_limit {
            changes.limit = Some(changes.limit.map_or(block, |limit| limit.min(block)));
        } else {
            let unit = changes.units.entry(block / UNIT_BLOCKS).or_insert_with(|| {
                *bytes += UNIT_BYTES;
                Unit::Few(Vec::new())
            });
            let before = unit.bytes();
            unit.insert((block % UNIT_BLOCKS) as u16);
            if *bytes + unit.bytes() > bytes_max + before {
                *unit = Unit::All;
            }
            *bytes = *bytes + unit.bytes() - before;
        }
        // What forks and units take by themselves cannot be given up without giving up all.
        if self.bytes > 2 * self.bytes_max { Err(too_many) } else { Ok(()) }
    }

    /// Returns from which of its pages on nothing holds of what is known of a file, because its fork was cut there; none
    /// where it was not. How long it is now says nothing: it may have grown again, by pages of which no WAL tells.
    pub fn cut_at(&self, file: &RelationFile, segment_pages: u32) -> Option<u32> {
        let RelationFile { tablespace, database, relfilenode, fork, .. } = *file;
        let limit = self.forks.get(&ForkOf { tablespace, database, relfilenode, fork })?.limit?;
        Some(limit.saturating_sub(file.first_page(segment_pages)?))
    }

    /// Says what has to be read of a file that has `pages` pages and had `known_pages`, all of them whole.
    ///
    /// `segment_pages` is what `pg_control` has as `relseg_size`.
    pub fn hint(&self, file: &RelationFile, segment_pages: u32, known_pages: u32, pages: u32) -> Hint {
        if !file.fork.is_logged()
            || file.temporary
            || self.databases.contains(&(file.tablespace, file.database))
        {
            return Hint::ReadAll;
        }
        let first = file.first_page(segment_pages);
        let Some((first, end)) = first.and_then(|first| Some((first, first.checked_add(pages)?))) else {
            return Hint::ReadAll;
        };
        let RelationFile { tablespace, database, relfilenode, fork, .. } = *file;
        let changes = self.forks.get(&ForkOf { tablespace, database, relfilenode, fork });
        let limit = changes.and_then(|changes| changes.limit);
        let shorter_unsaid = pages < known_pages && limit.is_none_or(|limit| limit > end);
        if shorter_unsaid || limit.is_some_and(|limit| limit <= first) {
            return Hint::ReadAll;
        }
        // From where it was cut, and from where it ended, nothing of what is known holds.
        let unknown_from = limit.map_or(end, |limit| limit.min(end)).min(first.saturating_add(known_pages));
        let mut ranges = Ranges::default();
        if let Some(changes) = changes {
            changes.visit(first..unknown_from, &mut |blocks| {
                ranges.push(blocks.start - first..blocks.end - first);
            });
        }
        ranges.push(unknown_from - first..pages);
        match &ranges.0[..] {
            [] => Hint::Unchanged,
            [all] if *all == (0..pages) => Hint::ReadAll,
            _ => Hint::Blocks(ranges.0),
        }
    }
}

impl Changes {
    /// Visits the runs of changed blocks within a range, ascending; runs may touch.
    fn visit(&self, within: Range<u32>, visit: &mut dyn FnMut(Range<u32>)) {
        if within.is_empty() {
            return;
        }
        for (number, unit) in self.units.range(within.start / UNIT_BLOCKS..=(within.end - 1) / UNIT_BLOCKS) {
            let first = number * UNIT_BLOCKS;
            unit.visit(&mut |blocks| {
                let end = first.saturating_add(blocks.end).min(within.end);
                let clipped = (first + blocks.start).max(within.start)..end;
                if !clipped.is_empty() {
                    visit(clipped);
                }
            });
        }
    }
}

impl Unit {
    fn insert(&mut self, block: u16) {
        match self {
            Self::Few(blocks) => {
                if let Err(at) = blocks.binary_search(&block) {
                    blocks.insert(at, block);
                }
                if blocks.len() > FEW_MAX {
                    let mut words = Box::new([0; UNIT_BLOCKS as usize / 64]);
                    blocks.iter().for_each(|block| words[usize::from(block / 64)] |= 1 << (block % 64));
                    *self = Self::Many(words);
                }
            }
            Self::Many(words) => words[usize::from(block / 64)] |= 1 << (block % 64),
            Self::All => {}
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Few(blocks) => blocks.capacity() * size_of::<u16>(),
            Self::Many(words) => size_of_val(&**words),
            Self::All => 0,
        }
    }

    fn visit(&self, visit: &mut dyn FnMut(Range<u32>)) {
        match self {
            Self::Few(blocks) => {
                blocks.iter().for_each(|block| visit(u32::from(*block)..u32::from(*block) + 1));
            }
            Self::Many(words) => {
                for (at, word) in (0..).zip(words.iter()) {
                    let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
                    bits.for_each(|bit| visit(at * 64 + bit..at * 64 + bit + 1));
                }
            }
            Self::All => visit(0..UNIT_BLOCKS),
        }
    }
}

/// Ascending ranges; those that touch are one.
#[derive(Debug, Default)]
struct Ranges(Vec<Range<u32>>);

impl Ranges {
    fn push(&mut self, range: Range<u32>) {
        match self.0.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.0.push(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT: u32 = 131_072;

    fn file(fork: Fork, segment: u32) -> RelationFile {
        let (tablespace, database, relfilenode) = (Oid(1663), Oid(5), Oid(16_384));
        RelationFile { tablespace, database, relfilenode, fork, segment, temporary: false }
    }

    fn entry(block: u32, is_limit: bool) -> SummaryEntry {
        let RelationFile { tablespace, database, relfilenode, fork, .. } = file(Fork::Main, 0);
        SummaryEntry { tablespace, database, relfilenode, fork, block, is_limit }
    }

    fn summary(entries: &[SummaryEntry]) -> ChangedBlocks {
        let mut changed = ChangedBlocks::default();
        entries.iter().for_each(|entry| changed.insert(entry).unwrap());
        changed
    }

    #[test]
    fn blocks_are_counted_within_the_segment() {
        let changed = summary(&[3, 4, 7, SEGMENT + 2, 2 * SEGMENT].map(|block| entry(block, false)));
        let hint = |segment| changed.hint(&file(Fork::Main, segment), SEGMENT, 100, 100);
        assert_eq!(hint(0), Hint::Blocks(vec![3..5, 7..8]));
        assert_eq!(hint(1), Hint::Blocks(vec![2..3]));
        assert_eq!(hint(2), Hint::Blocks(vec![0..1]));
        assert_eq!(hint(3), Hint::Unchanged);
    }

    #[test]
    fn what_is_not_named_is_unchanged_unless_it_is_not_logged() {
        let changed = summary(&[]);
        let hint = |fork, known, pages| changed.hint(&file(fork, 0), SEGMENT, known, pages);
        assert_eq!(hint(Fork::Main, 5, 5), Hint::Unchanged);
        assert_eq!(hint(Fork::Init, 1, 1), Hint::Unchanged);
        assert_eq!(hint(Fork::FreeSpaceMap, 3, 3), Hint::ReadAll);
        assert_eq!(hint(Fork::VisibilityMap, 1, 1), Hint::ReadAll);
        assert_eq!(
            changed.hint(&RelationFile { temporary: true, ..file(Fork::Main, 0) }, SEGMENT, 5, 5),
            Hint::ReadAll
        );
        // Grown by pages that were never written, and shorter without a word.
        assert_eq!(hint(Fork::Main, 5, 8), Hint::Blocks(vec![5..8]));
        assert_eq!(hint(Fork::Main, 0, 8), Hint::ReadAll);
        assert_eq!(hint(Fork::Main, 5, 4), Hint::ReadAll);
        assert_eq!(hint(Fork::Main, 0, 0), Hint::Unchanged);
    }

    #[test]
    fn from_where_a_fork_was_cut_nothing_holds() {
        let changed = summary(&[entry(2, false), entry(60, true), entry(50, true), entry(55, false)]);
        let hint = |segment, known, pages| changed.hint(&file(Fork::Main, segment), SEGMENT, known, pages);
        assert_eq!(hint(0, 100, 70), Hint::Blocks(vec![2..3, 50..70]));
        assert_eq!(hint(0, 100, 50), Hint::Blocks(vec![2..3]));
        assert_eq!(hint(0, 40, 70), Hint::Blocks(vec![2..3, 40..70]));
        assert_eq!(hint(1, 100, 100), Hint::ReadAll);
        // A relation that was made since, in the place of one that was dropped.
        let made = summary(&[entry(0, true), entry(0, false)]);
        assert_eq!(made.hint(&file(Fork::Main, 0), SEGMENT, 1, 1), Hint::ReadAll);
    }

    #[test]
    fn a_database_that_was_copied_is_read_as_a_whole() {
        let copied = SummaryEntry { relfilenode: Oid::INVALID, ..entry(0, true) };
        let changed = summary(&[copied]);
        assert_eq!(changed.hint(&file(Fork::Main, 0), SEGMENT, 5, 5), Hint::ReadAll);
        let other = RelationFile { database: Oid(6), ..file(Fork::Main, 0) };
        assert_eq!(changed.hint(&other, SEGMENT, 5, 5), Hint::Unchanged);
    }

    #[test]
    fn a_file_whose_name_only_looks_like_a_segment_is_read() {
        assert_eq!(summary(&[]).hint(&file(Fork::Main, u32::MAX), SEGMENT, 5, 5), Hint::ReadAll);
        assert_eq!(summary(&[]).hint(&file(Fork::Main, 32_767), SEGMENT, SEGMENT, SEGMENT), Hint::ReadAll);
    }

    #[test]
    fn where_memory_is_short_neighbours_count_as_changed() {
        let mut changed = ChangedBlocks::with_limit(2000);
        (0..UNIT_BLOCKS).step_by(2).for_each(|block| changed.insert(&entry(block, false)).unwrap());
        assert!(changed.bytes <= 2000, "{}", changed.bytes);
        assert_eq!(changed.hint(&file(Fork::Main, 0), SEGMENT, UNIT_BLOCKS, UNIT_BLOCKS), Hint::ReadAll);
        let pages = UNIT_BLOCKS + 5;
        let hint = changed.hint(&file(Fork::Main, 0), SEGMENT, pages, pages);
        assert_eq!(hint, Hint::Blocks(vec![0..UNIT_BLOCKS]));
        let full = (0..100)
            .find_map(|n| changed.insert(&SummaryEntry { relfilenode: Oid(n + 1), ..entry(0, false) }).err());
        assert!(full.is_some());
    }

    proptest! {
        /// Every block that changed is in the ranges, nothing else is, and they ascend without touching.
        #[test]
        fn the_ranges_are_those_of_a_model(
            blocks in prop::collection::btree_set(0u32..3 * UNIT_BLOCKS, 0..300),
            run in 0u32..2 * UNIT_BLOCKS,
            len in 0u32..4000,
            limit in prop::option::of(0u32..4 * UNIT_BLOCKS),
            known in 1u32..4 * UNIT_BLOCKS,
            pages in 1u32..4 * UNIT_BLOCKS,
            segment in 0u32..3,
        ) {
            let segment_pages = 2 * UNIT_BLOCKS;
            let (known, pages) = (known.min(segment_pages), pages.min(segment_pages));
            let mut changed = ChangedBlocks::default();
            let all: BTreeSet<u32> = blocks.into_iter().chain(run..run + len).collect();
            for block in &all {
                changed.insert(&entry(*block, false)).unwrap();
            }
            if let Some(limit) = limit {
                changed.insert(&entry(limit, true)).unwrap();
            }
            let first = segment * segment_pages;
            let must = |page: u32| {
                page >= known || all.contains(&(first + page)) || limit.is_some_and(|limit| first + page >= limit)
            };
            match changed.hint(&file(Fork::Main, segment), segment_pages, known, pages) {
                Hint::ReadAll => {
                    let cut = limit.is_some_and(|limit| limit <= first)
                        || (pages < known && limit.is_none_or(|limit| limit > first + pages));
                    prop_assert!(cut || (0..pages).all(must));
                }
                hint => {
                    let ranges = if let Hint::Blocks(ranges) = hint { ranges } else { Vec::new() };
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                    let named: BTreeSet<u32> = ranges.into_iter().flatten().collect();
                    prop_assert!((0..pages).all(|page| named.contains(&page) == must(page)));
                }
            }
        }
    }
}
