//! Holes in the WAL and timelines: what `walden info` shows of them, and what `walden clone create` makes of them.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::site::{Source, listing};
use crate::support::{Need, Options, Run, Stop, require, wait_for};

const CLOCK: &str = "select pg_sleep(0.01); select clock_timestamp(); select pg_sleep(0.01)";

/// A source with one row in each of some segments, behind a basebackup.
struct Rows {
    source: Source,
    /// The segment with the commit of each row.
    segments: Vec<String>,
    /// Between the commit of each row and the next.
    times: Vec<String>,
    transactions: Vec<String>,
}

impl Rows {
    #[track_caller]
    fn make(count: usize) -> Self {
        let source = Source::start(Options::default().initdb("--wal-segsize=1"));
        source.sql("create table rows (n int)");
        source.backup_at_rest();
        let (segments, times, transactions) = (Vec::new(), Vec::new(), Vec::new());
        let mut rows = Self { source, segments, times, transactions };
        (0..count).for_each(|_| rows.add());
        rows
    }

    fn add(&mut self) {
        let n = self.segments.len() + 1;
        let insert = format!("begin; insert into rows values ({n}); select pg_current_xact_id(); commit");
        self.transactions.push(self.source.sql(&insert));
        self.times.push(self.source.sql(CLOCK).trim().to_owned());
        self.segments.push(self.source.archive_wal());
    }

    /// The file of a segment in the repository.
    #[track_caller]
    fn object(&self, segment: &str) -> PathBuf {
        let files = listing(&self.source.walden.repository());
        files.into_keys().find(|path| path.ends_with(segment)).unwrap()
    }

    #[track_caller]
    fn info(&self) -> Value {
        self.source.walden.json(&["info"])["clusters"][0].clone()
    }

    #[track_caller]
    fn check(&self, name: &str, options: &[&str], expected: &str) {
        let clone = self.source.clone(name, options);
        assert_eq!(clone.sql("select string_agg(n::text, '' order by n) from rows"), expected, "{options:?}");
        clone.run("delete");
    }

    #[track_caller]
    fn refused(&self, options: &[&str]) -> Run {
        let walden = self.source.walden.as_root();
        let run = walden.try_run(&[&["clone", "create", "vain"], options].concat()).expect_code(1);
        assert!(!self.source.clones().join("vain").exists(), "{options:?} left a folder");
        run
    }

    /// Ends recovery on the source itself, so that it goes on with the next timeline.
    fn promote(&mut self) {
        self.source.cluster.stop(Stop::Fast);
        self.source.scratch().file("data/recovery.signal", "");
        self.source.cluster.set("restore_command", "false");
        self.source.cluster.start();
        self.source.sql("select pg_sleep(0.1) from generate_series(1, 100) where pg_is_in_recovery()");
    }
}

#[test]
fn a_clone_ends_before_a_hole_only_where_that_is_asked_for() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let rows = Rows::make(4);
    let whole = rows.info();
    assert_eq!(whole["timelines"][0]["holes"], serde_json::json!([]));
    assert_eq!(whole["timelines"][0]["windows"][0]["hole"], Value::Null);
    assert_eq!(whole["basebackups"][0]["recoverable"], true);
    // Failure 26: a target before the end of the backup, or after the last commit.
    let early = rows.refused(&["--target-time", "2001-01-01 00:00:00+00"]);
    assert!(early.stderr.contains("before"), "{}", early.stderr);
    let late = rows.refused(&["--target-time", &rows.times[3]]);
    assert!(late.stderr.contains("the archive ends before"), "{}", late.stderr);

    let missing = &rows.segments[2];
    fs::remove_file(rows.object(missing)).unwrap();
    let info = rows.info();
    let window = &info["timelines"][0]["windows"][0];
    assert_eq!(info["timelines"][0]["holes"][0]["first"], **missing);
    assert_eq!(window["hole"]["missing"][0]["last"], **missing);
    assert_eq!(window["hole"]["behind"][0]["first"], *rows.segments[3]);
    assert_eq!(info["basebackups"][0]["recoverable"], true);
    let last = window["last_transaction_at"].as_str().unwrap();
    let between = format!("select '{last}' between '{}' and timestamptz '{}'", rows.times[0], rows.times[1]);
    assert_eq!(rows.source.sql(&between), "t", "{window}");
    let text = rows.source.walden.run(&["info"]).stdout;
    assert!(text.contains(&format!("it ends there because WAL segment {missing} is missing")), "{text}");

    let end = window["end_lsn"].as_str().unwrap();
    for target in [&[][..], &["--target-time", &rows.times[1]], &["--target-xid", &rows.transactions[3]]] {
        let refused = rows.refused(target).stderr;
        assert!(refused.contains(&format!("WAL segment {missing} is missing from the archive")), "{refused}");
        assert!(refused.contains(&format!("to {end}")) && refused.contains("--until-hole"), "{refused}");
    }
    // What lies before the hole needs no leave.
    rows.check("time", &["--target-time", &rows.times[0]], "1");
    rows.check("transaction", &["--target-xid", &rows.transactions[1]], "12");
    rows.check("hole", &["--until-hole"], "12");
    rows.check("behind", &["--until-hole", "--target-xid", &rows.transactions[3]], "12");
    let told = rows.source.walden.as_root().run(&["clone", "create", "told", "--no-start", "--until-hole"]);
    assert!(
        told.stderr.contains(&format!("before a hole: WAL segment {missing} is missing")),
        "{}",
        told.stderr
    );
    rows.source.walden.as_root().run(&["clone", "delete", "told"]);
}

