//! `fcvm kernel install`, `entries`, `kexec`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::args::Format;

/// `fcvm kernel install`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel install host-full --root / --dry-run              what would change\n  \
        fcvm kernel install host-full --root / --yes                  beside the distribution's kernels\n  \
        fcvm kernel install ./built --root /mnt --loader systemd-boot --command-line 'root=PARTUUID=... ro'\n\n\
        The default entry of the boot loader stays as it is. A rescue entry is made too: read-only, without tuning.")]
pub(crate) struct InstallArguments {
    /// Root directory of the system to change: '/' for this one
    #[arg(long, value_name = "DIR")]
    pub(crate) root: PathBuf,
    /// What starts the kernel
    #[arg(long, value_enum, default_value = "grub")]
    pub(crate) loader: Loader,
    /// The EFI system partition, below the root
    #[arg(long, value_name = "DIR", default_value = "boot/efi")]
    pub(crate) esp: PathBuf,
    /// The kernel's command line [default: etc/kernel/cmdline below the root; for '/', else the running one]
    #[arg(long, value_name = "WORDS")]
    pub(crate) command_line: Option<String>,
    /// Add the words that 'fcvm kernel tune --apply-to' wrote below the root
    #[arg(long)]
    pub(crate) tuned: bool,
    /// Initramfs of the kernel [default: initrd.img beside it, if there is one]
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Initramfs of the rescue entry, such as 'fcvm kernel rescue-initramfs' makes [default: the kernel's]
    #[arg(long, value_name = "FILE")]
    pub(crate) rescue_initrd: Option<PathBuf>,
    /// List the changes and make none
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Change the running system, where the root is '/'
    #[arg(long)]
    pub(crate) yes: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// The kernel: a name of 'fcvm kernel ls', a profile (its newest), or a directory with vmlinuz or bzImage
    pub(crate) kernel: String,
}

/// What starts a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Loader {
    /// GRUB 2 (boot/grub/custom.cfg)
    Grub,
    /// systemd-boot (loader/entries on the EFI system partition)
    SystemdBoot,
    /// The firmware, with the command line that is built into the kernel
    EfiStub,
}

/// `fcvm kernel entries`.
#[derive(Debug, Args)]
pub(crate) struct EntriesArguments {
    /// Root directory of the system
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// The EFI system partition, below the root
    #[arg(long, value_name = "DIR", default_value = "boot/efi")]
    pub(crate) esp: PathBuf,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm kernel kexec`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel kexec host-full            check, and show the commands\n  \
        fcvm kernel kexec host-full --load     load it; the next 'systemctl kexec' starts it\n  \
        fcvm kernel kexec host-full --yes      load it and start it at once\n\n\
        Where systemd runs, it ends the services first; elsewhere what is not on disk is lost.")]
pub(crate) struct KexecArguments {
    /// Root directory of the system that is checked; only '/' can be loaded into
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// The kernel's command line [default: the running one]
    #[arg(long, value_name = "WORDS")]
    pub(crate) command_line: Option<String>,
    /// Initramfs of the kernel [default: initrd.img beside it, if there is one]
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Load the kernel; it is not started yet
    #[arg(long)]
    pub(crate) load: bool,
    /// Load the kernel and start it: the running system ends
    #[arg(long, conflicts_with = "load")]
    pub(crate) yes: bool,
    /// The kernel: a name of 'fcvm kernel ls', a profile (its newest), or a directory with vmlinuz or bzImage
    pub(crate) kernel: String,
}

/// `fcvm kernel rescue-initramfs`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel rescue-initramfs --output rescue.img\n  \
        fcvm kernel rescue-initramfs --root /mnt --add fsck.ext4 --output rescue.img\n  \
        fcvm kernel install host-full --root / --rescue-initrd rescue.img --dry-run\n\n\
        It starts a shell on the console; fcvm.pool=NAME on the kernel's command line imports a pool for reading. The\n\
        kernel needs its drivers, and ZFS, built in.")]
pub(crate) struct RescueArguments {
    /// Root directory of the system whose programs are taken
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Take this program too
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) add: Vec<String>,
    /// Where it is written
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}
