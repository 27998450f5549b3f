//! Tests of the chain against a server that plays those who give credentials, and a store that has enough of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use object_store::CredentialProvider;
use tempfile::TempDir;

use super::super::super::error::{Error, ErrorKind};
use super::super::super::key::ObjectKey;
use super::super::super::retry::{RetryOptions, Retrying};
use super::super::super::store::Store;
use super::super::giver::{Giver, Mood, SESSION_KEYS};
use super::super::http::Connector;
use super::super::server::{BUCKET, S3Server, SECRET_ACCESS_KEY};
use super::super::{S3Options, S3Store};
use super::*;
use crate::clock::{ManualClock, SystemClock};

const START: &str = "2026-11-20T10:00:00Z";

fn asker(patience: Duration) -> Asker {
    let client = || Connector::builder(Duration::from_secs(1)).build().unwrap();
    Asker::new(client(), client()).waiting(patience)
}

fn container(giver: &Giver, authorization: Authorization) -> CredentialSource {
    let url = format!("{}/v1/credentials", giver.endpoint());
    CredentialSource::Container(Container { url, authorization })
}

fn instance(giver: &Giver) -> CredentialSource {
    CredentialSource::Instance(Instance { endpoint: giver.endpoint() })
}

fn web_identity(giver: &Giver, folder: &TempDir) -> CredentialSource {
    let token_file = folder.path().join("token");
    CredentialSource::WebIdentity(WebIdentity {
        token_file,
        role_arn: "arn:aws:iam::1:role/walden".to_owned(),
        session_name: "here".to_owned(),
        sts_endpoint: giver.endpoint(),
    })
}

fn chain(source: CredentialSource) -> CredentialChain {
    let skip = Step::Skip { source: "environment", why: "AWS_ACCESS_KEY_ID is not set".to_owned() };
    CredentialChain(vec![skip, Step::Ask(source)])
}

fn provider(source: CredentialSource, clock: &ManualClock) -> Provider {
    Provider::new(chain(source), asker(Duration::from_secs(5)), Arc::new(clock.clone()))
}

fn clock() -> ManualClock {
    ManualClock::new(START.parse().unwrap())
}

async fn key_of(provider: &Provider) -> String {
    provider.get_credential().await.unwrap().key_id.clone()
}

async fn refusal_of(provider: &Provider) -> NoCredentials {
    let error = provider.get_credential().await.unwrap_err();
    super::super::super::refusal::find::<NoCredentials>(&error).unwrap().clone()
}

fn store(endpoint: String, source: CredentialSource) -> S3Store {
    let options = S3Options { endpoint: Some(endpoint), credentials: chain(source), ..S3Options::default() };
    S3Store::open(BUCKET, None, &options).unwrap()
}

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

#[tokio::test]
async fn a_web_identity_sends_its_token_in_the_body_and_reads_it_each_time() {
    let (giver, folder, clock) = (Giver::start("secret"), TempDir::new().unwrap(), clock());
    giver.expiring("2026-11-20T11:00:00Z");
    let provider = provider(web_identity(&giver, &folder), &clock);
    let missing = refusal_of(&provider).await;
    assert!(missing.to_string().contains("there is no token in"), "{missing}");
    for (token, wanted) in [("a.b/c+d=", "a.b%2Fc%2Bd%3D"), ("another", "another")] {
        std::fs::write(folder.path().join("token"), format!("{token}\n")).unwrap();
        provider.get_credential().await.unwrap();
        let asked = giver.take_asked().remove(0);
        assert!(asked.head.starts_with("POST / HTTP"), "{}", asked.head);
        for part in ["Action=AssumeRoleWithWebIdentity", "RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fwalden"] {
            assert!(asked.body.contains(part), "{}", asked.body);
        }
        assert!(asked.body.contains("RoleSessionName=here"), "{}", asked.body);
        assert!(asked.body.ends_with(&format!("WebIdentityToken={wanted}")), "{}", asked.body);
        clock.advance(Duration::from_secs(3600));
        giver.expiring("2026-11-20T12:00:00Z");
    }
    assert_eq!(giver.given(), 2);
}

