//! Wrong words on the command line and wrong files in the state directory: one line, nothing left.

use std::fs;

use crate::base::IMAGE;
use crate::lab::Lab;

#[test]
fn what_is_not_in_this_version_is_refused_and_never_ignored() {
    let Some(lab) = Lab::new() else { return };
    for (options, said) in [
        (&["-v", "/tmp:/tmp"][..], "volumes"),
        (&["--map", "/tmp:/tmp:ro"], "volumes"),
        (&["--network", "bridged"], "--network bridged"),
        (
            &["--hypervisor", "firecracker", "--cpus", "33"],
            "more than 32 processors is not in this version yet with --hypervisor firecracker",
        ),
        (
            &["--hypervisor", "qemu", "--jail"],
            "choose --hypervisor firecracker",
        ),
        (
            &["--hypervisor", "qemu", "--pci"],
            "Firecracker has a PCI bus: choose --hypervisor firecracker",
        ),
        (
            &[
                "--hypervisor",
                "firecracker",
                "--network",
                "none",
                "--accel",
                "tcg",
            ],
            "runs with KVM only",
        ),
        (&["--network", "none", "-p", "8080:80"], "network"),
        (&["-d", "-it"], "exclude each other"),
    ] {
        let line = lab.fails(125, &[&["run", "--rm"], options, &[IMAGE, "true"]].concat());
        assert!(line.contains(said), "{line}");
    }
    for verb in [&["events", "--follow"][..], &["serve"]] {
        let line = lab.fails(125, verb);
        assert!(line.contains("not in this version"), "{line}");
    }
    lab.finish();
}

#[test]
fn firecracker_that_cannot_run_is_told() {
    let Some(mut lab) = Lab::new() else { return };
    let run = [
        "run",
        "--rm",
        "--hypervisor",
        "firecracker",
        "--network",
        "none",
    ];
    let run = [&run[..], &[IMAGE, "true"]].concat();
    lab.firecracker = None;
    lab.without_program("firecracker");
    let line = lab.fails(125, &run);
    assert!(line.contains("Firecracker was not found"), "{line}");
    // One that nobody gets to: on a host that runs its guests there is nothing to refuse.
    let is_usable = lab.json(&["setup", "preflight", "--format", "json"])["checks"]
        .as_array()
        .unwrap()
        .iter()
        .any(|check| {
            check["found"]
                .as_str()
                .is_some_and(|found| found.starts_with("kvm:"))
        });
    if is_usable {
        println!("skipped: KVM runs guests here");
        return;
    }
    lab.shadow("firecracker", "echo 'Firecracker v1.17.0'");
    let jailed = [&run[..2], &["--jail=false"], &run[2..]].concat();
    let line = lab.fails(125, &jailed);
    assert!(
        line.contains("--hypervisor firecracker needs KVM, which is"),
        "{line}"
    );
    // So that QEMU is taken where the choice is left, and the reason is told.
    let run = ["run", "--hypervisor", "auto", "--name", "other"];
    lab.ok(&[&run[..], &["--network", "none", IMAGE, "true"]].concat());
    let found = lab.json(&["inspect", "other"]);
    assert_eq!(found[0]["hypervisor"], "qemu");
    let reason = found[0]["hypervisor_reason"].as_str().unwrap();
    assert!(reason.starts_with("KVM is "), "{reason}");
    lab.ok(&["rm", "other"]);
    lab.finish();
}

#[test]
fn a_user_who_may_not_open_kvm_is_told() {
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm");
        return;
    }
    if crate::lab::is_kvm_everybodys() {
        println!("skipped: all users may open /dev/kvm");
        return;
    }
    let Some(mut lab) = Lab::ordinary() else {
        return;
    };
    lab.firecracker = None;
    lab.shadow("firecracker", "echo 'Firecracker v1.17.0'");
    let run = [
        "run",
        "--rm",
        "--hypervisor",
        "firecracker",
        "--network",
        "none",
    ];
    let output = lab.fcvm(&[&run[..], &[IMAGE, "true"]].concat());
    if !output.stderr.contains("no permission") && !crate::lab::is_root() {
        println!("skipped: this user may open /dev/kvm");
        return;
    }
    let line = crate::lab::one_error(output, 125, "run");
    assert!(line.contains("this user may not open /dev/kvm"), "{line}");
    let line = lab.fails(125, &[&run[..], &["--jail", IMAGE, "true"]].concat());
    assert!(line.contains("the jailer needs root"), "{line}");
    lab.finish();
}

