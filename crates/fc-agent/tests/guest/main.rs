//! The agent in a real guest: QEMU with TCG, a real kernel, real disks.
//!
//! FCVM_TEST_KERNEL_DIR names a directory with `vmlinux`, `modules/list` and `modules/*.ko`.

mod client;
mod clone;
mod files;
mod hostile;
mod lab;
mod parking;
mod streams;

use client::{Vm, plan, process, shell};
use fcvm_types::guest::{ExitStatus, GuestPlan, ProcessPlan, Rlimit};
use fcvm_wire::{FailureKind, Outcome, Request};

#[test]
fn a_container_runs_and_its_output_and_code_arrive() {
    let Some(tools) = lab::tools() else { return };
    let (vm, mut stream) = Vm::run(tools, &plan(shell("echo out; echo err >&2; exit 7")));
    let output = stream.collect();
    assert_eq!(output.text(), "out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Code(7)));
    let guest = vm.power_off();
    assert!(guest.console().contains("fc-agent: started"));
    // The file system was left clean: nothing to replay, nothing to repair.
    let scratch = guest.scratch();
    let check = std::process::Command::new("dumpe2fs")
        .arg("-h")
        .arg(scratch)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains("Filesystem state:         clean"), "{text}");
    assert!(!text.contains("needs_recovery"), "{text}");
}

/// A guest whose container sleeps, for tests with exec sessions.
fn sleeping(tools: &lab::Tools) -> Vm {
    sleeping_with(tools, |_| {})
}

fn sleeping_with(tools: &lab::Tools, change: impl FnOnce(&mut GuestPlan)) -> Vm {
    let mut plan = plan(process(&["sleep", "100000"]));
    change(&mut plan);
    let (vm, mut stream) = Vm::run(tools, &plan);
    assert_eq!(stream.opened().pid, 1);
    vm
}

#[test]
fn the_container_has_its_own_view_of_the_guest() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping_with(tools, |plan| {
        plan.identity.extra_hosts = vec![("192.0.2.9".parse().unwrap(), "db".into())];
    });
    assert_eq!(vm.shell("hostname; cat /etc/hostname").ok(), "lab\nlab\n");
    assert_eq!(
        vm.shell("cat /etc/machine-id").ok(),
        "0123456789abcdef0123456789abcdef\n"
    );
    assert!(vm.shell("cat /etc/hosts").ok().contains("192.0.2.9\tdb\n"));
    assert!(vm.shell("date -u +%Y").ok().starts_with("2027"));
    // Only the container's own processes and mounts are to be seen.
    let ps = vm.shell("ps -o pid,args");
    assert!(ps.ok().contains("    1 sleep 100000\n"), "{ps:?}");
    assert!(!ps.text().contains("init"), "{ps:?}");
    let mounts = vm.shell("cut -d' ' -f2 /proc/self/mounts");
    assert!(
        mounts
            .ok()
            .starts_with("/\n/proc\n/sys\n/sys/fs/cgroup\n/dev\n"),
        "{mounts:?}"
    );
    assert!(!mounts.text().contains("/scratch"), "{mounts:?}");
    // Nothing of the agent's is inherited.
    let fds = vm.shell("exec ls /proc/self/fd");
    assert_eq!(fds.ok(), "0\n1\n2\n3\n");
    let signals = vm.exec(&process(&[
        "grep",
        "-E",
        "Sig(Blk|Ign)",
        "/proc/self/status",
    ]));
    let expected = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
    assert_eq!({ signals }.collect().ok(), expected);
    assert_eq!(
        vm.shell("cat /proc/self/oom_score_adj; umask").ok(),
        "0\n0022\n"
    );
    assert_eq!(vm.shell("cat /proc/1/cgroup").ok(), "0::/\n");
    // Devices work, other nodes do not, and what is to be protected is.
    assert_eq!(
        vm.shell("head -c 3 /dev/zero | wc -c; echo x > /dev/null; : < /dev/full")
            .ok(),
        "3\n"
    );
    for forbidden in [
        "echo 1 > /proc/sys/kernel/panic",
        "echo b > /proc/sysrq-trigger",
        "echo x > /sys/fs/cgroup/cgroup.procs",
        "mkdir /sys/fs/cgroup/own",
        "mknod /tmp/disk b 254 0",
        "mount -t tmpfs none /mnt",
        "chroot /proc/1/root/../../.. test -e /init",
        "hostname other",
    ] {
        assert_ne!(
            vm.shell(forbidden).outcome,
            Outcome::Exited(ExitStatus::Code(0)),
            "{forbidden}"
        );
    }
    assert_eq!(vm.shell("wc -c < /proc/keys; ls /sys/firmware").ok(), "0\n");
    vm.power_off();
}

