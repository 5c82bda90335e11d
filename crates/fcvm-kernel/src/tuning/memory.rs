//! The division of the memory. With all sizes in bytes:
//!
//! ```text
//! R        = memory - hugepages
//! host     = max(min(2 GiB, R/2), R/20)
//! guests   = memory and overhead of guests that are not in hugepages, overhead of the others
//! room     = R - host - guests                                  refused below 64 MiB
//! wanted   = max(R/2, 2 GiB + 1 GiB per TiB of pool)
//! arc_max  = min(room, wanted)
//! arc_min  = min(arc_max/2, max(32 MiB, R/32))
//! ```
//!
//! Each of them grows, or stays, as the memory grows. 64 MiB and 32 MiB are the smallest values that
//! ZFS accepts (`MIN_ARC_MAX`, twice `SPA_MAXBLOCKSIZE`).

use serde::Serialize;

use super::{ArcChoice, Request, TuningError, ZfsVersion, size};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// ZFS ignores a smaller `zfs_arc_max`.
pub(super) const ARC_MAX_BYTES_MIN: u64 = 64 * MIB;
const ARC_MIN_BYTES_MIN: u64 = 32 * MIB;
const HOST_BYTES_MIN: u64 = 2 * GIB;
/// What a hypervisor and its helpers take beside the guest's memory.
const GUEST_OVERHEAD_BYTES: u64 = 32 * MIB;
/// Page tables: 8 bytes per page of 4 KiB.
const PAGE_TABLE_DIVISOR: u64 = 512;

/// Where the memory goes. The shares add up to no more than `total_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All memory.
    pub total_bytes: u64,
    /// Size of one hugepage.
    pub hugepage_size_bytes: u64,
    /// Number of hugepages.
    pub hugepage_count: u64,
    /// Memory in hugepages.
    pub hugepage_bytes: u64,
    /// For the kernel, daemons and sessions.
    pub host_bytes: u64,
    /// Memory of guests that are not in hugepages, and what each guest takes beside its memory.
    pub guest_bytes: u64,
    /// `zfs_arc_max`; 0 without ZFS.
    pub arc_max_bytes: u64,
    /// `zfs_arc_min`; 0 without ZFS.
    pub arc_min_bytes: u64,
    /// What the installed ZFS would take if nothing was said; 0 without ZFS.
    pub arc_default_bytes: u64,
    /// Nobody's: page cache, slack.
    pub free_bytes: u64,
    /// The shares, each with its reason.
    pub shares: Vec<Share>,
}

/// One share of the memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Whose.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Why so much.
    pub reason: String,
}

/// What ZFS takes for the ARC at most when nothing is said. It knows nothing of hugepages.
pub fn default_arc_max_bytes(version: ZfsVersion, memory_bytes: u64) -> u64 {
    let since_2_3 = version >= ZfsVersion { major: 2, minor: 3 };
    let share = if since_2_3 {
        (memory_bytes / 8 * 5).max(memory_bytes.saturating_sub(GIB))
    } else {
        memory_bytes / 2
    };
    share.max(ARC_MAX_BYTES_MIN)
}

/// What is taken before the ARC.
struct Claims {
    hugepage_count: u64,
    hugepage_bytes: u64,
    /// `R`.
    rest_bytes: u64,
    host_bytes: u64,
    guests_outside: u64,
    guest_bytes: u64,
}

