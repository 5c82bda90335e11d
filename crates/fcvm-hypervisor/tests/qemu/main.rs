//! Real QEMU under TCG. `launch.rs` and `death.rs` boot a guest of a few instructions, so that nothing
//! but QEMU is needed; `disks.rs` boots Linux.

mod death;
mod disks;
mod elf;
mod launch;
mod linux;
mod snapshot;
mod support;
