//! Where a repository lies, as the configuration says it, and opening that place.
//!
//! `file:///folder`, `s3://bucket/prefix` or `memory://`. What is opened stands behind the same two
//! wrappers for every kind: `Retrying` over `Counted` over the store.
//!
//! Deliberately absent in this version: gs, az, swift and sftp. They are refused by name, with what there
//! is instead. Credentials never stand in a URL: those end up in logs and process lists.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use url::Url;

use crate::clock::{Clock, SystemClock};

use super::error::Error;
use super::key::ObjectKey;
use super::local::LocalStore;
use super::memory::MemoryStore;
use super::retry::{RetryOptions, Retrying};
use super::s3::{S3Options, S3Store};
use super::store::Store;
use super::traffic::{Counted, Traffic};

/// What stands in every refusal of a location.
const SUPPORTED: &str = "supported are file:///folder, s3://bucket/prefix and memory://";

/// The place a repository lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// An existing folder of this host.
    File(PathBuf),
    /// A bucket, and the folder in it.
    S3 {
        /// The bucket's name.
        bucket: String,
        /// The folder in it that is the root of the store; the whole bucket if absent.
        prefix: Option<ObjectKey>,
    },
    /// This process; every opening is another, empty store.
    Memory,
}

/// What opening a location takes beside its name.
#[derive(Debug, Clone)]
pub struct Options {
    /// How to reach S3; of no effect on the others.
    pub s3: S3Options,
    /// How long to try.
    pub retry: RetryOptions,
    /// Where the traffic is counted.
    pub traffic: Arc<Traffic>,
    /// The clock of deadlines and of ages.
    pub clock: Arc<dyn Clock>,
    /// Spreads the pauses of retries; should differ between processes.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            s3: S3Options::default(),
            retry: RetryOptions::default(),
            traffic: Arc::default(),
            clock: Arc::new(SystemClock),
            // The standard library draws the keys of a new hasher at random.
            seed: RandomState::new().hash_one(std::process::id()),
        }
    }
}

/// Opens a location.
pub fn open(location: &Location, options: &Options) -> Result<Arc<dyn Store>, Error> {
    Ok(match location {
        Location::File(path) => wrap(LocalStore::open(path, &*options.clock)?, options),
        Location::S3 { bucket, prefix } => {
            let clock = Arc::clone(&options.clock);
            wrap(S3Store::with_clock(bucket, prefix.as_ref(), &options.s3, clock)?, options)
        }
        Location::Memory => wrap(MemoryStore::with_clock(Arc::clone(&options.clock)), options),
    })
}

fn wrap(store: impl Store + 'static, options: &Options) -> Arc<dyn Store> {
    let counted = Counted::new(store, Arc::clone(&options.traffic));
    Arc::new(Retrying::new(counted, options.retry, Arc::clone(&options.clock), options.seed))
}

impl Location {
    /// Reads a location as it is written in the configuration.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let Ok(url) = Url::parse(text) else {
            let hint = if text.starts_with('/') { format!("; write file://{text}") } else { String::new() };
            return Err(refused(text, &format!("it is not a URL{hint}")));
        };
        if !url.username().is_empty() || url.password().is_some() {
            // Without the text: it holds a secret.
            return Err(refused(url.scheme(), "credentials do not belong in a URL"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refused(text, "it has a query or a fragment"));
        }
        match url.scheme() {
            "file" => parse_file(text, &url),
            "s3" => parse_s3(text, &url),
            "memory" if text == "memory://" => Ok(Self::Memory),
            "memory" => Err(refused(text, "memory:// takes no name")),
            scheme => Err(refused(text, &format!("{scheme}:// is not supported in this version"))),
        }
    }
}

fn parse_file(text: &str, url: &Url) -> Result<Location, Error> {
    if !text.starts_with("file:///") {
        return Err(refused(text, "file:// takes an absolute path, after three slashes in all"));
    }
    match url.to_file_path() {
        Ok(path) => Ok(Location::File(path)),
        Err(()) => Err(refused(text, "it is not the path of a folder")),
    }
}

