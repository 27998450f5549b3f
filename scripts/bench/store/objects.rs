//! The objects of the store and what was asked of it, in memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use jiff::Timestamp;

/// All objects, by their path with the bucket.
#[derive(Debug, Default)]
pub struct Objects {
    stored: Mutex<BTreeMap<String, Object>>,
    /// Parts of uploads under way, by upload and number.
    parts: Mutex<HashMap<String, BTreeMap<u32, Bytes>>>,
    uploads: AtomicU64,
    /// What was asked.
    pub counts: Counts,
}

/// An object; clones share its bytes.
#[derive(Debug, Clone)]
pub struct Object {
    /// Its content.
    pub bytes: Bytes,
    /// When it was stored.
    pub modified: Timestamp,
}

/// Requests and bytes of objects since they were last read.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests of all kinds.
    pub requests: AtomicU64,
    /// Bytes of objects sent to clients.
    pub bytes_sent: AtomicU64,
    /// Bytes of objects received.
    pub bytes_received: AtomicU64,
}

/// One level or the whole of a listing.
#[derive(Debug, Default)]
pub struct Page {
    /// Keys, without the bucket.
    pub objects: Vec<(String, Object)>,
    /// Common prefixes.
    pub folders: Vec<String>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

impl Objects {
    /// Stores an object; false where it exists and must not.
    pub fn put(&self, path: &str, bytes: Bytes, only_new: bool) -> bool {
        let mut stored = self.stored.lock().expect("no holder panics");
        if only_new && stored.contains_key(path) {
            return false;
        }
        stored.insert(path.to_owned(), Object { bytes, modified: Timestamp::now() });
        true
    }

    /// Finds an object.
    pub fn get(&self, path: &str) -> Option<Object> {
        self.stored.lock().expect("no holder panics").get(path).cloned()
    }

    /// Removes an object.
    pub fn delete(&self, path: &str) {
        self.stored.lock().expect("no holder panics").remove(path);
    }

    /// Removes all objects whose path begins with `prefix`.
    pub fn delete_below(&self, prefix: &str) {
        self.stored.lock().expect("no holder panics").retain(|path, _| !path.starts_with(prefix));
    }

    /// Starts an upload in parts.
    pub fn start_upload(&self) -> String {
        self.uploads.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Takes a part.
    pub fn put_part(&self, upload: &str, number: u32, bytes: Bytes) {
        let mut parts = self.parts.lock().expect("no holder panics");
        parts.entry(upload.to_owned()).or_default().insert(number, bytes);
    }

    /// Puts the parts together.
    pub fn finish_upload(&self, path: &str, upload: &str) {
        let parts = self.parts.lock().expect("no holder panics").remove(upload).unwrap_or_default();
        let whole: Vec<u8> = parts.into_values().flatten().collect();
        self.put(path, whole.into(), false);
    }

    /// Lists keys of `bucket` (with its slash) that begin with `prefix` and come after `after`.
    pub fn list(&self, bucket: &str, prefix: &str, delimiter: &str, after: &str, limit: usize) -> Page {
        let stored = self.stored.lock().expect("no holder panics");
        let mut page = Page::default();
        let start = format!("{bucket}{}", after.max(prefix));
        for (path, object) in stored.range::<String, _>((Bound::Included(start), Bound::Unbounded)) {
            let Some(key) = path.strip_prefix(bucket).filter(|key| key.starts_with(prefix)) else {
                break;
            };
            let folder = match key[prefix.len()..].find(delimiter) {
                Some(at) if !delimiter.is_empty() => Some(&key[..prefix.len() + at + delimiter.len()]),
                _ => None,
            };
            if key <= after
                || folder.is_some_and(|folder| page.folders.last().is_some_and(|last| last == folder))
            {
                continue;
            }
            if page.objects.len() + page.folders.len() == limit {
                page.next = page.objects.last().map(|(key, _)| key.clone()).max(page.folders.last().cloned());
                // What stands in a folder that was listed sorts behind its name.
                page.next
                    .iter_mut()
                    .filter(|next| !delimiter.is_empty() && next.ends_with(delimiter))
                    .for_each(|next| next.push(char::MAX));
                break;
            }
            match folder {
                Some(folder) => page.folders.push(folder.to_owned()),
                None => page.objects.push((key.to_owned(), object.clone())),
            }
        }
        page
    }
}
