//! Releases of Firecracker, fetched from a server on loopback that answers as the project's own.

#![allow(missing_docs, reason = "a test program has no users")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use fcvm_hypervisor::firecracker::release::{
    Release, ReleaseError, ReleaseOptions, fetch, installed,
};
use sha2::{Digest as _, Sha256};

/// What is answered to a path: the status line's end, headers, the body.
type Answers = BTreeMap<String, (String, String, Vec<u8>)>;

/// Serves the answers for as long as the test runs; gives the address.
fn serve(answers: Answers) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answers = Arc::new(answers);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answers = Arc::clone(&answers);
            std::thread::spawn(move || answer(stream, &answers));
        }
    });
    address
}

fn answer(mut stream: TcpStream, answers: &Answers) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else {
        return;
    };
    // The rest of the request.
    for line in lines.by_ref() {
        if line.is_ok_and(|line| line.is_empty()) {
            break;
        }
    }
    let path = request.split(' ').nth(1).unwrap();
    let nothing = ("404 Not Found".to_owned(), String::new(), Vec::new());
    let (status, headers, body) = answers.get(path).unwrap_or(&nothing);
    let mut headers = headers.clone();
    if !headers.contains("content-length") {
        headers += &format!("content-length: {}\r\n", body.len());
    }
    // The other side may have gone.
    let _ = stream
        .write_all(format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n").as_bytes());
    let _ = stream.write_all(body);
}

