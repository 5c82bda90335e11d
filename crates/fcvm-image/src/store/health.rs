//! The HEALTHCHECK of an image: an extension that Docker made to the configuration, and which the
//! specification's types do not know. How often to ask is left to whoever asks.

use std::time::Duration;

use serde::Deserialize;

/// What tells whether an image's service is well.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthCheck {
    /// Program and arguments; well where it exits with 0.
    pub command: Vec<String>,
    /// Time between two checks, where the image says.
    pub interval: Option<Duration>,
    /// Time limit of a check, where the image says.
    pub timeout: Option<Duration>,
    /// Time after the start in which a failure does not count, where the image says.
    pub start_period: Option<Duration>,
    /// Failures in a row that make the container unhealthy, where the image says.
    pub retries: Option<u32>,
}

#[derive(Deserialize)]
struct Document {
    config: Option<Run>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Run {
    healthcheck: Option<Written>,
}

/// As Docker writes it: times in nanoseconds, 0 for "not said".
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct Written {
    test: Vec<String>,
    interval: i64,
    timeout: i64,
    start_period: i64,
    retries: i64,
}

/// The check of an image's configuration; none where it has none, switches it off, or writes it in a
/// way that Docker does not.
pub(super) fn parse(config: &[u8]) -> Option<HealthCheck> {
    let document: Document = serde_json::from_slice(config).ok()?;
    let written = document.config?.healthcheck?;
    let command = match written.test.split_first()? {
        (kind, command) if kind == "CMD" && !command.is_empty() => command.to_vec(),
        (kind, [command]) if kind == "CMD-SHELL" => {
            ["/bin/sh", "-c", command].map(str::to_owned).to_vec()
        }
        _ => return None,
    };
    let time = |nanoseconds: i64| {
        let nanoseconds = u64::try_from(nanoseconds).ok().filter(|time| *time > 0)?;
        Some(Duration::from_nanos(nanoseconds))
    };
    Some(HealthCheck {
        command,
        interval: time(written.interval),
        timeout: time(written.timeout),
        start_period: time(written.start_period),
        retries: u32::try_from(written.retries)
            .ok()
            .filter(|count| *count > 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(healthcheck: &str) -> Option<HealthCheck> {
        parse(format!(r#"{{"config":{{"Healthcheck":{healthcheck}}}}}"#).as_bytes())
    }

    #[test]
    fn dockers_forms_are_read() {
        let full = parsed(
            r#"{"Test":["CMD","curl","-f","x"],"Interval":5000000000,"Timeout":3000000000,
                "StartPeriod":1000000000,"Retries":2}"#,
        );
        let expected = HealthCheck {
            command: ["curl", "-f", "x"].map(str::to_owned).to_vec(),
            interval: Some(Duration::from_secs(5)),
            timeout: Some(Duration::from_secs(3)),
            start_period: Some(Duration::from_secs(1)),
            retries: Some(2),
        };
        assert_eq!(full, Some(expected));
        let shell = parsed(r#"{"Test":["CMD-SHELL","test -e /ok || exit 1"]}"#).unwrap();
        assert_eq!(shell.command, ["/bin/sh", "-c", "test -e /ok || exit 1"]);
        assert_eq!((shell.interval, shell.retries), (None, None));
    }

    #[test]
    fn what_is_no_check_is_none() {
        for text in [
            "null",
            "{}",
            r#"{"Test":[]}"#,
            r#"{"Test":["NONE"]}"#,
            r#"{"Test":["CMD"]}"#,
            r#"{"Test":["CMD-SHELL"]}"#,
            r#"{"Test":"true"}"#,
            "7",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
        assert_eq!(parse(b"{}"), None);
        let odd = parsed(r#"{"Test":["CMD","x"],"Interval":-1,"Retries":-3}"#).unwrap();
        assert_eq!((odd.interval, odd.retries), (None, None));
    }
}
