//! Each recovery target, and what the clone holds when it lets the first session in.

use crate::site::Source;
use crate::support::{Need, Options, require, wait_for};

/// Rows 1 to 5 of table `marks`, each in a transaction of its own, with a target after most of them.
struct Marks {
    source: Source,
    /// After row 1.
    lsn: String,
    /// That of row 2.
    transaction: String,
    /// After row 4.
    time: String,
}

impl Marks {
    fn make() -> Self {
        let source = Source::start(Options::default());
        source.sql("create table marks (n int)");
        source.backup();
        source.sql("insert into marks values (1)");
        let lsn = source.sql("select pg_current_wal_insert_lsn()");
        let transaction =
            source.sql("begin; insert into marks values (2); select pg_current_xact_id(); commit");
        source.sql("insert into marks values (3)");
        source.sql("select pg_create_restore_point('three')");
        source.sql("insert into marks values (4)");
        let time = source.sql("select pg_sleep(0.01); select clock_timestamp(); select pg_sleep(0.01)");
        source.sql("insert into marks values (5)");
        source.archive_wal();
        Self { source, lsn, transaction, time: time.trim().to_owned() }
    }

    #[track_caller]
    fn check(&self, name: &str, options: &[&str], expected: &str) {
        let clone = self.source.clone(name, options);
        assert_eq!(clone.state(), "running", "{options:?}");
        let rows = clone.sql("select coalesce(string_agg(n::text, '' order by n), '') from marks");
        assert_eq!(rows, expected, "{options:?}");
        clone.sql("insert into marks values (9)");
        clone.run("delete");
    }
}

#[test]
fn a_clone_stops_at_its_target() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let marks = Marks::make();
    marks.check("end", &[], "12345");
    marks.check("immediate", &["--target", "immediate"], "");
    marks.check("lsn", &["--target-lsn", &marks.lsn], "1");
    marks.check("xid", &["--target-xid", &marks.transaction], "12");
    marks.check("before-xid", &["--target-xid", &marks.transaction, "--target-exclusive"], "1");
    marks.check("name", &["--target-name", "three"], "123");
    marks.check("time", &["--target-time", &marks.time], "1234");
    marks.check("before-time", &["--target-time", &marks.time, "--target-exclusive"], "1234");
}

#[test]
fn a_clone_lets_readers_in_before_its_target_where_that_is_asked_for() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let marks = Marks::make();
    for (name, options, hot_standby) in [("early", &["--read-early"][..], "on"), ("late", &[], "off")] {
        let clone = marks.source.clone(name, options);
        // Set when the server starts, so this is what recovery ran with.
        assert_eq!(clone.sql("select reset_val from pg_settings where name = 'hot_standby'"), hot_standby);
        wait_for("recovery to end", || (clone.state() == "running").then_some(()));
        assert_eq!(clone.sql("select max(n) from marks"), "5");
        clone.sql("insert into marks values (9)");
        clone.run("delete");
    }
}

#[test]
fn a_clone_waits_at_its_target_where_that_is_asked_for() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let marks = Marks::make();
    let clone = marks.source.clone("waits", &["--target-name", "three", "--target-action", "pause"]);
    assert_eq!(clone.state(), "paused");
    assert_eq!(clone.sql("select max(n), pg_is_in_recovery() from marks"), "3|t");
    assert!(clone.try_sql("insert into marks values (9)").unwrap_err().contains("read-only"));
    clone.sql("select pg_wal_replay_resume()");
    wait_for("the clone to be promoted", || (clone.state() == "running").then_some(()));
    clone.sql("insert into marks values (9)");
    clone.run("stop");
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from marks"), "4");
    clone.run("delete");
}
