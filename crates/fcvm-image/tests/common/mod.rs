//! What the tests share: a scratch directory with a store, small images, and the field's tools.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fcvm_image::ImageStore;
use tempfile::TempDir;

/// A directory that goes with the test.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn store(&self) -> ImageStore {
        ImageStore::open(&self.path("store")).unwrap()
    }

    /// A small root file system with a link, a mode and some text.
    pub fn rootfs(&self, text: &str) -> PathBuf {
        let dir = self.path(&format!("rootfs-{text}"));
        fs::create_dir_all(dir.join("etc")).unwrap();
        fs::create_dir_all(dir.join("bin")).unwrap();
        fs::write(dir.join("etc/text"), text).unwrap();
        fs::write(dir.join("bin/true"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(dir.join("bin/true"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("true", dir.join("bin/link")).unwrap();
        dir
    }
}

/// Says that the test is skipped when a tool is missing.
pub fn tool_missing(tool: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {tool}")])
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success();
    if !found {
        println!("skipped: {tool} is not installed");
    }
    !found
}

/// Runs a command that has to succeed and returns its output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// All files below a directory, with sizes: to see that nothing was left behind.
pub fn all(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(all(&entry.path()));
        } else {
            found.push((entry.path(), entry.metadata().unwrap().len()));
        }
    }
    found.sort();
    found
}
