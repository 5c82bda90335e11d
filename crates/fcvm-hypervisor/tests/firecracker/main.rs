//! The Firecracker driver against a strict stand-in, which runs everywhere: what it asks for, and what
//! it makes of every way in which that can fail; and against the real one where there is one (`real.rs`).

#[path = "../qemu/elf.rs"]
mod elf;
mod fake;
mod jail;
mod real;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fake::{Behaviour, Fault};
use fcvm_hypervisor::firecracker::{
    DeviceLine, Firecracker, FirecrackerStandby, FirecrackerVm, SavedMemory,
};
use fcvm_hypervisor::{
    Accelerator, AgentChannel, BootSpec, DeviceState, DiskFormat, DiskLayer, DiskSpec, ExitCause,
    GuestMemory, HardwareSpec, HypervisorError, Launch, LaunchSpec, MemoryBackend, NetworkBackend,
    NetworkSpec, Pause, RestoreState,
};
use fcvm_types::ByteSize;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

/// What the VMs have.
const MEMORY_BYTES: u64 = 128 << 20;

/// Not a test: the stand-in's process.
#[test]
#[ignore = "started by the other tests"]
fn fake_firecracker() {
    fake::main();
}

/// A place with a stand-in, and what a VM is made of.
struct Place {
    directory: TempDir,
    program: PathBuf,
}

impl Place {
    fn new(behaviour: Behaviour<'_>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = fake::install(directory.path(), behaviour);
        for name in ["kernel", "initramfs"] {
            fs::write(directory.path().join(name), name).unwrap();
        }
        Self { directory, program }
    }

