//! Runs over ranks learn what one rank with as many routing groups learns.

use crate::train::Place;
use fsmoe::device::Lane;
use fsmoe::model::checkpoint::TensorFile;
use fsmoe::tensor::DType;
use std::path::Path;

/// The rows of a run's metrics, without how fast they were: of its steps, and its last evaluation. One that stops in between
/// has others as well.
fn rows(run: &Path) -> Vec<Vec<(String, f64)>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        let numbers = row.iter().filter(|(key, _)| *key != "tokens_per_s");
        numbers.filter_map(|(key, value)| Some((key.clone(), value.as_f64()?))).collect()
    };
    let last = text.lines().count() - 1;
    let kept = text.lines().enumerate().filter(|(i, line)| *i == last || line.contains("\"step\",\"step\""));
    kept.map(|(_, line)| row(line)).collect()
}

/// Every tensor of a checkpoint, by name, as f64.
fn tensors(checkpoint: &Path) -> Vec<(String, Vec<f64>)> {
    let mut all = Vec::new();
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let file = TensorFile::open(&checkpoint.join(name)).unwrap();
        for tensor in file.names() {
            let value = Lane::cpu().cast(&file.read(tensor).unwrap(), DType::F64).unwrap();
            all.push((tensor.to_owned(), value.to_vec().unwrap()));
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Fails unless two runs have the same rows and the same checkpoint after `step` steps, but for rounding. After the first,
/// AdamW's first moment is the gradient, but for a factor.
fn assert_same(place: &Place, a: &str, b: &str, step: u64) {
    let (a, b) = (place.at(a), place.at(b));
    let close = |what: &str, a: f64, b: f64, scale: f64| assert!((a - b).abs() <= 1e-8 * scale, "{what}: {a} and {b}");
    let (left, right) = (rows(&a), rows(&b));
    assert_eq!((left.len(), right.len()), (step as usize + 1, step as usize + 1));
    for (left, right) in left.iter().zip(&right) {
        for ((key, a), (other, b)) in left.iter().zip(right) {
            assert_eq!(key, other);
            close(key, *a, *b, b.abs().max(1e-3));
        }
    }
    let checkpoint = format!("checkpoints/step-{step:06}");
    let (left, right) = (tensors(&a.join(&checkpoint)), tensors(&b.join(&checkpoint)));
    assert_eq!(left.len(), right.len());
    for ((name, a), (other, b)) in left.iter().zip(&right) {
        assert_eq!((name, a.len()), (other, b.len()));
        let gradient = step == 1 && name.starts_with("m.");
        let largest = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let scale = if gradient { 1e-2 * largest } else { 100.0 * largest.max(1e-6) };
        a.iter().zip(b).for_each(|(a, b)| close(name, *a, *b, scale));
    }
}

const COMMON: &str = "--dtype f64 --steps 6 --warmup 2 --eval-every 3 --save-every 3 --z-weight 0.01 ";

#[test]
fn ranks_learn_as_one_rank_with_the_same_routing_groups() {
    for (groups, model, world) in [
        (
            8,
            "--heads 4 --kv-heads 2 --capacity-factor 1.25",
            "--ranks 8 --nodes 2 --ep 2 --esp 4 --mp 4 --schedule fsmoe",
        ),
        (
            4,
            "--order ragged --capacity-factor * --accumulate 2",
            "--ranks 4 --nodes 2 --a2a 2dh --schedule pipemoe-lina",
        ),
        (
            4,
            "--preset gpt2-moe-tiny --layers 4 --moe-every 2 --gate sigmoid --bias-rate 0.01 --shared-experts 1",
            "--ranks 4 --nodes 4 --ep 2 --mp 2 --schedule tutel-improved",
        ),
        (2, "--gate expert-choice --order gshard", "--ranks 2 --ep 1 --esp 2 --schedule no-iio"),
        (2, "--gate-noise --top-k 1", "--ranks 2 --schedule deepspeed"),
    ] {
        let place = Place::new();
        place.train("one", &format!("{COMMON}{model} --routing-groups {groups}")).unwrap();
        place.train("ranks", &format!("{COMMON}{model} {world}")).unwrap();
        assert_same(&place, "ranks", "one", 6);
    }
}

/// In the type that people train in, on the text that is built in: rounding does not grow over steps.
#[test]
fn eight_ranks_in_f32_learn_the_built_in_text_as_one_does() {
    let place = Place::new();
    let common = "train --device cpu --dtype f32 --no-cache --layers 2 --hidden 64 --heads 4 --kv-heads 4 --ffn 64 \
                  --experts 4 --capacity-factor 1.25 --seq 32 --batch 8 --steps 30 --warmup 5 --eval-windows 16 --out";
    place.stdout(&format!("{common} one --routing-groups 8"));
    place.stdout(&format!("{common} ranks --ranks 8 --nodes 2 --ep 2 --esp 4 --mp 4"));
    let losses = |run: &str| -> Vec<f64> {
        let rows = rows(&place.at(run));
        rows.iter()
            .filter_map(|row| row.iter().find(|(key, _)| key == "loss" || key == "val_loss").map(|(_, loss)| *loss))
            .collect()
    };
    let (one, ranks) = (losses("one"), losses("ranks"));
    // 30 steps and an evaluation, in which something is learned.
    assert_eq!((one.len(), ranks.len()), (31, 31));
    assert!(one[30] < one[0] - 1.0, "{one:?}");
    let largest = one.iter().zip(&ranks).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(largest < 1e-2, "{largest}: {one:?} and {ranks:?}");
}

#[test]
fn the_dense_part_is_divided_among_mp_ranks() {
    let gpt2 = "--preset gpt2-moe-tiny --heads 4 --layers 3 --moe-every 3 --shared-experts 1";
    // Fewer heads of keys and values than of queries: as many as MP ranks, fewer, and twice as many.
    for (groups, model, world) in [
        (4, format!("{gpt2} --accumulate 2"), "--ranks 4 --nodes 1 --ep 4 --mp 4"),
        (4, format!("{gpt2} --kv-heads 2"), "--ranks 4 --nodes 2 --ep 2 --mp 2"),
        (4, "--heads 4 --kv-heads 2 --shared-experts 2 --accumulate 2".into(), "--ranks 4 --nodes 2 --ep 2 --mp 2"),
        (4, "--heads 8 --kv-heads 2 --shared-experts 1".into(), "--ranks 4 --nodes 2 --esp 2 --mp 4"),
        (8, "--heads 4 --kv-heads 1 --layers 3 --moe-every 3".into(), "--ranks 8 --nodes 2 --ep 2 --esp 4 --mp 4"),
        (2, "--heads 8 --kv-heads 4 --layers 3 --moe-every 3".into(), "--ranks 2 --ep 1 --mp 2"),
    ] {
        for steps in [1, 4] {
            let place = Place::new();
            let model = format!("--dtype f64 --steps {steps} --warmup 1 --clip 0.1 --z-weight 0.01 {model}");
            place.train("one", &format!("{model} --routing-groups {groups}")).unwrap();
            place.train("ranks", &format!("{model} {world}")).unwrap();
            assert_same(&place, "ranks", "one", steps);
        }
    }
}

/// 4 windows are a micro-batch; of 2 more, 10 tokens are no four ranks' or routing groups' to divide.
#[test]
fn windows_whose_tokens_do_not_divide_are_not_evaluated() {
    let place = Place::new();
    let common = "--dtype f64 --steps 2 --seq 5 --batch 4 --heads 4 --eval-every 1 --out";
    let run = |flags: &str| {
        let out = place.output(&format!("train --config small.toml {common} {flags}"));
        (out.status.success(), String::from_utf8(out.stderr).unwrap())
    };
    for (name, flags) in [("mp", "--ranks 4 --ep 4 --mp 4"), ("groups", "--routing-groups 4")] {
        let (done, said) = run(&format!("{name}-6 {flags} --eval-windows 6"));
        assert!(done && said.contains("on 4 held-out windows, not 6"), "{said}");
        let (done, said) = run(&format!("{name}-4 {flags} --eval-windows 4"));
        assert!(done && !said.contains("held-out windows"), "{said}");
        assert_eq!(rows(&place.at(&format!("{name}-6"))), rows(&place.at(&format!("{name}-4"))));
        let (done, said) = run(&format!("none {flags} --eval-windows 3"));
        assert!(!done && said.contains("3 held-out windows of --seq 5") && said.contains("groups, 4,"), "{said}");
        assert!(!place.at("none").exists());
    }
    assert_same(&place, "mp-6", "groups-6", 2);
}

#[test]
fn any_world_goes_on_from_any_other() {
    let place = Place::new();
    // Nothing is dropped, so routing groups make no difference.
    for (i, model) in
        ["", "--preset gpt2-moe-tiny --layers 2 --moe-every 2 ", "--heads 4 --kv-heads 2 --shared-experts 1 "]
            .into_iter()
            .enumerate()
    {
        let run = format!("{COMMON}--capacity-factor * {model}");
        let (one, moved) = (format!("one-{i}"), format!("moved-{i}"));
        place.train(&one, &run).unwrap();
        place.train(&moved, &format!("{run} --ranks 4 --nodes 2 --ep 2 --esp 2 --stop-at 2")).unwrap();
        place.resume(&moved, "--ranks 4 --nodes 2 --ep 2 --esp 1 --mp 2 --stop-at 3").unwrap();
        place.resume(&moved, "--ranks 2 --nodes 1 --ep 2 --mp 1 --stop-at 4").unwrap();
        place.resume(&moved, "--ranks 2 --nodes 1 --ep 1 --mp 2 --stop-at 5").unwrap();
        place.resume(&moved, "--ranks 1 --ep 1 --mp 1").unwrap();
        assert_same(&place, &moved, &one, 6);
    }
}

#[test]
fn no_schedule_changes_a_bit() {
    let place = Place::new();
    let mut first = None;
    for policy in ["deepspeed", "tutel", "tutel-improved", "pipemoe-lina", "no-iio", "fsmoe"] {
        let world = format!("--ranks 4 --nodes 2 --ep 2 --esp 2 --mp 2 --steps 3 --warmup 1 --schedule {policy}");
        place.train(policy, &world).unwrap();
        let weights = std::fs::read(place.at(policy).join("checkpoints/step-000003/model.safetensors")).unwrap();
        let rows = rows(&place.at(policy));
        assert!(*first.get_or_insert_with(|| (weights.clone(), rows.clone())) == (weights, rows), "{policy}");
    }
}

#[test]
fn worlds_that_do_not_fit_are_refused() {
    let place = Place::new();
    for (flags, parts) in [
        ("--ranks 8 --mp 3", ["mp = 3", "8 ranks"]),
        ("--ranks 8 --nodes 2 --dp 2", ["dp = 2", "8 ranks"]),
        ("--ranks 4 --mp 4", ["2 heads", "mp = 4"]),
        ("--ranks 6 --mp 6 --heads 12 --kv-heads 4 --hidden 48", ["4 kv_heads", "mp = 6"]),
        ("--ranks 4 --mp 4 --preset gpt2-moe-tiny --heads 4 --kv-heads 2", ["2 kv_heads", "mp = 4"]),
        ("--ranks 4 --mp 4 --heads 4 --ffn 30 --moe-every 2", ["ffn = 30", "mp = 4"]),
        ("--ranks 4 --mp 4 --heads 4 --ffn 30 --shared-experts 1", ["ffn = 30", "mp = 4"]),
        ("--ranks 8 --ep 8", ["--ep 8", "4 experts"]),
        ("--ranks 3 --esp 3 --batch 3", ["--esp 3", "width of 32"]),
        ("--ranks 8", ["--batch 4", "--dp 8"]),
        ("--ranks 2 --schedule best", ["best", "tutel"]),
        ("--ranks 2 --a2a 3dh", ["3dh", "1dh"]),
        ("--comm-ctas 4", ["--comm-ctas 4", "--comm local"]),
        ("--ranks 2 --comm local --rendezvous here:1", ["--rendezvous here:1", "--comm nccl"]),
        ("--share-gpu", ["--share-gpu", "processes"]),
        ("--comm nccl", ["no launcher", "torchrun"]),
        ("--comm nccl --device cpu", ["--device cpu", "--comm local"]),
        ("--ranks 2 --comm-timeout 0", ["--comm-timeout 0", "1 second"]),
    ] {
        let out = place.command(&format!("train --config small.toml --out no {flags}")).output().unwrap();
        let message = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && parts.iter().all(|part| message.contains(part)), "{flags}: {message}");
        assert!(!place.at("no").exists(), "{flags}");
    }
}
