//! Setup with Debian's real package: fetched with apt where the archive is reachable, or the file that
//! FCVM_TEST_KERNEL_DEB names.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fcvm_kernel::{Architecture, GuestKernel, KernelError, SetupEvent, SetupOptions, SetupStage};

#[test]
fn fetches_once_and_repairs_what_is_damaged() {
    let Some(options) = common::setup_options() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let mut stages = Vec::new();
    let kernel = fcvm_kernel::setup(directory.path(), &options, &mut |event: SetupEvent| {
        stages.push(event.stage);
    })
    .unwrap();
    eprintln!("{kernel:#?} {stages:?}");
}
