//! What a restore meets in the directories it is given: what stays, what is refused, whom things belong to afterwards.

use super::*;
use crate::restore::settings_files::read_or_empty;

/// That of another cluster.
const OTHER_CONTROL_FILE: &[u8] = include_bytes!("../../../tests/data/pg_control/14");

/// PostgreSQL keeps the tablespaces of several major versions side by side, as pg_upgrade leaves them.
#[test]
fn the_files_of_another_major_version_stay_in_a_shared_tablespace() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        site.restore(id, "a", Existing::Refuse).await.unwrap();
        let tablespace = site.data("a").with_file_name("ts");
        let older = tablespace.join("PG_13_202007201/5/16384");
        fs::create_dir_all(older.parent().unwrap()).unwrap();
        fs::write(tablespace.join("readme"), b"whose disk this is").unwrap();
        for existing in [Existing::Delta, Existing::Replace] {
            fs::write(&older, b"rows").unwrap();
            let stranger = tablespace.join("PG_15_202209061/stranger");
            fs::write(&stranger, b"x").unwrap();
            site.restore(id, "a", existing).await.unwrap();
            assert_eq!(fs::read(&older).ok().as_deref(), Some(&b"rows"[..]), "{existing:?}");
            assert!(tablespace.join("readme").exists(), "{existing:?}");
            assert!(!stranger.exists(), "{existing:?}");
        }
    });
}

/// A copy has the links of what it is a copy of, and those lead to tablespaces that are in use.
#[test]
fn a_delta_into_a_copy_of_the_source_leaves_the_sources_tablespaces_alone() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        site.restore(id, "source", Existing::Refuse).await.unwrap();
        let (source, copy) = (site.data("source"), site.data("copy"));
        copy_of(&source, &copy);
        let basebackup = Basebackup::open(&site.repository, id).await.unwrap();
        let mut options = site.options("copy", Existing::Delta);
        options.tablespace_map = vec![("ts".to_owned(), source.with_file_name("ts"))];
        options.source_directory = Some(source);
        let refused =
            plan_restore(&basebackup, planned(basebackup.record().clone()), &options).await.unwrap_err();
        assert!(refused.to_string().contains("/source/ts\" is not empty"), "{refused}");
    });
}

#[test]
fn a_marker_speaks_only_of_the_directory_it_was_written_for() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        site.restore(id, "a", Existing::Refuse).await.unwrap();
        copy_of(&site.data("a"), &site.data("copy"));
        let refused = site.plan(id, "copy", Existing::Replace).await.unwrap_err();
        assert!(refused.to_string().contains("walden.restore.json is of \""), "{refused}");
        assert!(refused.hint().is_some());
        // Another cluster has come to this place since, and the marker with it.
        let control = site.data("a").join("global/pg_control");
        fs::write(&control, OTHER_CONTROL_FILE).unwrap();
        let refused = site.plan(id, "a", Existing::Replace).await.unwrap_err();
        assert!(refused.to_string().contains("walden.restore.json is of cluster"), "{refused}");
    });
}

fn copy_of(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// Interrupts a restore by a store that goes away.
async fn unfinished(site: &Site, id: BasebackupId, name: &str) {
    let plan = site.plan(id, name, Existing::Refuse).await.unwrap();
    site.store.inject(Rule::on(Verb::GetRange, Fault::Before(StoreErrorKind::Unreachable)).key("packs"));
    site.run(&plan, false).await.unwrap_err();
    site.store.heal();
}

#[test]
fn an_unfinished_restore_is_resumed_where_it_was_begun() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        unfinished(&site, id, "a").await;
        copy_of(&site.data("a"), &site.data("copy"));
        let moved = read_unfinished(&site.data("copy")).unwrap_err();
        assert!(matches!(moved, Error::Moved { .. }), "{moved}");
        read_unfinished(&site.data("a")).unwrap();
    });
}

/// Until the end neither the links of the tablespaces nor the marker are there, to say whose the tablespaces are.
#[test]
fn an_unfinished_restore_is_begun_anew_with_its_tablespaces_and_no_others() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        for (name, existing) in [("a", Existing::Replace), ("b", Existing::Delta)] {
            unfinished(&site, id, name).await;
            let tablespace = site.data(name).with_file_name("ts");
            assert!(tablespace.join("PG_15_202209061").exists(), "nothing was begun there");
            site.restore(id, name, existing).await.unwrap();
            site.assert_restored(name, &some_files(9));
        }
        // The plan of another release cannot be resumed, so this is the only way.
        unfinished(&site, id, "c").await;
        let state = site.data("c").join(private_area::DIRECTORY_NAME).join("restore.json");
        let mut plan: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
        plan["format"] = 2.into();
        plan.as_object_mut().unwrap().remove("recovery");
        fs::write(&state, plan.to_string()).unwrap();
        let other = read_unfinished(&site.data("c")).unwrap_err();
        assert!(matches!(other, Error::State { .. }), "{other}");
        site.restore(id, "c", Existing::Replace).await.unwrap();
        site.assert_restored("c", &some_files(9));
        // A copy of the data directory names the tablespaces of what it is a copy of.
        unfinished(&site, id, "d").await;
        copy_of(&site.data("d"), &site.data("copy"));
        let basebackup = Basebackup::open(&site.repository, id).await.unwrap();
        let mut options = site.options("copy", Existing::Replace);
        options.tablespace_map = vec![("ts".to_owned(), site.data("d").with_file_name("ts"))];
        let planned = planned(basebackup.record().clone());
        let refused = plan_restore(&basebackup, planned, &options).await.unwrap_err();
        assert!(refused.to_string().contains("/d/ts\" is not empty"), "{refused}");
    });
}

