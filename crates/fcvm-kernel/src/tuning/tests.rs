//! What every plan must be.

use proptest::prelude::*;

use super::machine::{MemoryFacts, count_cpus, parse_meminfo, parse_zfs_version};
use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const ZFS_2_1: ZfsVersion = ZfsVersion { major: 2, minor: 1 };
const ZFS_2_3: ZfsVersion = ZfsVersion { major: 2, minor: 3 };

fn request(memory_bytes: u64) -> Request {
    Request {
        memory_bytes,
        hugepage_bytes: GIB,
        hugepage_count: Some(0),
        guest_count: 0,
        guest_memory_bytes: 0,
        cpu_count: 16,
        pool_tib: Some(4),
        workload: Workload::Latency,
        zfs: ZFS_2_3,
        arc: ArcChoice::Planned,
    }
}

fn value(plan: &Plan, name: &str) -> Option<String> {
    let setting = plan.settings.iter().find(|setting| setting.name == name)?;
    Some(setting.value.clone())
}

#[test]
fn the_defaults_of_zfs_differ_by_version() {
    assert_eq!(default_arc_max_bytes(ZFS_2_1, 64 * GIB), 32 * GIB);
    assert_eq!(default_arc_max_bytes(ZFS_2_3, 64 * GIB), 63 * GIB);
    assert_eq!(default_arc_max_bytes(ZFS_2_3, 2 * GIB), 5 * GIB / 4);
    assert_eq!(default_arc_max_bytes(ZFS_2_1, 64 * MIB), 64 * MIB);
}

#[test]
fn half_of_the_memory_in_hugepages_fits_only_with_a_planned_arc() {
    let half = Request {
        hugepage_count: Some(32),
        zfs: ZFS_2_1,
        ..request(64 * GIB)
    };
    let plan = super::plan(&half).unwrap();
    assert_eq!(plan.memory.arc_max_bytes, 16 * GIB);
    assert_eq!(plan.memory.arc_min_bytes, GIB);
    assert!(plan.warnings[0].contains("#10048"), "{:?}", plan.warnings);
    for arc in [ArcChoice::ModuleDefault, ArcChoice::Bytes(32 * GIB)] {
        let message = super::plan(&Request { arc, ..half })
            .unwrap_err()
            .to_string();
        let sum = "32 hugepages x 1 GiB = 32 GiB + 2 GiB host + 32 GiB ARC";
        assert!(message.contains(sum), "{message}");
        assert!(message.contains("= 66 GiB, 2 GiB too much"), "{message}");
        assert!(message.contains("openzfs/zfs #10048"), "{message}");
    }
}

#[test]
fn more_hugepages_or_guests_than_memory_are_refused_with_the_sum() {
    let all = Request {
        hugepage_count: Some(64),
        ..request(64 * GIB)
    };
    let message = super::plan(&all).unwrap_err().to_string();
    assert!(
        message.contains("64 hugepages x 1 GiB = 64 GiB"),
        "{message}"
    );
    let guests = Request {
        guest_count: 20,
        guest_memory_bytes: 4 * GIB,
        ..request(64 * GIB)
    };
    let message = super::plan(&guests).unwrap_err().to_string();
    assert!(message.contains("(20 outside hugepages)"), "{message}");
    assert!(
        super::plan(&Request {
            pool_tib: None,
            hugepage_count: Some(64),
            ..guests
        })
        .is_err()
    );
}

#[test]
fn guests_can_be_given_the_hugepages_they_need() {
    let plan = super::plan(&Request {
        hugepage_bytes: 2 * MIB,
        hugepage_count: None,
        guest_count: 10,
        guest_memory_bytes: 513 * MIB,
        ..request(64 * GIB)
    })
    .unwrap();
    assert_eq!(plan.memory.hugepage_count, 10 * 257);
    assert_eq!(value(&plan, "hugepages").unwrap(), "2570");
    assert_eq!(value(&plan, "vm.nr_hugepages").unwrap(), "2570");
    assert!(
        plan.memory.guest_bytes < 10 * 40 * MIB,
        "only their overhead is outside"
    );
}

#[test]
fn processors_are_set_aside_from_four_on_and_only_for_latency() {
    let layout = |cpu_count, workload| layout::lay_out(cpu_count, workload);
    assert!(!layout(3, Workload::Latency).is_isolated());
    assert!(!layout(64, Workload::Throughput).is_isolated());
    for (cpu_count, housekeeping, isolated, mask) in [
        (4, "0", "1-3", "00000001"),
        (8, "0", "1-7", "00000001"),
        (16, "0-1", "2-15", "00000003"),
        (256, "0-7", "8-255", "000000ff"),
    ] {
        let layout = layout(cpu_count, Workload::Latency);
        assert_eq!(layout.housekeeping(), housekeeping);
        assert_eq!(layout.isolated, isolated);
        assert_eq!(layout.housekeeping_mask(), mask);
    }
    let whole = layout(40, Workload::Throughput);
    assert_eq!(whole.housekeeping_mask(), "000000ff,ffffffff");
}

