//! `fsmoe profile`: costs of ranks, as people read them and plans take them.

use crate::train::Place;
use fsmoe::comm::{AllToAllKind, Sizes, Topology};
use fsmoe::model::preset;
use fsmoe::schedule::{ModelCosts, Profile};
use serde_json::Value;

/// On one node and on two, hierarchical all-to-alls too: what is measured is what a plan of the same world asks for.
#[test]
fn plans_take_what_was_measured() {
    let place = Place::new();
    // Flags, and the sizes that they mean.
    let usual = Sizes::new(4, 2, 2, 2, 2);
    for (world, sizes, a2a) in [
        ("--ranks 4 --nodes 2", usual, AllToAllKind::Direct),
        (
            "--ranks 4 --nodes 2 --ep 4 --esp 1 --a2a 2dh",
            Sizes { ep: 4, esp: 1, ..usual },
            AllToAllKind::Hierarchical2d,
        ),
    ] {
        let text = place.stdout(&format!("profile {world} --batch 1 --seq 64 --time 0.3 --out mine.toml"));
        for part in ["inter-node all-to-all", "intra-node all-gather", "dense product", "expert product", "R²", "GB/s"]
        {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(text.contains("4 ranks on 2 nodes") && text.contains("written to mine.toml"), "{text}");

        let profile = Profile::load(&place.at("mine.toml")).unwrap();
        assert_eq!((profile.name.as_str(), profile.element_bytes), ("mine", 4));
        let topology = Topology::new(sizes).unwrap();
        let blocks = preset("mixtral-tiny").unwrap().workload(1, 64, &topology, a2a).unwrap();
        ModelCosts::new(&blocks, &topology, &profile).unwrap();
        assert!(profile.compute.gemm.r2.is_some() && profile.compute.expert.unwrap().r2.is_some());
        for costs in [profile.intra_node, profile.inter_node] {
            assert!(costs.all_reduce.is_some() && costs.all_to_all.is_none_or(|cost| cost.r2.is_some()), "{costs:?}");
        }

        let plan = place.stdout(&format!("plan --preset mixtral-tiny {world} --profile mine.toml"));
        assert!(plan.contains("costs of mine") && plan.contains("fsmoe, forward of block"), "{plan}");
    }
    // And training takes it.
    let small =
        "--preset mixtral-tiny --layers 1 --hidden 16 --heads 2 --ffn 16 --experts 4 --seq 8 --batch 2 --steps 2";
    let world = "--ranks 4 --nodes 2 --mp 2 --ep 4 --esp 1 --a2a 2dh";
    let train = place.output(&format!("train {small} {world} --profile mine.toml --data text.txt --out run"));
    assert!(train.status.success(), "{}", String::from_utf8_lossy(&train.stderr));
}

#[test]
fn one_json_object_with_the_points_of_every_line() {
    let place = Place::new();
    let text = place.stdout("profile --ranks 1 --batch 1 --seq 64 --time 0.1 --json");
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&object["dtype"], &object["world"]["ranks"]), (&"f32".into(), &1.into()));
    let costs = object["costs"].as_array().unwrap();
    // A rank alone has nobody to talk to.
    let names: Vec<&str> = costs.iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["dense product", "expert product"]);
    for cost in costs {
        let number = |key: &str| cost[key].as_f64().unwrap();
        let (alpha, beta) = (number("alpha"), number("beta"));
        assert!(alpha >= 0.0 && beta > 0.0 && number("r2") <= 1.0, "{cost}");
        let points = cost["points"].as_array().unwrap();
        let off = points.iter().map(|point| {
            let (n, seconds) = (point[0].as_f64().unwrap(), point[1].as_f64().unwrap());
            assert!(n > 0.0 && seconds > 0.0, "{cost}");
            (seconds / (alpha + beta * n) - 1.0).abs()
        });
        assert!(points.len() >= 4 && (off.fold(0.0, f64::max) - number("deviation")).abs() < 1e-9, "{cost}");
    }
    assert!(!place.at("profile.toml").exists());
}

#[test]
fn worlds_that_cannot_be_are_refused_before_anything_is_measured() {
    let place = Place::new();
    for (args, part) in [
        ("--ranks 6 --nodes 4", "nodes = 4 with 6 ranks: it divides the ranks"),
        ("--ranks 3 --nodes 1 --mp 1 --ep 1", "ffn = 256 with esp = 3"),
        ("--ranks 3 --nodes 3", "8 experts with ep = 3"),
        ("--ranks 8 --nodes 1", "4 heads with mp = 8"),
        ("--ranks 4 --dp 4", "dp = 4 and mp = 2"),
        ("--ranks 0", "ranks = 0"),
        ("--ranks 2 --nodes 0", "nodes = 0"),
        ("--time -1", "--time"),
        ("--dtype i32", "--dtype i32"),
        ("--preset mixtral-9x9b", "mixtral-8x7b"),
        ("--batch 0", "0 sequences"),
        ("--comm nccl", "torchrun"),
    ] {
        let output = place.output(&format!("profile {args} --out mine.toml"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains("error: ") && stderr.contains(part), "{args}: {stderr}");
        assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{args}: {stderr}");
        assert!(!place.at("mine.toml").exists(), "{args}");
    }
}
