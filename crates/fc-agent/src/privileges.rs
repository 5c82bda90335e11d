//! What a process of the container may do: capabilities and resource limits by their names.

use fcvm_types::capability::{CAPABILITIES, capability_number};
use fcvm_types::guest::Rlimit;
use fcvm_wire::Failure;
use rustix::process::{Resource, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use crate::failure::{Context, bad_request};

/// Capabilities as bits.
pub(crate) fn capability_mask(names: &[String]) -> Result<u64, Failure> {
    let mut mask = 0;
    for name in names {
        let index = capability_number(name)
            .ok_or_else(|| bad_request(format!("there is no capability named '{name}'")))?;
        mask |= 1_u64 << index;
    }
    Ok(mask)
}

/// Takes all other capabilities from this process and from whatever it executes.
pub(crate) fn bound_capabilities(mask: u64) -> Result<(), Failure> {
    for index in 0..CAPABILITIES.len() {
        let bit = 1_u64 << index;
        if mask & bit == 0 {
            // A kernel that lacks the newest capabilities refuses to drop them: nothing to drop.
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit)) {
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(errno) => return Err(errno).context("dropping a capability"),
            }
        }
    }
    clear_ambient_capability_set().context("dropping ambient capabilities")
}

/// Sets the capabilities of this process itself; a user other than root has lost them already.
pub(crate) fn keep_capabilities(mask: u64) -> Result<(), Failure> {
    let kept = CapabilitySet::from_bits_retain(mask);
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
    .context("setting the capabilities")
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}

/// Limits that a process has where its plan does not say otherwise: few descriptors, so that
/// select(2) works, and leave to raise that (systemd's default for services).
pub(crate) fn default_limits() -> [Rlimit; 1] {
    [Rlimit {
        name: "nofile".into(),
        soft: 1024,
        hard: 524_288,
    }]
}

/// Sets the resource limits of this process and of whatever it executes.
pub(crate) fn limit_resources(limits: &[Rlimit]) -> Result<(), Failure> {
    let bound = |value: u64| (value != u64::MAX).then_some(value);
    for limit in limits {
        let name = limit.name.to_ascii_lowercase();
        let resource = resource(name.strip_prefix("rlimit_").unwrap_or(&name))
            .ok_or_else(|| bad_request(format!("there is no limit named '{}'", limit.name)))?;
        let value = rustix::process::Rlimit {
            current: bound(limit.soft),
            maximum: bound(limit.hard),
        };
        setrlimit(resource, value).map_err(|errno| {
            bad_request(format!(
                "the limit {}={}:{} cannot be set: {}",
                limit.name,
                limit.soft,
                limit.hard,
                crate::failure::reason(errno)
            ))
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_numbers_are_the_kernels() {
        let names: Vec<String> = CAPABILITIES
            .iter()
            .map(|name| format!("CAP_{name}"))
            .collect();
        assert_eq!(capability_mask(&names).unwrap(), (1 << 41) - 1);
        let bit = |name: &str| {
            CapabilitySet::from_bits_retain(capability_mask(&[name.to_owned()]).unwrap())
        };
        assert_eq!(bit("CAP_CHOWN"), CapabilitySet::CHOWN);
        assert_eq!(bit("CAP_NET_RAW"), CapabilitySet::NET_RAW);
        assert_eq!(bit("SYS_ADMIN"), CapabilitySet::SYS_ADMIN);
        assert_eq!(bit("CAP_MKNOD"), CapabilitySet::MKNOD);
        assert_eq!(bit("CAP_SETFCAP"), CapabilitySet::SETFCAP);
        assert_eq!(
            bit("CAP_CHECKPOINT_RESTORE"),
            CapabilitySet::CHECKPOINT_RESTORE
        );
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(capability_mask(&["CAP_EVERYTHING".to_owned()]).is_err());
        let limit = Rlimit {
            name: "everything".into(),
            soft: 1,
            hard: 1,
        };
        assert!(limit_resources(&[limit]).is_err());
    }
}
