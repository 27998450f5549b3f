//! What a clone shows of itself: what its server and its mount have written, and that it is being made.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use walden::instance::clone_folder::CloneFolder;

use crate::site::{Clone, Source};
use crate::support::{Need, Options, require, wait_for};

/// A command that goes on until its reader has gone; it is killed when dropped.
struct Following(Child);

impl Following {
    fn start(clone: &Clone, options: &[&str]) -> Self {
        let mut command = clone.walden.command();
        command.args(["clone", "log", &clone.name, "--follow"]).args(options);
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Reads until a line has a word, and goes away.
    fn read_up_to(&mut self, word: &str) {
        let lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let found = lines.map(Result::unwrap).find(|line| line.contains(word));
        assert!(found.is_some(), "the log came to an end without \"{word}\"");
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn its_logs_are_shown_and_followed_as_long_as_somebody_reads() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::start(Options::default());
    source.backup_at_rest();
    let clone = source.clone("told", &["--no-start"]);
    let words = ["clone", "log", "told"];
    assert_eq!(clone.walden.run(&words).stdout, "", "nothing has run yet");
    clone.run("start");
    let shown = clone.walden.run(&words).stdout;
    assert!(shown.contains("database system is ready to accept connections"), "{shown}");
    let mount = clone.walden.json(&["clone", "log", "told", "--mount"]);
    assert_eq!(mount["file"].as_str().unwrap(), clone.folder().join("mount.log").to_str().unwrap());
    assert!(mount["lines"].is_array(), "{mount}");

    // What the other one has is not in it.
    assert!(!mount.to_string().contains("database system is ready"), "{mount}");
    let mut following = Following::start(&clone, &[]);
    clone.sql("do $$ begin raise log 'the first word'; end $$");
    following.read_up_to("the first word");
    // Whoever follows learns that nobody reads when there is something to show.
    wait_for("the command to end", || {
        clone.sql("do $$ begin raise log 'another word'; end $$");
        following.0.try_wait().unwrap().map(|status| assert!(status.success(), "{status}"))
    });
    let refused = clone.walden.try_run(&["--output", "json", "clone", "log", "told", "--follow"]);
    let refused = refused.expect_code(2);
    assert!(refused.stderr.contains("hint: "), "{}", refused.stderr);
    clone.run("delete");
}

/// Whoever makes one holds its folder until it is done; without him it is one that was never started.
#[test]
fn one_that_is_being_made_says_so() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::start(Options::default());
    source.backup_at_rest();
    let clone = source.clone("new", &["--no-start"]);
    let lock = CloneFolder::new(&source.clones(), "new").unwrap().lock().unwrap();
    assert_eq!(clone.state(), "creating");
    let listed = clone.walden.json(&["clone", "list"]);
    assert_eq!(listed["clones"][0]["state"], "creating", "{listed}");
    drop(lock);
    assert_eq!(clone.state(), "stopped");
    clone.run("delete");
}
