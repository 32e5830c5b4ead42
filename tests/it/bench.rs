//! `fsmoe bench` on the CPU, and the scripts that put other implementations' rows beside its own.

use crate::train::Place;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

#[track_caller]
fn rows(place: &Place, args: &str) -> Vec<Value> {
    place.stdout(args).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {row}"))
}

const LAYER: &str = "bench layer --device cpu --json --time 20 --shape 96,32,48,8,2,gpt";

#[test]
fn layers_are_timed_beside_the_dense_products() {
    let place = Place::new();
    let rows = rows(&place, &format!("{LAYER} --shape 64,16,32,4,1,mixtral"));
    assert_eq!(rows[0]["bench"], "ceiling");
    let rows = &rows[1..];
    assert_eq!(rows.len(), 4, "two shapes, forward and forward+backward");
    let (forward, both) = (&rows[0], &rows[1]);
    assert_eq!((&forward["pass"], &both["pass"]), (&"forward".into(), &"forward+backward".into()));
    for row in rows {
        assert_eq!((&row["bench"], &row["impl"], &row["mode"]), (&"layer".into(), &"fsmoe".into(), &"eager".into()));
        assert_eq!(
            (&row["order"], &row["capacity_factor"], &row["dropped"]),
            (&"ragged".into(), &"*".into(), &0.into())
        );
        let [median, low, high] = ["median_ms", "p10_ms", "p90_ms"].map(|name| number(row, name));
        assert!(0.0 < low && low <= median && median <= high && number(row, "repeats") >= 7.0, "{row}");
        let times = if row["pass"] == "forward" { 1.0 } else { 3.0 };
        let efficiency = times * number(row, "dense_ms") / median;
        assert!((number(row, "efficiency") / efficiency - 1.0).abs() < 1e-9, "{row}");
    }
    // 2 FLOPs for each of T·k·M·H·2, three times with the backward.
    assert_eq!(number(forward, "flops"), 2.0 * 96.0 * 2.0 * 32.0 * 48.0 * 2.0);
    assert_eq!(number(both, "flops"), 3.0 * number(forward, "flops"));
    // x and y, and the weights of router and experts, once each; all again for the gradients.
    assert_eq!(number(forward, "bytes"), 4.0 * (2.0 * 96.0 * 32.0 + 8.0 * 2.0 * 32.0 * 48.0 + 8.0 * 32.0));
    assert_eq!(number(both, "bytes"), 2.0 * number(forward, "bytes"));
}

#[test]
fn every_gate_order_and_expert_is_timed() {
    let place = Place::new();
    for flags in [
        "--gate sigmoid --order tutel --expert mixtral --load zipf",
        "--gate x-moe --order gshard --dtype bf16",
        "--gate expert-choice --capacity-factor 1",
        "--gate soft --order gshard --capacity-factor 1 --dtype f64",
        "--order tutel --capacity-factor 0.5 --load zipf",
    ] {
        let rows = rows(&place, &format!("{LAYER} {flags}"));
        assert_eq!(rows.len(), 3, "{flags}");
        assert!(number(&rows[2], "median_ms") > 0.0);
        let dropped = number(&rows[2], "dropped");
        assert_eq!(dropped > 0.0, flags.contains("0.5"), "{flags}: {dropped} dropped");
    }
}

