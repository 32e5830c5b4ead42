//! The CUDA device: what holds on every machine, and, marked as ignored, what needs a GPU:
//! `cargo test --test it -- --ignored cuda`.

#![allow(clippy::unwrap_used, reason = "clippy takes helpers of tests for code that is shipped")]

mod bench;
mod layer;
mod support;
mod weighted;

mod bandwidth;
mod expert;
mod gate;
mod graph;
mod hopper;
mod math;
mod memory;
mod model;
mod nccl;
mod optim;
mod order;
mod ragged;
mod ranks;
mod replay;
mod routing_times;
mod sanitize;
mod shapes;
mod train;

use std::path::{Path, PathBuf};
use std::process::Command;

use fsmoe::device::cuda::{self, CudaError};
use support::gpu;

// ---------------------------------------------------------------------------------------------------------------------
// Without a GPU

#[test]
fn the_probe_is_whole_on_every_machine() {
    let probe = cuda::probe::probe();
    let labels: Vec<_> = probe.lines().into_iter().map(|(label, _)| label).collect();
    for label in ["CUDA driver", "GPU", "cuBLAS", "NCCL", "CUDA kernels", "usable GPU"] {
        assert!(labels.contains(&label), "no line for {label} in:\n{probe}");
    }
    let json = serde_json::to_value(&probe).unwrap();
    assert!(json["driver"].is_object() && json["usable"].is_object(), "{json}");
    if probe.usable.found().is_some() {
        assert!(probe.driver.found().is_some() && probe.kernels.found().is_some() && probe.cublas.found().is_some());
    }
}

/// Kind (1 is PTX, 2 machine code) and architecture of every image in a fat binary: containers end to end, each a
/// 16-byte header (magic, version, header's length, body's length) and images with headers of their own.
fn images(mut fat_binary: &[u8]) -> Vec<(u16, u32)> {
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let mut found = Vec::new();
    while !fat_binary.is_empty() {
        assert_eq!(u32_at(fat_binary, 0), 0xBA55_ED50, "not a fat binary container");
        let (container, rest) = fat_binary.split_at(usize::from(u16_at(fat_binary, 6)) + u64_at(fat_binary, 8));
        let mut body = &container[usize::from(u16_at(container, 6))..];
        while !body.is_empty() {
            found.push((u16_at(body, 0), u32_at(body, 28)));
            body = &body[u32_at(body, 4) as usize + u64_at(body, 8)..];
        }
        fat_binary = rest;
    }
    found
}

#[test]
fn the_fat_binary_has_code_for_sm_80_sm_90a_and_the_future() {
    let Ok(embedded) = cuda::kernels_embedded() else {
        assert!(cuda::fat_binary().is_empty());
        return;
    };
    assert_eq!(embedded.archs, ["sm_80", "sm_90a", "compute_80"]);
    let images = images(cuda::fat_binary());
    for image in [(1, 80), (2, 80), (2, 90)] {
        assert_eq!(images.iter().filter(|i| **i == image).count(), images.len() / 3, "{image:?} in {images:?}");
    }

    let Some(cuobjdump) = installed_cuobjdump() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernels.fatbin");
    std::fs::write(&file, cuda::fat_binary()).unwrap();
    let output = Command::new(cuobjdump).args(["--list-elf", "--list-ptx"]).arg(&file).output().unwrap();
    let listing = String::from_utf8_lossy(&output.stdout);
    for image in [".sm_80.cubin", ".sm_90a.cubin", ".sm_80.ptx"] {
        assert_eq!(listing.matches(image).count(), images.len() / 3, "{image} in:\n{listing}");
    }
}

/// The cuobjdump that `scripts/install-cuda.sh` installs, if it did.
pub(crate) fn installed_cuobjdump() -> Option<PathBuf> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/lib")).ok()?;
    entries.flatten().map(|e| e.path().join("site-packages/nvidia/cu13/bin/cuobjdump")).find(|path| path.is_file())
}

// ---------------------------------------------------------------------------------------------------------------------
// On a GPU

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_loads_every_kernel_and_passes_the_self_test() {
    let modules = gpu().modules().clone();
    modules.load_all().unwrap();
    cuda::selftest(&modules).unwrap();
    let error = modules.function("gelu_sideways_f32").unwrap_err();
    assert!(matches!(error, CudaError::Driver { .. }) && error.to_string().contains("'gelu_sideways_f32'"), "{error}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_probe_finds_the_gpu() {
    let probe = cuda::probe::probe();
    println!("{probe}");
    assert!(probe.driver.found().is_some(), "{probe}");
    assert!(probe.cublas.found().is_some(), "{probe}");
    let gpus = probe.gpus.found().unwrap();
    assert!(gpus[0].memory > 1 << 30 && gpus[0].multiprocessors > 0 && !gpus[0].name.is_empty(), "{probe}");
    assert_eq!(probe.usable.found().map(String::as_str), Some("cuda:0"), "{probe}");
}
