//! An S3 server over a folder, for tests of the binary: objects are files there, to be looked at and damaged.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::Proxy;
use super::s3_server::{ACCESS_KEY_ID, BUCKET, S3Server, SECRET_ACCESS_KEY};

/// A server; it ends when dropped.
pub struct S3 {
    server: S3Server,
    /// There until dropped.
    runtime: Option<Runtime>,
}

impl S3 {
    /// Serves a folder as the one bucket there is.
    pub fn over(folder: &Path) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        // On a thread of its own, for a test may run in a runtime already.
        let server = std::thread::scope(|scope| {
            scope.spawn(|| runtime.block_on(S3Server::start())).join().expect("the server starts")
        });
        fs::remove_dir(server.bucket_folder()).unwrap();
        symlink(folder, server.bucket_folder()).unwrap();
        Self { server, runtime: Some(runtime) }
    }

    /// Returns the server's address, `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        self.server.endpoint()
    }

    /// Returns the lines of `[storage]` for it.
    pub fn storage(&self) -> String {
        s3_storage(&self.endpoint())
    }
}

/// A server over a folder of its own, at the end of a line that can be disturbed.
pub struct RemoteS3 {
    // Dropped in this order: who asks goes before who answers, and that before what it answers from.
    line: Proxy,
    server: S3,
    folder: TempDir,
}

impl Deref for RemoteS3 {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.line
    }
}

impl RemoteS3 {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = S3::over(folder.path());
        Self { line: Proxy::to(&server.endpoint()), server, folder }
    }

    /// Returns the lines of `[storage]` for it, with further ones; requests go through the line.
    pub fn storage(&self, further: &str) -> String {
        s3_storage(&self.line.endpoint()) + further
    }

    /// Returns the server itself, past the line.
    pub fn server(&self) -> &S3 {
        &self.server
    }

    /// Returns the folder that is the bucket.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Returns the lines of `[storage]` for a server, or for what stands before it.
pub fn s3_storage(endpoint: &str) -> String {
    format!(
        "url = \"s3://{BUCKET}\"\nendpoint = \"{endpoint}\"\naccess_key_id = \"{ACCESS_KEY_ID}\"\n\
         secret_access_key = \"{SECRET_ACCESS_KEY}\"\n"
    )
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::fmt::Debug for S3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "S3({})", self.endpoint())
    }
}
