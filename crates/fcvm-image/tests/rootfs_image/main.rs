//! The root image through its public surface: layers in, an EROFS file out, and what `fsck.erofs`
//! and an independent reader find in it.
#![allow(unreachable_pub)] // modules of one test program

mod format;
mod merge;
mod model;
mod reference;
mod refusals;
mod support;
