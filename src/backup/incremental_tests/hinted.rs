//! Incremental basebackups with WAL summaries, against a model of a server with buffers, a log and checkpoints.
//!
//! What is logged before a START is in the files by then; what comes behind it may be in a file when that is read, or
//! not, and replay makes up for it. So a basebackup is whole if its files, with the log replayed from its START to its
//! end, are what the server's buffers held then: whether the summaries were asked or withheld, and whether it began at
//! a checkpoint of its own or, as on a standby, at one long past. Of each page one byte changes without a word, as hint
//! bits do, and pages that are zero may end a file for which no log speaks.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::backup::changed_blocks::SummaryEntry;
use crate::backup::data_directory::server_path;
use crate::backup::hints::reaches_behind;
use crate::pg::{DataPath, Fork, Oid, RelationFile};

use super::*;

/// Of two databases, of another tablespace, of none; one is a visibility map.
const RELATIONS: [(&str, usize); 5] = [
    ("data/global/1262", 2),
    ("data/base/5/1259", 11),
    ("data/base/16384/16385", 30),
    ("data/base/16384/16385_vm", 2),
    ("tablespaces/7/PG_15_1/16384/16400", 14),
];
/// Files of which the log says nothing: what is read of them counts.
const FREE: [(&str, usize); 2] = [("data/base/16384/16385_fsm", 3 * PAGE), ("data/postgresql.conf", 30_000)];
/// Pages of a relation's file.
const SEGMENT_PAGES: usize = 12;
/// The byte of each page that nobody logs.
const HINT_BITS: usize = PAGE - 1;
const RELATION_PAGES_MAX: usize = 60;

/// What happens on the server.
#[derive(Debug, Clone)]
enum Change {
    Page { relation: usize, at: usize, seed: u64, is_flushed: bool },
    Grow { relation: usize, by: usize, seed: u64, is_logged: bool },
    Cut { relation: usize, at: usize },
    MakeAgain { relation: usize, pages: usize, seed: u64 },
    SetHintBits { relation: usize, at: usize },
    CopyDatabase { seed: u64 },
    Free { file: usize, len: usize, seed: u64 },
    Flush { relation: usize },
    Wait { milliseconds: u64 },
}

#[derive(Debug, Clone)]
enum Event {
    Change(Change),
    Checkpoint,
    BackUp(BackUp),
}

/// A basebackup, and what happens meanwhile.
#[derive(Debug, Clone)]
struct BackUp {
    /// It begins at the last checkpoint, whatever has happened since.
    at_last_checkpoint: bool,
    is_hinted: bool,
    is_saved: bool,
    before_start: Vec<Change>,
    before_read: Vec<Change>,
    behind: Vec<Change>,
}

/// What the log says, each at the LSN of its number.
#[derive(Debug)]
enum Logged {
    Page {
        relation: usize,
        page: usize,
        image: Vec<u8>,
    },
    Cut {
        relation: usize,
        pages: usize,
    },
    /// Dropped, and made again without a page.
    Made {
        relation: usize,
    },
    /// The files of database 16384 took the place of what was there.
    Copied {
        relations: Vec<(usize, Vec<u8>)>,
    },
}

struct Server {
    host: Host,
    /// What each relation holds, and what of it is in its files.
    buffers: Vec<Vec<u8>>,
    disk: Vec<Vec<u8>>,
    dirty: BTreeSet<(usize, usize)>,
    log: Vec<Logged>,
    redo: usize,
    parent: Option<usize>,
    taken: Vec<Basis>,
}

/// A basebackup, and what it has to be.
struct Basis {
    id: BasebackupId,
    start: usize,
    stop: usize,
    files: BTreeMap<String, Vec<u8>>,
    buffers: Vec<Vec<u8>>,
}

fn segment(relation: usize, n: usize) -> String {
    let path = RELATIONS[relation].0;
    if n == 0 { path.to_owned() } else { format!("{path}.{n}") }
}

fn classified(path: &str) -> RelationFile {
    let path = server_path(&TreePath::new(path).unwrap()).unwrap();
    RelationFile::classify(&DataPath::new(path).unwrap()).unwrap()
}

fn is_in_copied_database(relation: usize) -> bool {
    classified(RELATIONS[relation].0).database == Oid(16_384)
}

