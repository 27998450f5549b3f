//! What the C library's allocator is told, so that memory that was needed for a while goes back to the machine.
//!
//! Left to itself it keeps what segments were read into, and part of it even when it is told to give back (the ends of
//! its arenas). So large things are mapped one by one, which go back when they are freed, and what is left of small ones
//! is given back by who knows that nothing is to be done. Deliberately absent: when that is, and other C libraries.

/// Everything larger is a mapping of its own: segments are, whatever their size, and what is counted in kilobytes is not.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: i32 = 512 << 10;

/// So much free memory at the end of an arena stays, until [`give_back`]: the frames of a segment come and go there, and
/// would each be given back and faulted in again.
#[cfg(target_env = "gnu")]
const KEPT_BYTES_MAX: i32 = 4 << 20;

/// Has large things mapped one by one, from now on and in the whole process.
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "only the C library's allocator can be told"))]
pub fn map_large_things() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointer, and may be called at any time from any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX);
    }
}

/// Gives back what is free; it may take milliseconds.
#[cfg_attr(
    target_env = "gnu",
    expect(unsafe_code, reason = "only the C library knows what its allocator keeps")
)]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer, and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