#[test]
fn a_container_that_may_make_device_nodes_cannot_use_them() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let mut plan = shell("mkdir -p /tmp && cd $1 && mknod node c 1 3 && : < node");
    plan.capabilities.push("CAP_MKNOD".into());
    for directory in ["/", "/dev", "/dev/shm"] {
        let mut plan = plan.clone();
        plan.args.extend(["sh".into(), directory.into()]);
        let output = vm.exec(&plan).collect();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            stderr.contains("Permission denied"),
            "{directory}: {stderr}"
        );
    }
    vm.power_off();
}

fn with(script: &str, change: impl FnOnce(&mut ProcessPlan)) -> ProcessPlan {
    let mut plan = shell(script);
    change(&mut plan);
    plan
}

#[test]
fn users_directories_limits_and_capabilities_are_as_planned() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let mut run = |plan: ProcessPlan| vm.exec(&plan).collect();
    let id = "id -u; id -g; id -G; echo $HOME; grep Cap /proc/self/status | cut -f2 | uniq";
    let output = run(with(id, |plan| plan.user = "app".into()));
    // No capability is left but in the bounding set, as Podman has it.
    assert_eq!(
        output.ok(),
        "1000\n1000\n1000 29\n/home/app\n\
        0000000000000000\n00000000800405fb\n0000000000000000\n"
    );
    let output = run(with(id, |plan| plan.user = "1234:audio".into()));
    assert!(output.ok().starts_with("1234\n29\n29\n/\n"), "{output:?}");
    let output = run(with(id, |_| {}));
    assert!(
        output
            .ok()
            .ends_with("0\n0\n0\n/root\n0000000000000000\n00000000800405fb\n0000000000000000\n"),
        "{output:?}"
    );
    let output = run(with("echo $HOME", |plan| plan.env.push("HOME=/x".into())));
    assert_eq!(output.ok(), "/x\n");
    let output = run(with("pwd; ls -ld .", |plan| {
        plan.cwd = "/made/on/the/way".into()
    }));
    assert!(
        output.ok().starts_with("/made/on/the/way\ndrwxr-xr-x"),
        "{output:?}"
    );
    let limit = Rlimit {
        name: "nofile".into(),
        soft: 77,
        hard: 99,
    };
    let output = run(with("ulimit -Sn; ulimit -Hn", |plan| {
        plan.rlimits = vec![limit]
    }));
    assert_eq!(output.ok(), "77\n99\n");
    let output = run(with("grep NoNewPrivs /proc/self/status", |plan| {
        plan.no_new_privileges = true
    }));
    assert_eq!(output.ok(), "NoNewPrivs:\t1\n");
    let failure = |plan: ProcessPlan, run: &mut dyn FnMut(ProcessPlan) -> client::Output| {
        run(plan).failure().clone()
    };
    let bad = failure(with("", |plan| plan.user = "ghost".into()), &mut run);
    assert_eq!(bad.kind, FailureKind::BadRequest);
    assert_eq!(
        bad.message,
        "the user 'ghost' is neither in the container's /etc/passwd nor a number"
    );
    let bad = failure(
        with("", |plan| plan.capabilities.push("CAP_FLY".into())),
        &mut run,
    );
    assert_eq!(bad.kind, FailureKind::BadRequest);
    let missing = failure(process(&["nonesuch"]), &mut run);
    assert_eq!(missing.kind, FailureKind::CommandNotFound);
    assert_eq!(
        missing.message,
        "exec: 'nonesuch' was not found in the container's PATH"
    );
    for path in ["/data/text", "/data", "/etc/passwd"] {
        let refused = failure(process(&[path]), &mut run);
        assert_eq!(refused.kind, FailureKind::CommandNotExecutable, "{path}");
    }
    vm.power_off();
}

