//! The options that say how to reach a store: an authority of one's own, a proxy, host names, temporary credentials.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::scene::Store;
use crate::support::{Need, Proxy, Run, header, require, s3_storage};

/// What a command says of a site that does not exist in a store that it reached.
const REACHED: &str = "there is no site";

#[track_caller]
fn assert_reaches(store: &Store, storage: &str) {
    let run = store.walden(storage).try_run(&["list"]).expect_code(1);
    assert!(run.stderr.contains(REACHED), "{}", run.stderr);
}

/// Makes an authority, and a certificate of its for 127.0.0.1.
fn certificate(folder: &Path) -> [PathBuf; 3] {
    std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1").unwrap();
    for step in [
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority",
        "req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=store",
        "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -extfile names",
    ] {
        Run::of(Command::new("openssl").args(step.split(' ')).current_dir(folder), "").expect_success();
    }
    ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name))
}

#[test]
fn an_authority_of_ones_own_is_trusted_by_ca_file_and_not_without() {
    require!(Need::Program("openssl"));
    let store = Store::start();
    let folder = tempfile::tempdir_in(store.scratch.path()).unwrap();
    let [authority, certificate, key] = certificate(folder.path());
    let line = Proxy::with_tls(&store.s3.endpoint(), &certificate, &key);
    let storage = s3_storage(&line.endpoint());

    let refused = store.walden(&storage).try_run(&["list"]).expect_code(2);
    for part in ["certificate is not trusted", &line.endpoint(), "hint: Set ca_file"] {
        assert!(refused.stderr.contains(part), "no \"{part}\" in {}", refused.stderr);
    }
    let ca_file = store.scratch.file("ca.pem", &std::fs::read_to_string(authority).unwrap());
    assert_reaches(&store, &format!("{storage}ca_file = \"{}\"\n", ca_file.display()));
    assert!(!line.take_requests().is_empty());
}

#[test]
fn a_proxy_carries_what_is_asked_of_a_host_that_only_it_can_reach() {
    let store = Store::start();
    let storage = s3_storage("http://s3.walden.invalid");
    let refused = store.walden(&storage).try_run(&["list"]).expect_code(2);
    assert!(refused.stderr.contains("allow_http"), "{}", refused.stderr);

    let proxy = format!("allow_http = true\nproxy = \"{}\"\n", store.line.endpoint());
    assert_reaches(&store, &(storage.clone() + &proxy));
    let requests = store.line.take_requests();
    let host = |head: &String| header(head, "host").unwrap().to_owned();
    assert_eq!(requests.iter().map(host).collect::<Vec<_>>(), ["s3.walden.invalid"]);

    // With the bucket in the host name: the server knows none, so only what it was asked can be looked at.
    store.walden(&(storage + &proxy + "path_style = false\n")).try_run(&["list"]);
    let requests = store.line.take_requests();
    assert_eq!(host(&requests[0]), "bucket.s3.walden.invalid");
    assert!(!requests[0].contains("/bucket/"), "{}", requests[0]);
}

#[test]
fn credentials_of_the_environment_go_with_their_token() {
    let store = Store::start();
    let bare = format!("url = \"s3://bucket\"\nendpoint = \"{}\"\n", store.line.endpoint());
    let walden = store.walden(&bare);
    let mut command = walden.command();
    command.arg("list").envs([
        ("AWS_ACCESS_KEY_ID", "walden-test"),
        ("AWS_SECRET_ACCESS_KEY", "not much of a secret"),
        ("AWS_SESSION_TOKEN", "for-an-hour"),
        ("AWS_REGION", "eu-central-1"),
    ]);
    let run = Run::of(&mut command, "").expect_code(1);
    assert!(run.stderr.contains(REACHED), "{}", run.stderr);
    let requests = store.line.take_requests();
    assert_eq!(header(&requests[0], "x-amz-security-token"), Some("for-an-hour"));
    let signed = header(&requests[0], "authorization").unwrap();
    assert!(signed.contains("/eu-central-1/s3/") && signed.contains("x-amz-security-token"), "{signed}");
}
