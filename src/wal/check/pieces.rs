//! Which damaged pieces matter: readers of a segment that is there in pieces alone pass over a damaged one where sound ones
//! hold all of its bytes, as a receiver stores them that met it.
//!
//! By ranges only: that copies of the same bytes agree is told when they are read.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::pg::WalSegmentName;
use crate::repo::layout::WalObjectName;

/// The pieces of segments that are not there as a whole, as they were found.
#[derive(Debug, Default)]
pub(super) struct Pieces(BTreeMap<WalSegmentName, Vec<Piece>>);

#[derive(Debug)]
struct Piece {
    range: Range<u32>,
    /// Nothing where it is sound.
    wrong: Option<String>,
}

/// A damaged piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DamagedPiece {
    pub name: WalObjectName,
    pub reason: String,
    /// The sound one that readers take first in its place, where they miss nothing of it.
    pub by: Option<WalObjectName>,
}

impl Pieces {
    /// Adds one, and what is wrong with it.
    pub(super) fn add(&mut self, segment: WalSegmentName, range: Range<u32>, wrong: Option<String>) {
        self.0.entry(segment).or_default().push(Piece { range, wrong });
    }

    /// Lists those that are damaged.
    pub(super) fn damaged(self) -> Vec<DamagedPiece> {
        let mut damaged = Vec::new();
        for (segment, mut pieces) in self.0 {
            pieces.sort_by_key(|piece| (piece.range.start, piece.range.end));
            let name = |range: &Range<u32>| {
                let Range { start: from, end: to } = *range;
                WalObjectName::Piece { segment, from, to }
            };
            for Piece { range, wrong } in &pieces {
                let Some(reason) = wrong.clone() else { continue };
                let by = stand_in(&pieces, range).map(name);
                damaged.push(DamagedPiece { name: name(range), reason, by });
            }
        }
        damaged
    }
}

/// Returns the first of the sound pieces that hold all of a range; nothing where they do not. They are in order.
fn stand_in<'a>(pieces: &'a [Piece], wanted: &Range<u32>) -> Option<&'a Range<u32>> {
    let (mut at, mut first) = (wanted.start, None);
    for Piece { range, .. } in pieces.iter().filter(|piece| piece.wrong.is_none()) {
        if range.start > at {
            break;
        }
        if range.end > at {
            first = first.or(Some(range));
            at = range.end;
        }
        if at >= wanted.end {
            return first;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_piece_matters_where_a_byte_of_it_is_in_no_sound_one() {
        let segment: WalSegmentName = "000000010000000000000005".parse().unwrap();
        let piece = |from, to| WalObjectName::Piece { segment, from, to };
        // Of each damaged one what stands in for it.
        let found = |pieces: &[(u32, u32, bool)]| -> Vec<(WalObjectName, Option<WalObjectName>)> {
            let mut all = Pieces::default();
            for (from, to, sound) in pieces {
                all.add(segment, *from..*to, (!sound).then(|| "a bit".to_owned()));
            }
            all.damaged().into_iter().map(|damaged| (damaged.name, damaged.by)).collect()
        };
        assert_eq!(found(&[(0, 100, true), (100, 200, true)]), []);
        assert_eq!(found(&[(0, 100, true), (100, 200, false)]), [(piece(100, 200), None)]);
        // As a receiver goes round it.
        let beside = [(0, 100, true), (100, 199, true), (100, 200, false), (199, 200, true)];
        assert_eq!(found(&beside), [(piece(100, 200), Some(piece(100, 199)))]);
        let unfinished = [(0, 100, true), (100, 199, true), (100, 200, false)];
        assert_eq!(found(&unfinished), [(piece(100, 200), None)]);
        let hole = [(100, 150, true), (100, 200, false), (160, 200, true)];
        assert_eq!(found(&hole), [(piece(100, 200), None)]);
        let longer = [(0, 300, true), (100, 200, false)];
        assert_eq!(found(&longer), [(piece(100, 200), Some(piece(0, 300)))]);
        // Two damaged ones are no help to each other.
        let both = [(0, 100, false), (0, 200, false)];
        assert_eq!(found(&both), [(piece(0, 100), None), (piece(0, 200), None)]);
    }
}