/// An archive with a member of each name.
fn archive(names: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::fast(),
    ));
    for name in names {
        let bytes = format!("#!/bin/sh\necho {name}\n").into_bytes();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

const ARCHITECTURE: &str = std::env::consts::ARCH;

fn release_path(version: &str) -> String {
    format!("/r/download/v{version}/firecracker-v{version}-{ARCHITECTURE}.tgz")
}

fn ok(body: impl Into<Vec<u8>>) -> (String, String, Vec<u8>) {
    ("200 OK".to_owned(), String::new(), body.into())
}

/// A server with the latest release 1.13.1 and faulty ones.
fn server() -> (String, String) {
    let member = |program: &str, version: &str| {
        format!("release-v{version}-{ARCHITECTURE}/{program}-v{version}-{ARCHITECTURE}")
    };
    let mut answers = Answers::new();
    let mut publish = |version: &str, bytes: Vec<u8>, checksum: String| {
        let path = release_path(version);
        answers.insert(format!("{path}.sha256.txt"), ok(checksum));
        answers.insert(path, ok(bytes));
    };
    let good = archive(&[
        &member("firecracker", "1.13.1"),
        "README",
        &member("jailer", "1.13.1"),
    ]);
    let good_sum = sum(&good);
    publish(
        "1.13.1",
        good.clone(),
        format!("{good_sum}  firecracker.tgz\n"),
    );
    publish(
        "1.0.1",
        good.clone(),
        format!("{}  firecracker.tgz\n", sum(b"other")),
    );
    publish("1.0.2", good.clone(), "<html>".to_owned());
    let no_jailer = archive(&[&member("firecracker", "1.0.3")]);
    publish("1.0.3", no_jailer.clone(), sum(&no_jailer));
    publish("1.0.4", b"no archive".to_vec(), sum(b"no archive"));
    let cut = release_path("1.0.5");
    answers.insert(format!("{cut}.sha256.txt"), ok(good_sum.clone()));
    let headers = format!("content-length: {}\r\n", good.len());
    answers.insert(
        cut,
        (
            "200 OK".to_owned(),
            headers,
            good[..good.len() / 2].to_vec(),
        ),
    );
    let to = "location: /r/tag/v1.13.1\r\n".to_owned();
    answers.insert(
        "/r/latest".to_owned(),
        ("302 Found".to_owned(), to, Vec::new()),
    );
    answers.insert("/r/tag/v1.13.1".to_owned(), ok("a page"));
    let endless = "location: /loop/latest\r\n".to_owned();
    answers.insert(
        "/loop/latest".to_owned(),
        ("302 Found".to_owned(), endless, Vec::new()),
    );
    (serve(answers), good_sum)
}

fn get(directory: &Path, options: &ReleaseOptions) -> Result<(Release, u64), ReleaseError> {
    let mut bytes = 0;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let release = runtime.block_on(fetch(directory, options, &mut |done, _| bytes = done))?;
    Ok((release, bytes))
}

#[test]
fn the_latest_release_is_fetched_once_and_used() {
    let (server, sum) = server();
    let directory = tempfile::tempdir().unwrap();
    let mut options = ReleaseOptions {
        server: format!("{server}/r/"),
        version: None,
        sha256: None,
    };
    assert_eq!(installed(directory.path()), None);
    let (release, bytes) = get(directory.path(), &options).unwrap();
    assert!(release.is_new && bytes > 0);
    assert_eq!(release.version, "1.13.1");
    assert_eq!(
        installed(directory.path()).unwrap().canonicalize().unwrap(),
        release.firecracker.canonicalize().unwrap()
    );
    for program in [&release.firecracker, &release.jailer] {
        assert_eq!(
            fs::metadata(program).unwrap().permissions().mode() & 0o777,
            0o755
        );
    }
    assert!(
        fs::read_to_string(&release.jailer)
            .unwrap()
            .contains("/jailer-v1.13.1")
    );
    // It is there: nothing is fetched, not even with the server gone.
    options.version = Some("v1.13.1".to_owned());
    options.server = "http://127.0.0.1:1/r".to_owned();
    let (again, bytes) = get(directory.path(), &options).unwrap();
    assert!(!again.is_new && bytes == 0);
    // Half of it is no release; a checksum from elsewhere is taken at its word.
    fs::remove_file(&release.jailer).unwrap();
    options.server = format!("{server}/r");
    options.sha256 = Some(sum.to_ascii_uppercase());
    assert!(get(directory.path(), &options).unwrap().0.is_new);
    assert!(release.jailer.is_file());
}

#[test]
fn what_is_no_release_is_refused_and_leaves_nothing() {
    let (server, _) = server();
    let directory = tempfile::tempdir().unwrap();
    let mut options = ReleaseOptions {
        server: format!("{server}/r"),
        version: None,
        sha256: None,
    };
    for (version, reason) in [
        ("1.0.0", "404"),
        ("1.0.1", "was expected: nothing was installed"),
        ("1.0.2", "it is no SHA-256"),
        ("1.0.3", "it holds no jailer-v1.0.3"),
        ("1.0.4", "it cannot be unpacked"),
        ("1.0.5", "cannot fetch"),
        ("1.0", "is no version"),
        ("../1.0.0", "is no version"),
        ("latest", "is no version"),
    ] {
        options.version = Some(version.to_owned());
        let error = get(directory.path(), &options).unwrap_err().to_string();
        assert!(error.contains(reason), "{version}: {error}");
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            0,
            "{version}"
        );
    }
    options.version = None;
    for (path, reason) in [("/loop", "too many redirects"), ("/nothing", "404")] {
        options.server = format!("{server}{path}");
        let error = get(directory.path(), &options).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    options.server = "http://127.0.0.1:1".to_owned();
    let error = get(directory.path(), &options).unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}

#[test]
fn what_a_killed_one_left_is_swept_and_one_at_a_time_changes_the_directory() {
    let (server, _) = server();
    let directory = tempfile::tempdir().unwrap();
    let options = ReleaseOptions {
        server: format!("{server}/r"),
        version: None,
        sha256: None,
    };
    let left = directory.path().join(".partial-killed");
    fs::create_dir_all(left.join("deep")).unwrap();
    fs::write(left.join("deep/firecracker"), "half").unwrap();
    std::os::unix::fs::symlink("v0.0.0", directory.path().join(".current.new")).unwrap();
    // Another one is at work: what it has is not touched.
    let lock = fs::File::open(directory.path()).unwrap();
    lock.lock().unwrap();
    let error = get(directory.path(), &options).unwrap_err();
    assert!(matches!(error, ReleaseError::Busy { .. }), "{error}");
    assert!(left.exists());
    drop(lock);
    let (release, _) = get(directory.path(), &options).unwrap();
    assert!(release.is_new);
    let mut names: Vec<_> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["current", "v1.13.1"]);
}
