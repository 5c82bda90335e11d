//! `fcvm pool` through the program. No VM is started.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// A place of its own, with a pool of 64 MiB in it.
struct Lab {
    directory: tempfile::TempDir,
}

struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Lab {
    fn new() -> Self {
        let lab = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        lab.must(&["create", "--size", "64m"]);
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_fcvm"))
            .arg("pool")
            .args(arguments)
            .env("FCVM_DATA_DIR", self.path("data"))
            .env("FCVM_RUNTIME_DIR", self.path("run"))
            .output()
            .unwrap();
        Said {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn must(&self, arguments: &[&str]) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, 0, "{arguments:?}: {}", said.stderr);
        said.stdout
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.must(&[arguments, &["--format", "json"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// Fails with one line, which is returned.
    fn fails(&self, arguments: &[&str]) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, 125, "{arguments:?}: {}", said.stdout);
        let line = said
            .stderr
            .strip_suffix('\n')
            .unwrap_or_default()
            .to_owned();
        assert!(
            line.starts_with("Error: ") && !line.contains('\n'),
            "{line}"
        );
        line
    }

    fn export(&self, name: &str) -> Vec<u8> {
        let _ = fs::remove_file(self.path("out"));
        self.must(&["export", name, &self.text("out")]);
        fs::read(self.path("out")).unwrap()
    }
}

/// A disk with holes and a tail that fills no block.
fn disk(value: u8) -> Vec<u8> {
    let mut bytes = vec![0; (3 << 20) + 77];
    bytes[5000..300_000].fill(value);
    *bytes.last_mut().unwrap() = value;
    bytes
}

#[test]
fn disks_go_in_are_cloned_and_come_out() {
    let lab = Lab::new();
    fs::write(lab.path("disk"), disk(1)).unwrap();
    lab.must(&["import", &lab.text("disk"), "vms/base"]);
    lab.must(&["clone", "vms/base", "vms/web"]);
    assert_eq!(
        lab.must(&["snapshot", "vms@monday"]),
        "vms@monday: 2 objects\n"
    );
    assert_eq!(lab.export("vms/web"), disk(1));
    assert_eq!(lab.export("vms/base@monday"), disk(1));
    assert_eq!(
        lab.must(&["rollback", "vms/web@monday"]),
        "vms/web@monday: 1 object\n"
    );
    let listed = lab.json(&["ls"]);
    let names: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "vms",
            "vms/base",
            "vms/base@monday",
            "vms/web",
            "vms/web@monday"
        ]
    );
    assert_eq!(listed[1]["size_bytes"], (3 << 20) + 77);
    assert_eq!(listed[1]["exclusive_bytes"], 0);
    let listed = lab.must(&["ls", "vms/web"]);
    assert_eq!(listed.lines().count(), 3, "{listed}");
    assert!(lab.fails(&["destroy", "vms/web"]).contains("--recursive"));
    lab.must(&["destroy", "--recursive", "vms"]);
    assert_eq!(lab.json(&["ls"]), Value::Array(Vec::new()));
    assert_eq!(lab.json(&["status"])["data_bytes"], 0);
}

#[test]
fn the_space_adds_up() {
    let lab = Lab::new();
    fs::write(lab.path("disk"), disk(1)).unwrap();
    lab.must(&["import", &lab.text("disk"), "vms/base"]);
    lab.must(&["clone", "vms/base", "vms/web"]);
    let status = lab.json(&["status"]);
    let bytes = |member: &str| status[member].as_u64().unwrap();
    let parts = [
        "reserved_bytes",
        "data_bytes",
        "metadata_bytes",
        "freeing_bytes",
        "free_bytes",
    ];
    assert_eq!(parts.map(bytes).iter().sum::<u64>(), bytes("size_bytes"));
    assert_eq!(bytes("size_bytes"), 64 << 20);
    // Five records have data, and the last one.
    assert_eq!(bytes("data_bytes"), 6 << 16);
    assert_eq!(bytes("referenced_bytes"), 2 * (6 << 16));
    assert_eq!(bytes("saved_bytes"), 6 << 16);
    lab.must(&["grow", "128m"]);
    assert_eq!(lab.json(&["status"])["size_bytes"], 128 << 20);
    assert!(lab.fails(&["grow", "64m"]).contains("it must be"));
    assert!(lab.must(&["status"]).contains("saved by cloning"));
}

#[test]
fn a_stream_becomes_an_object() {
    let lab = Lab::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fcvm"));
    command.args([
        "pool",
        "--pool",
        &lab.text("data/pool/pool.img"),
        "import",
        "-",
        "vms/in",
    ]);
    command.env("FCVM_DATA_DIR", lab.path("other"));
    fs::write(lab.path("disk"), disk(5)).unwrap();
    command.stdin(fs::File::open(lab.path("disk")).unwrap());
    assert!(command.status().unwrap().success());
    assert_eq!(lab.export("vms/in"), disk(5));
}

