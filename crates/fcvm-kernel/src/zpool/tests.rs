//! Plans for every number of devices, and what must never be run.

use proptest::prelude::*;

use super::*;

const TIB: u64 = 1 << 40;

fn device(index: usize, rotational: bool) -> Device {
    Device {
        path: format!("/dev/d{index}"),
        stable_path: format!("/dev/disk/by-id/d{index}"),
        size_bytes: 4 * TIB,
        physical_block_bytes: 4096,
        rotational,
        model: String::new(),
        uses: Vec::new(),
    }
}

fn request(workload: Workload, disks: usize, flash: usize) -> Request {
    Request {
        pool: "tank".to_owned(),
        devices: (0..disks + flash)
            .map(|index| (device(index, index < disks), Role::Data))
            .collect(),
        workload,
        layout: None,
        ashift: None,
        record_bytes: None,
    }
}

fn line(plan: &Plan) -> String {
    plan.commands[0]
        .words
        .join(" ")
        .replace("/dev/disk/by-id/", "")
}

#[test]
fn layouts_follow_number_size_and_use() {
    for (workload, disks, flash, end) in [
        (Workload::Vm, 1, 0, "tank d0"),
        (Workload::Vm, 0, 3, "tank mirror d0 d1 d2"),
        (
            Workload::Vm,
            5,
            0,
            "tank mirror d0 d1 mirror d2 d3 spare d4",
        ),
        (Workload::Vm, 2, 1, "tank mirror d0 d1 log d2"),
        (Workload::Files, 3, 0, "tank mirror d0 d1 d2"),
        (Workload::Files, 4, 0, "tank raidz2 d0 d1 d2 d3"),
        (Workload::Files, 2, 1, "tank mirror d0 d1 cache d2"),
        (
            Workload::Files,
            4,
            2,
            "tank raidz2 d0 d1 d2 d3 special mirror d4 d5",
        ),
        (
            Workload::Backup,
            11,
            0,
            "tank raidz3 d0 d1 d2 d3 d4 d5 d6 d7 d8 d9 d10",
        ),
    ] {
        let line = line(&plan(&request(workload, disks, flash)).unwrap());
        assert!(line.ends_with(end), "{line}");
    }
    let many = line(&plan(&request(Workload::Backup, 24, 0)).unwrap());
    assert!(many.contains("tank draid2:8d:24c:1s d0 "), "{many}");
    let mut small = request(Workload::Files, 5, 0);
    for (device, _) in &mut small.devices {
        device.size_bytes = TIB;
    }
    assert!(line(&plan(&small).unwrap()).contains("raidz1 "));
}

#[test]
fn a_special_group_of_other_redundancy_is_meant() {
    let special = line(&plan(&request(Workload::Files, 4, 2)).unwrap());
    assert!(special.starts_with("zpool create -f "), "{special}");
    let alike = line(&plan(&request(Workload::Files, 2, 2)).unwrap());
    assert!(!alike.contains(" -f "), "{alike}");
}

#[test]
fn sectors_are_the_devices_and_liars_are_named() {
    let mut one = request(Workload::Vm, 0, 2);
    one.devices[0].0.physical_block_bytes = 512;
    one.devices[0].0.model = "Samsung SSD 850 EVO 1TB".to_owned();
    one.devices[1].0.physical_block_bytes = 512;
    let with_liar = plan(&one).unwrap();
    assert_eq!(with_liar.ashift, 13);
    assert!(with_liar.warnings[0].contains("known to have 8192"));
    assert!(with_liar.warnings[1].contains("flash has none so small"));
    one.devices[0].0.physical_block_bytes = 16384;
    assert_eq!(plan(&one).unwrap().ashift, 14);
    let mut old = request(Workload::Vm, 2, 0);
    old.devices[0].0.physical_block_bytes = 512;
    assert_eq!(plan(&old).unwrap().ashift, 12);
    old.ashift = Some(9);
    let asked = plan(&old).unwrap();
    assert_eq!(asked.ashift, 9);
    assert!(asked.warnings[0].contains("smaller than the devices' blocks"));
    old.ashift = Some(17);
    assert!(plan(&old).is_err());
}

#[test]
fn blocks_match_the_use() {
    for (workload, option) in [
        (Workload::Vm, "recordsize=16K"),
        (Workload::Database, "recordsize=16K"),
        (Workload::Files, "recordsize=128K"),
        (Workload::Backup, "recordsize=1M"),
    ] {
        let plan = plan(&request(workload, 2, 0)).unwrap();
        assert!(plan.commands[1].words.contains(&option.to_owned()));
        assert!(plan.reasons.iter().any(|reason| reason.option == option));
    }
    let vms = plan(&request(Workload::Vm, 2, 0)).unwrap();
    assert!(vms.commands[2].example);
    assert!(
        vms.commands[2]
            .words
            .contains(&"volblocksize=16K".to_owned())
    );
}

