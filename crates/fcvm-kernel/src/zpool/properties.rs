//! The commands and the reasons of their options.

use super::{Command, Reason, Request, Vdev, Workload, ZpoolError};

const KIB: u64 = 1024;

pub(super) fn record_bytes(request: &Request) -> Result<u64, ZpoolError> {
    match request.record_bytes {
        Some(bytes) if !bytes.is_power_of_two() || !(4 * KIB..=1024 * KIB).contains(&bytes) => {
            Err(ZpoolError::Value {
                what: "the record size",
                value: bytes,
                rule: "a power of two from 4k to 1m",
            })
        }
        Some(bytes) => Ok(bytes),
        None => Ok(match request.workload {
            Workload::Vm | Workload::Database => 16 * KIB,
            Workload::Files => 128 * KIB,
            Workload::Backup => 1024 * KIB,
        }),
    }
}

fn short(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1024 * KIB) => format!("{}M", bytes / (1024 * KIB)),
        _ => format!("{}K", bytes / KIB),
    }
}

struct Options {
    words: Vec<String>,
    reasons: Vec<Reason>,
}

impl Options {
    fn add(&mut self, flag: &str, option: impl Into<String>, reason: &str) {
        let option = option.into();
        self.words.extend([flag.to_owned(), option.clone()]);
        self.reasons.push(Reason {
            option,
            reason: reason.to_owned(),
        });
    }
}

pub(super) fn commands(
    request: &Request,
    vdevs: &[Vdev],
    ashift: u32,
    record_bytes: u64,
) -> (Vec<Command>, Vec<Reason>) {
    let (create, mut reasons) = create_pool(request, vdevs, ashift);
    let (dataset, dataset_reasons) = create_dataset(request, vdevs, record_bytes);
    reasons.extend(dataset_reasons);
    let mut commands = vec![create, dataset];
    if matches!(request.workload, Workload::Vm | Workload::Database) {
        let volume = short(record_bytes.min(128 * KIB));
        commands.push(Command {
            words: [
                "zfs",
                "create",
                "-s",
                "-V",
                "SIZE",
                "-o",
                &format!("volblocksize={volume}"),
                &format!("{}/{}/NAME", request.pool, dataset_name(request.workload)),
            ]
            .map(str::to_owned)
            .to_vec(),
            example: true,
        });
        reasons.push(Reason {
            option: format!("volblocksize={volume}"),
            reason: "a volume's blocks cannot be changed later (8K before 2.2); the guest's file system is best made with \
                     the same"
                .to_owned(),
        });
    }
    (commands, reasons)
}

fn create_pool(request: &Request, vdevs: &[Vdev], ashift: u32) -> (Command, Vec<Reason>) {
    let mut options = Options {
        words: vec!["zpool".to_owned(), "create".to_owned()],
        reasons: Vec::new(),
    };
    let redundancy = |class: &str| {
        let vdev = vdevs.iter().find(|vdev| vdev.class == class)?;
        Some((vdev.kind == "mirror" || vdev.kind.is_empty(), vdev.parity))
    };
    if let (Some(data), Some(special)) = (redundancy("data"), redundancy("special"))
        && data != special
    {
        options.words.push("-f".to_owned());
        options.reasons.push(Reason {
            option: "-f".to_owned(),
            reason: "zpool asks for it where the special group has another redundancy than the data, which is meant here"
                .to_owned(),
        });
    }
    options
        .words
        .extend(["-o".to_owned(), format!("ashift={ashift}")]);
    if request.devices.iter().any(|(device, _)| !device.rotational) {
        options
            .words
            .extend(["-o".to_owned(), "autotrim=on".to_owned()]);
    }
    let compression = match request.workload {
        Workload::Backup => (
            "compression=zstd",
            "written once, read seldom: smaller is better than faster",
        ),
        _ => (
            "compression=lz4",
            "faster than the devices, stops early on what cannot be compressed, leaves out zeros",
        ),
    };
    options.add("-O", compression.0, compression.1);
    options.add("-O", "atime=off", "a read is no write");
    options.add(
        "-O",
        "xattr=sa",
        "extended attributes beside the file's own, not in a hidden directory",
    );
    options.add(
        "-O",
        "dnodesize=auto",
        "room for those attributes; 'legacy' is for pools that GRUB reads",
    );
    if request.workload == Workload::Files {
        options.add(
            "-O",
            "acltype=posixacl",
            "access lists as on other file systems of Linux",
        );
    }
    let mut words = options.words;
    words.push(request.pool.clone());
    push_vdevs(&mut words, vdevs);
    (
        Command {
            words,
            example: false,
        },
        options.reasons,
    )
}

fn push_vdevs(words: &mut Vec<String>, vdevs: &[Vdev]) {
    let mut class = "data";
    for vdev in vdevs {
        // Groups of one class follow each other: 'special mirror a b mirror c d'.
        if vdev.class != class {
            class = vdev.class;
            words.push(class.to_owned());
        }
        if !vdev.kind.is_empty() {
            words.push(vdev.kind.clone());
        }
        words.extend(vdev.devices.iter().cloned());
    }
}

fn dataset_name(workload: Workload) -> &'static str {
    match workload {
        Workload::Vm => "vms",
        Workload::Database => "database",
        Workload::Files => "files",
        Workload::Backup => "backup",
    }
}

fn create_dataset(request: &Request, vdevs: &[Vdev], record_bytes: u64) -> (Command, Vec<Reason>) {
    let mut options = Options {
        words: vec!["zfs".to_owned(), "create".to_owned()],
        reasons: Vec::new(),
    };
    let why = match (request.record_bytes, request.workload) {
        (Some(_), _) => "as asked",
        (None, Workload::Vm) => {
            "what guests write is small: a larger record would be read and written whole for each; smaller ones compress less \
             and cost more metadata"
        }
        (None, Workload::Database) => {
            "the page of InnoDB; PostgreSQL's 8 KiB still compress in pairs"
        }
        (None, Workload::Files) => {
            "small files take their own size; large ones are read in one piece"
        }
        (None, Workload::Backup) => "large streams: least metadata, best compression",
    };
    options.add("-o", format!("recordsize={}", short(record_bytes)), why);
    if vdevs.iter().any(|vdev| vdev.class == "special") {
        // At the record size, all data would go to the special devices.
        let small = (record_bytes / 2)
            .clamp(4 * KIB, 32 * KIB)
            .min(record_bytes / 2);
        options.add(
            "-o",
            format!("special_small_blocks={}", short(small)),
            "blocks up to this size go to the flash too; less than the record size, or all data would",
        );
    }
    if request.workload == Workload::Backup {
        options.add(
            "-o",
            "primarycache=metadata",
            "what is read once does not push out what is read often",
        );
    }
    options.words.push(format!(
        "{}/{}",
        request.pool,
        dataset_name(request.workload)
    ));
    (
        Command {
            words: options.words,
            example: false,
        },
        options.reasons,
    )
}
