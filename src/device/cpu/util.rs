//! What the CPU kernels share: element access in the accumulation type, dispatch on dtype, parallel rows, checks.

pub(super) use crate::device::check::{distinct, expect, in_place, matrix};
use crate::error::{Result, shape_err};
#[cfg(test)]
use crate::tensor::DType;
use crate::tensor::{Element, Place, Tensor};

use half::{bf16, f16};
use num_traits::{Float as _, Zero as _};
use rayon::prelude::*;

/// Arithmetic is done in these: f32 and f64.
pub(super) trait Real: num_traits::Float + std::iter::Sum + std::ops::AddAssign + Num<Acc = Self> {
    /// A constant.
    fn of(v: f64) -> Self;
    /// As f64.
    fn f64(self) -> f64;
    /// The error function.
    fn erf(self) -> Self;
    /// e^self, fast enough for inner loops.
    fn fast_exp(self) -> Self;
    /// The logistic function 1 / (1 + e^−self).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).fast_exp())
    }
}

impl Real for f32 {
    fn of(v: f64) -> f32 {
        v as f32
    }
    fn f64(self) -> f64 {
        f64::from(self)
    }
    fn erf(self) -> f32 {
        libm::erff(self)
    }
    #[inline(always)]
    fn fast_exp(self) -> f32 {
        super::exp::exp(self)
    }
}

impl Real for f64 {
    fn of(v: f64) -> f64 {
        v
    }
    fn f64(self) -> f64 {
        self
    }
    fn erf(self) -> f64 {
        libm::erf(self)
    }
    fn fast_exp(self) -> f64 {
        self.exp()
    }
}

/// Elements of float tensors: read to the accumulation type, rounded once when stored.
pub(super) trait Num: Element {
    /// f64 for f64, else f32.
    type Acc: Real;
    /// The value to compute with.
    fn get(self) -> Self::Acc;
    /// The value to store.
    fn put(v: Self::Acc) -> Self;
}

macro_rules! num {
    ($t:ty, $acc:ty, $x:ident, $get:expr, $put:expr) => {
        impl Num for $t {
            type Acc = $acc;
            #[inline(always)]
            fn get(self) -> $acc {
                let $x = self;
                $get
            }
            #[inline(always)]
            fn put($x: $acc) -> Self {
                $put
            }
        }
    };
}
num!(f64, f64, x, x, x);
num!(f32, f32, x, x, x);
num!(bf16, f32, x, x.to_f32(), bf16::from_f32(x));
num!(f16, f32, x, x.to_f32(), f16::from_f32(x));

/// Runs `$body` with `$T` the Rust type of a float dtype; `$op` names the operation in the error for others.
macro_rules! float_type {
    ($op:literal, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::tensor::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $T = half::f16;
                $body
            }
            d @ $crate::tensor::DType::I32 => {
                $crate::error::shape_err!("{}: a tensor of {d} where floats are expected", $op)
            }
        }
    };
}
/// Runs `$body` with `$A` f32 or f64: for tensors whose contract says "acc".
macro_rules! acc_type {
    ($op:literal, $dtype:expr, $A:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F64 => {
                type $A = f64;
                $body
            }
            $crate::tensor::DType::F32 => {
                type $A = f32;
                $body
            }
            d => $crate::error::shape_err!("{}: a tensor of {d} where f32 or f64 is expected", $op),
        }
    };
}
pub(super) use {acc_type, float_type};

/// The elements of an input.
pub(super) fn input<T: Element>(t: &Tensor) -> Result<&[T]> {
    // SAFETY: a CPU lane runs one operation at a time and this one's outputs do not overlap its inputs.
    unsafe { t.as_slice() }
}

/// The elements of an output.
#[allow(clippy::mut_from_ref)] // A tensor is a handle; see Storage for who may touch its bytes when.
pub(super) fn output<T: Element>(t: &Tensor) -> Result<&mut [T]> {
    // SAFETY: as for `input`; operations that allow an output to be an input go through one slice only.
    unsafe { t.as_mut_slice() }
}

