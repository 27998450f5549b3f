//! `walden restore --instant`, and `--resume` of such a restore: begin it, start its supervisor, and follow it.
//!
//! The supervisor is this binary executed again in a session of its own; it outlives this command, which only asks it how
//! it is until the directory is plain. Whoever is interrupted follows again with `--resume`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::config::{KeyPurpose, SiteConfig};
use crate::control::{self, HydrationState, RestoreReply, RestoreRequest, RestoreStatus, RestoredServer};
use crate::disk::{self, LockFile, Owner};
use crate::instance::clone_folder::HydrateSpec;
use crate::instance::instant::begin::{InstantOptions, begin, plan_instant};
use crate::instance::instant::boot_unit::{BootUnit, Systemd};
use crate::instance::instant::unfinished::{
    Found, LastWords, Unfinished, control_socket, find, has_become_plain, is_left_dead, socket_to_ask,
};
use crate::repo::Basebackup;
use crate::restore::plan::RestorePlan;

use super::clone::{HandedOver, HydrateArguments};
use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::exit::ExitKind;
use super::instant_process::{Spawned, ended_without_a_word, spawn};
use super::instant_report::InstantReport;
use super::instant_shown::Shown;

/// How often a restore is asked how it is: until its server answers, and after that.
const POLL: Duration = Duration::from_millis(50);
const POLL_LATER: Duration = Duration::from_millis(500);
/// A supervisor that has just begun to listen, or is about to end, answers after a moment.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Who boots a host calls once, and its server waits for that: the store is waited for as long as a recovery waits for it.
const STORE_WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Between two attempts; each of them has waited for as long as the configuration has a call tried.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// What is asked of a restore that is found unfinished.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resumption<'a> {
    /// PGDATA.
    pub target: &'a Path,
    /// Whether its server is left to somebody else.
    pub no_start: bool,
    /// How the rest is to come from now on.
    pub hydrate: &'a HydrateArguments,
    /// Whether sessions are to open their files anew at its end, though that was not asked for before.
    pub cut_over: bool,
}

/// How long a restore is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// It is mounted.
    Mounted,
    /// It answers, or its server has ended, where nothing comes in the background; else it is plain.
    Done,
}

/// Begins a restore by a plan and follows it.
pub(super) async fn begin_and_follow(
    context: &Context,
    basebackup: &Basebackup,
    mut plan: RestorePlan,
    options: &InstantOptions,
    asked_at: Instant,
) -> Result<InstantReport, CommandError> {
    let target = plan.destinations.data.clone();
    let spec = plan_instant(basebackup, &mut plan, options).await?;
    plan.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let begun = begin(basebackup, plan, spec).await?;
    install_unit(context, &target, &begun)?;
    let supervisor = spawn(context, &target, false, &HandedOver::of(context, asked_at))?;
    follow(context, &target, Some(supervisor), Until::Done).await
}

/// Checks what begins a restore of this kind, and writes nothing.
pub(super) async fn check(
    basebackup: &Basebackup,
    plan: &mut RestorePlan,
    options: &InstantOptions,
) -> Result<(), CommandError> {
    plan_instant(basebackup, plan, options).await?;
    Ok(())
}

/// Goes on with a restore of this kind, or follows it where it is being served; nothing where there is none.
///
/// Where the server is left to somebody else, he starts it once and does not ask why it is not there: so the store is
/// waited for.
pub(super) async fn resume(
    context: &Context,
    resumption: Resumption<'_>,
    asked_at: Instant,
) -> Result<Option<InstantReport>, CommandError> {
    let mut told = String::new();
    let waits = Notify::new();
    let attempts = async {
        loop {
            let error = match go_on(context, resumption, asked_at).await? {
                Went::On(report) => return Ok(report.map(|report| *report)),
                Went::Without(error) if !resumption.no_start => return Err(error),
                Went::Without(error) => error,
            };
            if context.clock().monotonic().saturating_duration_since(asked_at) >= STORE_WAIT_MAX {
                return Err(error);
            }
            let message = error.message();
            if message != told {
                tracing::warn!("{message}; the store is waited for");
                told = message;
            }
            waits.notify_one();
            tokio::time::sleep(STORE_PAUSE).await;
        }
    };
    // Listened to once, the signal ends nothing by itself any more: what a plain restore does after this it must still end.
    let interrupted = async {
        waits.notified().await;
        tokio::signal::ctrl_c().await
    };
    tokio::select! {
        // Whoever follows is told more.
        biased;
        done = attempts => done,
        _ = interrupted => Err(CommandError::failed("interrupted").hint(format!(
            "\"walden restore --resume --target-dir {}\" goes on with it.",
            resumption.target.display()
        ))),
    }
}