impl Server {
    async fn new() -> Self {
        let relations = (0..).zip(RELATIONS).map(|(seed, (_, pages))| bytes(seed, pages * PAGE));
        let buffers: Vec<Vec<u8>> = relations.collect();
        let mut server = Self {
            host: Host::new().await,
            disk: buffers.clone(),
            buffers,
            dirty: BTreeSet::new(),
            log: Vec::new(),
            redo: 0,
            parent: None,
            taken: Vec::new(),
        };
        // What is kept has not always the bytes that are there now; what is restored is compared here.
        server.host.forged = true;
        (0..RELATIONS.len()).for_each(|relation| server.write_out(relation));
        for (seed, (path, len)) in (100..).zip(FREE) {
            server.host.write(path, bytes(seed, len));
        }
        server
    }

    fn pages(&self, relation: usize) -> usize {
        self.buffers[relation].len() / PAGE
    }

    /// Has a relation's files hold what is on disk of it.
    fn write_out(&mut self, relation: usize) {
        let there = (0..).take_while(|n| self.host.files.contains_key(&segment(relation, *n))).count();
        let content = &self.disk[relation];
        let needed = content.len().div_ceil(SEGMENT_PAGES * PAGE).max(1);
        for n in 0..needed.max(there) {
            let [from, to] = [n, n + 1].map(|n| (n * SEGMENT_PAGES * PAGE).min(content.len()));
            let (path, raw) = (segment(relation, n), &content[from..to]);
            if self.host.files.get(&path).is_none_or(|before| before != raw) {
                self.host.write(&path, raw.to_vec());
            }
        }
    }

    /// Removes a relation's files: the next ones have other inodes.
    fn unlink(&mut self, relation: usize) {
        let there = (0..).map(|n| segment(relation, n)).take_while(|path| self.host.files.contains_key(path));
        there.collect::<Vec<_>>().iter().for_each(|path| self.host.remove(path));
    }

    /// Puts a page into the buffers and says so in the log.
    fn log_page(&mut self, relation: usize, page: usize, seed: u64) {
        let image = bytes(seed, PAGE);
        self.buffers[relation][page * PAGE..][..PAGE].copy_from_slice(&image);
        self.dirty.insert((relation, page));
        self.log.push(Logged::Page { relation, page, image });
    }

    fn flush(&mut self, relation: usize) {
        let dirty: Vec<(usize, usize)> =
            self.dirty.range((relation, 0)..(relation + 1, 0)).copied().collect();
        for (_, page) in &dirty {
            let range = page * PAGE..(page + 1) * PAGE;
            self.disk[relation][range.clone()].copy_from_slice(&self.buffers[relation][range]);
            self.dirty.remove(&(relation, *page));
        }
        if !dirty.is_empty() {
            self.write_out(relation);
        }
    }

    fn checkpoint(&mut self) {
        (0..RELATIONS.len()).for_each(|relation| self.flush(relation));
        assert!(self.buffers == self.disk && self.dirty.is_empty());
        self.redo = self.log.len();
    }

    /// Cuts a relation at once, in the buffers and on disk.
    fn cut(&mut self, relation: usize, pages: usize) {
        self.buffers[relation].truncate(pages * PAGE);
        self.disk[relation].truncate(pages * PAGE);
        self.dirty.retain(|(other, page)| *other != relation || *page < pages);
    }

    /// Adds pages that are zero until something is put into them, which is nothing the log would tell.
    fn extend(&mut self, relation: usize, by: usize) {
        let len = self.buffers[relation].len() + by * PAGE;
        self.buffers[relation].resize(len, 0);
        self.disk[relation].resize(len, 0);
    }

