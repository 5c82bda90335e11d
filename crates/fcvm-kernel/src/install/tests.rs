//! Installing below a directory, as an ordinary user.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::command_line::CommandLineError;
use super::*;

const VERSION: &str = "6.12.107-fcvm";
const ROOT: &str = "root=PARTUUID=1234 rw quiet nohz_full=2-15 zfs.zfs_arc_max=1";

/// The header of a kernel, and no more.
fn image(version: &str, efi_stub: bool) -> Vec<u8> {
    let mut bytes = vec![0_u8; 0x400];
    if efi_stub {
        bytes[..2].copy_from_slice(b"MZ");
    }
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    let text = format!("{version} (root@host) #1 SMP\0");
    bytes[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

struct Lab {
    directory: TempDir,
    kernel: HostKernel,
}

impl Lab {
    fn new(config: &str, initrd: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let built = directory.path().join("built");
        fs::create_dir(&built).unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::write(built.join("bzImage"), image(VERSION, true)).unwrap();
        fs::write(built.join("config"), config).unwrap();
        if initrd {
            fs::write(built.join("initrd.img"), b"initrd").unwrap();
        }
        let kernel = HostKernel::in_directory(&built).unwrap();
        Self { directory, kernel }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    fn options(&self, loader: Loader) -> Options {
        Options {
            root: self.root(),
            esp: PathBuf::from("boot/efi"),
            loader,
            command_line: ROOT.to_owned(),
            rescue_initrd: None,
        }
    }

    fn read(&self, path: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.root().join(path)).unwrap()).into_owned()
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_plan_changes_nothing_and_a_second_one_has_nothing_to_do() {
    for loader in [Loader::Grub, Loader::SystemdBoot] {
        let lab = Lab::new("CONFIG_X=y\n", true);
        let first = plan(&lab.kernel, &lab.options(loader)).unwrap();
        assert_eq!(files_below(&lab.root()), Vec::<PathBuf>::new());
        assert!(
            first
                .changes
                .iter()
                .all(|change| change.action == Action::Create)
        );
        first.apply().unwrap();
        let mut planned: Vec<PathBuf> = first
            .changes
            .iter()
            .map(|change| lab.root().join(&change.path))
            .collect();
        let mut there = files_below(&lab.root());
        planned.sort();
        there.sort();
        assert_eq!(there, planned, "what was listed, and no temporary file");
        let second = plan(&lab.kernel, &lab.options(loader)).unwrap();
        assert!(
            second
                .changes
                .iter()
                .all(|change| change.action == Action::Keep)
        );
        let listed = list(&lab.root(), Path::new("boot/efi")).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (listed[0].version.as_str(), listed[0].loader),
            (VERSION, loader.name())
        );
    }
}

#[test]
fn grub_entries_stand_between_marks_and_the_rest_stays() {
    let lab = Lab::new("", false);
    fs::create_dir_all(lab.root().join("boot/grub")).unwrap();
    fs::write(lab.root().join("boot/grub/custom.cfg"), "set timeout=3").unwrap();
    for command_line in ["root=/dev/vda1 old=1", ROOT] {
        let options = Options {
            command_line: command_line.to_owned(),
            ..lab.options(Loader::Grub)
        };
        plan(&lab.kernel, &options).unwrap().apply().unwrap();
    }
    let text = lab.read("boot/grub/custom.cfg");
    assert!(
        text.starts_with("set timeout=3\n### BEGIN fcvm 6.12.107-fcvm\n"),
        "{text}"
    );
    assert_eq!(text.matches("### BEGIN").count(), 1, "{text}");
    assert!(!text.contains("old=1"), "{text}");
    assert!(
        text.contains("        linux /boot/vmlinuz-6.12.107-fcvm root=PARTUUID=1234 rw"),
        "{text}"
    );
    let rescue = text
        .lines()
        .rfind(|line| line.contains("emergency.target"))
        .unwrap();
    assert!(
        !rescue.contains("nohz_full") && !rescue.contains(" rw") && !rescue.contains("arc_max"),
        "{rescue}"
    );
    assert!(rescue.contains("root=PARTUUID=1234 ro "), "{rescue}");
    assert!(!text.contains("initrd"), "there is none: {text}");
}

#[test]
fn the_rescue_entry_can_have_its_own_initramfs() {
    let lab = Lab::new("", true);
    let rescue = lab.directory.path().join("rescue.cpio");
    fs::write(&rescue, b"rescue").unwrap();
    let options = Options {
        rescue_initrd: Some(rescue),
        ..lab.options(Loader::SystemdBoot)
    };
    plan(&lab.kernel, &options).unwrap().apply().unwrap();
    let normal = lab.read("boot/efi/loader/entries/fcvm-6.12.107-fcvm.conf");
    let rescue = lab.read("boot/efi/loader/entries/fcvm-6.12.107-fcvm-rescue.conf");
    assert!(
        normal.contains("\ninitrd /fcvm/6.12.107-fcvm/initrd.img\n"),
        "{normal}"
    );
    assert!(
        rescue.contains("\ninitrd /fcvm/6.12.107-fcvm/rescue.img\n"),
        "{rescue}"
    );
}

#[test]
fn the_stub_needs_a_command_line_of_its_own() {
    let stub = |config: &str| {
        let lab = Lab::new(config, false);
        let plan = plan(&lab.kernel, &lab.options(Loader::EfiStub))?;
        plan.apply()?;
        assert!(
            lab.root()
                .join("boot/efi/EFI/fcvm/6.12.107-fcvm.efi")
                .exists()
        );
        Ok::<_, KernelError>(plan)
    };
    let good = stub("CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE=\"root=PARTUUID=1 ro\"\n").unwrap();
    assert!(good.remarks[0].contains("efibootmgr"));
    for (config, said) in [
        ("", "CONFIG_CMDLINE"),
        ("CONFIG_CMDLINE=\"\"\n", "CONFIG_CMDLINE"),
        ("CONFIG_CMDLINE=\"quiet\"\n", "no root="),
        ("CONFIG_CMDLINE=\"root=UUID=1\"\n", "initramfs"),
    ] {
        let message = stub(config).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn links_out_of_the_root_are_refused() {
    let lab = Lab::new("", true);
    let outside = lab.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    for target in [outside.as_path(), Path::new("/nonexistent")] {
        let link = lab.root().join("boot");
        symlink(target, &link).unwrap();
        let message = plan(&lab.kernel, &lab.options(Loader::Grub))
            .unwrap_err()
            .to_string();
        assert!(message.contains("nothing outside the root"), "{message}");
        fs::remove_file(link).unwrap();
    }
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    let escape = Options {
        esp: PathBuf::from("../outside"),
        ..lab.options(Loader::SystemdBoot)
    };
    assert!(plan(&lab.kernel, &escape).is_err());
}

#[test]
fn roots_that_the_kernel_does_not_find_itself_are_refused_without_initramfs() {
    assert_eq!(check_root("quiet", true), Err(CommandLineError::NoRoot));
    for root in ["UUID=1", "ZFS=tank/root", "/dev/mapper/x", "LABEL=a"] {
        let line = format!("root={root}");
        assert_eq!(
            check_root(&line, false),
            Err(CommandLineError::NeedsInitramfs(root.to_owned()))
        );
        assert_eq!(check_root(&line, true), Ok(()));
    }
    assert_eq!(check_root("root=/dev/vda1", false), Ok(()));
    for bad in [
        "root=/dev/a 'x",
        "root=/dev/a\nmenuentry",
        "root=/dev/a $x",
        "root=/dev/a }",
    ] {
        assert!(
            matches!(check_root(bad, true), Err(CommandLineError::Character(_))),
            "{bad}"
        );
    }
    assert_eq!(
        running("BOOT_IMAGE=/x root=/dev/a initrd=y ro\n"),
        "root=/dev/a ro"
    );
}

#[test]
fn what_is_no_kernel_is_refused() {
    assert_eq!(
        image::facts(&image(VERSION, false)).unwrap().version,
        VERSION
    );
    for bad in ["../../etc", "6.1/x", "", "6.1\n"] {
        assert_eq!(image::facts(&image(bad, false)), None, "{bad:?}");
    }
    let directory = tempfile::tempdir().unwrap();
    assert!(HostKernel::in_directory(directory.path()).is_err());
    fs::write(directory.path().join("vmlinuz"), b"no kernel").unwrap();
    let kernel = HostKernel::in_directory(directory.path()).unwrap();
    assert!(
        kernel
            .facts()
            .unwrap_err()
            .to_string()
            .contains("no bzImage")
    );
}

proptest! {
    #[test]
    fn any_image_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..0x420), offset in any::<u16>()) {
        let _ = image::facts(&bytes);
        let mut header = image(VERSION, true);
        header[0x20e..0x210].copy_from_slice(&offset.to_le_bytes());
        let _ = image::facts(&header);
    }

    #[test]
    fn rescue_lines_are_read_only_and_stay_so(line in "(root=/dev/[a-z]{1,4}|rw|ro|quiet|x=[0-9]| ){0,12}") {
        let rescue = for_rescue(&line);
        prop_assert!(!rescue.split(' ').any(|word| word == "rw" || word == "quiet"));
        prop_assert!(rescue.split(' ').any(|word| word == "ro"));
    }
}

#[test]
fn kexec_is_refused_where_it_would_fail() {
    let lab = Lab::new("", false);
    let write = |path: &str, text: &str| {
        let path = lab.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let refused = |said: &str| {
        let message = kexec(&lab.root(), &lab.kernel, None)
            .unwrap_err()
            .to_string();
        assert!(message.contains(said), "{message}");
    };
    refused("CONFIG_KEXEC");
    write("proc/sys/kernel/kexec_load_disabled", "1\n");
    refused("kexec_load_disabled");
    write("proc/sys/kernel/kexec_load_disabled", "0\n");
    write(
        "sys/kernel/security/lockdown",
        "none [integrity] confidentiality\n",
    );
    refused("locked down");
    write(
        "sys/kernel/security/lockdown",
        "[none] integrity confidentiality\n",
    );
    refused("kexec-tools");
    write("usr/sbin/kexec", "");
    refused("no root=");
    write(
        "proc/cmdline",
        "BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1 ro\n",
    );
    let way = kexec(&lab.root(), &lab.kernel, None).unwrap();
    assert_eq!(way.load[0], "/usr/sbin/kexec");
    assert_eq!(way.load.last().unwrap(), "--command-line=root=/dev/vda1 ro");
    assert_eq!(way.start, ["/usr/sbin/kexec", "--exec"]);
    fs::create_dir_all(lab.root().join("run/systemd/system")).unwrap();
    let way = kexec(&lab.root(), &lab.kernel, None).unwrap();
    assert_eq!(way.start, ["systemctl", "kexec"]);
    let other = kexec(&lab.root(), &lab.kernel, Some("root=UUID=1"));
    assert!(other.unwrap_err().to_string().contains("initramfs"));
}
