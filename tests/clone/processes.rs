//! The processes of a clone as the system has them, whoever of them still answers.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use crate::site::{Clone, is_alive};

/// What runs of a clone.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Processes {
    pub supervisor: Option<Pid>,
    /// What the supervisor has started.
    pub postmaster: Option<Pid>,
    /// Whatever else works in the clone's folder: PostgreSQL's processes.
    others: Vec<Pid>,
}

impl Processes {
    /// Looks them up.
    pub fn of(clone: &Clone) -> Self {
        let (folder, configuration) = (clone.folder(), clone.walden.configuration_file());
        let mut found = Self::default();
        let mut workers = Vec::new();
        for (pid, process) in processes().filter(|(pid, _)| is_alive(*pid)) {
            if supervises(&process, &configuration, &clone.name) {
                found.supervisor = Some(pid);
            } else if fs::read_link(process.join("cwd")).is_ok_and(|place| place.starts_with(&folder)) {
                workers.push((pid, parent(&process)));
            }
        }
        for (pid, parent) in workers {
            if found.supervisor.is_some() && parent == found.supervisor && found.postmaster.is_none() {
                found.postmaster = Some(pid);
            } else {
                found.others.push(pid);
            }
        }
        found
    }

    /// All of them, the supervisor first.
    pub fn all(&self) -> impl Iterator<Item = Pid> {
        self.supervisor.into_iter().chain(self.postmaster).chain(self.others.iter().copied())
    }

    pub fn is_empty(&self) -> bool {
        self.all().next().is_none()
    }
}

fn processes() -> impl Iterator<Item = (Pid, PathBuf)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let numbered =
        entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    numbered.map(|(pid, path)| (Pid::from_raw(pid), path))
}

/// Tells whether a process is `walden internal serve-clone NAME` of this configuration.
fn supervises(process: &Path, configuration: &Path, name: &str) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let has = |word: &str| words.iter().position(|found| *found == word.as_bytes());
    has(&configuration.display().to_string()).is_some()
        && has("serve-clone").is_some_and(|at| words.get(at + 1) == Some(&name.as_bytes()))
}

fn parent(process: &Path) -> Option<Pid> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name before may hold anything; after it come state and parent.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok().map(Pid::from_raw)
}
