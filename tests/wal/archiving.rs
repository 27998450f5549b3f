//! Archiving under load, as different users, and into one site from the server and by hand.

use std::os::unix::fs::MetadataExt;

use crate::scene::{Scene, recover};
use crate::support::{Account, Need, Pgbench, Stop, require};

#[test]
fn a_load_is_archived_without_a_hole_and_recovered() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 1);
    Pgbench::initialize(&scene.cluster, 1);
    let load = Pgbench::start(&scene.cluster, 2);
    let mut last = String::new();
    for _ in 0..3 {
        last = scene.cluster.archive_wal();
    }
    drop(load);
    let sums = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
    let expected = scene.cluster.sql(sums);
    let end = scene.cluster.archive_wal();
    let listed = scene.walden.json(&["wal", "list"]);
    let runs = &listed["clusters"][0]["timelines"][0]["runs"];
    assert_eq!(runs.as_array().unwrap().len(), 1, "{listed:#}");
    assert_eq!(runs[0]["last"], end.as_str());
    assert!(last < end);
    let mut recovered = scene.recovering("recovered", &scene.walden.restore_command());
    recover(&mut recovered).unwrap();
    assert_eq!(recovered.sql(sums), expected);
    recovered.stop(Stop::Fast);
}

/// What root writes into a repository belongs to the repository's owner, whose archive_command comes next.
#[test]
fn a_repository_that_root_has_written_to_is_still_the_owners() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Folder);
    let scene = Scene::new(15, 1);
    let repository = scene.walden.repository();
    std::fs::remove_dir_all(repository.join("main")).unwrap();
    let segment = scene.cluster.data_directory().join("pg_wal").join(&scene.segments[0]);
    let pushed = scene.walden.as_root().run(&["wal", "push", segment.to_str().unwrap()]);
    assert!(pushed.stderr.contains("created site"), "{}", pushed.stderr);
    let account = Account::of_postgresql();
    for path in [repository.join("main/site.json"), scene.object(&scene.segments[0])] {
        assert_eq!(std::fs::metadata(&path).unwrap().uid(), account.uid, "{}", path.display());
    }
    scene.cluster.archive_wal();
    // The same again is accepted from anyone, another content under the name from nobody.
    scene.walden.run(&["wal", "push", segment.to_str().unwrap()]);
    let mut other = std::fs::read(&segment).unwrap();
    let last = other.len() - 1;
    other[last] ^= 1;
    std::fs::write(&segment, other).unwrap();
    let refused = scene.walden.try_run(&["wal", "push", segment.to_str().unwrap()]).expect_code(1);
    assert!(refused.stderr.contains("already exists with different content"), "{}", refused.stderr);
}
