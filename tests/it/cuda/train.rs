//! Whole training runs on the GPU, beside those of the CPU.

use std::fs;
use std::path::Path;

use fsmoe::device::{DeviceChoice, Lane};
use fsmoe::model::{Sampling, checkpoint as weights, generate};
use fsmoe::report::Summary;
use fsmoe::tensor::{DType, Place};
use fsmoe::train::{Request, Settings, checkpoint, train};

const STEPS: u64 = 20;

/// A run of a small batch; the losses of its steps are in its folder.
fn run(out: &Path, preset: &str, device: DeviceChoice, dtype: DType) -> Summary {
    let settings = Settings {
        preset: Some(preset.into()),
        out: Some(out.to_path_buf()),
        device: Some(device),
        dtype: Some(dtype),
        steps: Some(STEPS),
        batch: Some(4),
        seq: Some(64),
        lr: Some(5e-4),
        accumulate: Some(2),
        eval_windows: Some(4),
        ..Settings::default()
    };
    train(Request { settings, resume: None, json: None }).unwrap()
}

fn losses(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter(|row| row["event"] == "step").map(|row| row["loss"].as_f64().unwrap()).collect()
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max)
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_training_takes_the_cpus_course() {
    let folder = tempfile::tempdir().unwrap();
    for preset in ["mixtral-tiny", "gpt2-moe-tiny"] {
        let at = |name: &str| folder.path().join(format!("{preset}-{name}"));
        let gpu = DeviceChoice::Cuda(0);
        run(&at("cpu"), preset, DeviceChoice::Cpu, DType::F32);
        let summary = run(&at("f32"), preset, gpu, DType::F32);
        run(&at("again"), preset, gpu, DType::F32);
        run(&at("bf16"), preset, gpu, DType::BF16);
        let [cpu, wide, again, narrow] = ["cpu", "f32", "again", "bf16"].map(|name| losses(&at(name)));
        assert_eq!(cpu.len() as u64, STEPS);
        assert!(wide == again, "{preset}: two runs differ");
        let (exact, rough) = (worst(&wide, &cpu), worst(&narrow, &cpu));
        assert!(exact < 1e-3, "{preset} in f32: off by {exact:.1e}\n{wide:?}\n{cpu:?}");
        // A rate at which the loss falls all the way: where it jumps, rounding decides how far.
        assert!(rough < 2e-2, "{preset} in bf16: off by {rough:.1e}\n{narrow:?}\n{cpu:?}");
        let device = summary.device.unwrap();
        assert!(device.device.contains("cuda:0") && device.peak_memory_bytes > 0 && device.share_of_ceiling > 0.0);
        println!("{preset}: f32 {exact:.1e}, bf16 {rough:.1e}; {device:?}");
    }
}

/// A run goes on elsewhere: its checkpoints know nothing of the device.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_a_run_goes_on_on_the_cpu_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let (moved, stayed) = (folder.path().join("moved"), folder.path().join("stayed"));
    let settings = |device, out: Option<&Path>| Settings {
        device: Some(device),
        out: out.map(Path::to_path_buf),
        ..Settings::default()
    };
    let tiny = |s: Settings| Settings {
        preset: Some("gpt2-moe-tiny".into()),
        dtype: Some(DType::F32),
        steps: Some(9),
        batch: Some(2),
        seq: Some(32),
        eval_windows: Some(2),
        ..s
    };
    train(Request { settings: tiny(settings(DeviceChoice::Cpu, Some(&stayed))), resume: None, json: None }).unwrap();
    let first = Settings { stop_at: Some(3), ..tiny(settings(DeviceChoice::Cuda(0), Some(&moved))) };
    train(Request { settings: first, resume: None, json: None }).unwrap();
    assert!(!fs::read_to_string(moved.join("config.toml")).unwrap().contains("device"));
    for (device, stop_at) in [(DeviceChoice::Cpu, 6), (DeviceChoice::Cuda(0), 9)] {
        let settings = Settings { stop_at: Some(stop_at), ..settings(device, None) };
        train(Request { settings, resume: Some(moved.clone()), json: None }).unwrap();
    }
    let error = worst(&losses(&moved), &losses(&stayed));
    assert!(error < 1e-3, "off by {error:.1e}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_text_is_the_cpus() {
    let folder = tempfile::tempdir().unwrap();
    for preset in ["mixtral-tiny", "gpt2-moe-tiny"] {
        let out = folder.path().join(preset);
        run(&out, preset, DeviceChoice::Cuda(0), DType::BF16);
        let dir = checkpoint::find(&out).unwrap();
        let text = |place| {
            let lane = Lane::at(place).unwrap();
            let model = weights::load(&dir, &lane, DType::F32).unwrap();
            let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1, context: 64 };
            let mut tokens = Vec::new();
            generate(&lane, &model, &[b'f'.into(), b'n'.into()], 30, sampling, |t| {
                tokens.push(t);
                Ok(())
            })
            .unwrap();
            tokens
        };
        assert_eq!(text(Place::Cuda(0)), text(Place::Cpu), "{preset}");
    }
}
