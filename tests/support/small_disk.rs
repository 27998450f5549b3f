//! A small file system of a test's own, to be filled.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Run, Scratch};

/// Mounts a small file system in the test's folder, which takes it away again.
#[track_caller]
pub fn small_disk(scratch: &Scratch, name: &str, mib: u64, options: &[&str]) -> PathBuf {
    let image = scratch.path().join("disk.img");
    File::create(&image).unwrap().set_len(mib << 20).unwrap();
    let point = scratch.folder(name);
    let mut mkfs = Command::new("mkfs.ext4");
    Run::of(mkfs.args(["-q", "-m", "0"]).args(options).arg(&image), "").expect_success();
    Run::of(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&point), "").expect_success();
    scratch.account().own(&point);
    fs::set_permissions(&point, fs::Permissions::from_mode(0o700)).unwrap();
    point
}

/// Fills a disk up to the last bytes.
#[track_caller]
pub fn fill(disk: &Path, leave: u64) -> PathBuf {
    let path = disk.join("filler");
    let mut file = File::create(&path).unwrap();
    for piece in [1 << 20, 4096] {
        let bytes = vec![1; piece];
        // Synced piece by piece, because what only waits in memory takes no room yet.
        let error = loop {
            if let Err(error) = file.write_all(&bytes).and_then(|()| file.sync_data()) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(leave)).unwrap();
    file.sync_all().unwrap();
    path
}
