//! Stores that refuse: exit status 2, a message that names bucket and endpoint, and a hint.

use crate::scene::{IMPATIENT, Store};
use crate::support::{Fault, s3_storage};

#[test]
fn wrong_credentials_and_buckets_are_said_with_the_place() {
    let store = Store::start();
    let right = s3_storage(&store.s3.endpoint());
    for (wrong, said, hint) in [
        (right.replace("not much of", "another"), "SignatureDoesNotMatch", "Check access_key_id"),
        (right.replace("walden-test", "somebody"), "denied", "access_key_id"),
        (right.replace("s3://bucket", "s3://elsewhere"), "bucket elsewhere", "Create the bucket"),
    ] {
        let failed = store.walden(&wrong).try_run(&["list"]).expect_code(2);
        for part in [said, &store.s3.endpoint(), "hint: ", hint] {
            assert!(failed.stderr.contains(part), "no \"{part}\" in {}", failed.stderr);
        }
        assert!(!failed.stderr.contains("much of a secret"), "{}", failed.stderr);
    }
}

#[test]
fn what_a_store_says_of_clocks_regions_and_tokens_ends_in_a_hint() {
    let store = Store::start();
    let walden = store.walden(&(s3_storage(&store.line.endpoint()) + IMPATIENT));
    for (status, code, hint) in [
        ("403 Forbidden", "RequestTimeTooSkewed", "Set the clock of this host"),
        ("403 Forbidden", "InvalidAccessKeyId", "Check access_key_id"),
        ("403 Forbidden", "AccessDenied", "Allow these credentials"),
        ("400 Bad Request", "ExpiredToken", "Replace the temporary credentials"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "Set region and endpoint"),
        ("301 Moved Permanently", "PermanentRedirect", "Set region and endpoint"),
    ] {
        store.line.inject("", "", usize::MAX, Fault::refusal(status, "", code));
        store.line.take_requests();
        let failed = walden.try_run(&["list"]).expect_code(2);
        for part in [code, hint, "bucket bucket at ", &store.line.endpoint()] {
            assert!(failed.stderr.contains(part), "no \"{part}\" in {}", failed.stderr);
        }
        assert_eq!(store.line.take_requests().len(), 1, "{code} does not go away by trying again");
        store.line.heal();
    }
}

/// A body that is no S3 is an error and never an empty repository.
#[test]
fn an_answer_that_is_not_s3_is_no_empty_listing() {
    let store = Store::start();
    let walden = store.walden(&(s3_storage(&store.line.endpoint()) + IMPATIENT));
    for body in ["", "<html>welcome</html>", "<ListBucketResult><Contents><Key>a", "\u{0}\u{1}\u{2}"] {
        store.line.inject("", "", usize::MAX, Fault::answer("200 OK", "", body));
        let failed = walden.try_run(&["list"]);
        assert_ne!(failed.code(), Some(0), "{body:?}: {}", failed.stdout);
        store.line.heal();
    }
}
