//! Three ways to know who uses a block, side by side. What came out is in `docs/design/block-cloning.md`.
//!
//! - [`brt`]: counts by address, only of what has several references. The pool's own.
//! - [`dedup`]: a table by content, as deduplication has it.
//! - [`in_pointer`]: a count beside each pointer, and no table.
//!
//! A [`Scheme`] answers three questions: where new content goes, what a second pointer changes, what one pointer less
//! changes. [`store`] is files, snapshots, a log and crashes over any of them; [`checker`] tries all that can be done with
//! those, shortest first, and shows what goes wrong. `cargo run -p reference-schemes --example explain` prints the
//! shortest counter-examples, `make bench-references` measures.
//!
//! Nothing here is used by the product: what it uses is `blockpool::References`, which [`brt`] is a thin layer over.

#![forbid(unsafe_code)]

pub mod brt;
pub mod checker;
pub mod dedup;
pub mod in_pointer;
pub mod scheme;
pub mod store;

pub use scheme::{Content, Pointer, Scheme};
