//! Where a run of the tests keeps the repositories that a test leaves to it, and a record of what each test made of it.
//!
//! `WALDEN_TEST_STORE` is `file` (a folder, without it too), `s3` (our server over that folder, so that tests may look at
//! objects and damage them as files) or `moto` (a server that is not ours, which keeps its objects to itself).
//! `WALDEN_TEST_REPORT` names a file for the record, one line each: kind, binary, test and reason, with tabs between them.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use super::moto::Moto;
use super::s3::S3;

/// What `WALDEN_TEST_STORE` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// A folder that the binary keeps itself.
    File,
    /// Our server over that folder.
    S3,
    /// A server that is not ours.
    Moto,
}

impl StoreKind {
    /// Reads it.
    pub fn of_this_run() -> Self {
        match std::env::var("WALDEN_TEST_STORE").as_deref() {
            Err(_) | Ok("file") => Self::File,
            Ok("s3") => Self::S3,
            Ok("moto") => Self::Moto,
            Ok(other) => panic!("WALDEN_TEST_STORE is file, s3 or moto, not {other}"),
        }
    }
}

/// A server that holds a repository; it ends when dropped.
#[derive(Debug)]
pub enum TestStore {
    S3(S3),
    Moto(Moto),
}

impl TestStore {
    /// Starts what this run keeps repositories in, unless that is a folder.
    pub fn start(folder: &Path) -> Option<Self> {
        let store = match StoreKind::of_this_run() {
            StoreKind::File => None,
            StoreKind::S3 => Some(Self::S3(S3::over(folder))),
            StoreKind::Moto => Some(Self::Moto(Moto::start())),
        };
        report("store", if store.is_some() { "in the store of this run" } else { "in a folder" });
        store
    }

    /// Returns the lines of `[storage]` for it.
    pub fn storage(&self) -> String {
        match self {
            Self::S3(s3) => s3.storage(),
            Self::Moto(moto) => moto.storage(),
        }
    }

    /// Says whether its objects are files as well; ends a test that needs them where they are not.
    pub fn assert_has_files(&self) {
        if matches!(self, Self::Moto(_)) {
            let why = "it looks at objects as files, and moto keeps them to itself";
            report("inapplicable", why);
            panic!("NOT APPLICABLE: {why}");
        }
    }
}

/// Notes something of the running test, where a record is kept.
pub fn report(kind: &str, why: &str) {
    let Some(file) = std::env::var_os("WALDEN_TEST_REPORT") else { return };
    let of_nextest = |name| std::env::var(name).unwrap_or_default();
    let (binary, test) = (of_nextest("NEXTEST_BINARY_ID"), of_nextest("NEXTEST_TEST_NAME"));
    // One write, so that lines of tests that run at once stay whole.
    let line = format!("{kind}\t{binary}\t{test}\t{why}\n");
    let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
    file.write_all(line.as_bytes()).unwrap();
}
