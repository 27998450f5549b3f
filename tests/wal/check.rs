//! `walden wal check` on the archive of a real server: what is missing is named and put back from pg_wal.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::receive::write_segments;
use crate::receive_damage::begin_timeline;
use crate::receive_scene::{Receiver, cluster, segments_between};
use crate::scene::Scene;
use crate::support::{Need, Stop, require};

/// Failures 9 and 10 from the side of the archive: a segment and a history that are gone are found, and put back while
/// the server has them.
#[test]
fn what_is_missing_is_named_and_put_back_from_pg_wal() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut scene = Scene::new(15, 0);
    scene.cluster.sql("alter system set wal_keep_size = '64MB'");
    scene.cluster.sql("select pg_reload_conf()");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    for _ in 0..6 {
        scene.archive_row();
    }
    let whole = scene.walden.json(&["wal", "check"]);
    assert_eq!(whole["ok"], true, "{whole:#}");
    assert!(whole["clusters"][0]["objects"].as_u64().unwrap() >= 6, "{whole:#}");

    let (first, second, kept) = (&scene.segments[1], &scene.segments[2], &scene.segments[4]);
    fs::remove_file(scene.object(first)).unwrap();
    fs::remove_file(scene.object(second)).unwrap();
    let bad = scene.walden.try_run(&["wal", "check"]).expect_code(1);
    assert!(bad.stdout.contains(&format!("missing        {first} to {second} (2)")), "{}", bad.stdout);
    assert!(bad.stderr.contains("wal check --repair"), "{}", bad.stderr);

    let repaired = scene.walden.json(&["wal", "check", "--repair"]);
    assert_eq!(repaired["repaired"], serde_json::json!([first, second]), "{repaired:#}");
    assert_eq!((&repaired["ok"], &repaired["not_repaired"]), (&true.into(), &serde_json::json!([])));
    assert!(scene.object(first).is_file());

    // What the server has no more stays missing; what is damaged is told apart from that, and comes first.
    let pg_wal = scene.cluster.data_directory().join("pg_wal");
    fs::remove_file(scene.object(second)).unwrap();
    fs::remove_file(pg_wal.join(second)).unwrap();
    let lost = scene.walden.try_run(&["wal", "check", "--repair"]).expect_code(1);
    assert!(
        lost.stdout.contains(second) && lost.stderr.contains("new basebackup"),
        "{} {}",
        lost.stdout,
        lost.stderr
    );
    let path = scene.object(kept);
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let damaged = scene.walden.try_run(&["wal", "check"]).expect_code(3);
    assert!(damaged.stdout.contains(&format!("damaged        {kept}: ")), "{}", damaged.stdout);

    // A file without PostgreSQL's mark is not taken for a finished one.
    let mark = pg_wal.join(format!("archive_status/{first}.done"));
    fs::remove_file(scene.object(first)).unwrap();
    fs::remove_file(mark).unwrap();
    let unmarked = scene.walden.try_run(&["wal", "check", "--repair"]).expect_code(1);
    assert!(!unmarked.stdout.contains("archived again"), "{}", unmarked.stdout);
    assert!(unmarked.stdout.contains(&format!("place of a damaged one: {kept}")), "{}", unmarked.stdout);
}

/// Where a bit of an object is another one.
#[derive(Debug, Clone, Copy)]
enum Place {
    Header,
    Signature,
    Body,
}

fn flip(object: &Path, place: Place) {
    let mut bytes = fs::read(object).unwrap();
    let sections = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let at = match place {
        Place::Header => 40,
        // The section of the signature is the last one.
        Place::Signature => 16 + sections - 1,
        Place::Body => bytes.len() - 1,
    };
    bytes[at] ^= 1;
    fs::remove_file(object).unwrap();
    fs::write(object, bytes).unwrap();
}

fn names(of: &serde_json::Value) -> Vec<&str> {
    of.as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect()
}

