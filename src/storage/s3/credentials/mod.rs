//! Credentials that the configuration does not hold: the default credential chain of AWS's own tools.
//!
//! A [`CredentialChain`] says which sources are asked, in order, and why others are not; `config` makes it from the
//! environment, which nothing here reads. The first source that has credentials gives them. One that is set up and fails
//! ends the chain: whoever comes after it would be somebody else. `provider` keeps what was given, renews it before it
//! expires, and asks once more where the store calls it expired.
//!
//! Deliberately absent: profiles that assume another role by a signed request, single sign-on, and programs that print
//! credentials. A profile that wants one of them is refused by name.

use std::path::PathBuf;

use super::super::secret::Secret;

mod container;
mod instance;
mod profile;
mod web_identity;

mod document;
mod error;
mod fetch;
mod provider;

#[cfg(test)]
mod tests;

pub(super) use document::fits_a_header;
pub(in crate::storage) use error::NoCredentials;
pub(super) use fetch::Asker;
pub(super) use provider::Provider;

/// What is done about credentials, one source after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialChain(pub Vec<Step>);

/// One source of the chain, as far as it is known before anybody is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is not asked, for a reason.
    Skip {
        /// The source, as messages name it.
        source: &'static str,
        /// Why, such as that a variable is not set.
        why: String,
    },
    /// It is asked.
    Ask(CredentialSource),
}

/// A source of credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialSource {
    /// A section of the files that AWS's tools share.
    Profile(Profile),
    /// A role, for a token that somebody else vouches for.
    WebIdentity(WebIdentity),
    /// The agent of a container.
    Container(Container),
    /// The role of a machine.
    Instance(Instance),
}

/// A profile in the shared files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: String,
    /// Whether somebody asked for it, by its name or by that of its file; else it may be absent.
    pub is_named: bool,
    /// The file of credentials, whose keys come first.
    pub credentials_file: PathBuf,
    /// The file of settings.
    pub config_file: PathBuf,
    /// Where a role is asked for, should the profile name one.
    pub sts_endpoint: String,
}

/// A role that is taken on by a token (`AssumeRoleWithWebIdentity`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebIdentity {
    /// The file that holds the token; it is read each time, for it is replaced while it is in use.
    pub token_file: PathBuf,
    /// The role.
    pub role_arn: String,
    /// What the session is called in the role's logs.
    pub session_name: String,
    /// The security token service.
    pub sts_endpoint: String,
}

/// An agent that gives a container its credentials (ECS, EKS Pod Identity).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Where it listens.
    pub url: String,
    /// What it wants to see.
    pub authorization: Authorization,
}

/// What stands in the `Authorization` of a request to an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authorization {
    /// Nothing.
    None,
    /// This.
    Token(Secret),
    /// The content of a file, which is read each time.
    TokenFile(PathBuf),
}

/// The metadata service of a machine, version 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its address, without a slash at the end.
    pub endpoint: String,
}

impl CredentialSource {
    /// Returns how messages name it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Profile(profile) => format!("profile \"{}\"", profile.name),
            Self::WebIdentity(identity) => format!("web identity of {}", identity.role_arn),
            Self::Container(container) => format!("container agent at {}", container.url),
            Self::Instance(instance) => format!("instance metadata at {}", instance.endpoint),
        }
    }

    /// Returns the addresses of services that credentials, or what proves a right to them, travel to or from.
    pub(super) fn sts_endpoint(&self) -> Option<&str> {
        match self {
            Self::Profile(profile) => Some(&profile.sts_endpoint),
            Self::WebIdentity(identity) => Some(&identity.sts_endpoint),
            Self::Container(_) | Self::Instance(_) => None,
        }
    }
}
