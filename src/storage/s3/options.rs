//! How to reach an S3 store, checked and turned into a client.
//!
//! Credentials are given or, where they are not, come from the sources of a chain. Plain http is for loopback
//! unless it is allowed in so many words. Nothing here reads the environment: neither credentials nor a proxy
//! come from there.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::RetryConfig;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use url::{Host, Url};

use crate::clock::Clock;

use super::super::error::{Error, Source};
use super::super::secret::Secret;
use super::credentials::{Asker, CredentialChain, Provider, Step, fits_a_header};
use super::http::Connector;

/// The largest file of certificates that is read.
const CA_FILE_BYTES_MAX: u64 = 4 << 20;

/// How to reach an S3 store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Options {
    /// The store's address, `https://host:port`; AWS if absent.
    pub endpoint: Option<String>,
    /// The region; [`S3Options::REGION_DEFAULT`] if absent.
    pub region: Option<String>,
    /// The name of the access key.
    pub access_key_id: Option<Secret>,
    /// The access key.
    pub secret_access_key: Option<Secret>,
    /// What temporary credentials need beside the key.
    pub session_token: Option<Secret>,
    /// Who is asked for credentials where none of these are given.
    pub credentials: CredentialChain,
    /// Whether the bucket stands in the path, not in the host name; if absent, where an endpoint is set.
    pub path_style: Option<bool>,
    /// Whether http is allowed to hosts other than loopback.
    pub allow_http: bool,
    /// Certificates in PEM trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// A proxy for http and https.
    pub proxy: Option<String>,
    /// How long to wait for a connection.
    pub connect_timeout: Duration,
    /// How long to wait for the next bytes of an answer.
    pub read_timeout: Duration,
}

impl Default for S3Options {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            credentials: CredentialChain::default(),
            path_style: None,
            allow_http: false,
            ca_file: None,
            proxy: None,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(30),
        }
    }
}

/// The client of a bucket, and what gives it credentials where they are not fixed.
type Client = (AmazonS3, Option<Arc<Provider>>);

impl S3Options {
    /// The region where none is given: what stores other than AWS call theirs.
    pub const REGION_DEFAULT: &str = "us-east-1";

    /// Builds the client of a bucket; `clock` says when credentials are renewed.
    pub(super) fn client(&self, bucket: &str, clock: Arc<dyn Clock>) -> Result<Client, Error> {
        let endpoint = self.endpoint.as_deref().map(|text| self.check_endpoint(text)).transpose()?;
        // A dot in the bucket's name is one more level than the certificate of the host covers.
        let path_style = self.path_style.unwrap_or(endpoint.is_some() || bucket.contains('.'));
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(self.region.as_deref().unwrap_or(Self::REGION_DEFAULT))
            .with_virtual_hosted_style_request(!path_style)
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
            .with_http_connector(Connector::new(self.far_client()?, self.read_timeout));
        if let Some(endpoint) = endpoint {
            builder = builder.with_allow_http(endpoint.scheme() == "http");
            builder = builder.with_endpoint(address(endpoint, bucket, path_style)?);
        }
        let mut provider = None;
        match (&self.access_key_id, &self.secret_access_key) {
            (Some(id), Some(key)) => {
                if ![Some(id), self.session_token.as_ref()]
                    .into_iter()
                    .flatten()
                    .all(|it| fits_a_header(it.expose()))
                {
                    let what = "s3 access_key_id and session_token are visible ASCII characters";
                    return Err(invalid(what, None));
                }
                builder = builder.with_access_key_id(id.expose()).with_secret_access_key(key.expose());
                if let Some(token) = &self.session_token {
                    builder = builder.with_token(token.expose());
                }
            }
            (None, None) => {
                let chain = Arc::new(self.provider(clock)?);
                builder = builder.with_credentials(chain.clone());
                provider = Some(chain);
            }
            _ => return Err(invalid("s3 needs access_key_id and secret_access_key together", None)),
        }
        let client =
            builder.build().map_err(|error| invalid("cannot use these s3 options", Some(Arc::new(error))))?;
        Ok((client, provider))
    }

