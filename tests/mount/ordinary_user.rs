//! The same mounts made by somebody who is not root, through `fusermount3`.
//!
//! The test runs its own binary again as another user, so that what is tested is all of the process.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use walden::disk::Owner;

use crate::harness::{can_mount, skip};

/// The user of last resort; it owns nothing.
const NOBODY: u32 = 65534;

const TESTS: [&str; 5] = [
    "read_only::ordinary_tools_read_it",
    "read_only::unmounting_a_mount_in_use_names_who_holds_it",
    "writable::it_behaves_as_a_local_directory_does_and_keeps_everything",
    "writable::what_the_mount_does_not_do_it_says",
    "passthrough::who_may_not_pass_through_reads_and_writes_all_the_same",
];

#[test]
fn an_ordinary_user_mounts_too() {
    if !can_mount() || !Owner::current().is_root() {
        return;
    }
    if !Path::new("/usr/bin/fusermount3").exists() {
        skip("mounting as an ordinary user needs fusermount3");
        return;
    }
    // A copy, because the folder of the build need not be open to everybody.
    let scratch = tempfile::Builder::new().prefix("walden-mount-user-").tempdir().unwrap();
    let program = scratch.path().join("mount");
    std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    // A device of its own in a mount namespace of its own: not every machine opens /dev/fuse to everybody, and it is
    // not ours to change.
    let script = "mknod -m 666 $0/fuse c 10 229 && mount --bind $0/fuse /dev/fuse && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "bash", "-c", script])
        .arg(scratch.path())
        .args(["setpriv", &format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"])
        .arg(&program)
        .args(["--exact", "--nocapture"])
        .args(TESTS)
        .current_dir("/")
        .output()
        .unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{text}");
    assert!(text.contains(&format!("{} passed", TESTS.len())) && !text.contains("SKIPPED"), "{text}");
}