fn claims(request: &Request) -> Claims {
    let pages_per_guest = request.guest_memory_bytes.div_ceil(request.hugepage_bytes);
    let hugepage_count = request
        .hugepage_count
        .unwrap_or_else(|| request.guest_count.saturating_mul(pages_per_guest));
    let hugepage_bytes = hugepage_count.saturating_mul(request.hugepage_bytes);
    let rest_bytes = request.memory_bytes.saturating_sub(hugepage_bytes);
    let guests_inside = hugepage_count
        .checked_div(pages_per_guest)
        .unwrap_or(0)
        .min(request.guest_count);
    let guests_outside = request.guest_count - guests_inside;
    let overhead = GUEST_OVERHEAD_BYTES + request.guest_memory_bytes / PAGE_TABLE_DIVISOR;
    Claims {
        hugepage_count,
        hugepage_bytes,
        rest_bytes,
        host_bytes: HOST_BYTES_MIN.min(rest_bytes / 2).max(rest_bytes / 20),
        guests_outside,
        guest_bytes: guests_outside
            .saturating_mul(request.guest_memory_bytes)
            .saturating_add(request.guest_count.saturating_mul(overhead)),
    }
}

pub(super) fn divide(request: &Request) -> Result<Memory, TuningError> {
    let claims = claims(request);
    let taken = claims
        .hugepage_bytes
        .saturating_add(claims.host_bytes)
        .saturating_add(claims.guest_bytes);
    let room = request.memory_bytes.saturating_sub(taken);
    let arc_default_bytes = request.pool_tib.map_or(0, |_| {
        default_arc_max_bytes(request.zfs, request.memory_bytes)
    });
    let arc_max_bytes = match (request.pool_tib, request.arc) {
        (None, _) => 0,
        (Some(pool_tib), ArcChoice::Planned) => room
            .min(wanted_arc_bytes(claims.rest_bytes, pool_tib))
            .max(ARC_MAX_BYTES_MIN),
        (Some(_), ArcChoice::ModuleDefault) => arc_default_bytes,
        (Some(_), ArcChoice::Bytes(bytes)) if bytes < ARC_MAX_BYTES_MIN => {
            return Err(TuningError::Value {
                what: "the ARC's largest size",
                value: bytes,
                rule: "ZFS ignores less than 64m",
            });
        }
        (Some(_), ArcChoice::Bytes(bytes)) => bytes,
    };
    if taken.saturating_add(arc_max_bytes) > request.memory_bytes || claims.rest_bytes == 0 {
        return Err(misfit(request, &claims, arc_max_bytes));
    }
    let arc_min_bytes = (arc_max_bytes / 2).min(ARC_MIN_BYTES_MIN.max(claims.rest_bytes / 32));
    Ok(Memory {
        total_bytes: request.memory_bytes,
        hugepage_size_bytes: request.hugepage_bytes,
        hugepage_count: claims.hugepage_count,
        hugepage_bytes: claims.hugepage_bytes,
        host_bytes: claims.host_bytes,
        guest_bytes: claims.guest_bytes,
        arc_max_bytes,
        arc_min_bytes,
        arc_default_bytes,
        free_bytes: request.memory_bytes - taken - arc_max_bytes,
        shares: shares(request, &claims, arc_max_bytes),
    })
}

/// `wanted` of this module's formula.
fn wanted_arc_bytes(rest_bytes: u64, pool_tib: u64) -> u64 {
    (rest_bytes / 2).max(HOST_BYTES_MIN + pool_tib * GIB)
}

fn shares(request: &Request, claims: &Claims, arc_max_bytes: u64) -> Vec<Share> {
    let rest = size(claims.rest_bytes);
    let mut shares = Vec::new();
    if claims.hugepage_bytes > 0 {
        shares.push(Share {
            name: "hugepages",
            bytes: claims.hugepage_bytes,
            reason: format!(
                "{} pages of {}, for guests only; {rest} remain for all else",
                claims.hugepage_count,
                size(request.hugepage_bytes)
            ),
        });
    }
    shares.push(Share {
        name: "host",
        bytes: claims.host_bytes,
        reason: format!(
            "kernel, daemons, sessions: 2 GiB (half of {rest} where that is less), or 5 % of {rest}"
        ),
    });
    if request.guest_count > 0 {
        shares.push(Share {
            name: "guests",
            bytes: claims.guest_bytes,
            reason: format!(
                "{} of {} guests outside hugepages with {} each; and for each guest {} of hypervisor and 1/512 of \
                 its memory for page tables",
                claims.guests_outside,
                request.guest_count,
                size(request.guest_memory_bytes),
                size(GUEST_OVERHEAD_BYTES),
            ),
        });
    }
    if let Some(pool_tib) = request.pool_tib {
        shares.push(Share {
            name: "arc",
            bytes: arc_max_bytes,
            reason: arc_reason(request, claims, pool_tib),
        });
    }
    shares
}

