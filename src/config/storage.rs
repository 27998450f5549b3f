//! `[storage]`: which object store, and how to get in.
//!
//! A secret that stands in a file or in the environment is fetched when the store is opened, so that a
//! configuration can be read where the secret cannot. Keys for S3 are refused for any other store: there they
//! would do nothing. Where neither the file nor the environment has a key for S3, `credentials` says who is asked.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::storage::{self, Location, Options, RetryOptions, S3Options, Secret, Store, Traffic};

use super::credentials::credential_chain;
use super::environment::Environment;
use super::error::{Place, Result};
use super::secret_file::NamedFile;
use super::table::{Entry, Table};

/// An object store as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageConfig {
    /// Where the repository lies.
    pub location: Location,
    /// Where the file says so.
    pub place: Place,
    /// How long a call that fails is tried again.
    pub retry: Duration,
    s3: S3Config,
}

/// The keys for S3 as they stand in the file; the environment fills the gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct S3Config {
    endpoint: Option<String>,
    region: Option<String>,
    access_key_id: Option<Secret>,
    secret_access_key: Option<Secret>,
    secret_access_key_file: Option<NamedFile>,
    session_token: Option<Secret>,
    path_style: Option<bool>,
    allow_http: bool,
    ca_file: Option<PathBuf>,
    proxy: Option<String>,
    timeout: Option<Duration>,
}

const S3_KEYS: [&str; 11] = [
    "endpoint",
    "region",
    "access_key_id",
    "secret_access_key",
    "secret_access_key_file",
    "session_token",
    "path_style",
    "allow_http",
    "ca_file",
    "proxy",
    "timeout",
];

impl StorageConfig {
    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let Some(url) = table.text("url") else {
            return Err(table.missing("url", "Such as url = \"file:///var/lib/walden/repo\".".to_owned()));
        };
        let location = Location::parse(&url.value).map_err(|error| url.bad(error.to_string(), None))?;
        if !matches!(location, Location::S3 { .. })
            && let Some(key) = S3_KEYS.into_iter().find(|key| table.has(key))
        {
            return Err(table.at(key).bad("only a store with an s3:// url has it", None));
        }
        let retry = table.duration("retry")?.map_or(RetryOptions::default().deadline, |entry| entry.value);
        Ok(Self { place: url.place(), retry, s3: S3Config::read(table)?, location })
    }

    /// Opens the store; its traffic is counted in `traffic`, and no call takes longer than `deadline_max`.
    pub fn open(
        &self,
        environment: &Environment,
        traffic: Arc<Traffic>,
        clock: Arc<dyn Clock>,
        deadline_max: Duration,
    ) -> Result<Arc<dyn Store>> {
        let s3 = match self.location {
            Location::S3 { .. } => self.s3.options(environment)?,
            Location::File(_) | Location::Memory => S3Options::default(),
        };
        let retry = RetryOptions::within(self.retry.min(deadline_max));
        Ok(storage::open(&self.location, &Options { s3, traffic, clock, retry, ..Options::default() })?)
    }

    /// Says which store it is, as far as the configuration does.
    pub fn address(&self) -> String {
        match &self.s3.endpoint {
            Some(endpoint) => format!("{} at {endpoint}", self.location),
            None => self.location.to_string(),
        }
    }

    /// Lists the files that are read when the store is opened.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let secret = self.s3.secret_access_key_file.as_ref().map(|file| file.path.as_path());
        secret.into_iter().chain(self.s3.ca_file.as_deref())
    }

    /// Returns whether the configuration file itself holds a secret.
    pub(super) fn holds_secret(&self) -> bool {
        self.s3.secret_access_key.is_some() || self.s3.session_token.is_some()
    }
}

impl S3Config {
    fn read(table: &Table<'_>) -> Result<Self> {
        let text = |key: &str| table.text(key).map(|entry| entry.value);
        let secret = |key: &str| text(key).map(Secret::from);
        let config = Self {
            endpoint: text("endpoint"),
            region: text("region"),
            access_key_id: secret("access_key_id"),
            secret_access_key: secret("secret_access_key"),
            secret_access_key_file: NamedFile::read(table, "secret_access_key_file")?,
            session_token: secret("session_token"),
            path_style: table.boolean("path_style"),
            allow_http: table.boolean("allow_http").unwrap_or(false),
            ca_file: table.path("ca_file")?,
            proxy: text("proxy"),
            timeout: table.duration("timeout")?.map(positive).transpose()?,
        };
        if config.secret_access_key.is_some() && config.secret_access_key_file.is_some() {
            let both = "the secret stands in secret_access_key as well";
            return Err(table.at("secret_access_key_file").bad(both, "Remove one of the two.".to_owned()));
        }
        let has_secret = config.secret_access_key.is_some() || config.secret_access_key_file.is_some();
        if config.access_key_id.is_some() != has_secret {
            let (there, missing) = if has_secret {
                ("a secret", "access_key_id")
            } else {
                ("access_key_id", "secret_access_key_file")
            };
            return Err(table.missing(missing, format!("With {there} it is needed as well.")));
        }
        Ok(config)
    }

