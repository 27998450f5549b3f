//! Recovery through `wal fetch`, with the plan it makes by itself, along timelines.

use crate::scene::{Scene, base_backup, recover};
use crate::support::{Need, Server, Stop, require, wait_for};

#[test]
fn a_hand_made_recovery_reaches_the_end_of_the_archive_on_13() {
    reaches_the_end(13);
}

#[test]
fn a_hand_made_recovery_reaches_the_end_of_the_archive_on_15() {
    reaches_the_end(15);
}

#[test]
fn a_hand_made_recovery_reaches_the_end_of_the_archive_on_18() {
    reaches_the_end(18);
}

fn reaches_the_end(major: u32) {
    require!(Need::PostgreSQL(major));
    let scene = Scene::new(major, 3);
    let mut server = scene.assert_recovers(scene.recovering("recovered", &scene.walden.restore_command()));
    let plan = std::fs::read_to_string(server.data_directory().join("walden.plan.json")).unwrap();
    assert!(plan.contains(&scene.segments[2]), "{plan}");
    server.stop(Stop::Fast);
}

/// A standby is promoted while its primary dies: the archive then holds a partial segment, a history file and a
/// second timeline, and a copy from before follows it to its end (failures 3 and 9).
#[test]
fn recovery_follows_a_promotion() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut scene = Scene::new(15, 2);
    let scratch = scene.cluster.scratch();
    let data = scratch.path().join("standby");
    base_backup(&scene.cluster, &data, &["-X", "stream", "-R"]);
    let mut standby = Server::new(15, &data, &scratch.folder("run"));
    standby.set("hot_standby", "on");
    standby.start();
    scene.cluster.sql("insert into r values (2)");
    wait_for("the row to be streamed", || (Scene::rows(&standby) == 3).then_some(()));
    scene.cluster.stop(Stop::Kill);
    standby.sql("select pg_promote()");
    standby.sql("insert into r values (3)");
    let last = standby.archive_wal();
    assert!(last.starts_with("00000002"), "{last}");
    let listed = scene.walden.json(&["wal", "list"]);
    let timelines = &listed["clusters"][0]["timelines"];
    assert_eq!(timelines[0]["partials"].as_array().unwrap().len(), 1, "{listed:#}");
    assert_eq!((timelines[1]["timeline"].as_u64(), timelines[1]["parent"].as_u64()), (Some(2), Some(1)));
    assert_eq!(timelines[1]["history"], true);
    assert_eq!(timelines[1]["runs"][0]["last"], last.as_str());
    let text = scene.walden.run(&["wal", "list"]).stdout;
    assert!(text.contains("1 partial") && text.contains(&last), "{text}");
    standby.stop(Stop::Fast);
    let mount = scene.mount();
    for (name, restore_command) in [("fetch", scene.walden.restore_command()), ("cp", scene.cp())] {
        let mut recovered = scene.recovering(name, &restore_command);
        recover(&mut recovered).unwrap();
        assert_eq!(Scene::rows(&recovered), 4, "{name}: {}", recovered.log());
        assert_eq!(recovered.sql("select timeline_id from pg_control_checkpoint()"), "3", "{name}");
        recovered.stop(Stop::Fast);
    }
    drop(mount);
}

/// A plan that lies in a copied data directory must not end the recovery of the copy.
#[test]
fn a_plan_that_was_copied_with_the_directory_is_not_believed() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::new(15, 2);
    let mut first = scene.recovering("first", &scene.walden.restore_command());
    recover(&mut first).unwrap();
    first.stop(Stop::Fast);
    // It goes on as a primary that archives, is copied with the plan in it, and then writes more.
    let scratch = scene.cluster.scratch();
    scene.cluster.set_archive_command("true");
    let mut primary = Server::new(15, first.data_directory(), &scratch.folder("run"));
    primary.set("archive_mode", "on").set("archive_command", &scene.walden.archive_command());
    primary.start();
    let copy = scratch.path().join("second");
    base_backup(&primary, &copy, &["-X", "none"]);
    assert!(copy.join("walden.plan.json").exists());
    primary.sql("insert into r values (2)");
    primary.archive_wal();
    primary.stop(Stop::Fast);
    scratch.file("second/recovery.signal", "");
    let mut recovered = Server::new(15, &copy, &scratch.folder("run"));
    recovered.set("restore_command", &scene.walden.restore_command()).set("archive_mode", "off");
    recovered.set("hot_standby", "off");
    recover(&mut recovered).unwrap();
    assert_eq!(Scene::rows(&recovered), 3, "{}", recovered.log());
    recovered.stop(Stop::Fast);
    scene.cluster.stop(Stop::Fast);
}
