//! Basebackups of which only changes come against a model of the server that sends them: each restored bit by bit.
//!
//! The model follows `GetFileBackupMethod` of the server's `basebackup_incremental.c`: which files it sends whole, and
//! which pages of the others. What it sends goes through everything that a real archive goes through.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tar::{EntryType, Header};

use crate::backup::change::Today;
use crate::backup::changed_blocks::{ChangedBlocks, SummaryEntry};
use crate::backup::error::Error;
use crate::backup::incremental_tests::{Host, a_host_of_a_few_files, block_on, completion_of};
use crate::backup::packer::{Packer, Stored};
use crate::backup::server_facts::Database;
use crate::backup::site_state::{Begun, SiteState};
use crate::backup::stream::changes::Changes;
use crate::backup::stream::copy::pack;
use crate::backup::stream::error::StreamError;
use crate::backup::stream::parent_manifest::write;
use crate::backup::stream::receive::{ReceiveOptions, Receiver};
use crate::backup::stream::run::is_scattered;
use crate::backup::stream::server::why_everything;
use crate::backup::stream::start_set::StartSet;
use crate::backup::stream::work::WorkContext;
use crate::backup::tests::bytes;
use crate::clock::Clock;
use crate::codec::{Compression, Sha256};
use crate::pg::{
    BackupManifest, Crc32c, DataPath, Lsn, MajorVersion, Oid, RelationFile, SystemIdentifier, TimelineId,
};
use crate::replication::BaseBackupPart;
use crate::repo::{
    BasebackupId, BasebackupWriter, BeginOptions,
    page_map::{MAP_BLOCK_PAGES, PAGE_SIZE},
};

const PAGE: usize = PAGE_SIZE as usize;
const SEGMENT_PAGES: u32 = 131_072;
const MAGIC: u32 = 0xd3ae_1f0d;
const PATHS: [&str; 6] = [
    "data/global/1262",
    "data/base/5/1259",
    "data/base/16384/16385",
    "data/base/16384/16386",
    "data/base/16384/16387",
    "data/base/16384/16388_init",
];

/// What happens to a relation between two basebackups.
#[derive(Debug, Clone)]
enum Event {
    Change {
        page: usize,
        seed: u64,
    },
    /// Its page is named by WAL though it stays as it is.
    Touch {
        page: usize,
    },
    /// Of the pages that are added only some are ever written.
    Grow {
        pages: usize,
        written: u64,
        seed: u64,
    },
    Cut {
        to: usize,
    },
}

/// A relation of the server's, with what its summaries say since the last basebackup.
#[derive(Debug, Clone, Default)]
struct Relation {
    raw: Vec<u8>,
    named: BTreeSet<u32>,
    limit: Option<u32>,
}

impl Relation {
    fn pages(&self) -> usize {
        self.raw.len() / PAGE
    }

    fn happen(&mut self, event: &Event) {
        let pages = self.pages();
        match *event {
            Event::Change { page, seed } if pages > 0 => self.set(page % pages, seed),
            Event::Touch { page } if pages > 0 => {
                self.named.insert((page % pages) as u32);
            }
            Event::Grow { pages: more, written, seed } => {
                self.raw.resize((pages + more) * PAGE, 0);
                for n in (0..more).filter(|n| (written >> (n % 64)) & 1 == 1) {
                    self.set(pages + n, seed.wrapping_add(n as u64));
                }
            }
            Event::Cut { to } => {
                let to = to % (pages + 1);
                self.raw.truncate(to * PAGE);
                self.named.retain(|page| (*page as usize) < to);
                self.limit = Some(self.limit.unwrap_or(u32::MAX).min(to as u32));
            }
            Event::Change { .. } | Event::Touch { .. } => {}
        }
    }

    fn set(&mut self, page: usize, seed: u64) {
        self.raw[page * PAGE..][..PAGE].copy_from_slice(&bytes(seed, PAGE));
        self.named.insert(page as u32);
    }

