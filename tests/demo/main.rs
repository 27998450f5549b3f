//! `walden demo` from end to end: a real server, a real mount, a real clone; and nothing of it left.

#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use support::{Need, Run, Scratch, Walden, require, wait_for};

/// A folder for one demonstration, open to user postgres, that ends with the test.
fn parent() -> tempfile::TempDir {
    let parent = tempfile::Builder::new().prefix("walden-test-").tempdir_in("/tmp").unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(parent.path(), open).unwrap();
    parent
}

fn demo(parent: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walden"));
    command.args(["demo", "--scale", "1", "--output", "json", "--dir"]).arg(parent);
    command
}

#[track_caller]
fn assert_nothing_is_left(parent: &Path) {
    let files: Vec<_> = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files, Vec::<std::path::PathBuf>::new());
    assert_nothing_runs(parent);
}

#[track_caller]
fn assert_nothing_runs(parent: &Path) {
    let name = parent.to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(name), "{mounts}");
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let folder = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let text = String::from_utf8_lossy(&command_line);
        assert!(!text.contains(name) && !folder.starts_with(parent), "{text:?} runs in {}", folder.display());
    }
}

#[test]
fn the_whole_path_runs_and_leaves_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let parent = parent();
    let run = Run::of(&mut demo(parent.path()), "").expect_success();
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&report["ok"], &report["checksums_equal"]), (&true.into(), &true.into()), "{report:#}");
    // Four tables of pgbench and one of text.
    assert_eq!(report["tables"], 5, "{report:#}");
    let number = |path: &str| report.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    for figure in [
        "/database_bytes",
        "/backup/seconds",
        "/backup/stored_bytes",
        "/backup/transactions",
        "/wal/segments",
        "/wal/stored_bytes",
        "/mount/files",
        "/mount/bytes",
        "/clone/seconds_to_first_query",
        "/clone/bytes_fetched",
        "/clone/requests",
    ] {
        assert!(number(figure) > 0.0, "{figure} in {report:#}");
    }
    assert_eq!(number("/mount/wal_segments"), number("/wal/segments"), "{report:#}");
    assert_eq!(report["steps"].as_array().unwrap().len(), 10);
    assert!(run.stderr.contains("comparing every table"), "{}", run.stderr);
    assert_nothing_is_left(parent.path());
}

#[test]
fn a_signal_ends_it_in_order_whatever_it_is_doing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    for (signal, intention) in [
        (Signal::SIGINT, "filling it"),
        (Signal::SIGTERM, "backing it up"),
        (Signal::SIGINT, "mounting the repository"),
        (Signal::SIGTERM, "starting a clone"),
        (Signal::SIGINT, "comparing every table"),
    ] {
        let parent = parent();
        let log = parent.path().join("log");
        let mut running = demo(parent.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        wait_for(intention, || fs::read_to_string(&log).unwrap().contains(intention).then_some(()));
        interrupt(&running, signal);
        assert_eq!(ended(&mut running), Some(1), "{}", fs::read_to_string(&log).unwrap());
        let said = fs::read_to_string(&log).unwrap();
        assert!(said.contains("error: interrupted"), "{intention}: {said}");
        fs::remove_file(&log).unwrap();
        assert_nothing_is_left(parent.path());
    }
}

fn interrupt(running: &Child, signal: Signal) {
    kill(Pid::from_raw(running.id().cast_signed()), signal).unwrap();
}

#[track_caller]
fn ended(running: &mut Child) -> Option<i32> {
    wait_for("the demonstration to end", || running.try_wait().unwrap()).code()
}

#[test]
fn what_is_kept_is_a_folder_in_which_nothing_runs() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let parent = parent();
    let run = Run::of(demo(parent.path()).arg("--keep"), "").expect_success();
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    let folder = Path::new(report["folder"].as_str().unwrap());
    assert!(folder.starts_with(parent.path()) && folder.join("walden.toml").exists());
    assert_nothing_runs(parent.path());
    let list = ["--output", "json", "wal", "list", "--config"];
    let list =
        Run::of(Command::new(env!("CARGO_BIN_EXE_walden")).args(list).arg(folder.join("walden.toml")), "");
    assert!(list.expect_success().stdout.contains("segments"));
}

#[test]
fn an_ordinary_user_demonstrates_as_well() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Program("fusermount3"));
    let scratch = Scratch::new();
    let dir = scratch.folder("dir");
    let user = scratch.account();
    // In a mount namespace of its own a device that is open to everybody, as /dev/fuse is on most machines.
    let device = scratch.path().join("fuse");
    let script =
        format!("mknod -m 666 {0} c 10 229 && mount --bind {0} /dev/fuse && exec \"$@\"", device.display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &script, "sh", "setpriv", "--clear-groups"]);
    command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid));
    command.arg(Walden::new(&scratch).binary()).args(["demo", "--scale", "1", "--output", "json", "--dir"]);
    let run = Run::of(command.arg(&dir).current_dir("/"), "").expect_success();
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&report["ok"], &report["tables"]), (&true.into(), &5.into()), "{report:#}");
    assert_nothing_is_left(&dir);
}

#[test]
fn a_folder_it_cannot_use_is_refused_before_anything_is_made() {
    require!(Need::PostgreSQL(15));
    let parent = parent();
    let long = parent.path().join("x".repeat(80));
    fs::create_dir(&long).unwrap();
    let refused = Run::of(&mut demo(&long), "").expect_code(1);
    assert!(refused.stderr.contains("too long for the sockets"), "{}", refused.stderr);
    assert!(refused.stdout.contains("\"error\""), "{}", refused.stdout);
    assert_nothing_is_left(&long);
}
