//! Which file systems an upper may lie on.
//!
//! The holes of a file must say truly what was never written, also after a crash: data before sizes, no zero-detection.
//! ext4 (unless mounted `data=writeback`), xfs and btrfs do that; tmpfs does for tests. Others are refused by name: ZFS
//! turns written zeros into holes, network file systems have no holes to speak of, overlayfs copies files whole.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::statfs;

use crate::mount::holders;
use crate::mount::upper::local_map::UNIT;

/// Why a directory cannot hold an upper.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    #[error("could not look at the file system of \"{}\": {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("\"{}\" is on {name}, which does not keep holes as they are", path.display())]
    Kind { path: PathBuf, name: String },
    #[error("\"{}\" is on ext4 mounted with data=writeback, which can show old data after a crash", path.display())]
    Writeback { path: PathBuf },
    #[error("\"{}\" is on a file system with blocks of {bytes} bytes, more than {UNIT}", path.display())]
    BlockSize { path: PathBuf, bytes: u64 },
}

/// Checks that a directory can hold an upper.
pub fn check(path: &Path) -> Result<(), Unsuitable> {
    let io = |source| Unsuitable::Io { path: path.to_owned(), source };
    let figures = statfs(path).map_err(|errno| io(errno.into()))?;
    let device = std::fs::metadata(path).map_err(io)?.dev();
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(io)?;
    let options = |source: &str| {
        let device = Path::new(source).file_name().unwrap_or_default();
        std::fs::read_to_string(Path::new("/proc/fs/ext4").join(device).join("options")).unwrap_or_default()
    };
    judge(path, figures.filesystem_type().0 as i64, &mount_of(&table, path, device), options)?;
    // Block sizes are positive.
    let bytes = figures.block_size() as u64;
    if bytes > UNIT {
        return Err(Unsuitable::BlockSize { path: path.to_owned(), bytes });
    }
    Ok(())
}

/// What `/proc/self/mountinfo` says about the mount a path is on.
#[derive(Debug, Default, PartialEq, Eq)]
struct MountLine {
    kind: String,
    source: String,
    options: String,
}

fn judge(
    path: &Path,
    magic: i64,
    mount: &MountLine,
    options: impl Fn(&str) -> String,
) -> Result<(), Unsuitable> {
    const EXT4: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    const TMPFS: i64 = 0x0102_1994;
    let path = path.to_owned();
    match magic {
        XFS | BTRFS | TMPFS => Ok(()),
        // The number is ext2's and ext3's too, which have no journal of this kind.
        EXT4 if mount.kind == "ext4" => {
            let mounted = mount.options.split(',');
            let in_effect = options(&mount.source);
            let mut all = mounted.chain(in_effect.lines());
            if all.any(|option| option == "data=writeback") {
                Err(Unsuitable::Writeback { path })
            } else {
                Ok(())
            }
        }
        _ if !mount.kind.is_empty() => Err(Unsuitable::Kind { path, name: mount.kind.clone() }),
        other => Err(Unsuitable::Kind { path, name: format!("a file system of type {other:#x}") }),
    }
}

/// Finds the last mount of the path's device, or else the mount whose path is the longest above it (btrfs
/// subvolumes show device numbers that the table does not know).
fn mount_of(table: &str, path: &Path, device: u64) -> MountLine {
    let number = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let resolved = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut best: Option<(bool, usize, MountLine)> = None;
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let ([_, _, found, _, point, ..], [kind, source, options, ..]) = (&left[..], &right[..]) else {
            continue;
        };
        let point = holders::unescape(point);
        let same = *found == number;
        if !same && !resolved.starts_with(&point) {
            continue;
        }
        let line = MountLine {
            kind: (*kind).to_owned(),
            source: holders::unescape(source),
            options: (*options).to_owned(),
        };
        if best.as_ref().is_none_or(|(was_same, length, _)| (same, point.len()) >= (*was_same, *length)) {
            best = Some((same, point.len(), line));
        }
    }
    best.map(|(_, _, line)| line).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
31 24 8:2 / /srv\\040x rw shared:2 - ext4 /dev/sda2 rw,data=writeback\n\
32 24 0:40 / /mnt/z rw - zfs tank/z rw,xattr\n";

    fn on(device: u64, path: &str) -> MountLine {
        mount_of(TABLE, Path::new(path), device)
    }

    #[test]
    fn ext4_is_taken_unless_it_writes_back() {
        let plain = on(nix::sys::stat::makedev(8, 1), "/x");
        assert_eq!((plain.kind.as_str(), plain.source.as_str()), ("ext4", "/dev/sda1"));
        assert!(judge(Path::new("/x"), 0xef53, &plain, |_| String::new()).is_ok());
        let in_effect = |_: &str| "rw\ndata=writeback\n".to_owned();
        assert!(matches!(
            judge(Path::new("/x"), 0xef53, &plain, in_effect),
            Err(Unsuitable::Writeback { .. })
        ));
        let writeback = on(nix::sys::stat::makedev(8, 2), "/srv x/y");
        let refused = judge(Path::new("/srv x/y"), 0xef53, &writeback, |_| String::new());
        assert!(matches!(refused, Err(Unsuitable::Writeback { .. })));
    }

    #[test]
    fn others_are_refused_by_name() {
        let zfs = on(1 << 20, "/mnt/z/a");
        let refused = judge(Path::new("/mnt/z/a"), 0x2fc1_2fc1, &zfs, |_| String::new()).unwrap_err();
        assert!(refused.to_string().contains("is on zfs"), "{refused}");
        let ext2 = MountLine { kind: "ext2".into(), ..MountLine::default() };
        assert!(judge(Path::new("/x"), 0xef53, &ext2, |_| String::new()).is_err());
        let unknown = judge(Path::new("/x"), 0x6969, &MountLine::default(), |_| String::new()).unwrap_err();
        assert!(unknown.to_string().contains("0x6969"), "{unknown}");
    }

    #[test]
    fn the_file_system_of_the_tests_is_one_of_them() {
        check(tempfile::tempdir().unwrap().path()).unwrap();
    }
}
