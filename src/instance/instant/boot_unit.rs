//! Debian with systemd: a unit that mounts an unfinished restore before its cluster is started at boot.
//!
//! `postgresql@15-main` starts the server by itself once the directory is what it expects, so the unit only mounts. It is
//! written when the restore begins and removed when the directory is plain, known by its first line, whatever has become
//! of Debian's configuration. Elsewhere nothing is written: the restore says what is to be called after a reboot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::durable::{self, Create};
use crate::disk::state_file;
use crate::instance::instant::debian_cluster::DebianCluster;

/// The unit of one restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootUnit {
    name: String,
    text: String,
}

/// The systemd of a host: where it looks for units, and whether it is what has booted the host.
#[derive(Debug, Clone)]
pub struct Systemd {
    root: PathBuf,
}

/// Below the root: where systemd looks for units that an administrator, or Walden, has written.
const UNITS: &str = "etc/systemd/system";
/// Below the root: what systemd makes when it is what has booted the host.
const RUNNING: &str = "run/systemd/system";
const PREFIX: &str = "walden-restore-";
/// Ours has two paths and a command, and a path for each tablespace.
const UNIT_BYTES_MAX: u64 = 16 << 20;

impl BootUnit {
    /// Returns the unit of a restore into `data`, where Debian has a cluster; `command` mounts it, once the disks of `data`
    /// and of its `tablespaces` are there. Nothing where a unit cannot name one of these: a tablespace comes from the
    /// basebackup, and a line break in its path would be the next line of the unit.
    pub fn of<'a>(
        data: &'a Path,
        tablespaces: impl IntoIterator<Item = &'a PathBuf>,
        command: &[String],
    ) -> Option<Self> {
        let DebianCluster { version, name } = DebianCluster::of(data)?;
        let command: Vec<String> = command.iter().map(|word| quoted(&word.replace('$', "$$"))).collect();
        let places = tablespaces.into_iter().map(PathBuf::as_path).chain([data]);
        let places: Vec<String> = places.map(|place| place.to_str().map(quoted)).collect::<Option<_>>()?;
        let (places, command) = (places.join(" "), command.join(" "));
        if places.contains(char::is_control) || command.contains(char::is_control) {
            return None;
        }
        let text = format!(
            "{}\n\
             [Unit]\n\
             Description=Mount the unfinished restore of PostgreSQL cluster {version}-{name}\n\
             Wants=network-online.target\n\
             After=network-online.target local-fs.target remote-fs.target\n\
             RequiresMountsFor={places}\n\
             Before=postgresql@{version}-{name}.service\n\
             \n\
             [Service]\n\
             Type=oneshot\n\
             RemainAfterExit=yes\n\
             ExecStart={command}\n\
             TimeoutStartSec=infinity\n\
             TimeoutStopSec=3min\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            first_line(data)?
        );
        Some(Self { name: format!("{PREFIX}{version}-{name}.service"), text })
    }
}

impl Systemd {
    /// Returns the one of this host.
    pub fn of_host() -> Self {
        Self::below(Path::new("/"))
    }

    /// Returns the one of a host whose files are below a directory.
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Returns where a unit is written.
    pub fn path_of(&self, unit: &BootUnit) -> PathBuf {
        self.root.join(UNITS).join(&unit.name)
    }

    /// Writes a unit and has it started at boot; false where systemd does not run this host.
    ///
    /// # Errors
    /// What was in the way, in words.
    pub fn install(&self, unit: &BootUnit) -> Result<bool, String> {
        if !self.runs() {
            return Ok(false);
        }
        let create = Create { mode: 0o644, ..Create::PRIVATE_FILE };
        durable::write_file(&self.path_of(unit), unit.text.as_bytes(), create)
            .map_err(|error| error.to_string())?;
        self.reload()?;
        self.systemctl(&["enable", &unit.name])?;
        Ok(true)
    }

    /// Removes what was written for a restore into `data`, if anything was.
    ///
    /// # Errors
    /// What was in the way, in words.
    pub fn remove(&self, data: &Path) -> Result<(), String> {
        let units = self.root.join(UNITS);
        let entries = fs::read_dir(&units).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        for name in names.filter(|name| name.starts_with(PREFIX)) {
            let path = units.join(&name);
            if !is_for(&path, data) {
                continue;
            }
            let disabled = if self.runs() { self.systemctl(&["disable", &name]) } else { Ok(()) };
            // Whatever systemctl says, or is killed in the middle of: without its file there is nothing to fail at a boot.
            durable::remove_file(&path).map_err(|error| error.to_string())?;
            self.reload().and(disabled)?;
        }
        Ok(())
    }

    fn runs(&self) -> bool {
        self.root.join(RUNNING).is_dir()
    }

