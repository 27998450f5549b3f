//! Basebackups of which only what has changed comes (`UPLOAD_MANIFEST`, 17 and later), where that is not the whole truth.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::backup::{Opened, id_of, recover, verify_backup};
use crate::by_replication::{archiving, assert_equals_source, site};
use crate::support::{Account, Cluster, Need, Options, Walden, require};

/// A cluster of 18 that summarizes its WAL and has its basebackups taken by BASE_BACKUP, with a place for one walsender.
fn summarizing() -> (Cluster, Walden) {
    let options = Options::default().setting("summarize_wal", "on").setting("max_wal_senders", "1");
    let cluster = Cluster::start_with(18, options);
    let walden = archiving(&cluster);
    (cluster, walden)
}

pub fn number(outcome: &Value, name: &str) -> u64 {
    outcome[name].as_u64().unwrap_or_else(|| panic!("{name}: {outcome}"))
}

/// Whether less came from the server than the database has.
pub fn came_in_parts(outcome: &Value) -> bool {
    number(outcome, "received_bytes") * 2 < number(outcome, "database_bytes")
}

/// No summary names a page of a visibility map whose bit was cleared: of the map everything has to come.
#[test]
fn of_18_a_visibility_map_is_never_put_together() {
    require!(Need::PostgreSQL(18));
    let (cluster, walden) = summarizing();
    cluster.sql("create table t as select n, repeat('x', 100) as s from generate_series(1, 20000) n");
    cluster.sql("create index on t (n)");
    cluster.sql("vacuum freeze t");
    let map = cluster.sql("select pg_relation_filepath('t')") + "_vm";
    walden.json(&["backup"]);
    let before = fs::read(cluster.data_directory().join(&map)).unwrap();
    cluster.sql("update t set s = 'y' where n % 100 = 0");
    cluster.sql("checkpoint");
    let second = walden.json(&["backup"]);
    assert!(second["parent"].is_string() && came_in_parts(&second), "{second}");
    let opened = Opened::open(&walden.repository(), id_of(&second));
    let now = fs::read(cluster.data_directory().join(&map)).unwrap();
    assert!(before != now, "the map is as it was: nothing could go wrong");
    assert!(opened.file(&format!("data/{map}")) == now, "another map than the server's");
    cluster.archive_wal();
    let data = opened.restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    let copy = recover(&walden, 18, &data, &cluster.scratch().folder("run-copy"));
    let by_index =
        "set enable_seqscan = off; set enable_bitmapscan = off; select count(*) from t where n > 0";
    let last = |text: String| text.lines().last().unwrap_or_default().to_owned();
    assert_eq!(last(copy.sql(by_index)), "20000");
}

/// A relation that was cut and has grown again has pages of which no WAL tells: zeros, and not what was there before.
#[test]
fn of_18_what_was_cut_off_a_relation_does_not_come_back() {
    require!(Need::PostgreSQL(18));
    let (cluster, walden) = summarizing();
    cluster.sql("create table t (n int, s text)");
    cluster.sql("insert into t select n, repeat('x', 1000) from generate_series(1, 4000) n");
    walden.json(&["backup"]);
    let pages =
        |cluster: &Cluster| cluster.sql("select pg_relation_size('t') / 8192").parse::<u32>().unwrap();
    assert!(pages(&cluster) > 500);
    cluster.sql("delete from t where n > 800");
    cluster.sql("vacuum t");
    let cut = pages(&cluster);
    assert!(cut < 150, "{cut}");
    // Many pages at a time are added for it, more than it fills.
    cluster.sql("copy t from program 'seq -f %g,copied 1 60000' (format csv)");
    cluster.sql("checkpoint");
    let file = cluster.sql("select pg_relation_filepath('t')");
    let now = fs::read(cluster.data_directory().join(&file)).unwrap();
    let empty = now.chunks(8192).skip(cut as usize).filter(|page| page.iter().all(|byte| *byte == 0)).count();
    assert!(empty > 0, "no page was added that is not in use, of {} behind {cut}", now.len() / 8192);
    let second = walden.json(&["backup"]);
    assert!(second["parent"].is_string() && came_in_parts(&second), "{second}");
    let opened = Opened::open(&walden.repository(), id_of(&second));
    assert!(opened.file(&format!("data/{file}")) == now, "another file than the server's");
    cluster.archive_wal();
    assert_equals_source(&cluster, &walden, &second, "copy");
}

