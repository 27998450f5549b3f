//! One checksum for every table of every database, to say that two clusters hold the same rows.
//!
//! The order of rows does not count: their hashes are added up. Left out: unlogged tables, which a recovery
//! empties, and sequences, which it may leave ahead.

use std::collections::BTreeMap;

use super::Sql;

/// Writes, for each table of the database, the query that sums it up; `\gexec` runs them.
const QUERIES: &str = r"
    begin isolation level repeatable read;
    set extra_float_digits = 3;
    set timezone = 'UTC';
    select format(
        'select %L, count(*) || '':'' || coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) from only %s t',
        c.oid::regclass, c.oid::regclass)
    from pg_class c
    where c.relkind in ('r', 'm') and c.relpersistence = 'p' and c.oid >= 16384
        and c.relnamespace <> 'pg_toast'::regnamespace
        and (c.relkind = 'r' or c.relispopulated)
    order by c.oid
    \gexec
    commit;
";

/// The rows of a cluster, reduced to a count and a sum for each table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksums {
    tables: BTreeMap<String, String>,
}

impl Checksums {
    /// Reads every table of every database.
    #[track_caller]
    pub fn of(sql: &Sql) -> Self {
        let mut tables = BTreeMap::new();
        for database in sql.databases() {
            let lines = sql.in_database(&database).sql(QUERIES);
            for line in lines.lines() {
                let (table, sum) = line.rsplit_once('|').expect("each query returns a name and a sum");
                tables.insert(format!("{database}.{table}"), sum.to_owned());
            }
        }
        Self { tables }
    }

    /// Returns how many tables there are.
    pub fn len(&self) -> usize {
        self.tables.len()
    }

    /// Lists the tables that are not the same in both, with their counts and sums.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let names: std::collections::BTreeSet<&String> =
            self.tables.keys().chain(other.tables.keys()).collect();
        let sums = names.into_iter().map(|name| (name, self.tables.get(name), other.tables.get(name)));
        sums.filter(|(_, one, two)| one != two)
            .map(|(name, one, two)| format!("{name}: {one:?}, {two:?}"))
            .collect()
    }

    /// Panics with the tables that differ.
    #[track_caller]
    pub fn assert_same(&self, other: &Self) {
        let differences = self.differences(other);
        assert!(differences.is_empty(), "{} tables differ:\n{}", differences.len(), differences.join("\n"));
        assert!(!self.tables.is_empty(), "there are no tables to compare");
    }
}
