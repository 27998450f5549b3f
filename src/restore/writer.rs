//! A batch on its way to the disk: runs of chunks fetched side by side, opened and written on the CPU pool.
//!
//! ```text
//! runs ─ transfers ─▶ stored bytes ─ room ─▶ CPU pool (authenticate, inflate, write) ─▶ finished files
//! ```
//! Memory, at most: what `room` allows of stored bytes, one raw chunk for each thread, and the batch. No file is waited
//! for: chunks go to their places in whatever order they come. What fails first ends everything.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::codec::CpuPool;
use crate::monitor::Progress;
use crate::repo::{self, Basebackup, ChunkRun, FrameKind, RUN_BYTES_MAX, StoredRun, plan_runs};
use crate::restore::Error;
use crate::restore::batch::Batch;
use crate::restore::file_writer::{FileWriter, OpenFile, first_unfinished};

/// Writes batches.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    basebackup: Arc<Basebackup>,
    files: Arc<FileWriter>,
    pool: CpuPool,
    transfers: Arc<Semaphore>,
    room: Arc<Semaphore>,
    progress: Progress,
}

/// Room is counted in units of this size.
const ROOM_UNIT: u32 = 64 << 10;
/// A job on the pool opens so many chunks, so that the last run keeps every thread busy.
const CHUNKS_PER_JOB: usize = 64;

impl Writer {
    /// Creates a writer with so many requests and so many stored bytes under way.
    pub(super) fn new(
        basebackup: Arc<Basebackup>,
        files: Arc<FileWriter>,
        pool: CpuPool,
        transfers: usize,
        memory_bytes: u64,
        progress: Progress,
    ) -> Self {
        let units = (memory_bytes / u64::from(ROOM_UNIT)).max(u64::from(RUN_BYTES_MAX / ROOM_UNIT)) as usize;
        let transfers = Arc::new(Semaphore::new(transfers.max(1)));
        let room = Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS)));
        Self { basebackup, files, pool, transfers, room, progress }
    }

    /// Writes a batch; `on_run` is called after each run that has been begun.
    pub(super) async fn write(&self, batch: Batch, mut on_run: impl FnMut()) -> Result<(), Error> {
        let batch = Arc::new(batch);
        let (files, at_hand) = (self.files.clone(), batch.clone());
        self.pool.run(move || files.write_at_hand(&at_hand)).await??;
        let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
        for run in plan_runs(batch.chunks.iter().map(|task| &task.chunk)) {
            let units = (run.range.end - run.range.start).div_ceil(ROOM_UNIT).max(1);
            let room = self.room.clone().acquire_many_owned(units).await;
            let room = room.map_err(|error| Error::Internal(error.to_string()))?;
            while let Some(done) = tasks.try_join_next() {
                outcome(done)?;
            }
            let (writer, batch) = (self.clone(), batch.clone());
            tasks.spawn(async move {
                let written = writer.write_run(run, batch).await;
                drop(room);
                written
            });
            on_run();
        }
        while let Some(done) = tasks.join_next().await {
            outcome(done)?;
        }
        match first_unfinished(&batch) {
            None => Ok(()),
            Some((path, bytes)) => Err(Error::Missing { path: path.to_owned(), bytes }),
        }
    }

    async fn write_run(&self, run: ChunkRun, batch: Arc<Batch>) -> Result<(), Error> {
        let stored = {
            let _transfer =
                self.transfers.acquire().await.map_err(|error| Error::Internal(error.to_string()))?;
            Arc::new(self.basebackup.fetch_run(&run).await?)
        };
        let jobs = run.chunks.clone().step_by(CHUNKS_PER_JOB).map(|from| {
            let chunks = from..(from + CHUNKS_PER_JOB).min(run.chunks.end);
            let (stored, batch, files) = (stored.clone(), batch.clone(), self.files.clone());
            let progress = self.progress.clone();
            self.pool.run(move || {
                let mut open = OpenFile::default();
                chunks
                    .into_iter()
                    .try_for_each(|n| write_chunk(&stored, &batch, n, &files, &mut open, &progress))
            })
        });
        for done in futures::future::join_all(jobs).await {
            done??;
        }
        Ok(())
    }
}

fn write_chunk(
    stored: &StoredRun,
    batch: &Batch,
    n: usize,
    files: &FileWriter,
    open: &mut OpenFile,
    progress: &Progress,
) -> Result<(), Error> {
    let task = &batch.chunks[n];
    let raw = stored.open(FrameKind::Data, &task.chunk)?;
    for place in &batch.places[task.places.clone()] {
        if !files.write(batch, open, &raw, place)? {
            let detail = format!("chunk {} is shorter than its pages", task.chunk.position);
            return Err(repo::Error::Damaged { object: task.chunk.pack.to_string(), detail }.into());
        }
        progress.advance(u64::from(place.len));
    }
    Ok(())
}

fn outcome(done: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    done.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
}
