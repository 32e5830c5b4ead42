//! `fsmoe bench schedule` on the CPU: emulated, and as fast as it goes.

use crate::train::Place;
use serde_json::Value;
use std::fs;

fn rows(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {row}"))
}

/// A machine on which everything takes about as long, and long enough for a busy host of two cores.
const COSTS: &str = r#"
name = "slow"
source = "made up"
element_bytes = 2
[compute]
gemm = { alpha = 2e-3, beta = 1.5e-14 }
[intra-node]
all-to-all = { alpha = 2e-3, beta = 1e-10 }
all-gather = { alpha = 2e-3, beta = 1e-10 }
reduce-scatter = { alpha = 2e-3, beta = 1e-10 }
all-reduce = { alpha = 2e-3, beta = 1e-10 }
[inter-node]
all-to-all = { alpha = 2e-3, beta = 6e-10 }
all-gather = { alpha = 2e-3, beta = 6e-10 }
reduce-scatter = { alpha = 2e-3, beta = 6e-10 }
all-reduce = { alpha = 2e-3, beta = 6e-10 }
"#;

#[test]
fn emulated_steps_take_what_was_predicted() {
    let place = Place::new();
    fs::write(place.at("slow.toml"), COSTS).unwrap();
    let args = "bench schedule --ranks 4 --nodes 2 --emulate slow.toml --shape intra-bound --steps 2 --json --trace traces \
                --policy deepspeed --policy tutel --policy fsmoe";
    let out = place.command(args).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    let rows = rows(&String::from_utf8(out.stdout).unwrap());
    assert_eq!(rows.len(), 3, "{said}");
    for (row, policy) in rows.iter().zip(["deepspeed", "tutel", "fsmoe"]) {
        assert_eq!(
            (&row["bench"], &row["shape"], &row["policy"]),
            (&"schedule".into(), &"intra-bound".into(), &policy.into())
        );
        let (measured, predicted) = (number(row, "measured_ms"), number(row, "predicted_ms"));
        // Waiting cannot be shorter than it is to be; how much longer it is, is the host's.
        assert!(predicted > 200.0 && measured > 0.98 * predicted && measured < 1.5 * predicted, "{row}");
        let speedup = number(&rows[0], "measured_ms") / measured;
        assert!((number(row, "speedup_over_deepspeed") / speedup - 1.0).abs() < 1e-9);
        let overran = number(row, "overran_percent");
        assert_eq!(row["valid"].as_bool().unwrap(), overran < 1.0);
        assert!(number(row, "r_forward") >= number(row, "d_forward") && number(row, "d_forward") >= 1.0);
    }
    let valid = rows.iter().all(|row| row["valid"] == true);
    assert!(out.status.success() == valid && said.contains("longer than they cost") != valid, "{said}");
    let predicted = |i: usize| number(&rows[i], "predicted_ms");
    assert!(predicted(2) < predicted(1) && predicted(1) < predicted(0));

    for policy in ["deepspeed", "tutel", "fsmoe"] {
        let trace = fs::read_to_string(place.at(&format!("traces/intra-bound-{policy}.json"))).unwrap();
        let trace: Value = serde_json::from_str(&trace).unwrap();
        let spans: Vec<&Value> = trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
        for rank in 0..4 {
            for lane in 0..3 {
                let on = spans.iter().filter(|s| s["pid"] == rank && s["tid"] == lane);
                // Tutel has its gathers and scatters on the lane of its products.
                assert!(on.count() > 3 || (policy, lane) == ("tutel", 1), "{policy}: rank {rank}, lane {lane}");
            }
        }
        let sums = spans.iter().filter(|s| s["name"].as_str().unwrap().starts_with("G ")).count();
        assert!(sums > 0, "{policy}: gradients are summed");
        let svg = fs::read_to_string(place.at(&format!("traces/intra-bound-{policy}.svg"))).unwrap();
        assert!(svg.contains("measured") && svg.contains("simulated"));
    }
}

#[test]
fn ranks_are_timed_on_costs_of_their_own() {
    let place = Place::new();
    let rows =
        rows(&place.stdout("bench schedule --ranks 2 --nodes 2 --shape tiny --seq 32 --steps 2 --policy fsmoe --json"));
    assert_eq!(rows.len(), 1);
    assert!(number(&rows[0], "measured_ms") > 0.0 && number(&rows[0], "predicted_ms") > 0.0);
    assert!(rows[0]["overran_percent"].is_null() && rows[0]["speedup_over_deepspeed"].is_null());
}

#[test]
fn what_cannot_be_run_is_told() {
    let place = Place::new();
    for (args, part) in [
        ("--shape huge", "inter-bound, intra-bound"),
        ("--policy best", "deepspeed"),
        ("--emulate missing.toml", "missing.toml"),
        ("--layers 3", "4..=64"),
        ("--ranks 6 --nodes 4", "6 ranks"),
        ("--shape tiny --ranks 2 --nodes 1 --ep 3", "ep = 3"),
        ("--shape tiny --comm nccl", "torchrun"),
        ("--shape tiny --share-gpu", "--share-gpu with --comm local"),
        ("--shape tiny --comm-ctas 8", "--comm-ctas 8 with --comm local"),
    ] {
        let out = place.command(&format!("bench schedule {args}")).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(part), "{args}: {said}");
    }
}
