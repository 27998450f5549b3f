//! `walden internal prefetch`: keeps one site's archive open for one data directory, and reads ahead of its recovery.
//!
//! PostgreSQL runs `wal fetch` once a segment; opening keys and repository takes each of them longer than the segment.
//! So a fetch that has restored a segment by itself leaves this process behind, and later ones ask it first. It decides
//! by the same code, and it is never relied on: whatever it does but answer, the fetch does the work itself. It serves one
//! run of a server: who starts it again, or makes the data directory anew, gets nothing that was read before. It ends
//! after a minute without requests, with its server, when the data directory goes, and always with status 0: where
//! PostgreSQL is the first process of a container it would take another one for a crash of its own.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::codec::Hasher;
use crate::config::SiteConfig;
use crate::control::{
    self, FileAnswer, FileAsk, FileReply, FileRequest, SIGN_OF_LIFE, ask_for_file, listen_for_files,
};
use crate::disk::durable::{Create, create_dir_all};
use crate::disk::{self, LockFile, StagedFile};
use crate::pg::{ArchiveFileName, PostmasterPid};
use crate::repo::{self, Repository};
use crate::storage::Location;
use crate::wal;
use crate::wal::archive::Archive;
use crate::wal::fetch::{ATTEMPT_MIN, FetchOptions, Fetched, find, read_on, stage};
use crate::wal::written_ahead::WrittenAhead;

use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::serve_clone::terminated;
use super::wal::open_for_fetch;

/// Reads WAL ahead of the recovery of one data directory
#[derive(Debug, Args)]
pub(super) struct Prefetch {
    /// The data directory
    data_directory: PathBuf,
    /// The segment that was restored last
    after: String,
}

/// Where the prefetcher of a data directory listens, for those who would do everything as it does.
#[derive(Debug)]
pub(super) struct Place {
    data_directory: PathBuf,
    /// Device and inode of the data directory: another one may be made at its path.
    identity: (u64, u64),
    run: Run,
    folder: PathBuf,
    key: String,
}

/// What tells one run of a server in a data directory from the next, and from another one made in its place.
#[derive(Debug, PartialEq, Eq)]
enum Run {
    /// The server's lock file, which each start makes anew, its process and its start.
    Server { file: (u64, u64), pid: i32, start_time: Option<i64> },
    /// No server runs, as under `pg_rewind`: then nobody writes its control file.
    Idle { control_file: Stamp },
}

/// What came of asking.
#[derive(Debug)]
pub(super) enum Asked {
    /// What the fetch would have come to by itself.
    Answer(Fetched),
    /// It tried as long as a fetch does, or met something that the fetch may not meet.
    CannotTell,
    /// Nobody answered, or not in a way to rely on.
    Nobody,
}

/// Below the run folder.
const FOLDER: &str = "fetch";
/// The log of all of them, below the state folder.
const LOG: &str = "prefetch";
/// Eight segments of 16 MiB: one that is handed out and seven to come, some of them still on their way. With nine the
/// process had 306 MiB on a fast store (`scripts/bench/wal 200`), where 300 are what it may have.
const CACHE_BYTES: usize = 128 << 20;
/// Larger segments are not worth the memory: reading one takes longer than opening the repository.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// How long it waits for the next request: longer than a standby pauses, and than a segment is replayed.
const LINGER: Duration = Duration::from_secs(60);
/// How often it looks whether it is still of use.
const TICK: Duration = Duration::from_secs(1);
/// How long a fetch that starts it waits until it listens, which takes it some milliseconds; it ends at once where it
/// cannot.
const START_WAIT: Duration = Duration::from_millis(100);
/// How often that is looked at.
const START_STEP: Duration = Duration::from_millis(1);
/// Requests that are answered at once; there is one recovery in a data directory.
const REQUESTS_MAX: usize = 4;