/// Fails unless the tensors lie in host memory: for operations that follow strides by address.
pub(super) fn on_host(op: &str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|t| t.place() != Place::Cpu) {
        None => Ok(()),
        Some(t) => shape_err!("{op}: {t:?}, expected on {}: copy it to the host first", Place::Cpu),
    }
}

/// Fails unless every entry lies in `range`.
pub(super) fn in_range(op: &str, what: &str, entries: &[i32], range: std::ops::Range<i64>) -> Result<()> {
    match entries.iter().position(|&i| !range.contains(&i64::from(i))) {
        None => Ok(()),
        Some(at) => shape_err!("{op}: {what}[{at}] is {}, outside {}..{}", entries[at], range.start, range.end),
    }
}

/// Elements below which a loop stays on one thread: starting rayon costs some microseconds.
const SERIAL: usize = 16 * 1024;

/// `f(r, row)` for every row of `width` elements of `out`, in parallel where that pays.
pub(super) fn for_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    if width == 0 {
        return;
    }
    if out.len() < SERIAL {
        out.chunks_mut(width).enumerate().for_each(|(r, row)| f(r, row));
    } else {
        let rows = (SERIAL / 4).div_ceil(width).max(1);
        out.par_chunks_mut(rows * width).enumerate().for_each(|(b, block)| {
            block.chunks_mut(width).enumerate().for_each(|(i, row)| f(b * rows + i, row));
        });
    }
}

/// Rows summed as one block: the unit of every reduction over rows, whatever the thread count.
pub(super) const BLOCK: usize = 64;

/// A sum over `n` items in fixed blocks of [`BLOCK`]: `block(range, partial)` adds a range's part to a zeroed partial of
/// `width`; the partials are added to `total` in ascending order.
pub(super) fn sum_blocks<A: Real>(
    n: usize,
    width: usize,
    total: &mut [A],
    block: impl Fn(std::ops::Range<usize>, &mut [A]) + Sync + Send,
) {
    let one = |b: usize| {
        let mut partial = vec![A::zero(); width];
        block(b * BLOCK..((b + 1) * BLOCK).min(n), &mut partial);
        partial
    };
    let blocks = n.div_ceil(BLOCK);
    let partials: Vec<Vec<A>> = if n * width < SERIAL {
        (0..blocks).map(one).collect()
    } else {
        (0..blocks).into_par_iter().map(one).collect()
    };
    for p in partials {
        for (t, v) in total.iter_mut().zip(p) {
            *t += v;
        }
    }
}

/// `f(r, a, b)` for every pair of rows of `wa` elements of `a` and `wb` of `b`, in parallel where that pays; `read`
/// elements of input go into each.
pub(super) fn for_rows2<A: Send, B: Send>(
    read: usize,
    a: &mut [A],
    wa: usize,
    b: &mut [B],
    wb: usize,
    f: impl Fn(usize, &mut [A], &mut [B]) + Sync + Send,
) {
    if wa == 0 || wb == 0 {
        return;
    }
    let rows = (SERIAL / 4).div_ceil(read.max(1));
    if a.len() / wa * read < SERIAL {
        a.chunks_mut(wa).zip(b.chunks_mut(wb)).enumerate().for_each(|(r, (a, b))| f(r, a, b));
    } else {
        a.par_chunks_mut(rows * wa).zip(b.par_chunks_mut(rows * wb)).enumerate().for_each(|(n, (a, b))| {
            a.chunks_mut(wa).zip(b.chunks_mut(wb)).enumerate().for_each(|(i, (a, b))| f(n * rows + i, a, b));
        });
    }
}

/// Sums side by side, so that they vectorise: a single chain of additions may not be reordered.
const LANES: usize = 16;

