//! Who keeps a mount busy: read from `/proc`, for the message of a refused unmount.
//!
//! A mount is held by open files, working and root directories, mapped files and mounts inside it. Nothing here
//! touches the mount itself: a look at a path inside it could hang while the store is away, so links in `/proc`
//! are compared as text.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// How many holders are named; a person needs one to begin with.
const HOLDERS_MAX: usize = 20;

/// A process, or a mount, that keeps a mount busy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    Process { pid: i32, command: String, what: String },
    Mount { path: PathBuf },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command, what } => write!(f, "process {pid} ({command}): {what}"),
            Self::Mount { path } => write!(f, "mount on \"{}\"", path.display()),
        }
    }
}

/// Finds who holds the mount at `mount_point`, which must be absolute and without links.
pub fn find(mount_point: &Path) -> Vec<Holder> {
    let mut holders: Vec<Holder> = mounts_inside(mount_point).map(|path| Holder::Mount { path }).collect();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if holders.len() >= HOLDERS_MAX {
            break;
        }
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(what) = how_held(&process.path(), mount_point) {
            let command =
                fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim().to_owned();
            holders.push(Holder::Process { pid, command, what });
        }
    }
    holders
}

/// Finds processes with open files on mounts that have no place any more, by the kernel's numbers for these; one that has
/// a place is another's by now.
pub fn find_detached(mounts: &[u32]) -> Vec<Holder> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let placed: Vec<u32> = table.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    let detached: Vec<u32> = mounts.iter().copied().filter(|mount| !placed.contains(mount)).collect();
    let mut holders = Vec::new();
    if !detached.is_empty() {
        find_open(&detached, &mut holders);
    }
    holders
}

/// Finds processes with open files on mounts with these numbers.
fn find_open(mounts: &[u32], holders: &mut Vec<Holder>) {
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if holders.len() >= HOLDERS_MAX {
            return;
        }
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(what) = open_on(&process.path(), mounts) {
            let command =
                fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim().to_owned();
            holders.push(Holder::Process { pid, command, what });
        }
    }
}

/// Says what a process has open on one of these mounts, without asking any of them.
fn open_on(process: &Path, mounts: &[u32]) -> Option<String> {
    for descriptor in fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten() {
        let info = fs::read_to_string(descriptor.path()).unwrap_or_default();
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mount = mount.and_then(|mount| mount.trim().parse::<u32>().ok());
        if mount.is_some_and(|mount| mounts.contains(&mount) && !has_place(process, mount)) {
            let link = process.join("fd").join(descriptor.file_name());
            return Some(format!("open \"{}\"", fs::read_link(link).unwrap_or_default().display()));
        }
    }
    None
}

/// Tells whether a mount has a place as a process sees it: then it is a container's by now.
fn has_place(process: &Path, mount: u32) -> bool {
    let table = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
    table.lines().any(|line| line.split(' ').next().is_some_and(|number| number == mount.to_string()))
}

/// Says how a process holds the mount, if it does; processes of others we may not look into hold nothing we see.
fn how_held(process: &Path, mount_point: &Path) -> Option<String> {
    for (name, label) in [("cwd", "working directory"), ("root", "root directory"), ("exe", "program")] {
        if let Some(path) = inside(&process.join(name), mount_point) {
            return Some(format!("{label} \"{}\"", path.display()));
        }
    }
    for descriptor in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        if let Some(path) = inside(&descriptor.path(), mount_point) {
            return Some(format!("open \"{}\"", path.display()));
        }
    }
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    let mapped = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let mut within = mapped.filter(|path| path.starts_with(mount_point));
    within.next().map(|path| format!("mapped \"{}\"", path.display()))
}

fn inside(link: &Path, mount_point: &Path) -> Option<PathBuf> {
    fs::read_link(link).ok().filter(|target| target.starts_with(mount_point))
}

fn mounts_inside(mount_point: &Path) -> impl Iterator<Item = PathBuf> {
    let inside = move |path: &PathBuf| path.starts_with(mount_point) && path != mount_point;
    mount_points().into_iter().filter(inside).collect::<Vec<_>>().into_iter()
}

