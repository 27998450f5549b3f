//! The real basebackup that the made-up one is a child of: everything it has is in that as well, as it was.

use std::sync::Arc;

use walden::repo::entry::{Content, Entry, Node, TreePath};
use walden::repo::manifest::ManifestContent;
use walden::repo::{
    self, Basebackup, BasebackupWriter, BeginOptions, FileReader, NamedChunks, ParentBasebackup, Repository,
};

/// Databases below are the templates and postgres.
const FIRST_NORMAL_OID: u32 = 16_384;

/// Announces the child.
pub async fn begin(repository: &Repository, parent: &Basebackup) -> Result<BasebackupWriter, repo::Error> {
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
pub async fn everything_of(parent: &Basebackup) -> Result<ManifestContent, repo::Error> {
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
pub async fn name_maps(
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
pub fn folders_of_databases(entries: &[Entry]) -> Vec<TreePath> {
    let is_database = |entry: &&Entry| {
        let (folder, name) = entry.path.split();
        let oid = std::str::from_utf8(name).ok().and_then(|name| name.parse::<u32>().ok());
        entry.node == Node::Directory
            && folder == b"data/base"
            && oid.is_some_and(|oid| oid >= FIRST_NORMAL_OID)
    };
    entries.iter().filter(is_database).map(|entry| entry.path.clone()).collect()
}