    /// What the server sends of it: all of it, or what has changed.
    fn sent(&self, path: &str) -> Vec<u8> {
        let (folder, name) = path.strip_prefix("data/").unwrap().rsplit_once('/').unwrap();
        let most = self.named.len() * 10 > self.pages() * 9;
        if self.pages() == 0 || self.limit == Some(0) || most {
            return file(&format!("{folder}/{name}"), &self.raw);
        }
        let mut partial = MAGIC.to_le_bytes().to_vec();
        partial.extend((self.named.len() as u32).to_le_bytes());
        partial.extend((self.pages() as u32).to_le_bytes());
        self.named.iter().for_each(|page| partial.extend(page.to_le_bytes()));
        if !self.named.is_empty() {
            partial.resize(partial.len().next_multiple_of(PAGE), 0);
        }
        for page in &self.named {
            partial.extend(&self.raw[*page as usize * PAGE..][..PAGE]);
        }
        file(&format!("{folder}/INCREMENTAL.{name}"), &partial)
    }
}

fn file(path: &str, content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_mode(0o600);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    header.set_entry_type(EntryType::Regular);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A server's relations on a host that remembers its last basebackup.
struct Model {
    host: Host,
    relations: BTreeMap<&'static str, Relation>,
}

impl Model {
    /// Takes a full basebackup of relations.
    async fn new(relations: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        let mut host = Host::new().await;
        let mut all = BTreeMap::new();
        for (path, raw) in relations {
            host.write(path, raw.clone());
            all.insert(path, Relation { raw, ..Relation::default() });
        }
        host.back_up().await;
        Self { host, relations: all }
    }

    fn happen(&mut self, path: &'static str, event: &Event) {
        if let Some(relation) = self.relations.get_mut(path) {
            relation.happen(event);
            self.host.write(path, relation.raw.clone());
        }
    }

    /// Has all of it sent, read in pieces of `cut` bytes and worked on in pieces of `piece`.
    async fn receive(&mut self, cut: usize, piece: u64) -> Result<BasebackupId, Error> {
        let mut summaries = ChangedBlocks::default();
        for (path, relation) in &self.relations {
            let path = DataPath::new(path.strip_prefix("data/").unwrap().as_bytes().to_vec()).unwrap();
            let RelationFile { tablespace, database, relfilenode, fork, .. } =
                RelationFile::classify(&path).unwrap();
            if let Some(block) = relation.limit {
                let entry = SummaryEntry { tablespace, database, relfilenode, fork, block, is_limit: true };
                summaries.insert(&entry).unwrap();
            }
        }
        let archive: Vec<u8> = self.relations.iter().flat_map(|(path, it)| it.sent(path)).collect();
        let id = receive(&self.host, &archive, summaries, (cut, piece)).await?;
        for relation in self.relations.values_mut() {
            (relation.named, relation.limit) = (BTreeSet::new(), None);
        }
        Ok(id)
    }
}

/// What a basebackup begins with.
struct Beginning {
    states: SiteState,
    today: Today,
    writer: Arc<BasebackupWriter>,
    begun: Begun,
}

/// Begins a basebackup an hour later.
async fn begin(host: &Host) -> Beginning {
    host.clock.advance(Duration::from_secs(3600));
    let states = SiteState::take(&host.repository, Ok(host.states.path())).await.unwrap();
    let cluster = "7301234567890123456-16".parse().unwrap();
    let today = Today::of(&host.repository, cluster, TimelineId::FIRST, true);
    let prepared = states.prepare(&host.repository, &today, false, None).await.unwrap();
    let options = BeginOptions {
        cluster,
        timeline: TimelineId::FIRST,
        wal_floor: Lsn(0x0200_0028),
        parent: None,
        host: "test".to_owned(),
        pid: 1,
    };
    let (writer, begun) = states.begin(&host.repository, options, prepared).await.unwrap();
    Beginning { states, today, writer: Arc::new(writer), begun }
}

/// Takes a basebackup of what comes in an archive, and holds what it sums up against the files of the host.
async fn receive(
    host: &Host,
    archive: &[u8],
    summaries: ChangedBlocks,
    (cut, piece_bytes): (usize, u64),
) -> Result<BasebackupId, Error> {
    let Beginning { states, today, writer, begun } = begin(host).await;
    let parent = begun.parent.clone().expect("there is one to build upon");
    let compression = Compression::zstd(1);
    let mut packer = Packer::new(writer.clone(), compression, 2)
        .remembering(states.writer(writer.id()).await.unwrap())
        .writing_again(parent.written_again());
    let (known, started) = (parent.clone(), host.clock.now());
    let mut receiver = Receiver::new(ReceiveOptions {
        data_directory: "/server/data".into(),
        directory_mode: 0o700,
        version_directory: "PG_18_202506291".to_owned(),
        tablespaces: Vec::new(),
        tablespace_names: BTreeMap::new(),
        started,
        start_set: StartSet::new(&[], started),
        piece_bytes,
        changes: Some(Changes {
            known: Box::new(move |path| known.file(path)),
            summaries: Arc::new(summaries),
            segment_pages: SEGMENT_PAGES,
        }),
    });
    let context = WorkContext {
        compression,
        page_judge: None,
        hash_key: begun.hash_key.clone(),
        parent: Some(parent.clone()),
        start_set_again: false,
    };
    let content = archive.chunks(cut).map(|part| BaseBackupPart::Content(Bytes::copy_from_slice(part)));
    let parts = [BaseBackupPart::Archive(None)].into_iter().chain(content).chain([BaseBackupPart::Manifest]);
    for part in parts {
        receiver.take(part)?;
        while let Some(work) = receiver.next_work() {
            pack(&mut packer, work.execute(&context)?, Some(&parent)).await?;
        }
    }
    let Stored { packed, named, state } = packer.finish().await?;
    for (entry, crc) in packed.entries.iter().zip(&packed.checksums) {
        let found = &host.files[&entry.path.to_string()];
        assert!(crc.is_none_or(|crc| crc == Crc32c::of(found)), "{}", entry.path);
    }
    let completion = completion_of(packed, named, &writer, &today, compression);
    let committed = Arc::into_inner(writer).unwrap().finish_pinned(completion).await?;
    states.save(state, &begun, &today, &committed).await;
    Ok(committed.record.id)
}

fn event() -> impl Strategy<Value = (usize, Event)> {
    let event = prop_oneof![
        6 => (any::<usize>(), any::<u64>()).prop_map(|(page, seed)| Event::Change { page, seed }),
        2 => any::<usize>().prop_map(|page| Event::Touch { page }),
        3 => (1usize..30, any::<u64>(), any::<u64>())
            .prop_map(|(pages, written, seed)| Event::Grow { pages, written, seed }),
        2 => any::<usize>().prop_map(|to| Event::Cut { to }),
    ];
    (0..PATHS.len(), event)
}

/// Pages of a relation: small ones share a chunk, from eight on they have a map.
fn pages() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0usize..10, 1 => Just(8usize), 2 => 10usize..60]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn failure_15_whatever_a_server_sends_of_its_changes_is_put_together_bit_by_bit(
        first in proptest::collection::vec((pages(), any::<u64>()), PATHS.len()),
        rounds in proptest::collection::vec(proptest::collection::vec(event(), 0..25), 1..4),
        cut in 1usize..200_000,
        piece in prop_oneof![Just(PAGE_SIZE), Just(8 * PAGE_SIZE), Just(2u64 << 20)],
    ) {
        block_on(async {
            let first = PATHS.into_iter().zip(first).map(|(path, (pages, seed))| (path, bytes(seed, pages * PAGE)));
            let mut model = Model::new(first).await;
            let mut taken = Vec::new();
            for round in rounds {
                for (path, event) in &round {
                    model.happen(PATHS[*path], event);
                }
                let id = model.receive(cut.max(500), piece).await.unwrap();
                taken.push((id, model.host.files.clone()));
            }
            for (id, files) in &taken {
                model.host.assert_holds(*id, files).await;
            }
            // And the next one, from the data directory, finds what is remembered of them.
            model.host.back_up().await;
            model.host.assert_restores(model.host.taken.last().unwrap()).await;
        });
    }
}

