//! What is refused although nothing is damaged, and said to be so: keys that are missing, strange or exposed, signers
//! nobody trusts, backups that nobody signed or encrypted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::source::Source;
use crate::support::{Need, Run, Site, require};

/// One thing that is wrong with the keys, and what each command says.
struct Case {
    what: &'static str,
    /// Changes the configuration or the key files.
    wrong: fn(&Keys) -> String,
    /// Exit statuses of `list`, which needs no private key, and of `show --files`, which does.
    list: i32,
    files: i32,
    /// What the refusal says, and what it must not say.
    says: &'static str,
    says_not: &'static str,
}

/// The key files beside the configuration.
struct Keys {
    folder: PathBuf,
    configuration: String,
}

const DAMAGE: &str = "damaged";

const CASES: [Case; 7] = [
    Case {
        what: "the private key is not configured",
        wrong: |keys| keys.without("private_key_file"),
        list: 0,
        files: 2,
        says: "and none of these private keys is here",
        says_not: DAMAGE,
    },
    Case {
        what: "the private key is somebody else's",
        wrong: |keys| keys.with("private_key_file = \"test.pem\"", "private_key_file = \"other.pem\""),
        list: 0,
        files: 2,
        says: "and none of these private keys is here",
        says_not: DAMAGE,
    },
    Case {
        what: "the private key's file is gone",
        wrong: |keys| keys.with("private_key_file = \"test.pem\"", "private_key_file = \"gone.pem\""),
        list: 0,
        files: 2,
        says: "gone.pem",
        says_not: DAMAGE,
    },
    Case {
        what: "everybody can read the private key",
        wrong: |keys| {
            let file = keys.folder.join("test.pem");
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
            keys.configuration.clone()
        },
        list: 0,
        files: 2,
        says: "everybody",
        says_not: DAMAGE,
    },
    Case {
        what: "another signer is trusted",
        wrong: |keys| {
            keys.with("verify_key_file = \"test.verify.pem\"", "verify_key_file = \"other.verify.pem\"")
        },
        list: 3,
        files: 3,
        says: "is not among trusted_signers",
        says_not: DAMAGE,
    },
    Case {
        what: "nobody signed it",
        wrong: |keys| keys.configuration.clone(),
        list: 3,
        files: 3,
        says: "is not trusted: it is not signed",
        says_not: DAMAGE,
    },
    Case {
        what: "it is not encrypted",
        wrong: |keys| keys.with("trusted_signers = [\"test\"]\n", ""),
        list: 0,
        files: 3,
        says: "is not encrypted, and this configuration expects encryption",
        says_not: DAMAGE,
    },
];

impl Keys {
    fn with(&self, old: &str, new: &str) -> String {
        assert!(self.configuration.contains(old), "{old}");
        self.configuration.replace(old, new)
    }

    fn without(&self, key: &str) -> String {
        let lines = self.configuration.lines().filter(|line| !line.starts_with(key));
        lines.map(|line| format!("{line}\n")).collect()
    }
}

#[test]
fn wrong_keys_and_strange_signers_are_refused_and_not_called_damage() {
    require!(Need::PostgreSQL(15));
    let source = Source::create(|site: Site| site);
    let folder = source.walden.repository().with_file_name("");
    let file = source.walden.configuration_file();
    let keys = Keys { configuration: fs::read_to_string(&file).unwrap(), folder };
    add_other_keys(&source, &keys);
    for case in CASES.iter().filter(|case| !is_about_plain_backups(case)) {
        check(&source, &keys, case);
        let private = keys.folder.join("test.pem");
        fs::set_permissions(private, fs::Permissions::from_mode(0o600)).unwrap();
    }
}

#[test]
fn plain_backups_are_refused_where_signatures_or_encryption_are_expected() {
    require!(Need::PostgreSQL(15));
    let source = Source::create(Site::unencrypted);
    let folder = source.walden.repository().with_file_name("");
    let file = source.walden.configuration_file();
    let plain = fs::read_to_string(&file).unwrap();
    let keys = Keys { configuration: plain, folder };
    source.walden.run(&["show", "latest", "--files"]);
    add_other_keys(&source, &keys);
    let section = "[encryption]\nrecipients = [\"test\"]\nsigner = \"test\"\ntrusted_signers = [\"test\"]\n\n\
        [encryption.keys.test]\npublic_key_file = \"other.pub.pem\"\nprivate_key_file = \"other.pem\"\n\
        signing_key_file = \"other.sign.pem\"\nverify_key_file = \"other.verify.pem\"\n\n";
    let keys = Keys { configuration: format!("{section}{}", keys.configuration), ..keys };
    for case in CASES.iter().filter(|case| is_about_plain_backups(case)) {
        check(&source, &keys, case);
    }
    // Without a private key the recipients alone say that encryption is expected.
    let blind = Keys { configuration: keys.without("private_key_file"), folder: keys.folder.clone() };
    check(&source, &blind, &CASES[6]);
}

fn is_about_plain_backups(case: &Case) -> bool {
    ["nobody signed it", "it is not encrypted"].contains(&case.what)
}

/// Makes a second set of keys, as another company would have.
fn add_other_keys(source: &Source, keys: &Keys) {
    let arguments = ["key", "create", "--id", "other", "--bits", "3072"];
    Run::of(source.walden.command().current_dir(&keys.folder).args(arguments), "").expect_success();
}

fn check(source: &Source, keys: &Keys, case: &Case) {
    let configuration = (case.wrong)(keys);
    let file = source.walden.configuration_file();
    fs::write(&file, configuration).unwrap();
    let list = source.walden.try_run(&["list"]);
    assert_eq!(list.code(), Some(case.list), "{}: {}{}", case.what, list.stdout, list.stderr);
    if case.list == 0 {
        assert!(source.ids.iter().all(|id| list.stdout.contains(id)), "{}: {}", case.what, list.stdout);
    }
    let id = &source.ids[0];
    let data = source.cluster.data_directory();
    let clone = ["clone", "create", "refused", "--backup", id];
    let target = source.cluster.scratch().path().join("refused");
    let restore = ["restore", id, "--target-dir", target.to_str().unwrap()];
    for (arguments, status) in [
        (&["show", id, "--files"][..], case.files),
        (&clone[..], case.files),
        (&restore[..], case.files),
        // PostgreSQL must not take any of it for the end of the archive.
        (&["wal", "fetch", &source.segment, "fetched"][..], 200),
    ] {
        let run = Run::of(source.walden.as_root().command().current_dir(data).args(arguments), "");
        let what = format!("{}: {arguments:?}: {}", case.what, run.stderr);
        assert_eq!(run.code(), Some(status), "{what}");
        assert!(run.stderr.contains(case.says), "{what}");
        assert!(!run.stderr.contains(case.says_not), "{what}");
        assert!(!data.join("fetched").exists(), "{what}");
        assert!(!target.exists(), "{what}");
    }
    fs::write(&file, &keys.configuration).unwrap();
}
