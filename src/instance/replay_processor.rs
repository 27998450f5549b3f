//! Keeps the process that replays WAL on one processor with the threads that answer it.
//!
//! Replay asks a mount for one page and waits. What that costs is neither's work but the waking of a processor that has
//! gone to sleep meanwhile, twice for every page (decision 2142). On the same processor the two take turns, and nothing
//! has to wake. So for as long as replay is at work, and not where it waits for WAL or for the store: then there is
//! nothing to gain, and others may read. Where somebody else keeps that processor busy they move to the next one.
//! Deliberately absent: the same for sessions, of which there are many, and which are not ours to place.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::clock::{Clock, SystemClock};
use crate::mount;

/// Watches a postmaster until it is dropped.
#[derive(Debug)]
pub(super) struct ReplayProcessor {
    is_over: Arc<AtomicBool>,
    thread: Option<Thread>,
}

/// How often a process that replays is looked at, or for: every server begins with one.
const LOOK: Duration = Duration::from_millis(200);
/// How often one is looked for where one has ended: the server begins anew after a crash of one of its processes.
const LOOK_FOR_ANOTHER: Duration = Duration::from_secs(2);
/// The postmaster forks it before it lets anybody in; the logger and others may be older.
const FIRST_CHILDREN: usize = 8;
/// Of the time: from here on replay is at work. It takes a third of a processor then, and the answers another one.
const AT_WORK: f64 = 0.10;
/// Of the time: from here on down it waits for something else than pages.
const AT_REST: f64 = 0.02;
/// Of the time: ready to run, and others do.
const CROWDED: f64 = 0.25;

impl ReplayProcessor {
    /// Watches a postmaster, on a thread of its own: a look may wait for the process that is looked at.
    pub(super) fn watch(postmaster: Pid) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let told = is_over.clone();
        let run = move || Watch { postmaster, replay: None, pause: LOOK }.run(&told);
        let thread = match thread::Builder::new().name("walden-replay".into()).spawn(run) {
            Ok(started) => Some(started.thread().clone()),
            Err(error) => {
                tracing::debug!("replay stays where it is: {error}");
                None
            }
        };
        Self { is_over, thread }
    }
}

impl Drop for ReplayProcessor {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

#[derive(Debug)]
struct Watch {
    postmaster: Pid,
    replay: Option<Replay>,
    pause: Duration,
}

/// A process that replays WAL, and how it was at the last look.
#[derive(Debug)]
struct Replay {
    pid: Pid,
    at: Instant,
    usage: Usage,
    /// Where it and those that answer it are kept.
    processor: Option<usize>,
}

/// What a process has had of the processors since it began.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    ran: Duration,
    waited: Duration,
}

impl Watch {
    fn run(mut self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::Acquire) {
            if let Err(errno) = self.look() {
                // Another user's process, say.
                tracing::debug!("replay stays where it is: {errno}");
                break;
            }
            thread::park_timeout(self.pause);
        }
        let _ = self.part();
    }

    fn look(&mut self) -> Result<(), Errno> {
        let children = children(self.postmaster);
        let Some(replay) = self.replay.as_mut().filter(|replay| children.contains(&replay.pid)) else {
            if self.replay.is_some() {
                self.pause = LOOK_FOR_ANOTHER;
            }
            self.part()?;
            let found = children.into_iter().take(FIRST_CHILDREN).find(|pid| is_replaying(*pid));
            self.replay = found.map(Replay::new);
            if self.replay.is_some() {
                self.pause = LOOK;
            }
            return Ok(());
        };
        let share = replay.share_since_last_look();
        let allowed = allowed(self.postmaster)?;
        let next = plan(replay.processor, last_processor(replay.pid), &allowed, share);
        match next {
            Some(processor) => {
                replay.processor = next;
                share_processor(replay.pid, processor)
            }
            None => self.part(),
        }
    }

    /// Lets everybody run anywhere again.
    fn part(&mut self) -> Result<(), Errno> {
        let Some(replay) = self.replay.as_mut() else { return Ok(()) };
        if replay.processor.take().is_some() {
            let everywhere = sched_getaffinity(Pid::from_raw(0))?;
            for thread in threads().into_iter().map(|(pid, _)| pid) {
                unless_gone(sched_setaffinity(thread, &everywhere))?;
            }
            // With the postmaster gone, replay is on its way out as well.
            if let Ok(as_the_server) = sched_getaffinity(self.postmaster) {
                unless_gone(sched_setaffinity(replay.pid, &as_the_server))?;
            }
        }
        Ok(())
    }
}

