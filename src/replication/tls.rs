//! TLS as libpq's `sslmode` asks for it.
//!
//! | sslmode | encrypted | certificate checked | name checked |
//! |---|---|---|---|
//! | disable, allow, prefer | never, if refused without, if offered | no | no |
//! | require | yes | only where a root certificate is configured | no |
//! | verify-ca | yes | yes | no |
//! | verify-full | yes | yes | yes |
//!
//! A certificate that is itself among the roots is trusted as it stands: administrators sign their server's own
//! certificate, OpenSSL accepts that, and webpki would not.

use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::settings::{Roots, SslMode, TlsSettings};
use crate::replication::Error;

/// What turns a TCP stream into a secured one.
type Connector = <MakeRustlsConnect as MakeTlsConnect<TcpStream>>::TlsConnect;

/// What one attempt to connect does about encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Plain,
    IfOffered,
    Required,
}

impl SslMode {
    /// Returns what to try over TCP, in order; a later one only where the server turned the earlier down.
    pub(super) fn attempts(self) -> &'static [Encryption] {
        match self {
            Self::Disable => &[Encryption::Plain],
            Self::Allow => &[Encryption::Plain, Encryption::Required],
            Self::Prefer => &[Encryption::IfOffered, Encryption::Plain],
            Self::Require | Self::VerifyCa | Self::VerifyFull => &[Encryption::Required],
        }
    }
}

/// Makes the connector for the settings; certificates and keys are read now.
pub(super) fn connector(settings: &TlsSettings, host: &str) -> Result<Connector, Error> {
    let Ok(connector) = MakeTlsConnect::<TcpStream>::make_tls_connect(
        &mut MakeRustlsConnect::new(client_config(settings)?),
        host,
    );
    Ok(connector)
}

fn client_config(settings: &TlsSettings) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(Verifier::new(settings, provider.clone())?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider's own cipher suites cover the default protocol versions")
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &settings.client {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = read_certificates(certificate)?;
            let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| unreadable(certificate, &error))?
        }
    };
    if settings.direct {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(config)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err(unreadable(path, &"it holds no certificate")),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, detail: &dyn std::fmt::Display) -> Error {
    Error::File { path: path.to_owned(), detail: detail.to_string() }
}

/// Checks as much of the server's certificate as the mode asks for.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// The chain check and the roots it rests on; none where the mode trusts any certificate.
    trust: Option<(Arc<WebPkiServerVerifier>, Vec<CertificateDer<'static>>)>,
    check_name: bool,
}

impl Verifier {
    fn new(settings: &TlsSettings, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let check_name = settings.mode == SslMode::VerifyFull;
        let trusts_any = matches!(settings.mode, SslMode::Disable | SslMode::Allow | SslMode::Prefer);
        let roots = match &settings.roots {
            _ if trusts_any => return Ok(Self { provider, trust: None, check_name }),
            Roots::None => return Ok(Self { provider, trust: None, check_name }),
            Roots::File(path) => read_certificates(path)?,
            Roots::System => rustls_native_certs::load_native_certs().certs,
        };
        let mut store = RootCertStore::empty();
        let (usable, _) = store.add_parsable_certificates(roots.iter().cloned());
        if usable == 0 {
            return Err(Error::Tls {
                address: "any server".into(),
                detail: "no root certificate is usable".into(),
            });
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone())
            .build()
            .map_err(|error| Error::Tls { address: "any server".into(), detail: error.to_string() })?;
        Ok(Self { provider, trust: Some((chain, roots)), check_name })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some((chain, roots)) = &self.trust else { return Ok(ServerCertVerified::assertion()) };
        if roots.contains(end_entity) {
            if self.check_name {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // webpki checks the name last, so nothing else is wrong with the certificate.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
