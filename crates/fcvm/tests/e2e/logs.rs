//! `fcvm logs`.

use crate::base::IMAGE;
use crate::lab::Lab;

#[test]
fn logs_tell_what_was_written_and_when() {
    let Some(lab) = Lab::new() else { return };
    let script = "echo one; echo two >&2; sleep 0.1; echo three; printf 'four, unfinished'";
    let output = lab.fcvm(&[
        "run",
        "--name",
        "said",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(
        (output.text().as_str(), output.stderr.as_str()),
        ("one\nthree\nfour, unfinished", "two\n")
    );
    let logs = |options: &[&str]| lab.fcvm(&[&["logs"], options, &["said"]].concat());
    let all = logs(&[]);
    assert_eq!(
        (all.text().as_str(), all.stderr.as_str()),
        ("one\nthree\nfour, unfinished", "two\n")
    );
    let tail = logs(&["--tail", "2"]);
    assert_eq!(
        (tail.text().as_str(), tail.stderr.as_str()),
        ("three\nfour, unfinished", "")
    );
    assert_eq!(logs(&["--tail", "0"]).text(), "");
    let timed = logs(&["-t"]).text();
    let first = timed.lines().next().unwrap();
    let (time, text) = first.split_once(' ').unwrap();
    assert!(
        text == "one" && time.starts_with("20") && time.ends_with('Z') && time.len() >= 20,
        "{timed}"
    );
    // Since the third line's time: it and what follows.
    let third = timed.lines().nth(1).unwrap().split_once(' ').unwrap().0;
    assert_eq!(logs(&["--since", third]).text(), "three\nfour, unfinished");
    assert_eq!(logs(&["--until", time]).text(), "one\n");
    assert_eq!(logs(&["--since", "1h"]).text(), all.text());
    assert_eq!(logs(&["--since", "2100-01-01T00:00:00Z"]).text(), "");
    // A VM that has ended is not followed.
    assert_eq!(logs(&["-f", "--tail", "1"]).text(), "four, unfinished");
    let console = logs(&["--console"]).text();
    assert!(console.contains("fc-agent: started"), "{console}");
    let line = lab.fails(125, &["logs", "--since", "yesterday", "said"]);
    assert!(line.contains("'yesterday'"), "{line}");
    let line = lab.fails(125, &["logs", "--tail", "few", "said"]);
    assert!(line.contains("'few'"), "{line}");
    lab.ok(&["rm", "said"]);
    lab.finish();
}

#[test]
fn logs_are_followed_to_the_end() {
    let Some(lab) = Lab::new() else { return };
    let script = "echo first; while read line; do echo $line; done; echo last";
    let mut running = lab.start(&[
        "run",
        "-i",
        "--name",
        "said",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    running.stdout.wait_for("first\n");
    let whole = lab.start(&["logs", "-f", "said"]);
    let tail = lab.start(&["logs", "-f", "--tail", "0", "said"]);
    whole.stdout.wait_for("first\n");
    // Line by line, until the one that passes over the beginning follows too.
    let mut lines = 0;
    while !tail.stdout.has_begun() {
        lines += 1;
        running.write(format!("between {lines}\n").as_bytes());
        whole.stdout.wait_for(&format!("between {lines}\n"));
    }
    assert_eq!(running.finish().code, 0);
    let between: String = (1..=lines)
        .map(|line| format!("between {line}\n"))
        .collect();
    let all = format!("first\n{between}last\n");
    assert_eq!(whole.wait().text(), all);
    let tail = tail.wait().text();
    assert!(
        all.ends_with(&tail) && tail.starts_with("between"),
        "{tail}"
    );
    lab.ok(&["rm", "said"]);
    lab.finish();
}

/// More output than the log keeps: the last part is there, the files stay within their limit.
#[test]
fn a_long_log_keeps_its_end() {
    let Some(lab) = Lab::new() else { return };
    let script = "yes 'a line of the container that is not a short one, so that many bytes come' | head -n 1100000; echo the end";
    lab.ok(&[
        "run",
        "-d",
        "--name",
        "long",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    let follow = lab.start(&["logs", "-f", "--tail", "0", "long"]);
    lab.ok(&["wait", "long"]);
    assert!(follow.wait().text().ends_with("the end\n"));
    assert_eq!(lab.ok(&["logs", "--tail", "1", "long"]), "the end\n");
    let id = lab.json(&["ls", "-a", "--format", "json"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let size = |name: &str| {
        std::fs::metadata(lab.data.join("vms").join(&id).join(name))
            .unwrap()
            .len()
    };
    assert!(size("container.log") <= 32 << 20 && size("container.log.1") <= 32 << 20);
    lab.ok(&["rm", "long"]);
    lab.finish();
}
