//! An emergency initramfs: a shell, and the programs with which a pool is imported and read, out of the system that
//! it is to rescue.
//!
//! The programs are copied with the libraries that they name, so they fit the pools of that system. The kernel has to
//! have drivers and ZFS built in: no module is loaded. Nothing is mounted for writing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use cpio::newc::trailer;
use elf::ElfBytes;
use elf::abi::{DT_NEEDED, PT_INTERP};
use elf::endian::AnyEndian;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::initramfs::Archive;
use crate::{KernelError, Result};

/// Process 1.
const INIT: &str = include_str!("rescue-init.sh");
/// The shell and all that belongs to it.
const BUSYBOX: &str = "busybox";
/// Where it is in the archive.
const SHELL: &str = "usr/bin/busybox";
/// Programs that are taken where the system has them.
const OPTIONAL: [&str; 4] = ["zpool", "zfs", "zdb", "mount.zfs"];
/// Opened by the C library while a program runs, so that no program names it.
const OPENED_LATER: &str = "libgcc_s.so.1";
const PROGRAM_DIRECTORIES: [&str; 4] = ["usr/sbin", "usr/bin", "sbin", "bin"];
/// Where the dynamic loaders of distributions look.
const LIBRARY_DIRECTORIES: [&str; 8] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib64",
    "usr/lib64",
    "lib",
    "usr/lib",
];
const FILE_MAX_BYTES: u64 = 64 << 20;
const TOTAL_MAX_BYTES: u64 = 256 << 20;
const FILES_MAX: usize = 500;

/// An emergency initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rescue {
    /// The archive.
    pub bytes: Vec<u8>,
    /// The programs and libraries in it.
    pub files: Vec<String>,
    /// Programs for pools that the system does not have.
    pub missing: Vec<&'static str>,
}

/// Makes one of the programs below a root directory, with `additional` ones.
///
/// # Errors
/// [`KernelError::Rescue`] where the shell or an additional program is not there, or a library.
pub fn rescue(root: &Path, additional: &[String]) -> Result<Rescue> {
    let mut collected = Collected::new(root)?;
    let mut missing = Vec::new();
    if !collected.program(BUSYBOX)? {
        return Err(collected.refuse("it has no busybox: install busybox-static there"));
    }
    // Process 1 is a script of it, which has to know where it is.
    if let Some(bytes) = collected.files.remove("bin/busybox") {
        collected.files.insert(SHELL.to_owned(), bytes);
        collected.pending = [SHELL.to_owned()].into();
    }
    for name in additional {
        if !collected.program(name)? {
            return Err(collected.refuse(&format!("it has no program '{name}'")));
        }
    }
    for name in OPTIONAL {
        if !collected.program(name)? {
            missing.push(name);
        }
    }
    collected.libraries()?;
    let files: Vec<String> = collected.files.keys().cloned().collect();
    let bytes = pack(&collected.files).map_err(KernelError::file(
        "pack",
        Path::new("the emergency initramfs"),
    ))?;
    Ok(Rescue {
        bytes,
        files,
        missing,
    })
}

