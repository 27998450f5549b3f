//! Whole command lines, run in this process: what goes to standard output and to standard error, and the status.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;

use crate::config::Environment;

/// What a command left behind.
#[derive(Debug)]
struct Outcome {
    status: u8,
    stdout: String,
    stderr: String,
}

impl Outcome {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

#[derive(Debug, Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run_with(line: &[&str], variables: &[(&str, &str)]) -> Outcome {
    let arguments: Vec<OsString> = ["walden"].iter().chain(line).map(OsString::from).collect();
    let (stdout, mut stderr) = (Sink::default(), Vec::new());
    let status = super::run(&arguments, Environment::of(0, variables), Box::new(stdout.clone()), &mut stderr);
    let stdout = String::from_utf8(stdout.0.lock().unwrap().clone()).unwrap();
    Outcome { status, stdout, stderr: String::from_utf8(stderr).unwrap() }
}

fn run(line: &[&str]) -> Outcome {
    run_with(line, &[])
}

/// A configuration with two sites and the keys of `key create`.
fn configuration() -> (TempDir, String) {
    let scratch = tempfile::tempdir().unwrap();
    let keys = super::key::create_in(scratch.path(), "2026-11", 3072).unwrap();
    let file = scratch.path().join("walden.toml");
    fs::write(&file, keys).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (scratch, file)
}

/// An option that a command would leave aside is a mistake, not a wish to be passed over.
#[test]
fn options_that_would_be_passed_over_are_mistakes() {
    let restore = ["restore", "--target-dir", "/nowhere"];
    let standby = ["--standby", "--primary-conninfo", "host=a"];
    let targets = [
        &["--target-time", "2026-11-20 10:15:00Z"][..],
        &["--target-timeline", "2"],
        &["--target-action", "promote"],
        &["--target-xid", "7", "--target-exclusive"],
    ];
    let mut lines: Vec<Vec<&str>> = vec![
        [&restore[..], &["--target-name", "a", "--target-exclusive"]].concat(),
        [&restore[..], &["--target", "immediate", "--target-exclusive"]].concat(),
        // Of what is not said.
        [&restore[..], &["--target-exclusive"]].concat(),
        vec!["clone", "create", "a", "--target-name", "a", "--target-exclusive"],
    ];
    for target in targets {
        lines.push([&restore[..], &["--resume"], target].concat());
        lines.push([&restore[..], &standby, target].concat());
    }
    for line in lines {
        let outcome = run(&line);
        assert_eq!(outcome.status, 2, "{line:?}: {}", outcome.stderr);
        let says = ["cannot be used with", "were not provided"];
        assert!(says.iter().any(|part| outcome.stderr.contains(part)), "{line:?}: {}", outcome.stderr);
    }
}

#[test]
fn mistakes_on_the_command_line_are_status_2_in_our_form() {
    for (line, stderr) in [
        (&["lst"][..], "error: unrecognized subcommand 'lst'\nhint: Did you mean \"list\"?\n"),
        (&["key", "creat"], "error: unrecognized subcommand 'creat'\nhint: Did you mean \"create\"?\n"),
        (
            &["key", "create"],
            "error: the following required arguments were not provided: --id <ID>\nhint: `walden --help` and `walden COMMAND --help` tell what there is.\n",
        ),
        (
            &["key", "list", "--confg", "x"],
            "error: unexpected argument '--confg' found\nhint: Did you mean \"--config\"?\n",
        ),
        (
            &["key", "create", "--id", "a/b"],
            "error: \"a/b\" is not a name for a key\nhint: Take letters, digits, _, - and ., at most 64, and begin with a letter or a digit.\n",
        ),
        (
            &["key", "create", "--id", "a", "--bits", "2048"],
            "error: cannot create an RSA key of 2048 bits\nhint: Create one with `walden key create --bits N`, where N is 3072, 4096 or 8192.\n",
        ),
    ] {
        let outcome = run(line);
        assert_eq!((outcome.status, outcome.stdout.as_str()), (2, ""), "{line:?}");
        assert_eq!(outcome.stderr, stderr, "{line:?}");
    }
    for line in [&[][..], &["key"]] {
        let outcome = run(line);
        assert_eq!((outcome.status, outcome.stdout.as_str()), (2, ""));
        assert_eq!(
            outcome.stderr,
            "error: a command is missing\nhint: `walden --help` and `walden COMMAND --help` tell what there is.\n"
        );
    }
}