#[tokio::test]
async fn an_agent_is_shown_the_token_of_the_moment() {
    let (giver, folder, clock) = (Giver::start("secret"), TempDir::new().unwrap(), clock());
    let file = folder.path().join("token");
    for (token, authorization) in [
        (None, Authorization::None),
        (Some("Bearer x y"), Authorization::Token(Secret::from("Bearer x y".to_owned()))),
        (Some("of the file"), Authorization::TokenFile(file.clone())),
    ] {
        std::fs::write(&file, "of the file\n").unwrap();
        let given = provider(container(&giver, authorization), &clock).get_credential().await.unwrap();
        assert_eq!(given.secret_key, "secret");
        assert_eq!(given.token.as_deref(), Some(&*format!("token-{}", giver.given())));
        assert_eq!(giver.take_asked()[0].header("authorization"), token);
    }
}

#[tokio::test]
async fn the_metadata_service_is_asked_within_a_session() {
    let (giver, clock) = (Giver::start("secret"), clock());
    assert_eq!(key_of(&provider(instance(&giver), &clock)).await, SESSION_KEYS[0]);
    let asked = giver.take_asked();
    let lines: Vec<&str> = asked.iter().map(|asked| asked.head.lines().next().unwrap()).collect();
    let roles = "GET /latest/meta-data/iam/security-credentials/";
    let wanted = [
        "PUT /latest/api/token HTTP/1.1",
        &format!("{roles} HTTP/1.1"),
        &format!("{roles}the-role HTTP/1.1"),
    ];
    assert_eq!(lines, wanted);
    assert!(asked[0].header("x-aws-ec2-metadata-token-ttl-seconds").is_some());
}

#[tokio::test]
async fn a_profile_is_read_again_when_the_store_refuses_its_token() {
    let (folder, clock) = (TempDir::new().unwrap(), clock());
    let file = folder.path().join("credentials");
    let write = |key: &str| {
        let text = format!(
            "[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t-{key}\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    let profile = CredentialSource::Profile(Profile {
        name: "default".to_owned(),
        is_named: false,
        credentials_file: file.clone(),
        config_file: folder.path().join("config"),
        sts_endpoint: String::new(),
    });
    let provider = provider(profile, &clock);
    write("first");
    assert_eq!(key_of(&provider).await, "first");
    write("second");
    clock.advance(Duration::from_secs(1_000_000));
    assert_eq!(key_of(&provider).await, "first", "nothing says that it has expired");
    provider.refused("first");
    assert_eq!(key_of(&provider).await, "second");
    // What another request says of the first, late, is no news.
    provider.refused("first");
    assert_eq!(key_of(&provider).await, "second");
    provider.refused("second");
    let error = refusal_of(&provider).await;
    assert!(!error.is_retryable());
    let said = "profile \"default\" has no other credentials than those that the store no longer accepts";
    assert_eq!(error.to_string(), said);
}

#[tokio::test]
async fn credentials_are_renewed_before_they_expire_by_one_for_all() {
    let (giver, clock) = (Giver::start("secret"), clock());
    giver.expiring("2026-11-20T11:00:00Z");
    let provider = Arc::new(provider(container(&giver, Authorization::None), &clock));
    let all_at_once = || async {
        let asking = (0..20).map(|_| {
            let provider = provider.clone();
            tokio::spawn(async move { key_of(&provider).await })
        });
        futures::future::join_all(asking).await.into_iter().map(Result::unwrap).collect::<Vec<String>>()
    };
    assert!(all_at_once().await.iter().all(|key| key == SESSION_KEYS[0]));
    assert_eq!(giver.given(), 1);
    clock.advance(Duration::from_secs(54 * 60));
    assert_eq!(key_of(&provider).await, SESSION_KEYS[0]);
    clock.advance(Duration::from_secs(2 * 60));
    giver.expiring("2026-11-20T12:00:00Z");
    // Whoever does not renew them goes on with the old ones, which are good for four minutes.
    let keys = all_at_once().await;
    assert!(keys.iter().all(|key| SESSION_KEYS[..2].contains(&key.as_str())), "{keys:?}");
    assert_eq!((key_of(&provider).await.as_str(), giver.given()), (SESSION_KEYS[1], 2));
}

