//! The health check of a run: what the command line says, else what the image says.

use std::time::Duration;

use crate::args::run::StartArguments;
use crate::owner::spec::{HealthCheck, HealthProbe};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_RETRIES: u32 = 3;
/// An image may not keep its owner busy with checks.
const IMAGE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// The check, if there is to be one. As with Docker each option replaces the image's own value.
pub(super) fn check(
    arguments: &StartArguments,
    image: Option<&fcvm_image::store::HealthCheck>,
) -> Option<HealthCheck> {
    if arguments.no_healthcheck {
        return None;
    }
    let probe = match &arguments.health_check {
        Some(url) if url.starts_with("http://") => HealthProbe::Http(url.clone()),
        Some(command) => {
            HealthProbe::Command(["/bin/sh", "-c", command].map(str::to_owned).to_vec())
        }
        None => HealthProbe::Command(image?.command.clone()),
    };
    let interval = || Some(image?.interval?.max(IMAGE_INTERVAL_MIN));
    Some(HealthCheck {
        probe,
        interval: arguments
            .health_interval
            .or_else(interval)
            .unwrap_or(DEFAULT_INTERVAL),
        timeout: arguments
            .health_timeout
            .or_else(|| image?.timeout)
            .unwrap_or(DEFAULT_TIMEOUT),
        start_period: arguments
            .health_start_period
            .or_else(|| image?.start_period)
            .unwrap_or_default(),
        retries: arguments
            .health_retries
            .or_else(|| image?.retries)
            .unwrap_or(DEFAULT_RETRIES),
    })
}
