//! The store in a bucket, `s3://`: AWS and whatever speaks its protocol.
//!
//! object_store signs, sends and parses; this module asks of it one request at a time, without its retries,
//! its multipart and its bulk deletes, and holds the answers to the contract of `Store`. `options` says how
//! to reach the store, `credentials` where keys come from that are not configured, `http` bounds how long and
//! how much is listened to it, `answer` puts refusals into our words.
//!
//! A create is a single PUT with `If-None-Match: *`. Every payload's SHA-256 is part of the signature, so a
//! body changed on the way is refused by the store; no other checksum header is sent, for stores differ
//! there (failure 40).

mod answer;
pub mod credentials;
mod http;
mod options;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use jiff::Timestamp;
use object_store::aws::AmazonS3;
use object_store::list::{PaginatedListOptions, PaginatedListResult, PaginatedListStore};
use object_store::path::Path;
use object_store::{GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::error::{Error, ErrorKind, Verb};
use super::key::ObjectKey;
use super::refusal::find;
use super::store::{FOLDER_ENTRIES_MAX, Folder, ObjectMeta, Store, folder_name, folder_prefix, range_length};
use super::traffic::KEYS_PER_REQUEST;
use credentials::Provider;
pub use options::S3Options;

use crate::clock::{Clock, SystemClock};

/// The most memory taken for a body before its bytes have arrived.
const BODY_BYTES_AHEAD: u64 = 1 << 20;

/// Keeps objects below a prefix of a bucket.
#[derive(Clone)]
pub struct S3Store {
    client: Arc<AmazonS3>,
    /// What gives credentials, where they are not fixed.
    credentials: Option<Arc<Provider>>,
    place: answer::Place,
    /// Empty, or ending in a slash.
    prefix: String,
    options: S3Options,
}

impl S3Store {
    /// Prepares access to a bucket; nothing is sent before the first call.
    pub fn open(bucket: &str, prefix: Option<&ObjectKey>, options: &S3Options) -> Result<Self, Error> {
        Self::with_clock(bucket, prefix, options, Arc::new(SystemClock))
    }

    /// Prepares access to a bucket; temporary credentials are renewed by `clock`.
    pub fn with_clock(
        bucket: &str,
        prefix: Option<&ObjectKey>,
        options: &S3Options,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        let (client, credentials) = options.client(bucket, clock)?;
        let client = Arc::new(client);
        let prefix = prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
        let place = answer::Place { bucket: bucket.to_owned(), endpoint: options.endpoint.clone() };
        Ok(Self { client, credentials, place, prefix, options: options.clone() })
    }

    fn path(&self, key: &ObjectKey) -> Path {
        Path::parse(format!("{}{key}", self.prefix)).expect("every object key is a path")
    }

    fn failed(&self, verb: Verb, key: &str, error: object_store::Error) -> Error {
        if let (Some(credentials), Some(refused)) = (&self.credentials, find::<answer::Signed>(&error))
            && refused.is_about_the_token()
        {
            // With others it may succeed; where there are none, the next attempt says so.
            credentials.refused(&refused.key_id);
            return answer::not_begun(verb, folder_name(key), &self.place, error);
        }
        answer::error_of(verb, folder_name(key), &self.place, error)
    }

    /// Receives a body of known size, or what came of it.
    async fn body(&self, verb: Verb, key: &ObjectKey, answer: GetResult) -> Result<Bytes, Error> {
        let size = answer.range.end - answer.range.start;
        let mut body = BytesMut::with_capacity(usize::try_from(size.min(BODY_BYTES_AHEAD)).unwrap_or(0));
        let mut stream = answer.into_stream();
        loop {
            let piece = match tokio::time::timeout(self.options.read_timeout, stream.next()).await {
                Ok(Some(piece)) => piece.map_err(|error| self.failed(verb, key.as_str(), error))?,
                Ok(None) => break,
                Err(_) => {
                    let reason = Some(format!("nothing for {:?} in mid-body", self.options.read_timeout));
                    return Err(Error::Unreachable { verb, key: key.to_string(), reason, source: None });
                }
            };
            if body.is_empty() && piece.len() as u64 == size {
                return Ok(piece);
            }
            if (body.len() + piece.len()) as u64 > size {
                return Err(answer::protocol(verb, key.as_str(), "it sent more than it announced"));
            }
            body.extend_from_slice(&piece);
        }
        match body.len() as u64 {
            received if received < size => {
                let reason = Some(format!("it ended the body after {received} of {size} bytes"));
                Err(Error::Unreachable { verb, key: key.to_string(), reason, source: None })
            }
            _ => Ok(body.freeze()),
        }
    }

    async fn page(
        &self,
        verb: Verb,
        prefix: &str,
        options: PaginatedListOptions,
    ) -> Result<PaginatedListResult, Error> {
        let full = format!("{}{prefix}", self.prefix);
        let full = (!full.is_empty()).then_some(full.as_str());
        self.client.list_paginated(full, options).await.map_err(|error| self.failed(verb, prefix, error))
    }

    /// Returns what an entry of a listing is to us: nothing, if its name is no object key below our prefix.
    fn entry(&self, found: &object_store::ObjectMeta) -> Option<ObjectMeta> {
        let key = self.key(found.location.as_ref())?;
        Some(ObjectMeta { key, size: found.size, last_modified: modified_of(found) })
    }

    fn key(&self, path: &str) -> Option<ObjectKey> {
        ObjectKey::parse(path.strip_prefix(&self.prefix)?).ok()
    }
}

#[async_trait]
impl Store for S3Store {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.client.put_opts(&self.path(key), body.into(), options).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed(Verb::Create, key.as_str(), error)),
        }
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        let answer = self.client.get_opts(&self.path(key), GetOptions::default()).await;
        let answer = answer.map_err(|error| self.failed(Verb::Get, key.as_str(), error))?;
        let size = answer.meta.size;
        if size > size_max {
            return Err(Error::TooLarge { key: key.to_string(), size, size_max });
        }
        self.body(Verb::Get, key, answer).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        let length = range_length(key, &range)?;
        let truncated = |received| Error::Truncated { key: key.to_string(), expected: length, received };
        let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
        let answer = match self.client.get_opts(&self.path(key), options).await {
            Ok(answer) => answer,
            Err(error) if answer::is_past_the_end(&error) => return Err(truncated(0)),
            Err(error) => return Err(self.failed(Verb::GetRange, key.as_str(), error)),
        };
        if answer.range != range {
            return Err(truncated(answer.range.end.saturating_sub(answer.range.start).min(length - 1)));
        }
        self.body(Verb::GetRange, key, answer).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        match self.client.head(&self.path(key)).await {
            Ok(found) => {
                let last_modified = modified_of(&found);
                Ok(ObjectMeta { key: key.clone(), size: found.size, last_modified })
            }
            // The answer to a HEAD has no body that says what is missing, the object or the bucket. A GET's
            // has.
            Err(error) if answer::is_missing(&error) => match self.get_range(key, 0..1).await {
                Err(error) if error.kind() != ErrorKind::Truncated => Err(error),
                Ok(_) | Err(_) => Err(answer::protocol(
                    Verb::Head,
                    key.as_str(),
                    "it finds the object by GET but not by HEAD",
                )),
            },
            Err(error) => Err(self.failed(Verb::Head, key.as_str(), error)),
        }
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let folder = folder_prefix(prefix)?;
        let offset = after.filter(|after| after.as_str() > folder.as_str());
        let mut found: Vec<ObjectMeta> = Vec::new();
        let mut token = None;
        while found.len() < limit {
            let options = PaginatedListOptions {
                offset: offset.map(|after| format!("{}{after}", self.prefix)),
                max_keys: Some((limit - found.len()).min(KEYS_PER_REQUEST)),
                page_token: token.take(),
                ..PaginatedListOptions::default()
            };
            let page = self.page(Verb::List, &folder, options).await?;
            for object in page.result.objects.iter().filter_map(|object| self.entry(object)) {
                let last = found.last().map(|last| &last.key).or(offset);
                if last.is_some_and(|last| object.key <= *last) {
                    return Err(answer::protocol(
                        Verb::List,
                        prefix,
                        "it does not list in the order of keys",
                    ));
                }
                found.push(object);
            }
            token = page.page_token;
            if token.is_none() {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        let prefix = folder_prefix(prefix)?;
        let mut folder = Folder::default();
        let mut token = None;
        loop {
            let options = PaginatedListOptions {
                delimiter: Some("/".into()),
                page_token: token.take(),
                ..PaginatedListOptions::default()
            };
            let page = self.page(Verb::ListFolder, &prefix, options).await?;
            let folders = page.result.common_prefixes.iter().filter_map(|path| self.key(path.as_ref()));
            folder.folders.extend(folders.map(|key| key.name().to_owned()));
            folder.objects.extend(page.result.objects.iter().filter_map(|object| self.entry(object)));
            let size = folder.folders.len() + folder.objects.len();
            if size > FOLDER_ENTRIES_MAX {
                let (size, size_max) = (size as u64, FOLDER_ENTRIES_MAX as u64);
                return Err(Error::TooLarge { key: prefix, size, size_max });
            }
            token = page.page_token;
            if token.is_none() {
                break;
            }
        }
        folder.folders.sort_unstable();
        folder.objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(folder)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        match self.client.delete(&self.path(key)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed(Verb::Delete, key.as_str(), error) {
                Error::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }
}

/// Reads the time of the last change; one beyond what a timestamp holds counts as old.
fn modified_of(found: &object_store::ObjectMeta) -> Timestamp {
    let nanoseconds = i32::try_from(found.last_modified.timestamp_subsec_nanos()).unwrap_or(0);
    Timestamp::new(found.last_modified.timestamp(), nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Store({}/{})", self.place.bucket, self.prefix)
    }
}

#[cfg(test)]
#[path = "../../../tests/support/s3_server.rs"]
pub(crate) mod server;

#[cfg(test)]
#[path = "../../../tests/support/giver.rs"]
pub(crate) mod giver;

#[cfg(test)]
mod tests;
