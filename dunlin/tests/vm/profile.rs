//! Where a guest's time goes: a guest whose hot loop is known.

use std::fs;

use serde_json::Value;

use crate::support::{Bed, guest};

/// Where the guest's code lies.
const LOAD: u64 = 0x10_0000;
/// Where it is in long mode, and its parts.
const LONG: u64 = 0x100;
const COLD: u64 = 0x180;
const HOT: u64 = 0x200;
const END: u64 = 0x280;

/// Goes to long mode, and there calls a function that prints a letter, and one that computes for long,
/// round and round.
fn computes() -> Vec<u8> {
    let mut code = vec![
        // Page tables at 0x200000: the first gigabyte, as pages of 2 MiB would be one page of 1 GiB.
        0xbf, 0, 0, 0x20, 0, // mov edi, 0x200000
        0xc7, 0x07, 0x03, 0x10, 0x20, 0, // mov dword [edi], 0x201003
        0xc7, 0x87, 0, 0x10, 0, 0, 0x03, 0x20, 0x20, 0, // mov dword [edi + 0x1000], 0x202003
        0xc7, 0x87, 0, 0x20, 0, 0, 0x83, 0, 0, 0, // mov dword [edi + 0x2000], 0x83
        0xc7, 0x87, 0x08, 0x20, 0, 0, 0x83, 0, 0x20, 0, // mov dword [edi + 0x2008], 0x200083
        0x0f, 0x22, 0xdf, // mov cr3, edi
        0x0f, 0x20, 0xe0, // mov eax, cr4
        0x83, 0xc8, 0x20, // or eax, 0x20
        0x0f, 0x22, 0xe0, // mov cr4, eax
        0xb9, 0x80, 0, 0, 0xc0, // mov ecx, IA32_EFER
        0x0f, 0x32, // rdmsr
        0x0d, 0, 1, 0, 0, // or eax, LME
        0x0f, 0x30, // wrmsr
        0x0f, 0x20, 0xc0, // mov eax, cr0
        0x0d, 0, 0, 0, 0x80, // or eax, PG
        0x0f, 0x22, 0xc0, // mov cr0, eax
        0x0f, 0x01, 0x15, 0xf0, 0, 0x10, 0, // lgdt [0x1000f0]
        0xea, 0, 1, 0x10, 0, 0x08, 0, // jmp 8:0x100100
    ];
    assert!(code.len() <= 0xd8);
    code.resize(0xd8, 0);
    code.extend([0; 8]);
    code.extend([0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0]); // 64-bit code
    code.resize(0xf0, 0);
    code.extend([0x0f, 0, 0xd8, 0, 0x10, 0]); // the GDT: 16 bytes at 0x1000d8
    code.resize(LONG as usize, 0);
    code.extend([
        0xbc, 0, 0, 0x30, 0, // mov esp, 0x300000
        0xe8, 0x76, 0, 0, 0, // call cold
        0xe8, 0xf1, 0, 0, 0, // call hot
        0xeb, 0xf4, // jmp to the first call
    ]);
    code.resize(COLD as usize, 0x90);
    code.extend([
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'a', // mov al, 'a'
        0xee, // out dx, al
        0xc3, // ret
    ]);
    code.resize(HOT as usize, 0x90);
    code.extend([
        0xb9, 0, 0, 0x10, 0, // mov ecx, 0x100000
    ]);
    // As much as the processor's own looks between blocks do not show beside, in any build.
    for _ in 0..16 {
        code.extend([
            0x01, 0xc8, // add eax, ecx
            0x31, 0xc3, // xor ebx, eax
        ]);
    }
    code.extend([
        0xff, 0xc9, // dec ecx
        0x75, 0xbc, // jnz to the first addition
        0xc3, // ret
    ]);
    code
}