    fn provider(&self, clock: Arc<dyn Clock>) -> Result<Provider, Error> {
        let sources = self.credentials.0.iter().filter_map(|step| match step {
            Step::Ask(source) => Some(source),
            Step::Skip { .. } => None,
        });
        // The token that proves who asks goes there.
        for address in sources.filter_map(|source| source.sts_endpoint()) {
            self.check_endpoint(address)?;
        }
        let near = Connector::builder(self.connect_timeout.min(NEIGHBOUR_CONNECT_TIMEOUT)).build();
        let near = near.map_err(|error| invalid("cannot set up TLS", Some(Arc::new(error))))?;
        Ok(Provider::new(self.credentials.clone(), Asker::new(self.far_client()?, near), clock))
    }

    fn check_endpoint(&self, text: &str) -> Result<Url, Error> {
        let wrong = |why: &str| invalid(&format!("s3 endpoint \"{}\" {why}", text.escape_debug()), None);
        let url = Url::parse(text).map_err(|_| wrong("is not a URL such as https://host:port"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(invalid("s3 endpoint holds credentials, which have options of their own", None));
        }
        if url.query().is_some() || url.fragment().is_some() || !url.has_host() {
            return Err(wrong("is not a URL such as https://host:port"));
        }
        match url.scheme() {
            "https" => Ok(url),
            "http" if self.allow_http || is_loopback(&url) => Ok(url),
            "http" => Err(wrong("is not encrypted; set allow_http to use it all the same")),
            _ => Err(wrong("is neither https nor http")),
        }
    }

    /// Builds the client for the store and for services of the network.
    fn far_client(&self) -> Result<reqwest::Client, Error> {
        let mut builder = Connector::builder(self.connect_timeout);
        if let Some(path) = &self.ca_file {
            let wrong = |source: Source| {
                invalid(&format!("cannot read the certificates in \"{}\"", path.display()), Some(source))
            };
            let size = std::fs::metadata(path).map_err(|error| wrong(Arc::new(error)))?.len();
            if size > CA_FILE_BYTES_MAX {
                return Err(invalid(
                    &format!("\"{}\" is too large to be certificates", path.display()),
                    None,
                ));
            }
            let pem = std::fs::read(path).map_err(|error| wrong(Arc::new(error)))?;
            let certificates =
                reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| wrong(Arc::new(error)))?;
            if certificates.is_empty() {
                return Err(invalid(&format!("\"{}\" holds no certificate", path.display()), None));
            }
            builder = builder.tls_certs_merge(certificates);
        }
        if let Some(proxy) = &self.proxy {
            // Without the text: it may hold a password.
            let proxy = reqwest::Proxy::all(proxy).map_err(|_| invalid("s3 proxy is not a URL", None))?;
            builder = builder.proxy(proxy);
        }
        builder.build().map_err(|error| invalid("cannot set up TLS", Some(Arc::new(error))))
    }
}

/// How long somebody on this host, or next to it, takes to accept a connection.
const NEIGHBOUR_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    }
}

/// Returns the address requests go to, which in virtual-hosted style names the bucket.
fn address(mut endpoint: Url, bucket: &str, path_style: bool) -> Result<String, Error> {
    if !path_style {
        let host = format!("{bucket}.{}", endpoint.host_str().unwrap_or_default());
        endpoint.set_host(Some(&host)).map_err(|error| {
            let what = format!("s3 endpoint {endpoint} cannot be prefixed by a bucket; set path_style");
            invalid(&what, Some(Arc::new(error)))
        })?;
    }
    Ok(endpoint.as_str().trim_end_matches('/').to_owned())
}

