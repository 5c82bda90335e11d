//! A built host kernel as a Debian package, which installs beside the distribution's.
//!
//! The package is made like Debian's own linux-image packages: the image, its configuration, and the four maintainer
//! scripts that run the hooks of /etc/kernel, by which boot loaders and initramfs tools learn of kernels. `dpkg-deb`
//! writes it; the same kernel gives the same bytes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::fetch_output;
use super::profile::Use;
use super::{BuildError, BuiltKernel, Result};
use crate::files;

/// Packages are recognised by it.
const MAINTAINER: &str = "fcvm <fcvm@localhost>";
/// Hooks, by the name of the maintainer script and of the directory below /etc/kernel.
const HOOKS: [&str; 4] = ["preinst", "postinst", "prerm", "postrm"];

/// Writes the package of a host's kernel into `target`; returns its path.
///
/// # Errors
/// [`BuildError::Options`] for a guest's kernel, [`BuildError::Missing`] without dpkg-deb, [`BuildError::File`].
pub fn package(kernel: &BuiltKernel, target: &Path) -> Result<PathBuf> {
    if kernel.used_for != Use::Host {
        return Err(BuildError::Options(format!(
            "{} is a guest's kernel and boots no host: package one of host-latency or host-full",
            kernel.name
        )));
    }
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        return Err(BuildError::Missing {
            missing: "dpkg-deb".to_owned(),
            packages: "dpkg".to_owned(),
        });
    }
    kernel.check()?;
    let name = format!("linux-image-{}", lowercase(&kernel.release)?);
    let version = version(kernel);
    fs::create_dir_all(target).map_err(BuildError::file("create", target))?;
    let staging = files::partial_dir(target)?;
    let tree = staging.path().join("tree");
    lay_out(kernel, &tree)?;
    let control = control(kernel, &name, &version, &tree);
    write(&tree.join("DEBIAN/control"), &control, 0o644)?;
    let finished = staging.path().join("package.deb");
    let mut command = Command::new("dpkg-deb");
    command
        .args(["--root-owner-group", "--build"])
        .arg(&tree)
        .arg(&finished)
        .env("SOURCE_DATE_EPOCH", kernel.built_at_seconds.to_string());
    fetch_output("writing the package (dpkg-deb)", &mut command)?;
    let path = target.join(format!("{name}_{version}_amd64.deb"));
    fs::rename(&finished, &path).map_err(BuildError::file("create", &path))?;
    files::make_readable(&path)?;
    Ok(path)
}

/// The files that are installed, and the maintainer scripts.
fn lay_out(kernel: &BuiltKernel, tree: &Path) -> Result<()> {
    let release = &kernel.release;
    let boot = tree.join("boot");
    let modules = tree.join("lib/modules").join(release);
    for directory in [&boot, &modules, &tree.join("DEBIAN")] {
        fs::create_dir_all(directory).map_err(BuildError::file("create", directory))?;
    }
    for (from, stem) in [
        (kernel.image_path(), "vmlinuz"),
        (kernel.config_path(), "config"),
    ] {
        let to = boot.join(format!("{stem}-{release}"));
        fs::copy(&from, &to).map_err(BuildError::file("copy", &from))?;
        set_mode(&to, 0o644)?;
    }
    // There are no modules: tools that look for them find the lists empty.
    for list in ["modules.order", "modules.builtin"] {
        write(&modules.join(list), "", 0o644)?;
    }
    for hook in HOOKS {
        write(
            &tree.join("DEBIAN").join(hook),
            &maintainer_script(hook, release),
            0o755,
        )?;
    }
    for directory in ["", "boot", "lib", "lib/modules", "DEBIAN"] {
        set_mode(&tree.join(directory), 0o755)?;
    }
    set_mode(&modules, 0o755)
}

/// `DPKG_ROOT` is the root directory where dpkg runs the script without changing into it.
fn maintainer_script(hook: &str, release: &str) -> String {
    format!(
        "#!/bin/sh\n\
         # Tells boot loaders and initramfs tools of the kernel, as Debian's own packages do.\n\
         set -e\n\
         export DEB_MAINT_PARAMS=\"$*\"\n\
         directory=\"$DPKG_ROOT/etc/kernel/{hook}.d\"\n\
         if [ -d \"$directory\" ]; then\n    \
             run-parts --report --exit-on-error --arg='{release}' --arg=\"$DPKG_ROOT/boot/vmlinuz-{release}\" \"$directory\"\n\
         fi\n"
    )
}

fn control(kernel: &BuiltKernel, name: &str, version: &str, tree: &Path) -> String {
    let kilobytes = installed_bytes(tree).div_ceil(1024);
    format!(
        "Package: {name}\n\
         Version: {version}\n\
         Architecture: amd64\n\
         Maintainer: {MAINTAINER}\n\
         Section: kernel\n\
         Priority: optional\n\
         Installed-Size: {kilobytes}\n\
         Provides: linux-image\n\
         Suggests: linux-initramfs-tool\n\
         Description: Linux {release} of the profile {profile}\n \
         Built by fcvm ({built}) from {source}; everything is built in, there are no modules.\n",
        release = kernel.release,
        profile = kernel.profile,
        built = kernel.name,
        source = kernel.source,
    )
}

