//! The products of rows whose number differs from expert to expert and is known to the host, through cuBLAS.

use super::{Cuda, gemm};
use crate::device::{MathKernels, OrderKernels, Segments, compose};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// One of the three products of a linear layer per expert. Rows are (R, K) and (R, N), weights w: (E, N, K).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RaggedProduct {
    /// y (R, N) from x (R, K) and w.
    Linear,
    /// dx (R, K) from dy (R, N) and w.
    Data,
    /// dw (E, N, K) from dy (R, N) and x (R, K).
    Weight,
}

/// How cuBLAS is called for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RaggedWay {
    /// A call per expert, one after another.
    Calls,
    /// A call per expert, over four streams.
    Streams,
    /// One call of all experts' different sizes (cublasGemmGroupedBatchedEx).
    Grouped,
    /// Rows moved to where every expert has as many as the largest, one strided-batched call, and rows moved back.
    Padded,
}

impl RaggedWay {
    /// All.
    pub const ALL: [RaggedWay; 4] = [Self::Calls, Self::Streams, Self::Grouped, Self::Padded];
}

/// Streams of [`RaggedWay::Streams`], the lane's own among them.
const STREAMS: usize = 4;

impl Cuda {
    /// `c = a·b + beta·c` for every expert's rows, which are `offsets[e]..offsets[e + 1]`, in the way that is asked for.
    /// a, b and c are x, w, y of a [`RaggedProduct::Linear`], dy, w, dx of the data's, and dy, x, dw of the weights'.
    ///
    /// # Errors
    /// If a shape or a dtype does not fit, or the device fails.
    pub fn ragged_product(
        &self,
        way: RaggedWay,
        product: RaggedProduct,
        offsets: &[usize],
        [a, b, c]: [&Tensor; 3],
        beta: f64,
    ) -> Result<()> {
        let (x, y, w) = match product {
            RaggedProduct::Linear => (a, c, b),
            RaggedProduct::Data => (c, a, b),
            RaggedProduct::Weight => (b, a, c),
        };
        compose::check("ragged_product", Segments::Host(offsets), &[x, y], w)?;
        if way == RaggedWay::Padded {
            return self.padded_product(product, offsets, [a, b, c], beta);
        }
        let mut items = Vec::new();
        for (e, ends) in offsets.windows(2).enumerate() {
            let rows = |t: &Tensor| t.narrow(0, ends[0], ends[1] - ends[0]);
            let item = match product {
                RaggedProduct::Linear => [rows(a)?, b.index(e)?.t()?, rows(c)?],
                RaggedProduct::Data => [rows(a)?, b.index(e)?, rows(c)?],
                RaggedProduct::Weight => [rows(a)?.t()?, rows(b)?, c.index(e)?],
            };
            if item[2].elements() > 0 {
                items.push(item);
            }
        }
        match way {
            RaggedWay::Streams => self.over_streams(&items, beta),
            RaggedWay::Grouped => gemm::grouped(self, &items, beta),
            RaggedWay::Calls | RaggedWay::Padded => {
                items.iter().try_for_each(|[a, b, c]| self.gemm(1.0, a, b, beta, c))
            }
        }
    }

    fn over_streams(&self, items: &[[Tensor; 3]], beta: f64) -> Result<()> {
        let sides = self.sides(STREAMS - 1)?;
        let fork = self.mark(false)?;
        sides.iter().try_for_each(|side| side.wait(&fork))?;
        let issued = items.iter().enumerate().try_for_each(|(n, [a, b, c])| {
            // The lane's own stream has the first.
            let lane = if n % STREAMS == 0 { self } else { &sides[n % STREAMS - 1] };
            lane.gemm(1.0, a, b, beta, c)
        });
        // Also after a failure: what was issued must have run before the tensors go.
        sides.iter().try_for_each(|side| self.wait(&side.mark(false)?))?;
        issued
    }

    fn padded_product(
        &self,
        product: RaggedProduct,
        offsets: &[usize],
        [a, b, c]: [&Tensor; 3],
        beta: f64,
    ) -> Result<()> {
        let experts = offsets.len() - 1;
        let most = offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let (mut there, mut back) = (vec![-1; experts * most], Vec::new());
        for (e, ends) in offsets.windows(2).enumerate() {
            for row in ends[0]..ends[1] {
                there[e * most + row - ends[0]] = row as i32;
                back.push((e * most + row - ends[0]) as i32);
            }
        }
        let index = |numbers: &[i32]| -> Result<Tensor> {
            let t = self.allocate([numbers.len()].into(), DType::I32)?;
            self.copy_from_host(&Tensor::from_slice(numbers, [numbers.len()])?, &t)?;
            Ok(t)
        };
        let there = index(&there)?;
        let padded = |t: &Tensor| -> Result<Tensor> {
            let out = self.allocate([experts * most, t.dim(1)].into(), t.dtype())?;
            self.gather_rows(t, &there, &out)?;
            out.reshape([experts, most, t.dim(1)])
        };
        if product == RaggedProduct::Weight {
            return self.gemm(1.0, &padded(a)?.t()?, &padded(b)?, beta, c);
        }
        let out = if beta == 0.0 { self.allocate([experts, most, c.dim(1)].into(), c.dtype())? } else { padded(c)? };
        let w = if product == RaggedProduct::Linear { b.t()? } else { b.clone() };
        self.gemm(1.0, &padded(a)?, &w, beta, &out)?;
        self.gather_rows(&out.reshape([experts * most, c.dim(1)])?, &index(&back)?, c)
    }
}

