//! One sum for every table of every database: the proof that two clusters hold the same rows.
//!
//! The order of rows does not count: their hashes are added up, and rows that are there twice count twice. Left
//! out: unlogged tables, which a recovery empties.

use std::collections::BTreeMap;

use crate::instance::demo::error::DemoError;
use crate::replication::{ConnectOptions, Session};

/// Writes, for each table of a database, the query that sums it up.
const QUERIES: &str = "
    select c.oid::regclass::text, format(
        'select count(*) || '' rows, '' || coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) from only %s t',
        c.oid::regclass)
    from pg_class c
    where c.relkind in ('r', 'm') and c.relpersistence = 'p' and c.oid >= 16384
        and c.relnamespace <> 'pg_toast'::regnamespace
        and (c.relkind = 'r' or c.relispopulated)
    order by 1";

/// The settings that decide how a row looks as text, and one snapshot for all tables.
const BEGIN: &str = "set timezone = 'UTC'; set extra_float_digits = 3; begin isolation level repeatable read";

/// The rows of a cluster, reduced to a count and a sum for each table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Checksums {
    tables: BTreeMap<String, String>,
}

impl Checksums {
    /// Reads every table of every database.
    pub(super) async fn of(server: &ConnectOptions) -> Result<Self, DemoError> {
        let databases = "select datname from pg_database where datallowconn and datname <> 'template0'";
        let first = Session::connect(server).await?;
        let mut tables = BTreeMap::new();
        for database in values(first.simple(databases).await?) {
            let session = Session::connect(&server.with("dbname", &database[0])?).await?;
            session.simple(BEGIN).await?;
            for table in values(session.simple(QUERIES).await?) {
                let sum = values(session.simple(&table[1]).await?).concat().concat();
                tables.insert(format!("{}.{}", database[0], table[0]), sum);
            }
        }
        Ok(Self { tables })
    }

    /// Returns how many tables there are.
    pub(super) fn len(&self) -> u64 {
        self.tables.len() as u64
    }

    /// Fails with the tables that are not the same in both.
    pub(super) fn compare(&self, clone: &Self) -> Result<(), DemoError> {
        let missing = "missing".to_owned();
        let names =
            self.tables.keys().chain(clone.tables.keys().filter(|name| !self.tables.contains_key(*name)));
        let tables: Vec<String> = names
            .map(|name| (name, self.tables.get(name), clone.tables.get(name)))
            .filter(|(_, source, clone)| source != clone)
            .map(|(name, source, clone)| {
                format!("{name} ({}; {})", source.unwrap_or(&missing), clone.unwrap_or(&missing))
            })
            .collect();
        if tables.is_empty() { Ok(()) } else { Err(DemoError::Different { tables }) }
    }
}

/// Reads rows whose columns are never null.
fn values(rows: Vec<Vec<Option<String>>>) -> Vec<Vec<String>> {
    rows.into_iter().map(|row| row.into_iter().map(Option::unwrap_or_default).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tables: &[(&str, &str)]) -> Checksums {
        let owned = |(name, sum): &(&str, &str)| ((*name).to_owned(), (*sum).to_owned());
        Checksums { tables: tables.iter().map(owned).collect() }
    }

    #[test]
    fn every_table_that_differs_is_named_whichever_side_lacks_it() {
        let source = of(&[("a", "1 rows, 7"), ("b", "2 rows, 8"), ("c", "0 rows, 0")]);
        source.compare(&source).unwrap();
        let clone = of(&[("b", "2 rows, 9"), ("c", "0 rows, 0"), ("d", "1 rows, 1")]);
        assert_eq!(
            source.compare(&clone).unwrap_err().to_string(),
            "source and clone differ in a (1 rows, 7; missing); b (2 rows, 8; 2 rows, 9); d (missing; 1 rows, 1)"
        );
        assert_eq!(source.len(), 3);
    }
}