#[test]
fn files_are_written_whole_and_again() {
    let root = tempfile::tempdir().unwrap();
    let plan = super::plan(&request(64 * GIB)).unwrap();
    let files = plan.files(true);
    for file in &files {
        assert!(!file.is_written(root.path()));
        file.write(root.path()).unwrap();
        file.write(root.path()).unwrap();
        assert!(file.is_written(root.path()));
    }
    let read = |path: &str| std::fs::read_to_string(root.path().join(path)).unwrap();
    assert!(read("etc/sysctl.d/90-fcvm.conf").contains("\nvm.swappiness = 1\n"));
    let arc = format!("\noptions zfs zfs_arc_max={}\n", plan.memory.arc_max_bytes);
    assert!(read("etc/modprobe.d/fcvm-zfs.conf").contains(&arc));
    let words = read("etc/fcvm/kernel-command-line");
    assert!(
        words.contains(" nohz_full=2-15 ") && words.contains("zfs.zfs_arc_max="),
        "{words}"
    );
    assert!(!plan.command_line(false).contains("zfs."));
    let left: Vec<_> = std::fs::read_dir(root.path().join("etc/sysctl.d"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 1, "no temporary file is left");
}

/// The service's lines are run by a shell, with programs that write down how they were called.
#[test]
fn kernel_threads_get_their_policy_and_processors() {
    let plan = super::plan(&request(64 * GIB)).unwrap();
    let files = plan.files(false);
    let service = files
        .iter()
        .find(|file| file.path.ends_with(".service"))
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    for program in ["pgrep", "chrt", "taskset", "renice"] {
        let path = directory.path().join(program);
        let text = match program {
            "pgrep" => "#!/bin/sh\n[ \"$1 $2\" = '--parent 2' ] && echo rcuop/7 rcu_preempt irq/24 txg_sync kthreadd |
                tr ' ' '\\n' | grep -E \"$3\"\n".to_owned(),
            other => format!("#!/bin/sh\necho {other} $* >>{}/calls\nexit 1\n", directory.path().display()),
        };
        fcvm_testing::write_program(&path, &text);
    }
    let path = format!("{}:/usr/bin:/bin", directory.path().display());
    for line in service
        .content
        .lines()
        .filter_map(|line| line.strip_prefix("ExecStart=/bin/sh -c '"))
    {
        let script = line.strip_suffix('\'').unwrap().replace("$$", "$");
        let status = std::process::Command::new("/bin/sh")
            .args(["-c", &script])
            .env("PATH", &path)
            .status()
            .unwrap();
        // A thread that cannot be moved is no reason to stop.
        assert!(status.success(), "{script}");
    }
    assert_eq!(
        std::fs::read_to_string(directory.path().join("calls"))
            .unwrap()
            .lines()
            .collect::<Vec<_>>(),
        [
            "chrt --fifo --pid 50 irq/24",
            "taskset --cpu-list --pid 0-1 irq/24",
            "chrt --fifo --pid 2 rcu_preempt",
            "chrt --fifo --pid 1 rcuop/7",
            "taskset --cpu-list --pid 0-1 rcuop/7",
            "chrt --other --pid 0 txg_sync",
            "renice --priority 0 --pid txg_sync",
            "taskset --cpu-list --pid 0-1 txg_sync",
        ]
    );
}

#[test]
fn what_the_kernel_says_is_understood() {
    let text = "MemTotal:       24684096 kB\nMemFree: 1 kB\nHugePages_Total:       3\nHugepagesize:       2048 kB\n";
    assert_eq!(
        parse_meminfo(text),
        Some(MemoryFacts {
            total_bytes: 24_684_096 << 10,
            hugepage_count: 3,
            hugepage_bytes: 2 * MIB
        })
    );
    assert_eq!(parse_meminfo("MemTotal: x kB"), None);
    assert_eq!(count_cpus("0-3,8\n"), Some(5));
    assert_eq!(count_cpus("3-0"), None);
    assert_eq!(count_cpus(""), None);
    assert_eq!(parse_zfs_version("2.3.9-1\n"), Some(ZFS_2_3));
    assert_eq!(parse_zfs_version("zfs-2.1.11"), Some(ZFS_2_1));
    assert_eq!(parse_zfs_version("?"), None);
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    let good = request(8 * GIB);
    for bad in [
        Request {
            memory_bytes: 0,
            ..good
        },
        Request {
            hugepage_bytes: 4096,
            ..good
        },
        Request {
            cpu_count: 0,
            ..good
        },
        Request {
            guest_count: 1,
            ..good
        },
        Request {
            guest_memory_bytes: 1,
            ..good
        },
        Request {
            arc: ArcChoice::Bytes(1),
            ..good
        },
        Request {
            pool_tib: Some(u64::MAX),
            ..good
        },
        Request {
            memory_bytes: u64::MAX,
            ..good
        },
    ] {
        let error = super::plan(&bad).unwrap_err();
        assert!(matches!(error, TuningError::Value { .. }), "{error}");
    }
}

fn requests() -> impl Strategy<Value = Request> {
    let memory = 1_u64..(4 << 40);
    let hugepages = (
        prop_oneof![Just(2 * MIB), Just(GIB)],
        prop_oneof![Just(None), Just(Some(0)), (0_u64..8192).prop_map(Some)],
    );
    let guests = prop_oneof![Just((0, 0)), (1_u64..200, 1_u64..(16 << 30))];
    let arc = prop_oneof![
        4 => Just(ArcChoice::Planned),
        1 => Just(ArcChoice::ModuleDefault),
        1 => (64 * MIB..64 * GIB).prop_map(ArcChoice::Bytes)
    ];
    let rest = (
        1_u32..=512,
        prop_oneof![Just(None), (0_u64..200).prop_map(Some)],
        prop_oneof![Just(Workload::Latency), Just(Workload::Throughput)],
        prop_oneof![Just(ZFS_2_1), Just(ZFS_2_3)],
        arc,
    );
    (memory, hugepages, guests, rest).prop_map(|(memory_bytes, hugepages, guests, rest)| Request {
        memory_bytes,
        hugepage_bytes: hugepages.0,
        hugepage_count: hugepages.1,
        guest_count: guests.0,
        guest_memory_bytes: guests.1,
        cpu_count: rest.0,
        pool_tib: rest.1,
        workload: rest.2,
        zfs: rest.3,
        arc: rest.4,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_more_than_the_memory(request in requests()) {
        if let Ok(plan) = plan(&request) {
            let memory = &plan.memory;
            let sum: u64 = memory.shares.iter().map(|share| share.bytes).sum();
            prop_assert!(sum <= request.memory_bytes);
            prop_assert_eq!(sum + memory.free_bytes, request.memory_bytes);
            prop_assert!(memory.arc_min_bytes <= memory.arc_max_bytes / 2);
            prop_assert_eq!(request.pool_tib.is_none(), memory.arc_max_bytes == 0);
            prop_assert!(memory.arc_max_bytes == 0 || memory.arc_max_bytes >= 64 * MIB);
            prop_assert!(plan.settings.iter().all(|setting| !setting.reason.is_empty()));
        }
    }

    #[test]
    fn stable(request in requests()) {
        prop_assert_eq!(plan(&request), plan(&request));
    }

    #[test]
    fn monotone_in_memory(request in requests(), more in 0_u64..(1 << 40)) {
        if let Ok(small) = plan(&request) {
            let larger = Request { memory_bytes: request.memory_bytes + more, ..request };
            // The module's own default grows faster than the memory less a share for the host.
            if request.arc != ArcChoice::ModuleDefault {
                let large = plan(&larger).unwrap();
                prop_assert!(large.memory.arc_max_bytes >= small.memory.arc_max_bytes);
                prop_assert!(large.memory.arc_min_bytes >= small.memory.arc_min_bytes);
                prop_assert!(large.memory.host_bytes >= small.memory.host_bytes);
                prop_assert_eq!(large.memory.hugepage_bytes, small.memory.hugepage_bytes);
                prop_assert_eq!(large.memory.guest_bytes, small.memory.guest_bytes);
            }
        }
    }

    #[test]
    fn refused_only_what_does_not_fit(request in requests()) {
        if let Err(error) = plan(&request) {
            prop_assert!(matches!(error, TuningError::DoesNotFit { .. }), "{}", error);
            // What is asked for, with the least for the host and the ARC, is more than there is.
            let pages = request.hugepage_count.unwrap_or_else(|| {
                request.guest_count * request.guest_memory_bytes.div_ceil(request.hugepage_bytes)
            });
            let huge = pages * request.hugepage_bytes;
            let rest = request.memory_bytes.saturating_sub(huge);
            let host = (2 * GIB).min(rest / 2).max(rest / 20);
            let inside = match request.guest_memory_bytes {
                0 => 0,
                bytes => (pages / bytes.div_ceil(request.hugepage_bytes)).min(request.guest_count),
            };
            let guests = (request.guest_count - inside) * request.guest_memory_bytes
                + request.guest_count * (32 * MIB + request.guest_memory_bytes / 512);
            let arc = match (request.pool_tib, request.arc) {
                (None, _) => 0,
                (_, ArcChoice::Planned) => 64 * MIB,
                (_, ArcChoice::Bytes(bytes)) => bytes,
                (_, ArcChoice::ModuleDefault) => default_arc_max_bytes(request.zfs, request.memory_bytes),
            };
            prop_assert!(huge + host + guests + arc > request.memory_bytes || rest == 0);
        }
    }

    #[test]
    fn any_text_of_the_kernel_is_survived(text in ".{0,200}") {
        let _ = (parse_meminfo(&text), count_cpus(&text), parse_zfs_version(&text));
    }
}
