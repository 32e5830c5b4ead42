//! `fsmoe bench schedule` on the CPU: emulated, and as fast as it goes.

use crate::train::Place;
use fsmoe::bench::schedule::{Settings, Shape, run};
use fsmoe::comm::{AllToAllKind, Sizes, Topology, local};
use fsmoe::device::{Lane, LaneKind};
use fsmoe::engine::{LANES, Timeline};
use fsmoe::moe::distributed::Parallel;
use fsmoe::schedule::{Policy, policy};
use fsmoe::tensor::DType;
use serde_json::Value;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

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
        let late = row["error_percent"].as_f64().unwrap();
        assert_eq!(row["valid"].as_bool().unwrap(), overran < 1.0 && late < 10.0);
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

/// What ranks run is what was planned: on each lane the same tasks, in the same order.
#[test]
fn a_traced_step_has_the_order_of_its_graph() {
    let mut shape: Shape = "tiny".parse().unwrap();
    (shape.batch, shape.seq, shape.model.max_seq) = (2, 32, 32);
    let kind = AllToAllKind::Hierarchical2d;
    let settings =
        Settings { dtype: DType::F32, emulate: None, all_to_all: kind, steps: 1, measure: Duration::ZERO, trace: true };
    let policies: Vec<Arc<dyn Policy>> = policy::all().into_iter().map(Arc::from).collect();
    let topology = Topology::new(Sizes::new(8, 2, 2, 4, 2)).unwrap();
    let outcomes = local::run(8, Duration::from_secs(60), |world| {
        let parallel = Parallel::new(&Lane::cpu(), world, topology, kind.build())?;
        run(&parallel, &shape, &settings, &policies)
    })
    .unwrap();
    // A graph has its lanes' orders; a trace has when tasks began.
    let on = |timeline: &Timeline, lane, by_time: bool| {
        let mut spans: Vec<_> = timeline.spans.iter().filter(|span| span.lane == lane).collect();
        if by_time {
            spans.sort_by(|a, b| (a.start, a.end).partial_cmp(&(b.start, b.end)).unwrap());
        }
        spans.into_iter().map(|span| span.name.clone()).collect::<Vec<String>>()
    };
    for (rank, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.timelines.len(), policies.len());
        for (policy, traced, planned) in &outcome.timelines {
            for lane in LANES {
                let (ran, planned) = (on(traced, lane, true), on(planned, lane, false));
                assert!(!planned.is_empty() || lane == LaneKind::IntraNode, "{policy}: {lane:?}");
                assert_eq!(ran, planned, "rank {rank}, {policy}, {lane:?}");
            }
        }
    }
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