    fn happen(&mut self, change: &Change) {
        match *change {
            Change::Page { relation, .. } | Change::SetHintBits { relation, .. }
                if self.pages(relation) == 0 => {}
            Change::Page { relation, at, seed, is_flushed } => {
                self.log_page(relation, at % self.pages(relation), seed);
                if is_flushed {
                    self.flush(relation);
                }
            }
            Change::Grow { relation, by, .. } if self.pages(relation) + by > RELATION_PAGES_MAX => {}
            Change::Grow { relation, by, seed, is_logged } => {
                let before = self.pages(relation);
                self.extend(relation, by);
                self.write_out(relation);
                for n in (0..by).filter(|_| is_logged) {
                    self.log_page(relation, before + n, seed ^ n as u64);
                }
            }
            Change::Cut { relation, at } => {
                let pages = at % (self.pages(relation) + 1);
                self.cut(relation, pages);
                self.log.push(Logged::Cut { relation, pages });
                self.write_out(relation);
            }
            Change::MakeAgain { relation, pages, seed } => {
                self.cut(relation, 0);
                self.log.push(Logged::Made { relation });
                self.unlink(relation);
                self.extend(relation, pages);
                self.write_out(relation);
                (0..pages).for_each(|page| self.log_page(relation, page, seed ^ page as u64));
            }
            Change::SetHintBits { relation, at } => {
                let byte = at % self.pages(relation) * PAGE + HINT_BITS;
                self.buffers[relation][byte] ^= 1;
                self.disk[relation][byte] ^= 1;
                self.write_out(relation);
            }
            Change::CopyDatabase { seed } => self.copy_database(seed),
            Change::Free { file, len, seed } => self.host.write(FREE[file].0, bytes(seed, len)),
            Change::Flush { relation } => self.flush(relation),
            Change::Wait { milliseconds } => self.host.clock.advance(Duration::from_millis(milliseconds)),
        }
    }

    /// Files of the same length come from elsewhere, and the log says of which database.
    fn copy_database(&mut self, seed: u64) {
        let mut relations = Vec::new();
        for relation in (0..RELATIONS.len()).filter(|relation| is_in_copied_database(*relation)) {
            let content = bytes(seed ^ relation as u64, self.buffers[relation].len());
            self.dirty.retain(|(other, _)| *other != relation);
            (self.buffers[relation], self.disk[relation]) = (content.clone(), content.clone());
            self.unlink(relation);
            self.write_out(relation);
            relations.push((relation, content));
        }
        self.log.push(Logged::Copied { relations });
    }

    /// What the server's summaries say of a part of its log.
    fn summaries(&self, of: Range<usize>) -> ChangedBlocks {
        let entry = |relation: usize, block: usize, is_limit: bool| {
            let RelationFile { tablespace, database, relfilenode, fork, .. } =
                classified(RELATIONS[relation].0);
            SummaryEntry { tablespace, database, relfilenode, fork, block: block as u32, is_limit }
        };
        let mut changed = ChangedBlocks::default();
        for logged in &self.log[of] {
            let entries: Vec<SummaryEntry> = match logged {
                Logged::Page { relation, page, .. } => {
                    let named = Some(entry(*relation, *page, false));
                    // The record that clears a bit of a visibility map names the page of the heap alone.
                    named.filter(|entry| entry.fork != Fork::VisibilityMap).into_iter().collect()
                }
                Logged::Cut { relation, pages } => vec![entry(*relation, *pages, true)],
                Logged::Made { relation } => vec![entry(*relation, 0, true)],
                Logged::Copied { relations } => {
                    let of = |(relation, _): &(usize, Vec<u8>)| SummaryEntry {
                        relfilenode: Oid::INVALID,
                        ..entry(*relation, 0, true)
                    };
                    relations.iter().map(of).collect()
                }
            };
            entries.iter().for_each(|entry| changed.insert(entry).unwrap());
        }
        changed
    }

    /// Returns how many bytes of what is there now nobody has to read, because no change of their relation was logged.
    fn vouched_for(&self, parent: &Basis, of: Range<usize>) -> u64 {
        let mut named = BTreeSet::new();
        for logged in &self.log[of] {
            match logged {
                Logged::Page { relation, .. } | Logged::Cut { relation, .. } | Logged::Made { relation } => {
                    named.insert(*relation);
                }
                Logged::Copied { relations } => named.extend(relations.iter().map(|(relation, _)| *relation)),
            }
        }
        let quiet = |relation: &usize| {
            !named.contains(relation) && classified(RELATIONS[*relation].0).fork == Fork::Main
        };
        let files = (0..RELATIONS.len())
            .filter(quiet)
            .flat_map(|relation| (0..=RELATION_PAGES_MAX / SEGMENT_PAGES).map(move |n| segment(relation, n)));
        let same_size = |path: &String| {
            let now = self.host.files.get(path)?;
            parent.files.get(path).filter(|before| before.len() == now.len()).map(|_| now.len() as u64)
        };
        files.filter_map(|path| same_size(&path)).sum()
    }

