//! The unit that mounts an unfinished restore at boot, by what systemd's own programs say of it and do with it; none of them
//! needs a systemd that runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use walden::instance::instant::boot_unit::{BootUnit, Systemd};

use crate::support::{Need, Run, Scratch, require};

const DATA: &str = "/var/lib/postgresql/15/walden-has-no-such-cluster";
const NAME: &str = "walden-restore-15-walden-has-no-such-cluster.service";

/// A folder that systemd has booted from, as far as that is seen.
fn host(scratch: &Scratch) -> PathBuf {
    let root = scratch.folder("host");
    for folder in ["etc/systemd/system", "run/systemd/system"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    root
}

fn unit(tablespaces: &[PathBuf], words: &[&str]) -> BootUnit {
    let command: Vec<String> = words.iter().copied().map(str::to_owned).collect();
    BootUnit::of(Path::new(DATA), tablespaces, &command).unwrap()
}

#[track_caller]
fn verify(file: &Path, level: &str) -> Run {
    let mut verify = Command::new("systemd-analyze");
    Run::of(verify.args(["verify", "--man=no"]).arg(file).env("SYSTEMD_LOG_LEVEL", level), "")
}

#[test]
fn systemd_reads_in_the_unit_what_was_meant() {
    require!(Need::Program("systemctl"), Need::Program("systemd-analyze"));
    let scratch = Scratch::new();
    let systemd = Systemd::below(&host(&scratch));
    let places = ["/srv/fast \"disk\" 100%", "/srv/back\\slash"].map(PathBuf::from);
    let unit = unit(&places, &["/bin/true", "--config", "/etc/my $HOME \\n 100% \"x\".toml", "restore"]);
    assert!(systemd.install(&unit).unwrap());
    let file = systemd.path_of(&unit);
    assert!(file.ends_with(NAME), "{}", file.display());
    // Nothing is unknown to it, misspelt or ignored.
    let complaints = verify(&file, "notice").expect_success().stderr;
    assert!(!complaints.contains("walden"), "{complaints}");
    let read = verify(&file, "debug").expect_success().stdout;
    let lines: Vec<&str> = read.lines().map(str::trim).collect();
    for meant in [
        "Before: postgresql@15-walden-has-no-such-cluster.service",
        "Wants: network-online.target",
        "After: network-online.target",
        "After: local-fs.target",
        "After: remote-fs.target",
        "RequiresMountsFor: /srv/fast \"disk\" 100%",
        "RequiresMountsFor: /srv/back\\slash",
        &format!("RequiresMountsFor: {DATA}"),
        "Type: oneshot",
        "RemainAfterExit: yes",
        "TimeoutStartSec: infinity",
        "TimeoutStopSec: 3min",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(meant)), "no {meant:?} in:\n{read}");
    }
    let command = lines.iter().find(|line| line.starts_with("Command Line:")).unwrap();
    // As it quotes for people; of the dollars one is left when it starts the program.
    assert!(command.contains(r"\\n"), "{command}");
    let words = r#"/bin/true --config "/etc/my $$HOME n 100% "x".toml" restore"#;
    assert!(command.replace('\\', "").ends_with(words), "{command}");
}

#[test]
fn the_unit_is_started_at_boot_until_it_is_removed() {
    require!(Need::Program("systemctl"));
    let scratch = Scratch::new();
    let root = host(&scratch);
    let systemd = Systemd::below(&root);
    let unit = unit(&[], &["/bin/true"]);
    let wanted = root.join("etc/systemd/system/multi-user.target.wants").join(NAME);
    // Twice, as by a restore that begins once more.
    for _ in 0..2 {
        assert!(systemd.install(&unit).unwrap());
        assert!(fs::symlink_metadata(&wanted).is_ok_and(|link| link.is_symlink()), "it is not enabled");
    }
    systemd.remove(Path::new("/var/lib/postgresql/15/walden-has-no-other")).unwrap();
    assert!(wanted.is_symlink() && systemd.path_of(&unit).is_file(), "that is another one's");
    systemd.remove(Path::new(DATA)).unwrap();
    assert!(!wanted.is_symlink() && !systemd.path_of(&unit).exists());
    systemd.remove(Path::new(DATA)).unwrap();
    // Where something else has booted the host nothing is written.
    fs::remove_dir(root.join("run/systemd/system")).unwrap();
    assert!(!systemd.install(&unit).unwrap());
    assert!(!systemd.path_of(&unit).exists());
}

/// What stands in the way is said by who it was: nobody has a unit then, and the restore says what to call instead.
#[test]
fn a_unit_that_cannot_be_enabled_is_told() {
    require!(Need::Program("systemctl"), Need::Root);
    let scratch = Scratch::new();
    let root = host(&scratch);
    let systemd = Systemd::below(&root);
    fs::write(root.join("etc/systemd/system/multi-user.target.wants"), "no folder").unwrap();
    let told = systemd.install(&unit(&[], &["/bin/true"])).unwrap_err();
    assert!(told.starts_with(&format!("systemctl enable {NAME}: ")), "{told}");
    systemd.remove(Path::new(DATA)).unwrap();
    assert!(!root.join("etc/systemd/system").join(NAME).exists());
}
