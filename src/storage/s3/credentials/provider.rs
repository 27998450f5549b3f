//! Keeps credentials from the chain, renews them in time, and gives them to whoever signs.
//!
//! They are renewed before they expire; while the old ones are good, a source that fails then is only warned about. The
//! clock of this host decides when to ask, not what is good: credentials that look expired as they come are used all
//! the same, and where the store calls their token expired the source is asked again, once for each key it gave.

use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;

use crate::clock::Clock;

use super::document::Credentials;
use super::error::{NoCredentials, SourceError};
use super::fetch::Asker;
use super::{CredentialChain, CredentialSource, Step};

/// How long before they expire credentials are renewed, or half of their life where that is less.
const RENEWED_AHEAD: SignedDuration = SignedDuration::from_mins(5);

/// After a renewal that failed, and for credentials that look expired as they come.
const RENEWAL_PAUSE: SignedDuration = SignedDuration::from_secs(30);

/// Gives the credentials of a chain.
#[derive(Debug)]
pub(in crate::storage::s3) struct Provider {
    chain: CredentialChain,
    asker: Asker,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Held by whoever asks the sources.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Current>,
    /// The key that the store refused last.
    refused_key: Option<String>,
    /// Whether there ever were credentials.
    had: bool,
}

#[derive(Debug, Clone)]
struct Current {
    credential: Arc<AwsCredential>,
    renew_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
}

impl Provider {
    /// Prepares a chain; nobody is asked before the first request is signed.
    pub(in crate::storage::s3) fn new(chain: CredentialChain, asker: Asker, clock: Arc<dyn Clock>) -> Self {
        Self { chain, asker, clock, state: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    /// Hears that the store no longer accepts a key; the next request is signed with another or fails.
    pub(in crate::storage::s3) fn refused(&self, key_id: &str) {
        let mut state = self.state();
        if state.current.as_ref().is_some_and(|current| current.credential.key_id == key_id) {
            state.current = None;
        }
        state.refused_key = Some(key_id.to_owned());
    }

    async fn get(&self) -> Result<Arc<AwsCredential>, NoCredentials> {
        if let Some(credential) = self.fresh() {
            return Ok(credential);
        }
        let _asking = match (self.asking.try_lock(), self.good()) {
            (Ok(asking), _) => asking,
            // Somebody is renewing them, and these are still good.
            (Err(_), Some(credential)) => return Ok(credential),
            (Err(_), None) => self.asking.lock().await,
        };
        if let Some(credential) = self.fresh() {
            return Ok(credential);
        }
        match self.ask().await {
            Ok((source, given)) => self.keep(&source, &given),
            Err(error) => self.postponed(error),
        }
    }

    /// Asks one source after the other.
    async fn ask(&self) -> Result<(String, Credentials), NoCredentials> {
        let mut said = Vec::new();
        for step in &self.chain.0 {
            let source = match step {
                Step::Skip { source, why } => {
                    said.push(format!("{source}: {why}"));
                    continue;
                }
                Step::Ask(source) => source,
            };
            let source_name = source.name();
            match fetch(source, &self.asker).await {
                Ok(given) => {
                    tracing::debug!(source = source_name, key = given.key_id, "took credentials for s3");
                    return Ok((source_name, given));
                }
                Err(SourceError::Absent(why)) => said.push(format!("{source_name}: {why}")),
                Err(SourceError::Refused(why)) => return Err(NoCredentials::Refused { source_name, why }),
                Err(SourceError::Unreachable(why)) => {
                    return Err(NoCredentials::Unreachable { source_name, why });
                }
            }
        }
        Err(NoCredentials::Nowhere { said, had: self.state().had })
    }

    fn keep(&self, source: &str, given: &Credentials) -> Result<Arc<AwsCredential>, NoCredentials> {
        let now = self.clock.now();
        let mut state = self.state();
        if state.refused_key.as_deref() == Some(&given.key_id) {
            return Err(NoCredentials::NoOthers { source_name: source.to_owned() });
        }
        let credential = Arc::new(AwsCredential {
            key_id: given.key_id.clone(),
            secret_key: given.secret.expose().to_owned(),
            token: given.token.as_ref().map(|token| token.expose().to_owned()),
        });
        let renew_at = given.expires_at.map(|at| renewal(now, at));
        state.current =
            Some(Current { credential: credential.clone(), renew_at, expires_at: given.expires_at });
        state.had = true;
        Ok(credential)
    }

    /// Goes on with credentials that are still good, for a while.
    fn postponed(&self, error: NoCredentials) -> Result<Arc<AwsCredential>, NoCredentials> {
        let Some(credential) = self.good() else { return Err(error) };
        tracing::warn!("could not renew the credentials for s3: {error}");
        if let Some(current) = &mut self.state().current {
            current.renew_at = Some(self.clock.now() + RENEWAL_PAUSE);
        }
        Ok(credential)
    }

    /// Returns the credentials if they need not be renewed yet.
    fn fresh(&self) -> Option<Arc<AwsCredential>> {
        let state = self.state();
        let current = state.current.as_ref()?;
        let is_fresh = current.renew_at.is_none_or(|at| self.clock.now() < at);
        is_fresh.then(|| current.credential.clone())
    }

    /// Returns the credentials if they have not expired.
    fn good(&self) -> Option<Arc<AwsCredential>> {
        let state = self.state();
        let current = state.current.as_ref()?;
        let is_good = current.expires_at.is_none_or(|at| self.clock.now() < at);
        is_good.then(|| current.credential.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

/// Decides when credentials that were given now are renewed.
fn renewal(now: Timestamp, expires_at: Timestamp) -> Timestamp {
    let ahead = RENEWED_AHEAD.min(expires_at.duration_since(now) / 2);
    expires_at.checked_sub(ahead).unwrap_or(expires_at).max(now + RENEWAL_PAUSE)
}

async fn fetch(source: &CredentialSource, asker: &Asker) -> Result<Credentials, SourceError> {
    match source {
        CredentialSource::Profile(profile) => profile.fetch(asker).await,
        CredentialSource::WebIdentity(identity) => identity.fetch(asker).await,
        CredentialSource::Container(container) => container.fetch(asker).await,
        CredentialSource::Instance(instance) => instance.fetch(asker).await,
    }
}

#[async_trait]
impl CredentialProvider for Provider {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let generic =
            |error: NoCredentials| object_store::Error::Generic { store: "S3", source: Box::new(error) };
        self.get().await.map_err(generic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_renewed_ahead_of_their_end_and_not_all_the_time() {
        let now: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
        let after = |seconds: i64| {
            renewal(now, now + SignedDuration::from_secs(seconds)).duration_since(now).as_secs()
        };
        assert_eq!(after(3600), 3300);
        assert_eq!(after(400), 200);
        assert_eq!(after(40), 30);
        assert_eq!(after(0), 30);
        assert_eq!(after(-3600), 30, "a host an hour ahead uses what it gets");
    }
}
