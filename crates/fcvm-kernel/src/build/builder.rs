//! Building: the cache by content, `make`, and its progress.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{Make, PLAIN_LLVM, check_tools, fetch_output, first_error, newest_llvm};
use super::profile::{Profile, Use};
use super::resolve::{self, Resolved};
use super::source::Source;
use super::store::{self, BuiltKernel};
use super::zfs::{self, Zfs};
use super::{BuildError, Directories, Result, check_space};
use crate::files;
use crate::progress::{Progress, SetupEvent, SetupStage};

/// Part of every key, so that a kernel that an older program stored in another way is built again.
const KEY_VERSION: u32 = 2;
/// Digits of the key in a kernel's name.
const KEY_CHARS: usize = 10;
/// What the objects of a guest's kernel take, and of a host's.
const OBJECTS_MB: (u64, u64) = (1_000, 4_000);
/// What linking with full LTO takes.
const FULL_LTO_MB: u64 = 6_000;
/// Objects for each symbol that is on, where no earlier build told: what a guest's kernel has.
const OBJECTS_PER_SYMBOL: f64 = 1.9;

/// Optimisation across files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lto {
    /// None: gcc.
    #[default]
    None,
    /// clang's thin one.
    Thin,
    /// clang's full one: needs much memory.
    Full,
}

/// How to build.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Jobs at a time.
    pub jobs: usize,
    /// Optimisation across files.
    pub lto: Lto,
    /// The processor to build for, as the compiler names it.
    pub march: Option<String>,
    /// The caller's `PATH`.
    pub search_path: OsString,
}

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Of the kernel: profile, release and key.
    pub name: String,
    /// Of what.
    pub source: Source,
    /// By which profile.
    pub profile: Profile,
    /// OpenZFS, where it is built in from a source of ours.
    pub zfs: Option<Zfs>,
    /// The configuration.
    pub resolved: Resolved,
    /// How.
    pub options: BuildOptions,
    /// SHA-256 over all inputs.
    pub key: String,
}

impl Lto {
    /// The symbol that asks for it.
    pub fn setting(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Thin => Some("CONFIG_LTO_CLANG_THIN=y"),
            Self::Full => Some("CONFIG_LTO_CLANG_FULL=y"),
        }
    }
}

impl Lto {
    fn check_memory(self, available_mb: u64) -> Result<()> {
        match self == Self::Full && available_mb < FULL_LTO_MB {
            true => Err(BuildError::Memory {
                needed_mb: FULL_LTO_MB,
                available_mb,
            }),
            false => Ok(()),
        }
    }
}

impl BuildOptions {
    /// How `make` is started for these.
    pub fn make(&self) -> Make {
        Make {
            llvm: (self.lto != Lto::None).then(|| newest_llvm(&self.search_path)),
        }
    }

    /// Fails for what cannot work, before anything is fetched or built.
    ///
    /// # Errors
    /// [`BuildError::Options`], [`BuildError::Memory`].
    pub fn check(&self) -> Result<()> {
        if let Some(march) = &self.march {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if march.is_empty() || march.starts_with('-') || !march.bytes().all(known) {
                return Err(BuildError::Options(format!(
                    "--march '{march}' is no processor such as x86-64-v3 or native"
                )));
            }
        }
        self.lto.check_memory(available_memory_mb())
    }
}

/// Configures, and names what would be built.
///
/// # Errors
/// Any of [`resolve::resolve`]; [`BuildError::Options`] where a symbol is lost.
pub fn plan(
    directories: &Directories,
    source: Source,
    zfs: Option<Zfs>,
    profile: Profile,
    options: BuildOptions,
) -> Result<Plan> {
    options.check()?;
    check_tools(&options.search_path, options.lto != Lto::None, &[], false)?;
    let output = directories.resolving(&source);
    files::create_dir(&output)?;
    let resolved = {
        let _lock = files::lock(&output, &mut |_| {})?;
        resolve::resolve(&source, &profile, &output, &options.make())?
    };
    resolved.check()?;
    let march = options.march.as_deref().unwrap_or_default();
    // The values and not the text: a symbol that is off is the same as one that is not known.
    let inputs = format!(
        "{KEY_VERSION}\n{}\n{:?}\n{march}\n{}\n{:?}",
        source.id,
        zfs.as_ref().map(|zfs| &zfs.id),
        options.make().llvm.is_some(),
        resolved.values
    );
    let key = files::sha256_hex(inputs.as_bytes());
    Ok(Plan {
        name: format!(
            "{}-{}-{}",
            profile.kernel_name(),
            source.release,
            &key[..KEY_CHARS]
        ),
        source,
        profile,
        zfs,
        resolved,
        options,
        key,
    })
}