/// Zeros between pages that are not, so that it costs no time.
#[tokio::test]
async fn changes_on_both_sides_of_a_map_block_are_put_together() {
    let edge = MAP_BLOCK_PAGES as usize;
    let mut raw = vec![0; (edge + 40) * PAGE];
    for page in [0, 7, edge - 2, edge - 1, edge, edge + 9, edge + 30] {
        raw[page * PAGE..][..PAGE].copy_from_slice(&bytes(page as u64, PAGE));
    }
    let path = PATHS[2];
    let mut model = Model::new([(path, raw)]).await;
    let all = [
        vec![Event::Change { page: edge - 1, seed: 1 }, Event::Change { page: edge, seed: 2 }],
        vec![Event::Change { page: 3, seed: 3 }],
        // Pages behind the cut come back as zeros, within the block and behind it.
        vec![
            Event::Cut { to: edge - 1 },
            Event::Grow { pages: 30, written: 1 << 20, seed: 4 },
            Event::Change { page: 0, seed: 5 },
        ],
        Vec::new(),
    ];
    for events in all {
        events.iter().for_each(|event| model.happen(path, event));
        let id = model.receive(32 << 10, 64 << 10).await.unwrap();
        model.host.assert_holds(id, &model.host.files).await;
    }
}

/// A page that was cut when it was read is none that can be named, in a chunk of its own file or with others.
#[tokio::test]
async fn half_a_page_is_not_put_together() {
    for pages in [3, 20] {
        let (path, raw) = (PATHS[2], bytes(7, pages * PAGE + PAGE / 2));
        let mut model = Model::new([(path, raw)]).await;
        // Whole now, and no summary names it: a real server's does.
        let relation = model.relations.get_mut(path).unwrap();
        relation.raw.resize((pages + 1) * PAGE, 0);
        let error = model.receive(1000, PAGE_SIZE).await.unwrap_err();
        assert!(matches!(error, Error::Received(StreamError::NotKnown { .. })), "{pages}: {error}");
        let relation = model.relations.get_mut(path).unwrap();
        relation.set(pages, 8);
        let raw = relation.raw.clone();
        model.host.write(path, raw);
        let id = model.receive(1000, PAGE_SIZE).await.unwrap();
        model.host.assert_holds(id, &model.host.files).await;
    }
}