#[test]
fn help_and_version_are_answers() {
    let help = run(&["key", "create", "--help"]);
    assert_eq!((help.status, help.stderr.as_str()), (0, ""));
    assert!(help.stdout.contains("--bits <N>"), "{help:?}");
    let version = run(&["--version"]);
    assert_eq!(version.stdout, format!("walden {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_broken_configuration_is_status_2_and_200_for_a_restore_command() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("walden.toml");
    fs::write(&file, "[sites.main]\nretension = 1\n").unwrap();
    let shown = file.to_str().unwrap();
    let outcome = run(&["--config", shown, "key", "list"]);
    assert_eq!(outcome.status, 2);
    assert_eq!(
        outcome.stderr,
        format!(
            "error: {shown}:2: unknown key \"retension\" in [sites.main]\nhint: Did you mean \"retention\"?\n"
        )
    );
    // Whatever is wrong with the command line of a restore_command, PostgreSQL must not promote.
    for line in
        [&["wal", "fetch"][..], &["wal", "fetch", "--nonsense"], &["--nonsense", "wal", "fetch", "a", "b"]]
    {
        assert_eq!(run(line).status, 200, "{line:?}");
    }
}

#[test]
fn json_mode_prints_one_document_also_for_a_failure() {
    let outcome = run(&["key", "list", "--json", "--config", "/nonexistent/walden.toml"]);
    let error = &outcome.json()["error"];
    assert_eq!(outcome.status, 2);
    assert_eq!(error["kind"], "configuration");
    assert_eq!(error["exit_status"], 2);
    assert_eq!(
        error["message"],
        "could not read the configuration file \"/nonexistent/walden.toml\": No such file or directory (os error 2)"
    );
    assert_eq!(outcome.stderr, format!("error: {}\n", error["message"].as_str().unwrap()));
    let usage = run(&["--output", "json", "lst"]);
    assert_eq!((usage.json()["error"]["kind"].as_str(), usage.status), (Some("usage"), 2));
    let both = run(&["--output", "text", "--json", "key", "list"]);
    assert_eq!(both.json()["error"]["kind"], "usage");
}

#[test]
fn the_command_line_comes_before_the_environment() {
    let (_scratch, file) = configuration();
    let wrong = [("WALDEN_CONFIG", "/nonexistent/walden.toml")];
    assert_eq!(run_with(&["key", "list"], &wrong).status, 2);
    assert_eq!(run_with(&["key", "list", "--config", &file], &wrong).status, 0);
    assert_eq!(run_with(&["--config", &file, "key", "list"], &wrong).status, 0);
    assert_eq!(run_with(&["key", "list"], &[("WALDEN_CONFIG", &file)]).status, 0);
    let filter = run_with(&["key", "list"], &[("WALDEN_CONFIG", &file), ("WALDEN_LOG", "walden=loud")]);
    assert_eq!(filter.status, 2);
    assert!(
        filter.stderr.starts_with("error: the environment variable WALDEN_LOG is not a log filter"),
        "{filter:?}"
    );
}

#[test]
fn a_closed_pipe_is_no_failure() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let run = |stdout: Box<dyn Write + Send>| {
        let (arguments, mut stderr) = (["walden", "--help"].map(OsString::from), Vec::new());
        (
            super::run(&arguments, Environment::of(0, &[]), stdout, &mut stderr),
            String::from_utf8(stderr).unwrap(),
        )
    };
    assert_eq!(run(Box::new(Closed)), (0, String::new()));
    assert_eq!(
        run(Box::new(Full)),
        (1, "error: could not write to standard output: no storage space\n".to_owned())
    );
}

#[test]
fn new_keys_are_private_and_never_replace_others() {
    let scratch = tempfile::tempdir().unwrap();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(scratch.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let lines = super::key::create_in(scratch.path(), "a", 3072).unwrap();
    assert_eq!(names(), ["a.pem", "a.pub.pem", "a.sign.pem", "a.verify.pem"]);
    for (name, mode) in
        [("a.pem", 0o600), ("a.sign.pem", 0o600), ("a.pub.pem", 0o644), ("a.verify.pem", 0o644)]
    {
        let found = fs::metadata(scratch.path().join(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(found, mode, "{name}");
    }
    assert!(lines.contains("[encryption.keys.\"a\"]"), "{lines}");

    fs::write(scratch.path().join("b.verify.pem"), "mine").unwrap();
    let error = super::key::create_in(scratch.path(), "b", 3072).unwrap_err();
    assert!(error.message().ends_with("b.verify.pem\" exists already"), "{}", error.message());
    assert_eq!(names(), ["a.pem", "a.pub.pem", "a.sign.pem", "a.verify.pem", "b.verify.pem"]);
}

#[test]
fn key_list_tells_what_this_host_has_and_what_is_wrong_with_it() {
    let (scratch, file) = configuration();
    let list = || run(&["--config", &file, "key", "list", "--json"]).json();
    let whole = list();
    assert_eq!((&whole["encrypted"], &whole["signed"]), (&true.into(), &true.into()));
    let key = &whole["keys"][0];
    assert_eq!(key["id"], "2026-11");
    assert_eq!(key["roles"].as_array().unwrap().len(), 4);
    assert_eq!(key["recipient"].as_str().unwrap().len(), 64);
    assert_eq!(key["problems"], Value::Array(Vec::new()));

    let path = |name: &str| scratch.path().join(name);
    fs::remove_file(path("2026-11.pem")).unwrap();
    fs::set_permissions(path("2026-11.sign.pem"), Permissions::from_mode(0o644)).unwrap();
    super::key::create_in(scratch.path(), "other", 3072).unwrap();
    fs::rename(path("other.pem"), path("2026-11.pem")).unwrap();
    fs::rename(path("other.sign.pem"), path("2026-11.verify.pem")).unwrap();
    let text = run(&["--config", &file, "key", "list"]).stdout;
    for problem in [
        "problem: the public and the private key are not of one pair",
        "2026-11.sign.pem\" has mode 0644: everybody can use it",
        "2026-11.verify.pem\": not a signer's verify key (Ed25519, PEM): the file holds a block \"PRIVATE KEY\"",
    ] {
        assert!(text.contains(problem), "{problem}\n{text}");
    }
    fs::remove_file(path("2026-11.pem")).unwrap();
    let keys = list()["keys"].clone();
    let files = keys[0]["files"].as_array().unwrap();
    let private = files.iter().find(|file| file["key"] == "private_key_file").unwrap();
    assert_eq!(private["present"], false);
    assert_eq!(private["path"], path("2026-11.pem").to_str().unwrap());
}

#[test]
fn a_panic_is_status_1_and_200_for_a_restore_command() {
    use super::{CommandError, Format, Output, TextStyle};
    let style = TextStyle { time_zone: jiff::tz::TimeZone::UTC.into() };
    let status = |policy: super::ExitPolicy| {
        let sink = Sink::default();
        let output = Output::new(Format::Json, style.clone(), Box::new(sink.clone()));
        let status =
            super::conclude(&output, policy, super::guarded(|| panic!("on purpose")), &mut io::sink());
        let document: Value = serde_json::from_slice(&sink.0.lock().unwrap()).unwrap();
        assert_eq!(document["error"]["kind"], "bug");
        status
    };
    assert_eq!(status(super::ExitPolicy::Usual), 1);
    assert_eq!(status(super::ExitPolicy::RestoreCommand), 200);
    assert!(super::guarded(|| Ok(())).is_some_and(|outcome: Result<(), CommandError>| outcome.is_ok()));
    assert!(!Path::new("standby.signal").exists(), "the tests run beside a standby.signal");
}
