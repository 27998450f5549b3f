//! What `restore --instant` refuses before the first byte, and what is refused to others while it is unfinished: each leaves
//! no mount, no pin and no file behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use crate::instant_resumed_away::Line;
use crate::instant_scene::{Restored, Scene, Victim, word};
use crate::support::{Fault, Need, Options, Run, require, unmount, wait_for};

fn small() -> Scene {
    let scene = Scene::start(Options::default());
    scene.source.sql("create table kept as select n, md5(n::text) as t from generate_series(1, 20000) n");
    scene.source.backup();
    scene.source.archive_wal();
    scene
}

#[track_caller]
fn assert_tells(run: &Run, words: &[&str]) {
    assert!(!run.success(), "it is not refused: {}", run.command);
    for word in words {
        assert!(run.stderr.contains(word), "no \"{word}\" in:\n{}", run.stderr);
    }
}

/// Nothing was begun: no pin, no mount, no process, and of the directory what there was.
#[track_caller]
fn assert_untouched(scene: &Scene, restored: &Restored<'_>) {
    assert!(restored.mounts().is_empty() && restored.supervisor().is_none());
    let holds = scene.holds();
    assert_eq!((holds.open_pins, holds.open_leases), (0, 0), "{holds:?}");
}

#[test]
fn what_cannot_be_done_at_once_is_refused_with_what_can() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = small();
    let restored = scene.place("refused");
    let standby = ["--standby", "--primary-conninfo", "host=/nowhere"];
    for options in [&standby[..], &["--delta"], &["--allow-unsigned"]] {
        let refused = restored.try_begin(options);
        assert_eq!(refused.code(), Some(2), "{options:?}: {}", refused.stderr);
        assert!(!restored.directory.exists(), "{options:?}");
    }
    // Options of it without it.
    for option in [&["--no-hydrate"][..], &["--hydrate-rate", "1MiB"], &["--cut-over"]] {
        let words = ["restore", "--target-dir", restored.directory.to_str().unwrap()];
        let refused = scene.walden().try_run(&[&words[..], option].concat());
        assert_eq!(refused.code(), Some(2), "{option:?}: {}", refused.stderr);
        assert!(!restored.directory.exists(), "{option:?}");
    }
    // As a plain restore.
    assert_tells(&restored.try_begin(&["--target-lsn", "FF/0"]), &["the archive ends before", "hint: "]);
    assert_tells(&restored.try_begin(&["20010101"]), &["20010101"]);
    assert!(!restored.directory.exists());
    assert_untouched(&scene, &restored);
    let planned = restored.begin(&["--dry-run"]);
    assert_eq!(planned["dry_run"], true, "{planned}");
    assert!(!restored.directory.exists());
    assert_untouched(&scene, &restored);
    let full = scene.at(scene.source.scratch().folder("full"));
    let precious = scene.source.scratch().file("full/precious", "x");
    assert_tells(&full.try_begin(&[]), &["is not empty", "hint: "]);
    assert_eq!(fs::read_to_string(precious).unwrap(), "x");
    assert_untouched(&scene, &full);
    let running = scene.at(scene.source.data_directory().to_owned());
    assert_tells(&running.try_begin(&[]), &["a server is running"]);
    assert_untouched(&scene, &running);
    assert_eq!(scene.source.sql("select count(*) from kept"), "20000");
}

/// It would answer at once and stand still in the middle: so all of it must fit before it begins.
#[test]
fn too_little_room_for_all_of_it_is_refused_before_a_byte() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let disk = scene.source.scratch().folder("disk");
    let none: Option<&str> = None;
    mount(Some("walden-test"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=12m")).unwrap();
    scene.source.scratch().account().own(&disk);
    let restored = scene.at(disk.join("restored"));
    for options in [&[][..], &["--no-hydrate"]] {
        assert_tells(&restored.try_begin(options), &["space", "hint: "]);
        assert!(!restored.directory.exists(), "{options:?}: something was written");
        assert_untouched(&scene, &restored);
    }
    mount(none, &disk, none, MsFlags::MS_REMOUNT, Some("size=512m")).unwrap();
    assert_eq!(word(&restored.begin(&[]), "state"), "plain");
    assert_eq!(restored.sql("select count(*) from kept"), "20000");
    restored.stop();
    restored.assert_plain();
    unmount(&disk);
}

/// Into an unfinished one nothing is restored, whether it runs, is dead, or the host was started anew.
#[test]
fn nothing_is_restored_into_an_unfinished_one() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("insert into kept values (0, 'new')");
    let pins = scene.holds().pins;
    let refused = |moment: &str| {
        let directory = restored.directory.to_str().unwrap();
        let plain = ["restore", "--target-dir", directory];
        for words in [&["--instant"][..], &["--instant", "--dry-run"], &[], &["--dry-run"], &["--delta"]] {
            let run = scene.walden().try_run(&[&plain[..], words].concat());
            assert_eq!(run.code(), Some(1), "{moment}, {words:?}: {}", run.stderr);
            assert!(run.stderr.contains("--resume"), "{moment}, {words:?}: {}", run.stderr);
        }
        assert_eq!(scene.holds().pins, pins, "{moment}: a refused restore has pinned something");
    };
    refused("running");
    let words = ["restore", "--force", "--target-dir", restored.directory.to_str().unwrap()];
    let forced = scene.walden().try_run(&words).expect_code(1);
    assert_tells(&forced, &["hint: "]);
    assert_eq!(restored.sql("select count(*) from kept"), "20001");
    restored.kill(Victim::Both);
    refused("dead");
    restored.detach();
    restored.assert_bare_refuses_twice();
    refused("after a reboot");
    restored.assert_bare_refuses();
    restored.finish();
    assert_eq!(restored.sql("select count(*) from kept"), "20001");
    restored.stop();
    restored.assert_plain();
}