fn parse_s3(text: &str, url: &Url) -> Result<Location, Error> {
    let bucket = url.host_str().unwrap_or_default();
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(legal) || url.port().is_some() {
        return Err(refused(
            text,
            "a bucket is named by 3 to 63 lower-case letters, digits, dots and hyphens",
        ));
    }
    let prefix = match url.path().trim_matches('/') {
        "" => None,
        prefix => Some(ObjectKey::parse(prefix).map_err(|error| refused(text, &error.to_string()))?),
    };
    Ok(Location::S3 { bucket: bucket.to_owned(), prefix })
}

fn refused(text: &str, why: &str) -> Error {
    Error::Invalid {
        key: text.to_owned(),
        reason: format!(
            "cannot use \"{}\" as the location of a repository: {why}; {SUPPORTED}",
            text.escape_debug()
        ),
        source: None,
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => match Url::from_file_path(path) {
                Ok(url) => write!(f, "{url}"),
                Err(()) => write!(f, "file://{}", path.display()),
            },
            Self::S3 { bucket, prefix: Some(prefix) } => write!(f, "s3://{bucket}/{prefix}"),
            Self::S3 { bucket, prefix: None } => write!(f, "s3://{bucket}"),
            Self::Memory => f.write_str("memory://"),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tempfile::TempDir;

    use super::super::conformance;
    use super::super::error::ErrorKind;
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in [
            "file:///var/backups",
            "file:///with%20space",
            "s3://bucket/a/b",
            "s3://my.bucket-1",
            "memory://",
        ] {
            assert_eq!(Location::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Location::parse("file:///a%20b").unwrap(), Location::File("/a b".into()));
        let prefix = Some(ObjectKey::parse("a/b").unwrap());
        assert_eq!(Location::parse("s3://bkt/a/b/").unwrap(), Location::S3 { bucket: "bkt".into(), prefix });
        assert_eq!(
            Location::parse("s3://bkt/").unwrap(),
            Location::S3 { bucket: "bkt".into(), prefix: None }
        );
    }

    #[test]
    fn refusals_say_why_and_what_there_is() {
        for (text, why) in [
            ("/var/backups", "write file:///var/backups"),
            ("backups", "not a URL"),
            ("file://host/share", "three slashes"),
            ("file:relative", "three slashes"),
            ("gs://bucket/x", "gs:// is not supported in this version"),
            ("az://container", "az:// is not supported"),
            ("swift://container", "swift:// is not supported"),
            ("sftp://host/x", "sftp:// is not supported"),
            ("https://host/bucket", "https:// is not supported"),
            ("s3://", "3 to 63"),
            ("s3://Bucket_1", "3 to 63"),
            ("s3://bucket:9000/x", "3 to 63"),
            ("s3://bucket/a//b", "empty component"),
            ("s3://bucket/a?region=x", "query"),
            ("memory://name", "takes no name"),
        ] {
            let error = Location::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(why), "{text}: {error}");
            assert!(error.to_string().ends_with(SUPPORTED), "{text}: {error}");
        }
    }

    #[test]
    fn credentials_in_a_url_are_refused_and_not_repeated() {
        let error = Location::parse("s3://AKIA:hunter2@bucket/x").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }

    #[tokio::test]
    async fn what_is_opened_keeps_the_contract_and_is_counted() {
        let folder = TempDir::new().unwrap();
        for location in [Location::File(folder.path().to_owned()), Location::Memory] {
            let options = Options::default();
            let store = open(&location, &options).unwrap();
            conformance::check(Arc::clone(&store), "conformance").await;
            let before = options.traffic.snapshot();
            store.create(&ObjectKey::parse("a").unwrap(), Bytes::from_static(b"abc")).await.unwrap();
            let made = options.traffic.snapshot().since(&before);
            assert_eq!((made.requests(), made.bytes_written), (1, 3));
        }
    }

    #[test]
    fn a_missing_folder_is_refused() {
        let folder = TempDir::new().unwrap();
        let error = open(&Location::File(folder.path().join("missing")), &Options::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
