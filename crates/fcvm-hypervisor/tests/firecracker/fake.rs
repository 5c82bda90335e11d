//! A strict stand-in for Firecracker: the same sockets, the same requests in the same order, the same
//! refusals. What it knows of the API is written down here once more, from Firecracker's own
//! description (src/firecracker/swagger/firecracker.yaml) and from what a real one answered, so that a
//! request that the real one would refuse is refused here.
//!
//! It is this test program, started by a script that stands where Firecracker would.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use serde_json::{Value, json};

/// What the fake's guest writes to its console.
pub(crate) const CONSOLE_TEXT: &str = "the guest runs\n";
/// What its agent says first.
pub(crate) const AGENT_TEXT: &[u8] = b"the agent is there";
/// What it writes of a guest's memory, at its beginning.
pub(crate) const FULL_MEMORY: &[u8] = b"all memory, from the beginning";
/// What it writes of what is in memory, or was written to.
pub(crate) const DIRTY_MEMORY: &[u8] = b"some";
/// What it says of a file that does not hold all memory.
pub(crate) const SHORT_MEMORY: &str = "Load snapshot error: Failed to restore from snapshot: Failed to load guest \
    memory: Error creating guest memory from file: Failed to restore guest memory: Total sum of memory regions \
    exceeds largest possible file offset";
/// What the jailer tells Firecracker by itself.
const JAILED_ARGUMENTS: &str =
    "--id 0123abcd --start-time-us 1 --start-time-cpu-us 1 --parent-cpu-time-us 1 ";
/// A stand-in for the jailer, as strict: it takes what the real one takes, lays the program in and runs
/// it there, with mounts of its own. It stays who it is and sees all of the host, which the tests look into the jail by.
pub(crate) const JAILER: &str = r#"#!/bin/sh
fail() { echo "Error: $1" >&2; exit 1; }
arguments="$*"
while [ $# -gt 0 ]; do
    case $1 in
    --id) id=$2 ;;
    --exec-file) program=$2 ;;
    --uid) uid=$2 ;;
    --gid) gid=$2 ;;
    --chroot-base-dir) base=$2 ;;
    --netns) [ -e "$2" ] || fail "FileOpen($2)" ;;
    --cgroup-version) [ "$2" = 2 ] || fail "CgroupInvalidVersion" ;;
    --parent-cgroup) [ "$2" = fcvm ] || fail "CgroupInvalidParentPath" ;;
    --cgroup) case $2 in *=*=* | *=) fail "CgroupFormat" ;; *.*=*) ;; *) fail "CgroupFormat" ;; esac ;;
    --) shift; break ;;
    *) fail "ArgumentParsing(UnexpectedArgument($1))" ;;
    esac
    shift 2
done
[ -n "$uid" ] && [ -n "$gid" ] || fail "ArgumentParsing(MissingArgument)"
[ -d "$base" ] || fail "Canonicalize($base)"
name=${program##*/} root=$base/${program##*/}/$id/root
mkdir -p "$root" && cd "$root" || fail "CreateDir"
echo "$arguments" >jailer-arguments
cp "$program" "$name" || fail "Copy"
[ ! -e dev ] || fail "MknodDev(EEXIST)"
mkdir dev run
exec unshare --mount --propagation slave "./$name" --id "$id" --start-time-us 1 --start-time-cpu-us 1 --parent-cpu-time-us 1 "$@"
"#;
/// Name of the ignored test that is the fake.
const ENTRY: &str = "fake_firecracker";

/// How the fake misbehaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Behaviour<'a> {
    /// The version that it tells; a usual one where empty.
    pub(crate) version: &'a str,
    /// What it does, and on which request, as `METHOD /path`.
    pub(crate) fault: Option<(Fault, &'a str)>,
    /// It listens on its socket some time after the socket is there.
    pub(crate) late: bool,
}

/// What the fake does in place of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Status 400 and a reason of several lines.
    Refuse,
    /// An answer without the reason.
    Silent,
    /// Nothing, ever.
    Hang,
    /// It ends.
    Die,
    /// It ends as after a guest's reset, behind an answer.
    Reset,
    /// What is no HTTP.
    Nonsense,
    /// An answer longer than any is.
    Flood,
}

