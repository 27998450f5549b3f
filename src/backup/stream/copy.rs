//! The copy of a received basebackup: parts as they come → work on the CPU pool → the packer, in order.
//!
//! ```text
//! BASE_BACKUP ─ Receiver ─ work ─▶ CPU pool (check, compare, compress) ─ in order ─▶ Packer: start-up set | rest
//! ```
//! Memory, at most: the jobs of the budget, each with its raw and its compressed bytes, and the packs of the budget; one
//! pack more where that allows a single upload. While all uploads are busy nothing is read, and the server waits.
//! Dropping the future ends the connection, and with it the backup on the server.

use std::pin::pin;
use std::sync::Arc;

use futures::{StreamExt, stream};
use tokio::sync::Notify;

use crate::backup::error::Error;
use crate::backup::known_parent::KnownParent;
use crate::backup::packer::Packer;
use crate::backup::pipeline::Budget;
use crate::backup::rate::RateLimit;
use crate::backup::source::SourceError;
use crate::backup::stream::error::StreamError;
use crate::backup::stream::receive::{Received, Receiver};
use crate::backup::stream::work::{Done, Lane, Work, WorkContext};
use crate::codec::CpuPool;
use crate::monitor::Progress;
use crate::replication::{BaseBackup, BaseBackupEnd, BaseBackupPart, ReplicationConnection};
use crate::repo;

/// A backup that comes.
pub struct Incoming {
    base: BaseBackup,
    receiver: Receiver,
    limit: Option<RateLimit>,
    heard: Arc<Notify>,
    end: Option<BaseBackupEnd>,
}

/// A backup that has come.
pub struct Finished {
    /// What came beside the files.
    pub received: Received,
    /// How it ended.
    pub end: BaseBackupEnd,
    /// Bytes that came.
    pub received_bytes: u64,
    /// The connection, for questions behind the end.
    pub connection: ReplicationConnection,
}

impl Incoming {
    /// Prepares to take a backup apart; `heard` is told of everything that comes.
    pub fn new(base: BaseBackup, receiver: Receiver, limit: Option<RateLimit>, heard: Arc<Notify>) -> Self {
        Self { base, receiver, limit, heard, end: None }
    }

    /// Returns what came beside the files, how the backup ended, and the connection.
    pub fn finish(self) -> Result<Finished, Error> {
        let end = self
            .end
            .ok_or_else(|| repo::Error::Internal("a base backup was finished before its end".to_owned()))?;
        let received_bytes = self.base.received();
        let (received, connection) = (self.receiver.finish()?, self.base.into_connection());
        Ok(Finished { received, end, received_bytes, connection })
    }

    async fn next_work(&mut self) -> Result<Option<Work>, Error> {
        loop {
            if let Some(work) = self.receiver.next_work() {
                return Ok(Some(work));
            }
            if self.end.is_some() {
                return Ok(None);
            }
            let part = self.base.next().await.map_err(SourceError::from)?;
            self.heard.notify_one();
            if let (Some(limit), BaseBackupPart::Content(bytes)) = (&self.limit, &part) {
                limit.take(bytes.len() as u64).await;
            }
            match part {
                BaseBackupPart::End(end) => self.end = Some(end),
                part => self.receiver.take(part)?,
            }
        }
    }
}

/// Packs what was worked on; returns how many bytes that were.
pub(super) async fn pack(
    packer: &mut Packer,
    done: Done,
    parent: Option<&KnownParent>,
) -> Result<u64, Error> {
    match done {
        Done::Together { lane, files, together } => {
            let bytes = together.files.iter().map(|file| u64::from(file.len)).sum();
            packer.turn_to(lane == Lane::StartSet);
            packer.push_small(together, &files).await?;
            Ok(bytes)
        }
        Done::Keep(file) => {
            packer.turn_to(file.lane == Lane::StartSet);
            let is_kept = parent.is_some_and(|parent| packer.keep_file(&file.file, parent));
            let path = || file.file.path.to_string();
            if is_kept { Ok(file.file.size) } else { Err(StreamError::NotKnown { path: path() }.into()) }
        }
        Done::Pages { file, run, expected, last, known } => {
            packer.turn_to(file.lane == Lane::StartSet);
            packer.push_pages((file.number, &file.file), run, expected, known).await?;
            if last {
                packer.end_file(&file.file);
            }
            Ok(expected)
        }
    }
}

/// Copies everything that comes.
///
/// # Errors
/// The first one; work that has begun then ends unheard.
pub async fn copy(
    incoming: &mut Incoming,
    context: Arc<WorkContext>,
    pool: &CpuPool,
    budget: Budget,
    packer: &mut Packer,
    progress: &Progress,
) -> Result<(), Error> {
    let parent = context.parent.clone();
    let work = stream::try_unfold(incoming, |incoming| async move {
        let work = incoming.next_work().await?;
        Ok::<_, Error>(work.map(|work| (work, incoming)))
    });
    let done = work
        .map(|work| {
            let context = context.clone();
            async move {
                let work = work?;
                pool.run(move || work.execute(&context)).await?
            }
        })
        .buffered(budget.jobs);
    let mut done = pin!(done);
    while let Some(result) = done.next().await {
        progress.advance(pack(packer, result?, parent.as_deref()).await?);
    }
    Ok(())
}