impl Replay {
    fn new(pid: Pid) -> Self {
        Self { pid, at: SystemClock.monotonic(), usage: usage(pid).unwrap_or_default(), processor: None }
    }

    /// Returns what of the time since the last look it ran, and what of it waited for a processor.
    fn share_since_last_look(&mut self) -> Share {
        let (now, usage) = (SystemClock.monotonic(), usage(self.pid).unwrap_or(self.usage));
        let passed = now.duration_since(self.at).as_secs_f64().max(f64::EPSILON);
        let of_time = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64() / passed;
        let share = Share {
            ran: of_time(usage.ran, self.usage.ran),
            waited: of_time(usage.waited, self.usage.waited),
        };
        (self.at, self.usage) = (now, usage);
        share
    }
}

/// Parts of the time between two looks.
#[derive(Debug, Clone, Copy)]
struct Share {
    ran: f64,
    waited: f64,
}

/// Decides on which processor replay and its answers are kept, if on any: those that are `allowed` are in ascending order.
fn plan(kept_on: Option<usize>, runs_on: Option<usize>, allowed: &[usize], share: Share) -> Option<usize> {
    let is_allowed = |processor: &usize| allowed.contains(processor);
    if allowed.len() < 2 {
        return None;
    }
    match kept_on {
        None if share.ran >= AT_WORK => runs_on.filter(is_allowed).or(allowed.first().copied()),
        None => None,
        Some(_) if share.ran <= AT_REST && share.waited <= AT_REST => None,
        Some(processor) if share.waited > CROWDED || !is_allowed(&processor) => {
            allowed.iter().find(|next| **next > processor).or(allowed.first()).copied()
        }
        Some(processor) => Some(processor),
    }
}

/// Puts a process and the threads that answer it on one processor, and all other threads of this process anywhere: one
/// that was begun by a thread with a place has the same.
fn share_processor(replay: Pid, processor: usize) -> Result<(), Errno> {
    let threads = threads();
    if !threads.iter().any(|(_, answers)| *answers) {
        return Ok(());
    }
    let (mut here, everywhere) = (CpuSet::new(), sched_getaffinity(Pid::from_raw(0))?);
    here.set(processor)?;
    for (thread, answers) in threads {
        unless_gone(sched_setaffinity(thread, if answers { &here } else { &everywhere }))?;
    }
    unless_gone(sched_setaffinity(replay, &here))
}

fn unless_gone(outcome: Result<(), Errno>) -> Result<(), Errno> {
    outcome.or_else(|errno| if errno == Errno::ESRCH { Ok(()) } else { Err(errno) })
}

/// Returns the processors that a server may use and this thread as well, ascending.
fn allowed(postmaster: Pid) -> Result<Vec<usize>, Errno> {
    let own = sched_getaffinity(Pid::from_raw(0))?;
    let server = match sched_getaffinity(postmaster) {
        Err(Errno::ESRCH) => CpuSet::new(),
        other => other?,
    };
    let is_in = |set: &CpuSet, processor| set.is_set(processor).unwrap_or(false);
    Ok((0..CpuSet::count())
        .filter(|processor| is_in(&own, *processor) && is_in(&server, *processor))
        .collect())
}

/// Returns the threads of this process, and which of them answer a mount's requests.
fn threads() -> Vec<(Pid, bool)> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let pids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
    let answers = |pid: i32| {
        let name = fs::read_to_string(format!("/proc/self/task/{pid}/comm")).unwrap_or_default();
        name.starts_with(mount::ANSWERING_THREADS)
    };
    pids.map(|pid| (Pid::from_raw(pid), answers(pid))).collect()
}

/// Returns the processes that a postmaster has forked, the oldest first; none where the kernel does not tell.
fn children(postmaster: Pid) -> Vec<Pid> {
    let listed = fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
    let listed = listed.unwrap_or_default();
    listed.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}

fn is_replaying(pid: Pid) -> bool {
    let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    is_title_of_replay(&String::from_utf8_lossy(&title))
}

/// Tells whether this is what the startup process calls itself (`ps_status.c`): behind the cluster's name, if it has one, its
/// kind, and what it does. A session says whose it is, in which database.
fn is_title_of_replay(title: &str) -> bool {
    let mut words = title.trim_end_matches('\0').split_whitespace();
    words.next() == Some("postgres:")
        && words.find(|word| !word.ends_with(':')) == Some("startup")
        && matches!(words.next(), None | Some("recovering" | "waiting"))
}

