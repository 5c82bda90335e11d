//! A real registry on a free port of the loopback interface, and a proxy that breaks off.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{Scratch, run};

/// bcrypt of "secret".
const HTPASSWD: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

pub(crate) struct Registry {
    child: Child,
    pub(crate) address: SocketAddr,
    dir: PathBuf,
    extra: Vec<String>,
}

impl Registry {
    /// Starts it without encryption and passwords.
    pub(crate) fn plain(scratch: &Scratch) -> Self {
        Self::start(scratch, "", "")
    }

    pub(crate) fn with_password(scratch: &Scratch) -> Self {
        let file = scratch.path("htpasswd");
        fs::write(&file, HTPASSWD).unwrap();
        let path = file.display();
        let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {path}\n");
        let mut registry = Self::start(scratch, "", &auth);
        registry.extra = vec!["--dest-creds=user:secret".into()];
        registry
    }

    /// Starts it with a certificate for 127.0.0.1 by an authority of its own: `tls/ca.crt`.
    pub(crate) fn with_tls(scratch: &Scratch) -> Self {
        let dir = scratch.path("tls");
        fs::create_dir(&dir).unwrap();
        let request = |name: &str, arguments: &[&str]| {
            run(Command::new("openssl")
                .current_dir(&dir)
                .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
                .args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj"])
                .arg(format!("/CN={name}"))
                .args(arguments));
        };
        request("authority", &["-keyout", "ca.key", "-out", "ca.crt"]);
        let names = ["-addext", "subjectAltName=IP:127.0.0.1"];
        let by = [
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-addext",
            "basicConstraints=CA:FALSE",
        ];
        let files = ["-keyout", "server.key", "-out", "server.cert"];
        request("server", &[names.as_slice(), &by, &files].concat());
        let tls = format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            dir.join("server.cert").display(),
            dir.join("server.key").display()
        );
        Self::start(scratch, &tls, "")
    }

    fn start(scratch: &Scratch, tls: &str, auth: &str) -> Self {
        let dir = scratch.path("registry");
        let config = scratch.path("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: 127.0.0.1:0\n{tls}{auth}",
            dir.display()
        );
        fs::write(&config, text).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the registry ended");
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = rest.find([',', '"', ' ']).unwrap();
                break rest[..end].parse().unwrap();
            }
        };
        // It would stop when nobody reads its log.
        thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self {
            child,
            address,
            dir,
            extra: Vec::new(),
        }
    }

    /// Name of an image of this registry.
    pub(crate) fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// Pushes an image with skopeo; `source` is in its spelling.
    pub(crate) fn push(&self, source: &str, image: &str) {
        run(Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-tls-verify=false",
            ])
            .args(&self.extra)
            .arg(source)
            .arg(format!("docker://{}", self.name(image))));
    }

    /// The registry's file with this blob.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        let blobs = self.dir.join("docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes connections on and breaks the first ones off after some bytes of the answer.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<u8>>>,
}

impl Proxy {
    /// The first `count` connections that carry more than `after_bytes` of answer break off there.
    pub(crate) fn start(to: SocketAddr, after_bytes: usize, count: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let left = Arc::new(Mutex::new(count));
        let seen = requests.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(to)) else {
                    return;
                };
                let (seen, left) = (seen.clone(), left.clone());
                let (mut from, mut into) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
                        seen.lock().unwrap().extend_from_slice(&buffer[..bytes]);
                        if into.write_all(&buffer[..bytes]).is_err() {
                            break;
                        }
                    }
                    let _ = into.shutdown(Shutdown::Write);
                });
                thread::spawn(move || pass(server, client, after_bytes, &left));
            }
        });
        Self { address, requests }
    }

    /// Everything that clients sent.
    pub(crate) fn requests(&self) -> String {
        String::from_utf8_lossy(&self.requests.lock().unwrap()).to_lowercase()
    }
}

fn pass(mut from: TcpStream, mut into: TcpStream, after_bytes: usize, left: &Mutex<usize>) {
    let mut passed = 0;
    let mut buffer = [0; 4096];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        passed += bytes;
        let mut left = left.lock().unwrap();
        if passed > after_bytes && *left > 0 {
            *left -= 1;
            break;
        }
        drop(left);
        if into.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// The layers of an image in a store's own layout, for skopeo.
pub(crate) fn layout(store: &Path, name: &str) -> String {
    format!("oci:{}:{name}", store.display())
}