fn invalid(reason: &str, source: Option<Source>) -> Error {
    Error::Invalid { key: "s3".to_owned(), reason: reason.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::super::credentials::{CredentialSource, WebIdentity};
    use super::*;
    use crate::clock::SystemClock;

    fn secret(text: &str) -> Option<Secret> {
        Some(Secret::from(text.to_owned()))
    }

    fn options(endpoint: &str) -> S3Options {
        S3Options {
            endpoint: Some(endpoint.to_owned()),
            access_key_id: secret("id"),
            secret_access_key: secret("hunter2"),
            ..S3Options::default()
        }
    }

    fn refusal(options: &S3Options) -> String {
        options.client("bucket", Arc::new(SystemClock)).expect_err("a refusal").to_string()
    }

    #[test]
    fn http_is_for_loopback_unless_allowed() {
        for endpoint in
            ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000", "https://s3.example.org"]
        {
            options(endpoint).client("bucket", Arc::new(SystemClock)).unwrap();
        }
        let far = options("http://s3.example.org");
        assert!(refusal(&far).contains("allow_http"), "{}", refusal(&far));
        S3Options { allow_http: true, ..far }.client("bucket", Arc::new(SystemClock)).unwrap();
    }

    #[test]
    fn half_of_the_credentials_is_refused() {
        let half = S3Options { secret_access_key: None, ..options("https://s3.example.org") };
        assert!(refusal(&half).contains("together"));
        S3Options { access_key_id: None, ..half }
            .client("bucket", Arc::new(SystemClock))
            .expect("others are asked for them, when there is something to sign");
    }

    #[test]
    fn credentials_that_cannot_stand_in_a_header_are_refused() {
        for wrong in ["two\nlines", "sp ace", "", "ü"] {
            let right = options("https://host");
            for bad in [
                S3Options { access_key_id: secret(wrong), ..right.clone() },
                S3Options { session_token: secret(wrong), ..right.clone() },
            ] {
                assert!(refusal(&bad).contains("visible ASCII"), "{wrong:?}");
            }
        }
    }

    #[test]
    fn a_token_is_not_sent_to_a_service_without_tls() {
        let identity = |endpoint: &str| {
            let identity = WebIdentity {
                token_file: "/run/token".into(),
                role_arn: "arn:x".to_owned(),
                session_name: "walden".to_owned(),
                sts_endpoint: endpoint.to_owned(),
            };
            let chain = CredentialChain(vec![Step::Ask(CredentialSource::WebIdentity(identity))]);
            S3Options { credentials: chain, ..S3Options::default() }
        };
        assert!(refusal(&identity("http://sts.example.org")).contains("not encrypted"));
        for right in ["http://127.0.0.1:1", "https://sts.example.org"] {
            identity(right).client("bucket", Arc::new(SystemClock)).unwrap();
        }
    }

    #[test]
    fn addresses_that_are_none_are_refused_without_repeating_secrets() {
        for wrong in ["s3.example.org", "ftp://s3.example.org", "https://", "https://host/?x"] {
            assert!(refusal(&options(wrong)).starts_with("s3 endpoint"), "{wrong}");
        }
        let message = refusal(&options("https://user:hunter2@host"));
        assert!(!message.contains("hunter2"), "{message}");
        let proxied = S3Options { proxy: Some("hunter2@:::".into()), ..options("https://host") };
        assert!(!refusal(&proxied).contains("hunter2"), "{}", refusal(&proxied));
        assert!(!format!("{:?}", options("https://host")).contains("hunter2"));
    }

    #[test]
    fn the_bucket_stands_in_the_path_or_in_the_host() {
        let endpoint = || Url::parse("https://s3.example.org:9000").unwrap();
        assert_eq!(address(endpoint(), "bkt", true).unwrap(), "https://s3.example.org:9000");
        assert_eq!(address(endpoint(), "bkt", false).unwrap(), "https://bkt.s3.example.org:9000");
        let numeric = Url::parse("https://10.0.0.1").unwrap();
        assert!(address(numeric, "bkt", false).is_err());
    }

    #[test]
    fn a_file_without_certificates_is_refused() {
        let file = NamedTempFile::new().unwrap();
        let with = |path| S3Options { ca_file: Some(path), ..options("https://host") };
        assert!(refusal(&with(file.path().to_owned())).contains("holds no certificate"));
        assert!(refusal(&with("/nonexistent".into())).contains("cannot read the certificates"));
    }
}