/// What cannot be put together, or has to be stored again, comes as a whole; so does everything once in a while.
#[test]
fn of_18_everything_comes_where_changes_do_not_do() {
    require!(Need::PostgreSQL(18));
    let (cluster, walden) = summarizing();
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    cluster
        .sql("create table far tablespace fast as select n, md5(n::text) from generate_series(1, 50000) n");
    walden.json(&["backup"]);
    // The hashes of what came first, the table in the tablespace. It is seen when they are needed.
    let state = state_of(&walden);
    let mut bytes = fs::read(&state).unwrap();
    bytes[100] ^= 1;
    fs::write(&state, bytes).unwrap();
    let run = walden.run(&["-v", "--output", "json", "backup"]);
    assert!(run.stderr.contains("the server is asked for everything"), "{}", run.stderr);
    let second: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(second["parent"].is_string() && !came_in_parts(&second), "{second}");
    let listed = walden.json(&["list"]);
    assert_eq!(listed["unfinished"].as_array().unwrap().len(), 1, "{listed}");

    let third = walden.json(&["backup"]);
    assert!(came_in_parts(&third), "{third}");
    let mut packs = files_below(&walden.repository().join("main/basebackups"));
    packs.retain(|path| path.parent().is_some_and(|folder| folder.ends_with("packs")));
    let largest = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    fs::remove_file(largest).unwrap();
    let fourth = walden.json(&["backup"]);
    assert!(fourth["parent"] == third["id"] && !came_in_parts(&fourth), "{fourth}");
    cluster.archive_wal();
    assert_equals_source(&cluster, &walden, &fourth, "fourth");

    // No faster than the limit allows, whichever way it comes.
    let limited = walden.json(&["backup", "--full", "--rate-limit", "10MiB"]);
    let seconds = limited["seconds"].as_f64().unwrap();
    let at_least = number(&limited, "received_bytes") as f64 / f64::from(10 << 20) - 0.2;
    assert!(at_least > 0.5 && seconds >= at_least, "{at_least}: {limited}");

    // The first behind it that reads all is the seventh.
    let kinds: Vec<bool> = (0..8).map(|_| came_in_parts(&walden.json(&["backup"]))).collect();
    assert_eq!(kinds.iter().position(|in_parts| !in_parts), Some(6), "{kinds:?}");
    assert!(kinds[7]);
}

/// A server that has begun to send before it is known that its changes do not do goes on for a file's length with nobody to
/// send it to, and has no place for another walsender meanwhile.
#[test]
fn of_18_everything_comes_by_the_one_place_that_is_taken() {
    require!(Need::PostgreSQL(18));
    let (cluster, walden) = summarizing();
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    cluster.sql("create table far tablespace fast as select n, md5(n::text) from generate_series(1, 1000) n");
    // A role that is refused what it asks right behind the start.
    let contents = "function pg_wal_summary_contents(bigint, pg_lsn, pg_lsn)";
    cluster.sql(&format!("revoke execute on {contents} from public, pg_monitor"));
    cluster.sql("create role sender login replication in role pg_monitor");
    cluster.sql("grant execute on function pg_switch_wal() to sender");
    let connection = cluster.connection().replace("user=postgres", "user=sender");
    assert_ne!(connection, cluster.connection());
    walden.reconfigure(cluster.scratch(), &site(&cluster).nodes(&[(&connection, "primary")]));
    let first = walden.json(&["backup"]);

    // Tablespaces are sent first, and in this one there is nothing that takes as long.
    let folder = fs::read_dir(&space).unwrap().next().unwrap().unwrap().path();
    let sparse = folder.join("sparse");
    fs::File::create(&sparse).unwrap().set_len(2 << 30).unwrap();
    Account::of_postgresql().own(&sparse);
    let run = walden.run(&["--output", "json", "backup"]);
    assert!(run.stderr.contains("does not tell its WAL summaries"), "{}", run.stderr);
    let second: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(second["parent"], first["id"], "{second}");
    assert!(number(&second, "received_bytes") > 2 << 30, "{second}");
}

/// The file of what is remembered of the last basebackup.
fn state_of(walden: &Walden) -> PathBuf {
    let found = files_below(&walden.configuration_file().with_file_name("state"));
    let mut states = found.into_iter().filter(|path| path.extension().is_some_and(|it| it == "pages"));
    states.next().expect("something is remembered")
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