#[tokio::test]
async fn a_renewal_that_fails_is_an_error_only_when_the_old_ones_have_expired() {
    for failing in [
        Mood::Silent,
        Mood::Refusing("500 Internal Server Error", "later"),
        Mood::Refusing("403 Forbidden", "no"),
    ] {
        let (giver, clock) = (Giver::start("secret"), clock());
        giver.expiring("2026-11-20T11:00:00Z");
        let patience = Duration::from_millis(50);
        let source = container(&giver, Authorization::None);
        let provider = Provider::new(chain(source), asker(patience), Arc::new(clock.clone()));
        assert_eq!(key_of(&provider).await, SESSION_KEYS[0]);
        giver.set(failing.clone());
        clock.advance(Duration::from_secs(56 * 60));
        giver.take_asked();
        for _ in 0..3 {
            assert_eq!(key_of(&provider).await, SESSION_KEYS[0]);
        }
        assert_eq!(giver.take_asked().len(), 1, "{failing:?}: it is left alone for a while");
        clock.advance(Duration::from_secs(5 * 60));
        let error = refusal_of(&provider).await;
        assert_eq!(error.is_retryable(), !matches!(failing, Mood::Refusing("403 Forbidden", _)), "{error}");
        assert!(error.to_string().contains(&format!("container agent at {}", giver.endpoint())), "{error}");
        giver.set(Mood::Giving);
        giver.expiring("2026-11-20T12:00:00Z");
        assert_eq!(key_of(&provider).await, SESSION_KEYS[1]);
    }
}

/// The clock of this host is an hour ahead: what it gets looks expired, and is good.
#[tokio::test]
async fn what_looks_expired_as_it_comes_is_used() {
    let (giver, clock) = (Giver::start("secret"), clock());
    giver.expiring("2026-11-20T09:30:00Z");
    let provider = provider(instance(&giver), &clock);
    assert_eq!(key_of(&provider).await, SESSION_KEYS[0]);
    assert_eq!((key_of(&provider).await.as_str(), giver.given()), (SESSION_KEYS[0], 1));
    clock.advance(Duration::from_secs(31));
    assert_eq!(key_of(&provider).await, SESSION_KEYS[1]);
}

#[tokio::test]
async fn a_source_that_fails_ends_the_chain_and_says_what_it_was_told() {
    let (folder, clock) = (TempDir::new().unwrap(), clock());
    std::fs::write(folder.path().join("token"), "x").unwrap();
    let denied = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>Not authorized</Message></Error></ErrorResponse>";
    for (mood, said) in [
        (Mood::Refusing("403 Forbidden", denied), "HTTP status 403: AccessDenied: Not authorized"),
        (Mood::Refusing("404 Not Found", "no such page"), "HTTP status 404: no such page"),
        (Mood::Refusing("200 OK", "<html>welcome</html>"), "holds no credentials"),
        (
            Mood::Refusing(
                "200 OK",
                "<AccessKeyId>a b</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>",
            ),
            "visible ASCII",
        ),
        (
            Mood::Refusing(
                "200 OK",
                "<AccessKeyId>a</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>soon</Expiration>",
            ),
            "no time of expiry",
        ),
    ] {
        let (first, second) = (Giver::start("secret"), Giver::start("secret"));
        first.set(mood);
        let steps = [web_identity(&first, &folder), instance(&second)].map(Step::Ask);
        let chain = CredentialChain(steps.into());
        let provider = Provider::new(chain, asker(Duration::from_secs(5)), Arc::new(clock.clone()));
        let error = refusal_of(&provider).await;
        for part in ["web identity of arn:aws:iam::1:role/walden", &first.endpoint(), said] {
            assert!(error.to_string().contains(part), "no \"{part}\" in {error}");
        }
        assert!(!error.is_retryable() && second.given() == 0, "nobody else's credentials are taken");
    }
    for body in ["", "{}", "{\"Code\":\"Failed\",\"Message\":\"no role\"}", "[1]", "{\"AccessKeyId\":\"a\"}"]
    {
        let giver = Giver::start("secret");
        giver.set(Mood::Refusing("200 OK", body));
        let error = refusal_of(&provider(container(&giver, Authorization::None), &clock)).await;
        assert!(matches!(error, NoCredentials::Refused { .. }), "{body}: {error}");
    }
}