/// What became of going on.
enum Went {
    /// It is as far as it is followed; nothing where there is no restore of this kind.
    On(Option<Box<InstantReport>>),
    /// The store did not answer, and nothing is mounted.
    Without(CommandError),
}

/// Goes on once.
async fn go_on(
    context: &Context,
    resumption: Resumption<'_>,
    asked_at: Instant,
) -> Result<Went, CommandError> {
    let Resumption { target, no_start, hydrate, cut_over } = resumption;
    let until = if no_start { Until::Mounted } else { Until::Done };
    let lock = lock_to_bring_up(context, target).await?;
    if let Some(status) = status_of(context, target).await? {
        drop(lock);
        if hydrate.are_given() || cut_over {
            let message = format!("the restore in \"{}\" is being served", target.display());
            return Err(CommandError::usage(message).hint(format!(
                "End it with \"kill {}\", then resume it with these options.",
                status.supervisor_pid
            )));
        }
        if !no_start {
            ask_to_start(context, target).await?;
        }
        return Ok(Went::On(Some(Box::new(follow(context, target, None, until).await?))));
    }
    let place = target.to_owned();
    let found = tokio::task::spawn_blocking(move || find(&place)).await;
    let mut unfinished = match found.map_err(|error| CommandError::failed(error.to_string()))?? {
        Found::Instant(unfinished) => *unfinished,
        Found::Other => return Ok(Went::On(None)),
        Found::Ended(unfinished) => {
            let repository = context.open_repository(context.site()?, KeyPurpose::Read).await?;
            unfinished.tidy(&repository).await?;
            let message = format!(
                "\"{}\" is an ordinary data directory; what its restore had left there is gone",
                target.display()
            );
            return Err(CommandError::failed(message).hint("Start its server as ever, unless it runs."));
        }
        Found::Plain => {
            let message = format!(
                "\"{}\" is an ordinary data directory; what was left of its restore is gone",
                target.display()
            );
            return Err(CommandError::failed(message).hint("Start its server as ever."));
        }
    };
    change(&mut unfinished, hydrate, cut_over)?;
    // Else what the last one ended of would be told of the next.
    LastWords::clear(target)?;
    let mut spawned = spawn(context, target, no_start, &HandedOver::of(context, asked_at))?;
    spawned.lock = lock;
    match follow(context, target, Some(spawned), until).await {
        Err(error) if error.kind == ExitKind::Unreachable => Ok(Went::Without(error)),
        followed => Ok(Went::On(Some(Box::new(followed?)))),
    }
}

/// Takes the lock under which one command at a time brings a restore up, for two would take each other's mounts away;
/// nothing where it is being served by then.
async fn lock_to_bring_up(context: &Context, target: &Path) -> Result<Option<LockFile>, CommandError> {
    let path = socket(context, target)?.with_extension("lock");
    let began = context.clock().monotonic();
    let mut shown = Shown::new(context.monitor(), |text| say(context, text));
    loop {
        match LockFile::acquire(&path) {
            Err(disk::Error::Locked { .. }) if status_of(context, target).await?.is_some() => {
                return Ok(None);
            }
            Err(error @ disk::Error::Locked { .. }) => {
                let silence = context.clock().monotonic().saturating_duration_since(began);
                shown.show_silence(silence, || Some(error.to_string()));
                tokio::time::sleep(POLL).await;
            }
            locked => return Ok(Some(locked?)),
        }
    }
}

