//! Against a `zfs` that knows only the grammar of the real one, and cuts streams where it is told to.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Source snapshots are files `here/SNAP` (guid in `here/SNAP.guid`), received ones `there/SNAP`. `partial` and
/// `partial.name` are the state of an interrupted stream, `cuts` has the bytes after which each receive stops.
const FAKE: &str = r#"#!/bin/sh
set -u
cd "$(dirname "$0")/.."
echo "$*" >> calls
fail() { echo "$1" >&2; exit 1; }
case "$*" in
"hold "*) s=${3#*@}; [ -e "here/$s" ] || fail "cannot hold: dataset does not exist"
  [ ! -e "here/$s.hold" ] || fail "cannot hold snapshot '$3': tag already exists on this dataset"; echo "$2" > "here/$s.hold"; touch held;;
"holds -H "*) shift 2; for s in "$@"; do f=here/${s#*@}.hold; [ ! -e "$f" ] || printf '%s\t%s\tnow\n' "$s" "$(cat "$f")"; done;;
"release "*) f=here/${3#*@}.hold; [ "$(cat "$f")" = "$2" ] || fail "cannot release hold"; rm "$f"; ls here/*.hold >/dev/null 2>&1 || rm held;;
"get -H -o value receive_resume_token backup/data")
  [ -d there ] || fail "cannot open 'backup/data': dataset does not exist"
  if [ -e partial ]; then echo "1-$(cat partial.name)-$(wc -c < partial)"; else echo -; fi;;