    fn faulty(fault: Fault, request: &str) -> Self {
        Self::new(Behaviour {
            fault: Some((fault, request)),
            ..Behaviour::default()
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn firecracker(&self) -> Firecracker {
        Firecracker::locate(Some(&self.program), "", self.path("vm")).unwrap()
    }

    /// A specification with two disks, and the reading end of its console.
    fn spec(&self) -> (LaunchSpec, File) {
        let (reader, writer) = std::io::pipe().unwrap();
        let root = self.path("kernel");
        let spec = LaunchSpec {
            hardware: HardwareSpec {
                cpu_count: 3,
                memory: GuestMemory::new(ByteSize::from_bytes(MEMORY_BYTES)).unwrap(),
                disks: vec![
                    DiskSpec::raw(File::open(root).unwrap(), "fcvm-root", true),
                    // A file without a name, as a VM's own disk is.
                    DiskSpec::raw(tempfile::tempfile().unwrap(), "fcvm-scratch", false),
                ],
                network: None,
                accelerator: Accelerator::Kvm,
                translation_cache: ByteSize::from_mib(1),
                console: writer.into(),
            },
            boot: BootSpec {
                kernel: self.path("kernel"),
                initramfs: Some(self.path("initramfs")),
                extra_kernel_args: vec!["loglevel=7".to_owned()],
            },
        };
        (spec, File::from(OwnedFd::from(reader)))
    }

    async fn launch(&self) -> Result<FirecrackerVm, HypervisorError> {
        self.firecracker().launch(self.spec().0).await
    }

    async fn failure(&self) -> HypervisorError {
        let error = self.launch().await.expect_err("the launch had to fail");
        assert!(
            !self.path("vm").exists(),
            "the VM's directory was left: {error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
        error
    }
}

async fn first_words(channel: AgentChannel) -> Vec<u8> {
    let (mut stream, _listener) = channel.connected().await.unwrap();
    let mut words = vec![0; fake::AGENT_TEXT.len()];
    stream.read_exact(&mut words).await.unwrap();
    words
}

#[tokio::test]
async fn a_vm_runs_pauses_goes_on_and_is_killed() {
    let place = Place::new(Behaviour::default());
    let (spec, mut console) = place.spec();
    let mut vm = place.firecracker().launch(spec).await.unwrap();
    assert_eq!(vm.device_line().firecracker_version.to_string(), "1.17.0");
    let channel = vm.take_agent().unwrap();
    assert_eq!(first_words(channel).await, fake::AGENT_TEXT);
    assert!(vm.take_agent().is_none());

    assert!(vm.is_running().await.unwrap());
    vm.pause().await.unwrap();
    vm.pause().await.unwrap();
    assert!(!vm.is_running().await.unwrap());
    vm.resume().await.unwrap();
    assert!(vm.is_running().await.unwrap());

    for sum in [4096, 8192] {
        let counters = vm.counters().await.unwrap();
        assert_eq!(counters["block.read_bytes"], sum);
        assert_eq!(counters.len(), 1);
    }

    vm.kill();
    assert_eq!(vm.wait_exit().await.cause, ExitCause::Killed(9));
    assert_eq!(vm.next_event().await, None);
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert!(text.contains(fake::CONSOLE_TEXT), "{text}");
    drop(vm);
    assert!(!place.path("vm").exists());
}

#[tokio::test]
async fn devices_may_be_on_a_pci_bus() {
    let place = Place::new(Behaviour::default());
    let firecracker = place.firecracker().with_pci(true);
    let vm = firecracker.launch(place.spec().0).await.unwrap();
    assert!(vm.is_running().await.unwrap());
}

#[tokio::test]
async fn what_is_dropped_ends_and_leaves_nothing() {
    let place = Place::new(Behaviour::default());
    let vm = place.launch().await.unwrap();
    let process = format!("/proc/{}", vm.identity().pid);
    assert!(Path::new(&process).exists());
    drop(vm);
    assert!(!Path::new(&process).exists());
    assert!(!place.path("vm").exists());
}

#[tokio::test]
async fn a_socket_that_is_listened_on_late_is_waited_for() {
    let place = Place::new(Behaviour {
        late: true,
        ..Behaviour::default()
    });
    let vm = place.launch().await.unwrap();
    assert!(vm.is_running().await.unwrap());
}

#[tokio::test]
async fn versions_outside_of_the_range_are_refused() {
    for (version, words) in [
        ("1.12.1", "is too old: a version from 1.13.0 on"),
        ("0.25.2", "is too old"),
        (
            "2.0.0",
            "is too new: a version from 1.13.0 on and before 2.0.0",
        ),
    ] {
        let place = Place::new(Behaviour {
            version,
            ..Behaviour::default()
        });
        let error = place.failure().await;
        assert!(matches!(error, HypervisorError::Version { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        let error = place.firecracker().check_version().unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    let newest = Place::new(Behaviour {
        version: "1.99.3",
        ..Behaviour::default()
    });
    assert_eq!(
        newest.firecracker().check_version().unwrap().to_string(),
        "1.99.3"
    );
}

#[tokio::test]
async fn another_program_or_none_is_told_from_firecracker() {
    let place = Place::new(Behaviour::default());
    let missing = Firecracker::locate(Some(&place.path("gone")), "", place.path("vm"));
    let error = missing.unwrap_err().to_string();
    assert!(error.starts_with("Firecracker was not found ("), "{error}");
    assert!(error.contains("FCVM_FIRECRACKER_BIN"), "{error}");
    let search_path = place.directory.path().display().to_string();
    let found = Firecracker::locate(None, &search_path, place.path("vm")).unwrap();
    assert_eq!(found.program(), place.program);
    assert!(Firecracker::locate(None, "/nowhere", place.path("vm")).is_err());

    fcvm_testing::write_program(&place.program, "#!/bin/sh\necho 'sandboxd 2'\n");
    let error = place.failure().await;
    assert!(matches!(error, HypervisorError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("it printed 'sandboxd 2'"));
    fcvm_testing::write_program(&place.program, "#!/nowhere/sh\n");
    let error = place.failure().await;
    assert!(matches!(error, HypervisorError::Spawn { .. }), "{error}");
    let end = "#!/bin/sh\n[ \"$1\" = --version ] && exec echo Firecracker v1.14.0\n\
               echo 'Error: ParseArguments(UnexpectedArgument)' >&2\nexit 153\n";
    fcvm_testing::write_program(&place.program, end);
    let error = place.failure().await.to_string();
    assert_eq!(
        error,
        "the VM did not start: firecracker exited with status 153: Error: ParseArguments(UnexpectedArgument)"
    );
}

/// The requests of a launch.
const REQUESTS: [&str; 10] = [
    "GET /version",
    "PUT /metrics",
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/disk0",
    "PUT /drives/disk1",
    "PUT /vsock",
    "PUT /entropy",
    "PUT /actions",
    "PATCH /vm",
];

/// A VM that is paused as soon as it runs.
async fn launch_and_pause(place: &Place) -> Result<(), HypervisorError> {
    place.launch().await?.pause().await
}

#[tokio::test]
async fn a_refusal_is_told_with_firecrackers_reason() {
    for request in &REQUESTS[1..] {
        let place = Place::faulty(Fault::Refuse, request);
        let error = launch_and_pause(&place).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("Firecracker refused '{request}': The kernel file is 'odd'.")
        );
        assert!(!place.path("vm").exists());
    }
    let place = Place::faulty(Fault::Silent, "PUT /vsock");
    let error = place.failure().await.to_string();
    assert!(
        error.ends_with("it answered with status 500 and no reason"),
        "{error}"
    );
}

#[tokio::test]
async fn a_death_is_told_with_the_last_words() {
    for request in &REQUESTS[..REQUESTS.len() - 1] {
        let place = Place::faulty(Fault::Die, request);
        let error = place.failure().await;
        assert_eq!(
            error.to_string(),
            "the VM did not start: firecracker exited with status 1: Error: the fake gives up",
            "at {request}"
        );
    }
    let place = Place::faulty(Fault::Die, "PATCH /vm");
    let vm = place.launch().await.unwrap();
    let error = vm.pause().await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::Disconnected { .. }),
        "{error}"
    );
    assert_eq!(vm.wait_exit().await.cause, ExitCause::Failed);
}

#[tokio::test]
async fn a_guests_reset_is_the_end_of_its_vm() {
    let place = Place::faulty(Fault::Reset, "PATCH /vm");
    let vm = place.launch().await.unwrap();
    vm.resume().await.unwrap();
    assert_eq!(vm.wait_exit().await.cause, ExitCause::Reset);
}

/// The clock stands still but for what is waited for, so that no time limit takes its time.
#[tokio::test]
async fn a_hang_ends_with_the_time_limit() {
    let place = Place::faulty(Fault::Hang, "PATCH /vm");
    let vm = place.launch().await.unwrap();
    tokio::time::pause();
    let error = vm.pause().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Firecracker did not answer 'PATCH /vm' within 35 s: it hangs or the host is overloaded"
    );
    // All requests hang then, and the VM can still be ended.
    let error = vm.is_running().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Timeout { .. }), "{error}");
    tokio::time::resume();
    vm.kill();
    assert_eq!(vm.wait_exit().await.cause, ExitCause::Killed(9));
}

#[tokio::test]
async fn answers_that_are_none_are_refused() {
    for fault in [Fault::Nonsense, Fault::Flood] {
        let place = Place::faulty(fault, "PUT /machine-config");
        let error = place.failure().await;
        assert!(
            matches!(error, HypervisorError::Disconnected { .. }),
            "{error}"
        );
    }
    let place = Place::new(Behaviour {
        version: "twelve",
        ..Behaviour::default()
    });
    let error = place.failure().await.to_string();
    assert!(error.contains("twelve"), "{error}");
}

#[tokio::test]
async fn what_firecracker_cannot_have_is_refused_before_it_starts() {
    type Change = fn(&mut HardwareSpec);
    let cases: [(&str, Change); 6] = [
        ("Firecracker needs KVM", |spec| {
            spec.accelerator = Accelerator::Tcg { tsc_khz: None };
        }),
        ("a VM has 1 to 32", |spec| spec.cpu_count = 33),
        ("takes whole MiB", |spec| {
            spec.memory = GuestMemory::new(ByteSize::from_bytes((128 << 20) + 4096)).unwrap();
        }),
        ("has memory of its own", |spec| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(128 << 20).unwrap();
            spec.memory = GuestMemory::copy_on_write(file.into()).unwrap();
        }),
        ("takes one raw file", |spec| {
            spec.disks[1].layers.push(DiskLayer {
                file: tempfile::tempfile().unwrap(),
                format: DiskFormat::Qcow2,
            });
        }),
        ("takes tap devices only", |spec| {
            spec.network = Some(NetworkSpec {
                backend: NetworkBackend::User {
                    forwards: Vec::new(),
                    ipv6: false,
                },
                mac: [2, 0, 0, 0, 0, 1],
                announce: false,
            });
        }),
    ];
    // Whoever starts it fails.
    let place = Place::faulty(Fault::Die, "GET /version");
    for (words, change) in cases {
        let (mut spec, _console) = place.spec();
        change(&mut spec.hardware);
        let error = place.firecracker().launch(spec).await.unwrap_err();
        assert!(
            matches!(error, HypervisorError::InvalidSpec { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(words), "{error}");
    }
    let (mut spec, _console) = place.spec();
    spec.boot.kernel = place.path("no-kernel");
    let error = place.firecracker().launch(spec).await.unwrap_err();
    assert!(error.to_string().contains("no-kernel"), "{error}");
}

#[tokio::test]
async fn a_tap_device_that_is_missing_is_told() {
    let place = Place::new(Behaviour::default());
    let (mut spec, _console) = place.spec();
    spec.hardware.network = Some(NetworkSpec {
        backend: NetworkBackend::Tap {
            name: "fcvm-gone0".to_owned(),
            namespaces: Vec::new(),
        },
        mac: [2, 0, 0, 0, 0, 1],
        announce: false,
    });
    let error = place.firecracker().launch(spec).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("Firecracker refused 'PUT /network-interfaces/net0': "),
        "{error}"
    );
    assert!(error.contains("fcvm-gone0"), "{error}");
}

#[tokio::test]
async fn what_an_earlier_vm_left_is_not_taken_over() {
    let place = Place::new(Behaviour::default());
    fs::create_dir(place.path("vm")).unwrap();
    fs::write(place.path("vm/vsock"), "").unwrap();
    let error = place.launch().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Setup { .. }), "{error}");
    assert!(place.path("vm/vsock").exists());
}

/// A file of the size of the memory that [`Place::spec`] has.
fn memory_file() -> File {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(MEMORY_BYTES).unwrap();
    memory
}

fn begins_with(file: &File, bytes: &[u8]) {
    let mut found = vec![0; bytes.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, bytes);
    assert_eq!(file.metadata().unwrap().len(), MEMORY_BYTES);
}

/// Hardware of a clone of what [`Place::spec`] makes, and the reading end of its console.
fn clone_hardware(place: &Place, memory: &File) -> (HardwareSpec, File) {
    let (mut spec, console) = place.spec();
    let memory = memory.try_clone().unwrap();
    spec.hardware.memory = GuestMemory::copy_on_write(memory.into()).unwrap();
    (spec.hardware, console)
}

/// A process for a clone, in another directory.
async fn prepare(
    place: &Place,
    name: &str,
    memory: &File,
) -> Result<FirecrackerStandby, HypervisorError> {
    let (hardware, _console) = clone_hardware(place, memory);
    Firecracker::locate(Some(&place.program), "", place.path(name))
        .unwrap()
        .prepare(hardware)
        .await
}

fn state(text: &str) -> DeviceState {
    DeviceState::from_bytes(text.as_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn clones_of_a_snapshot_have_their_own_channels() {
    let place = Place::new(Behaviour::default());
    let (spec, _console) = place.spec();
    let vm = place.firecracker().launch(spec).await.unwrap();
    let memory = memory_file();
    let error = vm.save(&memory, SavedMemory::Full).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("the device state cannot be saved: Firecracker says: "),
        "{error}"
    );
    vm.pause().await.unwrap();
    let state = vm.save(&memory, SavedMemory::Full).await.unwrap();
    begins_with(&memory, fake::FULL_MEMORY);
    // A difference is written over what is there.
    let again = vm.save(&memory, SavedMemory::Difference).await.unwrap();
    let rest = &fake::FULL_MEMORY[fake::DIRTY_MEMORY.len()..];
    begins_with(&memory, &[fake::DIRTY_MEMORY, rest].concat());
    assert_eq!(again, state);
    vm.resume().await.unwrap();

    let mut clones = Vec::new();
    for name in ["clone1", "clone2"] {
        let mut standby = prepare(&place, name, &memory).await.unwrap();
        let line = standby.vm().device_line();
        assert_eq!(line.difference(vm.device_line()), None);
        assert!(!standby.vm().is_running().await.unwrap());
        let channel = standby.take_agent().unwrap();
        let clone = standby.load(&state, &MemoryBackend::File).await.unwrap();
        assert!(!clone.is_running().await.unwrap());
        clone.resume().await.unwrap();
        assert!(clone.is_running().await.unwrap());
        assert_eq!(first_words(channel).await, fake::AGENT_TEXT);
        // What was loaded can be saved again.
        clone.pause().await.unwrap();
        let saved = clone.save(&memory_file(), SavedMemory::Difference).await;
        assert_eq!(saved.unwrap(), state);
        clones.push(clone);
    }
    assert!(vm.is_running().await.unwrap());
}

#[tokio::test]
async fn a_state_goes_into_its_own_hardware_only() {
    let place = Place::new(Behaviour::default());
    let (spec, _console) = place.spec();
    let vm = place.firecracker().launch(spec).await.unwrap();
    let line = vm.device_line().clone();
    let with = |change: fn(&mut DeviceLine)| {
        let mut other = line.clone();
        change(&mut other);
        other.difference(&line).unwrap()
    };
    assert_eq!(
        with(|line| line.firecracker_version.minor += 1),
        "it was made by Firecracker 1.17.0 and this is Firecracker 1.18.0"
    );
    type Change = fn(&mut DeviceLine);
    let changes: [(&str, Change); 4] = [
        ("processors", |line| line.cpu_count += 1),
        ("memory", |line| line.memory_bytes += 1),
        ("disks", |line| line.disks.clear()),
        ("network cards", |line| line.has_network ^= true),
    ];
    for (part, change) in changes {
        let expected = format!("it was made with other {part} than this VM has");
        assert_eq!(with(change), expected);
    }
    let read: DeviceLine = serde_json::from_value(serde_json::to_value(&line).unwrap()).unwrap();
    assert_eq!(read.difference(&line), None);
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_loaded_ends_its_process() {
    let place = Place::new(Behaviour::default());
    let memory = memory_file();
    let standby = prepare(&place, "clone", &memory).await.unwrap();
    let error = standby.load(&state("no state"), &MemoryBackend::File).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "the device state cannot be loaded: Firecracker says: Load snapshot error: Failed to restore from \
         snapshot: Failed to load snapshot state from file: Bad magic value"
    );
    assert!(!place.path("clone").exists());
    let gone = MemoryBackend::Uffd(place.path("nobody-serves"));
    let standby = prepare(&place, "clone", &memory).await.unwrap();
    let error = standby.load(&state("boot-source\nvsock"), &gone).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, HypervisorError::State { what: "loaded", .. }),
        "{error}"
    );
    assert!(!place.path("clone").exists());

