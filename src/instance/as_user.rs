//! Has something done by a thread that is another user for the kernel, as `peer` authentication of a server wants it.
//!
//! A server asks the kernel who connected, and root is nobody there. Only the calling thread changes, by the bare system
//! call, only in what it is allowed and sees as, and it becomes root again before anybody else gets it.
//! Deliberately absent: capabilities and groups; nothing but a socket is opened.

use nix::unistd::Uid;

use crate::disk::Owner;
use crate::replication;

/// The thread's user while this is there.
struct Disguise(Uid);

/// Runs a future on a blocking thread as `user`; as oneself where this process is not root.
pub(super) async fn as_user<T: Send + 'static>(
    user: Owner,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, replication::Error> {
    let runtime = tokio::runtime::Handle::current();
    let disguised = move || -> Result<T, String> {
        let _disguise = Disguise::of(Uid::from_raw(user.uid)).map_err(|errno| errno.to_string())?;
        Ok(runtime.block_on(work))
    };
    let done = tokio::task::spawn_blocking(disguised).await.unwrap_or_else(|error| Err(error.to_string()));
    done.map_err(|detail: String| replication::Error::Lost { detail })
}

impl Disguise {
    fn of(user: Uid) -> nix::Result<Self> {
        let own = Uid::effective();
        if own.is_root() {
            set_effective(user)?;
        }
        Ok(Self(own))
    }
}

impl Drop for Disguise {
    fn drop(&mut self) {
        if self.0.is_root() && set_effective(self.0).is_err() {
            // A thread that stays somebody else must do nothing more.
            std::process::abort();
        }
    }
}

#[expect(unsafe_code, reason = "the C library would change every thread of the process")]
fn set_effective(user: Uid) -> nix::Result<()> {
    const UNCHANGED: libc::uid_t = libc::uid_t::MAX;
    // SAFETY: the call takes numbers and changes nothing but the calling thread's credentials.
    let outcome = unsafe { libc::syscall(libc::SYS_setresuid, UNCHANGED, user.as_raw(), UNCHANGED) };
    nix::errno::Errno::result(outcome).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn work_is_done_as_the_user_and_the_thread_is_itself_again() {
        let nobody = Owner { uid: 65_534, gid: 65_534 };
        let effective = || async { Uid::effective() };
        let own = Uid::effective();
        let wanted = if own.is_root() { Uid::from_raw(nobody.uid) } else { own };
        for _ in 0..20 {
            assert_eq!(as_user(nobody, effective()).await.unwrap(), wanted);
            assert_eq!(tokio::task::spawn_blocking(Uid::effective).await.unwrap(), own);
        }
    }
}