/// A plan that root carries out says what is mounted and who gets it, and lies in another's directory.
#[test]
fn only_who_began_it_goes_on_with_it() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    let words = ["restore", "--resume", "--target-dir", restored.directory.to_str().unwrap()];
    restored.kill(Victim::Host);
    let others = scene.source.walden.try_run(&words);
    assert_eq!(others.code(), Some(1), "{}", others.stderr);
    assert!(restored.mounts().is_empty() && restored.supervisor().is_none());
    // The server's own account writes a plan there that root has not made.
    for plan in files_of_root(&restored.directory.join(".walden")) {
        crate::support::Account::of_postgresql().own(&plan);
    }
    let forged = restored.try_resume();
    assert_eq!(forged.code(), Some(1), "root goes on with a plan of user postgres: {}", forged.stderr);
    assert!(restored.mounts().is_empty() && restored.supervisor().is_none());
    restored.assert_bare_refuses_twice();
}

/// The files of an area that are root's: those that say what is to be done.
fn files_of_root(area: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(area).unwrap().flatten().map(|entry| entry.path());
    let found: Vec<PathBuf> = entries
        .filter(|path| fs::symlink_metadata(path).is_ok_and(|it| it.is_file() && it.uid() == 0))
        .collect();
    assert!(!found.is_empty(), "no file of the area is root's");
    found
}

/// Through a descriptor of a dead mount one can still write to what passed through.
#[test]
fn it_does_not_go_on_while_somebody_holds_the_dead_mount() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("insert into kept values (0, 'new'); checkpoint");
    // Made by the server, so it passes through.
    restored.sql("create table own as select n from generate_series(1, 1000) n; checkpoint");
    let path = restored.sql("select pg_relation_filepath('own')");
    let held = File::options().read(true).write(true).open(restored.directory.join(path)).unwrap();
    restored.kill(Victim::Both);
    let refused = restored.try_resume();
    assert_eq!(refused.code(), Some(1), "{}", refused.stderr);
    let own = std::process::id().to_string();
    assert!(refused.stderr.contains(&own), "who holds it is not named: {}", refused.stderr);
    assert!(restored.supervisor().is_none() && !restored.answers());
    drop(held);
    restored.finish();
    assert_eq!(restored.sql("select count(*) from kept"), "20001");
    assert_eq!(restored.sql("select count(*) from own"), "1000");
    restored.stop();
    restored.assert_plain();
}

/// The same when somebody has taken the dead mount away, so that nobody can find it by its name any more.
#[test]
fn it_does_not_go_on_while_somebody_holds_a_dead_mount_that_was_detached() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("create table own as select n from generate_series(1, 1000) n; checkpoint");
    let path = restored.sql("select pg_relation_filepath('own')");
    let held = File::options().read(true).write(true).open(restored.directory.join(path)).unwrap();
    restored.kill(Victim::Host);
    restored.assert_bare_refuses();
    let refused = restored.try_resume();
    assert_eq!(refused.code(), Some(1), "{}", refused.stderr);
    let own = std::process::id().to_string();
    assert!(refused.stderr.contains(&own), "who holds it is not named: {}", refused.stderr);
    assert!(restored.supervisor().is_none() && restored.mounts().is_empty());
    drop(held);
    restored.finish();
    assert_eq!(restored.sql("select count(*) from own"), "1000");
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}

