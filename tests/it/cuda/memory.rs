//! Copies, fills and random numbers.

use fsmoe::Result;
use fsmoe::device::MemoryKernels;
use fsmoe::device::cpu::Cpu;
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Layout, Tensor};

use super::support::{bytes, down, gpu, uniform, up};

const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

/// A host tensor of `n` values of `dtype`, none of them NaN.
fn values(seed: u64, n: usize, dtype: DType) -> Tensor {
    if dtype == DType::I32 {
        return Tensor::from_slice(&(0..n as i32).map(|i| i * 7919 - 5).collect::<Vec<_>>(), [n]).unwrap();
    }
    let out = Tensor::host([n], dtype);
    Cpu.copy(&Tensor::from_slice(&uniform(seed, n, -3.0, 3.0), [n]).unwrap(), &out).unwrap();
    out
}

/// `buffer` seen through a layout.
fn view(buffer: &Tensor, layout: Layout) -> Tensor {
    Tensor::new(buffer.storage().clone(), layout, buffer.dtype()).unwrap()
}

/// Copies between views of two buffers, on the CPU and on the GPU: all bytes of the destination must agree, those that
/// lie around and between its elements too.
fn check_copy(what: &str, src: Layout, dst: Layout, from: DType, to: DType) {
    let what = format!("{what}, {from} to {to}");
    let (source, target) = (values(1, src.end() + 3, from), values(2, dst.end() + 3, to));
    let (gpu_source, gpu_target) = (up(&source), up(&target));
    gpu().copy(&view(&gpu_source, src), &view(&gpu_target, dst)).unwrap_or_else(|e| panic!("{what}: {e}"));
    Cpu.copy(&view(&source, src), &view(&target, dst)).unwrap();
    let (got, right) = (bytes(&down(&gpu_target)), bytes(&target));
    let at = (0..right.len()).find(|&i| got[i] != right[i]);
    assert_eq!(at.map(|at| at / to.size()), None, "{what}: the first element of the buffer that differs");
}

fn plain(shape: &[usize]) -> Layout {
    Layout::contiguous(shape.into())
}

fn strided(shape: &[usize], strides: &[usize], offset: usize) -> Layout {
    Layout::strided(shape.into(), strides, offset).unwrap()
}

