//! Adds a basebackup to a repository that says it is a terabyte of many files, and takes hardly any room.
//!
//!   bench-terabyte CONFIGURATION FILES SAMPLE
//!
//! It is a child of the newest basebackup, a real one: everything of that is in it as it was, so that a server starts on
//! it, and beside it FILES relation files of 4.4 to 5.6 MB in the folders of the cluster's own databases, which no catalog
//! knows. Each has a page map of its own that names chunks of its own, 64 KiB each, in packs as many as a terabyte has;
//! only that the pages of all of them are the same, and so are some sixty bytes when they are sealed. So manifest, page maps and
//! the list of packs have the size and the shape of a real one's; what is read of the made-up files costs the store less
//! than it would. Prints what it made as one line of JSON and writes the paths of up to 1000 of the files, from all over,
//! into SAMPLE, below PGDATA.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use serde_json::json;
use tokio::task::JoinSet;
use walden::catalog::basebackups;
use walden::clock::SystemClock;
use walden::codec::{Compression, Compressor, SystemRandom};
use walden::config::{Config, Environment, KeyPurpose};
use walden::repo::documents::{BackupRecord, SizeRecord};
use walden::repo::entry::{Content, Entry, Node, TreePath};
use walden::repo::manifest::ManifestContent;
use walden::repo::page_map::PAGE_SIZE;
use walden::repo::{
    self, Basebackup, BasebackupWriter, BeginOptions, Completion, CompressedFrame, FileMap, FileReader,
    FrameKind, Keyring, KeyringOptions, MapWriter, NamedChunks, PackBuilder, ParentBasebackup, Repository,
    RepositoryOptions,
};

const PAGES_PER_CHUNK: u32 = 8;
/// A pack of 32 MiB holds what compresses to a third of 100 MB.
const FILES_PER_PACK: u64 = 20;
/// No cluster that was just made has come so far.
const FIRST_FILE_NUMBER: u64 = 1_000_000;
/// Databases below are the templates and postgres.
const FIRST_NORMAL_OID: u32 = 16_384;
const SAMPLE_MAX: u64 = 1000;
const UPLOADS_MAX: usize = 8;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [configuration, files, sample] = &arguments[..] else {
        bail!("usage: bench-terabyte CONFIGURATION FILES SAMPLE");
    };
    let files: u64 = files.parse().context("FILES is a number")?;
    let repository = open(Path::new(configuration)).await?;
    let newest = basebackups::list(&repository).await?.resolve("latest")?.record.id;
    let parent = Arc::new(Basebackup::open(&repository, newest).await?);
    let mut content = everything_of(&parent).await?;
    let folders = folders_of_databases(&content.entries);
    if folders.is_empty() {
        bail!("basebackup {newest} has no database beside the templates and postgres");
    }
    let writer = Arc::new(begin(&repository, &parent).await?);
    let mut made_up = MadeUp::new(writer.clone(), parent.record().started_at)?;
    for n in 0..files {
        made_up.push(n, &folders).await?;
    }
    std::fs::write(sample, sample_of(&made_up.entries)).context("SAMPLE can be written")?;
    let bytes = made_up.bytes;
    let (entries, mut named) = made_up.finish().await?;
    name_maps(&parent, &content.entries, &mut named).await?;
    content.entries.extend(entries);
    let old = parent.record().size;
    let size = SizeRecord {
        files: old.files + files,
        database_bytes: old.database_bytes + bytes,
        ..SizeRecord::default()
    };
    let record = BackupRecord { label: Some("terabyte".to_owned()), size, ..parent.record().clone() };
    let writer = Arc::into_inner(writer).context("all uploads have ended")?;
    let completion = Completion { record, content, named, compression: Compression::default() };
    let record = writer.finish(completion).await?;
    println!(
        "{}",
        json!({
            "basebackup": record.id.to_string(),
            "files": record.size.files,
            "bytes": record.size.database_bytes,
            "packs_made_up": files.div_ceil(FILES_PER_PACK),
            "stored_bytes": record.size.stored_bytes,
            "manifest_bytes": record.manifest.size,
            "refs_bytes": record.refs.size,
        })
    );
    Ok(())
}

/// Opens the only site for reading and for writing.
async fn open(configuration: &Path) -> anyhow::Result<Repository> {
    let environment = Environment::of_process();
    let config = Config::load(Some(configuration), &environment)?;
    let site = config.site(None)?;
    let encryption = config.encryption.as_ref().context("the benches encrypt")?;
    let reading = encryption.keyring_options(KeyPurpose::Read, Arc::new(SystemRandom))?;
    let writing = encryption.keyring_options(KeyPurpose::Write, Arc::new(SystemRandom))?;
    let keyring = Keyring::new(KeyringOptions { private_keys: reading.private_keys, ..writing });
    let clock = Arc::new(SystemClock);
    let store = site.storage.open(&environment, Arc::default(), clock.clone(), Duration::MAX)?;
    Ok(Repository::open(RepositoryOptions { store, site: site.prefix.clone(), keyring, clock }).await?)
}

async fn begin(repository: &Repository, parent: &Basebackup) -> Result<BasebackupWriter, repo::Error> {
    let record = parent.record();
    let options = BeginOptions {
        cluster: record.cluster,
        timeline: record.timeline,
        wal_floor: record.wal_floor,
        parent: Some(Arc::new(ParentBasebackup {
            record: record.clone(),
            digest: Some(parent.digest()),
            refs: parent.refs().clone(),
        })),
        host: "bench-terabyte".to_owned(),
        pid: std::process::id(),
    };
    BasebackupWriter::begin(repository, options).await
}

