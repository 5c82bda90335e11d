//! A whole distribution: `image bootstrap` makes it of packages, and it runs.

use crate::base::find;
use crate::lab::Lab;

#[test]
fn debian_is_bootstrapped_and_runs() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    if find("mmdebstrap").is_none() {
        println!("skipped: mmdebstrap is not installed");
        return;
    }
    let output = lab.fcvm(&["image", "bootstrap", "debian:bookworm", "--tag", "lab:1"]);
    if output.code != 0
        && ["resolv", "connect", "mirror"]
            .iter()
            .any(|text| output.stderr.contains(text))
    {
        println!(
            "skipped: no mirror of Debian is in reach: {}",
            output.stderr.trim()
        );
        return;
    }
    assert_eq!(output.code, 0, "{output:?}");
    lab.wait_for_no_process();
    let script = ". /etc/os-release; echo $VERSION_CODENAME; getent passwd daemon | cut -d: -f1; \
        perl -e 'print 6*7, \"\\n\"'; stat -c %a /usr/bin/passwd; dpkg -V base-files && echo intact";
    let text = lab.first_run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "lab:1",
        "bash",
        "-c",
        script,
    ]);
    assert_eq!(text, "bookworm\ndaemon\n42\n4755\nintact\n");
    lab.finish();
}
