//! The optimizer: AdamW and the gradients' sum of squares over many tensors in few launches.
//!
//! A launch's tensors are named in a table among the kernel's parameters, which have 4 KiB: nothing is prepared, copied or
//! kept alive.

use super::args::Args;
use super::backend::{Cuda, THREADS};
use crate::device::check::{self, expect, same};
use crate::device::{AdamW, AdamWItem, OptimKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Elements of one tensor that a block takes (`block_elements` in `kernels/optim/`).
const BLOCK: usize = 16_384;
/// Tensors of a launch (`most_tensors` in `adamw.cu` and `sum_squares.cu`).
const ADAMW_TENSORS: usize = 64;
const SQUARES_TENSORS: usize = 128;

impl OptimKernels for Cuda {
    fn adamw(
        &self,
        settings: AdamW,
        grad_scale: &Tensor,
        weight: &Tensor,
        m: &Tensor,
        v: &Tensor,
        grad: &Tensor,
    ) -> Result<()> {
        let scalars = self.allocate([AdamW::SCALARS].into(), DType::F32)?;
        self.adamw_scalars(settings, &scalars)?;
        let item = AdamWItem { weight_decay: settings.weight_decay, weight, m, v, grad, copy: None };
        self.adamw_many(settings, &scalars, grad_scale, &[item])
    }

    fn clip_scale(&self, sum: &Tensor, pre_scale: f64, max_norm: f64, norm: &Tensor, scale: &Tensor) -> Result<()> {
        expect("clip_scale", "the sum", sum, &[1], DType::F32)?;
        same("clip_scale", sum, &[norm, scale])?;
        self.row_major("clip_scale", &[sum, norm, scale])?;
        let args = Args::new().tensor(sum).float(pre_scale).float(max_norm).tensor(norm).tensor(scale);
        // SAFETY: the kernel's parameters; each holds one element.
        unsafe { self.launch("clip_scale_f32", 1, 1, 0, args, String::new) }
    }

    fn adamw_scalars(&self, settings: AdamW, scalars: &Tensor) -> Result<()> {
        expect("adamw_scalars", "scalars", scalars, &[AdamW::SCALARS], DType::F32)?;
        self.row_major("adamw_scalars", &[scalars])?;
        let args = settings.scalars().iter().fold(Args::new().tensor(scalars), |args, v| args.float(*v));
        // SAFETY: the kernel's parameters; scalars holds eight elements.
        unsafe { self.launch("adamw_scalars_f32", 1, 1, 0, args, String::new) }
    }

    fn adamw_many(
        &self,
        settings: AdamW,
        scalars: &Tensor,
        grad_scale: &Tensor,
        items: &[AdamWItem<'_>],
    ) -> Result<()> {
        expect("adamw", "scalars", scalars, &[AdamW::SCALARS], DType::F32)?;
        self.row_major("adamw", &[scalars, grad_scale])?;
        for item in items {
            expect("adamw", "the weight", item.weight, item.weight.shape(), DType::F32)?;
            check::adamw(settings, grad_scale, item.weight, item.m, item.v, item.grad)?;
            self.row_major("adamw", &[item.weight, item.m, item.v, item.grad])?;
            if let Some(copy) = item.copy {
                expect("adamw", "the copy", copy, item.weight.shape(), item.grad.dtype())?;
                self.row_major("adamw", &[copy])?;
            }
        }
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let items: Vec<_> = items.iter().filter(|i| i.grad.dtype() == dtype && i.grad.elements() > 0).collect();
            let sizes: Vec<usize> = items.iter().map(|i| i.grad.elements()).collect();
            for launch in Launch::all("adamw", &sizes, ADAMW_TENSORS)? {
                let items = &items[launch.tensors.clone()];
                let address = |t: &Tensor| t.ptr() as u64;
                let part = |(n, i): (usize, &&AdamWItem<'_>)| {
                    u64::from(launch.first_blocks[n]) | u64::from((i.weight_decay as f32).to_bits()) << 32
                };
                let table = table(
                    ADAMW_TENSORS,
                    &[
                        items.iter().map(|i| address(i.weight)).collect(),
                        items.iter().map(|i| address(i.m)).collect(),
                        items.iter().map(|i| address(i.v)).collect(),
                        items.iter().map(|i| address(i.grad)).collect(),
                        items.iter().map(|i| i.copy.map_or(0, address)).collect(),
                        items.iter().map(|i| i.grad.elements() as u64).collect(),
                        items.iter().enumerate().map(part).collect(),
                    ],
                );
                let args = Args::new().structure(&table).int(items.len() as i32).tensor(scalars).tensor(grad_scale);
                let (name, say) = (format!("adamw_many_{dtype}"), || format!("{} tensors", items.len()));
                // SAFETY: the kernel's parameters; every tensor of the table holds as many elements as it says, and the
                // grid has as many blocks as the table gives out.
                unsafe { self.launch(&name, launch.blocks, THREADS, 0, args, say)? };
            }
        }
        Ok(())
    }

    fn sum_squares_many(&self, tensors: &[&Tensor], sum: &Tensor) -> Result<()> {
        let op = "sum_squares";
        expect(op, "the sum", sum, &[1], DType::F32)?;
        self.row_major(op, &[sum])?;
        self.row_major(op, tensors)?;
        tensors.iter().try_for_each(|t| self.suffix(op, t).map(|_| ()))?;
        let mut launches = Vec::new();
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let tensors: Vec<_> = tensors.iter().filter(|t| t.dtype() == dtype && t.elements() > 0).collect();
            let sizes: Vec<usize> = tensors.iter().map(|t| t.elements()).collect();
            for launch in Launch::all(op, &sizes, SQUARES_TENSORS)? {
                let tensors = &tensors[launch.tensors.clone()];
                let table = table(
                    SQUARES_TENSORS,
                    &[
                        tensors.iter().map(|t| t.ptr() as u64).collect(),
                        tensors.iter().map(|t| t.elements() as u64).collect(),
                        launch.first_blocks.iter().map(|b| u64::from(*b)).collect(),
                    ],
                );
                launches.push((format!("sum_squares_many_{dtype}"), table, tensors.len(), launch.blocks));
            }
        }
        let blocks: usize = launches.iter().map(|l| l.3 as usize).sum();
        if blocks == 0 {
            return Ok(());
        }
        let partial = self.allocate([blocks].into(), DType::F32)?;
        let mut done = 0;
        for (name, table, count, blocks) in launches {
            let part = partial.narrow(0, done, blocks as usize)?;
            let args = Args::new().structure(&table).int(count as i32).tensor(&part);
            // SAFETY: as in `adamw_many`; part has an element per block.
            unsafe { self.launch(&name, blocks, THREADS, 0, args, || format!("{count} tensors"))? };
            done += blocks as usize;
        }
        let args = Args::new().tensor(&partial).size(blocks).tensor(sum);
        // SAFETY: the kernel's parameters; partial holds that many elements, sum one.
        unsafe { self.launch("sum_squares_add_f32", 1, 1024, 0, args, || format!("{blocks} sums")) }
    }
}

