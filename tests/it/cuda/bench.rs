//! `fsmoe bench` on a GPU: every operation, graphs beside eager runs, and somebody's kernels in the place of ours.

use std::path::{Path, PathBuf};

use fsmoe::bench::kernels::{KernelRow, Overrides, cases, named};
use fsmoe::bench::layer::{LayerRow, LayerSettings};
use fsmoe::bench::{Bench, Ceiling, Image, Load, against, kernels, layer};
use fsmoe::moe::Capacity;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::tensor::{DType, Place};
use fsmoe::{Error, Result};

fn gpu() -> Bench {
    let mut bench = Bench::open(Place::Cuda(0)).unwrap();
    bench.set_budget(std::time::Duration::ZERO);
    bench
}

/// Rates of about an H200's: measuring them takes gigabytes.
fn ceiling() -> Ceiling {
    Ceiling {
        bench: "ceiling".into(),
        device: "GPU".into(),
        dtype: DType::BF16,
        copy_bytes_per_s: 4e12,
        gemm_flops_per_s: 7e14,
    }
}

/// Every operation gives on the GPU what it gives on the CPU, on the shapes that somebody's kernels are checked on.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_every_case_agrees_with_the_cpu() {
    let bench = gpu();
    let mut failures = Vec::new();
    for case in cases() {
        for dtype in [DType::F32, DType::BF16] {
            if let Err(error) = against::check(case, &**bench.lane(), dtype) {
                failures.push(error.to_string());
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_operations_are_timed_eagerly_and_as_graphs() {
    let mut bench = gpu();
    let mut rows: Vec<KernelRow> = Vec::new();
    for name in ["swiglu", "choose_experts", "dispatch_rows", "gemm"] {
        let mut keep = |row| {
            rows.push(row);
            Ok(())
        };
        let small: Overrides = if name == "gemm" { "R=512,M=256,H=256" } else { "" }.parse().unwrap();
        kernels::run(&mut bench, &named(Some(name)).unwrap()[..1], DType::BF16, &small, &ceiling(), &mut keep).unwrap();
    }
    assert_eq!(rows.iter().filter(|row| row.mode == "graph" && row.figures.is_some()).count(), 4, "{rows:#?}");
    for row in &rows {
        let time = row.figures.as_ref().unwrap().time;
        assert!(time.median_ms > 0.001 && time.median_ms < 50.0, "{row:?}");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_are_timed_with_their_memory() {
    let mut bench = gpu();
    for (order, capacity, load) in
        [(OrderKind::Tutel, Capacity::Factor(1.0), Load::Uniform), (OrderKind::Ragged, Capacity::Dropless, Load::Zipf)]
    {
        let settings = LayerSettings {
            shapes: vec!["2048,256,512,8,2,mixtral".parse().unwrap()],
            gate: GateKind::TopK,
            order,
            capacity,
            dtype: DType::BF16,
            load,
        };
        let mut rows: Vec<LayerRow> = Vec::new();
        let mut keep = |row| {
            rows.push(row);
            Ok(())
        };
        layer::run(&mut bench, &settings, &ceiling(), &mut keep).unwrap();
        for row in rows.iter().filter(|row| row.mode == "eager") {
            let figures = row.figures.as_ref().unwrap();
            // Weights and their gradients at least: 3·E·M·H twice, in two bytes.
            assert!(figures.peak_bytes.unwrap() > 12 * 8 * 256 * 512, "{row:?}");
        }
        assert_eq!(rows.iter().filter(|row| row.mode == "eager").count(), 2);
        if capacity != Capacity::Dropless {
            assert_eq!(rows.iter().filter(|row| row.mode == "graph" && row.figures.is_some()).count(), 2, "{rows:#?}");
        }
    }
}

/// A file of this repository; tests run in its root, or the file's text is written out where they do not.
fn source(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn against(bench: &mut Bench, path: &Path, name: &str) -> (Result<()>, Vec<KernelRow>) {
    against_shape(bench, path, name, "R=256,H=1024")
}

fn against_shape(bench: &mut Bench, path: &Path, name: &str, shape: &str) -> (Result<()>, Vec<KernelRow>) {
    let mut rows = Vec::new();
    let mut keep = |row| {
        rows.push(row);
        Ok(())
    };
    let image = Image::of(path, bench.architecture()).unwrap();
    let theirs = bench.with_kernels(&image).unwrap();
    let (cases, sizes) = (named(Some(name)).unwrap(), shape.parse().unwrap());
    let done = against::run(bench, &theirs, &cases, DType::BF16, &sizes, &ceiling(), &mut keep);
    (done, rows)
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_somebodys_kernels_are_checked_and_timed() {
    let mut bench = gpu();
    let (_folder, good) = source("swiglu.cu", include_str!("../../../examples/kernels/swiglu.cu"));
    for (name, entry) in [("swiglu", "swiglu_forward_bf16"), ("swiglu_backward", "swiglu_backward_bf16")] {
        let (done, rows) = against(&mut bench, &good, name);
        done.unwrap();
        let theirs: Vec<_> = rows.iter().filter(|row| row.implementation == "swiglu.cu").collect();
        assert_eq!(theirs.len(), 2, "{rows:#?}");
        assert_eq!(theirs[0].replaces.as_deref(), Some(&[entry.to_owned()][..]));
        assert_eq!(theirs[0].compared.as_ref().unwrap().last().unwrap(), "R=256,H=1024", "the timed shape too");
        assert!(rows.iter().any(|row| row.implementation == "fsmoe" && row.figures.is_some()));
    }
    // It has no GELU.
    let (done, _) = against(&mut bench, &good, "gelu");
    let message = done.unwrap_err().to_string();
    assert!(message.contains("none of the entry points") && message.contains("gelu_forward_bf16"), "{message}");

    let (_folder, wrong) = source("wrong.cu", include_str!("../../kernels/wrong_swiglu.cu"));
    for name in ["swiglu", "swiglu_backward"] {
        let (done, rows) = against(&mut bench, &wrong, name);
        let error = done.unwrap_err();
        assert!(matches!(error, Error::Numeric(_)), "{error}");
        assert!(error.to_string().contains("element"), "{error}");
        assert!(rows.iter().all(|row| row.figures.is_none()), "what is wrong is not timed: {rows:#?}");
    }
    // Right on all small shapes; on the timed one a pass of the grid does not reach the end.
    let (_folder, lacking) = source("single_pass.cu", include_str!("../../kernels/single_pass_swiglu.cu"));
    for name in ["swiglu", "swiglu_backward"] {
        let (done, rows) = against_shape(&mut bench, &lacking, name, "R=2048,H=1792");
        let error = done.unwrap_err().to_string();
        assert!(error.contains("R=2048,H=1792") && error.contains("element"), "{error}");
        assert!(rows.iter().all(|row| row.figures.is_none()), "what is wrong is not timed: {rows:#?}");
    }
    // The lane's own kernels are as they were.
    against::check(named(Some("swiglu")).unwrap()[0], &**bench.lane(), DType::BF16).unwrap();
}
