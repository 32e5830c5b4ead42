//! Stable sorts of 32-bit keys (`kernels/order/sort.cu`).

use super::args::Args;
use super::backend::Cuda;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Values of a digit.
const DIGITS: usize = 256;
/// Elements of a tile are a multiple of this: a block's threads.
const THREADS: usize = 256;
/// Tiles to aim for.
const TILES: usize = 256;

impl Cuda {
    /// For each of `groups` equal runs of `values` (f32), the numbers of its elements (counted over all runs) by descending
    /// value; equal ones in their order, NaN last.
    pub(super) fn sort_descending(&self, values: &Tensor, groups: usize) -> Result<Tensor> {
        let n = values.elements();
        let keys = self.allocate([n].into(), DType::I32)?;
        let args = Args::new().tensor(values).size(n).tensor(&keys);
        // SAFETY: the kernel's parameters; values and keys have n elements.
        unsafe { self.elementwise("sort_keys_descending", n, args)? };
        let order = self.allocate([n].into(), DType::I32)?;
        self.sort(keys, groups, 32, &order)?;
        Ok(order)
    }

    /// `order` (n) i32: the numbers of the elements of `index` (n) i32 by ascending index, those outside 0..count last, equal
    /// ones in their order. Returns the indices sorted alike, outsiders as `count`.
    pub(super) fn sort_index(&self, index: &Tensor, count: usize, order: &Tensor) -> Result<Tensor> {
        let n = index.elements();
        let keys = self.allocate([n].into(), DType::I32)?;
        let args = Args::new().tensor(index).size(n).int(count as i32).tensor(&keys);
        // SAFETY: the kernel's parameters; index and keys have n elements.
        unsafe { self.elementwise("sort_keys_index", n, args)? };
        self.sort(keys, 1, usize::BITS - count.leading_zeros(), order)
    }

    /// `offsets[i]`, (count + 1) i32: how many of the sorted keys are below i.
    pub(super) fn bounds(&self, keys: &Tensor, count: usize, offsets: &Tensor) -> Result<()> {
        let args = Args::new().tensor(keys).size(keys.elements()).size(count).tensor(offsets);
        // SAFETY: the kernel's parameters; offsets has count + 1 elements.
        unsafe { self.elementwise("sort_bounds", count + 1, args) }
    }

    /// Sorts each of `groups` equal runs of keys, of which only the lowest `bits` are set; `order` gets the number of every
    /// key, counted over all runs.
    fn sort(&self, mut keys: Tensor, groups: usize, bits: u32, order: &Tensor) -> Result<Tensor> {
        let all = keys.elements();
        if all == 0 {
            return Ok(keys);
        }
        let n = all / groups;
        let tile = THREADS * all.div_ceil(THREADS * TILES).clamp(1, n.div_ceil(THREADS));
        let tiles = n.div_ceil(tile);
        let counts = self.allocate([groups, tiles, DIGITS].into(), DType::I32)?;
        let totals = self.allocate([groups, DIGITS].into(), DType::I32)?;
        let blocks = (groups * tiles) as u32;
        let shape = || format!("{groups} groups of {n} keys");
        // One pass at least, for the order.
        let passes = bits.div_ceil(8).max(1);
        let mut numbers: Option<Tensor> = None;
        for pass in 0..passes {
            let place = |args: Args| args.size(n).int(8 * pass as i32).int(tile as i32).int(tiles as i32);
            let args = place(Args::new().tensor(&keys)).tensor(&counts);
            // SAFETY: the kernel's parameters; a block per tile, counts of the shape it writes.
            unsafe { self.launch("sort_count", blocks, THREADS as u32, 0, args, shape)? };
            self.scan_digits(&counts, &totals)?;
            let moved = self.allocate([all].into(), DType::I32)?;
            let to = if pass + 1 == passes { order.clone() } else { self.allocate([all].into(), DType::I32)? };
            let args = Args::new().tensor(&keys).optional(numbers.as_ref()).tensor(&counts).tensor(&totals);
            let args = place(args).tensor(&moved).tensor(&to);
            // SAFETY: as above; totals are of these counts, and no output is an input.
            unsafe { self.launch("sort_move", blocks, THREADS as u32, 0, args, shape)? };
            (keys, numbers) = (moved, Some(to));
        }
        Ok(keys)
    }
}