impl Place {
    /// Finds the place for a site and a data directory; there is none where either cannot be looked at.
    pub(super) fn of(context: &Context, site: &SiteConfig, data_directory: &Path) -> Option<Self> {
        let data_directory = data_directory.canonicalize().ok()?;
        let identity = identity_of(&data_directory)?;
        let run = Run::of(&data_directory)?;
        let config = context.config().ok()?;
        let file = detached::absolute(&config.file).ok()?;
        let mut hasher = Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        add(format!("{data_directory:?} {identity:?} {run:?} {:?} {file:?}", site.name).as_bytes());
        // Whatever decides how a fetch goes: the binary, the configuration, the files that it names, the environment.
        let binary = std::env::current_exe().ok()?;
        for file in [binary.as_path()].into_iter().chain(config.files(site)) {
            add(format!("{:?}", stamp_of(file)).as_bytes());
        }
        // What is seen of disks and networks: a server may be started again in another container.
        for namespace in ["/proc/self/ns/mnt", "/proc/self/ns/net"] {
            add(format!("{:?}", identity_of(Path::new(namespace))).as_bytes());
        }
        // A volume may be mounted over a store's folder, which a process that opened it before would not see.
        if let Location::File(folder) = &site.storage.location {
            add(format!("{:?}", identity_of(folder)).as_bytes());
        }
        for (name, value) in context.environment.of_stores() {
            add(format!("{name:?}={value:?}").as_bytes());
        }
        let key = hasher.finish().to_string()[..16].to_owned();
        Some(Self { data_directory, identity, run, folder: config.paths.run.join(FOLDER), key })
    }

    fn socket(&self) -> PathBuf {
        self.folder.join(format!("{}.sock", self.key))
    }

    /// Asks the prefetcher, if there is one.
    pub(super) fn ask(&self, options: &FetchOptions) -> Asked {
        let socket = self.socket();
        if !socket.exists() {
            return Asked::Nobody;
        }
        let Ok(staged) = stage(options) else { return Asked::Nobody };
        let request = FileRequest { name: options.name.to_string() };
        let signs_max = (options.wait + 2 * ATTEMPT_MIN).div_duration_f64(SIGN_OF_LIFE) as u64;
        match ask_for_file(&socket, &request, staged.file().as_fd(), signs_max) {
            Ok(FileAnswer { reply, file }) => take_answer(reply, file, staged),
            Err(error) => {
                tracing::debug!("{error}");
                if matches!(error, control::Error::Io { .. }) {
                    // It is dead or stuck: nobody else is to wait for it, and it ends when it finds itself alone.
                    let _ = fs::remove_file(&socket);
                }
                Asked::Nobody
            }
        }
    }

    /// Leaves a prefetcher behind, after a segment that was restored without one; whether there can be one or not.
    pub(super) fn start(&self, context: &Context, options: &FetchOptions) {
        let length = fs::metadata(&options.target).map_or(u64::MAX, |found| found.len());
        if !matches!(options.name, ArchiveFileName::Segment(_)) || length > SEGMENT_BYTES_MAX {
            return;
        }
        if let Err(error) = self.try_start(context, options.name) {
            tracing::debug!("no prefetcher: {}", error.message());
        }
    }

    fn try_start(&self, context: &Context, after: ArchiveFileName) -> Result<(), CommandError> {
        let log = detached::open_log(&detached::log_file(context, LOG)?)?;
        close_to_children();
        self.go_where_the_server_may();
        let mut command: Command = detached::command(context)?;
        command.args(["internal", "prefetch"]).arg(&self.data_directory).arg(after.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut started = command.spawn().map_err(|error| {
            CommandError::failed(format!("could not start a background process: {error}"))
        })?;
        // The next fetch comes at once. Finding nobody it would do everything alone, and take a core from this one.
        let until = context.clock().monotonic() + START_WAIT;
        let is_starting = |started: &mut Child| matches!(started.try_wait(), Ok(None));
        while !self.socket().exists() && is_starting(&mut started) && context.clock().monotonic() < until {
            thread::sleep(START_STEP);
        }
        Ok(())
    }

    /// Has the prefetcher, which inherits it, run wherever the server may: replay, which runs this fetch, may be
    /// kept on one processor.
    fn go_where_the_server_may(&self) {
        if let Run::Server { pid, .. } = self.run {
            let everywhere = sched_getaffinity(Pid::from_raw(pid));
            if let Err(errno) = everywhere.and_then(|all| sched_setaffinity(Pid::from_raw(0), &all)) {
                tracing::debug!("the prefetcher stays where this process may run: {errno}");
            }
        }
    }

    /// Tells whether the data directory, its server and the socket are still those it was started for.
    fn is_there(&self, socket: (u64, u64)) -> bool {
        identity_of(&self.data_directory) == Some(self.identity)
            && Run::of(&self.data_directory).as_ref() == Some(&self.run)
            && identity_of(&self.socket()) == Some(socket)
    }
}

/// Puts what was answered in its place: the file that was begun for it, or the one that came along.
fn take_answer(reply: FileReply, ready: Option<File>, staged: StagedFile) -> Asked {
    let has = |file: &File, bytes| file.metadata().is_ok_and(|found| found.len() == bytes);
    let restored = match (reply, ready) {
        (FileReply::Absent, _) => return Asked::Answer(Fetched::Absent),
        (FileReply::CannotTell, _) => return Asked::CannotTell,
        (FileReply::Written { bytes }, _) => has(staged.file(), bytes) && staged.finish().is_ok(),
        (FileReply::Enclosed { bytes }, Some(ready)) => {
            has(&ready, bytes) && staged.finish_with(ready).is_ok()
        }
        (FileReply::Enclosed { .. }, None) => false,
    };
    if restored { Asked::Answer(Fetched::Restored) } else { Asked::Nobody }
}

impl Prefetch {
    /// Serves until nobody asks any more; what goes wrong is told to the log alone.
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        if let Err(error) = self.serve(context) {
            tracing::error!("{}", error.message());
        }
        Ok(())
    }

