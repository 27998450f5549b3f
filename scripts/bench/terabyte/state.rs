//! The same files in a data directory and in this host's state, so that the next basebackup knows all of them.
//!
//! In the data directory they are sparse: a size, an inode and a ctime, which is all that is looked at of a file that has not
//! changed. Were one read, its pages would be zeros, which the state knows nothing of, and as many bytes as it has would
//! be read: a basebackup that does not skip them takes minutes more. What the state knew of the real files it goes on knowing.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use walden::backup::state::{
    BackupLock, KnownBlock, KnownContent, KnownFile, PageHash, RecordAt, State, StateFolder, StateWriter,
};
use walden::config::Config;
use walden::pg::{Crc32c, Crc32cDigest};
use walden::repo::chunk::ChunkRef;
use walden::repo::documents::BackupRecord;
use walden::repo::entry::{Entry, Node, TreePath};
use walden::repo::page_map::{MAP_BLOCK_PAGES, MapBlock, PAGE_SIZE};
use walden::repo::{self, Basebackup, BasebackupId, Repository};

use crate::made_up::{PAGES_PER_CHUNK, page};

/// Files that are this much older than the start are believed to be as they were.
const CTIME_MARGIN: Duration = Duration::from_secs(3);

/// A state that is being made up.
pub struct MadeUpState {
    folder: PathBuf,
    /// No basebackup of the site is taken meanwhile.
    _lock: BackupLock,
    parent: State,
    writer: StateWriter,
    data_directory: PathBuf,
    hash: PageHash,
    block: KnownBlock,
    records: Vec<RecordAt>,
    pending: Vec<(TreePath, u64, Vec<RecordAt>)>,
    crcs: Vec<(u64, Crc32c)>,
}

impl MadeUpState {
    /// Begins the state of basebackup `id`, with all that the state of its parent knows.
    pub fn begin(
        config: &Config,
        repository: &Repository,
        data_directory: &Path,
        id: BasebackupId,
        parent: &Basebackup,
    ) -> anyhow::Result<Self> {
        let path = config.paths.state.join("basebackups").join(repository.site().to_string());
        let folder = StateFolder::new(path.clone());
        let known = folder.open()?.with_context(|| format!("{} has no state", path.display()))?;
        if known.facts().backup_json != parent.digest() {
            bail!("the state in {} is not that of the newest basebackup", path.display());
        }
        let lock = folder.take_lock()?;
        let mut writer = folder.begin(&lock, id)?;
        for file in known.files() {
            let mut file = file?;
            let blocks = file.block_count();
            let copied: Result<Vec<RecordAt>, _> =
                (0..blocks).map(|n| writer.copy_block(&known, &file, n)).collect();
            if let KnownContent::Pages { records, .. } = &mut file.content {
                *records = copied?;
            }
            writer.push_file(&file)?;
        }
        let hash = known.facts().hash_key.hash(&page());
        Ok(Self {
            folder: path,
            _lock: lock,
            parent: known,
            writer,
            data_directory: data_directory.to_owned(),
            hash,
            block: KnownBlock::default(),
            records: Vec::new(),
            pending: Vec::new(),
            crcs: Vec::new(),
        })
    }

    /// Knows eight more pages of the file that is being packed.
    pub fn push_chunk(&mut self, chunk: ChunkRef) -> anyhow::Result<()> {
        self.block.map.push(chunk, 0, PAGES_PER_CHUNK);
        self.block.hashes.extend([self.hash; PAGES_PER_CHUNK as usize]);
        if self.block.hashes.len() as u64 == MAP_BLOCK_PAGES { self.end_block() } else { Ok(()) }
    }

    fn end_block(&mut self) -> anyhow::Result<()> {
        if !self.block.hashes.is_empty() {
            self.records.push(self.writer.push_block(&self.block)?);
            self.block.map = MapBlock::default();
            self.block.hashes.clear();
        }
        Ok(())
    }

    /// Makes the file, whose last page is known.
    pub fn end_file(&mut self, path: &TreePath, size: u64) -> anyhow::Result<()> {
        self.end_block()?;
        let file = File::options().write(true).create_new(true).mode(0o600).open(self.place_of(path)?)?;
        file.set_len(size)?;
        self.pending.push((path.clone(), size, std::mem::take(&mut self.records)));
        Ok(())
    }

    /// Knows all files, whose content is known by now.
    pub fn know(&mut self, entries: &[Entry]) -> anyhow::Result<()> {
        // Both are in the order in which the files were packed.
        for ((path, size, records), entry) in std::mem::take(&mut self.pending).into_iter().zip(entries) {
            let Node::File { content, .. } = &entry.node else { bail!("{path} is not a file") };
            let metadata = std::fs::metadata(self.place_of(&path)?)?;
            let changed = Timestamp::new(metadata.ctime(), metadata.ctime_nsec() as i32)?;
            let crc = self.crc_of(size);
            self.writer.push_file(&KnownFile {
                path,
                size,
                inode: metadata.ino(),
                device: metadata.dev(),
                changed,
                crc: Some(crc),
                damaged_pages: 0,
                content: KnownContent::Pages { stands: content.clone(), records },
            })?;
        }
        Ok(())
    }

    /// Ends it as the state of a committed basebackup; returns its bytes.
    pub async fn finish(self, repository: &Repository, record: &BackupRecord) -> anyhow::Result<u64> {
        tokio::time::sleep(CTIME_MARGIN).await;
        let (_, digest, _) = repo::read_outcome(repository, record.id).await?;
        let mut facts = self.parent.facts().clone();
        (facts.basebackup, facts.backup_json) = (record.id, digest);
        facts.started_at = repository.clock().now();
        self.writer.finish(&facts)?;
        let file = self.folder.join(format!("{}.pages", record.id));
        Ok(std::fs::metadata(file)?.len())
    }

    fn place_of(&self, path: &TreePath) -> anyhow::Result<PathBuf> {
        let below = path.strip(b"data").with_context(|| format!("{path} is not in the data directory"))?;
        Ok(self.data_directory.join(std::ffi::OsStr::from_bytes(below)))
    }

    /// The checksum of so many bytes of pages; there are few sizes.
    fn crc_of(&mut self, size: u64) -> Crc32c {
        if let Some((_, crc)) = self.crcs.iter().find(|(known, _)| *known == size) {
            return *crc;
        }
        let (page, mut digest) = (page(), Crc32cDigest::new());
        (0..size / PAGE_SIZE).for_each(|_| digest.update(&page));
        let crc = digest.finish();
        self.crcs.push((size, crc));
        crc
    }
}
