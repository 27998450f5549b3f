//! Memory for segments that were read, used again for those that come.
//!
//! A page that is touched for the first time has to be found, cleared and charged by the kernel, and in a virtual machine
//! by its host as well, which together takes longer than inflating what it is for. Whoever reads segments one after
//! the other gets the memory of those that nobody holds any more. What is handed out here is overwritten before
//! anybody sees it: that is the taker's part.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Memory that is kept.
#[derive(Debug, Default)]
pub(crate) struct RawBuffers {
    free: Mutex<Vec<Vec<u8>>>,
}

/// A piece of it, kept again once it is dropped.
#[derive(Debug)]
pub(crate) struct RawBuffer {
    bytes: Vec<u8>,
    home: Arc<RawBuffers>,
}

/// Two segments of the usual size: one for each that is opened at the same time on a small host.
const KEPT_BYTES_MAX: usize = 32 << 20;
/// What is smaller is not worth it.
const KEPT_BYTES_MIN: usize = 1 << 20;

impl RawBuffers {
    /// Returns so many bytes, which hold anything.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> RawBuffer {
        let kept = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let found = free.iter().position(|bytes| bytes.len() == length);
            found.map(|at| free.swap_remove(at))
        };
        RawBuffer { bytes: kept.unwrap_or_else(|| vec![0; length]), home: self.clone() }
    }

    fn keep(&self, bytes: Vec<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = free.iter().map(Vec::len).sum();
        if bytes.len() >= KEPT_BYTES_MIN && kept + bytes.len() <= KEPT_BYTES_MAX {
            free.push(bytes);
        }
    }
}

impl Deref for RawBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for RawBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for RawBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<RawBuffer> for Bytes {
    fn from(buffer: RawBuffer) -> Self {
        Self::from_owner(buffer)
    }
}

impl Drop for RawBuffer {
    fn drop(&mut self) {
        self.home.keep(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_once_nobody_holds_it_and_kept_within_bounds() {
        let buffers = Arc::new(RawBuffers::default());
        let kept =
            |buffers: &RawBuffers| buffers.free.lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>();
        let length = KEPT_BYTES_MAX / 2;
        let mut first = buffers.take(length);
        let place = first.as_ptr();
        first[0] = 7;
        let first = Bytes::from(first);
        let part = first.slice(..1);
        drop(first);
        assert_ne!(buffers.take(length).as_ptr(), place, "part of it is held");
        assert_eq!(part, &[7][..]);
        drop(part);
        assert_eq!(kept(&buffers), [length, length]);
        let again = [buffers.take(length), buffers.take(length)];
        assert!(again.iter().any(|buffer| buffer.as_ptr() == place));
        drop((buffers.take(length), buffers.take(length), again));
        assert_eq!(kept(&buffers), [length, length]);
        drop(buffers.take(KEPT_BYTES_MIN - 1));
        assert_eq!(buffers.take(length - 1).len(), length - 1);
        assert_eq!(kept(&buffers), [length, length]);
    }
}