/// Reads what the scheduler tells of a process: nanoseconds that it ran, and that it was ready to.
fn usage(pid: Pid) -> Option<Usage> {
    let told = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    let mut numbers = told.split_ascii_whitespace().map_while(|number| number.parse().ok());
    let mut next = || numbers.next().map(Duration::from_nanos);
    Some(Usage { ran: next()?, waited: next()? })
}

/// Reads which processor a process ran on last (proc(5): field 39, the name in parentheses is the second).
fn last_processor(pid: Pid) -> Option<usize> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(36)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    use std::sync::mpsc;

    use nix::sys::signal::{Signal, kill};

    use super::*;

    #[test]
    fn replay_has_a_processor_with_its_answers_while_it_is_at_work() {
        let share = |ran, waited| Share { ran, waited };
        let cases = [
            ("it begins", None, Some(3), share(0.4, 0.0), Some(3)),
            ("where it runs cannot be told", None, None, share(0.4, 0.0), Some(1)),
            ("it has other processors than this process", None, Some(2), share(0.4, 0.0), Some(1)),
            ("it waits for WAL", None, Some(3), share(0.05, 0.0), None),
            ("it goes on", Some(3), Some(3), share(0.05, 0.1), Some(3)),
            ("it waits for the store", Some(3), Some(3), share(0.01, 0.0), None),
            ("others have the processor", Some(1), Some(1), share(0.2, 0.3), Some(3)),
            ("others have it all", Some(1), Some(1), share(0.0, 0.9), Some(3)),
            ("and the last one", Some(5), Some(5), share(0.2, 0.3), Some(1)),
            ("it may not stay there", Some(4), Some(4), share(0.4, 0.0), Some(5)),
        ];
        for (what, kept_on, runs_on, share, planned) in cases {
            assert_eq!(plan(kept_on, runs_on, &[1, 3, 5], share), planned, "{what}");
        }
        assert_eq!(plan(None, Some(0), &[0], share(0.4, 0.0)), None, "a host of one processor");
        assert_eq!(plan(Some(0), Some(0), &[0], share(0.4, 0.0)), None, "others were taken away");
    }

    #[test]
    fn the_startup_process_is_told_from_sessions() {
        for title in [
            "postgres: startup",
            "postgres: startup   recovering 000000010000000000000003",
            "postgres: 15/main: startup recovering 000000010000000000000003\0\0\0",
            "postgres: startup waiting for 000000010000000000000003",
        ] {
            assert!(is_title_of_replay(title), "{title}");
        }
        for title in [
            "",
            "postgres: startup postgres [local] idle",
            "postgres: checkpointer",
            "postgres: 15/main: app startup 10.0.0.1(4711) idle",
            "/usr/lib/postgresql/15/bin/postgres -D startup",
            "startup recovering",
        ] {
            assert!(!is_title_of_replay(title), "{title}");
        }
    }

    /// A child of a child of this process that keeps a processor busy under the name of the startup process.
    #[test]
    fn a_busy_startup_process_comes_to_those_that_answer_and_leaves_them_free_behind_it() {
        let (end, ended) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let answering =
            thread::Builder::new().name(format!("{}0", mount::ANSWERING_THREADS)).spawn(move || {
                tell.send(nix::unistd::gettid()).unwrap();
                let _ = ended.recv();
            });
        let answering = (answering.unwrap(), told.recv().unwrap());
        let busy =
            "exec -a 'postgres: startup recovering 000000010000000000000003' sh -c 'while :; do :; done'";
        let mut postmaster =
            Command::new("bash").arg("-c").arg(format!("({busy}) & wait")).process_group(0).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(postmaster.id()).unwrap());
        let places = |pid: Pid| allowed(pid).unwrap_or_default();
        let until = |is_so: &dyn Fn() -> bool| {
            while !is_so() {
                thread::sleep(Duration::from_millis(10));
            }
        };
        until(&|| children(pid).into_iter().any(is_replaying));
        let startup = children(pid).into_iter().find(|pid| is_replaying(*pid)).unwrap();
        let everywhere = places(pid);
        let watch = ReplayProcessor::watch(pid);
        if everywhere.len() > 1 {
            until(&|| places(startup).len() == 1 && places(answering.1) == places(startup));
        }
        assert_eq!(places(pid), everywhere);
        kill(startup, Signal::SIGKILL).unwrap();
        until(&|| places(answering.1) == everywhere);
        drop(watch);
        kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL).ok();
        postmaster.wait().unwrap();
        drop(end);
        answering.0.join().unwrap();
    }
}
