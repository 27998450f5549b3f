//! A witness that remembers every sealing, for the test that no key and nonce ever carry two plaintexts.
//!
//! It keeps digests, so that a whole backup can be watched. Sealing the same bytes again under the same key and
//! nonce gives the same frame and is no offence. Used by tests of the writers, across failed and repeated uploads.

use std::collections::HashMap;
use std::sync::Mutex;

use super::digest::{Digest, Hasher};
use super::frame::{NONCE_LEN, SealObserver};

/// A key and a nonce.
type Sealing = ([u8; 32], [u8; NONCE_LEN]);

/// Records sealings and finds nonces used twice.
#[derive(Debug, Default)]
pub struct SealRecorder {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sealed: usize,
    first: HashMap<Sealing, Digest>,
    reused: Vec<ReusedNonce>,
}

/// A nonce that carried a second plaintext, or other additional data, under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReusedNonce {
    pub key_fingerprint: [u8; 32],
    pub nonce: [u8; NONCE_LEN],
}

impl SealRecorder {
    /// Creates a recorder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many frames were sealed, so that a test can tell watching from not being told.
    pub fn sealed_count(&self) -> usize {
        self.state.lock().expect("no holder of this lock panics").sealed
    }

    /// Returns the nonces that were used twice, in order.
    pub fn reused_nonces(&self) -> Vec<ReusedNonce> {
        self.state.lock().expect("no holder of this lock panics").reused.clone()
    }
}

impl SealObserver for SealRecorder {
    fn sealed(&self, key_fingerprint: [u8; 32], nonce: [u8; NONCE_LEN], plaintext: &[u8], aad: &[u8]) {
        let mut content = Hasher::new();
        content.update(&(aad.len() as u64).to_le_bytes()).update(aad).update(plaintext);
        let content = content.finish();

        let mut state = self.state.lock().expect("no holder of this lock panics");
        state.sealed += 1;
        if *state.first.entry((key_fingerprint, nonce)).or_insert(content) != content {
            state.reused.push(ReusedNonce { key_fingerprint, nonce });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::codec::{CodecId, DataKey, FrameAad, SeededRandom};

    fn frame(position: u64) -> FrameAad {
        FrameAad { kind: 1, position, last: false, codec: CodecId::None, raw_len: 3 }
    }

    #[test]
    fn only_a_second_plaintext_is_an_offence() {
        let recorder = Arc::new(SealRecorder::new());
        let data_key = DataKey::generate(&SeededRandom::new(1)).observed_by(recorder.clone());
        let key = data_key.frame_key(&[1; 32], b"object");

        key.seal(&frame(0), b"one".to_vec());
        key.seal(&frame(1), b"two".to_vec());
        key.seal(&frame(0), b"one".to_vec());
        data_key.frame_key(&[2; 32], b"object").seal(&frame(0), b"new".to_vec());
        data_key.frame_key(&[1; 32], b"other").seal(&frame(0), b"new".to_vec());
        assert_eq!(recorder.sealed_count(), 5);
        assert_eq!(recorder.reused_nonces(), []);

        data_key.frame_key(&[1; 32], b"object").seal(&frame(0), b"new".to_vec());
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - 1] = 1;
        key.seal(&FrameAad { last: true, ..frame(1) }, b"two".to_vec());
        let reused = recorder.reused_nonces();
        assert_eq!(reused.iter().map(|reused| reused.nonce).collect::<Vec<_>>(), [[0; NONCE_LEN], nonce]);
    }
}