/// `Σ_i f([rows[0][i], rows[1][i], …])` for rows of one length; the order of additions depends on the length alone.
#[inline(always)]
pub(super) fn sum<T: Num, const K: usize>(rows: [&[T]; K], f: impl Fn([T::Acc; K]) -> T::Acc) -> T::Acc {
    let n = rows[0].len();
    let rows = rows.map(|r| &r[..n]);
    let mut lanes = [T::Acc::zero(); LANES];
    let whole = n - n % LANES;
    for at in (0..whole).step_by(LANES) {
        let part = rows.map(|r| &r[at..at + LANES]);
        for i in 0..LANES {
            lanes[i] += f(part.map(|p| p[i].get()));
        }
    }
    let mut total = T::Acc::zero();
    for lane in lanes {
        total += lane;
    }
    for i in whole..n {
        total += f(rows.map(|r| r[i].get()));
    }
    total
}

/// The largest value, −∞ of none; NaN is passed over.
#[inline(always)]
pub(super) fn max<T: Num>(row: &[T]) -> T::Acc {
    let larger = |a: T::Acc, b: T::Acc| if b > a { b } else { a };
    let mut lanes = [T::Acc::neg_infinity(); LANES];
    let (parts, rest) = row.as_chunks::<LANES>();
    for part in parts {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], part[i].get());
        }
    }
    let most = lanes.into_iter().fold(T::Acc::neg_infinity(), larger);
    rest.iter().fold(most, |m, v| larger(m, v.get()))
}

/// An output that tasks share, each writing elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared<A>(pub(super) *mut A);

// SAFETY: only an address; whoever writes through it answers for the elements being its own.
unsafe impl<A: Send> Send for Shared<A> {}
// SAFETY: as for Send.
unsafe impl<A: Send> Sync for Shared<A> {}

impl<A> Shared<A> {
    /// The address of an element.
    pub(super) fn at(self, index: usize) -> *mut A {
        self.0.wrapping_add(index)
    }
}

/// The float types, each with a bound for the error of a few roundings, relative to the largest value.
#[cfg(test)]
pub(super) const FLOATS: [(DType, f64); 4] =
    [(DType::F64, 1e-13), (DType::F32, 2e-6), (DType::BF16, 1.6e-2), (DType::F16, 2e-3)];

/// A tensor of [`random`] values for tests, rounded to `dtype`.
#[cfg(test)]
pub(super) fn random_tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    use crate::device::MemoryKernels;
    let wide = Tensor::from_slice(&random(seed, shape.iter().product()), shape).unwrap();
    let t = Tensor::host(shape, dtype);
    super::Cpu.copy(&wide, &t).unwrap();
    t
}

/// The elements as f64, for tests.
#[cfg(test)]
pub(super) fn wide(t: &Tensor) -> Vec<f64> {
    use crate::device::MemoryKernels;
    let out = Tensor::host(*t.shape(), DType::F64);
    super::Cpu.copy(t, &out).unwrap();
    out.to_vec().unwrap()
}

/// Panics unless `got` lies within `bound` of `want`, relative to the largest value wanted.
#[cfg(test)]
pub(super) fn close(got: &Tensor, want: &[f64], bound: f64) {
    let scale = want.iter().fold(1e-30_f64, |s, v| s.max(v.abs()));
    assert_eq!(got.elements(), want.len());
    for (i, (a, b)) in wide(got).iter().zip(want).enumerate() {
        // A NaN fails too.
        assert!((a - b).abs() <= bound * scale, "{got:?}[{i}] is {a}, expected {b}");
    }
}

/// Runs `f` on 1 and on 4 threads and compares the bits of what it returns.
#[cfg(test)]
pub(super) fn same_on_any_thread_count(f: impl Fn() -> Vec<f64> + Sync) {
    let run = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(&f);
    let bits = |v: Vec<f64>| v.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert!(bits(run(1)) == bits(run(4)), "another thread count, other bits");
}

/// `n` values in −1..1 for tests, the same for the same seed.
#[cfg(test)]
pub(super) fn random(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