/// Rows per expert from which a call of its own keeps the GPU busy longer than it keeps the host.
const ROWS_OF_A_CALL: usize = 1024;
/// What an expert more costs in one call of different sizes, in seconds, and the FLOP/s of padding.
const GROUPED_EXPERT: f64 = 2.5e-6;
const PADDING_16_BIT: f64 = 4e14;
const PADDING_F32: f64 = 4e13;

/// The fastest way for experts with these rows, of the three products together (`cuda_times_of_ragged_products`, an H200,
/// microseconds; skewed: popularity 1/rank; buckets of loads were not tried):
///
/// | rows, E, K, N | | calls | streams | grouped | padded |
/// |---|---|---|---|---|---|
/// | 16,384, 8, 1,024, 4,096 | bf16 | 628 | 605 | 1,071 | 879 |
/// | the same, skewed | bf16 | 629 | 590 | 1,071 | 1,934 |
/// | the same, skewed | f32 | 8,737 | 8,418 | 9,189 | 24,879 |
/// | 16,384, 64, 1,024, 1,024 | bf16 | 1,670 | 1,678 | 704 | 410 |
/// | the same, skewed | bf16 | 1,720 | 2,042 | 761 | 2,408 |
/// | 32,768, 128, 2,048, 768 | f32 | 12,031 | 8,607 | 8,925 | 8,408 |
/// | the same, skewed | f32 | 11,299 | 8,329 | 8,777 | 148,040 |
/// | 2,048, 256, 512, 512, skewed | bf16 | 6,531 | 6,740 | 2,371 | 483 |
/// | the same | f32 | 8,380 | 8,837 | 1,031 | 3,340 |
///
/// Few large experts go over streams. Otherwise rows are padded where the padding's FLOPs take less than the experts cost
/// in a grouped call. Of the 24 measured combinations it takes the fastest in all but two, which are within 6 %.
fn way(offsets: &[usize], k: usize, n: usize, dtype: DType) -> RaggedWay {
    let experts = offsets.len().saturating_sub(1);
    let rows = offsets.last().copied().unwrap_or(0);
    if rows >= ROWS_OF_A_CALL * experts {
        return RaggedWay::Streams;
    }
    let most = offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let padding = 2.0 * (experts * most - rows) as f64 * (k * n) as f64;
    let rate = if dtype == DType::F32 { PADDING_F32 } else { PADDING_16_BIT };
    if padding / rate < experts as f64 * GROUPED_EXPERT { RaggedWay::Padded } else { RaggedWay::Grouped }
}

/// [`way`] for weights (E, N, K).
fn of(offsets: &[usize], w: &Tensor) -> RaggedWay {
    way(offsets, w.dim(2), w.dim(1), w.dtype())
}

/// The grouped products of rows that the host knows.
impl Cuda {
    pub(super) fn ragged_linear(&self, offsets: &[usize], x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
        self.ragged_product(of(offsets, w), RaggedProduct::Linear, offsets, [x, w, y], 0.0)
    }

    pub(super) fn ragged_data(&self, offsets: &[usize], pairs: &[(&Tensor, &Tensor)], dx: &Tensor) -> Result<()> {
        pairs.iter().enumerate().try_for_each(|(n, (dy, w))| {
            let beta = if n == 0 { 0.0 } else { 1.0 };
            self.ragged_product(of(offsets, w), RaggedProduct::Data, offsets, [dy, w, dx], beta)
        })
    }

    pub(super) fn ragged_weight(&self, offsets: &[usize], pairs: &[(&Tensor, &Tensor, f64)], x: &Tensor) -> Result<()> {
        pairs.iter().try_for_each(|(dy, dw, beta)| {
            self.ragged_product(of(offsets, dw), RaggedProduct::Weight, offsets, [dy, x, dw], *beta)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of `e` experts, as many for each or popular as 1/rank.
    fn offsets(rows: usize, e: usize, skewed: bool) -> Vec<usize> {
        let share = |i: usize| if skewed { 1.0 / (i + 1) as f64 } else { 1.0 };
        let all: f64 = (0..e).map(share).sum();
        (0..e).fold(vec![0], |mut ends, i| {
            ends.push(ends[i] + (rows as f64 * share(i) / all) as usize);
            ends
        })
    }

    #[test]
    fn the_way_is_the_measured_one() {
        use DType::{BF16, F32};
        use RaggedWay::{Grouped, Padded, Streams};
        for (rows, e, k, n, skewed, dtype, fastest) in [
            (16_384, 8, 1024, 4096, false, BF16, Streams),
            (16_384, 8, 1024, 4096, true, F32, Streams),
            (16_384, 64, 1024, 1024, false, BF16, Padded),
            (16_384, 64, 1024, 1024, true, BF16, Grouped),
            (32_768, 128, 2048, 768, false, F32, Padded),
            (32_768, 128, 2048, 768, true, BF16, Grouped),
            (2048, 256, 512, 512, true, BF16, Padded),
            (2048, 256, 512, 512, true, F32, Grouped),
        ] {
            let what = format!("{rows} rows, E {e}, skewed {skewed}, {dtype}");
            assert_eq!(way(&offsets(rows, e, skewed), k, n, dtype), fastest, "{what}");
        }
        // Neither experts nor rows.
        way(&[0], 8, 8, F32);
        way(&[0, 0, 0], 8, 8, BF16);
    }
}