/// Refuses to restore where a restore is being served, which a look at the directory would not tell.
pub(super) async fn refuse_served(context: &Context, target: &Path) -> Result<(), CommandError> {
    let Some(status) = status_of(context, target).await? else { return Ok(()) };
    let target = status.target_directory.display();
    Err(CommandError::failed(format!(
        "the restore in \"{target}\" is being served by process {}",
        status.supervisor_pid
    ))
    .hint(format!("\"walden restore --resume --target-dir {target}\" follows it.")))
}

/// Refuses to restore where the process of a restore has died, or takes its mounts away where it `is_replaced`.
///
/// Nothing is seen through such a mount, so this comes before any look at the directory.
pub(super) async fn clear_dead(
    context: &Context,
    target: &Path,
    is_replaced: bool,
) -> Result<(), CommandError> {
    if !is_left_dead(target) {
        return Ok(());
    }
    if !is_replaced {
        let target = target.display();
        let message = format!("\"{target}\" has an unfinished restore whose process has died");
        return Err(CommandError::failed(message)
            .hint(format!("\"walden restore --resume --target-dir {target}\" goes on with it.")));
    }
    tracing::warn!(
        "\"{}\" has an unfinished restore whose process has died; it is replaced",
        target.display()
    );
    let _lock = lock_to_bring_up(context, target).await?;
    refuse_served(context, target).await?;
    let place = target.to_owned();
    let found = tokio::task::spawn_blocking(move || find(&place)).await;
    found.map_err(|error| CommandError::failed(error.to_string()))??;
    Ok(())
}

/// Returns an unfinished restore of this kind that another one is to replace.
pub(super) fn replaced(target: &Path) -> Result<Option<Unfinished>, CommandError> {
    Ok(match find(target)? {
        Found::Instant(unfinished) | Found::Ended(unfinished) => Some(*unfinished),
        Found::Other | Found::Plain => None,
    })
}

/// Remembers how the rest comes, and what is done then, where that was said.
fn change(
    unfinished: &mut Unfinished,
    hydrate: &HydrateArguments,
    cut_over: bool,
) -> Result<(), CommandError> {
    let before = &unfinished.spec;
    let (hydrate, cut_over) = (hydrate.change(before.hydrate), before.cut_over || cut_over);
    if (hydrate, cut_over) != (before.hydrate, before.cut_over) {
        (unfinished.spec.hydrate, unfinished.spec.cut_over) = (hydrate, cut_over);
        unfinished.write_spec()?;
    }
    Ok(())
}

fn socket(context: &Context, target: &Path) -> Result<PathBuf, CommandError> {
    Ok(control_socket(&context.config()?.paths.open_run()?.path, target)?)
}

/// Asks whoever serves a target.
async fn ask(
    context: &Context,
    target: &Path,
    request: &RestoreRequest,
) -> Result<Result<RestoreReply, control::Error>, CommandError> {
    let socket = socket_to_ask(&context.config()?.paths.open_run()?.path, target)?;
    Ok(control::request_of_restore(&socket, request).await)
}