/// Returns what the manifest of a basebackup says.
async fn everything_of(parent: &Basebackup) -> Result<ManifestContent, repo::Error> {
    let start = parent.start();
    let mut entries = Vec::new();
    parent
        .visit_entries(|_, entry| {
            entries.push(entry.clone());
            Ok::<_, repo::Error>(())
        })
        .await?;
    let (tablespaces, links) = (start.tablespaces.clone(), start.links.clone());
    Ok(ManifestContent { entries, tablespaces, links, start_set: start.start_set.clone() })
}

/// Names the chunks that map chunks of the parent name: what entries name themselves the writer sees.
async fn name_maps(
    parent: &Arc<Basebackup>,
    entries: &[Entry],
    named: &mut NamedChunks,
) -> Result<(), repo::Error> {
    let reader = FileReader::new(parent.clone(), 16 << 20);
    for entry in entries {
        let Node::File { content: Content::Blocks(blobs), .. } = &entry.node else { continue };
        for blob in blobs {
            named.name_block(&reader.map_block(blob, entry).await?);
        }
    }
    Ok(())
}

/// Returns the folders of the databases that somebody made.
fn folders_of_databases(entries: &[Entry]) -> Vec<TreePath> {
    let is_database = |entry: &&Entry| {
        let (folder, name) = entry.path.split();
        let oid = std::str::from_utf8(name).ok().and_then(|name| name.parse::<u32>().ok());
        entry.node == Node::Directory
            && folder == b"data/base"
            && oid.is_some_and(|oid| oid >= FIRST_NORMAL_OID)
    };
    entries.iter().filter(is_database).map(|entry| entry.path.clone()).collect()
}

/// Returns the paths of files from all over, below PGDATA, a line each.
fn sample_of(entries: &[Entry]) -> Vec<u8> {
    let step = (entries.len() as u64 / SAMPLE_MAX).max(1) as usize;
    let paths = entries.iter().step_by(step).filter_map(|entry| entry.path.strip(b"data"));
    paths.take(SAMPLE_MAX as usize).flat_map(|path| [path, b"\n"].concat()).collect()
}

/// Packs files that never were, as `backup::packer` packs real ones.
struct MadeUp {
    writer: Arc<BasebackupWriter>,
    modified: Timestamp,
    pack: PackBuilder,
    maps: MapWriter,
    compressor: Compressor,
    chunk: CompressedFrame,
    uploads: JoinSet<Result<(), repo::Error>>,
    entries: Vec<Entry>,
    bytes: u64,
}

impl MadeUp {
    fn new(writer: Arc<BasebackupWriter>, modified: Timestamp) -> Result<Self, repo::Error> {
        let mut compressor = Compressor::new(Compression::default());
        // Zero pages would stand nowhere, and cost no chunk.
        let pages: Vec<u8> =
            b"made up ".iter().copied().cycle().take(PAGES_PER_CHUNK as usize * PAGE_SIZE as usize).collect();
        let chunk = CompressedFrame::compress(&mut compressor, &pages)?;
        Ok(Self {
            pack: writer.create_pack(),
            writer,
            modified,
            maps: MapWriter::default(),
            compressor,
            chunk,
            uploads: JoinSet::new(),
            entries: Vec::new(),
            bytes: 0,
        })
    }

    /// Packs file `n`, in one of the folders.
    async fn push(&mut self, n: u64, folders: &[TreePath]) -> anyhow::Result<()> {
        if n > 0 && n.is_multiple_of(FILES_PER_PACK) {
            self.close_pack().await?;
        }
        let mut map = FileMap::default();
        // Not all of one size; 640 pages are the mean.
        for _ in 0..70 + n * 37 % 21 {
            let chunk = self.pack.append(FrameKind::Data, self.chunk.clone());
            map.push(chunk, 0, PAGES_PER_CHUNK);
        }
        let size = map.page_count() * PAGE_SIZE;
        let folder = &folders[(n % folders.len() as u64) as usize];
        let path = folder.join((FIRST_FILE_NUMBER + n).to_string().as_bytes())?;
        if self.maps.finish_file(n, map) {
            self.maps.write(&mut self.pack, &mut self.compressor)?;
        }
        let node = Node::File { size, content: Content::Map(Box::default()) };
        self.entries.push(Entry { path, mode: 0o600, modified: self.modified, node });
        self.bytes += size;
        Ok(())
    }

    /// Stores what is left; returns the files, and the chunks that their maps name.
    async fn finish(mut self) -> anyhow::Result<(Vec<Entry>, NamedChunks)> {
        self.maps.write(&mut self.pack, &mut self.compressor)?;
        self.close_pack().await?;
        while let Some(outcome) = self.uploads.join_next().await {
            outcome??;
        }
        let (contents, named) = self.maps.finish();
        for (n, content) in contents {
            if let Node::File { content: place, .. } = &mut self.entries[n as usize].node {
                *place = content;
            }
        }
        Ok((self.entries, named))
    }

    async fn close_pack(&mut self) -> anyhow::Result<()> {
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack()).finish();
        if self.uploads.len() >= UPLOADS_MAX
            && let Some(outcome) = self.uploads.join_next().await
        {
            outcome??;
        }
        let writer = self.writer.clone();
        self.uploads.spawn(async move { writer.upload(pack).await.map(drop) });
        Ok(())
    }
}
