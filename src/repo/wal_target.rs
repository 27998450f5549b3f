//! What an object of the archive is called: its key, its identity, its name in messages, and how large it may be.
//!
//! Deliberately absent: what is in it (`wal_object`, `wal_reading`).

use crate::pg::{TimelineId, WalSegmentName};
use crate::repo::error::Error;
use crate::repo::id::ClusterId;
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::layout::WalObjectName;
use crate::repo::repository::Repository;
use crate::repo::wire::WireError;
use crate::storage::ObjectKey;

/// The largest file that is one object.
pub const WAL_RAW_BYTES_MAX: u64 = 64 << 20;
/// A segment that does not compress, its index and its header.
pub(super) const WAL_OBJECT_BYTES_MAX: u64 = WAL_RAW_BYTES_MAX + (2 << 20);

/// An object of the archive, whether it is there or not.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) key: ObjectKey,
    pub(super) identity: Identity,
    /// What it is called in messages.
    pub(super) object: String,
    /// Its name in the WAL of its cluster; a timeline history file has none.
    pub(super) name: Option<WalObjectName>,
}

impl Target {
    /// The segment it is, or is about; a timeline history file has none.
    pub(super) fn segment(&self) -> Option<WalSegmentName> {
        self.name.map(|name| name.segment())
    }

    /// Says what is wrong with its header.
    pub(super) fn damaged_header(&self, error: WireError) -> Error {
        Error::damaged(&self.object, format!("its header {error}"))
    }
}

pub(super) fn wal_target(repository: &Repository, cluster: ClusterId, name: WalObjectName) -> Target {
    let key = repository.layout().wal_object(cluster, name);
    let leaf = key.as_str().rsplit('/').next().unwrap_or_default().to_owned();
    let timeline = Some(name.segment().timeline());
    let object = format!("WAL file {leaf}");
    let identity = Identity { name: leaf, ..repository.identity(ObjectKind::Wal, cluster, timeline) };
    Target { key, identity, object, name: Some(name) }
}

pub(super) fn history_target(repository: &Repository, cluster: ClusterId, timeline: TimelineId) -> Target {
    let name = format!("{}.history", timeline.hex8());
    let object = format!("timeline history file {name}");
    let identity = Identity { name, ..repository.identity(ObjectKind::History, cluster, Some(timeline)) };
    Target { key: repository.layout().history(cluster, timeline), identity, object, name: None }
}
