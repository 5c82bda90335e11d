//! What the tests share: a scratch directory with a store, small images, and the field's tools.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use fcvm_image::{ImageStore, Progress, Task};
use tempfile::TempDir;

/// A directory that goes with the test.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn store(&self) -> ImageStore {
        ImageStore::open(&self.path("store")).unwrap()
    }

    /// A small root file system with a link, a mode and some text.
    pub(crate) fn rootfs(&self, text: &str) -> PathBuf {
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
pub(crate) fn tool_missing(tool: &str) -> bool {
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
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// All files below a directory, with sizes: to see that nothing was left behind.
pub(crate) fn all(dir: &Path) -> Vec<(PathBuf, u64)> {
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

/// Bytes that no compressor makes shorter, the same every time.
pub(crate) fn noise(size_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(size_bytes + 8);
    while bytes.len() < size_bytes {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size_bytes);
    bytes
}

/// Keeps what it is told: `name: outcome` of every task that was finished, and messages.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<String>>>);

struct Recorded(Recorder, String);

impl Recorder {
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Progress for Recorder {
    fn start(&self, name: &str, _total_bytes: Option<u64>) -> Box<dyn Task> {
        Box::new(Recorded(self.clone(), name.to_owned()))
    }

    fn message(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

impl Task for Recorded {
    fn advance(&self, _bytes: u64) {}

    fn finish(&self, outcome: &str) {
        self.0.message(&format!("{}: {outcome}", self.1));
    }
}
