//! What a helper inherits and does not, how it ends, and what is kept of its words.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use fcvm_process::{HelperCommand, HelperExit, is_running, wait_gone};

fn shell(script: &str) -> HelperCommand {
    let mut command = HelperCommand::new("helper", Path::new("/bin/sh"));
    command.args(["-c", script]);
    command
}

async fn run(script: &str) -> HelperExit {
    shell(script).spawn().unwrap().wait().await
}

#[tokio::test]
async fn helper_gets_what_it_was_given_and_nothing_else() {
    // A descriptor that stays open over exec, as the owner's own parent may leave one behind.
    let stray = std::fs::File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    let (own, other) = UnixStream::pair().unwrap();
    let mut command = shell(
        "exec >&2; for fd in /proc/$$/fd/*; do readlink $fd; done; \
         tr '\\0' '\\n' < /proc/$$/environ; pwd; ulimit -c; \
         set -- $(cat /proc/$$/stat); echo pid $$ session $6; grep NoNewPrivs /proc/$$/status",
    );
    let number = command.inherit(other.into()).unwrap();
    command.no_new_privileges();
    let helper = command.spawn().unwrap();
    let pid = helper.identity().pid;
    let exit = helper.wait().await;
    assert!(exit.status.success(), "{exit}");
    let lines: Vec<&str> = exit.stderr.lines().collect();
    let sockets = lines.iter().filter(|line| line.starts_with("socket:"));
    assert_eq!(sockets.count(), 1, "{lines:?}");
    assert!(!lines.contains(&"/dev/zero"), "{lines:?}");
    let nulls = lines.iter().filter(|line| **line == "/dev/null");
    assert_eq!(nulls.count(), 1, "{lines:?}");
    assert!(number > 2);
    // The environment is empty, the directory is no mount of anybody's, no core is dumped.
    assert!(!exit.stderr.contains("PATH="), "{lines:?}");
    let end = &lines[lines.len() - 4..];
    assert_eq!(end[..2], ["/", "0"]);
    assert_eq!(end[2], format!("pid {pid} session {pid}"));
    assert!(end[3].ends_with('1'), "{lines:?}");
    drop((own, stray));
}

#[tokio::test]
async fn inherited_descriptor_works_by_its_number() {
    // A POSIX shell knows descriptors of one digit only.
    let bash = Path::new("/bin/bash");
    if !bash.exists() {
        println!("skipped: bash is not installed");
        return;
    }
    let (mut own, other) = UnixStream::pair().unwrap();
    let mut command = HelperCommand::new("helper", bash);
    let number = command.inherit(other.into()).unwrap();
    let script = format!("read line <&{number}; echo \"got $line\" >&{number}");
    command.args(["-c", &script]);
    let helper = command.spawn().unwrap();
    own.write_all(b"question\n").unwrap();
    let mut answer = String::new();
    own.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "got question\n");
    assert!(helper.wait().await.status.success());
}

#[tokio::test]
async fn end_and_last_words_are_told_to_all_who_wait() {
    let helper = shell("echo first >&2; printf 'last\\033[2J words\\n\\n' >&2; exit 3")
        .spawn()
        .unwrap();
    let (one, two) = tokio::join!(helper.wait(), helper.wait());
    assert_eq!(one.status.code(), Some(3));
    assert_eq!(two.status.code(), Some(3));
    let text = helper.wait().await.to_string();
    assert_eq!(text, "helper exited with status 3: first; last?[2J words");
    let killed = run("kill -TERM $$").await;
    assert_eq!(killed.to_string(), "helper was ended by signal 15");
}

#[tokio::test]
async fn helper_that_writes_much_is_neither_stopped_nor_kept_in_full() {
    let exit = run("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo end >&2").await;
    assert!(exit.status.success());
    assert_eq!(exit.stderr.len(), 4096);
    assert!(exit.stderr.ends_with("xend\n"));
}

#[tokio::test]
async fn dropping_kills_and_reaps() {
    let helper = shell("sleep 1000").spawn().unwrap();
    let identity = helper.identity();
    assert!(is_running(identity));
    drop(helper);
    assert!(!is_running(identity));
    assert!(!Path::new(&format!("/proc/{}", identity.pid)).exists());

    let helper = shell("sleep 1000").spawn().unwrap();
    let (exit, ()) = tokio::join!(helper.wait(), async { helper.kill() });
    assert_eq!(exit.status.signal(), Some(9));
}

#[tokio::test]
async fn end_of_the_thread_that_started_it_ends_the_helper() {
    let handle = tokio::runtime::Handle::current();
    let helper = std::thread::spawn(move || {
        let _guard = handle.enter();
        shell("sleep 1000").spawn().unwrap()
    })
    .join()
    .unwrap();
    wait_gone(helper.identity()).await.unwrap();
    assert_eq!(helper.wait().await.status.signal(), Some(9));
}

#[tokio::test]
async fn program_that_is_not_there() {
    let error = HelperCommand::new("helper", Path::new("/nonexistent/helper"))
        .spawn()
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}

#[tokio::test]
async fn all_that_the_first_process_of_a_namespace_started_ends_with_it() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can make a PID namespace");
        return;
    }
    // It has another session and another user than its parent, whose death signal it never had.
    let (mut own, other) = UnixStream::pair().unwrap();
    let mut command = shell("setsid setpriv --reuid 65534 sleep 1000 & echo started; wait");
    command.new_pid_namespace().stdout(other.into());
    let helper = command.spawn().unwrap();
    let mut word = [0; 8];
    own.read_exact(&mut word).unwrap();
    let pid = helper.identity().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains(&format!("NSpid:\t{pid}\t1\n")), "{status}");
    // This process starts others where it did before.
    let another = shell("sleep 1000").spawn().unwrap();
    let pid = another.identity().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains(&format!("NSpid:\t{pid}\n")), "{status}");
    helper.kill();
    helper.wait().await;
    // Its child had the other end too.
    assert_eq!(own.read(&mut word).unwrap(), 0);
}

#[tokio::test]
async fn a_helper_is_in_the_namespaces_that_it_was_given() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can enter a namespace without a user namespace");
        return;
    }
    let script = "readlink /proc/self/ns/net >&2; exec sleep 1000";
    let mut command = shell(script);
    // A namespace that lives as long as this process, which is in it alone.
    let holder = std::process::Command::new("unshare")
        .args(["--net", "sleep", "1000"])
        .spawn();
    let mut holder = holder.unwrap();
    let path = format!("/proc/{}/ns/net", holder.id());
    let host = std::fs::read_link("/proc/self/ns/net").unwrap();
    let namespace = loop {
        // It is there a moment after the process.
        let link = std::fs::read_link(&path).unwrap();
        if link != host {
            break link;
        }
        std::thread::yield_now();
    };
    let file = std::fs::File::open(&path).unwrap();
    command.namespaces(vec![file.into()]);
    let helper = command.spawn().unwrap();
    let found = std::fs::read_link(format!("/proc/{}/ns/net", helper.identity().pid));
    assert_eq!(found.unwrap(), namespace);
    holder.kill().unwrap();
    holder.wait().unwrap();
}