    let dying = Place::faulty(Fault::Die, "PUT /snapshot/load");
    let standby = prepare(&dying, "clone", &memory).await.unwrap();
    let error = standby
        .load(&state("boot-source"), &MemoryBackend::File)
        .await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "the device state cannot be loaded: firecracker exited with status 1: Error: the fake gives up"
    );
}

#[tokio::test]
async fn memory_of_another_size_is_told_and_never_loaded() {
    let place = Place::new(Behaviour::default());
    let vm = place.launch().await.unwrap();
    vm.pause().await.unwrap();
    let state = vm.save(&memory_file(), SavedMemory::Full).await.unwrap();
    for bytes in [MEMORY_BYTES / 2, MEMORY_BYTES - 4096, MEMORY_BYTES * 2] {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(bytes).unwrap();
        let standby = prepare(&place, "clone", &memory).await.unwrap();
        // What the owner asks before it gives the state on.
        let difference = standby.vm().device_line().difference(vm.device_line());
        let expected = "it was made with other memory than this VM has";
        assert_eq!(difference.as_deref(), Some(expected));
        if bytes < MEMORY_BYTES {
            let loaded = standby.load(&state, &MemoryBackend::File).await;
            let error = loaded.map(drop).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "the device state cannot be loaded: Firecracker says: {}",
                    fake::SHORT_MEMORY
                )
            );
        } else {
            drop(standby);
        }
        assert!(!place.path("clone").exists());
    }
}