fn installed_bytes(tree: &Path) -> u64 {
    let installed = files::entries(&tree.join("boot")).unwrap_or_default();
    installed
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// The release's own version, then the key: another configuration is another version.
fn version(kernel: &BuiltKernel) -> String {
    let upstream = kernel
        .release
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .next()
        .unwrap_or_default();
    let key = &kernel.key[..kernel.key.len().min(10)];
    format!("{upstream}-1+fcvm.{key}")
}

/// A package's name has no capital letters and none of `_~`.
fn lowercase(release: &str) -> Result<String> {
    let name = release.to_ascii_lowercase().replace(['_', '~'], "-");
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-+.".contains(&byte);
    match !name.is_empty() && name.bytes().all(known) {
        true => Ok(name),
        false => Err(BuildError::Options(format!(
            "the release '{release}' cannot be part of a package's name: change CONFIG_LOCALVERSION"
        ))),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text).map_err(BuildError::file("write", path))?;
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(BuildError::file("change the mode of", path))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manifest::StoredFile;

    /// A kernel whose files are some bytes.
    fn kernel(directory: &Path, used_for: &str, release: &str) -> BuiltKernel {
        let file = |name: &str| {
            StoredFile::create(directory, name.to_owned(), name.repeat(999).as_bytes()).unwrap()
        };
        let manifest = json!({
            "version": 1, "name": "host-full-6.1.192-0123456789", "key": "0123456789abcdef",
            "profile": "host-full", "use": used_for, "source": "debian:6.1", "source_id": "x",
            "release": release, "compiler": "gcc", "march": null, "object_count": 1,
            "built_at_seconds": 1_700_000_000, "symbols": [],
            "vmlinux": file("vmlinux"), "image": file("bzImage"), "config": file("config"),
        });
        fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
        BuiltKernel::read(directory).unwrap()
    }

    /// dpkg with a system of its own; `run` is told of by the hooks.
    fn dpkg(root: &Path, arguments: &[&str]) -> String {
        let output = Command::new("dpkg")
            .arg(format!("--root={}", root.display()))
            .args(["--force-script-chrootless", "--force-not-root"])
            .arg("--log=/dev/null")
            .args(arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_package_is_installed_and_purged_and_hooks_are_told() {
        if Command::new("dpkg").arg("--version").output().is_err() {
            println!("skipped: there is no dpkg");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (built, packages, root) = ["built", "packages", "root"]
            .map(|name| directory.path().join(name))
            .into();
        for path in [
            &built,
            &root.join("var/lib/dpkg/info"),
            &root.join("var/lib/dpkg/updates"),
        ] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
        for hook in HOOKS {
            let at = root.join(format!("etc/kernel/{hook}.d"));
            fs::create_dir_all(&at).unwrap();
            let told = root.join("told");
            let script = format!(
                "#!/bin/sh\necho {hook} $1 \"$(basename $2)\" >> {}\n",
                told.display()
            );
            fcvm_testing::write_program(&at.join("zz-tell"), &script);
        }
        let kernel = kernel(&built, "host", "6.1.192-fcvm-Host_full");
        let path = package(&kernel, &packages).unwrap();
        let name = "linux-image-6.1.192-fcvm-host-full";
        assert_eq!(
            path.file_name().unwrap().to_str().unwrap(),
            format!("{name}_6.1.192-1+fcvm.0123456789_amd64.deb")
        );
        let first = fs::read(&path).unwrap();
        package(&kernel, &packages).unwrap();
        assert!(
            first == fs::read(&path).unwrap(),
            "it is not the same twice"
        );
        assert_eq!(
            files::entries(&packages).unwrap(),
            std::slice::from_ref(&path)
        );

        dpkg(&root, &["--install", path.to_str().unwrap()]);
        let image = root.join("boot/vmlinuz-6.1.192-fcvm-Host_full");
        assert_eq!(fs::read(&image).unwrap(), "bzImage".repeat(999).as_bytes());
        let modules = root.join("lib/modules/6.1.192-fcvm-Host_full");
        assert!(modules.join("modules.builtin").is_file());
        dpkg(&root, &["--purge", name]);
        assert!(!image.exists() && !modules.exists());
        let told = fs::read_to_string(root.join("told")).unwrap();
        let told: Vec<&str> = told.lines().collect();
        let line =
            |hook: &str| format!("{hook} 6.1.192-fcvm-Host_full vmlinuz-6.1.192-fcvm-Host_full");
        for (index, hook) in HOOKS.iter().enumerate() {
            assert_eq!(
                told.get(index).copied(),
                Some(line(hook).as_str()),
                "{told:?}"
            );
        }
    }

    #[test]
    fn a_guests_kernel_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = kernel(directory.path(), "guest", "6.1.192-fcvm-guest");
        let error = package(&kernel, directory.path()).unwrap_err().to_string();
        assert!(error.contains("is a guest's kernel"), "{error}");
    }
}
