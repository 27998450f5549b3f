//! Targets that may not be written and keys that must not be used: refused with the reason, never called damage, and
//! all goes on once the cause is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::site::Faulted;
use crate::support::{Need, StoreKind, require};

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn what_may_not_be_written_or_trusted_is_refused_by_its_name() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let before = site.listed();
    let folder = site.scratch().path().join("walden");
    // Not from the archiver, which would go on trying.
    site.set_archive_command("false");
    let segment = format!("pg_wal/{}", site.end_segment());
    let segment = site.data_directory().join(segment);
    let target = site.scratch().path().join("refused");
    let push = ["wal", "push", segment.to_str().unwrap()];
    let restore = ["restore", "latest", "--target-dir", target.to_str().unwrap()];
    let (repository, basebackups) = (folder.join("repository"), folder.join("repository/main/basebackups"));
    let (sign, key) = (folder.join("test.sign.pem"), folder.join("test.pem"));
    let cases = [
        (&basebackups, 0o500, 0o700, &["backup"][..], "main/basebackups"),
        (&repository, 0o000, 0o700, &["backup"][..], "repository"),
        (&repository, 0o000, 0o700, &push[..], "repository"),
        (&sign, 0o644, 0o600, &["backup"][..], "everybody"),
        (&sign, 0o644, 0o600, &push[..], "everybody"),
        (&key, 0o644, 0o600, &restore[..], "everybody"),
    ];
    for (path, wrong, right, arguments, says) in cases {
        // A server that keeps the folder has rights of its own.
        if path.starts_with(&repository) && StoreKind::of_this_run() != StoreKind::File {
            continue;
        }
        set_mode(path, wrong);
        let run = site.walden.try_run(arguments);
        set_mode(path, right);
        let what = format!("{arguments:?} with {}: {}", path.display(), run.stderr);
        assert_eq!(run.code(), Some(2), "{what}");
        assert!(run.stderr.contains(says) && !run.stderr.contains("damaged"), "{what}");
        assert_eq!(site.listed(), before, "{what}");
    }
    assert!(!target.exists(), "nothing is restored without a key");
    site.walden.run(&push);
    site.archive();
    site.walden.run(&["backup"]);
    assert_eq!(site.listed().len(), before.len() + 1);
}
