//! What the integration tests share: a kernel package, or the line that says why there is none.

use std::path::PathBuf;

use fcvm_kernel::{Architecture, SetupOptions};

/// Options that take the package that FCVM_TEST_KERNEL_DEB names, or fetch one.
pub fn setup_options() -> Option<SetupOptions> {
    let Some(architecture) = Architecture::host() else {
        println!("skipped: there is no guest kernel for this machine's architecture");
        return None;
    };
    let mut options = SetupOptions::new(architecture);
    options.package = std::env::var_os("FCVM_TEST_KERNEL_DEB").map(PathBuf::from);
    Some(options)
}
