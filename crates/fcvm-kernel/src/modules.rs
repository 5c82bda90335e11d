//! Which modules have to be loaded, and in which order.
//!
//! The rules are those of modprobe(8) as far as a fixed set of drivers needs them: `depends=` in each
//! module's `.modinfo` section, '-' and '_' the same in names, nothing to do for what is built in.
//! Soft dependencies and aliases are not followed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::endian::LittleEndian;

use crate::decompress::Compression;
use crate::{KernelError, Result, files};

/// Largest module, decompressed.
const MODULE_SIZE_MAX_BYTES: usize = 64 << 20;
/// Most modules that a set of drivers may pull in: far more than any driver does.
const MODULE_COUNT_MAX: usize = 256;

/// A module in the order of loading.
#[derive(Debug)]
pub(crate) struct LoadableModule {
    /// Name with underscores, as `lsmod` shows it.
    pub(crate) name: String,
    /// The decompressed object file.
    pub(crate) bytes: Vec<u8>,
}

/// The modules of one kernel: files in a directory, and names that are built in.
#[derive(Debug, Default)]
pub(crate) struct ModuleIndex {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleIndex {
    /// Reads the names in a directory of `*.ko`, `*.ko.xz`, `*.ko.zst` or `*.ko.gz` files, and those in
    /// the text of the kernel's `modules.builtin`.
    pub(crate) fn read(directory: &Path, builtin: &str) -> Result<Self> {
        let mut index = Self {
            files: BTreeMap::new(),
            builtin: builtin.lines().filter_map(module_name).collect(),
        };
        let entries = fs::read_dir(directory).map_err(KernelError::file("read", directory))?;
        for entry in entries {
            let path = entry.map_err(KernelError::file("read", directory))?.path();
            if let Some(name) = path.to_str().and_then(module_name) {
                index.files.insert(name, path);
            }
        }
        Ok(index)
    }

    /// The modules that `roots` need, each after those it depends on; what is built in is left out.
    pub(crate) fn resolve(&self, roots: &[String]) -> Result<Vec<LoadableModule>> {
        let mut loaded = Vec::new();
        let mut state = BTreeMap::new();
        for root in roots {
            self.visit(&normalise(root), "the guest", &mut state, &mut loaded)?;
        }
        Ok(loaded)
    }

    /// Depth-first; `state` holds false for a module whose dependencies are being visited, true for a
    /// finished one.
    fn visit(
        &self,
        name: &str,
        needed_by: &str,
        state: &mut BTreeMap<String, bool>,
        loaded: &mut Vec<LoadableModule>,
    ) -> Result<()> {
        let refuse = |reason: &str| KernelError::Module {
            module: name.to_owned(),
            reason: reason.to_owned(),
        };
        match state.get(name) {
            Some(true) => return Ok(()),
            Some(false) => return Err(refuse("it depends on itself")),
            None if self.builtin.contains(name) => return Ok(()),
            None if state.len() >= MODULE_COUNT_MAX => {
                return Err(refuse("too many modules depend on each other"));
            }
            None => {}
        }
        let path = self
            .files
            .get(name)
            .ok_or_else(|| KernelError::ModuleMissing {
                module: name.to_owned(),
                needed_by: needed_by.to_owned(),
            })?;
        let bytes = read_module(path, name)?;
        let dependencies = dependencies(&bytes).map_err(|reason| KernelError::Module {
            module: name.to_owned(),
            reason,
        })?;
        state.insert(name.to_owned(), false);
        for dependency in &dependencies {
            self.visit(dependency, name, state, loaded)?;
        }
        state.insert(name.to_owned(), true);
        loaded.push(LoadableModule {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }
}

/// True for the file names that [`ModuleIndex::read`] takes for modules.
pub(crate) fn is_module_file(file_name: &str) -> bool {
    module_name(file_name).is_some()
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(path: &str) -> Option<String> {
    let file_name = path.rsplit('/').next()?;
    let (name, suffix) = file_name.split_once(".ko")?;
    let known = matches!(suffix, "" | ".xz" | ".zst" | ".gz");
    (known && !name.is_empty()).then(|| normalise(name))
}

fn normalise(name: &str) -> String {
    name.replace('-', "_")
}

fn read_module(path: &Path, name: &str) -> Result<Vec<u8>> {
    let bytes = files::read_bounded(path, MODULE_SIZE_MAX_BYTES)?;
    object_file(bytes).map_err(|reason| KernelError::Module {
        module: name.to_owned(),
        reason,
    })
}

fn object_file(bytes: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
    match Compression::detect(&bytes) {
        None => Ok(bytes),
        Some(compression) => compression
            .decompress(&bytes, MODULE_SIZE_MAX_BYTES)
            .map_err(|error| error.to_string()),
    }
}

/// The names of the modules that a module depends on, given its file, compressed or not.
///
/// # Errors
/// What is wrong with the file, in words.
pub fn module_dependencies(file: &[u8]) -> std::result::Result<Vec<String>, String> {
    dependencies(&object_file(file.to_vec())?)
}

/// The names after `depends=` in `.modinfo`: strings that each end with a NUL byte.
fn dependencies(module: &[u8]) -> std::result::Result<Vec<String>, String> {
    let file =
        ElfBytes::<LittleEndian>::minimal_parse(module).map_err(|error| error.to_string())?;
    let header = file
        .section_header_by_name(".modinfo")
        .map_err(|error| error.to_string())?
        .ok_or("it has no .modinfo section")?;
    let (data, _) = file
        .section_data(&header)
        .map_err(|error| error.to_string())?;
    let names = data
        .split(|byte| *byte == 0)
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .filter_map(|names| std::str::from_utf8(names).ok())
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(normalise)
        .collect();
    Ok(names)
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
