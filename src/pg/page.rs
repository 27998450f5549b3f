//! A page of a relation: its header and its checksum.
//!
//! The checksum is that of the server's `checksum_impl.h`: 32 interleaved FNV-1a sums over 32-bit words, so that the
//! compiler can keep them in vector registers, with the block number mixed in. During a backup only pages older than
//! the backup can be judged: newer ones may be read half written, and replay brings them back whole.
//!
//! Words are little-endian, as is every server Walden takes (`control_file` refuses the others).

use super::lsn::Lsn;

/// The header of a page (`PageHeaderData`), as far as it says something about the whole page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The end of the WAL record that changed the page last.
    pub lsn: Lsn,
    /// The checksum stored, meaningless where the cluster has none.
    pub checksum: u16,
    /// Where free space begins.
    pub lower: u16,
    /// Where free space ends; 0 on a page never initialised.
    pub upper: u16,
    /// Where the access method's own part begins.
    pub special: u16,
}

/// What a checksum says about a page read during a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageVerdict {
    Ok,
    /// Allocated and never written: all zero.
    New,
    /// Changed since the backup began, so it may be half written; replay restores it.
    NewerThanBackup {
        lsn: Lsn,
    },
    /// The stored checksum is wrong, or a page that was never initialised is not all zero (then `stored` is what
    /// stands there). A page caught while it was being written looks the same: read it again before saying so.
    Mismatch {
        stored: u16,
        computed: u16,
    },
}

/// The bytes of a page header without line pointers.
pub const PAGE_HEADER_BYTES: usize = 24;
/// The number of interleaved sums (`N_SUMS`).
const SUMS: usize = 32;
const ROW_BYTES: usize = SUMS * 4;
const FNV_PRIME: u32 = 16_777_619;
/// Where the checksum stands in the header.
const CHECKSUM_OFFSET: usize = 8;

/// Where each of the sums starts (`checksumBaseOffsets`).
const BASE_OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

impl PageHeader {
    /// Reads the header, none if the bytes are shorter than one.
    pub fn parse(page: &[u8]) -> Option<Self> {
        let header = page.first_chunk::<PAGE_HEADER_BYTES>()?;
        let [lsn @ .., _, _] = header.first_chunk::<10>()?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        Some(Self {
            lsn: Lsn::from_page_bytes(*lsn),
            checksum: word(CHECKSUM_OFFSET),
            lower: word(12),
            upper: word(14),
            special: word(16),
        })
    }

    /// Tells whether the page was never initialised (`PageIsNew`).
    pub fn is_new(&self) -> bool {
        self.upper == 0
    }
}

/// Computes the checksum of a page that is block `block_number` of its fork (`pg_checksum_page`).
///
/// The bytes at the checksum's own place do not count. The page is a whole number of 128-byte rows, as every block
/// size of PostgreSQL is; bytes beyond the last whole row do not count either.
pub fn checksum(page: &[u8], block_number: u32) -> u16 {
    let mut sums = BASE_OFFSETS;
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    if let [first, rest @ ..] = rows {
        let mut first = *first;
        first[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2].fill(0);
        mix(&mut sums, &first);
        for row in rest {
            mix(&mut sums, row);
        }
    }
    // Two more rounds spread the last words over the whole sum.
    mix(&mut sums, &[0; ROW_BYTES]);
    mix(&mut sums, &[0; ROW_BYTES]);
    let sum = sums.iter().fold(0, |all, sum| all ^ sum) ^ block_number;
    // Never 0, which would look like a page without a checksum.
    (sum % 65535 + 1) as u16
}

