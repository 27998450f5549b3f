//! The copy of a received basebackup: parts as they come → work on the CPU pool → two packers, in order.
//!
//! ```text
//! BASE_BACKUP ─ Receiver ─ work ─▶ CPU pool (check, sum up, compress) ─ in order ─▶ Packer of the start-up set
//!                                                                                └─▶ Packer of the rest
//! ```
//! Memory, at most: the jobs of the budget, each with its raw and its compressed bytes, and the packs of the budget; one
//! pack more where that allows fewer than three uploads. While all uploads are busy nothing is read, and the server
//! waits. Dropping the future ends the connection, and with it the backup on the server.

use std::pin::pin;
use std::sync::Arc;

use futures::{StreamExt, stream};

use crate::backup::error::Error;
use crate::backup::packer::{Packed, Packer};
use crate::backup::pipeline::Budget;
use crate::backup::source::SourceError;
use crate::backup::stream::receive::{Received, Receiver};
use crate::backup::stream::work::{Done, Lane, Work, WorkContext};
use crate::codec::CpuPool;
use crate::monitor::Progress;
use crate::pg::Crc32c;
use crate::replication::{BaseBackup, BaseBackupEnd, BaseBackupPart, ReplicationConnection};
use crate::repo::{self, BasebackupWriter, NamedChunks, entry::Entry};

/// A backup that comes.
pub struct Incoming {
    base: BaseBackup,
    receiver: Receiver,
    end: Option<BaseBackupEnd>,
}

/// The packers of the two lanes.
pub struct Packers {
    start_set: Packer,
    rest: Packer,
}

impl Incoming {
    /// Prepares to take a backup apart.
    pub fn new(base: BaseBackup, receiver: Receiver) -> Self {
        Self { base, receiver, end: None }
    }

    /// Returns what came beside the files, how the backup ended, and the connection.
    pub fn finish(self) -> Result<(Received, BaseBackupEnd, ReplicationConnection), Error> {
        let end = self.end.ok_or_else(|| {
            repo::Error::Internal("a base backup was finished before its end".to_owned())
        })?;
        Ok((self.receiver.finish()?, end, self.base.into_connection()))
    }

    async fn next_work(&mut self) -> Result<Option<Work>, Error> {
        loop {
            if let Some(work) = self.receiver.next_work() {
                return Ok(Some(work));
            }
            if self.end.is_some() {
                return Ok(None);
            }
            match self.base.next().await.map_err(SourceError::from)? {
                BaseBackupPart::End(end) => self.end = Some(end),
                part => self.receiver.take(part)?,
            }
        }
    }
}

impl Packers {
    /// Creates both, within the budget.
    pub fn new(writer: &Arc<BasebackupWriter>, context: &WorkContext, budget: Budget) -> Self {
        let packer = |uploads| Packer::new(writer.clone(), context.compression, uploads);
        let mut rest = packer(budget.uploads.saturating_sub(2).max(1));
        rest.end_start_set();
        Self { start_set: packer(1), rest }
    }

    /// Returns the packer for what is neither small nor large: files that are added by hand.
    pub fn rest(&mut self) -> &mut Packer {
        &mut self.rest
    }

    /// Returns the files that both have packed so far, each with its CRC.
    pub fn files(&self) -> impl Iterator<Item = (&Entry, Crc32c)> {
        let both = [self.start_set.packed(), self.rest.packed()];
        both.into_iter().flat_map(|packed| packed.entries.iter().zip(packed.checksums.iter().copied()))
    }

    /// Stores what is left and returns what has been packed, as if by one.
    pub async fn finish(self) -> Result<(Packed, NamedChunks), Error> {
        let (mut packed, mut named) = self.start_set.finish().await?;
        let (rest, further) = self.rest.finish().await?;
        named.join(further);
        packed.entries.extend(rest.entries);
        packed.checksums.extend(rest.checksums);
        packed.size.files += rest.size.files;
        packed.size.database_bytes += rest.size.database_bytes;
        packed.size.damaged_pages += rest.size.damaged_pages;
        packed.vanished += rest.vanished;
        packed.shrunk += rest.shrunk;
        Ok((packed, named))
    }

    async fn push(&mut self, done: Done) -> Result<u64, Error> {
        match done {
            Done::Together { lane, files, together } => {
                let bytes = together.files.iter().map(|file| u64::from(file.len)).sum();
                self.of(lane).push_small(together, &files).await?;
                Ok(bytes)
            }
            Done::Pages { lane, number, file, run, expected, last } => {
                let packer = self.of(lane);
                packer.push_pages(number, &file, run, expected).await?;
                if last {
                    packer.end_file(&file);
                }
                Ok(expected)
            }
        }
    }

    fn of(&mut self, lane: Lane) -> &mut Packer {
        match lane {
            Lane::StartSet => &mut self.start_set,
            Lane::Rest => &mut self.rest,
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
    packers: &mut Packers,
    progress: &Progress,
) -> Result<(), Error> {
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
        progress.advance(packers.push(result?).await?);
    }
    Ok(())
}