/// The tensors of one launch and their blocks.
struct Launch {
    tensors: std::ops::Range<usize>,
    /// Of each tensor.
    first_blocks: Vec<u32>,
    blocks: u32,
}

impl Launch {
    /// Tensors of these sizes, none 0, at most `most` to a launch.
    fn all(op: &str, sizes: &[usize], most: usize) -> Result<Vec<Launch>> {
        let mut launches = Vec::new();
        for (n, sizes) in sizes.chunks(most).enumerate() {
            let mut first_blocks = Vec::with_capacity(sizes.len());
            let mut blocks = 0_usize;
            for size in sizes {
                first_blocks.push(blocks as u32);
                blocks += size.div_ceil(BLOCK);
            }
            let Some(blocks) = u32::try_from(blocks).ok().filter(|b| *b <= i32::MAX as u32) else {
                shape_err!("{op}: {blocks} blocks of {BLOCK} elements: at most {} in one launch", i32::MAX);
            };
            launches.push(Launch { tensors: n * most..n * most + sizes.len(), first_blocks, blocks });
        }
        Ok(launches)
    }
}

/// A table of `most` rows as the kernels have it, column after column.
fn table(most: usize, columns: &[Vec<u64>]) -> Vec<u64> {
    let mut words = vec![0; most * columns.len()];
    for (words, column) in words.chunks_mut(most).zip(columns) {
        words[..column.len()].copy_from_slice(column);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_given_out_in_order() {
        let launches = Launch::all("adamw", &[1, BLOCK, BLOCK + 1, 5, 3 * BLOCK], 3).unwrap();
        let got: Vec<_> = launches.iter().map(|l| (l.tensors.clone(), l.first_blocks.clone(), l.blocks)).collect();
        assert_eq!(got, [(0..3, vec![0, 1, 2], 4), (3..5, vec![0, 1], 4)]);
        assert_eq!(table(3, &[vec![1, 2], vec![3]]), [1, 2, 0, 3, 0, 0]);
    }
}