/// Builds what was planned; a kernel of the same inputs that is there already is returned at once.
///
/// A build that was interrupted goes on where it was; of two at once, one waits for the other.
///
/// # Errors
/// [`BuildError::Missing`], [`BuildError::Space`], [`BuildError::Failed`], [`BuildError::File`].
pub fn build(
    directories: &Directories,
    plan: &Plan,
    progress: Progress<'_>,
) -> Result<BuiltKernel> {
    if let Some(kernel) = cached(directories, plan) {
        return Ok(kernel);
    }
    let work = directories.work.join(&plan.source.id);
    let variant = match plan.options.make().llvm.is_some() {
        true => format!("{}-llvm", plan.profile.name),
        false => plan.profile.name.clone(),
    };
    let lock = work.join(format!("{variant}.lock"));
    files::create_dir(&lock)?;
    let lock = files::lock(&lock, progress)?;
    if let Some(kernel) = cached(directories, plan) {
        return Ok(kernel);
    }
    check_needs(plan)?;
    let output = work.join(&variant);
    files::create_dir(&output)?;
    let objects_mb = match plan.profile.used_for {
        Use::Guest => OBJECTS_MB.0,
        Use::Host => OBJECTS_MB.1,
    };
    // One that goes on has most of its objects already.
    if !output.join("vmlinux.a").exists() {
        check_space(&output, objects_mb, "building")?;
    }
    write_config(&output.join(".config"), &plan.resolved.text)?;
    let log = work.join(format!("{variant}.log"));
    // Held until the kernel is there: a newer ZFS would change the source.
    let _zfs = match &plan.zfs {
        Some(zfs) => {
            let log = work.join(format!("{variant}.zfs.log"));
            Some(zfs::add(plan, zfs, &output, &log, progress)?)
        }
        None => None,
    };
    let object_count = make(directories, plan, &output, (&lock, &log), progress)?;
    let built = read_back(plan, &output)?;
    progress(SetupEvent::start(SetupStage::Store, plan.name.clone()));
    store::put(directories, plan, &output, &log, object_count, built)
}

fn cached(directories: &Directories, plan: &Plan) -> Option<BuiltKernel> {
    // A directory of the user's may have changed without anyone telling: make decides then.
    if !plan.source.is_fixed {
        return None;
    }
    let kernel = BuiltKernel::read(&directories.built.join(&plan.name)).ok()?;
    (kernel.key == plan.key && kernel.check().is_ok()).then_some(kernel)
}

/// Programs and headers that this configuration asks for.
fn check_needs(plan: &Plan) -> Result<()> {
    let mut extra = Vec::new();
    let values = &plan.resolved.values;
    let is_on = |symbol: &str| values.contains_key(symbol);
    for (symbol, program, package) in [
        ("KERNEL_LZ4", "lz4", "lz4"),
        ("KERNEL_ZSTD", "zstd", "zstd"),
        ("DEBUG_INFO_BTF", "pahole", "pahole"),
    ] {
        if is_on(symbol) {
            extra.push((program, package));
        }
    }
    check_tools(
        &plan.options.search_path,
        plan.options.make().llvm.is_some(),
        &extra,
        true,
    )
}

/// Writes it where it differs: make looks at the time.
fn write_config(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(BuildError::file("write", path))
}

/// Runs make to its end; returns how many objects there are.
///
/// The lock is make's standard input, an empty file: where this process is killed it is held until make has noticed.
fn make(
    directories: &Directories,
    plan: &Plan,
    output: &Path,
    (lock, log): (&File, &Path),
    progress: Progress<'_>,
) -> Result<u64> {
    let expected = store::expected_objects(directories, plan)
        .unwrap_or((plan.resolved.values.len() as f64 * OBJECTS_PER_SYMBOL) as u64);
    let mut done = count_objects(output);
    let failed = |reason: String| BuildError::Failed {
        action: format!("building {}", plan.name),
        reason,
        log: Some(log.to_owned()),
    };
    let (reader, writer) = std::io::pipe().map_err(|error| failed(error.to_string()))?;
    let errors = writer
        .try_clone()
        .map_err(|error| failed(error.to_string()))?;
    let mut log_file = File::create(log).map_err(BuildError::file("create", log))?;
    let held = lock
        .try_clone()
        .map_err(|error| failed(error.to_string()))?;
    let mut command = build_command(plan, output);
    let mut child = command
        .stdin(held)
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .map_err(|error| failed(format!("cannot start make: {error}")))?;
    // The command holds the pipe's other end open.
    drop(command);
    let mut event = |done: u64, detail: &str| {
        progress(SetupEvent {
            stage: SetupStage::Build,
            done: done.min(expected),
            total: Some(expected),
            detail: detail.to_owned(),
        });
    };
    event(done, "");
    for line in BufReader::new(reader).split(b'\n') {
        let Ok(line) = line else { break };
        // A log that cannot be written on is told of by make itself: its disk is the same.
        let _ = log_file.write_all(&line);
        let _ = log_file.write_all(b"\n");
        let text = String::from_utf8_lossy(&line);
        if let Some(object) = compiled(&text) {
            done += 1;
            event(done, object);
        }
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        let text = fs::read(log).unwrap_or_default();
        let reason = first_error(&String::from_utf8_lossy(&text));
        return Err(failed(match reason.contains("No space left on device") {
            true => format!("the disk is full ({}): {reason}", output.display()),
            false => reason,
        }));
    }
    Ok(count_objects(output))
}