/// A process that counts as the server of a directory until it is dropped.
struct Server {
    process: std::process::Child,
    pid_file: PathBuf,
}

impl Server {
    fn start(data: &Path) -> Self {
        let process = std::process::Command::new("sleep").arg("600").current_dir(data).spawn().unwrap();
        let pid_file = data.join("postmaster.pid");
        fs::write(&pid_file, format!("{}\n", process.id())).unwrap();
        Self { process, pid_file }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        // Gone where the restore that should have been refused has removed it.
        fs::remove_file(&self.pid_file).ok();
    }
}

/// Its plan names directories that would be given to whom it names.
#[test]
fn root_goes_on_only_with_what_root_has_begun() {
    if !Owner::current().is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        unfinished(&site, id, "a").await;
        let state = site.data("a").join(private_area::DIRECTORY_NAME).join("restore.json");
        let plan = read_unfinished(&site.data("a")).unwrap();
        std::os::unix::fs::chown(&state, Some(4711), None).unwrap();
        for refused in [read_unfinished(&site.data("a")).map(drop), site.run(&plan, true).await.map(drop)] {
            let refused = refused.unwrap_err();
            assert!(refused.to_string().ends_with("was begun by user 4711"), "{refused}");
            assert!(refused.hint().is_some());
        }
        site.restore(id, "a", Existing::Replace).await.unwrap();
        site.assert_restored("a", &some_files(9));
    });
}

/// A release that a crash cut short before the area went leaves a directory that can be started.
#[test]
fn nothing_is_resumed_under_a_running_server() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        unfinished(&site, id, "a").await;
        let data = site.data("a");
        let plan = read_unfinished(&data).unwrap();
        let _server = Server::start(&data);
        let refused = read_unfinished(&data);
        assert!(matches!(refused, Err(Error::Running { .. })), "{refused:?}");
        let refused = site.run(&plan, true).await;
        assert!(matches!(refused, Err(Error::Running { .. })), "{refused:?}");
    });
}

/// Planning may take long, and two who restore into one empty directory plan at the same time.
#[test]
fn what_has_come_to_the_target_since_the_plan_was_made_is_refused_untouched() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        for leftover in [false, true] {
            let name = format!("a-{leftover}");
            let first = site.plan(id, &name, Existing::Refuse).await.unwrap();
            let second = site.plan(id, &name, Existing::Refuse).await.unwrap();
            site.run(&first, false).await.unwrap();
            if leftover {
                fs::create_dir(site.data(&name).join(private_area::DIRECTORY_NAME)).unwrap();
            }
            let refused = site.run(&second, false).await.unwrap_err();
            assert!(matches!(refused, Error::NotEmpty { .. }), "{refused}");
            if leftover {
                fs::remove_dir_all(site.data(&name).join(private_area::DIRECTORY_NAME)).unwrap();
            }
            site.assert_restored(&name, &some_files(9));
        }
        for existing in [Existing::Delta, Existing::Replace] {
            let plan = site.plan(id, "a-false", existing).await.unwrap();
            let server = Server::start(&site.data("a-false"));
            let refused = site.run(&plan, false).await.unwrap_err();
            assert!(matches!(refused, Error::Running { .. }), "{refused}");
            drop(server);
            site.assert_restored("a-false", &some_files(9));
        }
        let plan = site.plan(id, "b", Existing::Refuse).await.unwrap();
        let tablespace = site.data("b").with_file_name("ts");
        fs::create_dir_all(tablespace.join("PG_15_202209061")).unwrap();
        fs::write(tablespace.join("PG_15_202209061/rows"), b"x").unwrap();
        let refused = site.run(&plan, false).await.unwrap_err();
        assert!(refused.to_string().contains("/b/ts\" is not empty"), "{refused}");
        assert_eq!(fs::read(tablespace.join("PG_15_202209061/rows")).unwrap(), b"x");
        assert!(!site.data("b").exists());
    });
}

#[test]
fn of_two_who_resume_the_second_finds_nothing_left_to_do() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        unfinished(&site, id, "a").await;
        let plan = read_unfinished(&site.data("a")).unwrap();
        site.run(&plan, true).await.unwrap();
        let refused = site.run(&plan, true).await.unwrap_err();
        assert!(matches!(refused, Error::NothingToResume { .. }), "{refused}");
        site.assert_restored("a", &some_files(9));
    });
}