    fn serve(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let Some(place) = Place::of(context, site, &self.data_directory) else { return Ok(()) };
        let run = context.config()?.paths.open_run()?;
        create_dir_all(&place.folder, Create::PRIVATE_DIRECTORY.owned_by(run.owner))?;
        let _lock = match LockFile::acquire(&place.folder.join(format!("{}.lock", place.key))) {
            Err(disk::Error::Locked { .. }) => return Ok(()),
            lock => lock?,
        };
        let _ = fs::remove_file(place.socket());
        let listener =
            listen_for_files(&place.socket()).map_err(|error| CommandError::failed(error.to_string()))?;
        let pool = context.cpu_pool()?;
        let refused = RefCell::new(None);
        let open = async || Ok(open_for_fetch(context, site, &refused).await?.with_cpu_pool(pool.clone()));
        let archive = Archive::reading_ahead(open, context.clock(), CACHE_BYTES);
        let options = FetchOptions {
            data_directory: place.data_directory.clone(),
            name: self.after.parse().map_err(wal::Error::from)?,
            target: PathBuf::new(),
            wait: site.fetch_wait,
        };
        let served = context.block_on(async {
            let written = WrittenAhead::new(&place.data_directory);
            let serving = Serving { place: &place, archive: &archive, options: &options, written };
            tokio::select! {
                served = serving.serve(listener, context) => served,
                () = terminated() => Ok(()),
            }
        });
        let _ = fs::remove_file(place.socket());
        served?
    }
}

/// What answers need.
struct Serving<'a, O> {
    place: &'a Place,
    archive: &'a Archive<O>,
    /// Those of every request, but for the name.
    options: &'a FetchOptions,
    written: WrittenAhead,
}