#[test]
fn damage_is_found_named_and_repaired() {
    let lab = Lab::new();
    fs::write(lab.path("disk"), disk(1)).unwrap();
    lab.must(&["import", &lab.text("disk"), "vms/base"]);
    assert_eq!(lab.json(&["check"])["problem_count"], 0);
    assert_eq!(lab.json(&["scrub"])["repaired_copies"], 0);
    // All pages of the space map: kind 4, docs/format/pool.md.
    let path = lab.path("data/pool/pool.img");
    let mut bytes = fs::read(&path).unwrap();
    for page in bytes.chunks_mut(4096) {
        if page[4..8] == *b"BPPG" && page[8] == 4 {
            page[100] ^= 1;
        }
    }
    fs::write(&path, &bytes).unwrap();
    assert!(lab.fails(&["ls"]).contains("check --repair"));
    assert_eq!(lab.json(&["check", "--repair"])["problem_count"], 0);
    assert_eq!(lab.export("vms/base"), disk(1));
}

#[test]
fn snapshots_travel_through_files_and_pipes_and_go_on_after_a_cut() {
    let (from, to) = (Lab::new(), Lab::new());
    fs::write(from.path("disk"), disk(1)).unwrap();
    from.must(&["import", &from.text("disk"), "vms/base"]);
    from.must(&["clone", "vms/base", "vms/web"]);
    from.must(&["snapshot", "vms@monday"]);
    let file = from.text("stream");
    let said = from.json(&["send", "vms@monday", "--output", &file]);
    assert_eq!(said["objects"], 2);
    let bytes = fs::read(&file).unwrap();
    assert!(bytes.len() < 400_000, "two disks with the same 300 kB");
    assert!(
        from.fails(&["send", "vms@monday", "--output", &file])
            .contains("cannot write")
    );
    fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    let line = to.fails(&["receive", "--input", &file]);
    let token = line.rsplit(' ').next().unwrap();
    let listed = to.json(&["receive", "--list"]);
    assert_eq!(listed[0]["token"], token);
    assert!(to.fails(&["ls", "vms"]).contains("does not exist"));
    fs::remove_file(&file).unwrap();
    from.must(&["send", "vms@monday", "--resume", token, "--output", &file]);
    let said = to.json(&["receive", "--input", &file]);
    assert_eq!(
        (&said["is_resumed"], &said["objects"]),
        (&true.into(), &2.into())
    );
    assert_eq!(to.export("vms/web"), disk(1));
    assert_eq!(to.export("vms/base@monday"), disk(1));
    // The difference, through a pipe.
    fs::write(from.path("disk"), disk(2)).unwrap();
    from.must(&["destroy", "vms/web", "--recursive"]);
    from.must(&["import", &from.text("disk"), "vms/web"]);
    from.must(&["snapshot", "vms@tuesday"]);
    assert!(
        to.fails(&["receive", "--input", "/dev/null"])
            .contains("ends too early")
    );
    let fcvm = env!("CARGO_BIN_EXE_fcvm");
    let pool = |lab: &Lab| lab.text("data/pool/pool.img");
    let script = format!(
        "{fcvm} pool --pool {} send vms/base@tuesday --from monday | {fcvm} pool --pool {} receive",
        pool(&from),
        pool(&to)
    );
    let said = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&said.stdout),
        "vms@tuesday: 1 object\n"
    );
    let names: Vec<_> = to
        .json(&["ls"])
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].clone())
        .collect();
    assert!(names.contains(&"vms/base@tuesday".into()), "{names:?}");
    // A token of snapshots that are other ones now.
    let said = from.run(&[
        "send",
        "vms@tuesday",
        "--resume",
        token,
        "--output",
        &from.text("again"),
    ]);
    assert!(
        said.code == 0 && said.stderr.contains("starts over"),
        "{}",
        said.stderr
    );
}

#[test]
fn a_checked_dataset_finds_a_flipped_bit_at_once() {
    let lab = Lab::new();
    fs::write(lab.path("disk"), disk(9)).unwrap();
    lab.must(&["import", &lab.text("disk"), "vms/one"]);
    lab.must(&["set", "vms", "--checksum", "on"]);
    assert_eq!(lab.json(&["ls", "vms"])[0]["checksum"], true);
    lab.must(&["import", &lab.text("disk"), "vms/two"]);
    let path = lab.path("data/pool/pool.img");
    let mut bytes = fs::read(&path).unwrap();
    for block in bytes
        .chunks_mut(4096)
        .filter(|block| block.iter().all(|byte| *byte == 9))
    {
        block[7] ^= 4;
    }
    fs::write(&path, &bytes).unwrap();
    let said = lab.run(&["scrub"]);
    assert_eq!(said.code, 125);
    assert!(said.stdout.contains("of 'vms/two'"), "{}", said.stdout);
    assert!(
        lab.fails(&["export", "vms/two", &lab.text("out")])
            .contains("not what was written")
    );
}

