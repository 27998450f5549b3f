//! Decoders of bytes from outside that the library shows: nothing panics, nothing allocates by a number it reads.
//!
//! Each gets bytes at random and valid samples that were flipped, cut, added to, or had lengths set to the largest
//! there are, with checksums made right again; dev builds panic where arithmetic overflows. What it has allocated at
//! its most is held against the length of its input. `objects` does the same to whole objects of the golden
//! repository. Decoders that are private to a module have proptests beside them, without the count of bytes: what they
//! make room for is bounded in the code by the bytes left (`WireReader::count_of`) or by a named limit. Not here: the
//! XML that `object_store` reads, of which an answer's length alone is bounded, and the server's `backup_manifest`, read
//! by serde: `restore --delta` reads none that is longer than `MANIFEST_BYTES_MAX` in `restore::existing`.

mod counting;
mod objects;
mod samples;
mod state;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use crate::counting::peak_of;
use crate::samples::{Decoder, decoders};

/// What a decoder may have allocated for each byte of its input: parsed forms are larger than bytes.
const BYTES_PER_BYTE: usize = 64;
/// What it may have whatever the input: contexts of decompressors, messages.
const BYTES_ALWAYS: usize = 1 << 20;
const CASES: u32 = 96;

/// One thing done to valid bytes.
#[derive(Debug, Clone)]
pub enum Edit {
    Flip(Index, u8),
    Truncate(Index),
    Insert(Index, Vec<u8>),
    /// Sets bytes to 0xff: the largest length of any width, and a varint without end.
    Largest(Index, usize),
    Remove(Index, usize),
}

pub fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (any::<Index>(), 0u8..8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        any::<Index>().prop_map(Edit::Truncate),
        (any::<Index>(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, b)| Edit::Insert(at, b)),
        (any::<Index>(), prop::sample::select(vec![1, 2, 4, 8, 9]))
            .prop_map(|(at, len)| Edit::Largest(at, len)),
        (any::<Index>(), 1usize..9).prop_map(|(at, len)| Edit::Remove(at, len)),
    ]
}

impl Edit {
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Self::Flip(at, bit) => bytes[at.index(len)] ^= 1 << bit,
            Self::Truncate(at) => bytes.truncate(at.index(len)),
            Self::Insert(at, more) => {
                let at = at.index(len);
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Largest(at, count) => {
                let at = at.index(len);
                bytes[at..len.min(at + count)].fill(0xff);
            }
            Self::Remove(at, count) => {
                let at = at.index(len);
                bytes.drain(at..len.min(at + count));
            }
        }
    }
}

fn check(decoder: &Decoder, bytes: &[u8]) -> Result<(), TestCaseError> {
    let peak = peak_of(|| (decoder.decode)(bytes));
    let bound = BYTES_PER_BYTE * bytes.len() + BYTES_ALWAYS + decoder.declared;
    prop_assert!(peak <= bound, "{}: {peak} bytes for {} bytes of input", decoder.name, bytes.len());
    Ok(())
}

fn run<S: Strategy>(decoder: &Decoder, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    if let Err(error) = TestRunner::new(config).run(strategy, test) {
        panic!("{}: {error}", decoder.name);
    }
}

#[test]
fn arbitrary_bytes_are_read_or_refused_in_bounded_memory() {
    for decoder in decoders() {
        run(&decoder, &prop::collection::vec(any::<u8>(), 0..600), |bytes| check(&decoder, &bytes));
    }
}

#[test]
fn damaged_samples_are_read_or_refused_in_bounded_memory() {
    for decoder in decoders() {
        for sample in &decoder.samples {
            check(&decoder, sample).unwrap();
            run(&decoder, &prop::collection::vec(edit(), 1..5), |edits| {
                let mut bytes = sample.clone();
                edits.iter().for_each(|edit| edit.apply(&mut bytes));
                check(&decoder, &bytes)?;
                (decoder.repair)(&mut bytes);
                check(&decoder, &bytes)
            });
        }
    }
}