/// By the same rule as for a data directory: where the next one would spread it over too many packs.
#[tokio::test]
async fn a_start_up_set_is_scattered_where_it_is_written_again() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    let databases = [Database {
        oid: Oid(5),
        name: "postgres".to_owned(),
        size_bytes: Some(7 << 20),
        locale_provider: "c".to_owned(),
        collate: "C".to_owned(),
        collation_version: None,
    }];
    let mut found = Vec::new();
    for n in 0..9 {
        let scattered = is_scattered(&begin(&host).await.begun, &databases).await.unwrap();
        host.change("data/base/5/1249", |raw| raw[n * PAGE] ^= 1);
        assert_eq!(host.back_up().await.start_set_again, scattered, "basebackup {n}");
        found.push(scattered);
    }
    assert!(found.contains(&true) && found.contains(&false), "{found:?}");
    // Nothing is where nothing is built upon.
    let full = Begun { parent: None, ..begin(&host).await.begun };
    assert!(!is_scattered(&full, &databases).await.unwrap());
}

/// It was whole when it was opened; whatever became of it since, everything can be asked for instead.
#[tokio::test]
async fn a_state_that_can_no_longer_be_read_gives_no_manifest_and_fails_nothing() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    let id = host.back_up().await.record.id;
    let parent = begin(&host).await.begun.parent.unwrap();
    let written = || -> Result<String, Error> {
        let (system, mut text) = (SystemIdentifier(7_301_234_567_890_123_456), Vec::new());
        let manifest = BackupManifest::new(MajorVersion::V18, system, Sha256::new());
        write(&parent, manifest, |piece| {
            text.extend(piece);
            true
        })?;
        Ok(String::from_utf8(text).unwrap())
    };
    let whole = written().unwrap();
    assert!(whole.contains("base/16384/16385") && whole.contains("Manifest-Checksum"), "{whole}");
    let path = host.states.path().join(host.repository.site().to_string()).join(format!("{id}.pages"));
    let raw = fs::read(&path).unwrap();
    let mut failed = 0;
    for at in (0..raw.len()).step_by(7) {
        let mut damaged = raw.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).unwrap();
        match written() {
            Ok(text) => assert_eq!(text, whole, "byte {at}"),
            Err(error) => {
                let why = why_everything(error).unwrap_or_else(|error| panic!("byte {at}: {error}"));
                assert!(why.contains("remembers cannot be read"), "{why}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "no byte of {} was read", raw.len());
}
