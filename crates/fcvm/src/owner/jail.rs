//! What a jail needs of the host.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_hypervisor::firecracker::{Firecracker, Jail};
use rustix::fs::StatVfsMountFlags;

use crate::context::{Context, create_private_dir};

/// The jailer of a Firecracker, where the files of a VM can be laid into a jail.
pub(crate) fn jailer(context: &Context, firecracker: &Firecracker) -> anyhow::Result<PathBuf> {
    firecracker.check_static()?;
    check_jails(&context.data_dir)?;
    let program = firecracker.program();
    Jail::find_jailer(program, &context.search_path.to_string_lossy()).with_context(|| {
        format!(
            "there is no jailer beside {} nor in PATH: 'fcvm setup firecracker' fetches both",
            program.display()
        )
    })
}

/// Whether jails can be below this directory.
fn check_jails(directory: &Path) -> anyhow::Result<()> {
    create_private_dir(directory)?;
    let shown = directory.display();
    let flags = rustix::fs::statvfs(directory)
        .with_context(|| format!("cannot look at the file system of {shown}"))?
        .f_flag;
    for (flag, option) in [
        (StatVfsMountFlags::NODEV, "nodev"),
        (StatVfsMountFlags::NOEXEC, "noexec"),
    ] {
        if flags.contains(flag) {
            bail!(
                "{shown} is mounted with '{option}', and a jail has devices and a program: use another with --data-dir"
            );
        }
    }
    if !fcvm_storage::naming_support(directory)? {
        bail!(
            "the file system of {shown} cannot name a disk that was made without a name, as a jail needs it (NFS, overlayfs of older kernels): use another with --data-dir"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jails_need_disks_that_get_names() {
        let directory = tempfile::tempdir().unwrap();
        let can_name = fcvm_storage::naming_support(directory.path()).unwrap();
        assert_eq!(check_jails(directory.path()).is_ok(), can_name);
    }

    #[test]
    fn jails_need_devices_and_programs() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root mounts file systems");
            return;
        }
        for option in ["nodev", "noexec"] {
            let directory = tempfile::tempdir().unwrap();
            let run = |program: &str, arguments: &[&str]| {
                let mut command = std::process::Command::new(program);
                let status = command.args(arguments).arg(directory.path()).status();
                assert!(status.unwrap().success(), "{program}");
            };
            run("mount", &["-t", "tmpfs", "-o", option, "memory"]);
            let checked = check_jails(directory.path());
            run("umount", &[]);
            let error = checked.unwrap_err().to_string();
            assert!(
                error.contains(&format!("mounted with '{option}'")),
                "{error}"
            );
        }
    }
}
