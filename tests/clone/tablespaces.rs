//! Source and clone on one host, and the source's tablespaces where the WAL says they are (failure 27b).

use std::fs;

use crate::site::{Source, assert_unchanged, listing};
use crate::support::{Checksums, Need, Options, require};

#[test]
fn failure_27b_a_clone_leaves_the_tablespaces_of_its_source_alone() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    // Vacuum would touch files between two looks at them.
    let source = Source::start(Options::default().setting("autovacuum", "off"));
    let folders = ["before", "after"].map(|name| source.scratch().folder(name));
    let gone = source.scratch().folder("deep/gone");
    source.sql(&format!("create tablespace before location '{}'", folders[0].display()));
    source
        .sql("create table old tablespace before as select n, md5(n::text) from generate_series(1, 20000) n");
    source.backup();
    source.sql(&format!("create tablespace after location '{}'", folders[1].display()));
    source.sql(
        "create table young tablespace after as select n, md5(n::text) from generate_series(1, 20000) n",
    );
    source.sql("create index on young (n) tablespace before; update old set n = -n where n % 2 = 0");
    // One whose place is no longer there when the clone replays it.
    source.sql(&format!("create tablespace gone location '{}'", gone.display()));
    source.sql("create table short tablespace gone as select 1 as n; drop table short; checkpoint");
    source.sql("drop tablespace gone");
    fs::remove_dir_all(source.scratch().path().join("deep")).unwrap();
    // Read first: the first reader of a row writes down that its transaction committed.
    let rows = Checksums::of(&source);
    source.sql("checkpoint");
    source.archive_wal();
    let files = folders.each_ref().map(|folder| listing(folder));

    let clone = source.clone("beside", &[]);
    rows.assert_same(&Checksums::of(&clone));
    clone.amcheck();
    clone.sql(
        "update old set n = n + 1; insert into young select n from generate_series(1, 50000) n; checkpoint",
    );
    let changed = Checksums::of(&clone);
    clone.run("stop");
    clone.run("start");
    changed.assert_same(&Checksums::of(&clone));
    clone.sql("drop table young; checkpoint");
    clone.sql("drop tablespace after");
    clone.run("delete");

    rows.assert_same(&Checksums::of(&source));
    for (folder, before) in folders.iter().zip(&files) {
        assert_unchanged(before, folder);
    }
    assert!(!source.scratch().path().join("deep").exists());
}