/// A list of the guest's symbols, as `nm` writes it, as if it were to run `moved` bytes elsewhere.
fn symbols(bed: &Bed, moved: u64) -> String {
    let path = bed.folder().join("System.map");
    let lines = [
        (0, "start"),
        (LONG, "long_mode"),
        (COLD, "print_letter"),
        (HOT, "compute"),
        (END, "behind"),
    ];
    let lines = lines.map(|(at, name)| format!("{:016x} T {name}\n", LOAD + at - moved));
    fs::write(&path, lines.concat()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn start(bed: &Bed, engine: &str, more: &[&str]) {
    bed.run_as((engine, "x86-64-v1"), "a", &computes(), more);
    let _runs = bed.console("a").at_least(3);
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}

/// Names of the threads of the VM's process.
fn threads(bed: &Bed) -> Vec<String> {
    let pid = count(&bed.json(&["inspect", "a"])["status"]["pid"]);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")));
    // One may end meanwhile.
    names.flatten().map(|name| name.trim().to_owned()).collect()
}

#[test]
fn the_loop_that_computes_has_most_samples_and_all_kinds_add_up() {
    let bed = Bed::new();
    start(&bed, "soft", &[]);
    let symbols = symbols(&bed, 0);
    let svg = bed.folder().join("profile.svg");
    let profile = bed.json(&[
        "inspect",
        "a",
        "--profile",
        "--for",
        "1s",
        "--symbols",
        &symbols,
        "--svg",
        svg.to_str().unwrap(),
    ]);
    assert_eq!(profile["engine"], "soft");
    let samples = &profile["cpus"][0]["samples"];
    let total = count(&samples["total"]);
    // The machine may be busy, but not so busy.
    assert!(total >= 20, "{samples}");
    let kinds = samples["kinds"].as_array().unwrap();
    let of = |name: &str| {
        let kind = kinds.iter().find(|kind| kind["kind"] == name).unwrap();
        count(&kind["samples"])
    };
    assert_eq!(
        kinds.iter().map(|k| count(&k["samples"])).sum::<u64>(),
        total
    );
    let places = samples["places"].as_array().unwrap();
    let placed: u64 = places.iter().map(|place| count(&place["samples"])).sum();
    assert_eq!(placed + count(&samples["elsewhere"]), total);
    let translates = std::arch::is_x86_feature_detected!("bmi2");
    let runs = if translates {
        "translated"
    } else {
        "interpreted"
    };
    assert!(of(runs) * 10 >= total * 8, "{samples}");
    let top = &profile["top"][0];
    assert_eq!(top["symbol"], "compute", "{profile}");
    assert_eq!(top["address"], "0x100200");
    assert_eq!(top["user"], false);
    assert!(top["share"].as_f64().unwrap() >= 0.8, "{top}");
    // The loop's block, and not the way into it.
    assert_eq!(count(&top["hottest_offset"]), 5, "{top}");
    let rows = profile["top"].as_array().unwrap();
    let busy = total - of("halted") - of("stopped");
    let shown: u64 = rows.iter().map(|row| count(&row["samples"])).sum();
    assert!(shown <= busy && shown + count(&samples["elsewhere"]) >= busy);
    let serial = &profile["cpus"][0]["devices"][0];
    assert_eq!(serial["device"], "serial", "{profile}");
    // The processor counts its exit before the device counts what comes of it, and both are asked while
    // the guest runs: one may be on its way at either end.
    let [by_device, by_exits] = [
        count(&serial["writes"]),
        count(&profile["cpus"][0]["exits"]["port_writes"]),
    ];
    assert!(by_device.abs_diff(by_exits) <= 1, "{profile}");
    assert!(by_device > 20, "{serial}");
    assert!(fs::read_to_string(&svg).unwrap().contains("compute"));
}

#[test]
fn a_kernel_that_moved_is_named_by_what_the_user_says() {
    let bed = Bed::new();
    start(&bed, "soft", &[]);
    let symbols = symbols(&bed, 0x4000);
    let arguments = [
        "inspect",
        "a",
        "--profile",
        "--for",
        "300ms",
        "--symbols",
        &symbols,
    ];
    let unmoved = bed.json(&arguments);
    assert_ne!(unmoved["top"][0]["symbol"], "compute");
    assert_eq!(unmoved["symbols"]["offset_from"], "assumed");
    let moved = [&arguments[..], &["--symbol-offset", "0x4000", "--top", "1"]].concat();
    let moved = bed.json(&moved);
    assert_eq!(moved["top"][0]["symbol"], "compute", "{moved}");
    assert_eq!(moved["top"].as_array().unwrap().len(), 1);
}

#[test]
fn a_table_names_the_loop_and_one_processor_is_shown_alone() {
    let bed = Bed::new();
    start(&bed, "soft", &["--cpus", "2"]);
    let symbols = symbols(&bed, 0);
    let arguments = [
        "inspect",
        "a",
        "--profile",
        "--for",
        "500ms",
        "--symbols",
        &symbols,
    ];
    let output = bed.output(&arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    let mut code = text.lines().skip_while(|line| !line.starts_with("CODE"));
    let hot = code.nth(1).unwrap_or_default();
    assert!(hot.starts_with("compute "), "{text}");
    assert!(text.contains("CPU 1"), "{text}");
    // The second waits to be started.
    let second = bed.json(&["inspect", "a", "--profile", "--for", "200ms", "--vcpu", "1"]);
    let samples = &second["cpus"][0]["samples"];
    let halted = samples["kinds"].as_array().unwrap().iter();
    let halted: u64 = halted
        .filter(|kind| kind["kind"] == "halted" || kind["kind"] == "stopped")
        .map(|kind| count(&kind["samples"]))
        .sum();
    // It may be found while it is told something.
    assert!(halted * 10 >= count(&samples["total"]) * 9, "{second}");
    let error = bed.fails(&["inspect", "a", "--profile", "--for", "1ms", "--vcpu", "2"]);
    assert!(
        error.contains("--vcpu") && error.contains("0 to 1"),
        "{error}"
    );
}

#[test]
fn there_is_a_sampling_thread_only_while_a_profile_is_taken() {
    let bed = Bed::new();
    start(&bed, "soft", &[]);
    let has_sampler = || threads(&bed).iter().any(|name| name == "sampler");
    assert!(threads(&bed).iter().any(|name| name == "vcpu0"));
    assert!(!has_sampler());
    let arguments = ["inspect", "a", "--profile", "--for", "60s", "--json"];
    let mut profile = bed.command(&arguments).spawn().unwrap();
    while !has_sampler() {
        assert!(profile.try_wait().unwrap().is_none(), "it has ended");
    }
    // One at a time; and a guest is paused, and goes on, while it lasts.
    let error = bed.fails(&["inspect", "a", "--profile", "--for", "10ms"]);
    assert!(error.contains("somebody else takes a profile"), "{error}");
    bed.json(&["pause", "a"]);
    bed.json(&["resume", "a"]);
    profile.kill().unwrap();
    profile.wait().unwrap();
    let short = Bed::new();
    start(&short, "soft", &[]);
    short.json(&["inspect", "a", "--profile", "--for", "50ms"]);
    assert!(!threads(&short).iter().any(|name| name == "sampler"));
}

#[test]
fn what_cannot_be_profiled_is_said() {
    let bed = Bed::new();
    start(&bed, "soft", &[]);
    for (arguments, words) in [
        (&["--for", "1h"][..], "--for"),
        (&["--rate", "0"], "--rate"),
        (
            &["--symbols", "/nonexistent/vmlinux"],
            "/nonexistent/vmlinux",
        ),
        (
            &["--svg", "/nonexistent/x.svg", "--for", "1ms"],
            "/nonexistent/x.svg",
        ),
    ] {
        let arguments = [&["inspect", "a", "--profile"], arguments].concat();
        let error = bed.fails(&arguments);
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
    assert!(
        bed.fails(&["inspect", "b", "--profile"])
            .contains("no VM named \"b\"")
    );
    let file = bed.fails(&["inspect", "./a.saved", "--profile"]);
    assert!(file.contains("./a.saved"), "{file}");
    let alone = bed.fails(&["inspect", "a", "--top", "3"]);
    assert!(alone.contains("--profile"), "{alone}");
}

#[test]
fn under_kvm_exits_are_known_and_it_says_that_samples_are_not() {
    let bed = Bed::new();
    let report = bed.json(&["probe"]);
    let mut offers = report["baselines"].as_array().unwrap().iter();
    let offer = offers.find(|offer| offer["name"] == "x86-64-v1" && offer["engine"] == "kvm");
    if offer.is_none_or(|offer| offer["usable"] != true) {
        eprintln!("SKIP: {offer:?}");
        return;
    }
    bed.run_as(("kvm", "x86-64-v1"), "a", &guest::letters(), &[]);
    let _runs = bed.console("a").at_least(3);
    let profile = bed.json(&["inspect", "a", "--profile", "--for", "500ms"]);
    let why = profile["without_samples"].as_str().unwrap();
    assert!(why.contains("kvm"), "{why}");
    let cpu = &profile["cpus"][0];
    assert!(cpu.get("samples").is_none(), "{cpu}");
    assert!(count(&cpu["exits"]["port_writes"]) > 0, "{cpu}");
    assert_eq!(cpu["devices"][0]["device"], "serial", "{cpu}");
}
