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
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsConnector, rustls};

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

/// A secured stream, and what ties a password exchange to it (`tls-server-end-point`, RFC 5929).
pub(super) struct Secured {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) end_point: Option<Vec<u8>>,
}

/// Why a stream was not secured.
pub(super) enum NotSecured {
    Settings(Error),
    Handshake(std::io::Error),
}

/// Secures a stream on which the server agreed to it.
pub(super) async fn secure(
    settings: &TlsSettings,
    host: &str,
    stream: TcpStream,
) -> Result<Secured, NotSecured> {
    let config = client_config(settings).map_err(NotSecured::Settings)?;
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| NotSecured::Handshake(std::io::Error::other(error)))?;
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.map_err(NotSecured::Handshake)?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let end_point = certificate.and_then(|certificate| end_point_of(certificate.as_ref()));
    Ok(Secured { stream, end_point })
}

/// Returns the hash of a certificate by the algorithm it is signed with; none where that is not SHA-1, -256 or -384.
fn end_point_of(certificate: &[u8]) -> Option<Vec<u8>> {
    use rustls::crypto::aws_lc_rs::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
    let algorithm = signature_algorithm(certificate)?;
    let suite = match algorithm {
        // sha1WithRSAEncryption is taken as SHA-256, as RFC 5929 says; then SHA-256 with RSA and with ECDSA.
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x05 | 0x0B]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x02] => TLS13_AES_128_GCM_SHA256,
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0C]
        | [0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x03] => TLS13_AES_256_GCM_SHA384,
        _ => return None,
    };
    Some(suite.tls13()?.common.hash_provider.hash(certificate).as_ref().to_vec())
}

/// Returns the object identifier of a certificate's signature: SEQUENCE { tbs, SEQUENCE { OID, … }, … }.
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    let (certificate, _) = der_value(certificate, SEQUENCE)?;
    let (_, rest) = der_value(certificate, SEQUENCE)?;
    let (algorithm, _) = der_value(rest, SEQUENCE)?;
    der_value(algorithm, OBJECT_IDENTIFIER).map(|(value, _)| value)
}

/// Splits a DER value with this tag from what follows it.
fn der_value(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7F => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7F))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    (found == tag).then(|| rest.split_at_checked(length)).flatten()
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
