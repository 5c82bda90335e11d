//! Modules of a kernel package: what each depends on.

#![no_main]

use fcvm_kernel::module_dependencies;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(names) = module_dependencies(input) {
        for name in names {
            assert!(!name.is_empty() && !name.contains(['-', ',', '\0']));
        }
    }
});