/// Asks the supervisor of a target how it is; nothing where there is none.
async fn status_of(context: &Context, target: &Path) -> Result<Option<RestoreStatus>, CommandError> {
    match ask(context, target, &RestoreRequest::Status).await? {
        Ok(RestoreReply::Status(status)) => Ok(Some(*status)),
        Ok(other) => Err(CommandError::failed(format!("the supervisor answered {other:?}"))),
        // It ended while it was asked.
        Err(control::Error::NotRunning { .. } | control::Error::Io { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn ask_to_start(context: &Context, target: &Path) -> Result<(), CommandError> {
    match ask(context, target, &RestoreRequest::Start).await?? {
        RestoreReply::Done => Ok(()),
        RestoreReply::Failed { message } => Err(CommandError::failed(message)),
        other @ RestoreReply::Status(_) => {
            Err(CommandError::failed(format!("the supervisor answered {other:?}")))
        }
    }
}

/// Follows a restore, and the supervisor that was `spawned` for it just now.
async fn follow(
    context: &Context,
    target: &Path,
    spawned: Option<Spawned>,
    until: Until,
) -> Result<InstantReport, CommandError> {
    tokio::select! {
        followed = follow_to_the_end(context, target, spawned, until) => followed,
        _ = tokio::signal::ctrl_c() => Err(CommandError::failed("interrupted; the restore goes on").hint(format!(
            "\"walden restore --resume --target-dir {}\" follows it again.",
            target.display()
        ))),
    }
}

async fn follow_to_the_end(
    context: &Context,
    target: &Path,
    mut spawned: Option<Spawned>,
    until: Until,
) -> Result<InstantReport, CommandError> {
    let (mut last, mut shown) = (None, Shown::new(context.monitor(), |text| say(context, text)));
    let mut heard = context.clock().monotonic();
    loop {
        let now = context.clock().monotonic();
        match status_of(context, target).await? {
            Some(status) => {
                heard = now;
                if let Some(spawned) = &mut spawned {
                    spawned.lock = None;
                }
                shown.show(&status);
                if let Some(report) = judge(&status, until)? {
                    return Ok(report);
                }
                last = Some(status);
            }
            None => {
                let ended = spawned.as_mut().is_some_and(Spawned::has_ended);
                let silence = now.saturating_duration_since(heard);
                if let Some(spawned) = spawned.as_ref().filter(|_| last.is_none() && !ended) {
                    shown.show_silence(silence, || spawned.said());
                }
                // It ends by itself once the directory is plain and nobody uses the mount.
                if let Some(status) = last.as_ref().filter(|status: &&RestoreStatus| status.is_plain) {
                    return Ok(InstantReport::of(status));
                }
                let is_gone = ended || spawned.is_none() && silence >= SILENCE_MAX;
                // It may do so between two looks, where no server runs.
                if let Some(status) = last.as_ref().filter(|_| is_gone && has_become_plain(target)) {
                    return Ok(InstantReport::of(&ended_plain(status)));
                }
                if is_gone {
                    return ended_without_a_word(context, target, last.as_ref());
                }
            }
        }
        let answered = last.as_ref().is_some_and(|status| status.answered_after_seconds.is_some());
        tokio::time::sleep(if answered { POLL_LATER } else { POLL }).await;
    }
}

/// Returns how a restore is whose directory has become plain, and whose process has ended, since it was `last` asked.
fn ended_plain(last: &RestoreStatus) -> RestoreStatus {
    RestoreStatus {
        is_plain: true,
        server: RestoredServer::Stopped,
        server_pid: None,
        hydrated_bytes: last.total_bytes,
        ..last.clone()
    }
}

/// Decides whether a restore has come as far as it is followed.
fn judge(status: &RestoreStatus, until: Until) -> Result<Option<InstantReport>, CommandError> {
    let has_come = status.answered_after_seconds.is_some() || status.server == RestoredServer::Stopped;
    let is_there = match until {
        Until::Mounted => true,
        Until::Done if status.is_plain => {
            // A first attempt at the cut-over takes a moment.
            !status.is_cutting_over && status.server != RestoredServer::Recovering
        }
        // A server that has ended, at its target or by somebody's hand, is waited for by nobody.
        Until::Done => has_come && !status.hydrates,
    };
    let target = status.target_directory.display();
    if until == Until::Done && status.server == RestoredServer::Failed {
        let message = status.message.as_deref().unwrap_or("the server ended by itself");
        let failed = CommandError::failed(format!("the server in \"{target}\" does not run: {message}"));
        return Err(failed.hint(match status.is_plain {
            true => "The directory is an ordinary one by now: put it right, and start the server as ever."
                .to_owned(),
            false => format!(
                "The directory stays mounted and fills: put it right there, then \"walden restore --resume \
                 --target-dir {target}\" starts the server again."
            ),
        }));
    }
    if is_there {
        return Ok(Some(InstantReport::of(status)));
    }
    if status.hydration.state == HydrationState::Failed && has_come {
        let why = status.hydration.reason.as_deref().unwrap_or("some of it does not become local");
        let server = match status.server {
            RestoredServer::Stopped => "Its server is stopped, and the mount stays.",
            _ => "Its server runs on as before.",
        };
        return Err(CommandError::failed(format!("\"{target}\" does not become whole: {why}")).hint(
            format!(
                "{server} After a repair of the repository \"walden restore --resume --target-dir {target}\" tries \
                 again."
            ),
        ));
    }
    Ok(None)
}

/// Has the host mount the restore at boot where that can be arranged, and says what is to be done where it cannot.
fn install_unit(context: &Context, target: &Path, begun: &Unfinished) -> Result<(), CommandError> {
    let by_hand = format!(
        "after a reboot \"walden restore --resume --target-dir {}\" goes on with it",
        target.display()
    );
    let command = detached::command(context)?;
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let mut words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    words.extend(["restore", "--resume", "--no-start", "--target-dir"].map(str::to_owned));
    words.push(target.display().to_string());
    let systemd = Systemd::of_host();
    let installed = BootUnit::of(target, begun.plan.destinations.tablespaces.values(), &words)
        .filter(|_| Owner::current().is_root())
        .map(|unit| systemd.install(&unit).map(|done| (done, systemd.path_of(&unit))));
    match installed {
        Some(Ok((true, path))) => say(context, &format!("\"{}\" mounts it at boot", path.display())),
        Some(Err(error)) => tracing::warn!("no unit mounts it at boot: {error}; {by_hand}"),
        Some(Ok((false, _))) | None => say(context, &by_hand),
    }
    Ok(())
}

/// Tells a person something in passing.
fn say(context: &Context, text: &str) {
    if !context.global.quiet {
        eprintln!("{text}");
    }
}

/// Returns what is decided of a restore of this kind by the command line and the site.
pub(super) fn options_of(site: &SiteConfig, hydrate: &HydrateArguments, cut_over: bool) -> InstantOptions {
    InstantOptions {
        site: site.name.clone(),
        bin_directory: site.bin_directory.clone(),
        hydrate: hydrate.change(HydrateSpec::default()),
        cut_over,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::HydrationStatus;

    pub(in crate::cli) fn status(
        server: RestoredServer,
        hydrates: bool,
        answered: Option<f64>,
    ) -> RestoreStatus {
        RestoreStatus {
            site: "main".to_owned(),
            basebackup: "b".to_owned(),
            target_directory: "/srv/data".into(),
            tablespaces: Vec::new(),
            timeline: 1,
            target: None,
            settings: Vec::new(),
            config_settings: Vec::new(),
            command_line_settings: Vec::new(),
            warnings: Vec::new(),
            hydrates,
            server,
            message: None,
            is_plain: false,
            cut_over: None,
            is_cutting_over: false,
            supervisor_pid: 1,
            server_pid: None,
            answered_after_seconds: answered,
            plain_after_seconds: None,
            hydrated_bytes: 0,
            total_bytes: 1,
            hydration: HydrationStatus::default(),
            bytes_fetched: 0,
            requests: 0,
        }
    }

    #[test]
    fn a_server_that_has_ended_is_waited_for_only_where_the_rest_comes() {
        let is_there = |server, hydrates, answered| {
            judge(&status(server, hydrates, answered), Until::Done).unwrap().is_some()
        };
        assert!(is_there(RestoredServer::Stopped, false, None));
        assert!(!is_there(RestoredServer::Stopped, true, None), "it becomes plain");
        assert!(!is_there(RestoredServer::Recovering, false, None));
        assert!(is_there(RestoredServer::Running, false, Some(1.0)));
        assert!(!is_there(RestoredServer::Running, true, Some(1.0)));
    }

    #[test]
    fn what_does_not_become_whole_is_told_though_its_server_has_ended_before_it_answered() {
        let mut failed = status(RestoredServer::Stopped, true, None);
        failed.hydration.state = HydrationState::Failed;
        let error = judge(&failed, Until::Done).unwrap_err();
        assert!(error.hint.as_ref().is_some_and(|hint| hint.contains("is stopped")), "{:?}", error.hint);
        failed.server = RestoredServer::Recovering;
        assert!(judge(&failed, Until::Done).unwrap().is_none(), "it may answer yet");
    }
}
