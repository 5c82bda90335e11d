//! `fcvm cp`: the rules of `docker cp`, archives on standard streams, large files, hostile archives.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::image::{Layer, digest};
use crate::lab::Lab;
use crate::process::{self, run_with_input};

#[test]
fn files_and_directories_by_the_rules() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    let file = lab.write("file", "from the host\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o751)).unwrap();
    let cp = |from: &str, to: &str| assert_eq!(lab.ok(&["cp", from, to]), "");

    // A file to a new name, into a directory, over a file.
    cp(&file, "box:/tmp/new");
    cp(&file, "box:/home/app");
    cp(&file, "box:/home/app/");
    cp(&file, "box:/data/hello");
    let seen = lab.sh(
        "box",
        "cat /tmp/new /home/app/file /data/hello; stat -c '%a %u' /tmp/new",
    );
    assert_eq!(seen, "from the host\nfrom the host\nfrom the host\n751 0\n");
    // And back.
    cp("box:/tmp/new", &path("back"));
    assert_eq!(fs::read_to_string(path("back")).unwrap(), "from the host\n");
    assert_eq!(fs::metadata(path("back")).unwrap().mode() & 0o777, 0o751);

    // A directory under a new name, into one that exists, and its content alone.
    fs::create_dir_all(lab.file("tree/deep")).unwrap();
    lab.write("tree/deep/leaf", "leaf\n");
    symlink("deep/leaf", lab.file("tree/link")).unwrap();
    cp(&path("tree"), "box:/tmp/fresh");
    cp(&path("tree"), "box:/home");
    lab.sh("box", "mkdir /tmp/content");
    cp(&format!("{}/.", path("tree")), "box:/tmp/content");
    let seen = lab.sh("box", "cat /tmp/fresh/deep/leaf /home/tree/link /tmp/content/link; readlink /tmp/content/link; ls /tmp/content");
    assert_eq!(seen, "leaf\nleaf\nleaf\ndeep/leaf\ndeep\nlink\n");
    cp("box:/home/tree", &path("came"));
    fs::create_dir(lab.file("into")).unwrap();
    cp("box:/home/tree", &path("into"));
    cp("box:/home/tree/.", &path("content"));
    for leaf in ["came/deep/leaf", "into/tree/deep/leaf", "content/link"] {
        assert_eq!(fs::read_to_string(path(leaf)).unwrap(), "leaf\n", "{leaf}");
    }
    assert_eq!(
        fs::read_link(path("content/link")).unwrap(),
        Path::new("deep/leaf")
    );

    // A link at the end is copied as one, or followed.
    cp("box:/data/link", &path("link"));
    assert_eq!(fs::read_link(path("link")).unwrap(), Path::new("hello"));
    assert_eq!(
        lab.ok(&["cp", "-L", "box:/data/link", &path("followed")]),
        ""
    );
    assert_eq!(
        fs::read_to_string(path("followed")).unwrap(),
        "from the host\n"
    );

    for (from, to, said) in [
        ("box:/no/such", path("x"), "/no/such"),
        (&path("no-such"), "box:/tmp".to_owned(), "no-such"),
        (&file, "box:/no/such/dir/".to_owned(), "/no/such/dir"),
        (
            &path("tree"),
            "box:/tmp/new".to_owned(),
            "cannot copy a directory over the file",
        ),
        (
            "box:/home",
            file.clone(),
            "cannot copy a directory over the file",
        ),
        (&file, path("y"), "VM:PATH"),
        ("box:/a", "box:/b".to_owned(), "on the host"),
        ("nosuch:/a", path("x"), "no VM is called 'nosuch'"),
    ] {
        let line = lab.fails(125, &["cp", from, &to]);
        assert!(line.contains(said), "{from} {to}: {line}");
    }
    assert!(!lab.file("x").exists());
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn archives_on_standard_streams() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let archive = Layer::new()
        .directory("d", 0o755)
        .file("d/f", 0o600, b"in a tar\n")
        .owned("d/g", 0o644, 1000, b"")
        .finish();
    let output = run_with_input(lab.command(&["cp", "-", "box:/tmp"]), &archive);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    assert_eq!(
        lab.sh("box", "cat /tmp/d/f; stat -c %u /tmp/d/g"),
        "in a tar\n0\n"
    );
    let output = run_with_input(lab.command(&["cp", "-a", "-", "box:/tmp"]), &archive);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(lab.sh("box", "stat -c %u:%g /tmp/d/g"), "1000:1000\n");

    let output = lab.fcvm(&["cp", "box:/tmp/d", "-"]);
    assert_eq!(output.code, 0, "{output:?}");
    let listed = run_with_input(lab.tool("tar", &["-tv"]), &output.stdout).text();
    assert!(
        listed.contains(" d/") && listed.contains(" d/f") && listed.contains("1000/1000"),
        "{listed}"
    );

    // What is no archive, and what has no place, is refused.
    let output = run_with_input(lab.command(&["cp", "-", "box:/tmp"]), &[7; 4096]);
    crate::lab::one_error(output, 125, "cp of garbage");
    let output = run_with_input(lab.command(&["cp", "-", "box:/no/such"]), &archive);
    let line = crate::lab::one_error(output, 125, "cp to nowhere");
    assert!(line.contains("/no/such"), "{line}");
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn a_hundred_megabytes_both_ways() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let mut content = vec![0; 100_000_000];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut random, &mut content).unwrap();
    let there = lab.write("there", &content);
    let back = lab.file("back").to_str().unwrap().to_owned();
    lab.ok(&["cp", &there, "box:/tmp/big"]);
    let sum = lab.sh("box", "sha256sum < /tmp/big");
    assert_eq!(
        sum.trim(),
        format!("{}  -", &digest(&content)["sha256:".len()..])
    );
    lab.ok(&["cp", "box:/tmp/big", &back]);
    assert!(
        fs::read(&back).unwrap() == content,
        "the file came back different"
    );
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

