//! Batched matrix products over any strides, through the `gemm` crate.

use super::Cpu;
use super::util::{acc_type, on_host};
use crate::device::{MathKernels, MemoryKernels, check};
use crate::error::Result;
use crate::tensor::Tensor;
use gemm::Parallelism;
use rayon::prelude::*;

/// The sizes of one product: (m, k)·(k, n).
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
}

/// A matrix in memory: the address of its first element, and its strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Matrix<P> {
    pub(super) at: P,
    pub(super) row: usize,
    pub(super) col: usize,
}

/// `c = alpha·a·b + beta·c`.
///
/// # Safety
/// The matrices must be valid for their sizes and strides, and `c` must overlap neither `a` nor `b`.
pub(super) unsafe fn product<T: 'static + num_traits::Float>(
    sizes: Sizes,
    alpha: T,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    beta: T,
    c: Matrix<*mut T>,
    parallelism: Parallelism,
) {
    let Sizes { m, k, n } = sizes;
    // The crate's `alpha` is the factor of the destination, its `beta` that of the product.
    // SAFETY: the caller's contract is the crate's.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.at,
            c.col as isize,
            c.row as isize,
            beta != T::zero(),
            a.at,
            a.col as isize,
            a.row as isize,
            b.at,
            b.col as isize,
            b.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// A batch of matrices: where each begins.
struct Batch {
    first: usize,
    row: usize,
    col: usize,
    /// (size, stride) of the leading dimensions, outermost first; those of c, or none.
    lead: Vec<(usize, usize)>,
}

impl Batch {
    fn new(t: &Tensor) -> Self {
        let (rank, strides) = (t.rank(), t.layout().strides());
        let lead = t.shape().iter().copied().zip(strides.iter().copied()).take(rank - 2).collect();
        Batch { first: t.ptr() as usize, row: strides[rank - 2], col: strides[rank - 1], lead }
    }

    fn matrix<T>(&self, mut index: usize) -> Matrix<*mut T> {
        let mut offset = 0;
        for &(size, stride) in self.lead.iter().rev() {
            offset += index % size * stride;
            index /= size;
        }
        Matrix { at: (self.first as *mut T).wrapping_add(offset), row: self.row, col: self.col }
    }

    fn input<T>(&self, index: usize) -> Matrix<*const T> {
        let Matrix { at, row, col } = self.matrix::<T>(index);
        Matrix { at: at.cast_const(), row, col }
    }
}

/// [`MathKernels::gemm`].
pub(super) fn gemm(alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> {
    on_host("gemm", &[a, b, c])?;
    let [m, k, n] = check::gemm(a, b, c)?;
    let sizes = Sizes { m, k, n };
    let acc = a.dtype().accumulate();
    if a.dtype() == acc {
        acc_type!("gemm", acc, T => run::<T>(sizes, alpha as T, a, b, beta as T, c));
        return Ok(());
    }
    // 16-bit operands: widen, multiply in f32, round once.
    let (a, b) = (widened(a)?, widened(b)?);
    let wide = if c.dtype() == acc { c.clone() } else { Tensor::host(*c.shape(), acc) };
    if c.dtype() != acc && beta != 0.0 {
        Cpu.copy(c, &wide)?;
    }
    Cpu.gemm(alpha, &a, &b, beta, &wide)?;
    if c.dtype() == acc { Ok(()) } else { Cpu.copy(&wide, c) }
}

fn widened(t: &Tensor) -> Result<Tensor> {
    let wide = Tensor::host(*t.shape(), t.dtype().accumulate());
    Cpu.copy(t, &wide)?;
    Ok(wide)
}

fn run<T: 'static + num_traits::Float + Send + Sync>(
    sizes: Sizes,
    alpha: T,
    a: &Tensor,
    b: &Tensor,
    beta: T,
    c: &Tensor,
) {
    if c.elements() == 0 {
        return;
    }
    let batches = c.elements() / (sizes.m * sizes.n);
    let (a, b, c) = (Batch::new(a), Batch::new(b), Batch::new(c));
    let one = |i: usize, parallelism: Parallelism| {
        // SAFETY: tensors lie inside their storage; c overlaps neither operand and its elements are distinct, so
        // that batches do not overlap (both checked).
        unsafe { product(sizes, alpha, a.input::<T>(i), b.input::<T>(i), beta, c.matrix::<T>(i), parallelism) }
    };
    // Many matrices: one thread each, tiny ones several to a thread; few: all threads on each. The choice depends on
    // shapes alone.
    const SMALL: usize = 64 * 64 * 64;
    let work = (sizes.m * sizes.n * sizes.k).max(1);
    if batches >= 4 {
        (0..batches).into_par_iter().with_min_len(SMALL.div_ceil(work)).for_each(|i| one(i, Parallelism::None));
    } else {
        (0..batches).for_each(|i| one(i, if work < SMALL { Parallelism::None } else { Parallelism::Rayon(0) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::util::{close, same_on_any_thread_count, wide};
    use crate::rng::{Counter, Purpose};
    use crate::tensor::{DType, Layout};

    fn random(shape: &[usize], dtype: DType, step: u64) -> Tensor {
        let t = Tensor::host(shape, dtype);
        Cpu.normal(Counter { seed: 5, purpose: Purpose::Test, step }, 0, &t).unwrap();
        t
    }

    fn naive(a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                c[i * n + j] = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
            }
        }
        c
    }

    #[test]
    fn every_type_and_every_transposition() {
        let (m, k, n) = (13, 37, 9);
        for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)] {
            let a = random(&[m, k], dtype, 1);
            let b = random(&[k, n], dtype, 2);
            let want = naive(&wide(&a), &wide(&b), (m, k, n));
            let flip = |t: &Tensor| {
                let out = Tensor::host([t.dim(1), t.dim(0)], dtype);
                Cpu.copy(&t.t().unwrap(), &out).unwrap();
                out.t().unwrap()
            };
            for a in [a.clone(), flip(&a)] {
                for b in [b.clone(), flip(&b)] {
                    for c_type in [dtype, dtype.accumulate()] {
                        let c = Tensor::host([m, n], c_type);
                        Cpu.fill(&c, f64::NAN).unwrap();
                        Cpu.gemm(1.0, &a, &b, 0.0, &c).unwrap();
                        close(&c, &want, bound);
                    }
                }
            }
            let c = random(&[m, n], dtype, 3);
            let before = wide(&c);
            Cpu.gemm(-0.5, &a, &b, 2.0, &c).unwrap();
            let want: Vec<f64> = want.iter().zip(before).map(|(p, c)| 2.0 * c - 0.5 * p).collect();
            close(&c, &want, bound);
        }
    }

    #[test]
    fn batches_and_a_shared_operand() {
        for batches in [2, 6] {
            let (a, b) = (random(&[batches, 5, 7], DType::F64, 1), random(&[7, 3], DType::F64, 2));
            let c = Tensor::host([batches, 3, 5], DType::F64);
            Cpu.gemm(1.0, &a, &b, 0.0, &c.t().unwrap()).unwrap();
            for i in 0..batches {
                let want = naive(&wide(&a.index(i).unwrap()), &wide(&b), (5, 7, 3));
                close(&c.index(i).unwrap().t().unwrap(), &want, 1e-14);
            }
        }
    }

    #[test]
    fn an_empty_sum_is_zero_and_wrong_shapes_are_refused() {
        let c = Tensor::host([2, 3], DType::F32);
        Cpu.fill(&c, 5.0).unwrap();
        Cpu.gemm(1.0, &Tensor::host([2, 0], DType::F32), &Tensor::host([0, 3], DType::F32), 0.0, &c).unwrap();
        assert_eq!(c.to_vec::<f32>().unwrap(), [0.0; 6]);
        let e =
            Cpu.gemm(1.0, &Tensor::host([2, 4], DType::F32), &Tensor::host([5, 3], DType::F32), 0.0, &c).unwrap_err();
        assert!(e.to_string().contains("(2, 4)") && e.to_string().contains("(5, 3)"), "{e}");
    }

    #[test]
    fn with_no_inner_dimension_beta_still_scales() {
        let c = Tensor::from_slice(&[1.0_f32, 2.0], [1, 2]).unwrap();
        Cpu.gemm(1.0, &Tensor::host([1, 0], DType::F32), &Tensor::host([0, 2], DType::F32), 3.0, &c).unwrap();
        assert_eq!(c.to_vec::<f32>().unwrap(), [3.0, 6.0]);
        let none = Tensor::host([0, 2], DType::F32);
        Cpu.gemm(1.0, &Tensor::host([0, 4], DType::F32), &Tensor::host([4, 2], DType::F32), 0.0, &none).unwrap();
    }

    #[test]
    fn an_operand_of_stride_0_is_used_for_every_batch() {
        let (a, b) = (random(&[5, 3, 4], DType::F32, 1), random(&[4, 2], DType::F32, 2));
        let (one, all) = (Tensor::host([5, 3, 2], DType::F32), Tensor::host([5, 3, 2], DType::F32));
        let layout = Layout::strided([5, 4, 2].into(), &[0, 2, 1], 0).unwrap();
        let repeated = Tensor::new(b.storage().clone(), layout, DType::F32).unwrap();
        Cpu.gemm(1.0, &a, &b, 0.0, &one).unwrap();
        Cpu.gemm(1.0, &a, &repeated, 0.0, &all).unwrap();
        assert_eq!(wide(&one), wide(&all));
        let layout = Layout::strided([5, 3, 2].into(), &[0, 2, 1], 0).unwrap();
        let onto_one = Tensor::new(one.storage().clone(), layout, DType::F32).unwrap();
        let e = Cpu.gemm(1.0, &a, &b, 0.0, &onto_one).unwrap_err();
        assert!(e.to_string().contains("overlap"), "batches would be written onto each other: {e}");
    }

    #[test]
    fn the_thread_count_changes_no_bit() {
        for (m, k, n) in [(190, 333, 250), (1, 4000, 300), (700, 65, 3), (33, 2500, 40)] {
            let (a, b) = (random(&[m, k], DType::F32, 1), random(&[n, k], DType::F32, 2));
            same_on_any_thread_count(|| {
                let c = Tensor::host([m, n], DType::F32);
                Cpu.gemm(1.0, &a, &b.t().unwrap(), 0.0, &c).unwrap();
                wide(&c)
            });
        }
        let (a, b) = (random(&[9, 50, 60], DType::F32, 1), random(&[9, 60, 70], DType::F32, 2));
        same_on_any_thread_count(|| {
            let c = Tensor::host([9, 50, 70], DType::F32);
            Cpu.gemm(1.0, &a, &b, 0.0, &c).unwrap();
            wide(&c)
        });
    }
}
