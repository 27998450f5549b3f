//! Which of the files that come belong to the start-up set, told as each of them comes.
//!
//! `plan` knows all files before it chooses; here the server sends in its own order, and what it will send is unknown. So
//! the databases whose catalogs count are chosen before, and each file is taken that fits into what is left. The room
//! for transaction states goes to recent ones, by their time: older segments are not read by a start.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use crate::backup::plan::{Compartment, SLRU_BYTES_MAX, START_SET_BYTES_MAX, compartment, is_catalog};
use crate::backup::server_facts::Database;
use crate::repo::entry::TreePath;

/// Chooses the files of the start-up set.
#[derive(Debug)]
pub struct StartSet {
    databases: Vec<u32>,
    states_since: Timestamp,
    room: u64,
    states_room: u64,
}

/// The catalogs of a database are 8 MiB; more of them than this do not fit beside everything else.
const DATABASES_MAX: usize = 5;
/// The database whose catalogs a start reads first.
const POSTGRES: &str = "postgres";
/// A segment of transaction states that was not written for so long is an old one.
const STATES_AGE_MAX: SignedDuration = SignedDuration::from_hours(24);

impl StartSet {
    /// Prepares for a cluster with these databases, whose backup started at a moment of the server's clock.
    pub fn new(databases: &[Database], started: Timestamp) -> Self {
        let mut ranked: Vec<&Database> = databases.iter().collect();
        ranked.sort_by_key(|database| {
            (database.name != POSTGRES, std::cmp::Reverse(database.size_bytes), database.oid)
        });
        Self {
            databases: ranked.iter().take(DATABASES_MAX).map(|database| database.oid.0).collect(),
            states_since: started.saturating_sub(STATES_AGE_MAX).unwrap_or(Timestamp::MIN),
            room: START_SET_BYTES_MAX,
            states_room: SLRU_BYTES_MAX,
        }
    }

    /// Tells whether a file belongs to it, and gives it its room.
    pub fn takes(&mut self, path: &TreePath, size: u64, modified: Timestamp) -> bool {
        let belongs = match compartment(path.as_bytes()) {
            Compartment::Global | Compartment::Configuration => true,
            Compartment::Slru => modified >= self.states_since && size <= self.states_room,
            Compartment::Database(oid) => {
                // What pg_filenode.map names is not known before that file has come.
                self.databases.contains(&oid) && is_catalog(path.split().1, &BTreeSet::new())
            }
            Compartment::Other => false,
        };
        if !belongs || size > self.room {
            return false;
        }
        self.room -= size;
        if compartment(path.as_bytes()) == Compartment::Slru {
            self.states_room -= size;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::pg::Oid;

    use super::*;

    fn database(oid: u32, name: &str, size: u64) -> Database {
        Database {
            oid: Oid(oid),
            name: name.to_owned(),
            size_bytes: Some(size),
            locale_provider: "c".to_owned(),
            collate: "C".to_owned(),
            collation_version: None,
        }
    }

    #[test]
    fn what_a_start_needs_is_taken_as_far_as_there_is_room() {
        let databases: Vec<Database> = (0..10u32)
            .map(|n| database(16_500 + n, &format!("db{n}"), u64::from(n) << 20))
            .chain([database(5, "postgres", 7 << 20)])
            .collect();
        let now: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
        let old: Timestamp = "2026-11-10T10:15:00Z".parse().unwrap();
        let mut set = StartSet::new(&databases, now);
        let mut takes =
            |path: &str, size: u64, at: Timestamp| set.takes(&TreePath::new(path).unwrap(), size, at);
        for path in ["data/global/1262", "data/pg_xact/0001", "data/postgresql.conf", "data/base/5/1259"] {
            assert!(takes(path, 8192, now), "{path}");
        }
        assert!(takes("data/base/16509/1259", 8192, old) && takes("data/base/16509/PG_VERSION", 3, old));
        for path in ["data/base/16500/1259", "data/base/5/16400", "data/pg_logical/x", "data/pg_xact/0000"] {
            assert!(!takes(path, 8192, old), "{path}");
        }
        // No segment of states is beyond their room, and nothing beyond all of it.
        assert!(
            takes("data/pg_xact/0002", SLRU_BYTES_MAX - 8192, now) && !takes("data/pg_xact/0003", 1, now)
        );
        assert!(
            !takes("data/base/5/1249", START_SET_BYTES_MAX, now) && takes("data/base/5/1249", 1 << 20, now)
        );
    }
}
