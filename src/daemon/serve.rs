//! The daemon's callers: each is heard, judged and answered by a task of its own.
//!
//! Deliberately absent: a queue. A caller waits for its file and for nothing else, and more callers than
//! [`CALLERS_MAX`] are turned away, which makes them do the work themselves.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::control::{Caller, DaemonAnswer, DaemonListener, DaemonRequest, Failure, PushRequest};
use crate::disk::Owner;

use super::access::{self, Request};
use super::shutdown::Shutdown;
use super::site_push::SitePush;

/// Callers at a time: PostgreSQL has one for each server, so that more are no servers.
const CALLERS_MAX: usize = 256;

/// Who calls, and what they can be given.
#[derive(Debug)]
pub(super) struct Callers {
    sites: Vec<Arc<SitePush>>,
    room: Arc<Semaphore>,
    shutdown: Shutdown,
}

impl Callers {
    pub(super) fn new(sites: Vec<Arc<SitePush>>, shutdown: Shutdown) -> Self {
        Self { sites, room: Arc::new(Semaphore::new(CALLERS_MAX)), shutdown }
    }

    /// Takes callers until it is dropped, which closes the socket.
    pub(super) async fn take(self: Arc<Self>, listener: DaemonListener) {
        loop {
            let caller = listener.accept().await;
            let Ok(room) = self.room.clone().try_acquire_owned() else {
                tracing::warn!("more than {CALLERS_MAX} callers: user {} was turned away", caller.uid);
                continue;
            };
            let callers = self.clone();
            tokio::spawn(async move {
                callers.serve(caller).await;
                drop(room);
            });
        }
    }

    /// Resolves once nobody waits any more.
    pub(super) async fn all_answered(&self) {
        let _ = self.room.acquire_many(CALLERS_MAX as u32).await;
    }

    async fn serve(&self, mut caller: Caller) {
        let request = tokio::select! {
            request = caller.request() => request,
            () = self.shutdown.requested() => return,
        };
        let uid = caller.uid;
        match request {
            Ok(DaemonRequest::Push(request)) => caller.answer(self.push(uid, &request)).await,
            Err(error) => tracing::debug!("user {uid} asked something that is not understood: {error}"),
        }
    }

    async fn push(&self, uid: u32, asked: &PushRequest) -> DaemonAnswer {
        let PushRequest { site, path, force, destination } = asked;
        let (site, path) = (site.as_str(), path.as_path());
        let Some(service) = self.sites.iter().find(|service| service.name() == site) else {
            return DaemonAnswer::Failed(self.unknown_site(site));
        };
        let own = Owner::current().uid;
        // Whom nothing is refused is not kept waiting for a disk.
        let owner = if uid == 0 || uid == own { None } else { owner_of(service, path).await };
        let request = Request { caller: uid, own, owner, force: *force };
        if !request.is_allowed() {
            tracing::warn!(site, "user {uid} asked to archive \"{}\" and may not", path.display());
            return DaemonAnswer::Failed(access::denied(request, site));
        }
        if !service.destination().serves(destination) {
            let ours = service.destination();
            tracing::error!(
                site,
                "WAL is to go to {destination:?}, and this daemon was started for {ours:?}: start it again"
            );
            return DaemonAnswer::Elsewhere;
        }
        let outcome = tokio::select! {
            outcome = service.push(path), if !force => outcome,
            outcome = service.push_by_force(path), if *force => outcome,
            () = self.shutdown.expired() => Err(Failure {
                kind: "failed".to_owned(),
                message: "the daemon was ended before the file was in the archive".to_owned(),
                hint: Some("PostgreSQL asks again; a file that is half on its way is no obstacle.".to_owned()),
            }),
        };
        match outcome {
            Ok(archived) => DaemonAnswer::Archived(archived),
            Err(failure) => DaemonAnswer::Failed(failure),
        }
    }

    fn unknown_site(&self, site: &str) -> Failure {
        let known: Vec<&str> = self.sites.iter().map(|service| service.name()).collect();
        Failure {
            kind: "configuration".to_owned(),
            message: format!("the daemon has no site \"{site}\""),
            hint: Some(format!(
                "It works for {}; start it again where its configuration has changed.",
                known.join(", ")
            )),
        }
    }
}

async fn owner_of(service: &SitePush, path: &Path) -> Option<u32> {
    let (configured, named) = (service.data_directory(), path.to_owned());
    let owner = tokio::task::spawn_blocking(move || access::owner_of_site(configured.as_deref(), &named));
    owner.await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use tokio::sync::watch;
    use tokio::task::JoinHandle;

    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::control::{self, Destination, ask_daemon};
    use crate::daemon::shutdown::ShutdownSource;
    use crate::daemon::site_push::Workers;
    use crate::daemon::threads::Threads;
    use crate::daemon::{OpenRepository, SiteOptions};
    use crate::repo::Repository;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn failure(message: &str) -> Failure {
        Failure { kind: "failed".to_owned(), message: message.to_owned(), hint: None }
    }

    fn destination() -> Destination {
        Destination { repository: "main in memory://".to_owned(), recipients: None }
    }

    fn site(open: OpenRepository) -> Arc<SitePush> {
        let options = SiteOptions {
            name: "main".to_owned(),
            data_directory: None,
            destination: destination(),
            head_notes: None,
            compression: Compression::zstd(1),
            open,
            receive: None,
        };
        let workers = Workers {
            threads: Threads::new(1),
            clock: Arc::new(SystemClock),
            failure_of: |error| failure(&error.to_string()),
        };
        Arc::new(SitePush::new(options, workers, 1, 0))
    }

    /// Asks as the command does, which waits as long as it is told that the daemon is at work.
    fn ask(socket: PathBuf, path: PathBuf) -> JoinHandle<Result<DaemonAnswer, control::Error>> {
        let request = PushRequest { site: "main".to_owned(), path, force: false, destination: destination() };
        tokio::task::spawn_blocking(move || ask_daemon(&socket, &DaemonRequest::Push(request), || true))
    }

    #[tokio::test]
    async fn one_caller_too_many_is_turned_away_at_once_and_the_others_are_answered() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, file) = (folder.path().join("daemon.sock"), folder.path().join("segment"));
        std::fs::write(&file, "what a store is waited for with").unwrap();
        // A store that nobody hears of before it is let answer.
        let (gate, gated) = watch::channel(false);
        let open: OpenRepository = Box::new(move || {
            let mut gated = gated.clone();
            Box::pin(async move {
                let _ = gated.wait_for(|open| *open).await;
                Err::<Repository, _>(failure("no store"))
            })
        });
        let source = ShutdownSource::default();
        let callers = Arc::new(Callers::new(vec![site(open)], source.shutdown()));
        let taking = tokio::spawn(callers.clone().take(DaemonListener::bind(&socket).unwrap()));
        let served: Vec<_> = (0..CALLERS_MAX).map(|_| ask(socket.clone(), file.clone())).collect();
        let all_taken = async {
            while callers.room.available_permits() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, all_taken).await.expect("as many callers as there is room for");

        let turned_away = ask(socket.clone(), file.clone()).await.unwrap();
        assert!(matches!(turned_away, Err(control::Error::Io { .. })), "{turned_away:?}");

        gate.send_replace(true);
        let told: Result<_, String> = Ok(DaemonAnswer::Failed(failure("no store")));
        for served in served {
            assert_eq!(served.await.unwrap().map_err(|error| error.to_string()), told);
        }
        callers.all_answered().await;
        let after = ask(socket, file).await.unwrap();
        assert_eq!(after.map_err(|error| error.to_string()), told);
        taking.abort();
    }
}