#[test]
fn what_is_damaged_is_archived_again_beside_it_and_is_no_finding_any_more() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut scene = Scene::new(15, 0);
    scene.cluster.sql("alter system set wal_keep_size = '64MB'");
    scene.cluster.sql("select pg_reload_conf()");
    (0..6).for_each(|_| scene.archive_row());
    let damaged = &scene.segments[1..4];
    for (segment, place) in damaged.iter().zip([Place::Header, Place::Signature, Place::Body]) {
        flip(&scene.object(segment), place);
    }
    let standing: Vec<Vec<u8>> =
        damaged.iter().map(|segment| fs::read(scene.object(segment)).unwrap()).collect();
    let check = |options: &[&str]| scene.walden.try_run(&[&["wal", "check"], options].concat());
    let headers = check(&[]).expect_code(3);
    assert!(
        headers.stderr.contains("2 objects") && headers.stderr.contains("--repair"),
        "{}",
        headers.stderr
    );
    assert!(check(&["--bodies"]).expect_code(3).stderr.contains("3 objects"));

    let repaired = scene.walden.json(&["wal", "check", "--repair", "--bodies"]);
    assert_eq!((&repaired["replaced"], &repaired["repaired"]), (&json!(damaged), &json!([])), "{repaired:#}");
    let superseded = &repaired["clusters"][0]["superseded"];
    assert_eq!(
        (&repaired["ok"], names(superseded)),
        (&true.into(), damaged.iter().map(String::as_str).collect())
    );
    assert!(superseded[0]["by"].as_str().unwrap().starts_with(&format!("{}.forced.", damaged[0])));
    let text = check(&["--bodies"]).expect_code(0).stdout;
    assert!(text.contains(&format!("superseded     {}, by ", damaged[2])), "{text}");
    for (segment, standing) in damaged.iter().zip(&standing) {
        assert!(fs::read(scene.object(segment)).unwrap() == *standing, "{segment} was written over");
        scene.assert_fetched(segment);
    }
    scene.assert_recovers(scene.recovering("mended", &scene.walden.restore_command())).stop(Stop::Fast);

    // Nothing is passed over for the sake of what it replaced.
    flip(&forced(&scene, &damaged[0]), Place::Body);
    let both = scene.walden.try_run(&["--output", "json", "wal", "check", "--bodies"]).expect_code(3);
    let both: serde_json::Value = serde_json::from_str(&both.stdout).unwrap();
    assert_eq!(names(&both["clusters"][0]["damaged"]).len(), 2, "{both:#}");
    fs::remove_file(scene.cluster.data_directory().join("pg_wal").join(&damaged[0])).unwrap();
    let lost = check(&["--repair", "--bodies"]).expect_code(3);
    assert!(
        !lost.stdout.contains("in the place of") && lost.stderr.contains("new basebackup"),
        "{}",
        lost.stderr
    );
}

fn forced(scene: &Scene, segment: &str) -> std::path::PathBuf {
    let folder = scene.object(segment).with_file_name("");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let start = format!("{segment}.forced.");
    let mut forced = paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&start));
    forced.next().unwrap()
}

