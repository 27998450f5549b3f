//! Opening what the configuration names: the store, the keys, the repository, the CPU pool.
//!
//! Every command comes to its repository through here, so that where a key is needed, what is counted and what is
//! said about missing protection is decided once.

use std::sync::Arc;
use std::time::Duration;

use crate::codec::{CpuPool, SystemRandom};
use crate::config::{self, KeyPurpose, SiteConfig};
use crate::repo::{Repository, RepositoryOptions};
use crate::storage::Store;

use super::context::Context;
use super::error::CommandError;

impl Context {
    /// Opens the store of a site; what it is asked is counted in [`Context::traffic`].
    pub fn open_store(&self, site: &SiteConfig) -> Result<Arc<dyn Store>, CommandError> {
        Ok(self.open_store_within(site, Duration::MAX)?)
    }

    /// Opens the store of a site for a caller that waits for no call longer than that.
    pub fn open_store_within(
        &self,
        site: &SiteConfig,
        deadline_max: Duration,
    ) -> config::Result<Arc<dyn Store>> {
        site.storage.open(&self.environment, self.traffic.clone(), self.clock(), deadline_max)
    }

    /// Opens the repository of a site that exists, with the keys for `purpose`.
    pub async fn open_repository(
        &self,
        site: &SiteConfig,
        purpose: KeyPurpose,
    ) -> Result<Repository, CommandError> {
        self.open_repository_within(site, purpose, Duration::MAX).await
    }

    /// Opens the repository of a site that exists, for a caller that waits for no call longer than that.
    pub async fn open_repository_within(
        &self,
        site: &SiteConfig,
        purpose: KeyPurpose,
        deadline_max: Duration,
    ) -> Result<Repository, CommandError> {
        let store = self.open_store_within(site, deadline_max)?;
        let options = RepositoryOptions { store, ..self.repository_options(site, purpose)? };
        self.open_existing(site, options).await
    }

    /// Opens the repository of a site to read what nobody vouches for, which the user has asked for.
    pub async fn open_repository_unsigned(&self, site: &SiteConfig) -> Result<Repository, CommandError> {
        tracing::warn!("what no trusted signer vouches for is taken, as --allow-unsigned says");
        let keyring = self.config()?.keyring_trusting_anyone(Arc::new(SystemRandom))?;
        let options = RepositoryOptions { keyring, ..self.repository_options(site, KeyPurpose::Read)? };
        self.open_existing(site, options).await
    }

    async fn open_existing(
        &self,
        site: &SiteConfig,
        options: RepositoryOptions,
    ) -> Result<Repository, CommandError> {
        Repository::open(options).await.map_err(|error| {
            let absent = error.is_absent();
            let error = CommandError::from(error);
            if !absent {
                return error;
            }
            let message = format!("there is no site \"{}\" in {}", site.prefix, site.storage.location);
            CommandError { error: error.error.context(message), ..error }.hint(
                "`walden site init` creates it; so does the first backup, or the first WAL segment pushed.",
            )
        })
    }

    /// Opens the repository of a site for writing, and creates it where there is none, which it says.
    pub async fn open_or_create_repository(&self, site: &SiteConfig) -> Result<Repository, CommandError> {
        let (repository, created) = self.create_repository(site).await?;
        if created {
            tracing::warn!("created site \"{}\" in {}", site.prefix, site.storage.location);
        }
        Ok(repository)
    }

    /// Opens the repository of a site for writing, and creates it where there is none; returns whether it did.
    pub async fn create_repository(&self, site: &SiteConfig) -> Result<(Repository, bool), CommandError> {
        let options = self.repository_options(site, KeyPurpose::Write)?;
        Ok(Repository::open_or_create(options).await?)
    }

    /// Says on standard error what a site's backups are not protected from; silent where they are.
    pub fn warn_of_missing_protection(&self) -> Result<(), CommandError> {
        let config = self.config()?;
        match &config.encryption {
            None => tracing::warn!(
                "backups are neither encrypted nor signed: {} has no [encryption]",
                config.file.display()
            ),
            Some(encryption) if encryption.recipients.is_empty() => {
                tracing::warn!("backups are not encrypted: recipients is empty in {}", config.file.display());
            }
            Some(encryption) if encryption.trusted_signers.is_empty() => tracing::warn!(
                "whoever can write to the store can forge backups: {} has no trusted_signers",
                config.file.display()
            ),
            Some(_) => {}
        }
        Ok(())
    }

    /// Starts the threads for CPU work, as many as configured.
    pub fn cpu_pool(&self) -> Result<CpuPool, CommandError> {
        let threads = self.config()?.limits.threads;
        Ok(CpuPool::new(threads, threads))
    }

    pub(super) fn repository_options(
        &self,
        site: &SiteConfig,
        purpose: KeyPurpose,
    ) -> Result<RepositoryOptions, CommandError> {
        Ok(RepositoryOptions {
            store: self.open_store(site)?,
            site: site.prefix.clone(),
            keyring: self.config()?.keyring(purpose, Arc::new(SystemRandom))?,
            clock: self.clock(),
        })
    }
}
