//! An S3 server over a folder, for tests of the binary: objects are files there, to be looked at and damaged.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tokio::runtime::{Builder, Runtime};

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
