//! Clones that a running VM has ready (`--standby`): their processes wait, and so does the VM's own
//! successor. What is ready belongs to one freeze; the next one needs others.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use fcvm_types::record::Lineage;

use super::fork::OF_A_FORK;
use super::freeze::Preparation;
use super::spec::VmSpec;
use super::vm::RunningVm;
use crate::commands::clones::{Family, Spare};
use crate::context::Context;
use crate::handover::Handover;
use crate::template::{Template, Waiting, send_offer};

/// How long new clones are not made while the command that took the last ones is busy with them.
const BUSY_LIMIT: Duration = Duration::from_secs(2);

/// What a VM has ready for its next fork.
pub(super) struct Reserve {
    pub(super) template: Template,
    pub(super) preparation: Preparation,
    /// They wait for the state.
    pub(super) clones: Vec<Spare>,
}

/// The reserve, and what it is made with.
pub(super) struct Reserves {
    context: Context,
    spec: VmSpec,
    /// How many clones are to be ready.
    count: u16,
    present: RefCell<Option<Reserve>>,
}

impl Reserves {
    pub(super) fn new(context: &Context, spec: &VmSpec) -> Self {
        Self {
            context: context.clone(),
            spec: spec.clone(),
            count: spec.standby,
            present: RefCell::default(),
        }
    }
}

impl RunningVm {
    /// Takes what is ready out of the reserve.
    pub(super) fn take_reserve(&self) -> Option<Reserve> {
        self.reserves.present.take()
    }

    /// Makes a new reserve once the one who took the last one is done.
    pub(super) async fn replace_reserve(self: &Rc<Self>, asking: &Handover) {
        if self.reserves.count == 0 {
            return;
        }
        let _ = tokio::time::timeout(BUSY_LIMIT, asking.receive::<()>()).await;
        self.fill_reserve().await;
    }

    /// Makes clones ready, where they are wanted and missing.
    pub(super) async fn fill_reserve(self: &Rc<Self>) {
        if self.reserves.count == 0 {
            return;
        }
        let _one_at_a_time = self.freezing.lock().await;
        if self.reserves.present.borrow().is_some() || self.check_running().is_err() {
            return;
        }
        match self.make_reserve().await {
            Ok(reserve) => *self.reserves.present.borrow_mut() = Some(reserve),
            Err(error) => {
                tracing::warn!(target: "vm", "no clones are ready ahead (--standby): {error:#}");
            }
        }
    }

    async fn make_reserve(&self) -> anyhow::Result<Reserve> {
        let Reserves {
            context,
            spec,
            count,
            ..
        } = &self.reserves;
        let lineage = {
            let record = self.record.borrow();
            Lineage {
                parent: record.id.clone(),
                parent_name: record.name.clone(),
                snapshot: None,
                serve: None,
                base: record.lineage.as_ref().and_then(|own| own.base.clone()),
            }
        };
        let family = Family {
            source: spec,
            lineage: &lineage,
            ports: &[],
            remove_on_exit: false,
        };
        let plan = self.plan_freeze()?;
        let template = self.template(&plan)?;
        let device_line = self.machine.get().device_line();
        let mut clones = Vec::new();
        for _ in 0..*count {
            let spare = Spare::start(context, &family)?;
            send_offer(
                &spare.channel,
                self.foundation.accelerator,
                &device_line,
                &template,
                OF_A_FORK,
            )?;
            clones.push(spare);
        }
        let preparation = self.prepare_freeze(plan).await?;
        let mut ready = Vec::new();
        for spare in clones {
            // One that has ended has said why in its log.
            if let Ok(Some(_)) = spare.channel.receive::<Waiting>().await {
                ready.push(spare);
            }
        }
        Ok(Reserve {
            template,
            preparation,
            clones: ready,
        })
    }
}
