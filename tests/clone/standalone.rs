//! Clones of a basebackup that carries its WAL: there is no archive they could take it from.

use crate::site::Source;
use crate::support::{Checksums, Need, Options, require, wait_for};

#[test]
fn a_clone_of_a_standalone_basebackup_needs_no_archive() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let options = Options::default().initdb("--wal-segsize=1").setting("archive_mode", "off");
    let source = Source::configured(15, options, |_, site| site);
    source.sql("create table kept as select n, md5(n::text) from generate_series(1, 20000) n");
    let taken = source.walden.json(&["backup", "--standalone"]);
    let expected = Checksums::of(&source);
    assert_eq!(taken["standalone"], true, "{taken}");
    for (name, options) in [("immediate", &["--target", "immediate"][..]), ("end", &[])] {
        let clone = source.clone(name, options);
        expected.assert_same(&Checksums::of(&clone));
        clone.amcheck();
        clone.sql("update kept set n = -n; checkpoint");
        clone.run("restart");
        wait_for("the clone to answer", || clone.answers().then_some(()));
        assert_eq!(clone.sql("select count(*) from kept where n < 0"), "20000");
        clone.run("delete");
    }
}