impl<O: AsyncFn() -> Result<Repository, repo::Error>> Serving<'_, O> {
    async fn serve(&self, listener: UnixListener, context: &Context) -> Result<(), CommandError> {
        let failed = |error| CommandError::failed(format!("could not listen: {error}"));
        let own = identity_of(&self.place.socket()).unwrap_or_default();
        let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
        if let Err(error) = read_on(self.options, self.archive).await {
            // Whoever asks meets it again, and tells it.
            tracing::debug!("{error}");
        }
        self.write_on(self.options.name).await;
        let clock = context.clock();
        let mut asked_at = clock.monotonic();
        let mut answers = FuturesUnordered::new();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                accepted = listener.accept(), if answers.len() < REQUESTS_MAX => {
                    asked_at = clock.monotonic();
                    let stream = accepted.map_err(failed)?.0.into_std().map_err(failed)?;
                    match FileAsk::receive(stream) {
                        Ok(ask) => answers.push(self.answer(ask)),
                        Err(error) => tracing::debug!("a request was not understood: {error}"),
                    }
                }
                Some(()) = answers.next() => asked_at = clock.monotonic(),
                _ = ticks.tick() => {
                    let idle = clock.monotonic().saturating_duration_since(asked_at);
                    if !self.place.is_there(own) || (answers.is_empty() && idle >= LINGER) {
                        return Ok(());
                    }
                    if idle >= TICK {
                        self.archive.forget_served().await;
                        self.written.clear();
                    }
                }
            }
        }
    }

    /// Answers one request; goes away without a word where it cannot, and the fetch does it alone.
    async fn answer(&self, mut ask: FileAsk) {
        let Ok(name) = ask.request.name.parse() else { return };
        let options = FetchOptions { name, ..self.options.clone() };
        let found = {
            let mut finding = pin!(self.find(&options, &ask.file));
            loop {
                tokio::select! {
                    found = &mut finding => break found,
                    () = sleep(SIGN_OF_LIFE) => {
                        if ask.sign_of_life().is_err() {
                            return;
                        }
                    }
                }
            }
        };
        match found {
            Ok(Some((_, Some(ready)))) => ask.answer_with(ready),
            Ok(Some((content, None))) => {
                if let Err(error) = ask.file.write_all(&content) {
                    tracing::warn!("{name} could not be written: {error}");
                    return;
                }
                ask.answer(&FileReply::Written { bytes: content.len() as u64 });
            }
            Ok(None) => return ask.answer(&FileReply::Absent),
            Err(error) => {
                tracing::debug!("{name}: {error}");
                return ask.answer(&FileReply::CannotTell);
            }
        }
        self.write_on(name).await;
    }

    /// Finds a file, and what was written of it before it was asked for.
    async fn find(
        &self,
        options: &FetchOptions,
        wanted: &File,
    ) -> Result<Option<(Bytes, Option<File>)>, wal::Error> {
        let Some(content) = find(options, self.archive).await? else { return Ok(None) };
        let ready = self.written.take(options.name, &content, wanted).await;
        Ok(Some((content, ready)))
    }

    /// Has what comes behind a segment written where it will be asked for.
    async fn write_on(&self, name: ArchiveFileName) {
        if let ArchiveFileName::Segment(segment) = name {
            self.written.follow(segment, self.archive).await;
        }
    }
}

