//! Where an instant restore puts what lies beside PGDATA: tablespaces mapped and in their old place, those that recovery
//! makes, and a `pg_wal` that was a link.

use std::fs;
use std::path::Path;

use crate::instant_scene::{Scene, word};
use crate::support::{Checksums, Need, Options, Stop, require};

/// A source with two tablespaces in its basebackup and one that came after it, and what it holds.
fn source() -> (Scene, Checksums) {
    let scene = Scene::start(Options::default().setting("autovacuum", "off"));
    for name in ["one", "two"] {
        let folder = scene.source.scratch().folder(name);
        scene.source.sql(&format!("create tablespace {name} location '{}'", folder.display()));
        let rows = "select n, md5(n::text) as t from generate_series(1, 50000) n";
        scene.source.sql(&format!("create table in_{name} tablespace {name} as {rows}"));
        scene.source.sql(&format!("create index on in_{name} (t) tablespace {name}"));
    }
    scene.source.sql("create table here as select n from generate_series(1, 50000) n; checkpoint");
    scene.source.backup();
    scene.source.sql("update in_one set n = -n where n % 3 = 0; delete from in_two where n % 7 = 0");
    scene.source.archive_wal();
    let rows = Checksums::of(&scene.source);
    (scene, rows)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The folder that PostgreSQL has in a tablespace.
#[track_caller]
fn assert_is_tablespace(place: &Path) {
    let names: Vec<_> = fs::read_dir(place).unwrap().map(|it| it.unwrap().file_name()).collect();
    let names: Vec<_> = names.iter().map(|name| name.to_str().unwrap()).collect();
    assert!(names.len() == 1 && names[0].starts_with("PG_15_"), "{names:?}");
}

#[test]
fn tablespaces_answer_where_they_are_mapped_and_are_plain_in_the_end() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let (scene, rows) = source();
    let (one, two) = (scene.source.place("new-one"), scene.source.place("new-two"));
    let oid = scene.source.sql("select oid from pg_tablespace where spcname = 'two'");
    let maps = [format!("one={}", text(&one)), format!("{oid}={}", text(&two))];
    let unmapped = scene.place("refused").try_begin(&[]).expect_code(1);
    assert!(unmapped.stderr.contains("is not empty"), "{}", unmapped.stderr);
    let (restored, report) =
        scene.answering("restored", &["--tablespace-map", &maps[0], "--tablespace-map", &maps[1]]);
    assert_eq!(word(&report, "state"), "answering");
    let places: Vec<&str> =
        report["tablespaces"].as_array().unwrap().iter().map(|it| word(it, "directory")).collect();
    assert_eq!(places, [text(&one), text(&two)]);
    rows.assert_same(&Checksums::of(&restored));
    restored
        .sql("update in_one set n = n + 1 where n % 5 = 0; insert into in_two values (0, 'new'); checkpoint");
    let changed = Checksums::of(&restored);

    restored.finish();
    changed.assert_same(&Checksums::of(&restored));
    restored.stop();
    restored.assert_plain_with(&[&one, &two]);
    assert_is_tablespace(&one);
    assert_is_tablespace(&two);
    restored.assert_checksums();
    restored.assert_starts_natively();
    changed.assert_same(&Checksums::of(&restored));
    let location = restored.sql(&format!("select pg_tablespace_location({oid})"));
    assert_eq!(location, text(&two));
    restored.stop();
    // The source had them all the time.
    rows.assert_same(&Checksums::of(&scene.source));
    scene.source.sql("checkpoint");
}