/// Writes the script by which the fake is started, and gives its path.
pub(crate) fn install(directory: &Path, behaviour: Behaviour<'_>) -> PathBuf {
    let path = directory.join("firecracker");
    let program = std::env::current_exe().unwrap();
    let (fault, request) = match behaviour.fault {
        Some((fault, request)) => (format!("{fault:?}"), request),
        None => (String::new(), ""),
    };
    let version = match behaviour.version {
        "" => "1.17.0-dev",
        version => version,
    };
    let script = format!(
        "#!/bin/sh\n\
         if [ \"$1\" = --version ]; then printf 'Firecracker v%s\\n\\n' '{version}'; exit 0; fi\n\
         FAKE_ARGUMENTS=\"$*\" FAKE_VERSION='{version}' FAKE_FAULT='{fault}' FAKE_REQUEST='{request}' \
         FAKE_LATE='{}' exec '{}' --exact {ENTRY} --ignored --nocapture --quiet\n",
        behaviour.late,
        program.display(),
    );
    fcvm_testing::write_program(&path, &script);
    path
}

/// The fake's process.
pub(crate) fn main() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let all = variable("FAKE_ARGUMENTS");
    let plain = all.strip_suffix(" --enable-pci");
    let arguments = plain.unwrap_or(&all);
    match arguments.strip_prefix(JAILED_ARGUMENTS) {
        Some(own) => assert_eq!(own, "--api-sock api --level Error"),
        None => assert_eq!(
            arguments,
            "--api-sock api --id fcvm --log-path /proc/self/fd/2 --level Warning"
        ),
    }
    let listener = listen(variable("FAKE_LATE") == "true");
    let mut machine = Machine {
        version: variable("FAKE_VERSION"),
        fault: variable("FAKE_FAULT"),
        faulty: variable("FAKE_REQUEST"),
        jailed: arguments.starts_with(JAILED_ARGUMENTS),
        pci: plain.is_some(),
        ..Machine::default()
    };
    for stream in listener.incoming() {
        machine.serve(stream.unwrap());
    }
}