    async fn back_up(&mut self, how: &BackUp) -> WorkDone {
        let announced = self.host.announced(false).await.unwrap();
        how.before_start.iter().for_each(|change| self.happen(change));
        if !how.at_last_checkpoint {
            self.checkpoint();
        }
        let start = self.redo;
        let parent = self.parent.map(|number| &self.taken[number]);
        let expected = parent.map(|parent| parent.id);
        let lsn = |number: usize| Lsn(number as u64);
        // As production does: of one that ended behind this START nothing is asked.
        let since = parent.filter(|parent| how.is_hinted && reaches_behind(lsn(parent.stop), lsn(start)));
        let since = since.map(|parent| parent.start..start);
        self.host.hints = since.clone().map(|since| Hints::of(self.summaries(since), SEGMENT_PAGES as u32));
        how.before_read.iter().for_each(|change| self.happen(change));
        let files = self.host.files.clone();
        let vouched = match (self.parent, since) {
            (Some(number), Some(since)) => self.vouched_for(&self.taken[number], since),
            _ => 0,
        };
        let copied = self.host.copied_from(announced).await.unwrap();
        how.behind.iter().for_each(|change| self.happen(change));
        let (stop, buffers) = (self.log.len(), self.buffers.clone());
        let taken = self.host.completed(copied, how.is_saved).await.unwrap();
        assert_eq!(taken.decision.parent(), expected, "{}", taken.decision);
        let reads_all = matches!(taken.decision, Decision::Incremental(Incremental { read_all: true, .. }));
        if !reads_all && taken.written_again == 0 {
            let all: u64 = files.values().map(|raw| raw.len() as u64).sum();
            assert!(taken.work.bytes_read <= all - vouched, "{:?}: {all} but {vouched}", taken.work);
        }
        let work = taken.work;
        self.taken.push(Basis { id: taken.record.id, start, stop, files, buffers });
        if how.is_saved {
            self.parent = Some(self.taken.len() - 1);
        }
        work
    }

    /// Restores each basebackup, replays the log behind its START, and compares with what the server held at its end.
    async fn assert_all_recover(&self) {
        for basis in &self.taken {
            let (_, files) = self.host.restored(basis.id).await;
            let sizes = |files: &BTreeMap<String, Vec<u8>>| -> BTreeMap<String, usize> {
                files.iter().map(|(path, raw)| (path.clone(), raw.len())).collect()
            };
            assert_eq!(sizes(&files), sizes(&basis.files), "basebackup {}", basis.id);
            for (path, _) in FREE {
                assert!(files[path] == basis.files[path], "basebackup {}: {path}", basis.id);
            }
            let mut recovered: Vec<Vec<u8>> =
                (0..RELATIONS.len()).map(|relation| content_of(&files, relation)).collect();
            replay(&mut recovered, &self.log[basis.start..basis.stop]);
            for (relation, (recovered, buffers)) in recovered.iter().zip(&basis.buffers).enumerate() {
                let (recovered, buffers) = (comparable(recovered), comparable(buffers));
                let differing: Vec<usize> = (0..recovered.len().max(buffers.len()))
                    .filter(|page| recovered.get(*page) != buffers.get(*page))
                    .collect();
                let path = RELATIONS[relation].0;
                assert!(differing.is_empty(), "basebackup {}: pages {differing:?} of {path}", basis.id);
            }
        }
    }
}

/// The pages of a relation as the server finds them: up to the first file that is not full.
fn content_of(files: &BTreeMap<String, Vec<u8>>, relation: usize) -> Vec<u8> {
    let mut content = Vec::new();
    for raw in (0..).map_while(|n| files.get(&segment(relation, n))) {
        content.extend_from_slice(raw);
        if raw.len() < SEGMENT_PAGES * PAGE {
            break;
        }
    }
    content
}

fn replay(relations: &mut [Vec<u8>], log: &[Logged]) {
    for logged in log {
        match logged {
            Logged::Page { relation, page, image } => {
                let (content, end) = (&mut relations[*relation], (page + 1) * PAGE);
                content.resize(content.len().max(end), 0);
                content[page * PAGE..end].copy_from_slice(image);
            }
            Logged::Cut { relation, pages } => relations[*relation].truncate(pages * PAGE),
            Logged::Made { relation } => relations[*relation].clear(),
            Logged::Copied { relations: copied } => {
                copied.iter().for_each(|(relation, content)| relations[*relation].clone_from(content));
            }
        }
    }
}