#[test]
fn padding_is_counted_as_zfs_does() {
    // vdev_raidz_asize: 4 sectors on raidz2 of 6 take 6; on raidz1 of 5, 4 + 1 rounded to 6.
    assert_eq!(raidz_allocated_sectors(4, 6, 2), 6);
    assert_eq!(raidz_allocated_sectors(4, 5, 1), 6);
    assert_eq!(raidz_allocated_sectors(32, 10, 2), 42);
    let mut narrow = request(Workload::Vm, 8, 0);
    narrow.layout = Some(Layout::Raidz(2));
    let plan = plan(&narrow).unwrap();
    assert!(
        plan.warnings
            .iter()
            .any(|text| text.contains("66 % of the space")),
        "{:?}",
        plan.warnings
    );
    assert_eq!(plan.usable_bytes, 32 * TIB * 4 / 6);
}

#[test]
fn what_holds_data_is_run_only_when_named_twice_and_what_is_in_use_never() {
    let mut used = request(Workload::Vm, 2, 0);
    let path = used.devices[0].0.path.clone();
    used.devices[0].0.uses.push(Use {
        path: path.clone(),
        what: "ext4".to_owned(),
        active: false,
    });
    let holds = plan(&used).unwrap();
    let named = [path.clone()];
    assert!(holds.obstacles(&[])[0].contains("--destroy-data /dev/d0"));
    assert_eq!(holds.obstacles(&named), Vec::<String>::new());
    assert_eq!(holds.runnable(&named)[0][2], "-f");
    assert!(
        !plan(&request(Workload::Vm, 2, 0)).unwrap().runnable(&named)[0].contains(&"-f".to_owned())
    );
    used.devices[0].0.uses.push(Use {
        path,
        what: "mounted at /".to_owned(),
        active: true,
    });
    assert!(plan(&used).unwrap().obstacles(&named)[0].contains("never overwritten"));
}

#[test]
fn wrong_requests_are_refused() {
    for name in [
        "", "1a", "mirror", "raidz2", "log1", "a b", "a;b", "a/b", "-f",
    ] {
        let mut bad = request(Workload::Vm, 2, 0);
        bad.pool = name.to_owned();
        assert!(matches!(plan(&bad), Err(ZpoolError::Name(_))), "{name}");
    }
    let mut twice = request(Workload::Vm, 2, 0);
    twice.devices[1] = twice.devices[0].clone();
    assert!(
        plan(&twice)
            .unwrap_err()
            .to_string()
            .contains("given twice")
    );
    let mut tiny = request(Workload::Vm, 2, 0);
    tiny.devices[0].0.size_bytes = 1 << 20;
    assert!(plan(&tiny).unwrap_err().to_string().contains("64 MiB"));
    for (layout, count) in [
        (Layout::Mirror, 1),
        (Layout::Raidz(3), 4),
        (Layout::Draid(2), 3),
        (Layout::Stripe, 0),
    ] {
        let mut few = request(Workload::Vm, count, 0);
        few.layout = Some(layout);
        assert!(
            matches!(plan(&few), Err(ZpoolError::Layout { .. })),
            "{layout}"
        );
    }
    let mut odd = request(Workload::Vm, 2, 0);
    odd.record_bytes = Some(10_000);
    assert!(plan(&odd).is_err());
    assert!("raidz4".parse::<Layout>().is_err());
}

fn workloads() -> impl Strategy<Value = Workload> {
    prop_oneof![
        Just(Workload::Vm),
        Just(Workload::Database),
        Just(Workload::Files),
        Just(Workload::Backup)
    ]
}

proptest! {
    #[test]
    fn every_device_is_used_once(workload in workloads(), disks in 0_usize..80, flash in 0_usize..12) {
        prop_assume!(disks + flash > 0);
        let request = request(workload, disks, flash);
        let plan = plan(&request).unwrap();
        prop_assert_eq!(&plan, &super::plan(&request).unwrap());
        let words = &plan.commands[0].words;
        for (device, _) in &request.devices {
            prop_assert_eq!(words.iter().filter(|word| **word == device.stable_path).count(), 1);
        }
        prop_assert!(plan.usable_bytes > 0);
        prop_assert!(plan.usable_bytes <= (disks + flash) as u64 * 4 * TIB);
        let data_count = if disks == 0 { flash } else { disks };
        prop_assert!(data_count == 1 || plan.failures_survived >= 1);
        prop_assert!(plan.reasons.iter().all(|reason| !reason.reason.is_empty()));
    }

    #[test]
    fn raidz_takes_at_least_data_and_parity(sectors in 1_u64..4096, parity in 1_u64..=3, more in 1_u64..20) {
        let allocated = raidz_allocated_sectors(sectors, parity + more, parity);
        prop_assert!(allocated >= sectors + parity);
        prop_assert!(allocated.is_multiple_of(parity + 1));
        prop_assert!(allocated <= raidz_allocated_sectors(sectors + 1, parity + more, parity));
    }
}
