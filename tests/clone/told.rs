//! What the user of a clone is told without asking.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::site::Source;
use crate::support::{Need, Options, require};

#[test]
fn who_makes_a_clone_is_told_what_guards_it_less_than_usual() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let source = Source::start(Options::default());
    source.backup_at_rest();
    source.archive_wal();
    // Credentials that read and may not write: of a folder that is somebody else's.
    let pins = source.walden.repository().join("main/pins");
    fs::create_dir(&pins).unwrap();
    fs::set_permissions(&pins, Permissions::from_mode(0o555)).unwrap();
    let created = source.walden.json(&["clone", "create", "told", "--no-start"]);
    assert_eq!(source.pins(), (0, 0));
    let told = |warning: &str| {
        let warnings = created["warnings"].as_array().unwrap();
        assert!(warnings.iter().any(|told| told.as_str().unwrap().contains(warning)), "{created}");
    };
    told("nothing keeps the basebackup there while the clone lives");
    told("a superuser of the clone can read that user's private keys");
    assert_eq!(created["settings"], Value::Array(Vec::new()), "there is no server yet");
    let shown = source.walden.run(&["clone", "status", "told"]).stdout;
    assert!(shown.contains("  warning       these credentials may not write to the store"), "{shown}");
    source.walden.run(&["clone", "delete", "told"]);
}
