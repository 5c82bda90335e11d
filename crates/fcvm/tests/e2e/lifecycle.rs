//! A VM from `run -d` to `rm`: ls, inspect, stop, kill, wait, pause, labels, names.

use std::time::{Duration, SystemTime};

use serde_json::json;

use crate::base::{IMAGE, base};
use crate::image::Image;
use crate::lab::Lab;

/// A container that says so when it gets its stop signal, and does not end.
const STUBBORN: [&str; 3] = [
    "sh",
    "-c",
    "trap 'echo got TERM' TERM; echo ready; while :; do sleep 1000 & wait; done",
];

#[test]
fn a_detached_vm_is_listed_inspected_stopped_and_removed() {
    let Some(lab) = Lab::new() else { return };
    let id = lab.idle_vm("web", &["--label", "tier=front"]);
    assert!(
        id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{id}"
    );

    let table = lab.ok(&["ls"]);
    let header: Vec<&str> = table
        .lines()
        .next()
        .unwrap()
        .split("  ")
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect();
    assert_eq!(
        header,
        [
            "VM ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"
        ]
    );
    let row = table.lines().nth(1).unwrap();
    assert!(
        row.starts_with(&id[..12]) && row.contains("Up ") && row.ends_with("web"),
        "{table}"
    );
    assert_eq!(lab.ok(&["ps"]).lines().count(), 2);
    assert_eq!(lab.ok(&["ls", "-q"]), format!("{}\n", &id[..12]));
    assert_eq!(lab.ok(&["ls", "-q", "--no-trunc"]), format!("{id}\n"));

    let listed = lab.json(&["ls", "--format", "json"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let row = listed[0].as_object().unwrap();
    let mut members: Vec<&str> = row.keys().map(String::as_str).collect();
    members.sort_unstable();
    // As docs/format/json-output.md says.
    let documented = [
        "accelerator",
        "command",
        "cpus",
        "created_at",
        "error",
        "exit_code",
        "finished_at",
        "health",
        "hypervisor",
        "id",
        "image",
        "image_digest",
        "labels",
        "lineage",
        "memory_bytes",
        "name",
        "network",
        "owner_pid",
        "ports",
        "started_at",
        "state",
        "status",
    ];
    assert_eq!(members, documented);
    assert_eq!(row["id"], id.as_str());
    assert_eq!(row["name"], "web");
    assert_eq!(row["state"], "running");
    assert_eq!(row["hypervisor"], lab.hypervisor.name());
    assert!(
        row["accelerator"] == "tcg" || row["accelerator"] == "kvm",
        "{row:?}"
    );
    assert_eq!(row["memory_bytes"], 512 << 20);
    assert!(row["image"].as_str().unwrap().ends_with(IMAGE), "{row:?}");
    assert!(row["image_digest"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(row["exit_code"], json!(null));
    let owner = row["owner_pid"].to_string();
    assert_eq!(
        lab.json(&["ls", "--pid", &owner, "--format", "json"])[0]["name"],
        "web"
    );
    assert_eq!(lab.ok(&["ls", "-q", "--pid", "1"]), "");
    assert_eq!(
        lab.ok(&["ls", "-q", "--filter", "name=we"]),
        lab.ok(&["ls", "-q", "--filter", "status=running"])
    );

    let inspected = lab.json(&["inspect", "web", IMAGE]);
    assert_eq!(inspected[0]["id"], id.as_str());
    let stages = inspected[0]["start_timings"].as_array().unwrap();
    assert!(
        stages
            .iter()
            .any(|stage| stage["stage"] == "boot" && stage["microseconds"].as_u64() > Some(0)),
        "{stages:?}"
    );
    assert!(
        inspected[1].to_string().contains("FROM_IMAGE=yes"),
        "{}",
        inspected[1]
    );
    let socket = inspected[0]["control_socket"].as_str().unwrap();
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(socket).unwrap());
    assert_eq!(mode & 0o077, 0, "the control socket has mode {mode:o}");

    let line = lab.fails(125, &["rm", "web"]);
    assert!(
        line.contains("is running") && line.contains("fcvm rm -f"),
        "{line}"
    );
    assert_eq!(lab.ok(&["stop", "web"]), "web\n");
    assert_eq!(lab.ok(&["ls", "-q"]), "");
    let ended = lab.json(&["ls", "-a", "--format", "json"]);
    assert_eq!(
        (
            &ended[0]["state"],
            &ended[0]["exit_code"],
            &ended[0]["owner_pid"]
        ),
        (&json!("exited"), &json!(0), &json!(null))
    );
    assert!(ended[0]["finished_at"].as_str() >= ended[0]["started_at"].as_str());
    assert!(lab.ok(&["ls", "-a"]).contains("Exited (0)"));
    lab.wait_for_no_process();
    // Stopping what has ended is no error; what takes a running VM is.
    assert_eq!(lab.ok(&["stop", "web"]), "web\n");
    for verb in [
        &["exec", "web", "true"][..],
        &["kill", "web"],
        &["pause", "web"],
        &["top", "web"],
    ] {
        let line = lab.fails(125, verb);
        assert!(line.contains("is not running"), "{line}");
    }
    assert_eq!(lab.ok(&["rm", &id[..6]]), format!("{}\n", &id[..6]));
    lab.finish();
}

#[test]
fn stop_gives_grace_and_then_kills() {
    let Some(lab) = Lab::new() else { return };
    lab.ok(&[
        &[
            "run",
            "-d",
            "--name",
            "stubborn",
            "--network",
            "none",
            IMAGE,
        ],
        &STUBBORN[..],
    ]
    .concat());
    let logs = lab.start(&["logs", "-f", "stubborn"]);
    logs.stdout.wait_for("ready\n");
    let stop = lab.start(&["stop", "-t", "3600", "stubborn"]);
    logs.stdout.wait_for("got TERM\n");
    // Long patience: the VM is there, stopping, and still answers.
    lab.wait_for_state("stubborn", "stopping");
    assert_eq!(lab.sh("stubborn", "echo here"), "here\n");
    // A second stop with less patience ends it, and both commands with it.
    assert_eq!(lab.ok(&["stop", "-t", "1", "stubborn"]), "stubborn\n");
    assert_eq!(stop.wait().code, 0);
    assert_eq!(logs.wait().code, 0);
    assert_eq!(
        lab.json(&["ls", "-a", "--format", "json"])[0]["exit_code"],
        137
    );
    assert_eq!(lab.ok(&["rm", "stubborn"]), "stubborn\n");
    lab.finish();
}

#[test]
fn kill_sends_any_signal_and_wait_prints_the_exit_code() {
    let Some(lab) = Lab::new() else { return };
    let script =
        "trap 'echo hup' HUP; trap 'exit 33' USR2; echo ready; while :; do sleep 1000 & wait; done";
    lab.ok(&[
        "run",
        "-d",
        "--name",
        "box",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    let logs = lab.start(&["logs", "-f", "box"]);
    logs.stdout.wait_for("ready\n");
    assert_eq!(lab.ok(&["kill", "-s", "HUP", "box"]), "box\n");
    logs.stdout.wait_for("hup\n");
    let line = lab.fails(125, &["kill", "-s", "NOPE", "box"]);
    assert!(line.contains("'NOPE' is no signal"), "{line}");
    let wait = lab.start(&["wait", "box"]);
    lab.ok(&["kill", "--signal", "12", "box"]);
    assert_eq!(wait.wait().text(), "33\n");
    assert_eq!(lab.ok(&["wait", "box"]), "33\n", "a VM that has ended");
    logs.wait();
    lab.ok(&["rm", "box"]);

    lab.ok(&[
        "run",
        "-d",
        "--rm",
        "--name",
        "box",
        "--network",
        "none",
        IMAGE,
        "sleep",
        "1000",
    ]);
    lab.ok(&["kill", "box"]);
    lab.wait_for_no_process();
    lab.finish();
}

#[test]
fn rm_force_takes_running_vms_and_all_of_them() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("one", &["--network", "none"]);
    lab.ok(&["run", "--name", "two", "--network", "none", IMAGE, "true"]);
    let line = lab.fails(125, &["rm", "nosuch"]);
    assert!(line.contains("nosuch"), "{line}");
    assert_eq!(lab.ok(&["rm", "-f", "nosuch"]), "");
    assert_eq!(lab.ok(&["rm", "-f", "-a"]).lines().count(), 2);
    lab.finish();
}

#[test]
fn a_vm_that_was_to_be_removed_takes_everything_with_it() {
    let Some(lab) = Lab::new() else { return };
    let script = "echo ready; read line; exit 3";
    let mut running = lab.start(&[
        "run",
        "-i",
        "--rm",
        "--name",
        "brief",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    running.stdout.wait_for("ready\n");
    let wait = lab.start(&["wait", "brief"]);
    assert_eq!(lab.ok(&["ls", "-a", "-q"]).lines().count(), 1);
    running.write(b"go\n");
    assert_eq!(running.finish().code, 3);
    wait.wait();
    lab.finish();
}

#[test]
fn a_paused_vm_stands_still_and_has_the_right_time_after() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let ticking = lab.start(&[
        "exec",
        "box",
        "sh",
        "-c",
        "while :; do echo tick; usleep 10000; done",
    ]);
    ticking.stdout.wait_for("tick\n");
    assert_eq!(lab.ok(&["pause", "box"]), "box\n");
    assert_eq!(lab.json(&["ls", "--format", "json"])[0]["state"], "paused");
    assert!(lab.ok(&["ls"]).contains("(paused)"));
    let paused_at = SystemTime::now();
    let line = lab.fails(125, &["exec", "box", "true"]);
    assert!(
        line.contains("paused") && line.contains("fcvm unpause"),
        "{line}"
    );
    let line = lab.fails(125, &["pause", "box"]);
    assert!(
        line.contains("box") || line.contains("is not running"),
        "{line}"
    );
    let stats = lab.json(&["stats", "--no-stream", "--format", "json"]);
    assert_eq!(stats[0]["guest"], json!(null));
    // The guest's clock has to fall behind for the test to mean something: no event tells that.
    while paused_at.elapsed().unwrap() < Duration::from_secs(4) {
        std::thread::sleep(Duration::from_millis(100));
    }
    ticking.stdout.clear();
    assert_eq!(lab.ok(&["unpause", "box"]), "box\n");
    let seconds = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let before = seconds();
    let guest: u64 = lab
        .ok(&["exec", "box", "date", "+%s"])
        .trim()
        .parse()
        .unwrap();
    assert!(
        (before..=seconds()).contains(&guest),
        "the guest has {guest}, the host {before} to {}",
        seconds()
    );
    // What ran before goes on.
    ticking.stdout.wait_for("tick\n");
    let line = lab.fails(125, &["unpause", "box"]);
    assert!(line.contains("is not paused"), "{line}");
    // A paused VM can be stopped and killed.
    lab.ok(&["pause", "box"]);
    assert_eq!(lab.ok(&["stop", "box"]), "box\n");
    lab.ok(&["rm", "box"]);
    lab.finish();
}

#[test]
fn health_is_checked_from_inside() {
    let Some(lab) = Lab::new() else { return };
    let options = [
        "--network",
        "none",
        "--health-check",
        "test -e /tmp/well",
        "--health-interval",
        "100ms",
        "--health-retries",
        "2",
    ];
    lab.idle_vm("box", &options);
    let has = |wanted: &str| {
        lab.wait_for_record(&format!("with health {wanted}"), |record| {
            record["health"] == wanted
        });
    };
    assert_ne!(
        lab.json(&["ls", "--format", "json"])[0]["health"],
        "healthy"
    );
    lab.sh("box", "touch /tmp/well");
    has("healthy");
    assert!(lab.ok(&["ls"]).contains("(healthy)"));
    lab.sh("box", "rm /tmp/well");
    has("unhealthy");
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn health_is_asked_over_http() {
    let Some(lab) = Lab::new() else { return };
    let options = [
        "--network",
        "none",
        "--health-check",
        "http://127.0.0.1:8080/well",
        "--health-interval",
        "100ms",
        "--health-retries",
        "2",
    ];
    lab.idle_vm("box", &options);
    let has = |wanted: &str| {
        lab.wait_for_record(&format!("with health {wanted}"), |record| {
            record["health"] == wanted
        });
    };
    // Nobody listens.
    has("unhealthy");
    lab.sh(
        "box",
        "echo ok >/var/www/well && httpd -p 127.0.0.1:8080 -h /var/www",
    );
    has("healthy");
    // It answers, with 404.
    lab.sh("box", "rm /var/www/well");
    has("unhealthy");
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn the_images_own_health_check_is_used() {
    let Some(lab) = Lab::new() else { return };
    let mut image = Image::of(vec![base().unwrap().layer.clone()]);
    image.config = json!({
        "Cmd": ["sh"],
        "Healthcheck": {"Test": ["CMD", "test", "-e", "/tmp/well"], "Interval": 1, "Retries": 1},
    });
    let layout = lab.file("checked");
    image.write(&layout, "latest");
    lab.import(&format!("oci:{}", layout.display()), "checked:1");
    lab.first_run(&["run", "--rm", "--network", "none", "checked:1", "true"]);
    lab.idle_vm_of("checked:1", "box", &["--network", "none"]);
    lab.wait_for_record("that is unhealthy", |record| {
        record["health"] == "unhealthy"
    });
    lab.sh("box", "touch /tmp/well");
    lab.wait_for_record("that is healthy", |record| record["health"] == "healthy");
    lab.ok(&["rm", "-f", "box"]);
    let options = ["--network", "none", "--no-healthcheck"];
    lab.idle_vm_of("checked:1", "box", &options);
    assert!(lab.records()[0]["health"].is_null());
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn commands_at_once_on_one_vm_are_safe() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let at_once: Vec<_> = [
        &["stop", "-t", "1", "box"][..],
        &["rm", "-f", "box"],
        &["kill", "box"],
        &["pause", "box"],
        &["exec", "box", "true"],
        &["ls", "-a"],
        &["stop", "box"],
        &["rm", "-f", "box"],
        &["inspect", "box"],
        &["stats", "--no-stream", "box"],
    ]
    .into_iter()
    .map(|arguments| lab.start(arguments))
    .collect();
    for running in at_once {
        // Each succeeds or says in one line why not.
        let output = running.wait();
        let lines = output.stderr.lines().collect::<Vec<_>>();
        assert!(
            lines.len() <= 1 && lines.iter().all(|line| line.starts_with("Error: ")),
            "{output:?}"
        );
    }
    lab.fcvm(&["rm", "-f", "box"]);
    lab.finish();
}
