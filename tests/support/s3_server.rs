//! An S3 server in this process, for tests: s3s over a temporary folder, on a free port of loopback.
//!
//! s3s-fs looks whether a key is free and then writes, so two creates at once may both succeed, and it creates
//! missing buckets; what it cannot read it says is not there. `Strict` keeps to the protocol where s3s-fs does not.
//!
//! Shared by the unit tests of `storage` and by the integration tests, each of which includes this file.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, GetObjectInput, GetObjectOutput, HeadObjectInput,
    HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, PutObjectInput, PutObjectOutput,
};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::giver::SESSION_KEYS;

/// The server's access key.
pub const ACCESS_KEY_ID: &str = "walden-test";

/// The secret to [`ACCESS_KEY_ID`].
pub const SECRET_ACCESS_KEY: &str = "not much of a secret";

/// The bucket there is.
pub const BUCKET: &str = "bucket";

/// A running server; dropping it ends it and removes its objects.
pub struct S3Server {
    folder: TempDir,
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl S3Server {
    /// Starts a server with one empty bucket on the current runtime.
    pub async fn start() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        std::fs::create_dir(folder.path().join(BUCKET)).expect("the new folder is empty");
        let files = FileSystem::new(folder.path()).expect("the folder exists");
        let objects = folder.path().join(BUCKET);
        let mut builder = S3ServiceBuilder::new(Strict { files, objects, creating: Mutex::default() });
        let mut auth = SimpleAuth::from_single(ACCESS_KEY_ID, SECRET_ACCESS_KEY);
        // Temporary credentials have the same secret; whatever token comes with them is taken.
        for key in SESSION_KEYS {
            auth.register(key.to_owned(), SECRET_ACCESS_KEY.into());
        }
        builder.set_auth(auth);
        let service = builder.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let accepting = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let http = auto::Builder::new(TokioExecutor::new());
                    // A client that goes away in mid-request is an error here and nothing to a test.
                    let _ = http.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { folder, address, accepting }
    }

    /// Returns the server's address, `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the folder that holds the bucket's objects as files.
    pub fn bucket_folder(&self) -> PathBuf {
        self.folder.path().join(BUCKET)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// The operations a store needs, those that create one after the other.
struct Strict {
    files: FileSystem,
    /// Where the bucket's objects are.
    objects: PathBuf,
    creating: Mutex<()>,
}

impl Strict {
    /// Answers 503 where the folder or file of a key is neither there nor absent.
    fn look_at(&self, key: &str) -> S3Result<()> {
        match std::fs::metadata(self.objects.join(key)) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Err(s3_error!(error, ServiceUnavailable))
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl S3 for Strict {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        if request.input.bucket != BUCKET {
            return Err(s3_error!(NoSuchBucket));
        }
        let _one_at_a_time = self.creating.lock().await;
        self.files.put_object(request).await
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        if request.input.bucket != BUCKET {
            return Err(s3_error!(NoSuchBucket));
        }
        self.look_at(&request.input.key)?;
        self.files.get_object(request).await
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.look_at(&request.input.key)?;
        self.files.head_object(request).await
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.files.delete_object(request).await
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let prefix = request.input.prefix.as_deref().unwrap_or_default();
        self.look_at(prefix.rsplit_once('/').map_or("", |(folder, _)| folder))?;
        self.files.list_objects_v2(request).await
    }
}
