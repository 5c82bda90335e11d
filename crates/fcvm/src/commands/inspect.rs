//! `fcvm inspect`: all that is known of VMs and images, as JSON.

use fcvm_types::record::{VmRecord, VmState};
use serde_json::{Value, json};

use crate::args::InspectArguments;
use crate::context::Context;
use crate::state::StateStore;

pub(crate) fn run(context: &Context, arguments: &InspectArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let mut values = Vec::new();
    for name in &arguments.names {
        match store.find(name) {
            Ok(record) => values.push(vm(&store, &record)),
            Err(missing) => match super::image::inspect_value(context, name)? {
                Some(image) => values.push(image),
                None => return Err(missing),
            },
        }
    }
    println!("{}", serde_json::to_string_pretty(&values)?);
    Ok(crate::EXIT_SUCCESS)
}

fn vm(store: &StateStore, record: &VmRecord) -> Value {
    let paths = store.paths(&record.id);
    let timings: Vec<Value> = record
        .timings_us
        .iter()
        .map(|(stage, microseconds)| json!({"stage": stage, "microseconds": microseconds}))
        .collect();
    let mut value = super::ls::json_row(record);
    let more = json!({
        "hypervisor_reason": record.hypervisor_reason,
        "terminal": record.terminal,
        "remove_on_exit": record.remove_on_exit,
        "stop_signal": record.stop_signal,
        "start_cache": record.start_cache,
        "memory_origin": record.memory_origin,
        "disk_store": record.disk_store,
        "start_timings": timings,
        "resources": record.resources,
        "log_path": paths.container_log(),
        "console_log_path": paths.console_log(),
        "control_socket": (record.state != VmState::Exited).then(|| paths.control_socket()),
    });
    if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
        value.extend(more);
    }
    value
}
