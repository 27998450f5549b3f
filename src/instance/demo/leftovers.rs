//! What of a demonstration still runs or is mounted, found by the folder's unique name.
//!
//! The ordinary end needs none of this: it exists for a command that was killed half-way and for the proof that
//! nothing is left. Only Walden's and PostgreSQL's own programs count as ours: a shell or a pager that somebody
//! opened in the folder is not touched.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::unistd::{Pid, Uid};

use crate::instance::demo::scratch::Scratch;

/// The programs that a demonstration starts.
#[derive(Debug, Clone)]
pub(super) struct OurPrograms {
    pub(super) walden: PathBuf,
    pub(super) bin_directory: PathBuf,
}

/// A process as /proc shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Process {
    program: PathBuf,
    folder: PathBuf,
    command_line: String,
}

/// Lists mounts at or below the folder, the deepest first.
pub(super) fn mounts(scratch: &Scratch) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts_below(&table, scratch.path())
}

/// Takes a mount away at once; what still uses it sees errors.
pub(super) fn detach(mount: &Path) -> bool {
    if Uid::effective().is_root() {
        return umount2(mount, MntFlags::MNT_DETACH).is_ok();
    }
    let fusermount = std::process::Command::new("fusermount3").arg("-uz").arg(mount).output();
    fusermount.is_ok_and(|output| output.status.success())
}

/// Lists our processes that belong to the folder.
pub(super) fn processes(scratch: &Scratch, ours: &OurPrograms) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| i32::try_from(std::process::id()) != Ok(*pid))
        .filter(|pid| belongs(&Process::read(*pid), scratch.path(), ours))
        .map(Pid::from_raw)
        .collect()
}

impl Process {
    /// Reads what /proc tells; a process that is gone has nothing.
    fn read(pid: i32) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let link = |name: &str| std::fs::read_link(proc.join(name)).unwrap_or_default();
        let command_line = std::fs::read(proc.join("cmdline")).unwrap_or_default();
        Self {
            program: link("exe"),
            folder: link("cwd"),
            command_line: String::from_utf8_lossy(&command_line).replace('\0', " "),
        }
    }
}

fn belongs(process: &Process, folder: &Path, ours: &OurPrograms) -> bool {
    let program = process.program == ours.walden || process.program.starts_with(&ours.bin_directory);
    let name = folder.display().to_string();
    program && (process.folder.starts_with(folder) || process.command_line.contains(&name))
}

/// Reads the second field of each line, in which the kernel writes blanks and backslashes in octal.
fn mounts_below(table: &str, folder: &Path) -> Vec<PathBuf> {
    let point = |line: &str| {
        let field = line.split(' ').nth(1)?;
        let plain = field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
        Some(PathBuf::from(plain.replace("\\134", "\\")))
    };
    let mut below: Vec<PathBuf> =
        table.lines().filter_map(point).filter(|point| point.starts_with(folder)).collect();
    below.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_listed_the_deepest_first_and_by_whole_names() {
        let table = "walden /tmp/demo-1/mnt fuse ro 0 0\n\
                     walden /tmp/demo-1/clones/a\\040b/mnt fuse rw 0 0\n\
                     walden /tmp/demo-12/mnt fuse ro 0 0\n\
                     /dev/vda / ext4 rw 0 0\n";
        assert_eq!(
            mounts_below(table, Path::new("/tmp/demo-1")),
            [PathBuf::from("/tmp/demo-1/clones/a b/mnt"), PathBuf::from("/tmp/demo-1/mnt")]
        );
    }

    #[test]
    fn only_our_programs_in_our_folder_are_ours() {
        let ours =
            OurPrograms { walden: "/opt/walden".into(), bin_directory: "/usr/lib/postgresql/15/bin".into() };
        let is_ours = |program: &str, folder: &str, command_line: &str| {
            let process = Process {
                program: program.into(),
                folder: folder.into(),
                command_line: command_line.to_owned(),
            };
            belongs(&process, Path::new("/tmp/demo-1"), &ours)
        };
        assert!(is_ours("/usr/lib/postgresql/15/bin/postgres", "/tmp/demo-1/data", "postgres: checkpointer"));
        assert!(is_ours("/opt/walden", "/", "/opt/walden --config /tmp/demo-1/walden.toml internal serve"));
        assert!(!is_ours("/usr/bin/less", "/", "less /tmp/demo-1/server.log"));
        assert!(!is_ours("/bin/bash", "/tmp/demo-1", "bash"));
        assert!(!is_ours("/usr/lib/postgresql/15/bin/postgres", "/var/lib/postgresql", "postgres -D /x"));
        assert!(!is_ours("/opt/walden", "/", "/opt/walden demo"));
    }
}