#[test]
fn planted_loads_are_what_the_router_gives() {
    let place = Place::new();
    let of = |load: &str| number(&rows(&place, &format!("{LAYER} --load {load}"))[1], "load_max_over_mean");
    fs::write(place.at("load.json"), r#"{"loads": [96, 0, 0, 48, 0, 0, 48, 0]}"#).unwrap();
    assert_eq!(of("load.json"), 4.0);
    // The first of eight by 1/rank: 8/2.718 times the mean.
    let zipf = of("zipf");
    assert!((zipf - 8.0 / 2.717_857).abs() < 0.05, "{zipf}");
    assert!(of("uniform") < 2.0);
}

#[test]
fn what_cannot_be_benchmarked_is_refused() {
    let place = Place::new();
    for (args, part) in [
        ("layer --shape 1,2", "T,M,H,E,k,expert"),
        ("layer --shape 8,4,4,8,2,gpt --load zipf", "E up to M"),
        ("layer --shape 8,4,4,2,2,gpt --load none.json", "none.json"),
        (
            "layer --shape 8,4,4,2,2,gpt --gate soft --order gshard --capacity-factor 1 --load zipf",
            "only top-k and sigmoid",
        ),
        ("layer --shape 8,4,4,2,3,gpt", "top_k = 3 with 2 experts"),
        ("layer --dtype i32", "none of f64, f32, bf16, f16\n"),
        ("kernels --dtype f8", "none of f64, f32, bf16, f16\n"),
        ("schedule --dtype i32", "none of f64, f32, bf16, f16\n"),
        ("layer --shape 8,4,4,2,2,gpt --load zip", "it is uniform, zipf, or"),
        ("kernels speed", "no operation is called \"speed\""),
        ("kernels top_k --shape k=0", "at least 1"),
        ("kernels top_k --shape T", "SIZE=NUMBER"),
        ("kernels top_k --shape Q=1", "the sizes of what is benchmarked are E, T, k"),
        ("kernels top_k --shape k=9,E=4", "k = 9 must be 4"),
        ("kernels --against x.cu", "<NAME>"),
        ("kernels swiglu --against none.fatbin", "none.fatbin"),
        ("kernels swiglu --against text.txt", "takes a GPU"),
    ] {
        let output = place.output(&format!("bench {args} --device cpu --time 1 --json"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(part), "{args}: no {part:?} in {stderr}");
        assert!(!stderr.contains("panicked"), "{args}: {stderr}");
    }
}

/// In a table's place below it, and not again at the end.
#[test]
fn an_error_is_told_once() {
    let output = Place::new().output("bench layer --device cpu --time 1 --shape 8,4,4,2,3,gpt --shape 8,4,4,2,2,gpt");
    let all = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && all.contains("1 of 3 measurements failed"), "{all}");
    assert_eq!(all.matches("top_k = 3 with 2 experts").count(), 1, "{all}");
}

#[test]
fn replays_are_not_measured_without_the_tests_program() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/replay.sh");
    let Ok(output) = Command::new("bash").arg(script).arg("/nowhere/it").output() else { return };
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && stderr.contains("/nowhere/it: no such program"), "{stderr}");
}

#[test]
fn operations_are_timed_beside_their_least_bytes() {
    let place = Place::new();
    let rows = rows(&place, "bench kernels swiglu --device cpu --json --time 10 --shape R=64,H=32");
    assert_eq!(rows.len(), 2, "the exact name alone");
    let row = &rows[1];
    assert_eq!((&row["bench"], &row["name"], &row["shape"]), (&"kernel".into(), &"swiglu".into(), &"R=64,H=32".into()));
    assert_eq!((number(row, "bytes"), number(row, "flops")), (3.0 * 64.0 * 32.0 * 4.0, 0.0));
    assert_eq!(row["bound"], "memory");
    assert!((number(row, "ratio") - number(row, "ceiling_ms") / number(row, "median_ms")).abs() < 1e-12);
    let table = place.stdout("bench kernels swiglu --device cpu --time 10 --shape R=64,H=32");
    assert!(table.contains("a copy moves") && table.contains("R=64,H=32") && table.contains("memory"), "{table}");
}

/// Python with `scripts/` on its path; none where there is no Python.
fn python(code: &str) -> Option<Output> {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    Command::new("python3")
        .args(["-c", code])
        .env("PYTHONPATH", scripts)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .ok()
}