#[inline(always)]
fn mix(sums: &mut [u32; SUMS], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

/// Judges a page read while the server was running.
///
/// `block_number` counts through the segments of the fork; `start_lsn` is where the backup started.
pub fn verify(page: &[u8], block_number: u32, start_lsn: Lsn) -> PageVerdict {
    let Some(header) = PageHeader::parse(page) else {
        return PageVerdict::Mismatch { stored: 0, computed: checksum(page, block_number) };
    };
    if header.is_new() && page.iter().all(|b| *b == 0) {
        return PageVerdict::New;
    }
    if header.lsn >= start_lsn {
        return PageVerdict::NewerThanBackup { lsn: header.lsn };
    }
    let computed = checksum(page, block_number);
    if header.checksum == computed && !header.is_new() {
        PageVerdict::Ok
    } else {
        PageVerdict::Mismatch { stored: header.checksum, computed }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE_BYTES: usize = 8192;
    /// Later than every page of the sample.
    const AFTER: Lsn = Lsn(u64::MAX);

    /// Blocks 0 and 1 of a table of a PostgreSQL 15 cluster with checksums.
    fn blocks() -> [Vec<u8>; 2] {
        let bytes = include_bytes!("../../tests/data/page/heap-2-blocks");
        [bytes[..PAGE_BYTES].to_vec(), bytes[PAGE_BYTES..].to_vec()]
    }

    /// The definition, word by word, to hold the fast form against.
    fn checksum_by_definition(page: &[u8], block_number: u32) -> u16 {
        let word = |at: usize| {
            let byte = |i: usize| if i == 8 || i == 9 { 0 } else { u32::from(page[i]) };
            byte(at) | byte(at + 1) << 8 | byte(at + 2) << 16 | byte(at + 3) << 24
        };
        let mut sum = block_number;
        for (column, base) in BASE_OFFSETS.into_iter().enumerate() {
            let words = (0..page.len() / ROW_BYTES).map(|row| word(row * ROW_BYTES + column * 4));
            sum ^= words.chain([0, 0]).fold(base, |sum, word| {
                let mixed = sum ^ word;
                mixed.wrapping_mul(16_777_619) ^ (mixed >> 17)
            });
        }
        (sum % 65535 + 1) as u16
    }

    #[test]
    fn the_servers_own_checksums_are_right() {
        for (block_number, page) in (0..).zip(blocks()) {
            let header = PageHeader::parse(&page).unwrap();
            assert_eq!(checksum(&page, block_number), header.checksum);
            assert_eq!(verify(&page, block_number, AFTER), PageVerdict::Ok);
            assert!(header.lsn > Lsn(0x10_0000) && header.lower < header.upper && header.upper < 8192);
            assert_eq!(header.special, 8192);
        }
    }

    #[test]
    fn damage_and_a_wrong_place_are_found() {
        let [mut page, _] = blocks();
        let stored = PageHeader::parse(&page).unwrap().checksum;
        assert!(matches!(verify(&page, 1, AFTER), PageVerdict::Mismatch { stored: s, .. } if s == stored));
        page[5000] ^= 1;
        assert!(matches!(verify(&page, 0, AFTER), PageVerdict::Mismatch { .. }));
        assert!(matches!(verify(&page[..20], 0, AFTER), PageVerdict::Mismatch { .. }));
        assert!(matches!(verify(&[], 0, AFTER), PageVerdict::Mismatch { .. }));
    }

    #[test]
    fn a_page_changed_since_the_start_is_not_judged() {
        let [mut page, _] = blocks();
        let lsn = PageHeader::parse(&page).unwrap().lsn;
        page[5000] ^= 1;
        assert_eq!(verify(&page, 0, lsn), PageVerdict::NewerThanBackup { lsn });
        assert!(matches!(verify(&page, 0, lsn + 1), PageVerdict::Mismatch { .. }));
    }

    #[test]
    fn a_new_page_is_all_zero() {
        let mut page = vec![0; PAGE_BYTES];
        assert_eq!(verify(&page, 7, AFTER), PageVerdict::New);
        page[PAGE_BYTES - 1] = 1;
        assert!(matches!(verify(&page, 7, AFTER), PageVerdict::Mismatch { stored: 0, .. }));
        // Even if the checksum happens to fit.
        let fits = checksum(&page, 7).to_le_bytes();
        page[8..10].copy_from_slice(&fits);
        assert!(matches!(verify(&page, 7, AFTER), PageVerdict::Mismatch { .. }));
    }

    proptest! {
        #[test]
        fn the_fast_form_is_the_definition(rows in 1usize..=64, block_number: u32, seed: u64) {
            let mut state = seed;
            let page: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            }).take(rows * ROW_BYTES).collect();
            prop_assert_eq!(checksum(&page, block_number), checksum_by_definition(&page, block_number));
        }

        #[test]
        fn any_bytes_have_a_verdict(page in prop::collection::vec(any::<u8>(), 0..300), block: u32, lsn: u64) {
            let _ = verify(&page, block, Lsn(lsn));
        }
    }
}
