//! The copy: read → check → compress on the CPU pool, several at a time; seal → pack → upload in planned order.
//!
//! ```text
//! plan ─ jobs ─▶ CPU pool (read, verify, compress) ─ in order ─▶ Packer (seal) ─▶ uploads
//! ```
//! Memory, at most: [`Budget`] jobs in flight, each with its raw and its compressed bytes, and packs: one for each
//! upload, and one that is under construction or waits for an upload to end. Everything stops where something fails; nothing that was
//! uploaded counts until the basebackup is committed. Deliberately absent: what to copy (`plan`) and when (`run`).

use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, stream};

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::packer::Packer;
use crate::backup::plan::{Plan, Step};
use crate::backup::read_pages::{JOB_BYTES, JobContext, LargeFile, PageRun};
use crate::backup::read_small::{SmallFiles, read_small};
use crate::codec::CpuPool;
use crate::monitor::Progress;

/// How much of the machine a copy takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Jobs that are read, compressed or waiting for their turn.
    pub jobs: usize,
    /// Packs that are uploaded at a time.
    pub uploads: usize,
}

/// A pack in memory, with what growing its buffer may take.
const PACK_MEMORY: u64 = 34 << 20;
/// Raw bytes and compressed bytes of a job.
const JOB_MEMORY: u64 = 2 * JOB_BYTES;
/// More jobs in flight than this give nothing, however many threads there are to come.
const JOBS_MAX: usize = 128;
/// Jobs for each thread: one at work, others waiting for the slowest.
const JOBS_PER_THREAD: usize = 3;

impl Budget {
    /// Divides `memory_bytes` between jobs and packs, for so many threads and wished-for uploads.
    ///
    /// At least one upload and two jobs are granted: below some 100 MiB the copy is over its budget, and slow.
    pub fn new(memory_bytes: u64, threads: usize, transfers: usize) -> Self {
        let affordable = (memory_bytes / 4 / JOB_MEMORY) as usize;
        let jobs = (threads * JOBS_PER_THREAD).clamp(2, JOBS_MAX).min(affordable.max(2));
        let left = memory_bytes.saturating_sub(jobs as u64 * JOB_MEMORY);
        // One pack is under construction, or full and waiting, beside the uploads.
        let packs = (left / PACK_MEMORY).saturating_sub(1) as usize;
        Self { jobs, uploads: packs.clamp(1, transfers.max(1)) }
    }
}

/// What a job on the pool does.
enum Job {
    Together(Vec<(usize, SourceFile)>),
    Pages { file: Arc<LargeFile>, range: Range<u64>, last: bool },
    WriteMaps { last_of_start_set: bool },
}

enum Done {
    Together(SmallFiles),
    Pages { number: usize, run: PageRun, expected: u64, last: bool },
    WriteMaps { last_of_start_set: bool },
}

/// Copies the files of `plan` into the packs of `packer`.
///
/// # Errors
/// The first one, naming the file where it is the source's; jobs that have begun then end unheard.
pub async fn copy(
    plan: &Plan,
    files: &[SourceFile],
    context: Arc<JobContext>,
    pool: &CpuPool,
    budget: Budget,
    packer: &mut Packer,
    progress: &Progress,
) -> Result<(), Error> {
    if plan.start_steps == 0 {
        packer.end_start_set();
    }
    let jobs = plan.steps.iter().enumerate().flat_map(|(at, step)| {
        let last_of_start_set = at + 1 == plan.start_steps;
        jobs_of(step, files, last_of_start_set)
    });
    let mut done = stream::iter(jobs)
        .map(|job| {
            let context = context.clone();
            async move {
                match job {
                    Job::WriteMaps { last_of_start_set } => Ok(Done::WriteMaps { last_of_start_set }),
                    job => pool.run(move || execute(job, &context)).await?,
                }
            }
        })
        .buffered(budget.jobs);
    while let Some(result) = done.next().await {
        match result? {
            Done::Together(together) => {
                progress.advance(together.files.iter().map(|file| u64::from(file.len)).sum());
                packer.push_small(together, files).await?;
            }
            Done::Pages { number, run, expected, last } => {
                progress.advance(expected);
                packer.push_pages(number, &files[number], run, expected).await?;
                if last {
                    packer.end_file(&files[number]);
                }
            }
            Done::WriteMaps { last_of_start_set } => {
                packer.write_maps().await?;
                if last_of_start_set {
                    packer.end_start_set();
                }
            }
        }
    }
    Ok(())
}

fn jobs_of(
    step: &Step,
    files: &[SourceFile],
    last_of_start_set: bool,
) -> Box<dyn Iterator<Item = Job> + Send> {
    match step {
        Step::Together(numbers) => {
            let together = numbers.iter().map(|number| (*number, files[*number].clone())).collect();
            Box::new(std::iter::once(Job::Together(together)))
        }
        Step::Alone(number) => {
            let size = files[*number].size;
            let file = Arc::new(LargeFile::new(*number, files[*number].clone()));
            Box::new((0..size.div_ceil(JOB_BYTES)).map(move |n| {
                let range = n * JOB_BYTES..((n + 1) * JOB_BYTES).min(size);
                let last = range.end == size;
                Job::Pages { file: file.clone(), range, last }
            }))
        }
        Step::WriteMaps => Box::new(std::iter::once(Job::WriteMaps { last_of_start_set })),
    }
}

fn execute(job: Job, context: &JobContext) -> Result<Done, Error> {
    match job {
        Job::Together(files) => Ok(Done::Together(read_small(&files, context)?)),
        Job::Pages { file, range, last } => {
            let expected = range.end - range.start;
            let run = file.read(range, context)?;
            Ok(Done::Pages { number: file.number, run, expected, last })
        }
        Job::WriteMaps { last_of_start_set } => Ok(Done::WriteMaps { last_of_start_set }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_kept_where_it_can_be() {
        for (mebibytes, threads, transfers) in
            [(64, 2, 8), (128, 1, 1), (256, 2, 8), (256, 64, 8), (512, 128, 64), (4096, 256, 1024)]
        {
            let memory = mebibytes << 20;
            let Budget { jobs, uploads } = Budget::new(memory, threads, transfers);
            assert!(jobs >= 2 && uploads >= 1 && uploads <= transfers, "{mebibytes}");
            let needed = jobs as u64 * JOB_MEMORY + (uploads as u64 + 1) * PACK_MEMORY;
            assert!(needed <= memory.max(2 * PACK_MEMORY + 16 * JOB_MEMORY), "{mebibytes}: {needed}");
        }
    }
}
