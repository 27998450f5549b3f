//! Debian with systemd: a unit that mounts an unfinished restore before its cluster is started at boot.
//!
//! `postgresql@15-main` starts the server by itself once the directory is what it expects, so the unit only mounts. It is
//! written when the restore begins and removed when the directory is plain. Elsewhere nothing is written: the restore
//! says what is to be called after a reboot.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::durable::{self, Create};
use crate::instance::instant::begin::debian_cluster;

/// Where systemd looks for units that an administrator, or Walden, has written.
const UNITS: &str = "/etc/systemd/system";
/// What systemd makes when it is what has booted the host.
const RUNNING: &str = "/run/systemd/system";

/// The unit of one restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootUnit {
    name: String,
    text: String,
}

impl BootUnit {
    /// Returns the unit of a restore into `data`, where Debian has a cluster; `command` mounts it.
    pub fn of(data: &Path, command: &[String]) -> Option<Self> {
        let (version, cluster) = debian_cluster(data)?;
        let command: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        let text = format!(
            "# Written by walden restore --instant; removed when the directory needs it no more.\n\
             [Unit]\n\
             Description=Mount the unfinished restore of PostgreSQL cluster {version}-{cluster}\n\
             Wants=network-online.target\n\
             After=network-online.target local-fs.target\n\
             Before=postgresql@{version}-{cluster}.service\n\
             \n\
             [Service]\n\
             Type=oneshot\n\
             RemainAfterExit=yes\n\
             ExecStart={}\n\
             TimeoutStartSec=infinity\n\
             TimeoutStopSec=3min\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            command.join(" ")
        );
        Some(Self { name: format!("walden-restore-{version}-{cluster}.service"), text })
    }

    /// Returns where it is written.
    pub fn path(&self) -> PathBuf {
        Path::new(UNITS).join(&self.name)
    }

    /// Writes it and has systemd take note of it; false where systemd does not run this host.
    ///
    /// # Errors
    /// What was in the way, in words.
    pub fn install(&self) -> Result<bool, String> {
        if !Path::new(RUNNING).is_dir() {
            return Ok(false);
        }
        let create = Create { mode: 0o644, ..Create::PRIVATE_FILE };
        durable::write_file(&self.path(), self.text.as_bytes(), create).map_err(|error| error.to_string())?;
        systemctl(&["daemon-reload"])?;
        systemctl(&["enable", &self.name])?;
        Ok(true)
    }
}

/// Removes the unit of a restore into `data`, if there is one.
///
/// # Errors
/// What was in the way, in words.
pub fn remove(data: &Path) -> Result<(), String> {
    let Some(unit) = BootUnit::of(data, &[]) else { return Ok(()) };
    if !unit.path().exists() {
        return Ok(());
    }
    if Path::new(RUNNING).is_dir() {
        systemctl(&["disable", &unit.name])?;
    }
    durable::remove_file(&unit.path()).map_err(|error| error.to_string())?;
    if Path::new(RUNNING).is_dir() { systemctl(&["daemon-reload"]) } else { Ok(()) }
}

fn systemctl(arguments: &[&str]) -> Result<(), String> {
    let said = |detail: &str| format!("systemctl {}: {detail}", arguments.join(" "));
    let output =
        Command::new("systemctl").args(arguments).output().map_err(|error| said(&error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(said(String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Writes a word as systemd wants it in a command line.
fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', r"\\").replace('"', r#"\""#).replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_mounts_before_the_cluster_is_started_and_nothing_else() {
        let command = ["/usr/bin/walden", "--config", "/etc/my 100%.toml", "restore", "--resume"];
        let command = command.map(str::to_owned);
        let unit = BootUnit::of(Path::new("/var/lib/postgresql/15/main"), &command).unwrap();
        assert_eq!(unit.path(), Path::new("/etc/systemd/system/walden-restore-15-main.service"));
        for line in [
            "Before=postgresql@15-main.service",
            r#"ExecStart="/usr/bin/walden" "--config" "/etc/my 100%%.toml" "restore" "--resume""#,
            "RemainAfterExit=yes",
            "WantedBy=multi-user.target",
        ] {
            assert!(unit.text.lines().any(|found| found == line), "no {line:?} in:\n{}", unit.text);
        }
        assert!(BootUnit::of(Path::new("/srv/data"), &command).is_none());
    }

    #[test]
    fn what_was_never_written_is_removed_without_a_word() {
        remove(Path::new("/srv/data")).unwrap();
        remove(Path::new("/var/lib/postgresql/15/walden-has-no-such-cluster")).unwrap();
    }
}