"list -H -p -t snapshot -o name,guid -s createtxg -d 1 tank/data")
  for s in here/*.guid; do s=${s#here/}; s=${s%.guid}; printf 'tank/data@%s\t%s\n' "$s" "$(cat here/$s.guid)"; done;;
"list -H -p -t snapshot -o name,guid -s createtxg -d 1 backup/data")
  [ -d there ] || fail "cannot open 'backup/data': dataset does not exist"
  for s in there/*.guid; do [ -e "$s" ] || continue; s=${s#there/}; s=${s%.guid}; printf 'backup/data@%s\t%s\n' "$s" "$(cat there/$s.guid)"; done;;
"send -nP "*) echo "size	1000";;
"send -t 1-"*) t=${3#1-}; s=${t%-*}; o=${t##*-}
  [ -e here/$s ] || fail "cannot resume send: 'tank/data@$s' no longer exists"
  echo "$s"; tail -c +$((o+1)) here/$s;;
"send tank/data@"*) s=${2#*@}; echo "$s"; cat here/$s;;
"send -i tank/data@"*) s=${4#*@}; [ -e "there/${3#*@}" ] || fail "no base"; echo "$s"; cat here/$s;;
"receive -A backup/data") [ -e partial ] || fail "nothing to abort"; rm partial partial.name; [ -n "$(ls there)" ] || rmdir there;;
"receive -s -u backup/data")
  read -r s; [ -n "$s" ] || fail "cannot receive: invalid stream"
  mkdir -p there; cut=$(head -n 1 cuts 2>/dev/null || true)
  [ "$cut" != modified ] || fail "cannot receive: destination backup/data has been modified"
  if [ -n "$cut" ]; then sed -i 1d cuts
    head -c "$cut" >> partial; echo "$s" > partial.name; fail "cannot receive: checksum mismatch or incomplete stream."; fi
  cat >> partial; mv partial there/$s; cp here/$s.guid there/$s.guid; rm -f partial.name;;
*) echo "unrecognized: $*" >&2; exit 2;;
esac
"#;

struct Lab(TempDir);

impl Lab {
    fn new(snapshots: &[(&str, &str)]) -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        fs::create_dir(lab.path("bin")).unwrap();
        fs::create_dir(lab.path("here")).unwrap();
        fcvm_testing::write_program(&lab.path("bin/zfs"), FAKE);
        for (name, content) in snapshots {
            fs::write(lab.path(&format!("here/{name}")), content).unwrap();
            fs::write(
                lab.path(&format!("here/{name}.guid")),
                format!("guid-{name}\n"),
            )
            .unwrap();
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn send(&self, snapshot: &str) -> (Result<Summary>, Vec<Event>) {
        let request = Request {
            source: format!("tank/data@{snapshot}").parse().unwrap(),
            destination: "backup/data".parse().unwrap(),
            ssh_host: None,
            raw: false,
            attempts_max: 3,
            pause: Duration::from_millis(1),
            search_path: format!("{}:/usr/bin:/bin", self.path("bin").display()),
        };
        let mut events = Vec::new();
        let result = send(&request, &mut |event| events.push(event));
        (result, events)
    }
}

#[test]
fn a_cut_stream_goes_on_where_it_stopped_and_the_hold_is_released() {
    let lab = Lab::new(&[("a", "0123456789")]);
    fs::write(lab.path("cuts"), "4\n3\n").unwrap();
    let (result, events) = lab.send("a");
    assert_eq!(result.unwrap().stream_count, 3);
    assert_eq!(lab.read("there/a"), "0123456789");
    assert!(!lab.path("held").exists());
    let calls = lab.read("calls");
    assert!(
        calls.contains("send -t 1-a-4\n") && calls.contains("send -t 1-a-7\n"),
        "{calls}"
    );
    assert!(calls.starts_with("hold fcvm-send-"), "{calls}");
    let resumed = events.iter().filter(|event| {
        matches!(
            event,
            Event::Start {
                resumed: true,
                size_bytes: Some(1000)
            }
        )
    });
    assert_eq!(resumed.count(), 2);
    // What is there is not sent again.
    assert_eq!(lab.send("a").0.unwrap().stream_count, 0);
}

#[test]
fn a_stale_token_is_thrown_away_and_all_begins_again() {
    let lab = Lab::new(&[("a", "0123456789")]);
    fs::create_dir(lab.path("there")).unwrap();
    fs::write(lab.path("partial"), "old").unwrap();
    fs::write(lab.path("partial.name"), "gone\n").unwrap();
    let (result, events) = lab.send("a");
    assert_eq!(result.unwrap().stale_count, 1);
    assert!(
        events.iter().any(
            |event| matches!(event, Event::Stale(reason) if reason.contains("no longer exists"))
        )
    );
    assert!(lab.read("calls").contains("receive -A backup/data"));
    assert_eq!(lab.read("there/a"), "0123456789");
}

#[test]
fn a_state_of_another_snapshot_is_finished_and_the_right_one_follows() {
    let lab = Lab::new(&[("a", "first"), ("b", "second")]);
    fs::create_dir(lab.path("there")).unwrap();
    fs::write(lab.path("partial"), "fi").unwrap();
    fs::write(lab.path("partial.name"), "a\n").unwrap();
    lab.send("b").0.unwrap();
    assert_eq!(
        (lab.read("there/a"), lab.read("there/b")),
        ("first".to_owned(), "second".to_owned())
    );
    assert!(
        lab.read("calls")
            .contains("send -i tank/data@a tank/data@b")
    );
}

#[test]
fn without_progress_it_gives_up_and_keeps_the_hold() {
    let lab = Lab::new(&[("a", "0123456789")]);
    fs::write(lab.path("cuts"), "2\n0\n0\n0\n0\n").unwrap();
    let (result, events) = lab.send("a");
    assert!(
        matches!(result, Err(SendError::GivenUp { attempts: 3, .. })),
        "{result:?}"
    );
    assert!(lab.path("held").exists());
    let pauses: Vec<u128> = events
        .iter()
        .filter_map(|event| match event {
            Event::Retry { pause, .. } => Some(pause.as_millis()),
            _ => None,
        })
        .collect();
    assert_eq!(pauses, [1, 1, 2], "the first attempt made progress");
    fs::write(lab.path("cuts"), "").unwrap();
    lab.send("a").0.unwrap();
    assert_eq!(lab.read("there/a"), "0123456789");
    assert!(!lab.path("held").exists());
}

#[test]
fn what_is_at_the_destination_is_never_overwritten() {
    let lab = Lab::new(&[("a", "x")]);
    fs::create_dir(lab.path("there")).unwrap();
    fs::write(lab.path("there/other.guid"), "guid-other\n").unwrap();
    assert!(
        lab.send("a")
            .0
            .unwrap_err()
            .to_string()
            .contains("nothing is overwritten")
    );
    fs::write(lab.path("there/a.guid"), "guid-else\n").unwrap();
    assert!(
        lab.send("a")
            .0
            .unwrap_err()
            .to_string()
            .contains("another snapshot")
    );
    let lab = Lab::new(&[("a", "x")]);
    fs::write(lab.path("cuts"), "modified\n").unwrap();
    let (result, _) = lab.send("a");
    assert!(
        matches!(result, Err(SendError::Refused { .. })),
        "{result:?}"
    );
    assert_eq!(
        lab.read("calls").matches("receive -s").count(),
        1,
        "not tried again"
    );
    assert!(lab.send("missing").0.is_err());
}

#[test]
fn names_are_words_and_nothing_else() {
    for good in ["tank/data@a", "t/a.b/c:d@2026-11-21_10:00"] {
        assert_eq!(good.parse::<Snapshot>().unwrap().to_string(), good);
    }
    for bad in [
        "tank/data",
        "@a",
        "tank@",
        "tank//x@a",
        "-t@a",
        "tank/$(x)@a",
        "tank/a b@c",
        "tank@a@b",
        "/tank@a",
    ] {
        assert!(bad.parse::<Snapshot>().is_err(), "{bad}");
    }
    assert!("tank/x;y".parse::<Dataset>().is_err());
    assert!(names::check_host("-oProxyCommand=x").is_err());
    assert!(names::check_host("root@host.example").is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn cut_anywhere_it_arrives_whole(cuts in prop::collection::vec(1_usize..40, 0..8)) {
        let content: String = (0..200).map(|index| char::from(b'a' + index % 26)).collect();
        let lab = Lab::new(&[("a", &content)]);
        let lines: Vec<String> = cuts.iter().map(usize::to_string).collect();
        let text = if lines.is_empty() { String::new() } else { lines.join("\n") + "\n" };
        fs::write(lab.path("cuts"), text).unwrap();
        let summary = lab.send("a").0.unwrap();
        prop_assert_eq!(lab.read("there/a"), content);
        prop_assert_eq!(summary.stream_count as usize, cuts.len() + 1);
    }
}