/// Nothing that a guest puts into its files leads a copy out of its target, on either side.
#[test]
fn hostile_links_lead_nowhere() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let outside = lab.write("outside/secret", "untouched\n");
    let outside_dir = Path::new(&outside).parent().unwrap().to_str().unwrap();
    let target = lab
        .file("target/inner")
        .parent()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();

    // A directory of the guest with links to the host's files: links come out, nothing behind them.
    lab.sh(
        "box",
        &format!(
            "mkdir /tmp/evil; ln -s {outside_dir} /tmp/evil/dir; ln -s {outside} /tmp/evil/file"
        ),
    );
    lab.ok(&["cp", "box:/tmp/evil", &target]);
    assert_eq!(
        fs::read_link(format!("{target}/evil/dir")).unwrap(),
        Path::new(outside_dir)
    );
    // The same names as directory and file: the links that lie there are not followed.
    lab.sh("box", "cd /tmp/evil; rm dir file; mkdir dir; echo overwritten > dir/secret; echo overwritten > file");
    let output = lab.fcvm(&["cp", "box:/tmp/evil", &target]);
    assert!(output.code == 0 || output.code == 125, "{output:?}");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched\n");

    // In the guest links are resolved in the container's root, not in the agent's.
    assert_eq!(
        lab.ok(&[
            "cp",
            "-L",
            "box:/data/out/hostname",
            &format!("{target}/hostname")
        ]),
        ""
    );
    let archive = Layer::new().raw("../../escaped", b"x").finish();
    let output = run_with_input(lab.command(&["cp", "-", "box:/tmp"]), &archive);
    assert!(output.code == 125 || output.code == 0, "{output:?}");
    assert_eq!(
        lab.sh("box", "ls / /tmp | grep -c escaped || true").trim(),
        if output.code == 0 { "1" } else { "0" }
    );
    assert_eq!(
        lab.sh("box", "ls -d /escaped 2>/dev/null | wc -l").trim(),
        "0"
    );
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn a_copy_that_is_interrupted_leaves_no_part() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    lab.sh(
        "box",
        "mkfifo /tmp/source; mkdir /tmp/d; head -c 30000000 /dev/zero > /tmp/d/big",
    );
    let target = lab.file("target/x").parent().unwrap().to_path_buf();
    // Into a full file system of the host's user the error is one line, and the copy is not there.
    if !crate::lab::is_root() {
        println!("skipped: a small file system to copy into needs root");
    } else {
        let small = lab.file("small");
        fs::create_dir(&small).unwrap();
        let small = small.to_str().unwrap().to_owned();
        process::must("mount", &["-t", "tmpfs", "-o", "size=1m", "none", &small]);
        let line = lab.fcvm(&["cp", "box:/tmp/d", &format!("{small}/d")]);
        let left = fs::read_dir(&small).unwrap().count();
        process::must("umount", &[&small]);
        let line = crate::lab::one_error(line, 125, "cp to a full disk");
        assert!(line.contains("No space left"), "{line}");
        assert_eq!(left, 0);
    }
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}
