//! What `backup.json` keeps of the server: what a restore has to know before it opens anything.
//! Nothing is asked here; `server_facts` did that.

use jiff::Timestamp;

use crate::backup::server_facts::ServerFacts;
use crate::codec::Digest;
use crate::pg::{ControlFile, Lsn, TimelineId};
use crate::repo::{
    BasebackupId, ClusterId,
    documents::{BackupRecord, DatabaseCollation, ManifestPin, ObjectPin, ServerRecord, SizeRecord},
};

/// Returns the record of a server.
pub fn server_record(
    facts: &ServerFacts,
    control: &ControlFile,
    host: &str,
    outside_configuration: Vec<String>,
) -> ServerRecord {
    let versions = facts.databases.iter().filter_map(|database| {
        let version = database.collation_version.clone()?;
        Some(DatabaseCollation { database: database.name.clone(), version })
    });
    ServerRecord {
        version: facts.version_text.clone(),
        major: facts.version.number(),
        catalog_version: facts.catalog_version,
        control_version: control.control_version,
        data_checksums: facts.data_checksums,
        block_size: control.block_size,
        relation_segment_pages: control.relation_segment_pages,
        maximum_alignment: control.maximum_alignment,
        platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        libc: facts.libc_version.clone(),
        icu: facts.icu_version.clone(),
        collation_versions: versions.collect(),
        superuser: facts.bootstrap_role.clone(),
        host: host.to_owned(),
        preload_libraries: facts.setting("shared_preload_libraries").unwrap_or_default().to_owned(),
        outside_configuration,
    }
}

/// Returns a record in which everything that the writer fills in, and everything optional, is empty.
pub fn empty_record(
    id: BasebackupId,
    cluster: ClusterId,
    timeline: TimelineId,
    lsns: (Lsn, Lsn),
) -> BackupRecord {
    let nothing = Digest([0; 32]);
    BackupRecord {
        id,
        parent: None,
        parent_digest: None,
        label: None,
        cluster,
        timeline,
        start_lsn: lsns.0,
        stop_lsn: lsns.1,
        wal_floor: lsns.0,
        started_at: Timestamp::UNIX_EPOCH,
        stopped_at: Timestamp::UNIX_EPOCH,
        server: ServerRecord::default(),
        keys: Vec::new(),
        manifest: ManifestPin { size: 0, digest: nothing, head_size: 0, head_digest: nothing, start_size: 0 },
        refs: ObjectPin { size: 0, digest: nothing },
        size: SizeRecord::default(),
        wal: None,
    }
}
