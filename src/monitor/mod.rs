//! Progress and counters that engines report and that `cli` shows.
