//! The command as people and programs meet it: what it writes where, how it ends, and what it refuses.

use crate::train::{Place, tree};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

const TRAIN: &str = "train --config small.toml --out run";

/// The JSON lines that a command writes.
#[track_caller]
fn events(place: &Place, args: &str) -> Vec<Value> {
    place.stdout(args).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Asserts that the command fails with a message that has all of `parts`, without a word on standard output, and changes
/// no file.
#[track_caller]
fn refused(place: &Place, args: &str, parts: &[&str]) {
    let before = tree(&place.at(""));
    let output = place.output(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{args}: {}\n{stderr}", output.status);
    assert!(stderr.contains("error: ") && !stderr.contains("panicked"), "{args}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{args}: no {part:?} in\n{stderr}");
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args}");
    assert!(tree(&place.at("")) == before, "{args}: the folder has changed");
}

#[test]
fn json_lines_and_the_files_of_a_run() {
    let place = Place::new();
    let rows = events(&place, &format!("{TRAIN} --json"));
    let of = |event: &str| rows.iter().filter(|r| r["event"] == event).collect::<Vec<_>>();
    let steps = of("step");
    assert_eq!(steps.iter().map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    for row in &steps {
        assert!(row["loss"].as_f64().unwrap() > 0.0 && row["tokens_per_s"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert_eq!(of("eval").iter().map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>(), [10, 20]);

    let done = rows.last().unwrap();
    assert_eq!((&done["event"], &done["steps"], of("done").len()), (&"done".into(), &20.into(), 1));
    assert_eq!(done["val_loss"], of("eval")[1]["val_loss"]);
    let mean = steps.iter().map(|r| r["loss"].as_f64().unwrap()).sum::<f64>() / 20.0;
    assert!((done["train_loss"].as_f64().unwrap() - mean).abs() < 1e-12);
    assert_eq!(done["dropped_fraction"], 0.0);
    assert!(done["tokens_per_s"].as_f64().unwrap() > 0.0);
    let checkpoint = place.at(done["checkpoint"].as_str().unwrap());
    for file in ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"] {
        assert!(checkpoint.join(file).is_file(), "{file}");
    }
    let run: Vec<String> = tree(&place.at("run")).into_keys().map(|p| p.display().to_string()).collect();
    let top: Vec<&str> = run.iter().map(String::as_str).filter(|p| !p.contains('/')).collect();
    assert_eq!(top, ["config.toml", "loss.svg", "metrics.jsonl"]);
    assert!(fs::read_to_string(place.at("run/loss.svg")).unwrap().starts_with("<svg"));
    let metrics = fs::read_to_string(place.at("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), steps.len() + of("eval").len());
}

#[test]
fn a_table_for_people() {
    let place = Place::new();
    let table = place.stdout(TRAIN);
    let row = |name: &str| {
        table.lines().find_map(|l| l.trim().strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {table}"))
    };
    assert!(row("steps").contains("20 of 20, 1.28k tokens"), "{table}");
    assert!(row("training loss").contains("nats per byte"), "{table}");
    assert!(row("held-out loss").contains("bits, perplexity"), "{table}");
    assert!(row("dropped choices").contains("0 %"), "{table}");
    assert!(row("load, MoE layer 1").contains("× mean") && row("load, MoE layer 2").contains("× mean"), "{table}");
    assert!(row("checkpoint").trim() == "run/checkpoints/step-000020", "{table}");
}

#[test]
fn flags_win_over_the_file() {
    let place = Place::new();
    let rows = events(&place, &format!("{TRAIN} --json --steps 3 --seq 8"));
    assert_eq!(rows.last().unwrap()["steps"], 3);
    let kept = fs::read_to_string(place.at("run/config.toml")).unwrap();
    for line in ["steps = 3", "seq = 8", "batch = 4", "experts = 4"] {
        assert!(kept.lines().any(|l| l == line), "{line} in\n{kept}");
    }
}

#[test]
fn bad_configuration_files_are_named_with_their_line() {
    let place = Place::new();
    for (text, parts) in [
        ("steps = 5\nspeed = 9\n", ["bad.toml", "line 2", "unknown field `speed`"]),
        ("steps = 5\nlr = \"fast\"\n", ["bad.toml", "line 2", "fast"]),
        ("gate = \"topk\"\n", ["line 1", "unknown gate \"topk\"", "top-k, sigmoid, x-moe, expert-choice, soft"]),
        ("steps = \n", ["bad.toml", "line 1", "steps = "]),
    ] {
        fs::write(place.at("bad.toml"), text).unwrap();
        refused(&place, "train --json --config bad.toml", &parts);
    }
    refused(&place, "train --json --config no.toml", &["no.toml", "No such file"]);
}

#[test]
fn only_gates_that_see_other_tokens_have_a_note() {
    let place = Place::new();
    for (gate, noted) in
        [("top-k", false), ("sigmoid", false), ("x-moe", false), ("expert-choice", true), ("soft", true)]
    {
        let output = place.output(&format!("train --config small.toml --steps 1 --gate {gate} --out {gate} --json"));
        assert!(output.status.success());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.contains(&format!("the {gate} gate routes")), noted, "{stderr}");
        assert_eq!(stderr.contains("not comparable"), noted, "{stderr}");
    }
}

/// The steps fill the pipe that is not read, so that the run cannot have ended when the signal comes.
#[test]
fn an_interrupted_run_has_a_checkpoint_and_goes_on() {
    const STEPS: &str =
        "--steps 450 --save-every 1000 --eval-every 1000 --layers 1 --seq 8 --batch 1 --experts 2 --json";
    let place = Place::new();
    place.stdout(&format!("train --config small.toml --out whole {STEPS}"));
    for (run, signal) in [("int", libc::SIGINT), ("term", libc::SIGTERM)] {
        let mut command = place.command(&format!("train --config small.toml --out {run} {STEPS}"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut String::new()).unwrap();
        // SAFETY: a plain system call; the child has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{stderr}");

        let last: Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
        let step = last["step"].as_u64().unwrap();
        assert!(last["event"] == "step" && step < 450, "{last}");
        assert_eq!(place.checkpoints(run), [format!("step-{step:06}")]);
        assert!(stderr.contains(&format!("interrupted after step {step}")), "{stderr}");
        assert!(stderr.contains(&format!("--resume {run}")), "{stderr}");
        assert!(place.at(run).join("loss.svg").is_file());

        place.stdout(&format!("train --resume {run} --json"));
        place.assert_same("whole", run, run);
    }
}

#[test]
fn values_that_break_a_rule_are_refused() {
    const GATES: &str = "top-k, sigmoid, x-moe, expert-choice, soft";
    const PRESETS: &str = "gpt2-moe-tiny, mixtral-tiny, gpt2-moe-small, gpt2-xl-moe, mixtral-8x7b, mixtral-8x22b";
    let place = Place::new();
    for (flags, parts) in [
        ("--top-k 9 --experts 8", ["top_k = 9 with 8 experts", "at most once"]),
        ("--top-k 0", ["top_k = 0", "at least 1"]),
        ("--experts 0", ["experts = 0", "at least 1"]),
        ("--preset gpt5", ["unknown preset \"gpt5\"", PRESETS]),
        ("--gate topk", ["unknown gate \"topk\"", GATES]),
        ("--order fast", ["unknown order \"fast\"", "gshard, tutel, ragged"]),
        ("--expert moe", ["unknown expert \"moe\"", "gpt, mixtral"]),
        ("--dtype f8", ["unknown dtype \"f8\"", "f64, f32, bf16, f16"]),
        ("--dtype i32", ["--dtype i32", "f32, f64, bf16, f16"]),
        ("--seq 0", ["--seq 0", "at least 1"]),
        ("--seq 257", ["--seq 257", "end at 256"]),
        ("--batch 0", ["--batch 0", "at least 1"]),
        ("--accumulate 0", ["--accumulate 0", "at least 1"]),
        ("--steps 0", ["--steps 0", "at least 1"]),
        ("--steps -5", ["'-5'", "--steps"]),
        ("--steps many", ["'many'", "--steps"]),
        ("--hidden 33 --heads 2", ["hidden = 33 with 2 heads", "the heads divide the width"]),
        ("--heads 4 --kv-heads 3", ["heads = 4 with 3 kv_heads", "the kv_heads divide the heads"]),
        ("--layers 0", ["layers = 0", "at least 1"]),
        ("--moe-every 3", ["moe_every = 3 with 2 layers", "no block"]),
        ("--capacity-factor 0", ["\"0\"", "a number above 0, or * to drop nothing"]),
        ("--capacity-factor -1", ["\"-1\"", "a number above 0, or * to drop nothing"]),
        ("--capacity-factor nan", ["\"nan\"", "a number above 0, or * to drop nothing"]),
        ("--capacity-factor much", ["\"much\"", "a number above 0, or * to drop nothing"]),
        ("--gate soft --capacity-factor *", ["capacity factor *", "the soft gate"]),
        ("--gate soft --order tutel", ["order tutel with the soft gate", "only the gshard order"]),
        ("--gate sigmoid --gate-noise", ["gate_noise with the sigmoid gate", "only the top-k gate"]),
        ("--routing-groups 7", ["7 routing groups", "4·16 tokens"]),
        ("--stop-at 21", ["--stop-at 21 of --steps 20", "at the latest"]),
        ("--warmup 21", ["--warmup 21 of --steps 20", "part of the schedule"]),
        ("--lr 0", ["--lr 0", "a finite number above 0"]),
        ("--lr nan", ["--lr NaN", "a finite number above 0"]),
        ("--speed 9", ["'--speed'", "unexpected"]),
    ] {
        refused(&place, &format!("{TRAIN} --json {flags}"), &parts);
    }
}

#[test]
fn data_that_is_no_text_is_refused() {
    let place = Place::new();
    fs::write(place.at("empty"), "").unwrap();
    fs::write(place.at("short"), [b'x'; 300]).unwrap();
    fs::create_dir_all(place.at("folder/of/folders")).unwrap();
    std::os::unix::fs::symlink("loop", place.at("loop")).unwrap();
    for (data, parts) in [
        ("empty", ["--data empty", "no text in it"]),
        ("folder", ["--data folder", "no text in it"]),
        ("nowhere", ["nowhere: ", "No such file"]),
        ("text.txt/x", ["text.txt/x: ", "Not a directory"]),
        ("loop", ["loop: ", "symbolic links"]),
        ("/dev/null", ["/dev/null: ", "Not a directory"]),
        ("/proc/self/mem", ["/proc/self/mem", "no text in it"]),
        ("short", ["285 bytes to train on and 15 held out", "--seq 16 takes at least 17"]),
    ] {
        refused(&place, &format!("{TRAIN} --json --data {data}"), &parts);
    }
}

#[test]
fn broken_checkpoints_are_refused() {
    const MODEL: &str = "model.safetensors";
    const OPTIMIZER: &str = "optimizer.safetensors";
    let place = Place::new();
    place.stdout(&format!("{TRAIN} --stop-at 10"));
    let dir = place.at("run/checkpoints/step-000010");
    let read = |file: &str| fs::read(dir.join(file)).unwrap();
    let broken = |file: &str, bytes: &[u8], parts: &[&str]| {
        let whole = read(file);
        fs::write(dir.join(file), bytes).unwrap();
        refused(&place, "train --json --resume run", &[&["step-000010"], parts].concat());
        fs::write(dir.join(file), whole).unwrap();
    };
    for (file, other) in [(MODEL, OPTIMIZER), (OPTIMIZER, MODEL)] {
        let whole = read(file);
        for len in [0, 5, 200, whole.len() / 2, whole.len() - 1] {
            broken(file, &whole[..len], &[file, "truncated"]);
        }
        let noise: Vec<u8> = (0..1000_u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        broken(file, &noise, &[file]);
        broken(file, b"once upon a time, in a land far away", &[file, "no safetensors file"]);
        broken(file, &read(other), &[file, "missing"]);
    }
    let state = |step: u64, samples: u64, format: u64| {
        format!("{{\"format\":{format},\"step\":{step},\"seed\":1,\"steps\":20,\"samples\":{samples}}}")
    };
    broken("state.json", b"", &["state.json", "not a run's state"]);
    broken("state.json", b"{\"format\": 1}", &["state.json", "not a run's state", "step"]);
    broken("state.json", state(10, 40, 2).as_bytes(), &["state.json", "format 2", "reads 1"]);
    broken("state.json", state(10, 41, 1).as_bytes(), &["saw 41 in 10 steps"]);
    broken("state.json", state(u64::MAX, 40, 1).as_bytes(), &["saw 40 in 18446744073709551615 steps"]);
    place.stdout("train --resume run");
}

#[test]
fn checkpoints_of_something_else_are_refused() {
    let place = Place::new();
    place.stdout(&format!("{TRAIN} --stop-at 10"));
    let checkpoint = "run/checkpoints/step-000010";
    fs::create_dir_all(place.at("folder/checkpoints")).unwrap();
    fs::create_dir(place.at("alone")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(place.at(checkpoint).join(file), place.at("alone").join(file)).unwrap();
    }
    for (args, parts) in [
        ("nowhere", ["nowhere: ", "neither a checkpoint"]),
        ("folder", ["folder: ", "no checkpoints/step-NNNNNN"]),
        ("text.txt", ["text.txt/checkpoints: ", "Not a directory"]),
        ("alone", ["alone: ", "not RUN/checkpoints/step-NNNNNN"]),
        ("run --hidden 64", ["step-000010/optimizer.safetensors", "(256, 64)"]),
        ("run --experts 8", ["step-000010/optimizer.safetensors", "(8, 32)"]),
        ("run --layers 3", ["step-000010/optimizer.safetensors", "model.layers.2"]),
        ("run --gate x-moe", ["step-000010/optimizer.safetensors", "missing"]),
    ] {
        refused(&place, &format!("train --json --resume {args}"), &parts);
    }
    refused(&place, &format!("{TRAIN} --json"), &["--out run", "there is a run in it", "--resume run"]);
    refused(&place, "train --json --resume run --seed 2", &["--seed 2", "that run has seed 1"]);

    fs::write(place.at("run/metrics.jsonl"), "{}\nnot a row\n{}\n").unwrap();
    refused(&place, "train --json --resume run", &["metrics.jsonl, line 2", "not a row of metrics"]);
}

#[test]
fn samples() {
    let place = Place::new();
    place.stdout(&format!("{TRAIN} --steps 60 --lr 0.01 --save-every 60"));
    let sample = |flags: &str| place.output(&format!("sample run --prompt The --bytes 40 {flags}")).stdout;
    let drawn = sample("--seed 3 --temperature 1");
    assert_eq!((&drawn[..3], drawn.len(), drawn[43]), (&b"The"[..], 3 + 40 + 1, b'\n'));
    assert_eq!(sample("--seed 3 --temperature 1"), drawn);
    assert_ne!(sample("--seed 4 --temperature 1"), drawn);
    // The most probable byte needs no luck, and a nucleus of next to nothing is that byte.
    let greedy = sample("--temperature 0 --seed 3");
    assert_eq!(greedy.len(), 44);
    assert_eq!(sample("--temperature 0 --seed 4"), greedy);
    assert_eq!(sample("--top-p 0.000001 --seed 4"), greedy);
    assert_eq!(place.stdout("sample run/checkpoints/step-000060 --prompt The --bytes 0"), "The\n");
}

#[test]
fn samples_that_cannot_be_are_refused() {
    let place = Place::new();
    place.stdout(&format!("{TRAIN} --steps 1"));
    for (args, parts) in [
        ("run --temperature -1", ["temperature = -1", "at least 0"]),
        ("run --temperature inf", ["temperature = inf", "a finite number"]),
        ("run --temperature hot", ["'hot'", "--temperature"]),
        ("run --top-p 0", ["top_p = 0", "above 0"]),
        ("run --top-p -0.5", ["top_p = -0.5", "above 0"]),
        ("run --top-p 1.5", ["top_p = 1.5", "at most 1"]),
        ("run --context 0", ["context = 0", "at least"]),
        ("run --prompt=", ["an empty prompt", "at least one token"]),
        ("nowhere", ["nowhere: ", "neither a checkpoint"]),
        ("run/checkpoints", ["run/checkpoints: ", "no config.json"]),
        ("", ["no run in the folder runs/", "train first"]),
    ] {
        refused(&place, &format!("sample {args}"), &parts);
    }
}

/// `… | head`: whoever reads has gone, at once or in the middle.
#[test]
fn a_closed_pipe_is_an_error_and_no_panic() {
    let place = Place::new();
    place.stdout(&format!("{TRAIN} --steps 1"));
    for args in [
        "sample run --bytes 100",
        "doctor",
        "doctor --json",
        "train --config small.toml --out table",
        "train --config small.toml --out json --json",
    ] {
        let mut child = place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args}: {stderr}");
        assert!(stderr.ends_with("error: standard output: Broken pipe (os error 32)\n"), "{args}: {stderr}");
    }
}

#[test]
fn the_doctor_says_what_there_is() {
    let place = Place::new();
    let text = place.stdout("doctor").to_lowercase();
    for word in ["driver", "gpu", "cublas", "nccl", "kernels", "threads"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let report: Value = serde_json::from_str(&place.stdout("doctor --json")).unwrap();
    assert!(report.is_object(), "{report}");
}
