//! Adds a basebackup to a repository that says it is a terabyte of many files, and takes hardly any room.
//!
//!   bench-terabyte CONFIGURATION FILES SAMPLE [--file-bytes BYTES] [--in DATA_DIRECTORY]
//!
//! It is a child of the newest basebackup, a real one: everything of that is in it as it was, so that a server starts on
//! it, and beside it FILES relation files in the folders of the cluster's own databases, which no catalog knows: of 4.4 to
//! 5.6 MB, or of BYTES. Each has a page map of its own that names chunks of its own, 64 KiB each, in packs as many as a
//! terabyte has; only that the pages of all of them are the same, and so are some sixty bytes when they are sealed. So manifest, page maps and
//! the list of packs have the size and the shape of a real one's; what is read of the made-up files costs the store less
//! than it would. With `--in` the files stand in DATA_DIRECTORY as well, sparse, and this host's state is that of the made-up
//! basebackup (`state`): the next one finds nothing changed. Prints what it made as one line of JSON and writes the paths of up to 1000
//! of the files, from all over, into SAMPLE, below PGDATA.

mod made_up;
mod parent;
mod state;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;
use walden::catalog::basebackups;
use walden::clock::SystemClock;
use walden::codec::{Compression, SystemRandom};
use walden::config::{Config, Environment, KeyPurpose};
use walden::repo::documents::{BackupRecord, SizeRecord};
use walden::repo::entry::Entry;
use walden::repo::manifest::ManifestContent;
use walden::repo::{
    Basebackup, BasebackupWriter, Completion, Keyring, KeyringOptions, NamedChunks, Repository,
    RepositoryOptions,
};

use crate::made_up::{MadeUp, chunks_of_mean};
use crate::state::MadeUpState;

const SAMPLE_MAX: u64 = 1000;

/// What is asked for.
struct Arguments {
    configuration: PathBuf,
    files: u64,
    sample: PathBuf,
    file_bytes: Option<u64>,
    data_directory: Option<PathBuf>,
}

impl Arguments {
    fn read() -> anyhow::Result<Self> {
        let mut words = std::env::args().skip(1);
        let mut next = || words.next().context("usage: bench-terabyte CONFIGURATION FILES SAMPLE [OPTION…]");
        let (configuration, files, sample) = (next()?.into(), next()?, next()?.into());
        let files = files.parse().context("FILES is a number")?;
        let mut arguments = Self { configuration, files, sample, file_bytes: None, data_directory: None };
        while let Some(option) = words.next() {
            let value = words.next().with_context(|| format!("{option} takes a value"))?;
            match option.as_str() {
                "--file-bytes" => arguments.file_bytes = Some(value.parse().context("BYTES is a number")?),
                "--in" => arguments.data_directory = Some(value.into()),
                _ => bail!("unknown option {option}"),
            }
        }
        Ok(arguments)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::read()?;
    let Arguments { files, file_bytes, .. } = arguments;
    let environment = Environment::of_process();
    let config = Config::load(Some(&arguments.configuration), &environment)?;
    let repository = open(&config, &environment).await?;
    let newest = basebackups::list(&repository).await?.resolve("latest")?.record.id;
    let parent = Arc::new(Basebackup::open(&repository, newest).await?);
    let mut content = parent::everything_of(&parent).await?;
    let folders = parent::folders_of_databases(&content.entries);
    if folders.is_empty() {
        bail!("basebackup {newest} has no database beside the templates and postgres");
    }
    let writer = Arc::new(parent::begin(&repository, &parent).await?);
    let mut state = match &arguments.data_directory {
        Some(directory) => Some(MadeUpState::begin(&config, &repository, directory, writer.id(), &parent)?),
        None => None,
    };
    let mut made_up = MadeUp::new(writer.clone(), parent.record().started_at)?;
    for n in 0..files {
        let chunks =
            file_bytes.map_or_else(|| chunks_of_mean(n), |bytes| bytes.div_ceil(made_up::CHUNK_BYTES));
        made_up.push(n, chunks, &folders, state.as_mut()).await?;
    }
    std::fs::write(&arguments.sample, sample_of(&made_up.entries)).context("SAMPLE can be written")?;
    let (bytes, packs) = (made_up.bytes, made_up.packs);
    let (entries, mut named) = made_up.finish().await?;
    parent::name_maps(&parent, &content.entries, &mut named).await?;
    if let Some(state) = &mut state {
        state.know(&entries)?;
    }
    content.entries.extend(entries);
    let record = finish(writer, &parent, content, named, (files, bytes)).await?;
    let state_bytes = match state {
        Some(state) => state.finish(&repository, &record).await?,
        None => 0,
    };
    println!(
        "{}",
        json!({
            "basebackup": record.id.to_string(),
            "files": record.size.files,
            "bytes": record.size.database_bytes,
            "packs_made_up": packs,
            "stored_bytes": record.size.stored_bytes,
            "manifest_bytes": record.manifest.size,
            "refs_bytes": record.refs.size,
            "state_bytes": state_bytes,
        })
    );
    Ok(())
}

/// Opens the only site for reading and for writing.
async fn open(config: &Config, environment: &Environment) -> anyhow::Result<Repository> {
    let site = config.site(None)?;
    let encryption = config.encryption.as_ref().context("the benches encrypt")?;
    let reading = encryption.keyring_options(KeyPurpose::Read, Arc::new(SystemRandom))?;
    let writing = encryption.keyring_options(KeyPurpose::Write, Arc::new(SystemRandom))?;
    let keyring = Keyring::new(KeyringOptions { private_keys: reading.private_keys, ..writing });
    let clock = Arc::new(SystemClock);
    let store = site.storage.open(environment, Arc::default(), clock.clone(), Duration::MAX)?;
    Ok(Repository::open(RepositoryOptions { store, site: site.prefix.clone(), keyring, clock }).await?)
}

/// Commits the basebackup, with so many files and bytes more than its parent.
async fn finish(
    writer: Arc<BasebackupWriter>,
    parent: &Basebackup,
    content: ManifestContent,
    named: NamedChunks,
    (files, bytes): (u64, u64),
) -> anyhow::Result<BackupRecord> {
    let old = parent.record().size;
    let size = SizeRecord {
        files: old.files + files,
        database_bytes: old.database_bytes + bytes,
        ..SizeRecord::default()
    };
    let record = BackupRecord { label: Some("terabyte".to_owned()), size, ..parent.record().clone() };
    let writer = Arc::into_inner(writer).context("all uploads have ended")?;
    let completion = Completion { record, content, named, compression: Compression::default() };
    Ok(writer.finish(completion).await?)
}

/// Returns the paths of files from all over, below PGDATA, a line each.
fn sample_of(entries: &[Entry]) -> Vec<u8> {
    let step = (entries.len() as u64 / SAMPLE_MAX).max(1) as usize;
    let paths = entries.iter().step_by(step).filter_map(|entry| entry.path.strip(b"data"));
    paths.take(SAMPLE_MAX as usize).flat_map(|path| [path, b"\n"].concat()).collect()
}