/// A directory that was moved or copied is another one: its tablespaces are the first one's.
#[test]
fn an_unfinished_one_that_was_moved_is_not_gone_on_with() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    restored.kill(Victim::Host);
    let moved = scene.place("moved");
    fs::rename(&restored.directory, &moved.directory).unwrap();
    assert_tells(&moved.try_resume(), &[restored.directory.to_str().unwrap()]);
    assert!(moved.mounts().is_empty() && moved.supervisor().is_none());
    fs::rename(&moved.directory, &restored.directory).unwrap();
    restored.finish();
    restored.stop();
    restored.assert_plain();
}

/// Killed between the creation of a file and its gift to who asked for it, a mount leaves what nobody but root can open: redo makes
/// or opens it at every start.
#[test]
fn what_a_killed_mount_has_not_yet_given_away_keeps_no_server_from_starting() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    use std::os::unix::fs::{PermissionsExt, chown};
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    // The last checkpoint is before it, so that redo makes it.
    crate::source::wait_until_writable(&restored);
    restored.sql("checkpoint; create table own (n int)");
    let path = restored.sql("select pg_relation_filepath('own')");
    restored.kill(Victim::Host);
    let file = restored.directory.join(path);
    fs::write(&file, "").unwrap();
    chown(&file, Some(0), Some(0)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    restored.finish();
    assert_eq!(restored.sql("insert into own values (1); select count(*) from own"), "1");
    restored.stop();
    restored.assert_plain();
}

/// The owner of the directory plants links where root will open, rename and remove.
#[test]
fn links_that_the_owner_plants_lead_root_nowhere() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let (restored, _) = scene.answering("restored", &[]);
    restored.kill(Victim::Host);
    let outside = scene.source.scratch().path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();
    let area = restored.directory.join(".walden");
    let held = area.join("held");
    fs::rename(&held, scene.source.place("held")).unwrap();
    std::os::unix::fs::symlink(&outside, &held).unwrap();
    let refused = restored.try_resume();
    assert!(!refused.success(), "it goes on through a link");
    assert!(restored.mounts().is_empty(), "a mount was left");
    let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(left, ["precious"], "something was written outside");
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "x");
    fs::remove_file(&held).unwrap();
    fs::rename(scene.source.place("held"), &held).unwrap();
    restored.finish();
    restored.stop();
    restored.assert_plain();
}

/// Who does not want it any more begins anew, and nothing keeps the first basebackup.
#[test]
fn an_unfinished_one_that_nobody_serves_is_replaced_where_that_is_asked_for() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    for victim in [Victim::Both, Victim::Host] {
        let (restored, _) = scene.answering("restored", &[]);
        restored.sql("insert into kept values (0, 'new')");
        restored.kill(victim);
        scene.walden().run(&["restore", "--force", "--target-dir", restored.directory.to_str().unwrap()]);
        assert!(restored.mounts().is_empty() && restored.supervisor().is_none());
        let holds = scene.holds();
        assert_eq!((holds.open_pins, holds.open_leases), (0, 0), "{holds:?}");
        restored.assert_plain();
        restored.start();
        crate::source::wait_until_writable(&restored);
        assert_eq!(restored.sql("select count(*) from kept"), "20000");
        restored.stop();
        fs::remove_dir_all(&restored.directory).unwrap();
    }
}

/// Killed when it holds the basebackup, and before its plan says that it has begun: nobody would go on with it, or end its pin.
#[test]
fn what_was_killed_before_it_had_begun_lets_go_of_its_basebackup_with_the_next() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = small();
    let store = Line::of(&scene, "2min");
    let restored = scene.place("restored");
    // Some attempts to pin it, while the next obstacle is put up.
    store.line.inject("", "/pins/", 5, Fault::Silence);
    let mut beside = restored.begin_beside(&[]);
    let area = restored.directory.join(".walden");
    wait_for("the pin to be written down", || {
        assert!(!beside.has_ended(), "{}", beside.told());
        area.join("instant.json").exists().then_some(())
    });
    // It looks whether the basebackup is there still once it holds it.
    store.line.inject("", "/expired", usize::MAX, Fault::Silence);
    wait_for("the pin", || (scene.holds().pins == 1).then_some(()));
    assert!(!area.join("restore.json").exists(), "it has begun");
    beside.signal(Signal::SIGKILL);
    store.line.heal();
    assert_eq!(scene.holds().open_pins, 1, "nothing would have to be ended");
    assert_tells(&restored.try_resume(), &["holds no unfinished restore"]);
    assert!(restored.supervisor().is_none() && restored.mounts().is_empty());
    assert_eq!(word(&restored.begin(&[]), "state"), "plain");
    scene.wait_until_let_go();
    assert_eq!(scene.holds().pins, 2);
    assert_eq!(restored.sql("select count(*) from kept"), "20000");
    restored.stop();
    restored.assert_plain();
}