#[test]
fn output_that_cannot_be_written_is_no_panic() {
    let Some(lab) = Lab::new() else { return };
    let says = |stdout: std::process::Stdio| {
        let mut command = lab.command(&["image", "inspect", IMAGE]);
        let output = command.stdout(stdout).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    let (read, nobody_reads) = std::io::pipe().unwrap();
    drop(read);
    assert_eq!(says(nobody_reads.into()), (Some(141), String::new()));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let (code, said) = says(full.into());
    assert_eq!(code, Some(125), "{said}");
    assert!(
        said.starts_with("Error: cannot write to standard output: No space left"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    lab.finish();
}

#[test]
fn wrong_values_are_told_with_the_right_form() {
    let Some(lab) = Lab::new() else { return };
    // What clap reads is told in clap's form, with code 125 all the same.
    for options in [
        &["--name", "-bad"][..],
        &["--name", "a/b"],
        &["-p", "80"],
        &["-p", "99999:1"],
        &["--memory", "lots"],
        &["--cpus", "0"],
        &["--network", "token-ring"],
        &["--pull", "often"],
        &["--boot-timeout", "soon"],
        &["--nonsense"],
        &["--dns", "here"],
        &["--disk-size", "-1"],
    ] {
        let output = lab.fcvm(&[&["run", "--rm"], options, &[IMAGE, "true"]].concat());
        assert_eq!(output.code, 125, "{options:?}: {output:?}");
        assert!(
            output.stderr.starts_with("error: ") || output.stderr.starts_with("Error: "),
            "{options:?}: {output:?}"
        );
        assert!(!output.stderr.contains("panicked"), "{output:?}");
    }
    for (options, said) in [
        (&["--env", "=x"][..], "NAME=value"),
        (&["--env-file", "/no/such/file"], "/no/such/file"),
        (&["--ulimit", "nofile"], "NAME=SOFT"),
        (&["--ulimit", "wings=1"], "wings"),
        (&["--cap-add", "FLY"], "FLY"),
        (&["--security-opt", "selinux=off"], "no-new-privileges"),
        (&["--add-host", "peer"], "NAME:ADDRESS"),
        (&["--hostname", "two words"], "host name"),
        (&["--stop-signal", "SIGNOPE"], "SIGNOPE"),
        (&["--label", "=x"], "NAME=VALUE"),
        (&["--entrypoint", "[1"], "--entrypoint"),
        (&["--disk-size", "1m"], "--disk-size"),
        (&["--cidfile", "/no/such/dir/file"], "/no/such/dir/file"),
    ] {
        let line = lab.fails(
            125,
            &[
                &["run", "--rm", "--network", "none"],
                options,
                &[IMAGE, "true"],
            ]
            .concat(),
        );
        assert!(line.contains(said), "{options:?}: {line}");
    }
    // What only the guest can know is told by the guest.
    for (options, said) in [
        (&["--user", "nosuchuser"][..], "nosuchuser"),
        (&["--workdir", "/data/hello"], "/data/hello"),
    ] {
        let line = lab.fails(
            125,
            &[
                &["run", "--rm", "--network", "none"],
                options,
                &[IMAGE, "true"],
            ]
            .concat(),
        );
        assert!(line.contains(said), "{options:?}: {line}");
    }
    for wrong in [
        &[][..],
        &["nonsense"],
        &["run"],
        &["exec", "vm"],
        &["rm"],
        &["cp", "one"],
        &["--log-level", "[", "ls"],
    ] {
        let output = lab.fcvm(wrong);
        assert_eq!(output.code, 125, "{wrong:?}: {output:?}");
    }
    let output = lab.fcvm(&["--help"]);
    assert!(
        output.code == 0 && output.text().contains("Examples:"),
        "{output:?}"
    );
    assert!(lab.ok(&["--version"]).starts_with("fcvm "));
    lab.finish();
}

#[test]
fn damaged_and_future_records_hide_no_other_vm_and_can_be_removed() {
    let Some(lab) = Lab::new() else { return };
    for name in ["good", "damaged", "future"] {
        lab.ok(&["run", "--name", name, "--network", "none", IMAGE, "true"]);
    }
    let path = |id: &str| lab.data.join("vms").join(id).join("record.json");
    let id = |name: &str| {
        lab.records()
            .iter()
            .find(|record| record["name"] == name)
            .unwrap()["id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let (damaged, future) = (id("damaged"), id("future"));
    let text = fs::read_to_string(path(&damaged)).unwrap();
    fs::write(path(&damaged), &text[..text.len() / 2]).unwrap();
    let mut record: serde_json::Value =
        serde_json::from_slice(&fs::read(path(&future)).unwrap()).unwrap();
    record["version"] = 99.into();
    fs::write(path(&future), record.to_string()).unwrap();

    let listed = lab.fcvm(&["ls", "-a"]);
    assert_eq!(listed.code, 0);
    assert!(
        listed.text().contains("good") && listed.text().lines().count() == 2,
        "{listed:?}"
    );
    let told: Vec<&str> = listed.stderr.lines().collect();
    assert_eq!(told.len(), 2, "{listed:?}");
    assert!(
        listed.stderr.contains("is damaged") && listed.stderr.contains("version 99"),
        "{listed:?}"
    );
    let line = lab.fails(125, &["inspect", &damaged[..12]]);
    assert!(
        line.contains("is damaged") && line.contains("fcvm rm -f"),
        "{line}"
    );
    let line = lab.fails(125, &["exec", &future, "true"]);
    assert!(
        line.contains("version 99") && line.contains("newer fcvm"),
        "{line}"
    );
    // Other verbs are not disturbed.
    assert_eq!(lab.fcvm(&["logs", "good"]).code, 0);
    assert_eq!(lab.fcvm(&["rm", "good"]).text(), "good\n");
    for id in [&damaged, &future] {
        assert_eq!(lab.fcvm(&["rm", "-f", &id[..12]]).code, 0);
    }
    lab.finish();
}

#[test]
fn preflight_tells_what_the_host_has() {
    let Some(mut lab) = Lab::new() else { return };
    let table = lab.fcvm(&["setup", "preflight"]);
    assert_eq!(table.code, 0, "{table:?}");
    assert!(
        table.text().contains("QEMU") || table.text().contains("qemu"),
        "{table:?}"
    );
    let found = lab.fcvm(&["setup", "preflight", "--format", "json"]);
    assert_eq!(found.code, 0);
    let found: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(found.to_string().contains("accel"), "{found}");
    // Where run could not work it is 1, and the remedy is told.
    lab.without_program("qemu-system-x86_64");
    let output = lab.fcvm(&["setup", "preflight"]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.text().contains("qemu-system-x86"), "{output:?}");
    lab.finish();
}

#[test]
fn sanity_completions_and_manual_pages() {
    let Some(lab) = Lab::new() else { return };
    let said = lab.ok(&["test", "sanity", "--image", IMAGE]);
    assert!(said.ends_with("All steps passed\n"), "{said}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            lab.ok(&["completion", shell]).contains("unpause"),
            "{shell}"
        );
    }
    let directory = lab.file("man");
    fs::create_dir(&directory).unwrap();
    lab.ok(&["man", directory.to_str().unwrap()]);
    assert!(fs::read_dir(&directory).unwrap().count() > 10);
    lab.finish();
}
