//! `fsmoe plan`, as people and programs meet it.

use crate::train::Place;
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn tables_charts_and_files() {
    let place = Place::new();
    let start = Instant::now();
    let text = place.stdout("plan --preset mixtral-8x7b --svg chart.svg --trace trace.json");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    for part in
        ["deepspeed", "pipemoe-lina", "fsmoe, forward of block 17", "inter-node", "[AG1", "costs of fsmoe-paper"]
    {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let svg = fs::read_to_string(place.at("chart.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("backward of block 17") && svg.contains("<title>AG1 L17"));

    // The trace is the whole step under every policy: on no lane do two tasks overlap.
    let trace: Value = serde_json::from_str(&fs::read_to_string(place.at("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let mut ends = std::collections::HashMap::new();
    for event in events.iter().filter(|e| e["ph"] == "X") {
        let lane = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        let (start, duration) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        let free = ends.insert(lane, start + duration).unwrap_or(0.0);
        assert!(start >= free - 1e-3, "{event}");
    }
    // Six policies; deepspeed, tutel and the like use all three lanes or two.
    assert_eq!(ends.keys().map(|k| k.0).max(), Some(5));
}

#[test]
fn one_json_object_whose_plan_is_the_one_of_its_table() {
    let place = Place::new();
    let of = |args: &str| -> Value { serde_json::from_str(&place.stdout(args)).unwrap() };
    let plan = of("plan --json --preset mixtral-8x7b --layers 4 --seq 1024 --capacity 1.2");
    let rows = plan["policies"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|r| r["policy"].as_str().unwrap()).collect();
    assert_eq!(names, ["deepspeed", "tutel", "tutel-improved", "pipemoe-lina", "no-iio", "fsmoe"]);
    let ms = |row: &Value| row["predicted_ms"].as_f64().unwrap();
    for row in rows {
        assert!(ms(row) >= row["bound_ms"].as_f64().unwrap() * (1.0 - 1e-12), "{row}");
        assert!(ms(&rows[5]) <= ms(row) * (1.0 + 1e-9), "{row}");
        let speedup = row["speedup_over_deepspeed"].as_f64().unwrap();
        assert!((speedup - ms(&rows[0]) / ms(row)).abs() < 1e-9);
    }
    assert_eq!(rows[0]["forward"], serde_json::json!({"r": 1, "d": 1}));
    assert!((plan["plan"]["seconds"].as_f64().unwrap() * 1e3 - ms(&rows[5])).abs() < 1e-9);
    // Four blocks and the output projection, which has no MoE layer.
    let degrees = plan["plan"]["degrees"].as_array().unwrap();
    assert!(degrees.len() == 5 && degrees[4].is_null() && degrees[0][1]["r"].is_u64());
    // An explicit shape is a shape: what is given is what is planned.
    let shape =
        of("plan --json --hidden 1024 --heads 16 --ffn 2048 --expert gpt --experts 4 --top-k 1 --layers 2")["shape"]
            .clone();
    assert_eq!((&shape["hidden"], &shape["ffn"], &shape["layers"]), (&1024.into(), &2048.into(), &2.into()));
}

#[test]
fn a_profile_of_ones_own() {
    let place = Place::new();
    let costs = |line: &str| format!("alpha = 1e-5\nbeta = {line}\n");
    let mut text = format!("name = \"mine\"\nsource = \"here\"\nelement_bytes = 2\n[compute.gemm]\n{}", costs("2e-15"));
    for lane in ["intra-node", "inter-node"] {
        for kind in ["all-to-all", "all-gather", "reduce-scatter", "all-reduce"] {
            text.push_str(&format!("[{lane}.{kind}]\n{}", costs(if lane == "intra-node" { "3e-12" } else { "3e-11" })));
        }
    }
    fs::write(place.at("mine.toml"), &text).unwrap();
    for world in [
        "--ep 8 --esp 4 --a2a 2dh",
        "--ep 8 --esp 4 --a2a 1dh",
        "--nodes 1 --ranks 8 --ep 2 --esp 4",
        "--ep 1 --esp 1 --mp 1",
    ] {
        let text = place.stdout(&format!("plan --profile mine.toml --layers 4 {world}"));
        assert!(text.contains("costs of mine"), "{text}");
    }
}

#[test]
fn what_cannot_be_planned_is_refused_with_the_rule() {
    let place = Place::new();
    fs::write(place.at("bad.toml"), "name = \"x\"\n").unwrap();
    for (args, part) in [
        ("plan --preset mixtral-9x9b", "mixtral-8x7b"),
        ("plan --profile none.toml", "none.toml"),
        ("plan --profile bad.toml", "bad.toml: no profile"),
        ("plan --nodes 3", "nodes = 3 with 32 ranks"),
        ("plan --dp 2", "dp = 2 and mp = 8"),
        ("plan --ep 8 --esp 8", "ep = 8 and esp = 8"),
        ("plan --a2a 3dh", "3dh"),
        ("plan --ep 8 --esp 4 --a2a 2dh", "[intra-node.all-to-all]"),
        ("plan --policy megablocks", "megablocks"),
        ("plan --seq 40000", "40000"),
        ("plan --capacity 1e300", "capacity factor 1e300"),
        ("plan --width 0", "0 is not in 10..=65535"),
    ] {
        let output = place.output(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains("error: ") && stderr.contains(part), "{args}: {stderr}");
        assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{args}: {stderr}");
    }
}
