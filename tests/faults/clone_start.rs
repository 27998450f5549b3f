//! One request that fails, at each position of a clone's first start: it is asked again and the clone is right, or the
//! start fails and says where; nothing is left running or mounted, and the next start is right.
//!
//! The repository's folder is reached through an S3 server and a line, so that the whole of `walden clone start` runs:
//! the command, the supervisor, the mount, PostgreSQL's recovery and its `restore_command`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use walden::codec::Digest;

use crate::site::Faulted;
use crate::support::{Fault, Need, Proxy, Run, S3, Site, Sql, Walden, mounts_below, require, s3_storage};

/// More requests than a start makes: one that never comes to an end is a failure too.
const REQUESTS_MAX: usize = 100;

const NAME: &str = "started";

/// Their names take more than the half MiB up to which a manifest is fetched whole.
const MANY_FILES: u64 = 12_000;
/// Beside the index: the start-up set, and what the server reads beyond it.
const PACK_REQUESTS_MAX: usize = 6;
/// Six lists of basebackups and of WAL to choose from, the WAL that tells where recovery may end, and `site.json`: ten.
const CREATE_REST_MAX: usize = 12;
/// Segments for recovery, the histories it asks for in vain, and `site.json`: eight.
const START_REST_MAX: usize = 12;

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
        Self::of(Faulted::start(|_, site| site))
    }

    /// Takes a basebackup of what is there, and goes on.
    fn of(site: Faulted) -> Self {
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

/// Files whose names do not compress, so many that the file table is not fetched with the beginning of the manifest.
fn make_many_files(site: &Faulted) {
    let folder = site.data_directory().join("many");
    fs::create_dir(&folder).unwrap();
    for n in 0..MANY_FILES {
        let [one, two] = [n, !n].map(|n| hex::encode(Digest::of(&n.to_le_bytes()).as_bytes()));
        fs::write(folder.join(one + &two), "").unwrap();
    }
    Run::of(Command::new("chown").args(["-R", "postgres:"]).arg(&folder), "").expect_success();
}

/// Says what a request is about: its method and the kind of object, or that it lists.
fn kind_of(head: &str) -> String {
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if query.contains("list-type") {
        return format!("{method} list");
    }
    let parts: Vec<&str> = path.split('/').collect();
    let below = |folder: &str| parts.iter().position(|part| *part == folder).map(|at| &parts[at + 1..]);
    let kind = match (below("basebackups"), below("clusters"), below("pins")) {
        (Some([_id, kind, ..]), ..) => kind,
        (None, Some([_cluster, kind, ..]), _) => kind,
        (.., Some(_)) => "pins",
        _ => parts.last().unwrap(),
    };
    format!("{method} {kind}")
}

fn counted(heads: &[String]) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    heads.iter().for_each(|head| *counted.entry(kind_of(head)).or_default() += 1);
    counted
}

/// Takes the parts of a basebackup's index out of what was counted, as those who expect them write them.
fn take_index(counted: &mut BTreeMap<String, usize>) -> Vec<(&'static str, usize)> {
    let parts = ["backup.json", "expired", "manifest", "refs"];
    parts.into_iter().map(|part| (part, counted.remove(&format!("GET {part}")).unwrap_or_default())).collect()
}

/// Before the first query a store far away is asked for nothing twice: each request is a round trip.
#[test]
fn a_clones_first_start_asks_once_for_each_part_of_the_index_it_needs() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let site = Faulted::start(|_, site| site);
    make_many_files(&site);
    let scene = Scene::of(site);
    scene.line.take_requests();
    scene.walden.run(&["clone", "create", NAME, "--no-start", "--no-hydrate"]);
    let mut of_create = counted(&scene.line.take_requests());
    scene.walden.run(&["clone", "start", NAME]);
    let mut of_start = counted(&scene.line.take_requests());
    scene.assert_right("the start that was counted");
    eprintln!("create: {of_create:?}, start: {of_start:?}");

    // The record to choose by; whether it is expired is asked again once a pin is there, against who sweeps meanwhile. Of
    // the manifest the beginning alone, for the tablespaces; the packs are nothing to it.
    let expected = [("backup.json", 1), ("expired", 2), ("manifest", 1), ("refs", 0)];
    assert_eq!(take_index(&mut of_create), expected);
    assert_eq!(of_create.remove("PUT pins"), Some(1));
    // The same beginning, and the file table in one piece, however many blocks it has.
    let expected = [("backup.json", 1), ("expired", 1), ("manifest", 2), ("refs", 1)];
    assert_eq!(take_index(&mut of_start), expected);
    // The start-up set, and pages that the server reads beyond it.
    let packs = of_start.remove("GET packs").unwrap_or_default();
    assert!((1..=PACK_REQUESTS_MAX).contains(&packs), "{packs} requests for packs");
    assert_eq!(of_create.remove("GET packs"), None);
    for (what, rest, most) in [("create", of_create, CREATE_REST_MAX), ("start", of_start, START_REST_MAX)] {
        let count: usize = rest.values().sum();
        assert!(count <= most, "{what} made {count} further requests, not {most}: {rest:?}");
        assert!(rest.keys().all(|kind| kind.starts_with("GET ")), "{what} wrote: {rest:?}");
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