fn listen(late: bool) -> UnixListener {
    let address = SocketAddrUnix::new("api").unwrap();
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    if late {
        // Nothing tells when somebody has tried to connect and was refused.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    rustix::net::listen(&socket, 10).unwrap();
    socket.into()
}

/// What the fake was told.
#[derive(Default)]
struct Machine {
    version: String,
    fault: String,
    faulty: String,
    /// Nothing is there but what is in its directory.
    jailed: bool,
    /// Devices are on a PCI bus.
    pci: bool,
    configured: BTreeSet<String>,
    memory_mib: u64,
    state: State,
    metrics: Option<File>,
    /// The socket behind the guest's vsock, and the agent's connection.
    vsock: Option<UnixListener>,
    agent: Option<UnixStream>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    NotStarted,
    Running,
    Paused,
}

/// An answer: a status and what stands in the body.
type Answer = Result<Option<Value>, String>;

impl Machine {
    /// Answers the requests of a connection.
    fn serve(&mut self, mut stream: UnixStream) {
        while let Some((method, path, body)) = read_request(&mut stream) {
            let request = format!("{method} {path}");
            if request == self.faulty {
                self.misbehave(&mut stream);
                continue;
            }
            let answer = self.answer(&method, &path, &body);
            let fatal = answer.is_err() && request == "PUT /snapshot/load";
            match answer {
                Ok(None) => respond(&mut stream, "204 No Content", ""),
                Ok(Some(value)) => respond(&mut stream, "200 OK", &value.to_string()),
                Err(fault) => respond(
                    &mut stream,
                    "400 Bad Request",
                    &json!({ "fault_message": fault }).to_string(),
                ),
            }
            if fatal {
                // What was half loaded cannot be taken back.
                std::process::exit(1);
            }
        }
    }

    fn misbehave(&mut self, stream: &mut UnixStream) {
        let fault = json!({ "fault_message": "The kernel file\n\tis 'odd'." }).to_string();
        match self.fault.as_str() {
            "Refuse" => respond(stream, "400 Bad Request", &fault),
            "Silent" => respond(stream, "500 Internal Server Error", ""),
            "Hang" => loop {
                std::thread::park();
            },
            "Die" => {
                eprintln!("Error: the fake gives up");
                std::process::exit(1);
            }
            "Reset" => {
                respond(stream, "204 No Content", "");
                std::process::exit(0);
            }
            "Nonsense" => stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n").unwrap(),
            "Flood" => {
                let flood = vec![b' '; 2 << 20];
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", flood.len());
                // The reader goes away in the middle.
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&flood);
            }
            other => panic!("{other}"),
        }
    }

    fn answer(&mut self, method: &str, path: &str, body: &str) -> Answer {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        if method == "GET" {
            return self.tell(&parts);
        }
        let body: Value = serde_json::from_str(body).map_err(|error| {
            format!("An error occurred when deserializing the json body of a request: {error}.")
        })?;
        if self.jailed && body.to_string().contains("\":\"/") {
            return Err("No such file or directory (os error 2)".into());
        }
        match (method, parts.as_slice()) {
            ("PUT", ["actions"]) => self.act(&body),
            ("PUT", ["metrics"]) if self.metrics.is_none() => self.metrics(&body),
            ("PATCH", ["vm"]) => self.change_state(&body),
            ("PUT", ["snapshot", "create"]) => self.create_snapshot(&body),
            ("PUT", _) if self.state != State::NotStarted => {
                Err("The requested operation is not supported after starting the microVM.".into())
            }
            ("PUT", ["snapshot", "load"]) => self.load_snapshot(&body),
            ("PUT", ["machine-config"]) => self.machine(&body),
            ("PUT", ["boot-source"]) => self.boot_source(&body),
            ("PUT", ["drives", id]) => self.drive(id, &body),
            ("PUT", ["network-interfaces", id]) => self.network(id, &body),
            ("PUT", ["vsock"]) => self.vsock(&body),
            ("PUT", ["entropy"]) => self.entropy(&body),
            _ => Err(format!(
                "Invalid request method and/or path: {method} {path}."
            )),
        }
    }

    fn tell(&self, parts: &[&str]) -> Answer {
        match parts {
            ["version"] => Ok(Some(json!({ "firecracker_version": self.version }))),
            [""] => Ok(Some(json!({
                "id": "fcvm",
                "app_name": "Firecracker",
                "vmm_version": self.version,
                "state": match self.state {
                    State::NotStarted => "Not started",
                    State::Running => "Running",
                    State::Paused => "Paused",
                },
            }))),
            _ => Err(format!(
                "Invalid request method and/or path: GET {}.",
                parts.join("/")
            )),
        }
    }

    fn machine(&mut self, body: &Value) -> Answer {
        let text = ["cpu_template", "huge_pages"];
        fields(
            body,
            &["vcpu_count", "mem_size_mib"],
            &[&text[..], &["smt", "track_dirty_pages"]].concat(),
        )?;
        let count = number(body, "vcpu_count")?;
        if !(1..=32).contains(&count) {
            return Err("The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.".into());
        }
        self.memory_mib = number(body, "mem_size_mib")?;
        if self.memory_mib == 0 {
            return Err("The memory size (MiB) is invalid.".into());
        }
        self.once("machine-config")
    }

    fn boot_source(&mut self, body: &Value) -> Answer {
        fields(body, &["kernel_image_path"], &["initrd_path", "boot_args"])?;
        readable(
            text(body, "kernel_image_path")?,
            "The kernel file cannot be opened",
        )?;
        if body.get("initrd_path").is_some() {
            readable(
                text(body, "initrd_path")?,
                "The initrd file cannot be opened",
            )?;
        }
        let arguments = text(body, "boot_args")?;
        if arguments.len() >= 2048 {
            return Err(
                "The kernel command line is invalid: String contains too many bytes.".into(),
            );
        }
        // The real one takes it, and its guest finds no devices.
        if self.pci == arguments.split(' ').any(|argument| argument == "pci=off") {
            return Err("the guest does not look for its devices where they are".into());
        }
        self.once("boot-source")
    }

    fn drive(&mut self, id: &str, body: &Value) -> Answer {
        fields(
            body,
            &["drive_id", "is_root_device"],
            &[
                "partuuid",
                "cache_type",
                "is_read_only",
                "path_on_host",
                "rate_limiter",
                "io_engine",
                "socket",
            ],
        )?;
        same_id(id, text(body, "drive_id")?)?;
        let path = text(body, "path_on_host")?;
        let read_only = body["is_read_only"]
            .as_bool()
            .ok_or("is_read_only is no boolean")?;
        OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|error| format!("Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: {error} {path}"))?;
        self.once(&format!("drives/{id}"))
    }

    fn network(&mut self, id: &str, body: &Value) -> Answer {
        fields(
            body,
            &["iface_id", "host_dev_name"],
            &["guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter"],
        )?;
        same_id(id, text(body, "iface_id")?)?;
        let name = text(body, "host_dev_name")?;
        if !Path::new("/sys/class/net").join(name).exists() {
            return Err(format!(
                "Could not create the network device: Open tap device failed: Error while creating ifreq structure: Operation not permitted (os error 1). Invalid TUN/TAP Backend provided by {name}."
            ));
        }
        self.once(&format!("network-interfaces/{id}"))
    }

    fn vsock(&mut self, body: &Value) -> Answer {
        fields(body, &["guest_cid", "uds_path"], &["vsock_id"])?;
        if number(body, "guest_cid")? < 3 {
            return Err("invalid guest_cid".into());
        }
        let path = text(body, "uds_path")?;
        let listener = UnixListener::bind(path)
            .map_err(|error| format!("Cannot create backend for vsock device: Error binding to the host-side Unix socket: {error}"))?;
        self.vsock = Some(listener);
        self.once("vsock")
    }

    /// A named pipe that somebody reads already.
    fn metrics(&mut self, body: &Value) -> Answer {
        fields(body, &["metrics_path"], &["emit_id", "properties"])?;
        let pipe = OpenOptions::new()
            .read(true)
            .write(true)
            .open(text(body, "metrics_path")?);
        self.metrics =
            Some(pipe.map_err(|error| format!("Cannot initialize the metrics system: {error}"))?);
        Ok(None)
    }

    fn entropy(&mut self, body: &Value) -> Answer {
        fields(body, &[], &["rate_limiter"])?;
        self.once("entropy")
    }

    fn act(&mut self, body: &Value) -> Answer {
        fields(body, &["action_type"], &[])?;
        match text(body, "action_type")? {
            "FlushMetrics" => {
                let line = json!({"utc_timestamp_ms": 1, "block": {"read_bytes": 4096}});
                let pipe = self
                    .metrics
                    .as_mut()
                    .ok_or("Metrics were not configured.")?;
                writeln!(pipe, "{line}").unwrap();
                Ok(None)
            }
            "InstanceStart" if self.state != State::NotStarted => {
                Err("The requested operation is not supported after starting the microVM.".into())
            }
            "InstanceStart" if !self.configured.contains("boot-source") => {
                Err("Cannot start microvm without kernel configuration.".into())
            }
            "InstanceStart" => {
                self.state = State::Running;
                print!("{CONSOLE_TEXT}");
                std::io::stdout().flush().unwrap();
                self.connect_agent();
                Ok(None)
            }
            other => Err(format!("unknown variant `{other}`")),
        }
    }

    /// The guest's agent connects to the host.
    fn connect_agent(&mut self) {
        if self.vsock.is_some() {
            // Refused where the owner does not wait for the agent any more.
            self.agent = UnixStream::connect("vsock_5252").ok();
            if let Some(stream) = &mut self.agent {
                stream.write_all(AGENT_TEXT).unwrap();
            }
        }
    }

    fn create_snapshot(&mut self, body: &Value) -> Answer {
        fields(
            body,
            &["mem_file_path", "snapshot_path"],
            &["snapshot_type"],
        )?;
        if self.state != State::Paused {
            return Err("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running".into());
        }
        let memory = match text(body, "snapshot_type")? {
            "Full" => FULL_MEMORY,
            "Diff" => DIRTY_MEMORY,
            other => {
                return Err(format!(
                    "unknown variant `{other}`, expected `Diff` or `Full`"
                ));
            }
        };
        let opened = |error: std::io::Error| {
            format!(
                "Create snapshot error: Cannot perform open on the snapshot backing file: {error}"
            )
        };
        let configured: Vec<&str> = self.configured.iter().map(String::as_str).collect();
        // The guest's connections are ended first.
        self.agent = None;
        let state = format!("{}\nmemory/{}", configured.join("\n"), self.memory_mib);
        fs::write(text(body, "snapshot_path")?, state).map_err(opened)?;
        // The memory's file is written over, and gets the memory's size.
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let file = options.open(text(body, "mem_file_path")?).map_err(opened)?;
        let size = self.memory_mib << 20;
        if file.metadata().map_err(opened)?.len() != size {
            file.set_len(0).map_err(opened)?;
            file.set_len(size).map_err(opened)?;
        }
        file.write_all_at(memory, 0).map_err(opened)?;
        Ok(None)
    }

    fn load_snapshot(&mut self, body: &Value) -> Answer {
        fields(
            body,
            &["snapshot_path", "mem_backend"],
            &[
                "track_dirty_pages",
                "resume_vm",
                "network_overrides",
                "vsock_override",
            ],
        )?;
        if !self.configured.is_empty() {
            return Err("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.".into());
        }
        let failed = |error: std::io::Error| {
            format!("Load snapshot error: Failed to restore from snapshot: {error}")
        };
        let state = fs::read_to_string(text(body, "snapshot_path")?).map_err(failed)?;
        if !state.starts_with("boot-source") {
            return Err("Load snapshot error: Failed to restore from snapshot:\nFailed to load snapshot state from file: Bad magic value".into());
        }
        let (memory, parts): (Vec<_>, Vec<_>) =
            state.lines().partition(|line| line.starts_with("memory/"));
        let memory_mib = memory
            .first()
            .map_or(0, |line| line["memory/".len()..].parse().unwrap());
        let backend = &body["mem_backend"];
        fields(backend, &["backend_type", "backend_path"], &[])?;
        let path = text(backend, "backend_path")?;
        match text(backend, "backend_type")? {
            "File" => {
                let bytes = fs::metadata(path).map_err(failed)?.len();
                if bytes < memory_mib << 20 {
                    return Err(SHORT_MEMORY.into());
                }
            }
            "Uffd" => UnixStream::connect(path).map(drop).map_err(failed)?,
            other => return Err(format!("unknown variant `{other}`")),
        }
        // Disks and socket have the names that they had.
        for part in &parts {
            if let Some(drive) = part.strip_prefix("drives/") {
                File::open(drive).map(drop).map_err(failed)?;
            } else if *part == "vsock" {
                self.vsock = Some(UnixListener::bind("vsock").map_err(failed)?);
            }
        }
        self.configured = parts.into_iter().map(str::to_owned).collect();
        self.memory_mib = memory_mib;
        self.state = State::Paused;
        Ok(None)
    }

    fn change_state(&mut self, body: &Value) -> Answer {
        fields(body, &["state"], &[])?;
        if self.state == State::NotStarted {
            return Err(
                "The requested operation is not supported before starting the microVM.".into(),
            );
        }
        self.state = match text(body, "state")? {
            "Paused" => State::Paused,
            "Resumed" => State::Running,
            other => {
                return Err(format!(
                    "unknown variant `{other}`, expected `Paused` or `Resumed`"
                ));
            }
        };
        if self.state == State::Running && self.agent.is_none() {
            self.connect_agent();
        }
        Ok(None)
    }

    /// The real one takes a second configuration in place of the first; a driver has no use for it.
    fn once(&mut self, what: &str) -> Answer {
        match self.configured.insert(what.to_owned()) {
            true => Ok(None),
            false => Err(format!("{what} was configured twice")),
        }
    }
}

