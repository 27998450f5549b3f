//! WAL that servers have removed before it was received (failure 12): another one may have kept it. Where none has,
//! receiving goes on behind the gap, which is told: the next basebackup needs that WAL.
//!
//! A server that does not answer may be the one that kept it, as in a failover in which a standby is being started again.
//! It is waited for, and meanwhile the slot holds on to what the others still have.

use crate::pg::Lsn;
use crate::wal::Error;
use crate::wal::receive::Receiver;
use crate::wal::receive::gap::{Gap, note_gap};
use crate::wal::receive::plan::{RemovedStep, plan_removed, plan_start, segment_start};
use crate::wal::receive::resume::{Hole, Place, Resume};
use crate::wal::receive::server::{Candidate, restart_of, slot_facts, unfit_error};
use crate::wal::receive::state::{put_all, warn_of};
use crate::wal::spool::Position;

const UNOPENED: &str = "the archive could not be opened so far";

impl Receiver<'_> {
    /// Decides what becomes of WAL that all those have removed that answer and fit; `candidate` is one of them, `oldest`
    /// where what they have begins, and `unheard` says why another one cannot tell.
    ///
    /// # Errors
    /// While that one is waited for.
    pub(super) async fn meet_removal(
        &mut self,
        mut candidate: Candidate,
        here: Position,
        oldest: Option<Lsn>,
        unheard: Option<String>,
    ) -> Result<(), Error> {
        let now = self.clock.monotonic();
        let is_news = self.waiting_since.is_none();
        let since = *self.waiting_since.get_or_insert(now);
        // The archive may have it, from another host, and is looked at before anything is told.
        let unopened = || self.shared.repository.borrow().is_none().then(|| UNOPENED.to_owned());
        let step = plan_removed(unheard.or_else(unopened), now.saturating_duration_since(since));
        let is_over = step == RemovedStep::JumpOver;
        if let Some(hole) = self.shared.hole().filter(|_| is_news || is_over) {
            let missing = self.missing_of(hole).await?;
            if is_over || missing.is_empty() {
                self.give_up_spooled(hole, &missing).await;
                return Ok(());
            }
        } else if (is_news || is_over) && self.look_again(&candidate, here).await? {
            return Ok(());
        }
        match step {
            RemovedStep::JumpOver => self.jump_over_gap(&mut candidate, here, oldest).await,
            RemovedStep::WaitFor(unheard) => {
                // From now on nothing more is lost.
                self.see_to_slot(&mut candidate).await?;
                let detail = format!(
                    "it has removed WAL from {} on, and whether that is elsewhere is not known yet: {unheard}",
                    here.lsn
                );
                Err(Error::UnfitServer { address: candidate.connection.address().to_owned(), detail })
            }
        }
    }

    /// Goes on where there is WAL, and says what is missing.
    async fn jump_over_gap(
        &mut self,
        candidate: &mut Candidate,
        here: Position,
        oldest: Option<Lsn>,
    ) -> Result<(), Error> {
        let kept = restart_of(candidate, &self.options.slot).await.into_iter().chain(oldest);
        let kept = kept.map(|kept| segment_start(kept, self.size())).filter(|kept| *kept > here.lsn).min();
        if let Some(Hole { at, to }) = self.give_up_hole(here, kept) {
            self.tell_gap(at.end(), to).await;
            return Ok(());
        }
        let wanted =
            plan_start(&candidate.facts, Some(here), None).map_err(|unfit| unfit_error(candidate, unfit))?;
        let restart = self.kept_behind(candidate, wanted.lsn).await?;
        // A slot that was made anew keeps less than what is there, by another slot or by wal_keep_size.
        let restart =
            oldest.filter(|oldest| *oldest > wanted.lsn).map_or(restart, |oldest| oldest.min(restart));
        let next = if wanted.timeline == candidate.facts.identity.timeline {
            Position { lsn: segment_start(restart, self.size()), ..wanted }
        } else {
            plan_start(&candidate.facts, None, Some(restart))
                .map_err(|unfit| unfit_error(candidate, unfit))?
        };
        if next.lsn <= wanted.lsn {
            return Err(Error::Missing { name: format!("WAL from {} on", wanted.lsn) });
        }
        // Of the segment that the archive ends in there may be pieces.
        let archived = self.resume.as_ref().map(Resume::next_place).filter(|place| place.start == wanted);
        self.tell_gap(archived.map_or(wanted, Place::end), next.lsn).await;
        (self.here, self.removed) = (Some(next), Vec::new());
        Ok(())
    }

    pub(super) async fn tell_gap(&self, from: Position, to: Lsn) {
        tracing::error!(
            "WAL from {} to {to} is not in the archive, and no server has it any more; take a new basebackup",
            from.lsn
        );
        self.remember(self.gap(from, to)).await;
    }

    /// Says that a primary has lost WAL that was received, and writes other WAL in its place, as after a return to a
    /// snapshot of its disk: what is in the archive there leads nowhere. Receiving goes on where it has come to.
    pub(super) async fn tell_set_back(&self, from: Position, to: Lsn) {
        let gap = self.gap(from, to);
        if self.shared.state().gaps.iter().any(|known| known.holds(&gap)) {
            return;
        }
        tracing::error!(
            "the server was set back to {}: what was received behind that, up to {to}, is not its WAL any more; \
             take a new basebackup once it has come as far",
            from.lsn
        );
        self.remember(gap).await;
    }

    fn gap(&self, Position { timeline, lsn: from }: Position, to: Lsn) -> Gap {
        Gap { cluster: self.cluster, timeline, from, to, noticed_at: self.clock.now() }
    }

    async fn remember(&self, gap: Gap) {
        note_gap(&mut self.shared.state().gaps, gap);
        // Now: once there is WAL from behind it, nothing else tells of it.
        let (folder, owner) = (&self.options.spool, self.options.owner);
        warn_of(put_all(self.shared, folder, owner, self.clock.now()).await);
    }

    /// Returns from where on the server keeps WAL for us behind what it has removed.
    ///
    /// A slot that was made anew may have been set back by our word of where we are, and then keeps nothing: it is made
    /// once more.
    async fn kept_behind(&self, candidate: &mut Candidate, removed: Lsn) -> Result<Lsn, Error> {
        let (name, size, flushed) = (&self.options.slot, self.size(), candidate.facts.identity.flushed);
        let is_behind = |restart: &Lsn| segment_start(*restart, size) > removed;
        let slot = slot_facts(candidate, name).await.ok().flatten().filter(|slot| slot.physical);
        let mut kept = slot.as_ref().and_then(|slot| slot.restart).filter(is_behind);
        if slot.is_some() && kept.is_none() && !candidate.facts.standby {
            candidate.connection.drop_slot(name).await?;
            candidate.connection.create_slot(name).await?;
            kept = restart_of(candidate, name).await.filter(is_behind);
        }
        Ok(kept.unwrap_or(flushed))
    }
}