/// The pages of a relation without what nobody logs: hint bits, and pages of zeros at its end.
fn comparable(content: &[u8]) -> Vec<Vec<u8>> {
    let mut pages: Vec<Vec<u8>> = content.chunks(PAGE).map(<[u8]>::to_vec).collect();
    pages.iter_mut().for_each(|page| page[HINT_BITS] = 0);
    while pages.last().is_some_and(|page| page.iter().all(|byte| *byte == 0)) {
        pages.pop();
    }
    pages
}

fn change() -> impl Strategy<Value = Change> {
    let relation = 0..RELATIONS.len();
    prop_oneof![
        10 => (relation.clone(), any::<usize>(), any::<u64>(), any::<bool>()).prop_map(
            |(relation, at, seed, is_flushed)| Change::Page { relation, at, seed, is_flushed }
        ),
        3 => (relation.clone(), 1usize..16, any::<u64>(), any::<bool>())
            .prop_map(|(relation, by, seed, is_logged)| Change::Grow { relation, by, seed, is_logged }),
        2 => (relation.clone(), any::<usize>()).prop_map(|(relation, at)| Change::Cut { relation, at }),
        1 => (relation.clone(), 0usize..20, any::<u64>())
            .prop_map(|(relation, pages, seed)| Change::MakeAgain { relation, pages, seed }),
        2 => (relation.clone(), any::<usize>())
            .prop_map(|(relation, at)| Change::SetHintBits { relation, at }),
        1 => any::<u64>().prop_map(|seed| Change::CopyDatabase { seed }),
        2 => (0..FREE.len(), 0usize..90_000, any::<u64>())
            .prop_map(|(file, len, seed)| Change::Free { file, len, seed }),
        2 => relation.prop_map(|relation| Change::Flush { relation }),
        2 => (0u64..3000).prop_map(|milliseconds| Change::Wait { milliseconds }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let changes = || proptest::collection::vec(change(), 0..4);
    let flags = (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.9));
    let back_up =
        (flags, changes(), changes(), changes()).prop_map(|(flags, before_start, before_read, behind)| {
            let (at_last_checkpoint, is_hinted, is_saved) = flags;
            Event::BackUp(BackUp {
                at_last_checkpoint,
                is_hinted,
                is_saved,
                before_start,
                before_read,
                behind,
            })
        });
    prop_oneof![7 => change().prop_map(Event::Change), 2 => Just(Event::Checkpoint), 3 => back_up]
}

/// A basebackup during which nothing happens.
fn quiet(is_hinted: bool) -> BackUp {
    let (before_start, before_read, behind) = (Vec::new(), Vec::new(), Vec::new());
    BackUp { at_last_checkpoint: false, is_hinted, is_saved: true, before_start, before_read, behind }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn every_basebackup_with_and_without_summaries_recovers_to_what_the_server_held(
        events in proptest::collection::vec(event(), 1..50),
    ) {
        block_on(async {
            let mut server = Server::new().await;
            server.back_up(&quiet(false)).await;
            for event in &events {
                match event {
                    Event::Change(change) => server.happen(change),
                    Event::Checkpoint => server.checkpoint(),
                    Event::BackUp(how) => {
                        server.back_up(how).await;
                    }
                }
            }
            server.back_up(&quiet(true)).await;
            server.assert_all_recover().await;
        });
    }
}

/// The property would hold for who reads everything: with summaries one file is read of those whose ctimes are new.
#[tokio::test]
async fn with_summaries_only_the_file_is_read_whose_page_was_logged() {
    for is_hinted in [false, true] {
        let mut server = Server::new().await;
        server.back_up(&quiet(false)).await;
        for relation in [0, 1, 2, 4] {
            for at in [0, 13] {
                server.happen(&Change::SetHintBits { relation, at });
            }
        }
        server.happen(&Change::Page { relation: 2, at: 13, seed: 77, is_flushed: false });
        let work = server.back_up(&quiet(is_hinted)).await;
        // All files but the map's, those of no relation, and the third segment; or the second segment alone.
        let touched = if is_hinted { SEGMENT_PAGES } else { 2 + 11 + 2 * SEGMENT_PAGES + 14 };
        assert_eq!(work.bytes_read, (touched * PAGE) as u64, "summaries: {is_hinted}");
        server.assert_all_recover().await;
    }
}
