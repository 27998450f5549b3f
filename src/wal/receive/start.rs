//! What is there before anything is received: the folder and its lock, whose WAL it is, and what the spool holds.
//!
//! All of it may wait for a disk that hangs or for servers that say nothing; it can be given up at any point.

use std::path::Path;
use std::sync::Arc;

use crate::clock::Clock;
use crate::disk::durable::{Create, create_dir_all};
use crate::disk::{CloneMarker, LockFile};
use crate::repo::ClusterId;
use crate::wal::Error;
use crate::wal::receive::disk_work::on_disk;
use crate::wal::receive::gap::Gap;
use crate::wal::receive::server::{Choice, Wanted, choose};
use crate::wal::receive::state::{
    Problem, ReceiveState, Shared, keep_alive, note, put_state, remembered_gaps, warn_of,
};
use crate::wal::receive::{PAUSE_FIRST, PAUSE_MAX, ReceiveOptions, is_hopeless};
use crate::wal::spool::Spool;

/// What receiving begins with.
pub(super) struct Begun {
    pub shared: Arc<Shared>,
    pub cluster: ClusterId,
    /// To be held as long as anything is received.
    pub lock: LockFile,
}

const LOCK_FILE: &str = "lock";

/// Opens the spool, once it is known of which cluster.
///
/// # Errors
/// What no later attempt mends.
pub(super) async fn begin(options: &ReceiveOptions, clock: &Arc<dyn Clock>) -> Result<Begun, Error> {
    let here = options.clone();
    let (lock, spooled, gaps) = on_disk(move || {
        refuse_clone(here.data_directory.as_deref())?;
        create_dir_all(&here.spool, Create { owner: here.owner, ..Create::PRIVATE_DIRECTORY })?;
        let lock = LockFile::acquire(&here.spool.join(LOCK_FILE))?;
        Ok((lock, spooled_cluster(&here.spool), remembered_gaps(&here.spool)))
    })
    .await?;
    let cluster = match spooled {
        Some(cluster) => cluster,
        None => served_cluster(options, clock, gaps.clone()).await?,
    };
    let (folder, owner) = (options.spool.join(cluster.to_string()), options.owner);
    // The lock goes with it: to let it go may wait for the same disk.
    let opened = on_disk(move || Ok((Spool::open(&folder, cluster.segment_size, owner)?, lock)));
    let (spool, lock) = opened.await?;
    Ok(Begun { shared: Arc::new(Shared::new(spool, gaps)), cluster, lock })
}

fn refuse_clone(data_directory: Option<&Path>) -> Result<(), Error> {
    let Some(path) = data_directory.filter(|path| path.exists()) else { return Ok(()) };
    match CloneMarker::detect(path)? {
        Some(marker) => Err(Error::Clone { path: path.to_owned(), name: marker.name }),
        None => Ok(()),
    }
}

/// Returns the cluster of which there is WAL in a site's spool folder.
fn spooled_cluster(folder: &Path) -> Option<ClusterId> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let holds_wal = |path: &Path| {
        let mut files = std::fs::read_dir(path).into_iter().flatten().flatten();
        files.any(|file| file.file_name().to_string_lossy().ends_with(".spool"))
    };
    let clusters = entries.filter(|entry| holds_wal(&entry.path()));
    clusters.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).next()
}

