//! Metadata of megabytes: the file table, what is remembered, and the server's manifest, with a line for each file.
//!
//! Each is written and read in pieces, and an entry may be lost where one piece ends (failure 14).

use std::collections::BTreeSet;

use serde_json::Value;

use crate::backup::server_manifest::{ManifestFacts, server_manifest};
use crate::backup::source_file::FileState;
use crate::codec::Digest;
use crate::pg::MajorVersion;
use crate::repo::testing::time;

use super::*;

const FILES: u64 = 60_000;
/// For every so many bytes of metadata one entry was lost.
const PIECE_BYTES: u64 = 4000 << 10;

/// A name that does not compress, so that what is stored is long as well.
fn path(n: u64) -> String {
    let [one, two] = [n, !n].map(|n| hex::encode(Digest::of(&n.to_le_bytes()).as_bytes()));
    format!("data/base/16384/{}{}", one, &two[..60])
}

/// Most stand in the file table, some in chunks with others, a few by themselves.
fn content(n: u64) -> Vec<u8> {
    let len = match n {
        n if n.is_multiple_of(1000) => 70_000,
        n if n.is_multiple_of(10) => 100 + n as usize % 500,
        _ => 20,
    };
    bytes(n, len)
}

/// Takes a basebackup with the server's manifest in it and looks for every file, wherever it should be named.
async fn whole(host: &mut Host) -> (BasebackupId, WorkDone) {
    let mut copied = host.copied(false).await.unwrap();
    let facts = ManifestFacts {
        version: MajorVersion::V15,
        system_identifier: copied.today.cluster.system_identifier,
        timeline: TimelineId::FIRST,
        wal: (Lsn(0x0200_0028), Lsn(0x0200_0100)),
    };
    let packed = copied.packer.packed();
    let text = server_manifest(&facts, &packed.entries, &packed.checksums, &[]);
    let state = FileState { size: text.len() as u64, mode: 0o600, modified: time(), identity: None };
    copied.packer.push_bytes(TreePath::new(MANIFEST).unwrap(), state, text.into()).await.unwrap();
    let taken = host.completed(copied, true).await.unwrap();
    let (id, work, table_bytes) = (taken.record.id, taken.work, taken.record.manifest.size);

    let (reader, mut found) = host.restored(id).await;
    let manifest = found.remove(MANIFEST).unwrap();
    assert_eq!(found.len(), host.files.len());
    assert!(found == host.files, "basebackup {id} has other files than were there");
    for path in host.files.keys().step_by(997) {
        let entry = reader.basebackup().entry(&TreePath::new(path.as_str()).unwrap()).await.unwrap();
        assert!(entry.is_some(), "{path} is not found by its name");
    }
    assert_server_manifest(&manifest, &host.files);
    let state = host.state();
    assert_eq!((state.facts().basebackup, state.file_count()), (id, host.files.len() as u64));
    let known = state.files().map(|known| known.unwrap());
    assert!(known.map(|known| known.path.to_string()).eq(host.files.keys().cloned()), "not what was there");
    for (path, raw) in host.files.iter().step_by(97) {
        let known = state.find(&TreePath::new(path.as_str()).unwrap()).unwrap();
        assert_eq!(known.map(|known| known.size), Some(raw.len() as u64), "{path}");
    }
    let state_bytes = std::fs::metadata(state.path()).unwrap().len();
    for metadata in [table_bytes, state_bytes, manifest.len() as u64] {
        assert!(metadata > PIECE_BYTES, "{metadata} bytes of metadata are too few to lose anything");
    }
    (id, work)
}

fn assert_server_manifest(manifest: &[u8], files: &BTreeMap<String, Vec<u8>>) {
    let manifest: Value = serde_json::from_slice(manifest).unwrap();
    let listed = manifest["Files"].as_array().unwrap();
    let mut names = BTreeSet::new();
    for file in listed {
        let path = format!("data/{}", file["Path"].as_str().unwrap());
        let raw = &files[&path];
        assert_eq!(file["Size"], raw.len() as u64, "{path}");
        assert_eq!(file["Checksum"], Crc32c::of(raw).manifest_hex(), "{path}");
        names.insert(path);
    }
    assert_eq!((listed.len(), names.len()), (files.len(), files.len()));
}

#[tokio::test]
async fn failure_14_no_entry_is_lost_in_megabytes_of_metadata() {
    let mut host = Host::new().await;
    (0..FILES).for_each(|n| host.write(&path(n), content(n)));
    let (full, work) = whole(&mut host).await;
    assert_eq!(work.files_kept, 0);

    let (mut changed, mut gone, mut new) = (0, 0, 0);
    for n in (0..FILES).step_by(600) {
        host.change(&path(n), |raw| raw[1] ^= 1);
        changed += 1;
    }
    for n in (7..FILES).step_by(1000) {
        host.remove(&path(n));
        gone += 1;
    }
    for n in FILES..FILES + 500 {
        host.write(&path(n), content(n));
        new += 1;
    }
    let (second, work) = whole(&mut host).await;
    assert_eq!(host.taken.last().unwrap().decision.parent(), Some(full));
    // All that stand in the file table; the pack of the others is mostly the first one's manifest, and is written again.
    assert!(work.files_kept >= FILES - FILES / 10 - gone, "{work:?}");
    assert!(work.pages_changed >= changed + new, "{work:?}");
    assert_eq!(host.files.len() as u64, FILES - gone + new);
    assert_ne!(full, second);
}