/// Failure 21b: the stop segment was archived, an earlier one not, and the basebackup counted as good.
#[test]
fn failure_21b_a_basebackup_without_all_its_wal_is_shown_as_what_it_is() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let rows = Rows::make(1);
    let start = rows.info()["basebackups"][0]["start_lsn"].as_str().unwrap().to_owned();
    let needed = rows.source.sql(&format!("select pg_walfile_name('{start}')"));
    fs::remove_file(rows.object(&needed)).unwrap();
    let info = rows.info();
    assert_eq!(info["basebackups"][0]["recoverable"], false);
    let reason = format!("WAL segment {needed} is missing from the archive");
    assert_eq!(info["basebackups"][0]["reason"], *reason);
    assert_eq!(info["timelines"][0]["windows"], serde_json::json!([]));
    let listed = &rows.source.walden.json(&["list"])["basebackups"][0];
    assert_eq!(
        (&listed["recoverable"], &listed["unrecoverable_because"]),
        (&false.into(), &(*reason).into())
    );
    let text = rows.source.walden.run(&["list"]).stdout;
    assert!(text.contains(&format!("cannot be recovered: {reason}")), "{text}");
    for options in [&[][..], &["--until-hole"]] {
        let refused = rows.refused(options).stderr;
        assert!(refused.contains("cannot be recovered") && refused.contains(&reason), "{refused}");
    }
}

#[test]
fn info_needs_no_private_key_and_says_what_it_cannot_know() {
    require!(Need::PostgreSQL(15));
    let rows = Rows::make(1);
    let file = rows.source.walden.configuration_file();
    let configuration = fs::read_to_string(&file).unwrap();
    fs::write(&file, configuration.replace("private_key_file = \"test.pem\"\n", "")).unwrap();
    let info = rows.info();
    let window = &info["timelines"][0]["windows"][0];
    assert_eq!(window["last_transaction_at"], Value::Null);
    assert_eq!(window["last_transaction_unknown"], "there is no private key here");
    assert!(window["archived_at"].is_string(), "{window}");
    let text = rows.source.walden.run(&["info"]).stdout;
    assert!(text.contains("to at most") && text.contains("there is no private key here"), "{text}");
}

#[test]
fn info_shows_the_timelines_and_what_leads_to_them() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut rows = Rows::make(2);
    rows.promote();
    // The timeline has a name and no WAL yet: the archive ends with that of its parent, of whose last segment the server
    // archives what it has, and without that recovery would be refused.
    wait_for("the partial", || {
        let info = rows.info();
        (info["timelines"][0]["partials"].as_array()?.len() == 1 && info["timelines"][1].is_object())
            .then_some(())
    });
    rows.check("promoted", &[], "12");
    rows.add();
    rows.source.backup_at_rest();
    rows.add();
    let info = rows.info();
    let (first, second) = (&info["timelines"][0], &info["timelines"][1]);
    assert_eq!((&first["timeline"], &first["parent"]), (&1.into(), &Value::Null));
    assert_eq!((&second["timeline"], &second["parent"]), (&2.into(), &1.into()));
    assert!(second["switch_lsn"].is_string());
    // The server archives the segment it left unfinished.
    assert_eq!(first["partials"].as_array().unwrap().len(), 1, "{first}");
    assert_eq!(first["windows"][0]["partial"], first["partials"][0]);
    assert_eq!(second["windows"][0]["basebackups"].as_array().unwrap().len(), 2, "{second}");
    assert_eq!(second["windows"][0]["partial"], Value::Null);
    rows.check("newest", &["--backup", "latest~1"], "1234");
    // The newest basebackup does not lead to timeline 1, so an older one is taken.
    rows.check("first", &["--target-timeline", "1"], "12");

    // Without the last segment of timeline 1 the first basebackup leads no further, and the second is not touched.
    let missing = rows.segments[1].clone();
    fs::remove_file(rows.object(&missing)).unwrap();
    let info = rows.info();
    let windows = info["timelines"][1]["windows"].as_array().unwrap();
    let reaches: Vec<_> =
        windows.iter().map(|window| window["reaches_timeline"].as_bool().unwrap()).collect();
    assert_eq!(reaches, [false, true], "{windows:?}");
    assert_eq!(windows[0]["hole"]["missing"][0]["first"], *missing);
    let refused = rows.refused(&["--backup", "latest~1"]).stderr;
    assert!(refused.contains(&format!("WAL segment {missing} is missing")), "{refused}");
    rows.check("second", &[], "1234");
    rows.check("until", &["--backup", "latest~1", "--until-hole"], "1");
}