#[tokio::test]
async fn a_machine_without_a_role_or_a_service_has_none_and_says_so() {
    let (giver, clock) = (Giver::start("secret"), clock());
    giver.set(Mood::Silent);
    let silent = CredentialSource::Instance(Instance { endpoint: giver.endpoint() });
    let provider = Provider::new(chain(silent), asker(Duration::from_millis(20)), Arc::new(clock.clone()));
    let error = refusal_of(&provider).await;
    assert_eq!(giver.take_asked().len(), 3);
    assert!(!error.is_retryable());
    let said = format!(
        "no source has credentials: environment: AWS_ACCESS_KEY_ID is not set; \
         instance metadata at {}: no answer within 20ms",
        giver.endpoint()
    );
    assert_eq!(error.to_string(), said);
    // Once it has given some, its silence is waited for.
    giver.set(Mood::Giving);
    key_of(&provider).await;
    provider.refused(SESSION_KEYS[0]);
    giver.set(Mood::Silent);
    assert!(refusal_of(&provider).await.is_retryable());
}

#[tokio::test]
async fn a_request_that_cannot_be_signed_is_not_sent_and_says_why() {
    let (giver, server) = (Giver::start(SECRET_ACCESS_KEY), S3Server::start().await);
    giver.set(Mood::Refusing("403 Forbidden", "not you"));
    let store = store(server.endpoint(), container(&giver, Authorization::None));
    let body = Bytes::from_static(b"x");
    for error in [
        store.get(&key("a"), 1).await.unwrap_err(),
        store.list("", None, 1).await.unwrap_err(),
        store.create(&key("a"), body.clone()).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        for part in ["bucket bucket at http://", "no credentials from container agent at", "not you"] {
            assert!(error.to_string().contains(part), "no \"{part}\" in {error}");
        }
        assert!(error.hint().unwrap().contains("access_key_id"), "{error:?}");
    }
    // What cannot be had now is not the outcome of a create: nothing was sent.
    giver.set(Mood::Refusing("503 Service Unavailable", "later"));
    let error = store.create(&key("a"), body).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

/// A store that refuses every key but the last with the code of an expired token.
#[tokio::test]
async fn a_token_that_expires_under_a_request_is_replaced_and_the_request_repeated() {
    let (giver, server) = (Giver::start(SECRET_ACCESS_KEY), S3Server::start().await);
    let strict = super::super::tests::refusing_keys(&server.endpoint(), &SESSION_KEYS[..2]).await;
    let retried = |source| {
        let options = RetryOptions { pause_first: Duration::from_micros(1), ..RetryOptions::default() };
        Retrying::new(store(strict.clone(), source), options, Arc::new(SystemClock), 1)
    };
    let renewing = retried(container(&giver, Authorization::None));
    renewing.create(&key("a"), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(giver.given(), 3);
    assert_eq!(renewing.get(&key("a"), 1).await.unwrap(), "x");

    let stuck = Giver::start(SECRET_ACCESS_KEY);
    stuck.set(Mood::Repeating);
    let error = retried(instance(&stuck)).create(&key("b"), Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    assert!(error.to_string().contains("no other credentials"), "{error}");
}

#[test]
fn what_is_given_never_shows() {
    let now: Timestamp = START.parse().unwrap();
    let given = document::Credentials::new("id", "hunter2", Some("hunter3"), Some(now)).unwrap();
    assert!(!format!("{given:?}").contains("hunter"), "{given:?}");
}
