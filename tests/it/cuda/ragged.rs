//! Products of rows whose number differs from expert to expert, in every way that cuBLAS is called for them.

use fsmoe::device::cuda::{Cuda, RaggedProduct, RaggedWay};
use fsmoe::device::{GroupedKernels, MemoryKernels, Segments};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Tensor};

use super::bandwidth::seconds;
use super::support::{DTYPES, assert_close, bytes, down, gpu, tolerance, uniform, up};

fn offsets(counts: &[usize]) -> Vec<usize> {
    counts.iter().fold(vec![0], |mut all, n| {
        all.push(all[all.len() - 1] + n);
        all
    })
}

/// Against the CPU, the same bits twice, in every way; the gradients of the weights are added to.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_ragged_products_in_every_way() {
    use fsmoe::device::Lane;
    use fsmoe::device::cpu::Cpu;
    let many: Vec<usize> = (0..64).map(|e| e * 37 % 19).collect();
    for (counts, k, n) in [(vec![0, 5, 130, 1], 33, 17), (vec![3], 1, 1), (many, 40, 24), (vec![0, 0], 8, 8)] {
        let (offsets, e) = (offsets(&counts), counts.len());
        let rows = offsets[e];
        for dtype in DTYPES {
            let host = |seed, shape: &[usize]| {
                let values = uniform(seed, shape.iter().product(), -1.0, 1.0);
                Lane::cpu().cast(&Tensor::from_slice(&values, shape).unwrap(), dtype).unwrap()
            };
            let (x, dy, w) = (host(1, &[rows, k]), host(2, &[rows, n]), host(3, &[e, n, k]));
            let wide = |t: &Tensor| Lane::cpu().cast(t, DType::F64).unwrap();
            let (y, dx, dw) = (Tensor::host([rows, n], DType::F64), Tensor::host([rows, k], DType::F64), wide(&w));
            let segments = Segments::Host(&offsets);
            Cpu.grouped_linear(segments, &wide(&x), &wide(&w), &y).unwrap();
            Cpu.grouped_linear_data(segments, &[(&wide(&dy), &wide(&w))], &dx).unwrap();
            Cpu.grouped_linear_weight(segments, &[(&wide(&dy), &dw, 1.0)], &wide(&x)).unwrap();
            for way in RaggedWay::ALL {
                let run = || {
                    let (x, dy, w) = (up(&x), up(&dy), up(&w));
                    let (y, dx, dw) = (up(&host(4, &[rows, n])), up(&host(5, &[rows, k])), up(&host(3, &[e, n, k])));
                    [&y, &dx].into_iter().for_each(|t| gpu().fill(t, f64::NAN).unwrap());
                    let product = |which, tensors, beta| {
                        gpu().ragged_product(way, which, &offsets, tensors, beta).unwrap();
                    };
                    product(RaggedProduct::Linear, [&x, &w, &y], 0.0);
                    product(RaggedProduct::Data, [&dy, &w, &dx], 0.0);
                    product(RaggedProduct::Weight, [&dy, &x, &dw], 1.0);
                    [y, dx, dw].map(|t| down(&t))
                };
                let (got, again) = (run(), run());
                for (i, right) in [&y, &dx, &dw].into_iter().enumerate() {
                    let what = format!("{way:?} of {rows} rows of {e} experts, K {k}, N {n}, {dtype}: product {i}");
                    assert_eq!(bytes(&got[i]), bytes(&again[i]), "{what}: differs between two runs");
                    assert_close(&what, &got[i], right, tolerance(dtype));
                }
            }
        }
    }
}

fn random(lane: &Cuda, shape: &[usize], dtype: DType) -> Tensor {
    let t = lane.alloc(shape.into(), dtype).unwrap();
    lane.normal(Counter { seed: 1, purpose: Purpose::Test, step: 0 }, 0, &t).unwrap();
    t
}

/// Prints what every way takes, the host's part in it, for a layer's three products.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_times_of_ragged_products() {
    let lane = gpu().fork().unwrap();
    for (rows, e, k, n) in
        [(16384, 8, 1024, 4096), (16384, 64, 1024, 1024), (32768, 128, 2048, 768), (2048, 256, 512, 512)]
    {
        for skew in [false, true] {
            // Popularity 1/rank, or as many for all but a few rows.
            let share = |i: usize| if skew { 1.0 / (i + 1) as f64 } else { 1.0 };
            let all: f64 = (0..e).map(share).sum();
            let counts: Vec<usize> = (0..e).map(|i| (rows as f64 * share(i) / all) as usize + i % 3).collect();
            let offsets = offsets(&counts);
            for dtype in DTYPES {
                let (x, y, w) = (
                    random(&lane, &[offsets[e], k], dtype),
                    random(&lane, &[offsets[e], n], dtype),
                    random(&lane, &[e, n, k], dtype),
                );
                let times: Vec<String> = RaggedWay::ALL
                    .into_iter()
                    .map(|way| {
                        let us = seconds(&lane, &|| {
                            let product =
                                |which, tensors| lane.ragged_product(way, which, &offsets, tensors, 0.0).unwrap();
                            product(RaggedProduct::Linear, [&x, &w, &y]);
                            product(RaggedProduct::Data, [&y, &w, &x]);
                            product(RaggedProduct::Weight, [&y, &x, &w]);
                        });
                        assert!(us > 0.0);
                        format!("{way:?} {:9.1}", us * 1e6)
                    })
                    .collect();
                println!("R {rows}, E {e}, K {k}, N {n}, {dtype}, skewed {skew}: {} us", times.join(", "));
            }
        }
    }
}