    /// Has it read the units anew; who boots from another root reads them then.
    fn reload(&self) -> Result<(), String> {
        if self.runs() && self.is_of_host() { self.systemctl(&["daemon-reload"]) } else { Ok(()) }
    }

    fn is_of_host(&self) -> bool {
        self.root == Path::new("/")
    }

    fn systemctl(&self, arguments: &[&str]) -> Result<(), String> {
        let said = |detail: &str| format!("systemctl {}: {detail}", arguments.join(" "));
        let mut command = Command::new("systemctl");
        if !self.is_of_host() {
            command.arg("--root").arg(&self.root);
        }
        let output = command.args(arguments).output().map_err(|error| said(&error.to_string()))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(said(String::from_utf8_lossy(&output.stderr).trim())),
        }
    }
}

/// Returns what the unit of a restore into `data` begins with; nothing where that is no text.
fn first_line(data: &Path) -> Option<String> {
    let data = quoted(data.to_str()?);
    Some(format!("# Written by walden restore --instant into {data}; removed when that needs it no more."))
}

/// Tells whether a unit was written for a restore into `data`.
fn is_for(unit: &Path, data: &Path) -> bool {
    let Ok(text) = state_file::read(unit, "a unit", UNIT_BYTES_MAX) else { return false };
    let first = text.split(|byte| *byte == b'\n').next();
    first_line(data).is_some_and(|wanted| first == Some(wanted.as_bytes()))
}

/// Writes a word as systemd wants it in a list.
fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', r"\\").replace('"', r#"\""#).replace('%', "%%");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    const DATA: &str = "/var/lib/postgresql/15/walden-has-no-such-cluster";

    #[test]
    fn the_unit_mounts_before_the_cluster_is_started_and_nothing_else() {
        let command = ["/usr/bin/walden", "--config", "/etc/my 100%.toml", "restore", "--resume"];
        let command = command.map(str::to_owned);
        let tablespaces = ["/srv/fast disk", "/srv/100%"].map(PathBuf::from);
        let unit = BootUnit::of(Path::new(DATA), &tablespaces, &command).unwrap();
        let path = "/etc/systemd/system/walden-restore-15-walden-has-no-such-cluster.service";
        assert_eq!(Systemd::of_host().path_of(&unit), Path::new(path));
        for line in [
            "Before=postgresql@15-walden-has-no-such-cluster.service",
            &format!(r#"RequiresMountsFor="/srv/fast disk" "/srv/100%%" "{DATA}""#),
            r#"ExecStart="/usr/bin/walden" "--config" "/etc/my 100%%.toml" "restore" "--resume""#,
            "Type=oneshot",
            "RemainAfterExit=yes",
            "TimeoutStartSec=infinity",
            "After=network-online.target local-fs.target remote-fs.target",
            "WantedBy=multi-user.target",
        ] {
            assert!(unit.text.lines().any(|found| found == line), "no {line:?} in:\n{}", unit.text);
        }
        assert!(BootUnit::of(Path::new("/srv/data"), [], &command).is_none());
        let price = ["$5".to_owned()];
        let unit = BootUnit::of(Path::new(DATA), [], &price).unwrap();
        assert!(unit.text.contains("ExecStart=\"$$5\"\n"), "{}", unit.text);
    }

    /// Where a tablespace is says whoever made it, and a unit is what root does.
    #[test]
    fn no_path_and_no_word_begins_a_line_of_its_own() {
        let command = ["/usr/bin/walden".to_owned()];
        let of = |place: &str, word: &str| {
            BootUnit::of(
                Path::new(DATA),
                [&PathBuf::from(place)],
                &[&command[..], &[word.to_owned()]].concat(),
            )
        };
        assert!(of("/srv/a", "b").is_some());
        assert_eq!(of("/srv/a\nExecStart=/bin/sh", "b"), None);
        assert_eq!(of("/srv/a", "b\rc"), None);
        let odd = PathBuf::from(OsString::from_vec(b"/srv/\xff".to_vec()));
        assert_eq!(BootUnit::of(Path::new(DATA), [&odd], &command), None);
    }

    #[test]
    fn what_was_never_written_is_removed_without_a_word_and_what_is_anothers_is_left() {
        let scratch = tempfile::tempdir().unwrap();
        let (systemd, units) = (Systemd::below(scratch.path()), scratch.path().join(UNITS));
        systemd.remove(Path::new(DATA)).unwrap();
        fs::create_dir_all(&units).unwrap();
        let file = units.join("walden-restore-15-main.service");
        let line = first_line(Path::new("/srv/15/main")).unwrap();
        fs::write(&file, format!("{line}\n[Unit]\n")).unwrap();
        for other in [DATA, "/srv/15/main2", "/srv/15"] {
            systemd.remove(Path::new(other)).unwrap();
            assert!(file.exists(), "{other}");
        }
        systemd.remove(Path::new("/srv/15/main")).unwrap();
        assert!(!file.exists());
    }
}