fn identity_of(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

impl Run {
    /// Looks who runs in a data directory; tells nothing where there is no server and none can have been.
    fn of(data_directory: &Path) -> Option<Self> {
        let lock_file = data_directory.join("postmaster.pid");
        let Some(file) = identity_of(&lock_file) else {
            let control_file = stamp_of(&data_directory.join("global/pg_control"))?;
            return Some(Self::Idle { control_file });
        };
        let PostmasterPid { pid, start_time, .. } =
            PostmasterPid::parse(&fs::read_to_string(&lock_file).ok()?).ok()?;
        Some(Self::Server { file, pid, start_time })
    }
}

/// Device, inode, size and time of the last change of a file.
type Stamp = (u64, u64, u64, i64, i64);

/// Returns what changes whenever a file's content or what stands at its name does.
fn stamp_of(file: &Path) -> Option<Stamp> {
    let found = fs::metadata(file).ok()?;
    Some((found.dev(), found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
}

/// Keeps files that this process inherited from the one that follows: older servers leave even their listening sockets
/// to a restore_command, and what outlives the server must not hold them.
#[expect(unsafe_code, reason = "no wrapper takes a descriptor that this process does not own")]
fn close_to_children() {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for number in numbers.filter(|number| *number > 2) {
        // SAFETY: this sets a flag of a descriptor; of one that is not open any more it changes nothing.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use crate::disk::unnamed_file::begin_unnamed;

    use super::*;

    /// Asks for a segment where somebody listens and says this, and returns what stands at the target afterwards.
    fn ask_where_is_said(said: &'static [u8]) -> (Asked, Option<Vec<u8>>) {
        ask_where(move |mut ask, _| {
            ask.file.write_all(b"content").unwrap();
            ask.say(said);
        })
    }

    /// Asks for a segment where somebody listens and does this, in the same folder.
    fn ask_where(does: impl FnOnce(FileAsk, &Path) + Send + 'static) -> (Asked, Option<Vec<u8>>) {
        let scratch = tempfile::tempdir().unwrap();
        let data_directory = scratch.path().canonicalize().unwrap();
        let identity = identity_of(&data_directory).unwrap();
        let run = Run::Server { file: (1, 2), pid: 3, start_time: None };
        let place = Place {
            data_directory: data_directory.clone(),
            identity,
            run,
            folder: data_directory.clone(),
            key: "x".into(),
        };
        let target = data_directory.join("RECOVERYXLOG");
        let name = "000000010000000000000002".parse().unwrap();
        let options = FetchOptions { data_directory, name, target: target.clone(), wait: Duration::ZERO };
        assert!(matches!(place.ask(&options), Asked::Nobody));
        let listener = UnixListener::bind(place.socket()).unwrap();
        let folder = options.data_directory.clone();
        let other = thread::spawn(move || {
            does(FileAsk::receive(listener.accept().unwrap().0).unwrap(), &folder);
        });
        let asked = place.ask(&options);
        other.join().unwrap();
        let mut left = Vec::new();
        let found = fs::File::open(&target).and_then(|mut file| file.read_to_end(&mut left)).ok();
        let others = fs::read_dir(scratch.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let others: Vec<_> = others.filter(|name| name != "RECOVERYXLOG" && name != "x.sock").collect();
        assert!(others.is_empty(), "{others:?}");
        (asked, found.map(|_| left))
    }

    #[test]
    fn what_a_prefetcher_says_is_an_answer_or_nothing() {
        let (asked, target) = ask_where_is_said(b"{\"written\":{\"bytes\":7}}\n");
        assert!(matches!(asked, Asked::Answer(Fetched::Restored)), "{asked:?}");
        assert_eq!(target.unwrap(), b"content");
        let (asked, target) = ask_where_is_said(b"\"absent\"\n");
        assert!(matches!(asked, Asked::Answer(Fetched::Absent)), "{asked:?}");
        assert_eq!(target, None);
        let (asked, target) = ask_where_is_said(b"\n\"cannot_tell\"\n");
        assert!(matches!(asked, Asked::CannotTell), "{asked:?}");
        assert_eq!(target, None);
        let nothing: [&[u8]; 6] =
            [b"", b"\"abse", b"\"absent\"", b"{}\n", b"\n\n", b"{\"written\":{\"bytes\":16777216}}\n"];
        for said in nothing {
            let (asked, target) = ask_where_is_said(said);
            assert!(matches!(asked, Asked::Nobody), "{asked:?}");
            assert_eq!(target, None);
        }
    }

    #[test]
    fn what_a_prefetcher_wrote_ahead_becomes_the_file_and_nothing_else_does() {
        let (asked, target) = ask_where(|ask, folder| {
            let mut ready = begin_unnamed(folder, Create::PRIVATE_FILE).unwrap();
            ready.write_all(b"written ahead").unwrap();
            ask.answer_with(ready);
        });
        assert!(matches!(asked, Asked::Answer(Fetched::Restored)), "{asked:?}");
        assert_eq!(target.unwrap(), b"written ahead");
        // It is said to come along, and does not.
        let (asked, target) = ask_where_is_said(b"{\"enclosed\":{\"bytes\":7}}\n");
        assert!(matches!(asked, Asked::Nobody), "{asked:?}");
        assert_eq!(target, None);
    }

    /// The same path, the same inode, and in a container the same process number.
    #[test]
    fn a_run_ends_with_its_server_and_with_the_control_file_that_nobody_wrote() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = scratch.path().join(name);
            let _ = fs::remove_file(&path);
            fs::write(path, text).unwrap();
        };
        let run = || Run::of(scratch.path());
        fs::create_dir(scratch.path().join("global")).unwrap();
        assert_eq!(run(), None);
        write("global/pg_control", "one");
        let idle = run().unwrap();
        assert_eq!(run().as_ref(), Some(&idle));
        let lock_file = |start: u32| format!("1\n/srv/data\n{start}\n5432\n\n\n\n");
        write("postmaster.pid", &(lock_file(1_763_633_700) + "starting\n"));
        let server = run().unwrap();
        assert_ne!(server, idle);
        // A server writes both as it goes on.
        fs::write(scratch.path().join("postmaster.pid"), lock_file(1_763_633_700) + "standby \n").unwrap();
        write("global/pg_control", "two");
        assert_eq!(run().as_ref(), Some(&server));
        // The next one in the same place, whichever inode its lock file gets.
        fs::write(scratch.path().join("postmaster.pid"), lock_file(1_763_633_701)).unwrap();
        assert_ne!(run().unwrap(), server);
        fs::remove_file(scratch.path().join("postmaster.pid")).unwrap();
        assert_ne!(run().unwrap(), idle);
        write("postmaster.pid", "");
        assert_eq!(run(), None);
    }
}