/// A host that lost everything but its store: the same places, empty.
#[test]
fn a_lost_cluster_answers_in_its_own_place_with_its_tablespaces() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let (mut scene, _) = source();
    let late = scene.source.scratch().folder("late");
    scene.source.sql(&format!("create tablespace late location '{}'", text(&late)));
    scene.source.sql("create table in_late tablespace late as select n from generate_series(1, 5000) n");
    scene.source.sql("create index on here (n) tablespace late");
    scene.source.archive_wal();
    let rows = Checksums::of(&scene.source);
    scene.source.cluster.stop(Stop::Fast);
    let data = scene.source.data_directory().to_owned();
    let places = ["one", "two", "late"].map(|name| scene.source.place(name));
    for lost in [&[data.clone()][..], &places].concat() {
        fs::rename(&lost, lost.with_extension("lost")).unwrap();
    }
    for name in ["one", "two", "late"] {
        scene.source.scratch().folder(name);
    }
    let restored = scene.at(data);
    let report = restored.begin(&["--no-hydrate"]);
    let directories: Vec<&str> =
        report["tablespaces"].as_array().unwrap().iter().map(|it| word(it, "directory")).collect();
    assert_eq!(directories, [text(&places[0]), text(&places[1])]);
    rows.assert_same(&Checksums::of(&restored));
    restored.sql("insert into in_late values (0); insert into in_one values (0, 'new'); checkpoint");
    let changed = Checksums::of(&restored);
    restored.finish();
    restored.stop();
    let [one, two, late] = &places;
    restored.assert_plain_with(&[one, two, late]);
    for place in &places {
        assert_is_tablespace(place);
    }
    restored.assert_checksums();
    restored.assert_starts_natively();
    changed.assert_same(&Checksums::of(&restored));
    restored.stop();
}

/// What the WAL would make over somebody's files is refused as a plain restore refuses it.
#[test]
fn a_tablespace_that_replay_would_make_over_the_sources_is_refused() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = Scene::start(Options::default());
    scene.source.sql("create table kept as select n from generate_series(1, 100) n");
    scene.source.backup();
    let late = scene.source.scratch().folder("late");
    scene.source.sql(&format!("create tablespace late location '{}'", text(&late)));
    scene.source.sql("create table in_late tablespace late as select 1 as n");
    scene.source.archive_wal();
    let restored = scene.place("refused");
    let refused = restored.try_begin(&[]).expect_code(1);
    assert!(refused.stderr.contains("recovery would create tablespace"), "{}", refused.stderr);
    assert!(!restored.directory.exists());
    assert_eq!(scene.holds().open_pins, 0);
}

/// `initdb --waldir`: the link leads to the source's WAL, which a restored server must not write to.
#[test]
fn a_pg_wal_on_a_volume_of_its_own_becomes_a_directory() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let mut scene = Scene::start(Options::default().initdb("--wal-segsize=1"));
    let volume = scene.source.place("wal");
    scene.source.cluster.stop(Stop::Fast);
    let link = scene.source.data_directory().join("pg_wal");
    fs::rename(&link, &volume).unwrap();
    std::os::unix::fs::symlink(&volume, &link).unwrap();
    scene.source.cluster.start();
    scene.source.sql("create table marks as select generate_series(1, 1000) n");
    scene.source.backup();
    scene.source.sql("insert into marks values (0)");
    scene.source.archive_wal();
    let rows = Checksums::of(&scene.source);

    let (restored, report) = scene.answering("restored", &[]);
    let told = report["warnings"].to_string();
    assert!(told.contains("was a link to") && told.contains(text(&volume)), "{told}");
    rows.assert_same(&Checksums::of(&restored));
    restored.sql("insert into marks values (-1); select pg_switch_wal()");
    restored.finish();
    restored.stop();
    restored.assert_plain();
    restored.assert_starts_natively();
    assert_eq!(restored.sql("select count(*) from marks where n < 0"), "1");
    restored.stop();
    let of_timeline_2 = |folder: &Path| {
        let names = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with("00000002")).count()
    };
    assert!(of_timeline_2(&restored.directory.join("pg_wal")) > 0);
    assert_eq!(of_timeline_2(&volume), 0, "the restored server wrote to the source's WAL");
    rows.assert_same(&Checksums::of(&scene.source));
}
