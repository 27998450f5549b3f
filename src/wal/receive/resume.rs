//! Where receiving goes on when the spool holds nothing: behind what the archive has.

use crate::catalog::WalCoverage;
use crate::pg::WalSegmentNumber;
use crate::wal::Error;
use crate::wal::receive::Receiver;
use crate::wal::receive::server::Candidate;
use crate::wal::spool::Position;

impl Receiver<'_> {
    /// Returns where the archive ends on the server's way, for a spool that holds nothing; waits for the store.
    pub(super) async fn archive_end(&self, candidate: &Candidate) -> Result<Option<Position>, Error> {
        let mut known = self.shared.repository.subscribe();
        let repository = match known.wait_for(Option::is_some).await {
            Ok(repository) => repository.clone(),
            Err(_) => None,
        };
        let Some(repository) = repository else { return Ok(None) };
        let facts = &candidate.facts;
        let ancestors = facts.history.iter().flat_map(|history| history.ancestors().rev());
        for timeline in std::iter::once(facts.identity.timeline).chain(ancestors) {
            let from = WalSegmentNumber(0);
            let coverage = WalCoverage::load_timeline(&repository, self.cluster, timeline, from).await?;
            let ahead = coverage.last().map(|last| last.next().start_lsn(self.size()));
            let pieces = coverage.pieces.last_key_value();
            let pieces =
                pieces.map(|(number, reach)| number.start_lsn(self.size()) + u64::from(reach.contiguous));
            if let Some(lsn) = ahead.max(pieces) {
                let end = Position { timeline, lsn };
                // A commit that was not told before we were ended waits for no other WAL than this.
                self.shared.durable.send_if_modified(|known| known.is_none() && known.insert(end) == &end);
                return Ok(Some(end));
            }
        }
        Ok(None)
    }
}