fn pack(files: &BTreeMap<String, Vec<u8>>) -> std::io::Result<Vec<u8>> {
    let mut directories: BTreeSet<&Path> = ["dev", "proc", "sys", "run", "tmp", "mnt"]
        .map(Path::new)
        .into();
    for path in files.keys() {
        let parents = Path::new(path).ancestors().skip(1);
        directories.extend(parents.filter(|parent| !parent.as_os_str().is_empty()));
    }
    let mut archive = Archive::default();
    // A directory comes before what is in it.
    for directory in directories {
        archive.directory(&directory.to_string_lossy())?;
    }
    archive.console("dev/console")?;
    for (path, bytes) in files {
        archive.file(path, 0o755, bytes)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    trailer(archive.bytes)
}

/// Files by their path below the root.
struct Collected {
    root: File,
    path: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
    bytes: u64,
    pending: VecDeque<String>,
}

impl Collected {
    fn new(root: &Path) -> Result<Self> {
        let opened = File::open(root);
        Ok(Self {
            root: opened.map_err(KernelError::file("use the root directory", root))?,
            path: root.to_owned(),
            files: BTreeMap::new(),
            bytes: 0,
            pending: VecDeque::new(),
        })
    }

    fn refuse(&self, reason: &str) -> KernelError {
        KernelError::Rescue {
            root: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    /// Takes a program; tells whether it is there.
    fn program(&mut self, name: &str) -> Result<bool> {
        if name.is_empty() || name.contains('/') {
            return Err(self.refuse(&format!("'{name}' is no name of a program")));
        }
        self.first(&PROGRAM_DIRECTORIES, name)
    }

    /// Takes the first file of this name in one of the directories; tells whether there is one.
    fn first(&mut self, directories: &[&str], name: &str) -> Result<bool> {
        for directory in directories {
            if self.take(&format!("{directory}/{name}"))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes a file; links are followed within the root.
    fn take(&mut self, path: &str) -> Result<bool> {
        if self.files.contains_key(path) {
            return Ok(true);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = rustix::fs::openat2(
            &self.root,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        );
        let file = match opened {
            Ok(descriptor) => File::from(descriptor),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(false),
            Err(errno) => {
                return Err(KernelError::file("read", self.path.join(path))(
                    errno.into(),
                ));
            }
        };
        let failed = |error| KernelError::file("read", self.path.join(path))(error);
        if !file.metadata().map_err(failed)?.is_file() {
            return Ok(false);
        }
        let mut bytes = Vec::new();
        let read = file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes);
        let length = read.map_err(failed)? as u64;
        self.bytes += length;
        if length > FILE_MAX_BYTES || self.bytes > TOTAL_MAX_BYTES || self.files.len() >= FILES_MAX
        {
            return Err(self.refuse(&format!("{path} and what belongs to it are too large")));
        }
        self.files.insert(path.to_owned(), bytes);
        self.pending.push_back(path.to_owned());
        Ok(true)
    }

    /// Takes the libraries that the files name, and those that these name.
    fn libraries(&mut self) -> Result<()> {
        let mut any = false;
        while let Some(path) = self.pending.pop_front() {
            let needs = needs(&self.files[&path]);
            any |= !needs.libraries.is_empty();
            if let Some(loader) = needs.loader
                && !self.take(loader.trim_start_matches('/'))?
            {
                return Err(self.refuse(&format!("{path} needs {loader}, which is not there")));
            }
            for library in needs.libraries {
                if library.contains('/') || !self.first(&LIBRARY_DIRECTORIES, &library)? {
                    return Err(self.refuse(&format!("{path} needs {library}, which is not there")));
                }
            }
            if any && self.pending.is_empty() {
                self.first(&LIBRARY_DIRECTORIES, OPENED_LATER)?;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Needs {
    loader: Option<String>,
    libraries: Vec<String>,
}

/// What a program or library names; a script or a static program names nothing.
fn needs(bytes: &[u8]) -> Needs {
    let mut needs = Needs::default();
    let Ok(file) = ElfBytes::<AnyEndian>::minimal_parse(bytes) else {
        return needs;
    };
    let interpreter = file
        .segments()
        .and_then(|segments| segments.iter().find(|segment| segment.p_type == PT_INTERP));
    needs.loader = interpreter.and_then(|segment| {
        let text = file.segment_data(&segment).ok()?;
        let text = text.split(|byte| *byte == 0).next()?;
        Some(std::str::from_utf8(text).ok()?.to_owned())
    });
    // The names are in the table that the sections tell of.
    if let Ok(common) = file.find_common_data()
        && let (Some(dynamic), Some(names)) = (common.dynamic, common.dynsyms_strs)
    {
        let needed = dynamic.iter().filter(|entry| entry.d_tag == DT_NEEDED);
        let names = needed.filter_map(|entry| names.get(usize::try_from(entry.d_val()).ok()?).ok());
        needs.libraries = names.map(str::to_owned).collect();
    }
    needs
}