fn fields(body: &Value, required: &[&str], optional: &[&str]) -> Result<(), String> {
    let object = body.as_object().ok_or("the body is no object")?;
    for field in required {
        if !object.contains_key(*field) {
            return Err(format!("missing field `{field}`"));
        }
    }
    let known = |field: &str| required.contains(&field) || optional.contains(&field);
    match object.keys().find(|field| !known(field)) {
        Some(field) => Err(format!("unknown field `{field}`")),
        None => Ok(()),
    }
}

fn text<'a>(body: &'a Value, field: &str) -> Result<&'a str, String> {
    body[field]
        .as_str()
        .ok_or_else(|| format!("`{field}` is no string"))
}

fn number(body: &Value, field: &str) -> Result<u64, String> {
    body[field]
        .as_u64()
        .ok_or_else(|| format!("`{field}` is no number"))
}

fn same_id(path: &str, body: &str) -> Result<(), String> {
    if !body.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(
            "API Resource IDs can only contain alphanumeric characters and underscores.".into(),
        );
    }
    match path == body {
        true => Ok(()),
        false => Err("The id from the path does not match the id from the body!".into()),
    }
}

fn readable(path: &str, message: &str) -> Result<(), String> {
    File::open(path)
        .map(drop)
        .map_err(|error| format!("{message}: {error}"))
}

/// Method, path and body of the next request; nothing at the connection's end.
fn read_request(stream: &mut UnixStream) -> Option<(String, String, String)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    assert_eq!(words.next(), Some("HTTP/1.1"), "{head}");
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.trim().parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some((method, path, String::from_utf8(body).unwrap()))
}

fn respond(stream: &mut UnixStream, status: &str, body: &str) {
    let length = match body {
        "" if status.starts_with("204") => String::new(),
        "" => "Content-Length: 0\r\n".to_owned(),
        body => format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ),
    };
    // The driver may have stopped waiting.
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{length}\r\n{body}"
    );
}
