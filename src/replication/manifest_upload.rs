//! UPLOAD_MANIFEST (17 and later): what the server is to send nothing of that has not changed since.
//!
//! The manifest goes up piece by piece; the server reads it as it comes and keeps it for the next BASE_BACKUP of the same
//! connection. It checks the manifest's own checksum and the cluster; whether it has the WAL summaries for it, it says
//! when the backup begins.

use bytes::BytesMut;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use super::wire::{Incoming, refusal, unexpected};
use crate::replication::{Error, ReplicationConnection};

/// A manifest on its way.
#[derive(Debug)]
pub struct ManifestUpload {
    connection: ReplicationConnection,
}

impl ManifestUpload {
    /// Asks the server to take a manifest.
    ///
    /// # Errors
    /// `Sql` from a server that is older.
    pub async fn start(mut connection: ReplicationConnection) -> Result<Self, Error> {
        connection.query("UPLOAD_MANIFEST").await?;
        match connection.wire.next().await? {
            Incoming::Other(Message::CopyInResponse(_)) => Ok(Self { connection }),
            Incoming::Other(Message::ErrorResponse(answer)) => Err(refusal(answer.fields())),
            _ => Err(unexpected("a message that takes no manifest".into())),
        }
    }

    /// Sends the next bytes.
    pub async fn push(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut out = BytesMut::new();
        let data = frontend::CopyData::new(bytes).map_err(|error| unexpected(error.to_string()))?;
        data.write(&mut out);
        self.connection.wire.send(&out).await
    }

    /// Ends the manifest and returns the connection, for the backup.
    ///
    /// # Errors
    /// `Sql` where the server takes it for none, or for another cluster's.
    pub async fn finish(mut self) -> Result<ReplicationConnection, Error> {
        let mut out = BytesMut::new();
        frontend::copy_done(&mut out);
        self.connection.wire.send(&out).await?;
        loop {
            match self.connection.wire.next().await? {
                Incoming::Other(Message::CommandComplete(_)) => {}
                Incoming::Other(Message::ReadyForQuery(_)) => return Ok(self.connection),
                Incoming::Other(Message::ErrorResponse(answer)) => return Err(refusal(answer.fields())),
                _ => return Err(unexpected("a message that does not end a manifest".into())),
            }
        }
    }
}
