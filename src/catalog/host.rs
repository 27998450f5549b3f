//! Whether a host is like the one a basebackup comes from: pages are read as they lie, and indexes in their order.
//!
//! Pure: what the basebackup records and what is known of this host in, refusal or warnings out. What is not known on
//! either side is not compared. The major version is the business of whoever looks for PostgreSQL's programs.

use crate::repo::documents::ServerRecord;

/// What decides whether pages and indexes of another host are right on this one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Operating system and architecture, as a basebackup records them.
    pub platform: String,
    /// Alignment of the architecture.
    pub maximum_alignment: u32,
    /// Version of the C library. That of ICU is the server's own affair (decision 0703).
    pub libc: Option<String>,
}

/// Pages of the basebackup would be read wrongly here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the source ran on {source_platform}, aligned to {source_alignment} bytes, and this host is {platform}, aligned to {alignment}"
)]
pub struct OtherArchitecture {
    source_platform: String,
    source_alignment: u32,
    platform: String,
    alignment: u32,
}

impl OtherArchitecture {
    /// Returns what the user should do.
    pub fn hint(&self) -> &'static str {
        "A physical backup is of use only on the architecture it comes from."
    }
}

impl Host {
    /// Returns what is known of this host.
    pub fn here(libc: Option<String>) -> Self {
        Self {
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            // The largest of the types that PostgreSQL stores.
            maximum_alignment: align_of::<u64>() as u32,
            libc,
        }
    }
}

/// Refuses another architecture.
pub fn check_architecture(server: &ServerRecord, host: &Host) -> Result<(), OtherArchitecture> {
    let is_other = |known: bool, same: bool| known && !same;
    let platforms = !server.platform.is_empty() && !host.platform.is_empty();
    let alignments = server.maximum_alignment != 0 && host.maximum_alignment != 0;
    if is_other(platforms, server.platform == host.platform)
        || is_other(alignments, server.maximum_alignment == host.maximum_alignment)
    {
        return Err(OtherArchitecture {
            source_platform: server.platform.clone(),
            source_alignment: server.maximum_alignment,
            platform: host.platform.clone(),
            alignment: host.maximum_alignment,
        });
    }
    Ok(())
}

/// Warns of a C library that may order text differently.
pub fn ordering_warning(server: &ServerRecord, host: &Host) -> Option<String> {
    let (source, here) = (server.libc.as_ref()?, host.libc.as_ref()?);
    (source != here).then(|| {
        format!(
            "the source had libc {source} and this host has {here}: text may sort differently, so check or rebuild \
             indexes on text"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (ServerRecord, Host) {
        let host =
            Host { platform: "linux x86_64".to_owned(), maximum_alignment: 8, libc: Some("2.36".to_owned()) };
        let server = ServerRecord {
            platform: host.platform.clone(),
            maximum_alignment: 8,
            libc: host.libc.clone(),
            ..ServerRecord::default()
        };
        (server, host)
    }

    #[test]
    fn a_host_like_the_source_gives_no_warning() {
        let (server, host) = pair();
        assert_eq!(check_architecture(&server, &host), Ok(()));
        assert_eq!(ordering_warning(&server, &host), None);
        let unknown = Host { libc: None, ..host };
        assert_eq!(ordering_warning(&server, &unknown), None);
        assert_eq!(check_architecture(&ServerRecord::default(), &Host::here(None)), Ok(()));
    }

    #[test]
    fn another_architecture_is_refused() {
        let (server, host) = pair();
        let other = Host { platform: "linux aarch64".to_owned(), ..host.clone() };
        let refused = check_architecture(&server, &other).unwrap_err().to_string();
        assert!(refused.contains("linux x86_64") && refused.contains("linux aarch64"), "{refused}");
        assert!(check_architecture(&server, &Host { maximum_alignment: 4, ..host }).is_err());
    }

    #[test]
    fn a_c_library_of_another_version_is_warned_of() {
        let (server, host) = pair();
        let other = Host { libc: Some("2.41".to_owned()), ..host };
        let warning = ordering_warning(&server, &other).unwrap();
        assert!(warning.contains("libc 2.36") && warning.contains("2.41"), "{warning}");
    }
}