/// A server that is received from marks no segment for the archive.
#[test]
fn what_a_receiver_left_out_is_put_back_once_a_checkpoint_has_passed_it() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    write_segments(&cluster, 3);
    receiver.wait_until_stored(&cluster);
    let (first, last) = receiver.runs(1).pop().unwrap();
    let missing = segments_between(&first, &last).into_iter().nth_back(1).unwrap();
    receiver.stop();
    fs::remove_file(receiver.object(&missing)).unwrap();
    let check = |receiver: &Receiver, options: &[&str]| {
        let arguments = [&["--output", "json", "wal", "check"], options].concat();
        let run = receiver.walden.try_run(&arguments);
        serde_json::from_str::<Value>(&run.stdout).unwrap_or_else(|_| panic!("{run:?}"))
    };
    // It could still be being written, by all that the files say.
    let early = check(&receiver, &["--repair"]);
    assert_eq!((&early["ok"], &early["repaired"]), (&json!(false), &json!([])), "{early:#}");
    cluster.sql("checkpoint");
    let repaired = check(&receiver, &["--repair"]);
    assert_eq!((&repaired["ok"], &repaired["repaired"]), (&json!(true), &json!([missing])), "{repaired:#}");

    // On a timeline that was left, and on the one after it.
    begin_timeline(&mut cluster);
    receiver.start_again();
    write_segments(&cluster, 3);
    receiver.wait_until_stored(&cluster);
    let (_, newest) = receiver.runs(2).pop().unwrap();
    let (begun, _) = receiver.runs(2).swap_remove(0);
    let second = segments_between(&begun, &newest).into_iter().nth_back(1).unwrap();
    receiver.stop();
    cluster.sql("checkpoint");
    for segment in [&missing, &second] {
        fs::remove_file(receiver.object(segment)).unwrap();
    }
    let repaired = check(&receiver, &["--repair", "--bodies"]);
    assert_eq!(
        (&repaired["ok"], &repaired["repaired"]),
        (&json!(true), &json!([missing, second])),
        "{repaired:#}"
    );
}

/// Who looks after the archive need not be able to read it: names, headers, signatures, digests and continuity.
#[test]
fn without_a_private_key_all_is_told_that_can_be_told_with_one() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    write_segments(&cluster, 3);
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    begin_timeline(&mut cluster);
    receiver.start_again();
    write_segments(&cluster, 3);
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    let file = receiver.walden.configuration_file();
    let configuration = fs::read_to_string(&file).unwrap();
    let without = configuration.replace("private_key_file = \"test.pem\"\n", "");
    assert_ne!(without, configuration);
    fs::write(&file, without).unwrap();
    let whole = receiver.walden.json(&["wal", "check", "--bodies"]);
    assert_eq!(whole["ok"], true, "{whole:#}");

    let segment = |timeline: u64, from_last: usize| {
        let (first, last) = receiver.runs(timeline).pop().unwrap();
        segments_between(&first, &last).into_iter().nth_back(from_last).unwrap()
    };
    let (signature, header) = (segment(1, 2), segment(1, 1));
    let (body, missing) = (segment(2, 2), segment(2, 1));
    let damaged = [(&signature, Place::Signature), (&header, Place::Header), (&body, Place::Body)];
    damaged.into_iter().for_each(|(segment, place)| flip(&receiver.object(segment), place));
    fs::remove_file(receiver.object(&missing)).unwrap();
    for (bodies, found) in
        [(None, vec![&signature, &header]), (Some("--bodies"), vec![&signature, &header, &body])]
    {
        let arguments: Vec<&str> = ["--output", "json", "wal", "check"].into_iter().chain(bodies).collect();
        let run = receiver.walden.try_run(&arguments).expect_code(3);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        let cluster = &report["clusters"][0];
        assert_eq!(names(&cluster["damaged"]), found, "{cluster:#}");
        let hole = (&cluster["missing"][0]["first"], &cluster["missing"][0]["last"]);
        assert_eq!(hole, (&json!(missing), &json!(missing)), "{cluster:#}");
    }
    // Nothing of it can be read.
    let shown = receiver.walden.try_run(&["show", "latest", "--files"]);
    assert!(!shown.success() && shown.stderr.contains("private key"), "{shown:?}");
}

#[test]
fn every_field_is_documented() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 2);
    let report = scene.walden.json(&["wal", "check"]);
    let document = include_str!("../../docs/wal-check.md");
    let names = report.as_object().unwrap().keys().chain(report["clusters"][0].as_object().unwrap().keys());
    let missing: Vec<&String> = names
        .filter(|name| ![format!("`{name}"), format!("`.{name}")].iter().any(|text| document.contains(text)))
        .collect();
    assert!(missing.is_empty(), "docs/wal-check.md lacks {missing:?}");
}
