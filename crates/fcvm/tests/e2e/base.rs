//! What all tests share, made once: programs, the guest kernel (kept between runs), the images.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::hypervisor::Hypervisor;
use crate::image::{self, Image, Layer};
use crate::process;

/// Image with busybox, users, no entrypoint.
pub(crate) const IMAGE: &str = "test:1";
/// Image with an entrypoint, a command, a user, a directory, variables and a stop signal.
pub(crate) const ENTRY_IMAGE: &str = "entry:1";
/// How often it is asked whether KVM runs guests.
const PROBES_MAX: usize = 20;

/// What the tests need of the machine.
pub(crate) struct Base {
    pub(crate) program: PathBuf,
    pub(crate) agent: PathBuf,
    /// Agents that never answer, and that end at once.
    pub(crate) silent_agent: PathBuf,
    pub(crate) ending_agent: PathBuf,
    /// Data directory with kernel and images.
    pub(crate) data: PathBuf,
    /// OCI layout of the suite's image.
    pub(crate) layout: PathBuf,
    /// Layer of the suite's image.
    pub(crate) layer: Vec<u8>,
    /// Held for the whole run: two runs of the suite must not prepare one directory.
    _lock: File,
}

/// The base; where the machine lacks something, the reason is printed and the test is skipped.
pub(crate) fn base() -> Option<&'static Base> {
    static BASE: OnceLock<Result<Base, String>> = OnceLock::new();
    match BASE.get_or_init(prepare) {
        Ok(base) => Some(base),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn target() -> PathBuf {
    // target/tmp, whatever the target directory is.
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn prepare() -> Result<Base, String> {
    let busybox =
        image::find_busybox().ok_or("busybox is not installed (package busybox-static)")?;
    for program in ["qemu-system-x86_64", "prlimit", "setsid"] {
        if find(program).is_none() {
            return Err(format!("{program} is not installed"));
        }
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e");
    fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let lock = File::create(directory.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    let data = directory.join("data");
    for stale in ["images", "disks", "vms", "run", "jails"] {
        let _ = fs::remove_dir_all(data.join(stale));
    }
    let layout = directory.join("layout");
    let _ = fs::remove_dir_all(&layout);
    let tool = compile(&directory, "tool");
    let base = Base {
        program: program(),
        agent: build_agent(),
        ending_agent: compile(&directory, "ends"),
        layer: image::busybox_layer(&busybox, &tool),
        silent_agent: tool,
        data,
        layout,
        _lock: lock,
    };
    base.check_hypervisor()?;
    base.setup_kernel()?;
    base.make_images(&directory);
    Ok(base)
}

impl Base {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        command
            .env("FCVM_DATA_DIR", &self.data)
            .env("FCVM_RUNTIME_DIR", self.data.join("run"));
        command.env("FCVM_AGENT_BIN", &self.agent);
        let hypervisor = Hypervisor::of_suite();
        command
            .env("FCVM_HYPERVISOR", hypervisor.name())
            .env("FCVM_ACCEL", hypervisor.accelerator());
        command
    }

    /// Whether the host has what `FCVM_TEST_HYPERVISOR` names, or why not.
    fn check_hypervisor(&self) -> Result<(), String> {
        let hypervisor = Hypervisor::of_suite();
        let title = hypervisor.title();
        if !hypervisor.is_qemu() && hypervisor.program().is_none() {
            return Err(format!(
                "FCVM_FIRECRACKER_BIN names no {title}, and PATH has none"
            ));
        }
        let mut found = String::new();
        // On a busy host the test guest can be slower than is waited for.
        for _ in 0..PROBES_MAX {
            if !hypervisor.needs_kvm() || found.starts_with("kvm:") {
                return Ok(());
            }
            let output = process::run(self.command(&["setup", "preflight", "--format", "json"]));
            let told: Value = serde_json::from_slice(&output.stdout)
                .unwrap_or_else(|error| panic!("{error}: {output:?}"));
            let checks = told["checks"].as_array().unwrap();
            let of_kvm = checks.iter().find(|check| check["check"] == "accelerator");
            found = of_kvm.unwrap()["found"].as_str().unwrap().to_owned();
        }
        Err(format!("{title} needs KVM: {found}"))
    }

    /// Brings the kernel that `FCVM_TEST_KERNEL_DIR` names, where it is one that setup has made.
    fn bring_kernel(&self) {
        let named = std::env::var_os("FCVM_TEST_KERNEL_DIR").map(fs::canonicalize);
        let (Some(Ok(kernel)), kernels) = (named, self.data.join("kernels")) else {
            return;
        };
        let (name, current) = (kernel.file_name().unwrap(), kernels.join("current"));
        if fs::read_link(&current).is_ok_and(|target| target == name) {
            return;
        }
        fs::create_dir_all(&kernels).unwrap();
        process::must(
            "cp",
            &["-a", kernel.to_str().unwrap(), kernels.to_str().unwrap()],
        );
        let _ = fs::remove_file(&current);
        std::os::unix::fs::symlink(name, current).unwrap();
    }

    fn setup_kernel(&self) -> Result<(), String> {
        self.bring_kernel();
        let output = process::run(self.command(&["setup", "kernel"]));
        if output.code == 0 {
            return Ok(());
        }
        // Without Debian's packages in reach there is nothing to boot; anything else is a bug.
        let absent = [
            "package sources",
            "cannot start 'apt",
            "Could not resolve",
            "Temporary failure",
        ];
        assert!(
            absent.iter().any(|text| output.stderr.contains(text)),
            "fcvm setup kernel: {output:?}"
        );
        Err(format!(
            "no guest kernel can be fetched: {}",
            output.stderr.trim()
        ))
    }

    fn make_images(&self, directory: &Path) {
        let source = format!("oci:{}", self.layout.display());
        Image {
            config: json!({"Cmd": ["sh"], "Env": ["FROM_IMAGE=yes"]}),
            ..Image::of(vec![self.layer.clone()])
        }
        .write(&self.layout, "latest");
        self.must(&["image", "import", &source, IMAGE]);
        let entry = directory.join("entry");
        let _ = fs::remove_dir_all(&entry);
        let config = json!({
            "Entrypoint": ["/bin/echo", "entry"],
            "Cmd": ["default"],
            "Env": ["PATH=/bin", "GREETING=hello"],
            "User": "app",
            "WorkingDir": "/home/app",
            "StopSignal": "SIGUSR1",
        });
        let second = Layer::new()
            .file("data/second", 0o644, b"second layer\n")
            .finish();
        Image {
            config,
            ..Image::of(vec![self.layer.clone(), second])
        }
        .write(&entry, "latest");
        self.must(&[
            "image",
            "import",
            &format!("oci:{}", entry.display()),
            ENTRY_IMAGE,
        ]);
        // Converts both, so that no test pays for it or races for it.
        for image in [IMAGE, ENTRY_IMAGE] {
            self.must(&["run", "--rm", "--network", "none", image]);
        }
    }

    fn must(&self, arguments: &[&str]) {
        let output = process::run(self.command(arguments));
        assert!(output.code == 0, "fcvm {arguments:?}: {output:?}");
    }
}

/// A program of the host.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// A static program out of a file in `guest/`, made where an earlier run has not left it.
fn compile(directory: &Path, name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/e2e/guest")
        .join(format!("{name}.rs"));
    let program = directory.join(name);
    let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    if time(&program).is_ok_and(|made| made > time(&source).unwrap()) {
        return program;
    }
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let options = [
        "--edition=2024",
        "-O",
        "-Cstrip=symbols",
        "-Ctarget-feature=+crt-static",
        "--target",
        &target,
        "-o",
    ];
    let options = [
        &options[..],
        &[program.to_str().unwrap(), source.to_str().unwrap()],
    ]
    .concat();
    process::must(&rustc, &options);
    program
}

/// The program under test: the one that was built with the suite, or an installed one.
fn program() -> PathBuf {
    std::env::var_os("FCVM_TEST_PROGRAM")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_fcvm").into())
        .into()
}

/// The agent as the product builds it.
fn build_agent() -> PathBuf {
    if let Some(agent) = std::env::var_os("FCVM_AGENT_BIN") {
        return agent.into();
    }
    let mut command = Command::new("make");
    command
        .args(["-s", "agent"])
        .env("CARGO", env!("CARGO"))
        .current_dir(workspace());
    command.env("CARGO_TARGET_DIR", target());
    let output = process::run(command);
    assert!(output.code == 0, "the agent does not build: {output:?}");
    target().join("agent/fc-agent")
}
