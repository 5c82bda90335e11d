//! The health check: asks again and again, and enters the result in the record.

use std::rc::Rc;

use fcvm_types::guest::{ExitStatus, ProcessPlan};
use fcvm_types::record::{Health, VmState};
use fcvm_wire::{Outcome, Request};

use super::spec::HealthCheck;
use super::vm::RunningVm;

/// Checks until the VM ends.
pub(super) async fn watch(vm: Rc<RunningVm>, check: HealthCheck, container: ProcessPlan) {
    let request = probe(&check, container);
    let mut failures = 0;
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
            failures = if healthy { 0 } else { failures + 1 };
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
    if check.probe.starts_with("http://") {
        let timeout_ms = u64::try_from(check.timeout.as_millis()).unwrap_or(u64::MAX);
        return Request::HttpProbe {
            url: check.probe.clone(),
            timeout_ms,
        };
    }
    let args = ["/bin/sh", "-c", &check.probe].map(str::to_owned).to_vec();
    Request::Exec {
        process: ProcessPlan {
            args,
            terminal: None,
            stdin: false,
            ..container
        },
    }
}
