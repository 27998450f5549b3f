//! The copy: read → check → compress on the CPU pool, several at a time; seal → pack → upload in planned order.
//!
//! ```text
//! plan ─ jobs ─▶ CPU pool (read, verify, compare, compress) ─ in order ─▶ Packer (seal) ─▶ uploads
//! ```
//! Memory, at most: [`Budget`] jobs in flight, each with its raw and its compressed bytes, and packs: one for each
//! upload, and one that is under construction or waits for an upload to end. Everything stops where something fails;
//! nothing that was uploaded counts until the basebackup is committed. Deliberately absent: what to copy (`plan`) and
//! when (`run`).

use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, stream};

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::gather::PageRun;
use crate::backup::packer::Packer;
use crate::backup::plan::{Plan, SMALL_FILE_BYTES, Step};
use crate::backup::read_pages::{JOB_BYTES, JobContext, LargeFile, WIDE_JOB_BYTES};
use crate::backup::read_small::{SmallFiles, read_small};
use crate::backup::state::KnownFile;
use crate::codec::CpuPool;
use crate::monitor::{Progress, Task};

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
/// Raw bytes of a job, and compressed bytes where all of a wide one has changed.
const JOB_MEMORY: u64 = JOB_BYTES + WIDE_JOB_BYTES;
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

/// What a job does.
enum Job {
    Together { files: Vec<(usize, SourceFile)>, again: bool },
    Pages { file: Arc<LargeFile>, range: Range<u64>, last: bool },
    Keep(usize),
    WriteMaps { last_of_start_set: bool },
}

enum Done {
    Together(SmallFiles),
    Pages { number: usize, run: PageRun, expected: u64, last: bool, known: Option<Arc<KnownFile>> },
    Keep(usize),
    WriteMaps { last_of_start_set: bool },
}

/// What a copy works on.
#[derive(Debug, Clone, Copy)]
pub struct CopySource<'a> {
    /// The order.
    pub plan: &'a Plan,
    /// The files of the walk.
    pub files: &'a [SourceFile],
    /// What all jobs share.
    pub context: &'a Arc<JobContext>,
    /// Whether the start-up set is stored again as a whole.
    pub start_set_again: bool,
}

/// Copies the files of the plan into the packs of `packer`.
///
/// # Errors
/// The first one, naming the file where it is the source's; jobs that have begun then end unheard.
pub async fn copy(
    source: CopySource<'_>,
    pool: &CpuPool,
    budget: Budget,
    packer: &mut Packer,
    progress: &Progress,
) -> Result<(), Error> {
    let CopySource { plan, files, context, start_set_again } = source;
    if plan.start_steps == 0 {
        packer.end_start_set();
    }
    let jobs = plan.steps.iter().enumerate().flat_map(|(at, step)| {
        let last_of_start_set = at + 1 == plan.start_steps;
        let again = start_set_again && at < plan.start_steps;
        jobs_of(step, files, context, JobFlags { last_of_start_set, again })
    });
    let mut done = stream::iter(jobs)
        .map(|job| {
            let context = context.clone();
            async move {
                match job {
                    Job::WriteMaps { last_of_start_set } => Ok(Done::WriteMaps { last_of_start_set }),
                    Job::Keep(number) => Ok(Done::Keep(number)),
                    job => pool.run(move || execute(job, &context)).await?,
                }
            }
        })
        .buffered(budget.jobs);
    while let Some(result) = done.next().await {
        match result? {
            Done::Keep(number) => {
                keep(number, source, pool, packer).await?;
                // Files that are kept follow each other by the hundred thousand and nothing of them is waited for: who
                // watches the session or advances the slot beside this comes first.
                tokio::task::yield_now().await;
            }
            Done::WriteMaps { last_of_start_set } => {
                packer.write_maps().await?;
                if last_of_start_set {
                    packer.end_start_set();
                }
            }
            done => pack(done, files, packer, progress).await?,
        }
    }
    Ok(())
}

/// Packs what was read.
async fn pack(
    done: Done,
    files: &[SourceFile],
    packer: &mut Packer,
    progress: &Progress,
) -> Result<(), Error> {
    match done {
        Done::Together(together) => {
            progress.advance(together.files.iter().map(|file| u64::from(file.len)).sum());
            packer.push_small(together, files).await?;
        }
        Done::Pages { number, run, expected, last, known } => {
            progress.advance(expected);
            packer.push_pages((number, &files[number]), run, expected, known).await?;
            if last {
                packer.end_file(&files[number]);
            }
        }
        Done::Keep(_) | Done::WriteMaps { .. } => {}
    }
    Ok(())
}

/// Takes a file over unread, or reads it here and now where what is known of it has become unreadable.
async fn keep(
    number: usize,
    source: CopySource<'_>,
    pool: &CpuPool,
    packer: &mut Packer,
) -> Result<(), Error> {
    let CopySource { files, context, .. } = source;
    if context.parent.as_ref().is_some_and(|parent| packer.keep_file(&files[number], parent)) {
        return Ok(());
    }
    let is_small = files[number].size < SMALL_FILE_BYTES;
    let step = if is_small { Step::Together(vec![number]) } else { Step::Alone(number) };
    let flags = JobFlags { last_of_start_set: false, again: false };
    for job in jobs_of(&step, files, context, flags) {
        let context = context.clone();
        let done = pool.run(move || execute(job, &context)).await??;
        // What was to be kept is not part of what the progress counts.
        pack(done, files, packer, &Progress::new(Task::bytes("reading again", None))).await?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct JobFlags {
    last_of_start_set: bool,
    again: bool,
}

fn jobs_of(
    step: &Step,
    files: &[SourceFile],
    context: &Arc<JobContext>,
    flags: JobFlags,
) -> Box<dyn Iterator<Item = Job> + Send> {
    let JobFlags { last_of_start_set, again } = flags;
    match step {
        Step::Together(numbers) => {
            let files = numbers.iter().map(|number| (*number, files[*number].clone())).collect();
            Box::new(std::iter::once(Job::Together { files, again }))
        }
        Step::Alone(number) => {
            let size = files[*number].size;
            let file = Arc::new(LargeFile::new(*number, files[*number].clone(), again));
            let job_bytes = if file.known(context).is_some() && !again { WIDE_JOB_BYTES } else { JOB_BYTES };
            Box::new((0..size.div_ceil(job_bytes)).map(move |n| {
                let range = n * job_bytes..((n + 1) * job_bytes).min(size);
                let last = range.end == size;
                Job::Pages { file: file.clone(), range, last }
            }))
        }
        Step::Keep(number) => Box::new(std::iter::once(Job::Keep(*number))),
        Step::WriteMaps => Box::new(std::iter::once(Job::WriteMaps { last_of_start_set })),
    }
}

fn execute(job: Job, context: &JobContext) -> Result<Done, Error> {
    match job {
        Job::Together { files, again } => Ok(Done::Together(read_small(&files, again, context)?)),
        Job::Pages { file, range, last } => {
            let expected = range.end - range.start;
            let run = file.read(range, context)?;
            let known = file.known(context);
            Ok(Done::Pages { number: file.number, run, expected, last, known })
        }
        Job::Keep(number) => Ok(Done::Keep(number)),
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
