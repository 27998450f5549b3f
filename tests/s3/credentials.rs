//! Credentials that the configuration does not hold: each source of the default chain, one that fails, none at all, and
//! those that expire under a run.

use std::process::Command;

use crate::scene::{IMPATIENT, Scene, Store};
use crate::support::{
    BUCKET, Fault, Giver, Mood, Need, Run, SECRET_ACCESS_KEY, SESSION_KEYS, header, require,
};

/// What a command says of a site that does not exist in a store that it reached.
const REACHED: &str = "there is no site";

/// The lines of `[storage]` without credentials.
fn bare(endpoint: &str) -> String {
    format!("url = \"s3://{BUCKET}\"\nendpoint = \"{endpoint}\"\n{IMPATIENT}")
}

fn list(store: &Store, variables: &[(&str, &str)]) -> Run {
    let mut command: Command = store.walden(&bare(&store.line.endpoint())).command();
    Run::of(command.arg("list").envs(variables.iter().copied()), "")
}

#[test]
fn every_source_of_the_chain_opens_the_store() {
    let store = Store::start();
    let giver = Giver::start(SECRET_ACCESS_KEY);
    let profiles = format!(
        "[prod]\naws_access_key_id = {}\naws_secret_access_key = {SECRET_ACCESS_KEY}\naws_session_token = shared\n",
        SESSION_KEYS[0]
    );
    let profiles = store.scratch.file("aws-credentials", &profiles).display().to_string();
    let token = store.scratch.file("token", "a.token\n").display().to_string();
    let (endpoint, agent) = (giver.endpoint(), format!("{}/v1/credentials", giver.endpoint()));
    let profile = [("AWS_PROFILE", "prod"), ("AWS_SHARED_CREDENTIALS_FILE", profiles.as_str())];
    let web_identity = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()),
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/walden"),
        ("AWS_ENDPOINT_URL_STS", endpoint.as_str()),
    ];
    let container = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", agent.as_str()),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.as_str()),
    ];
    let instance = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str())];
    let sources: [(&[(&str, &str)], &str); 4] =
        [(&profile, "shared"), (&web_identity, "token-1"), (&container, "token-2"), (&instance, "token-3")];
    for (variables, token) in sources {
        let run = list(&store, variables).expect_code(1);
        assert!(run.stderr.contains(REACHED), "{variables:?}: {}", run.stderr);
        let requests = store.line.take_requests();
        assert_eq!(header(&requests[0], "x-amz-security-token"), Some(token), "{variables:?}");
    }
    let all = [&profile[..], &web_identity, &container, &instance].concat();
    list(&store, &all);
    assert_eq!(
        header(&store.line.take_requests()[0], "x-amz-security-token"),
        Some("shared"),
        "the first one"
    );
}

#[test]
fn where_nobody_has_credentials_each_source_is_named_with_its_reason() {
    let store = Store::start();
    let run = list(&store, &[]).expect_code(2);
    for part in [
        &format!("bucket {BUCKET} at {}", store.line.endpoint()),
        "environment: AWS_ACCESS_KEY_ID is not set",
        "profile \"default\": it is not in ",
        ".aws/credentials",
        "web identity: AWS_WEB_IDENTITY_TOKEN_FILE is not set",
        "container agent: AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "instance metadata: the store is not AWS's",
        "hint: Set access_key_id",
    ] {
        assert!(run.stderr.contains(part), "no \"{part}\" in {}", run.stderr);
    }
    assert!(store.line.take_requests().is_empty(), "nothing is sent without a signature");
}

#[test]
fn a_source_that_is_set_up_and_fails_is_named_and_no_other_is_taken() {
    let store = Store::start();
    let (refusing, giver) = (Giver::start(SECRET_ACCESS_KEY), Giver::start(SECRET_ACCESS_KEY));
    let said = "<Error><Code>InvalidIdentityToken</Code><Message>No such provider</Message></Error>";
    refusing.set(Mood::Refusing("400 Bad Request", said));
    let token = store.scratch.file("token", "a.token\n").display().to_string();
    let (endpoint, metadata) = (refusing.endpoint(), giver.endpoint());
    let variables = |sts| {
        [
            ("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()),
            ("AWS_ROLE_ARN", "arn:aws:iam::1:role/walden"),
            ("AWS_ENDPOINT_URL_STS", sts),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.as_str()),
        ]
    };
    let run = list(&store, &variables(&endpoint)).expect_code(2);
    for part in
        ["web identity of arn:aws:iam::1:role/walden", &endpoint, "InvalidIdentityToken: No such provider"]
    {
        assert!(run.stderr.contains(part), "no \"{part}\" in {}", run.stderr);
    }
    assert_eq!(refusing.take_asked().len(), 1, "a refusal does not go away by asking again");

    // One that cannot answer now is asked again, as the store is.
    refusing.set(Mood::Refusing("503 Service Unavailable", "<Error><Code>Busy</Code></Error>"));
    let mut command = store.walden(&bare(&store.line.endpoint()).replace("30s", "2s")).command();
    let run = Run::of(command.arg("list").envs(variables(&endpoint)), "").expect_code(4);
    assert!(run.stderr.contains("web identity of") && run.stderr.contains("Busy"), "{}", run.stderr);
    assert!(refusing.take_asked().len() > 1);
    assert!(giver.given() == 0 && store.line.take_requests().is_empty());
}

/// The store calls a token expired in mid-run, of a pack, of the commit and of a segment: each is sent again with others.
#[test]
fn credentials_that_expire_under_a_backup_are_replaced() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let giver = Giver::start(SECRET_ACCESS_KEY);
    let scene = Scene::start(&bare(&store.line.endpoint()), |site| site);
    let source = format!("AWS_EC2_METADATA_SERVICE_ENDPOINT={}", giver.endpoint());
    scene.cluster.set_archive_command(&format!("env {source} {}", scene.walden.archive_command()));
    for part in ["/packs/", "/backup.json", "/wal/"] {
        store.line.inject("PUT", part, 1, Fault::refusal("400 Bad Request", "", "ExpiredToken"));
    }
    let walden = |arguments: &[&str]| {
        let mut command = scene.walden.command();
        let (name, value) = source.split_once('=').unwrap();
        Run::of(command.args(arguments).env(name, value), "").expect_success()
    };
    walden(&["backup", "--checkpoint", "fast"]);
    assert_eq!(store.line.heal(), 3);
    let requests = store.line.take_requests();
    let keys_of = |part: &str| -> Vec<String> {
        let puts = requests.iter().filter(|head| head.starts_with("PUT") && head.contains(part));
        let signed = puts.map(|head| header(head, "authorization").unwrap().to_owned());
        signed.map(|text| text.split(['=', '/']).nth(1).unwrap().to_owned()).collect()
    };
    let commit = keys_of("/backup.json");
    assert!(commit.len() == 2 && commit[0] != commit[1], "{commit:?}");
    assert!(giver.given() >= 4, "a backup and a push, each with two keys");
    let listed = walden(&["--output", "json", "list"]);
    let listed: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 1, "{listed:#}");
}