#[track_caller]
fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn peers_rows_are_as_ours_and_join() {
    let place = Place::new();
    let lines = place.stdout(&format!("{LAYER} --load zipf --dtype bf16"));
    let ours: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    // A peer's row of the same shape, device and load with made-up times, and one that failed.
    let code = "
import json, peers
name, shape = peers.parse_shape('96,32,48,8,2,gpt')
T, M, H, E, k, _ = shape
loads = peers.apportion(peers.zipf(E), T * k, T)
assignment = peers.deal(loads, T, k)
assert all(len(set(row)) == k for row in assignment)
assert [sum(row.count(e) for row in assignment) for e in range(E)] == loads
ceiling = {'copy_bytes_per_s': 1e9, 'gemm_flops_per_s': 1e12}
f = peers.figures([2.0, 1.0, 3.0], 0.5, shape, 'forward+backward', ceiling, None, max(loads) * E / (T * k))
row = lambda *rest, **figures: peers.row('torch', 'DEVICE', name, shape, '*', 'zipf', 'forward+backward', *rest, **figures)
print(json.dumps(row('eager', **f)))
print(json.dumps(row('graph', error='no capture')))
";
    let Some(output) = python(&code.replace("DEVICE", ours["device"].as_str().unwrap())) else { return };
    let theirs = printed(&output);
    let peer: Value = serde_json::from_str(theirs.lines().next().unwrap()).unwrap();
    let keys = |row: &Value| row.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&peer), keys(&ours), "the same fields");
    for same in ["flops", "load_max_over_mean"] {
        assert_eq!(number(&peer, same), number(&ours, same), "{same}");
    }
    assert_eq!(number(&peer, "bytes"), number(&ours, "bytes"));
    assert_eq!((number(&peer, "median_ms"), number(&peer, "p10_ms"), number(&peer, "efficiency")), (2.0, 1.2, 0.75));

    fs::write(place.at("ours.jsonl"), &lines).unwrap();
    fs::write(place.at("peers.jsonl"), format!("{{\"bench\":\"ceiling\"}}\n{theirs}")).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/compare.py");
    let compare = |args: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(&script).args(args).current_dir(place.at("")).output().unwrap()
    };
    let table = printed(&compare(&["ours.jsonl", "peers.jsonl", "--pass", "forward+backward"]));
    let header = "| forward+backward | load | dense × 3 | floor | fsmoe | torch |";
    assert!(table.starts_with(header), "{table}");
    assert!(table.contains("| 96,32,48,8,2,gpt | zipf |") && table.contains("2 ms, 0.750"), "{table}");
    assert!(table.contains("- torch, 96,32,48,8,2,gpt, graph: no capture"), "{table}");
    assert_eq!(table.matches("**").count(), 2, "one is the fastest: {table}");
    assert!(!compare(&["small.toml"]).status.success());
    let missing = compare(&["none.jsonl"]);
    assert!(!missing.status.success());
    assert_eq!(String::from_utf8_lossy(&missing.stderr), "none.jsonl: No such file or directory\n");
    // Another type is another line, another order another column.
    let other = |from: &str, to: &str| {
        fs::write(place.at("other.jsonl"), lines.replace(from, to)).unwrap();
        printed(&compare(&["ours.jsonl", "other.jsonl", "peers.jsonl", "--pass", "forward+backward"]))
    };
    let table = other(r#""dtype":"bf16""#, r#""dtype":"f16""#);
    assert!(table.contains("| 96,32,48,8,2,gpt, bf16 |") && table.contains("| 96,32,48,8,2,gpt, f16 |"), "{table}");
    let table = other(r#""order":"ragged""#, r#""order":"tutel""#);
    assert!(table.contains("| fsmoe, ragged | fsmoe, tutel | torch |"), "{table}");
    if python("import matplotlib").is_some_and(|output| output.status.success()) {
        printed(&compare(&["ours.jsonl", "peers.jsonl", "--plot", "layers.svg"]));
        assert!(fs::read_to_string(place.at("layers.svg")).unwrap().contains("<svg"));
    }
}

/// The entry points that docs/kernels.md has parameters for, endings in braces written out.
fn documented() -> Vec<String> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels.md")).unwrap();
    let blocks = page.split("```cuda\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).filter(|line| !line.starts_with(' '));
    let names = lines.map(|line| line.split('(').next().unwrap());
    names
        .flat_map(|name| match name.split_once('{') {
            None => vec![name.to_owned()],
            Some((stem, endings)) => {
                endings.trim_end_matches('}').split(',').map(|ending| format!("{stem}{ending}")).collect()
            }
        })
        .collect()
}

#[test]
fn every_embedded_kernel_is_documented() {
    let documented = documented();
    assert!(documented.contains(&"swiglu_forward_bf16".to_owned()) && documented.len() > 50, "{documented:?}");
    let Some(cuobjdump) = crate::cuda::installed_cuobjdump() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernels.fatbin");
    fs::write(&file, fsmoe::device::cuda::fat_binary()).unwrap();
    if fsmoe::device::cuda::fat_binary().is_empty() {
        return;
    }
    // What only Hopper has is in the code for sm_90a alone.
    let output = Command::new(cuobjdump).args(["-arch", "sm_90a", "-symbols"]).arg(&file).output().unwrap();
    let listing = printed(&output);
    let embedded: Vec<&str> = listing
        .lines()
        .filter(|line| line.contains("STO_ENTRY"))
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    assert!(embedded.contains(&"swiglu_forward_bf16"), "{listing}");
    let missing: Vec<&str> = embedded.iter().copied().filter(|name| !documented.iter().any(|d| d == name)).collect();
    assert!(missing.is_empty(), "docs/kernels.md lacks {missing:?}: run scripts/kernel-docs.py");
    let gone: Vec<&String> = documented.iter().filter(|d| !embedded.contains(&d.as_str())).collect();
    assert!(gone.is_empty(), "docs/kernels.md has {gone:?}, which are no longer: run scripts/kernel-docs.py");
}