fn build_command(plan: &Plan, output: &Path) -> Command {
    let mut command = plan.options.make().command(&plan.source, output);
    command.arg(format!("--jobs={}", plan.options.jobs.max(1)));
    if let Some(march) = &plan.options.march {
        command.arg(format!("KCFLAGS=-march={march}"));
    }
    // ZFS may have been made known to the source since it was configured.
    command.args(["olddefconfig", "bzImage"]);
    command
}

/// The file that a line of make's tells of: `  CC      fs/ext4/inode.o`.
fn compiled(line: &str) -> Option<&str> {
    let mut words = line.strip_prefix("  ")?.split_whitespace();
    let (verb, object) = (words.next()?, words.next()?);
    (matches!(verb, "CC" | "AS") && object.ends_with(".o")).then_some(object)
}

/// Compiled objects below a directory.
fn count_objects(directory: &Path) -> u64 {
    let mut count = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(entry.path()),
                // Those that are put together of others do not count as work.
                Ok(_) if name.ends_with(b".o") && name != b"built-in.o" => count += 1,
                _ => {}
            }
        }
    }
    count
}

/// The release that the kernel will tell, after the configuration is seen to be the planned one.
fn read_back(plan: &Plan, output: &Path) -> Result<PathBuf> {
    let text = resolve::read_config(&output.join(".config"))?;
    let now = resolve::parse_config(&text);
    match resolve::difference(&plan.resolved.values, &now).first() {
        None => Ok(output.join("vmlinux")),
        Some(differing) => Err(BuildError::Failed {
            action: format!("building {}", plan.name),
            reason: format!(
                "make changed CONFIG_{} from {} to {}",
                differing.symbol, differing.first, differing.second
            ),
            log: None,
        }),
    }
}

/// Takes the symbol tables out: the hypervisor reads the file at every start.
pub(crate) fn strip(plan: &Plan, vmlinux: &Path, target: &Path) -> Result<()> {
    let program = match plan.options.make().llvm.as_deref() {
        None => "objcopy".to_owned(),
        Some(PLAIN_LLVM) => "llvm-objcopy".to_owned(),
        Some(version) => format!("llvm-objcopy{version}"),
    };
    let mut command = Command::new(program);
    command.arg("--strip-all").arg(vmlinux).arg(target);
    fetch_output("stripping the kernel (objcopy)", &mut command).map(drop)
}

fn available_memory_mb() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_what_make_writes() {
        assert_eq!(
            compiled("  CC      fs/ext4/inode.o"),
            Some("fs/ext4/inode.o")
        );
        assert_eq!(
            compiled("  AS      arch/x86/entry.o"),
            Some("arch/x86/entry.o")
        );
        for line in [
            "  LD      vmlinux.o",
            "  HOSTCC  scripts/x.o",
            "CC",
            "",
            "  CC",
        ] {
            assert_eq!(compiled(line), None);
        }
    }

    #[test]
    fn full_lto_needs_memory_and_says_so_before_it_starts() {
        let message = Lto::Full.check_memory(5_999).unwrap_err().to_string();
        assert!(
            message.contains("6000 MB") && message.contains("--lto thin"),
            "{message}"
        );
        Lto::Full.check_memory(6_000).unwrap();
        Lto::Thin.check_memory(100).unwrap();
    }

    #[test]
    fn a_processor_that_is_none_is_refused() {
        for march in ["", "-x", "native;rm", "a b"] {
            let options = BuildOptions {
                march: Some(march.to_owned()),
                ..BuildOptions::default()
            };
            assert!(options.check().is_err(), "{march}");
        }
    }
}