#[test]
fn a_read_only_container_can_write_to_its_temporary_directories_only() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping_with(tools, |plan| plan.read_only = true);
    assert_eq!(
        vm.shell("touch /run/a /tmp/a /var/tmp/a /dev/shm/a && echo yes")
            .ok(),
        "yes\n"
    );
    let output = vm.shell("touch /a; touch /etc/a; echo x > /data/hello; cat /data/hello");
    assert_eq!(output.ok(), "hello\n");
    let errors = String::from_utf8_lossy(&output.stderr)
        .matches("Read-only file system")
        .count();
    assert_eq!(errors, 3, "{output:?}");
    vm.power_off();
}

#[test]
fn a_privileged_container_is_not_held_back() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping_with(tools, |plan| plan.privileged = true);
    let script = "mkdir /m && mount -t tmpfs none /m && mknod /dev/mine c 1 3 && echo x > /dev/mine && \
                  mkdir /sys/fs/cgroup/own && grep CapEff /proc/self/status";
    assert_eq!(vm.shell(script).ok(), "CapEff:\t000001ffffffffff\n");
    vm.power_off();
}

#[test]
fn the_network_is_as_planned() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping_with(tools, |plan| {
        plan.identity.network = Some(fcvm_types::guest::GuestNetwork {
            address: "10.0.2.15".parse().unwrap(),
            prefix_length: 24,
            gateway: "10.0.2.2".parse().unwrap(),
            ipv6: Some(fcvm_types::guest::GuestIpv6 {
                address: "fd00::15".parse().unwrap(),
                prefix_length: 64,
                gateway: "fe80::2".parse().unwrap(),
            }),
            dns_servers: vec!["10.0.2.3".parse().unwrap()],
            dns_search: vec!["example".into()],
            mtu: 1400,
        });
    });
    let output = vm.shell("ip addr show eth0; ip route; ip -6 route; cat /etc/resolv.conf");
    for text in [
        "mtu 1400",
        "inet 10.0.2.15/24",
        "inet6 fd00::15/64",
        "default via 10.0.2.2 dev eth0",
        "default via fe80::2 dev eth0",
        "search example\nnameserver 10.0.2.3\n",
    ] {
        assert!(output.ok().contains(text), "{text}: {output:?}");
    }
    assert!(!output.text().contains("tentative"), "{output:?}");
    // An ordinary user may ping and serve low ports, on loopback too.
    let range = "cat /proc/sys/net/ipv4/ping_group_range";
    assert_eq!(vm.shell(range).ok(), "0\t2147483647\n");
    let script = "nc -l -p 80 -e echo up & until nc 127.0.0.1 80; do :; done";
    let output = vm
        .exec(&with(script, |plan| plan.user = "app".into()))
        .collect();
    assert_eq!(output.ok(), "up\n");
    // The hypervisor's network maps its gateway to the host's loopback.
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let answering = std::thread::spawn(move || {
        let (mut socket, _) = server.accept().unwrap();
        std::io::Write::write_all(&mut socket, b"hello from the host\n").unwrap();
    });
    let output = vm.shell(&format!("nc 10.0.2.2 {port}"));
    assert_eq!(output.ok(), "hello from the host\n");
    answering.join().unwrap();
    vm.power_off();
}

#[test]
fn a_run_that_cannot_start_says_why_and_the_guest_stays_up() {
    let Some(tools) = lab::tools() else { return };
    let (mut vm, mut stream) = Vm::run(tools, &plan(process(&["/no/such/program"])));
    let output = stream.collect();
    assert_eq!(output.failure().kind, FailureKind::CommandNotFound);
    assert_eq!(
        output.failure().message,
        "exec: '/no/such/program' does not exist in the container"
    );
    let after = vm.exec(&shell("true")).collect();
    assert_eq!(after.failure().kind, FailureKind::Guest);
    assert!(matches!(vm.ask(&Request::Stats), Outcome::Stats(_)));
    vm.power_off();
}