fn arc_reason(request: &Request, claims: &Claims, pool_tib: u64) -> String {
    let wanted = wanted_arc_bytes(claims.rest_bytes, pool_tib);
    let room = claims.rest_bytes - claims.host_bytes - claims.guest_bytes;
    match request.arc {
        ArcChoice::ModuleDefault => "what the module takes when nothing is said".to_owned(),
        ArcChoice::Bytes(_) => "as asked".to_owned(),
        ArcChoice::Planned => format!(
            "the smaller of {} (the larger of half of {} and 2 GiB + 1 GiB for each of {pool_tib} TiB) and the {} \
             that are left",
            size(wanted),
            size(claims.rest_bytes),
            size(room),
        ),
    }
}

fn misfit(request: &Request, claims: &Claims, arc_max_bytes: u64) -> TuningError {
    let mut terms = Vec::new();
    if claims.hugepage_bytes > 0 {
        terms.push(format!(
            "{} hugepages x {} = {}",
            claims.hugepage_count,
            size(request.hugepage_bytes),
            size(claims.hugepage_bytes)
        ));
    }
    terms.push(format!("{} host", size(claims.host_bytes)));
    if claims.guest_bytes > 0 {
        terms.push(format!(
            "{} guests ({} outside hugepages)",
            size(claims.guest_bytes),
            claims.guests_outside
        ));
    }
    if arc_max_bytes > 0 {
        terms.push(format!(
            "{} ARC ({})",
            size(arc_max_bytes),
            match request.arc {
                ArcChoice::Planned => "the least ZFS accepts",
                ArcChoice::ModuleDefault =>
                    "the module's default, which counts hugepages as its own",
                ArcChoice::Bytes(_) => "as asked",
            }
        ));
    }
    let needed = claims
        .hugepage_bytes
        .saturating_add(claims.host_bytes)
        .saturating_add(claims.guest_bytes)
        .saturating_add(arc_max_bytes);
    TuningError::DoesNotFit {
        total: size(request.memory_bytes),
        arithmetic: terms.join(" + "),
        needed: size(needed),
        missing: size(needed.saturating_sub(request.memory_bytes)),
        advice: match request.arc {
            ArcChoice::Planned => "take fewer hugepages or guests".to_owned(),
            _ => "let fcvm plan the ARC (no --arc-max), or take fewer hugepages or guests; such a host runs out of \
                  memory (openzfs/zfs #10048)"
                .to_owned(),
        },
    }
}

/// What would happen without this plan's `zfs_arc_max`, where that is bad.
pub(super) fn default_would_crash(request: &Request, memory: &Memory) -> Option<String> {
    request.pool_tib?;
    let rest = memory.total_bytes - memory.hugepage_bytes;
    let needed = memory.arc_default_bytes + memory.host_bytes + memory.guest_bytes;
    (needed > rest).then(|| {
        format!(
            "without zfs_arc_max this host runs out of memory (openzfs/zfs #10048): ZFS {}.{} takes up to {} by default, \
             and {} remain after {} hugepages, {} for the host and {} for guests; load the settings before a pool is \
             imported",
            request.zfs.major,
            request.zfs.minor,
            size(memory.arc_default_bytes),
            size(rest.saturating_sub(memory.host_bytes + memory.guest_bytes)),
            size(memory.hugepage_bytes),
            size(memory.host_bytes),
            size(memory.guest_bytes),
        )
    })
}