/// Returns where file systems are mounted, as this process sees it.
pub fn mount_points() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .collect()
}

/// Returns the type of what is mounted at exactly this path and is seen there, by the lines of mountinfo.
pub(super) fn mounted_at<'a>(table: &'a str, path: &Path) -> Option<&'a str> {
    let (_, system) = line_of(table, path)?;
    system.split(' ').next()
}

/// Returns the kernel's number for the mount that is seen at exactly this path, which must be without links.
pub fn mount_id(path: &Path) -> Option<u32> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (mount, _) = line_of(&table, path)?;
    mount.split(' ').next()?.parse().ok()
}

/// Tells whether what is seen there takes writes.
pub(super) fn is_writable_at(table: &str, path: &Path) -> bool {
    let options = line_of(table, path).and_then(|(mount, _)| mount.split(' ').nth(5));
    options.is_some_and(|options| options.split(',').any(|option| option == "rw"))
}

/// Returns what mountinfo says of the mount that is seen at a path, and of its file system.
fn line_of<'a>(table: &'a str, path: &Path) -> Option<(&'a str, &'a str)> {
    let mut parts = table.lines().filter_map(|line| line.split_once(" - "));
    let is_there = |(mount, _): &(&str, &str)| {
        mount.split(' ').nth(4).map(unescape).is_some_and(|point| Path::new(&point) == path)
    };
    // Of several mounts on one point the last one is seen.
    parts.rfind(is_there)
}

/// Undoes mountinfo's octal escapes of space, tab, newline and backslash.
pub(crate) fn unescape(field: &str) -> String {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_s_escapes_are_undone() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/plain\"), r"/plain\");
        assert_eq!(unescape(r"\0"), r"\0");
    }

    #[test]
    fn of_several_mounts_on_a_point_the_last_is_seen() {
        let table = "36 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n37 36 0:50 / /srv/a\\040b rw shared:1 - fuse.walden w rw\n\
                     38 37 0:51 / /srv rw - tmpfs tmpfs rw\n";
        assert_eq!(mounted_at(table, Path::new("/srv/a b")), Some("fuse.walden"));
        assert_eq!(mounted_at(table, Path::new("/srv")), Some("tmpfs"));
        assert_eq!(mounted_at(table, Path::new("/srv/a")), None);
        assert!(is_writable_at(table, Path::new("/srv/a b")) && !is_writable_at(table, Path::new("/srv/a")));
        let table = table.replace("/srv/a\\040b rw ", "/srv/a\\040b ro,nosuid ");
        assert!(!is_writable_at(&table, Path::new("/srv/a b")));
    }

    #[test]
    fn what_is_open_on_a_mount_without_a_place_is_found_by_its_number() {
        use std::os::fd::AsRawFd;
        // The kernel's own mount for sockets has no place anywhere.
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.as_raw_fd())).unwrap();
        let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).unwrap();
        let detached: u32 = number.trim().parse().unwrap();
        let own = Path::new("/proc/self");
        assert!(open_on(own, &[detached]).is_some_and(|what| what.contains("socket")));
        let held = fs::File::open("/proc/self/status").unwrap();
        let placed = mount_id(Path::new("/proc")).unwrap();
        assert_eq!(open_on(own, &[placed, u32::MAX]), None);
        assert_eq!(find_detached(&[placed, u32::MAX]), [], "it has its place");
        drop(held);
    }

    #[test]
    fn an_open_file_names_its_process_and_nothing_else_does() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().canonicalize().unwrap();
        assert_eq!(find(&place), []);
        let file = fs::File::create(place.join("held")).unwrap();
        let holders = find(&place);
        drop(file);
        assert!(
            matches!(&holders[..], [Holder::Process { pid, what, .. }]
                if *pid == std::process::id() as i32 && what.starts_with("open ") && what.contains("held")),
            "{holders:?}"
        );
    }
}
