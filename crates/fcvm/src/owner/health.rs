//! The health check: asks again and again, and enters the result in the record.

use std::rc::Rc;

use fcvm_types::guest::{ExitStatus, ProcessPlan};
use fcvm_types::record::{Health, VmState};
use fcvm_wire::{Outcome, Request};

use super::spec::{HealthCheck, HealthProbe};
use super::vm::RunningVm;

/// Checks until the VM ends.
pub(super) async fn watch(vm: Rc<RunningVm>, check: HealthCheck, container: ProcessPlan) {
    let request = probe(&check, container);
    let mut failures = 0;
    let started = tokio::time::Instant::now();
    // Until the first success there is somebody who waits for it: ask more often.
    let eager = check.interval.min(std::time::Duration::from_secs(1));
    loop {
        let state = vm.record.borrow().state;
        if state == VmState::Running {
            let answer = tokio::time::timeout(check.timeout, vm.link.request(&request)).await;
            let healthy = matches!(
                answer,
                Ok(Ok(
                    Outcome::Exited(ExitStatus::Code(0)) | Outcome::Http(200..=399)
                ))
            );
            let starting = vm.record.borrow().health == Some(Health::Starting)
                && started.elapsed() < check.start_period;
            failures = match healthy {
                true => 0,
                false if starting => failures,
                false => failures + 1,
            };
            tracing::debug!(target: "health", "healthy={healthy} failures={failures}");
            vm.update(|record| {
                record.health = match record.health {
                    _ if healthy => Some(Health::Healthy),
                    _ if failures >= check.retries => Some(Health::Unhealthy),
                    before => before,
                };
            });
        }
        let starting = vm.record.borrow().health == Some(Health::Starting);
        tokio::time::sleep(if starting { eager } else { check.interval }).await;
    }
}

fn probe(check: &HealthCheck, container: ProcessPlan) -> Request {
    match &check.probe {
        HealthProbe::Http(url) => Request::HttpProbe {
            url: url.clone(),
            timeout_ms: u64::try_from(check.timeout.as_millis()).unwrap_or(u64::MAX),
        },
        HealthProbe::Command(args) => Request::Exec {
            process: ProcessPlan {
                args: args.clone(),
                terminal: None,
                stdin: false,
                ..container
            },
        },
    }
}