    /// Fills the gaps from the environment and fetches the secret.
    fn options(&self, environment: &Environment) -> Result<S3Options> {
        let first = |names: [&'static str; 2]| -> Result<Option<String>> {
            Ok(environment.text(names[0])?.or(environment.text(names[1])?))
        };
        let mut options = S3Options {
            endpoint: self.endpoint.clone().or(first(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])?),
            region: self.region.clone().or(first(["AWS_REGION", "AWS_DEFAULT_REGION"])?),
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
            session_token: self.session_token.clone(),
            path_style: self.path_style,
            allow_http: self.allow_http,
            ca_file: self.ca_file.clone(),
            proxy: self.proxy.clone(),
            ..S3Options::default()
        };
        if let Some(timeout) = self.timeout {
            options.read_timeout = timeout;
            options.connect_timeout = options.connect_timeout.min(timeout);
        }
        if let Some(file) = &self.secret_access_key_file {
            options.secret_access_key = Some(Secret::from(file.secret()?.trim().to_owned()));
        }
        // Credentials go together: half from here and half from there would be somebody else's.
        if options.access_key_id.is_none() {
            let secret = |name| -> Result<Option<Secret>> { Ok(environment.text(name)?.map(Secret::from)) };
            options.access_key_id = secret("AWS_ACCESS_KEY_ID")?;
            options.secret_access_key = secret("AWS_SECRET_ACCESS_KEY")?;
            options.session_token = secret("AWS_SESSION_TOKEN")?;
        }
        if options.access_key_id.is_none() && options.secret_access_key.is_none() {
            let region = options.region.as_deref().unwrap_or(S3Options::REGION_DEFAULT);
            options.credentials = credential_chain(environment, options.endpoint.as_deref(), region)?;
        }
        Ok(options)
    }
}

/// Refuses a wait that would be over before it began.
fn positive(entry: Entry<'_, Duration>) -> Result<Duration> {
    if entry.value.is_zero() { Err(entry.bad("nothing answers in no time", None)) } else { Ok(entry.value) }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::storage::CredentialChain;

    fn options(keys: &str, variables: &[(&str, &str)]) -> Result<S3Options> {
        let text = format!("[storage]\nurl = \"s3://bucket\"\n{keys}\n[sites.main]\n");
        let environment = Environment::of(0, variables);
        let config = Config::parse(&text, Path::new("/etc/walden.toml"), &environment)?;
        config.site(None)?.storage.s3.options(&environment)
    }

    fn secret(text: &str) -> Option<Secret> {
        Some(Secret::from(text.to_owned()))
    }

    const ENVIRONMENT: [(&str, &str); 5] = [
        ("AWS_ACCESS_KEY_ID", "env-id"),
        ("AWS_SECRET_ACCESS_KEY", "env-key"),
        ("AWS_SESSION_TOKEN", "env-token"),
        ("AWS_DEFAULT_REGION", "env-region"),
        ("AWS_ENDPOINT_URL", "https://env"),
    ];

    #[test]
    fn the_environment_fills_gaps_and_never_completes_foreign_credentials() {
        let from_environment = options("", &ENVIRONMENT).unwrap();
        assert_eq!(from_environment.access_key_id, secret("env-id"));
        assert_eq!(from_environment.secret_access_key, secret("env-key"));
        assert_eq!(from_environment.session_token, secret("env-token"));
        assert_eq!(from_environment.region.as_deref(), Some("env-region"));
        assert_eq!(from_environment.endpoint.as_deref(), Some("https://env"));

        let keys = "access_key_id = \"id\"\nsecret_access_key = \"key\"\nregion = \"here\"\nendpoint = \"https://here\"";
        let from_file = options(keys, &ENVIRONMENT).unwrap();
        assert_eq!((from_file.access_key_id, from_file.secret_access_key), (secret("id"), secret("key")));
        assert_eq!(from_file.session_token, None);
        assert_eq!(from_file.region.as_deref(), Some("here"));
        assert_eq!(from_file.endpoint.as_deref(), Some("https://here"));
        assert_eq!(options(keys, &[]).unwrap().credentials, CredentialChain::default());
        assert_eq!(from_environment.credentials, CredentialChain::default());
        assert!(!options("", &[]).unwrap().credentials.0.is_empty());
    }

    #[test]
    fn how_long_is_waited_and_tried_can_be_set() {
        let timeouts = |keys| {
            let options = options(keys, &[]).unwrap();
            (options.connect_timeout, options.read_timeout)
        };
        let seconds = Duration::from_secs;
        assert_eq!(timeouts(""), (seconds(5), seconds(30)));
        assert_eq!(timeouts("timeout = \"2s\""), (seconds(2), seconds(2)));
        assert_eq!(timeouts("timeout = \"1min\""), (seconds(5), seconds(60)));
        let error = options("timeout = \"0s\"", &[]).unwrap_err();
        assert!(error.to_string().contains("nothing answers in no time"), "{error}");

        let text = "[storage]\nurl = \"memory://\"\nretry = \"10min\"\n[sites.main]\n";
        let config = Config::parse(text, Path::new("walden.toml"), &Environment::of(0, &[])).unwrap();
        assert_eq!(config.site(None).unwrap().storage.retry, seconds(600));
    }

    #[test]
    fn a_secret_comes_from_a_file_that_nobody_else_can_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s3.secret");
        std::fs::write(&path, "hunter2\n").unwrap();
        let keys = format!("access_key_id = \"id\"\nsecret_access_key_file = {path:?}");

        std::fs::set_permissions(&path, Permissions::from_mode(0o604)).unwrap();
        let error = options(&keys, &[]).unwrap_err();
        let path_shown = path.display();
        assert_eq!(
            error.to_string(),
            format!(
                "/etc/walden.toml:4: \"secret_access_key_file\" in [storage]: the file \"{path_shown}\" has mode 0604: everybody can use it"
            )
        );
        assert_eq!(error.hint().unwrap(), format!("chmod 600 {path_shown}"));

        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(options(&keys, &[]).unwrap().secret_access_key, secret("hunter2"));
    }
}
