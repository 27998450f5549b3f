//! PostgreSQL's own `backup_manifest` of what was packed, so that `pg_verifybackup -n` passes on a mount.
//!
//! The CRCs were taken from the buffers that were sealed; a file of which the server sent only what has changed has none.
//! `pg_verifybackup` follows links, so a file that is also reached through a link is listed under both names.
//! Configuration outside PGDATA is no part of it.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::backup::data_directory::server_path;
use crate::codec::Sha256;
use crate::pg::{
    BackupManifest, Crc32c, DataPath, Lsn, MajorVersion, ManifestChecksum, ManifestDigest, SystemIdentifier,
    TimelineId,
};
use crate::repo::entry::{Entry, Node, TreePath};

/// What the manifest says beyond the files.
#[derive(Debug, Clone, Copy)]
pub struct ManifestFacts {
    /// The server's version, which decides the manifest's.
    pub version: MajorVersion,
    /// The cluster.
    pub system_identifier: SystemIdentifier,
    /// The timeline of the WAL that is needed.
    pub timeline: TimelineId,
    /// From where to where it is needed.
    pub wal: (Lsn, Lsn),
}

impl ManifestDigest for Sha256 {
    fn update(&mut self, bytes: &[u8]) {
        Self::update(self, bytes);
    }

    fn finish(self) -> [u8; 32] {
        Self::finish(self).0
    }
}

/// Writes the manifest of `files` with their CRCs, and of what `links` reach among them.
pub fn server_manifest(
    facts: &ManifestFacts,
    files: &[Entry],
    checksums: &[Option<Crc32c>],
    links: &[Entry],
) -> Vec<u8> {
    let mut manifest = BackupManifest::new(facts.version, facts.system_identifier, Sha256::new());
    for (entry, crc) in files.iter().zip(checksums) {
        push(&mut manifest, &entry.path, entry, *crc);
    }
    let links: Vec<(&TreePath, TreePath)> = links.iter().filter_map(resolve).collect();
    if !links.is_empty() {
        let by_path: BTreeMap<&[u8], usize> =
            files.iter().enumerate().map(|(n, entry)| (entry.path.as_bytes(), n)).collect();
        for (link, target) in links {
            for n in reached(&by_path, &target) {
                let below = files[n].path.strip(target.as_bytes()).unwrap_or_default();
                let alias = if below.is_empty() { Ok(link.clone()) } else { link.join(below) };
                if let Ok(alias) = alias {
                    push(&mut manifest, &alias, &files[n], checksums[n]);
                }
            }
        }
    }
    manifest.wal_range(facts.timeline, facts.wal.0, facts.wal.1);
    manifest.finish()
}

fn push(manifest: &mut BackupManifest<Sha256>, path: &TreePath, entry: &Entry, crc: Option<Crc32c>) {
    let path = server_path(path).and_then(|path| DataPath::new(path).ok());
    if let Some(path) = path {
        let digits = crc.map(Crc32c::manifest_hex);
        let checksum = digits.as_deref().map_or(ManifestChecksum::None, ManifestChecksum::Crc32c);
        manifest.file(&path, entry.size(), entry.modified, checksum);
    }
}

/// Returns a link and where it leads, unless it leads to a directory above itself.
fn resolve(entry: &Entry) -> Option<(&TreePath, TreePath)> {
    let Node::Symlink(text) = &entry.node else {
        return None;
    };
    let mut parts: Vec<&[u8]> = entry.path.split().0.split(|byte| *byte == b'/').collect();
    for part in text.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            name => parts.push(name),
        }
    }
    let target = TreePath::new(parts.join(&b'/')).ok()?;
    entry.path.strip(target.as_bytes()).is_none().then_some((&entry.path, target))
}

/// Returns the files that are `target` or below it.
fn reached(by_path: &BTreeMap<&[u8], usize>, target: &TreePath) -> Vec<usize> {
    if let Some(file) = by_path.get(target.as_bytes()) {
        return vec![*file];
    }
    let below = [target.as_bytes(), b"/"].concat();
    let from = by_path.range::<[u8], _>((Bound::Included(&below[..]), Bound::Unbounded));
    from.take_while(|(path, _)| path.starts_with(&below)).map(|(_, n)| *n).collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use crate::repo::entry::Content;

    use super::*;

    fn entry(path: &str, node: Node) -> Entry {
        let modified = Timestamp::UNIX_EPOCH;
        Entry { path: TreePath::new(path).unwrap(), mode: 0o600, modified, node }
    }

    fn file(path: &str) -> Entry {
        entry(path, Node::File { size: 3, content: Content::Inline("abc".into()) })
    }

    #[test]
    fn files_stand_under_the_servers_names_and_under_those_of_links() {
        let files = [
            file("data/base/5/1"),
            file("data/x"),
            file("tablespaces/7/PG_15_1/5/2"),
            file("config/etc/a.conf"),
        ];
        let links = [
            entry("data/five", Node::Symlink(b"base/5".to_vec())),
            entry("data/base/x", Node::Symlink(b"../x".to_vec())),
            entry("data/base/up", Node::Symlink(b"..".to_vec())),
            entry("data/out", Node::Symlink(b"../../../etc".to_vec())),
            entry("data/dir", Node::Directory),
        ];
        let facts = ManifestFacts {
            version: MajorVersion::V15,
            system_identifier: SystemIdentifier(7),
            timeline: TimelineId::FIRST,
            wal: (Lsn(0x0200_0028), Lsn(0x0200_0100)),
        };
        let text = server_manifest(&facts, &files, &[Some(Crc32c::of(b"abc")); 4], &links);
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let paths: Vec<&str> =
            json["Files"].as_array().unwrap().iter().map(|file| file["Path"].as_str().unwrap()).collect();
        assert_eq!(paths, ["base/5/1", "x", "pg_tblspc/7/PG_15_1/5/2", "five/1", "base/x"]);
        assert_eq!(json["WAL-Ranges"][0]["End-LSN"], "0/2000100");
    }
}
