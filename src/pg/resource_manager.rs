//! Resource managers: whose record it is, and so who replays it.
//!
//! The numbers are those of the server's `rmgrlist.h`, the same from 13 to 18; from 15 on extensions have 128 and
//! above. A clone can replay a custom manager's records only with the extension's library preloaded.

use std::fmt;

use super::version::MajorVersion;

/// The resource manager of a WAL record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceManager {
    Xlog,
    Transaction,
    Storage,
    CommitLog,
    Database,
    Tablespace,
    MultiXact,
    RelationMap,
    Standby,
    Heap2,
    Heap,
    Btree,
    Hash,
    Gin,
    Gist,
    Sequence,
    SpGist,
    Brin,
    CommitTimestamp,
    ReplicationOrigin,
    Generic,
    LogicalMessage,
    /// An extension's, by its number.
    Custom(u8),
}

/// In the order of their numbers, with the names `pg_waldump` gives them.
const BUILT_IN: [(ResourceManager, &str); 22] = [
    (ResourceManager::Xlog, "XLOG"),
    (ResourceManager::Transaction, "Transaction"),
    (ResourceManager::Storage, "Storage"),
    (ResourceManager::CommitLog, "CLOG"),
    (ResourceManager::Database, "Database"),
    (ResourceManager::Tablespace, "Tablespace"),
    (ResourceManager::MultiXact, "MultiXact"),
    (ResourceManager::RelationMap, "RelMap"),
    (ResourceManager::Standby, "Standby"),
    (ResourceManager::Heap2, "Heap2"),
    (ResourceManager::Heap, "Heap"),
    (ResourceManager::Btree, "Btree"),
    (ResourceManager::Hash, "Hash"),
    (ResourceManager::Gin, "Gin"),
    (ResourceManager::Gist, "Gist"),
    (ResourceManager::Sequence, "Sequence"),
    (ResourceManager::SpGist, "SPGist"),
    (ResourceManager::Brin, "BRIN"),
    (ResourceManager::CommitTimestamp, "CommitTs"),
    (ResourceManager::ReplicationOrigin, "ReplicationOrigin"),
    (ResourceManager::Generic, "Generic"),
    (ResourceManager::LogicalMessage, "LogicalMessage"),
];

/// The lowest number an extension may have.
const CUSTOM_MIN: u8 = 128;

impl ResourceManager {
    /// Returns the manager of that number, none if a server of that version has none.
    pub fn from_number(number: u8, version: MajorVersion) -> Option<Self> {
        match BUILT_IN.get(usize::from(number)) {
            Some((manager, _)) => Some(*manager),
            None => (number >= CUSTOM_MIN && version >= MajorVersion::V15).then_some(Self::Custom(number)),
        }
    }
}

impl fmt::Display for ResourceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Custom(number) = self {
            return write!(f, "custom{number:03}");
        }
        let known = BUILT_IN.iter().find(|(manager, _)| manager == self);
        f.write_str(known.map_or("unknown", |(_, name)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_have_numbers_from_15_on() {
        assert_eq!(ResourceManager::from_number(0, MajorVersion::V13), Some(ResourceManager::Xlog));
        assert_eq!(
            ResourceManager::from_number(21, MajorVersion::V13),
            Some(ResourceManager::LogicalMessage)
        );
        assert_eq!(ResourceManager::from_number(22, MajorVersion::V18), None);
        assert_eq!(ResourceManager::from_number(128, MajorVersion::V14), None);
        let custom = ResourceManager::from_number(130, MajorVersion::V15).unwrap();
        assert_eq!((custom, custom.to_string()), (ResourceManager::Custom(130), "custom130".to_owned()));
        assert_eq!(ResourceManager::SpGist.to_string(), "SPGist");
    }
}
