//! Tests of [`super`]: the built-in profiles and what users write.

use proptest::prelude::*;

use super::*;

#[test]
fn every_built_in_line_has_a_reason_and_a_cost() {
    let profiles = Profile::built_in().unwrap();
    let names: Vec<&str> = profiles
        .iter()
        .map(|profile| profile.name.as_str())
        .collect();
    let expected = [
        "guest-min",
        "guest",
        "guest-zfs",
        "host-latency",
        "host-full",
    ];
    assert_eq!(names, expected);
    for profile in &profiles {
        assert!(!profile.summary.is_empty());
        for request in profile.requests() {
            let place = format!("{} {}", profile.name, request.symbol);
            assert!(request.why.len() >= 2, "{place}");
            assert!(request.cost.len() >= 4, "{place}");
            assert!(
                request
                    .optional
                    .as_ref()
                    .is_none_or(|reason| reason.len() > 8),
                "{place}"
            );
            assert!(
                request.from.is_none() || request.until.is_none() || request.from <= request.until
            );
        }
    }
}

#[test]
fn a_fragment_that_contradicts_is_refused_and_set_overrides() {
    let mut profile = Profile::load("guest-min").unwrap();
    profile
        .add_fragment("a", "# text\n\nCONFIG_SMP=y\nCONFIG_NEW=m\n")
        .unwrap();
    let error = profile
        .add_fragment("b", "# CONFIG_SMP is not set\n")
        .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("CONFIG_SMP: profile guest-min sets y, b:1 sets n"),
        "{message}"
    );
    profile.set(&["CONFIG_SMP=n".to_owned()]).unwrap();
    let request = profile.requests.get("SMP").unwrap();
    assert_eq!(
        (request.value.as_str(), request.replaced.as_deref()),
        ("n", Some("y"))
    );
    assert!(profile.set(&["CONFIG_SMP=y".to_owned()]).is_err());
}

#[test]
fn an_older_name_overrides_the_newer() {
    let mut profile = Profile::load("guest-min").unwrap();
    profile.set(&["CONFIG_RETPOLINE=n".to_owned()]).unwrap();
    assert!(!profile.requests.contains_key("MITIGATION_RETPOLINE"));
    assert_eq!(
        new_name("RETPOLINE").as_deref(),
        Some("MITIGATION_RETPOLINE")
    );
}

#[test]
fn what_is_no_setting_is_refused() {
    for line in [
        "SMP=y",
        "CONFIG_SMP",
        "CONFIG_=y",
        "CONFIG_A=yes",
        "CONFIG_A=\"a\"b\"",
        "CONFIG_A B=y",
    ] {
        assert!(parse_line(line, "x").is_err(), "{line}");
    }
    let mut profile = Profile::load("guest-min").unwrap();
    assert!(profile.set(&["# comment".to_owned()]).is_err());
    let message = Profile::load("gest").unwrap_err().to_string();
    assert!(message.contains("guest-min"), "{message}");
}

#[test]
fn a_profile_of_the_users_includes_and_overrides() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mine.toml");
    std::fs::write(
        &path,
        "summary = \"mine\"\ninclude = [\"guest-min\"]\n[symbols.Mine]\nNR_CPUS = { set = \"8\", why = \"eight\", cost = \"none\" }\n",
    )
    .unwrap();
    let profile = Profile::load(path.to_str().unwrap()).unwrap();
    assert_eq!(profile.name, "mine");
    assert_eq!(profile.requests.get("NR_CPUS").unwrap().value, "8");
    std::fs::write(
        &path,
        format!("summary = \"loop\"\ninclude = [\"{}\"]\n", path.display()),
    )
    .unwrap();
    assert!(
        Profile::load(path.to_str().unwrap())
            .unwrap_err()
            .to_string()
            .contains("includes itself")
    );
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}") {
        let _ = parse_line(&text, "x");
        let _ = text.parse::<KernelVersion>();
        let _ = Profile::load("guest-min").unwrap().add_fragment("x", &text);
    }
}

#[test]
fn zfs_can_be_chosen_against_the_profiles_word_and_shows_in_the_name() {
    let mut profile = Profile::load("guest-min").unwrap();
    profile.set_zfs(false).unwrap();
    assert_eq!(
        (profile.kernel_name().as_str(), profile.has_zfs()),
        ("guest-min", false)
    );
    profile.set_zfs(true).unwrap();
    assert_eq!(
        (profile.kernel_name().as_str(), profile.has_zfs()),
        ("guest-min-with-zfs", true)
    );
    assert!(
        profile
            .requests()
            .any(|request| request.symbol == "ZLIB_DEFLATE")
    );
    let mut profile = Profile::load("guest-zfs").unwrap();
    assert!(profile.has_zfs());
    profile.set_zfs(true).unwrap();
    assert_eq!(profile.kernel_name(), "guest-zfs");
    profile.set_zfs(false).unwrap();
    assert_eq!(
        (profile.kernel_name().as_str(), profile.has_zfs()),
        ("guest-zfs-without-zfs", false)
    );
}
