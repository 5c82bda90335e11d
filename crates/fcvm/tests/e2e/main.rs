//! End to end: the fcvm program, a real hypervisor, a real guest kernel, real files.
//!
//! Each test has a place of its own ([`lab::Lab`]) and proves at its end that no process, socket or
//! file was left. Tests wait for events, never for time; limits are generous and only turn a hang into
//! a failure. What the machine lacks makes a test print one line, "skipped: ...", and return.
//!
//! VMs run under QEMU, or under what `FCVM_TEST_HYPERVISOR` names ([`hypervisor::Hypervisor`]).

#![allow(missing_docs, reason = "a test program has no users")]

mod base;
mod boot;
mod copy;
mod crash;
mod debian;
mod disk;
mod exec;
mod fault;
mod firecracker;
mod fork;
mod hypervisor;
mod image;
mod images;
mod lab;
mod lifecycle;
mod logs;
mod network;
mod ordinary;
mod pool;
mod process;
mod refusals;
mod registry;
mod run;
mod snapshot;
mod terminal;
mod tty;
mod warm;