/// Returns the cluster of the first server that answers.
async fn served_cluster(
    options: &ReceiveOptions,
    clock: &Arc<dyn Clock>,
    gaps: Vec<Gap>,
) -> Result<ClusterId, Error> {
    let anybody = Wanted { cluster: None, here: None, removed: &[], shared: None };
    let mut state = ReceiveState { gaps, ..Default::default() };
    let mut pause = PAUSE_FIRST;
    loop {
        let chosen = tokio::select! {
            chosen = choose(&options.nodes, &anybody) => chosen,
            never = keep_alive(&options.spool, &state, options.owner, &**clock) => match never {},
        };
        let error = match chosen {
            Ok(
                Choice::Server(candidate) | Choice::Removed { candidate, .. } | Choice::Untold(candidate, _),
            ) => {
                return Ok(candidate.facts.cluster());
            }
            Err(error) => error,
        };
        let now = clock.now();
        if is_hopeless(&error) {
            state.receive_problem = Some(Problem::of_end(&error, now));
            warn_of(put_state(&options.spool, &state, options.owner, now).await);
            return Err(error);
        }
        note(&mut state.receive_problem, format!("no server can be received from: {error}"), now);
        warn_of(put_state(&options.spool, &state, options.owner, now).await);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use nix::sys::stat::Mode;
    use tokio::sync::watch;

    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::repo;
    use crate::wal::receive::{Acknowledge, OpenRepository, run};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn options(spool: &Path, data_directory: Option<&Path>) -> ReceiveOptions {
        ReceiveOptions {
            nodes: Vec::new(),
            data_directory: data_directory.map(Path::to_owned),
            slot: "walden_main".into(),
            acknowledge: Acknowledge::Spool,
            spool: spool.to_owned(),
            owner: None,
            free_bytes_min: 0,
            compression: Compression::zstd(1),
        }
    }

    fn no_store() -> OpenRepository {
        Arc::new(|| Box::pin(async { Err::<repo::Repository, _>(repo::Error::Internal("no store".into())) }))
    }

    /// Its marker decides before anything is asked of a server or made in the state folder.
    #[tokio::test]
    async fn failure_8_nothing_of_a_clone_is_received() {
        let scratch = tempfile::tempdir().unwrap();
        let (data, spool) = (scratch.path().join("data"), scratch.path().join("spool"));
        fs::create_dir(&data).unwrap();
        let marker = CloneMarker { name: "yesterday".into(), ..CloneMarker::default() };
        marker.write(&data, Create::PRIVATE_FILE).unwrap();
        let (_stop, stopped) = watch::channel(false);
        let options = options(&spool, Some(&data));
        let receiving = run(options, no_store(), Arc::new(SystemClock), stopped);
        // A receiver that does not mind would ask for a server for ever.
        let outcome = tokio::time::timeout(PATIENCE, receiving).await.expect("it ends by itself");
        let error = outcome.unwrap_err();
        assert!(
            matches!(&error, Error::Clone { path, name } if *path == data && name == "yesterday"),
            "{error}"
        );
        assert!(!spool.exists());
    }

    /// A pipe that nobody writes into stands in the spool: whoever opens it to read waits, as for a volume that hangs.
    #[test]
    fn a_spool_that_hangs_holds_up_nobody_who_is_told_to_stop() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("7301234567890123456-16");
        fs::create_dir(&folder).unwrap();
        let hanging = folder.join("000000010000000000000009.spool");
        nix::unistd::mkfifo(&hanging, Mode::S_IRWXU).unwrap();
        let (options, open) = (options(scratch.path(), None), no_store());
        let (stop, stopped) = watch::channel(false);
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let outcome = runtime.block_on(run(options, open, Arc::new(SystemClock), stopped));
            runtime.shutdown_background();
            let _ = ended.send(outcome.map(|_| ()).map_err(|error| error.to_string()));
        });
        // Once somebody waits for it, it can be opened to write. Kept open, it holds whoever reads it.
        let mut opening = OpenOptions::new();
        opening.write(true).custom_flags(libc::O_NONBLOCK);
        let deadline = SystemClock.monotonic() + PATIENCE;
        let writing = loop {
            match opening.open(&hanging) {
                Ok(file) => break file,
                Err(error) => assert!(SystemClock.monotonic() < deadline, "nobody reads it: {error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        stop.send_replace(true);
        let ended = end.recv_timeout(PATIENCE);
        drop(writing);
        assert_eq!(ended, Ok(Ok(())));
    }
}