/// As they do when the process that serves the memory has died.
#[tokio::test]
async fn a_load_or_save_that_hangs_ends_with_the_time_limit() {
    let place = Place::faulty(Fault::Hang, "PUT /snapshot/load");
    let standby = prepare(&place, "clone", &memory_file()).await.unwrap();
    let process = format!("/proc/{}", standby.vm().identity().pid);
    tokio::time::pause();
    let error = standby.load(&state("state"), &MemoryBackend::File).await;
    let error = error.unwrap_err();
    assert!(matches!(error, HypervisorError::Timeout { .. }), "{error}");
    assert!(!Path::new(&process).exists());
    assert!(!place.path("clone").exists());
    tokio::time::resume();

    let place = Place::faulty(Fault::Hang, "PUT /snapshot/create");
    let (spec, _console) = place.spec();
    let vm = place.firecracker().launch(spec).await.unwrap();
    vm.pause().await.unwrap();
    tokio::time::pause();
    let error = vm
        .save(&memory_file(), SavedMemory::Full)
        .await
        .unwrap_err();
    // Longer, as memory is written.
    assert!(
        matches!(error, HypervisorError::Timeout { timeout_s: 51, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_save_that_fails_is_told() {
    for (fault, expected) in [
        (
            Fault::Refuse,
            "the device state cannot be saved: Firecracker says: The kernel file is 'odd'.",
        ),
        (Fault::Die, "Firecracker has closed its control channel"),
    ] {
        let place = Place::faulty(fault, "PUT /snapshot/create");
        let (spec, _console) = place.spec();
        let vm = place.firecracker().launch(spec).await.unwrap();
        vm.pause().await.unwrap();
        let error = vm
            .save(&memory_file(), SavedMemory::Full)
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}