/// Name, source and destination.
fn layouts() -> Vec<(&'static str, Layout, Layout)> {
    let turned = |shape: &[usize], a: usize, b: usize| {
        let mut from = shape.to_vec();
        from.swap(a, b);
        plain(&from).transpose(a, b).unwrap()
    };
    let mut cases = vec![
        ("a scalar", plain(&[]), plain(&[])),
        ("nothing", plain(&[3, 0]), plain(&[3, 0])),
        ("one stretch", plain(&[3, 341]), plain(&[3, 341])),
        ("one stretch, off its boundary", strided(&[1023], &[1], 1), strided(&[1023], &[1], 2)),
        ("a long stretch", plain(&[1 << 19]), plain(&[1 << 19])),
        ("columns of a wider matrix", strided(&[37, 64], &[96, 1], 32), plain(&[37, 64])),
        ("columns, off their boundary", strided(&[37, 61], &[99, 1], 3), strided(&[37, 61], &[70, 1], 1)),
        ("blocks of three dimensions", strided(&[3, 5, 16], &[400, 32, 1], 16), strided(&[3, 5, 16], &[96, 16, 1], 0)),
        ("a row repeated", strided(&[9, 40], &[0, 1], 0), plain(&[9, 40])),
        ("a column repeated", strided(&[9, 40], &[1, 0], 0), plain(&[9, 40])),
        ("one element repeated", strided(&[9, 40], &[0, 0], 2), plain(&[9, 40])),
        ("every other element", strided(&[5, 33], &[70, 2], 0), strided(&[5, 33], &[99, 3], 1)),
        ("six dimensions", turned(&[2, 3, 2, 3, 4, 5], 1, 4), turned(&[2, 3, 2, 3, 4, 5], 0, 3)),
        ("heads", turned(&[2, 7, 3, 16], 1, 2), plain(&[2, 7, 3, 16])),
    ];
    for (rows, cols) in [(1, 7), (7, 1), (2, 3), (31, 33), (32, 32), (65, 97), (128, 200)] {
        cases.push(("a transposed source", turned(&[rows, cols], 0, 1), plain(&[rows, cols])));
        cases.push(("a transposed destination", plain(&[rows, cols]), turned(&[rows, cols], 0, 1)));
    }
    cases.push(("a batch transposed", turned(&[3, 40, 50], 1, 2), plain(&[3, 40, 50])));
    cases.push(("a batch turned over", turned(&[40, 3, 50], 0, 2), strided(&[40, 3, 50], &[160, 53, 1], 1)));
    cases
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_copies_between_any_layouts_and_types() {
    for (what, src, dst) in layouts() {
        for from in FLOATS {
            for to in FLOATS {
                check_copy(what, src, dst, from, to);
            }
        }
        check_copy(what, src, dst, DType::I32, DType::I32);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_conversions_round_as_the_host_does() {
    // Halves of the last place, subnormals and overflows of the 16-bit types.
    let edges =
        [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 2048.0, 65519.0, 65520.0, 1e-8, 3e-8, -6e-8, 1e30, -0.0];
    let wide = Tensor::from_slice(&edges, [edges.len()]).unwrap();
    for from in FLOATS {
        let source = Tensor::host([edges.len()], from);
        Cpu.copy(&wide, &source).unwrap();
        for to in FLOATS {
            let (target, right) = (up(&Tensor::host_zeros([edges.len()], to)), Tensor::host([edges.len()], to));
            gpu().copy(&up(&source), &target).unwrap();
            Cpu.copy(&source, &right).unwrap();
            assert_eq!(bytes(&down(&target)), bytes(&right), "{from} to {to}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_fills_what_a_view_names() {
    let layouts = [
        plain(&[]),
        plain(&[0]),
        plain(&[1023]),
        strided(&[1000], &[1], 1),
        strided(&[9, 30], &[41, 1], 5),
        strided(&[9, 30], &[1, 9], 0),
        strided(&[3, 4, 5], &[100, 20, 3], 1),
    ];
    for layout in layouts {
        for dtype in [FLOATS.as_slice(), &[DType::I32]].concat() {
            for value in [0.0, -3.0, 0.1] {
                let host = values(3, layout.end() + 3, dtype);
                let device = up(&host);
                gpu().fill(&view(&device, layout), value).unwrap();
                Cpu.fill(&view(&host, layout), value).unwrap();
                assert_eq!(bytes(&down(&device)), bytes(&host), "{value} into {layout:?} of {dtype}");
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_normals_are_those_of_the_host() {
    for (seed, step) in [(1, 0), (u64::MAX, 1 << 40)] {
        let rng = Counter { seed, purpose: Purpose::GateNoise, step };
        for (first, n) in [(0, 1), (1, 1), (0, 2), (1, 2), (4001, 999), (0, 100_000), ((1 << 33) + 1, 1000), (0, 0)] {
            for (dtype, bound) in [(DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)] {
                let (out, right) = (up(&Tensor::host([n], dtype)), Tensor::host([n], DType::F64));
                gpu().normal(rng, first, &out).unwrap();
                Cpu.normal(rng, first, &right).unwrap();
                super::support::assert_close(&format!("normal {first}+{n} in {dtype}"), &down(&out), &right, bound);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_refuses_copies_and_fills_that_break_a_rule() {
    let gpu = gpu();
    let t = up(&Tensor::host_zeros([4, 3], DType::F32));
    let fails = |result: Result<()>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    fails(gpu.copy(&t, &up(&Tensor::host([3, 4], DType::F32))), "from shape (4, 3) to (3, 4)");
    fails(gpu.copy(&t, &t), "share memory");
    fails(gpu.copy(&t, &up(&Tensor::host([4, 3], DType::I32))), "between i32 and f32");
    fails(gpu.copy(&t, &Tensor::host([4, 3], DType::F32)), "is not on cuda:0");
    fails(gpu.fill(&view(&t, strided(&[2, 3], &[1, 1], 0)), 0.0), "overlap");
    fails(gpu.normal(Counter { seed: 1, purpose: Purpose::Test, step: 0 }, 0, &t.t().unwrap()), "contiguous");
}
