//! Object stores behind one narrow trait.
//!
//! [`Store`] is the whole of what the repository needs from the place it lies in: create an object once,
//! read it whole or in part, list, delete. Everything above relies on the contract written on the trait and
//! on nothing else, so that a folder, a bucket and memory are the same to it; `conformance` checks that
//! contract on every store.
//!
//! Order for reading: `key` and `error` for the words, `store` for the contract, `memory` for the smallest
//! store.
//!
//! Deliberately absent: overwriting, appending, multipart uploads, object attributes, suffix ranges,
//! compare-and-swap, copy and rename. Some store lacks each of them. Object keys are opaque here; `repo`
//! builds and parses them.

pub mod error;
pub mod key;
pub mod store;

pub mod local;
pub mod memory;
pub mod s3;
pub mod url;

mod jitter;
pub mod probe;
mod refusal;
pub mod retry;
pub mod secret;
pub mod traffic;

pub mod conformance;
pub mod fault;
pub mod record;

pub use error::{Error, ErrorKind, Verb};
pub use fault::{Fault, Faulty, Rule};
pub use key::ObjectKey;
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use probe::{Capabilities, Examination, Listing, examine, probe};
pub use record::{Call, Recording};
pub use retry::{RetryOptions, Retrying};
pub use s3::credentials::{
    Authorization, Container, CredentialChain, CredentialSource, Instance, Profile, Step, WebIdentity,
};
pub use s3::{S3Options, S3Store};
pub use secret::Secret;
pub use store::{Folder, ObjectMeta, Store};
pub use traffic::{Counted, Traffic, TrafficSnapshot};
pub use url::{Location, Options, open};
