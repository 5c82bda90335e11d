//! Locks and counters that threads meet at: the standard library's, or, in the test of interleavings, those of a scheduler that tries
//! their orders (feature `shuttle`, `tests/interleavings.rs`).

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic::AtomicU64};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic::AtomicU64};