#[test]
fn files_that_a_delta_keeps_get_their_owner_mode_and_time() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        site.restore(id, "a", Existing::Refuse).await.unwrap();
        let kept = site.data("a").join("base/3");
        let before = fs::metadata(&kept).unwrap();
        fs::set_permissions(&kept, fs::Permissions::from_mode(0o666)).unwrap();
        fs::File::open(&kept).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        if Owner::current().is_root() {
            std::os::unix::fs::chown(&kept, Some(4711), Some(4711)).unwrap();
        }
        site.restore(id, "a", Existing::Delta).await.unwrap();
        let after = fs::metadata(&kept).unwrap();
        assert_eq!(after.ino(), before.ino(), "it was written anew");
        let attributes = |file: &fs::Metadata| (file.uid(), file.gid(), file.mode() & 0o7777, file.mtime());
        assert_eq!(attributes(&after), attributes(&before));
    });
}

/// `cp -al` and `rsync --link-dest` make copies that share their files with the original.
#[test]
fn a_delta_leaves_files_that_have_another_name_to_their_copy() {
    block_on(async {
        const CONFIGURATION: &str = "config/etc/postgresql.conf";
        let site = Site::create().await;
        let (mut old, mut new) = (some_files(9), some_files(10));
        old.insert(CONFIGURATION.to_owned(), content(&[], 100));
        new.insert(CONFIGURATION.to_owned(), content(&[], 90));
        let first = site.backup(&old, None).await.id;
        let second = site.backup(&new, Some(first)).await.id;
        let configuration = site.data("a").with_file_name("etc");
        let restored = async |id, existing| {
            let mut options = site.options("a", existing);
            options.configuration_directory = Some(configuration.clone());
            let basebackup = Basebackup::open(&site.repository, id).await.unwrap();
            let planned = planned(basebackup.record().clone());
            let plan = plan_restore(&basebackup, planned, &options).await.unwrap();
            site.run(&plan, false).await.unwrap();
        };
        restored(first, Existing::Refuse).await;
        let data = site.data("a");
        let shared = [
            data.join("base/1"),
            data.join("base/3"),
            data.with_file_name("ts").join("PG_15_202209061/16500"),
            configuration.join("postgresql.conf"),
        ];
        for existing in [Existing::Delta, Existing::Replace] {
            let copies: Vec<(PathBuf, Vec<u8>)> = shared
                .iter()
                .enumerate()
                .map(|(n, path)| {
                    let copy = site.data("a").with_file_name(format!("copy-{n}"));
                    fs::hard_link(path, &copy).unwrap();
                    (copy, fs::read(path).unwrap())
                })
                .collect();
            restored(second, existing).await;
            for ((copy, before), path) in copies.iter().zip(&shared) {
                assert!(fs::read(copy).unwrap() == *before, "{existing:?} wrote into {}", path.display());
                assert_eq!(fs::metadata(path).unwrap().nlink(), 1, "{existing:?}: {}", path.display());
                fs::remove_file(copy).unwrap();
            }
            new.remove(CONFIGURATION);
            site.assert_restored("a", &new);
        }
    });
}

/// WAL that only the target has is not removed with its link, and nobody would look for it.
#[test]
fn a_link_that_leads_out_of_the_target_is_replaced_and_told_of() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        site.restore(id, "a", Existing::Refuse).await.unwrap();
        let data = site.data("a");
        let volume = data.with_file_name("wal");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("000000010000000000000001"), b"WAL").unwrap();
        for existing in [Existing::Delta, Existing::Replace] {
            let quiet = site.plan(id, "a", existing).await.unwrap();
            assert!(!quiet.warnings.iter().any(|warning| warning.contains("is a link to")), "{quiet:?}");
            fs::remove_dir(data.join("pg_wal")).unwrap();
            std::os::unix::fs::symlink("../wal", data.join("pg_wal")).unwrap();
            let plan = site.plan(id, "a", existing).await.unwrap();
            let told = format!("/pg_wal\" is a link to \"{}\" and is replaced", volume.display());
            assert!(plan.warnings.iter().any(|warning| warning.contains(&told)), "{:?}", plan.warnings);
            site.run(&plan, false).await.unwrap();
            assert!(fs::symlink_metadata(data.join("pg_wal")).unwrap().is_dir(), "{existing:?}");
            assert_eq!(fs::read(volume.join("000000010000000000000001")).unwrap(), b"WAL");
        }
    });
}

/// Failure 24: a file that is there and cannot be read was taken for an empty one.
#[test]
fn only_a_file_that_is_not_there_is_empty() {
    let scratch = scratch();
    assert_eq!(read_or_empty(&scratch.path().join("absent")).unwrap(), b"");
    fs::write(scratch.path().join("file"), b"work_mem = '9MB'\n").unwrap();
    assert_eq!(read_or_empty(&scratch.path().join("file")).unwrap(), b"work_mem = '9MB'\n");
    let unreadable = read_or_empty(scratch.path()).unwrap_err();
    assert!(matches!(unreadable, Error::Io { action: "read", .. }), "{unreadable}");
}