#[test]
fn a_compressed_dataset_takes_less_and_tells_how_much() {
    let lab = Lab::new();
    lab.must(&["set", "vms", "--compression", "zstd"]);
    let row = &lab.json(&["ls", "vms"])[0];
    assert_eq!(
        (&row["compression"], &row["checksum"]),
        (&"zstd".into(), &false.into())
    );
    fs::write(lab.path("disk"), disk(9)).unwrap();
    lab.must(&["import", &lab.text("disk"), "vms/one"]);
    lab.must(&["import", &lab.text("disk"), "plain/one"]);
    let (packed, plain) = (lab.json(&["ls", "vms/one"]), lab.json(&["ls", "plain/one"]));
    // Blocks of zeros are not there.
    let written = |rows: &Value| rows[0]["written_bytes"].as_u64().unwrap();
    assert!(written(&packed) > 0 && written(&packed) <= written(&plain));
    let [packed, plain] = [&packed[0], &plain[0]].map(|row| row["ratio"].as_f64().unwrap());
    assert!(plain <= 1.0 && packed > 10.0, "{plain} {packed}");
    assert!(lab.json(&["status"])["ratio"].as_f64().unwrap() > plain);
    assert!(lab.must(&["ls"]).contains(&format!("{packed:.2}")));
    lab.must(&["export", "vms/one", &lab.text("out")]);
    assert!(fs::read(lab.path("out")).unwrap() == disk(9));
    // The option stays where the other one changes.
    lab.must(&["set", "vms", "--checksum", "on"]);
    let row = &lab.json(&["ls", "vms"])[0];
    assert_eq!(
        (&row["compression"], &row["checksum"]),
        (&"zstd".into(), &true.into())
    );
    lab.must(&["scrub"]);
    lab.must(&["check"]);
    let said = lab.run(&["set", "vms"]);
    assert!(
        said.code != 0 && said.stderr.contains("--compression"),
        "{}",
        said.stderr
    );
}

/// A block device over a file, where this user can have one.
struct Device(String);

impl Device {
    fn new(file: &str) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show", file])
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8_lossy(&output.stdout);
                Some(Self(path.trim().to_owned()))
            }
            _ => {
                println!("skipped: no loop device can be had");
                None
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_pool_if_it_is_empty() {
    let lab = Lab::new();
    let file = fs::File::create(lab.path("device")).unwrap();
    file.set_len(32 << 20).unwrap();
    let Some(device) = Device::new(&lab.text("device")) else {
        return;
    };
    let on = |arguments: &[&'static str]| [&["--pool", device.0.as_str()], arguments].concat();
    // Not more than it has.
    lab.fails(&on(&["create", "--size", "64m"]));
    lab.must(&on(&["create", "--size", "32m"]));
    fs::write(lab.path("disk"), disk(1)).unwrap();
    let source = lab.text("disk");
    lab.must(&["--pool", &device.0, "import", &source, "vms/base"]);
    lab.must(&on(&["clone", "vms/base", "vms/web"]));
    lab.must(&on(&["destroy", "vms/base"]));
    lab.must(&on(&["check"]));
    lab.must(&on(&["scrub"]));
    lab.must(&["--pool", &device.0, "export", "vms/web", &lab.text("out")]);
    assert_eq!(fs::read(lab.path("out")).unwrap(), disk(1));
    let again = lab.fails(&on(&["create", "--size", "32m"]));
    assert!(again.contains("is not empty"), "{again}");
    let lock = fs::File::open(&device.0).unwrap();
    lock.lock().unwrap();
    assert!(
        lab.fails(&on(&["ls"]))
            .contains("in use by another process")
    );
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let lab = Lab::new();
    assert!(lab.fails(&["create", "--size", "64m"]).contains("exists"));
    assert!(
        lab.fails(&["--pool", &lab.text("none"), "status"])
            .contains("fcvm pool create")
    );
    fs::write(lab.path("text"), "no pool at all").unwrap();
    assert!(
        lab.fails(&["--pool", &lab.text("text"), "status"])
            .contains("not a pool")
    );
    assert!(
        lab.fails(&["--pool", &lab.text("small"), "create", "--size", "1m"])
            .contains("it must be")
    );
    assert!(!lab.path("small").exists(), "a failed creation left a file");
    // What a killed one has left is no pool, and in nobody's way.
    fs::write(lab.path(".fresh.fcvm-unfinished"), "half").unwrap();
    lab.must(&["--pool", &lab.text("fresh"), "create", "--size", "64m"]);
    assert!(!lab.path(".fresh.fcvm-unfinished").exists());
    lab.must(&["--pool", &lab.text("fresh"), "check"]);
    assert!(
        lab.fails(&["clone", "vms/a", "vms/b"])
            .contains("does not exist")
    );
    assert!(
        lab.fails(&["clone", "vms", "vms/b"])
            .contains("names no object")
    );
    assert!(lab.fails(&["snapshot", "vms/a"]).contains("@SNAPSHOT"));
    assert!(lab.fails(&["ls", "a/b/c"]).contains("separate names"));
    assert!(
        lab.fails(&["import", &lab.text("none"), "vms/a"])
            .contains("none")
    );
    assert_eq!(
        lab.json(&["ls"]),
        Value::Array(Vec::new()),
        "a failed import left something"
    );
    let lock = fs::File::open(lab.path("data/pool/pool.img")).unwrap();
    lock.lock().unwrap();
    assert!(lab.fails(&["ls"]).contains("in use by another process"));
}
