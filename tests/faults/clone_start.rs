//! One request that fails, at each position of a clone's first start: it is asked again and the clone is right, or the
//! start fails and says where; nothing is left running or mounted, and the next start is right.
//!
//! The repository's folder is reached through an S3 server and a line, so that the whole of `walden clone start` runs:
//! the command, the supervisor, the mount, PostgreSQL's recovery and its `restore_command`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::site::Faulted;
use crate::support::{Fault, Need, Proxy, Run, S3, Site, Sql, Walden, mounts_below, require, s3_storage};

/// More requests than a start makes: one that never comes to an end is a failure too.
const REQUESTS_MAX: usize = 100;

const NAME: &str = "started";

/// A site whose clones reach their store over a line.
struct Scene {
    site: Faulted,
    /// As root where the test is.
    walden: Walden,
    line: Proxy,
    // There as long as the line leads to it.
    _store: S3,
}

/// What a clone must hold: rows of the basebackup, and a change that only the WAL has.
const CONTENT: &str = "select count(*) || ' ' || sum(hashtext(text)) from kept";

impl Scene {
    fn new() -> Self {
        let site = Faulted::start(|_, site| site);
        site.archive();
        site.walden.run(&["backup"]);
        site.sql("delete from kept where n % 3 = 0");
        site.archive_wal();
        let store = S3::over(&site.walden.repository());
        let line = Proxy::to(&store.endpoint());
        let described = Site::of(&site, site.data_directory())
            .bin_directory(&site.bin_directory())
            .storage(&s3_storage(&line.endpoint()));
        site.walden.reconfigure(site.scratch(), &described);
        Self { walden: site.walden.as_root(), site, line, _store: store }
    }

    fn folder(&self) -> PathBuf {
        self.site.scratch().path().join("walden/clones").join(NAME)
    }

    /// Starts a new clone while the request at a position meets a fault; returns what came of it, what was asked, and
    /// whether the fault was met.
    fn start(&self, position: usize, fault: &Fault) -> (Run, Vec<String>, bool) {
        // A start has as many requests each time only without what comes in the background.
        self.walden.run(&["clone", "create", NAME, "--no-start", "--no-hydrate"]);
        self.line.take_requests();
        self.line.inject_at(position, fault.clone());
        let run = self.walden.try_run(&["clone", "start", NAME]);
        (run, self.line.take_requests(), self.line.heal() == 1)
    }

    #[track_caller]
    fn assert_right(&self, what: &str) {
        let status = self.walden.json(&["clone", "status", NAME]);
        assert_eq!(status["state"], "running", "{what}: {status}");
        let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
        let clone = Sql::at(Path::new(status["socket_directory"].as_str().unwrap()), port);
        assert_eq!(clone.sql(CONTENT), self.site.sql(CONTENT), "{what}");
    }

    #[track_caller]
    fn assert_ended(&self, what: &str) {
        let status = self.walden.json(&["clone", "status", NAME]);
        assert_eq!(status["state"], "failed", "{what}: {status}");
        assert_eq!(status["server_pid"], Value::Null, "{what}: {status}");
        assert!(mounts_below(&self.folder()).is_empty(), "{what}: still mounted");
    }

    /// Lets the fault befall each request of a start in turn; returns how many there were and how many starts failed.
    fn go_through(&self, fault: &Fault) -> (usize, usize) {
        let mut failures = 0;
        for position in 0..REQUESTS_MAX {
            let (run, asked, met) = self.start(position, fault);
            let asked = asked.get(position).and_then(|head| head.lines().next());
            let what = format!("{fault:?} at request {position}, {asked:?}");
            if run.code() == Some(0) {
                self.assert_right(&what);
            } else {
                failures += 1;
                for part in [" main/", &self.line.endpoint()] {
                    assert!(run.stderr.contains(part), "{what}: no \"{part}\" in {}", run.stderr);
                }
                self.assert_ended(&what);
                self.walden.run(&["clone", "start", NAME]);
                self.assert_right(&format!("{what}, then"));
            }
            self.walden.run(&["clone", "delete", NAME]);
            if !met {
                return (position, failures);
            }
        }
        panic!("a start makes more than {REQUESTS_MAX} requests");
    }
}

/// The store does it, and the answer is lost; half an answer: each is asked again, so that every start succeeds.
#[test]
fn a_clones_first_start_survives_a_broken_answer_at_every_request() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new();
    for fault in [Fault::LoseAnswer, Fault::CutAnswer] {
        let (requests, failures) = scene.go_through(&fault);
        assert!(requests >= 8, "{fault:?}: {requests} requests");
        assert_eq!(failures, 0, "{fault:?}: {failures} of {requests} starts failed");
    }
}

/// A refusal is not asked again: what needs the answer fails and says so, and the next start is right.
#[test]
fn a_clones_first_start_fails_loudly_at_a_refused_request_and_the_next_is_right() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new();
    let (requests, failures) = scene.go_through(&Fault::refusal("403 Forbidden", "", "AccessDenied"));
    assert!(requests >= 8 && failures >= 3, "{requests} requests, {failures} failures");
}
