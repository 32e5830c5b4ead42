//! Slots, loads and losses from counts of tiles of tokens (`kernels/gate/slots.cu`).

use super::super::args::Args;
use super::super::backend::Cuda;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Tiles to aim for: two blocks for each of the multiprocessors of an H100. A constant, so that sums over tiles have one
/// order on every GPU.
const TILES: usize = 256;
/// The places that `slots_assign` works on at a time.
const CHUNK: usize = 256;
/// Shared memory that a block may have on every GPU from Ampere on.
const SHARED: usize = 160 << 10;

/// Tokens cut into tiles of consecutive ones, none across routing groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    /// Tokens of a group.
    pub(super) tokens: usize,
    pub(super) groups: usize,
    /// Tokens of a tile; the last of a group may have fewer.
    pub(super) tile: usize,
    /// Tiles of a group.
    pub(super) tiles: usize,
}

impl Tiling {
    pub(super) fn new(tokens: usize, groups: usize) -> Self {
        let tile = 32 * (tokens * groups).div_ceil(32 * TILES).clamp(1, tokens.div_ceil(32).max(1));
        Tiling { tokens, groups, tile, tiles: tokens.div_ceil(tile) }
    }

    /// Tiles of all groups.
    pub(super) fn all(&self) -> usize {
        self.groups * self.tiles
    }

    pub(super) fn blocks(&self) -> u32 {
        self.all() as u32
    }
}

/// Where the losses of a choice go, and room to make them.
pub(super) struct Losses<'a> {
    /// (tiles, E) f32.
    pub(super) columns: Tensor,
    /// (2, tiles) f32.
    pub(super) sums: Tensor,
    /// (1) i32.
    pub(super) ticket: Tensor,
    firsts: Tensor,
    column_sums: Tensor,
    first_only: bool,
    balance: &'a Tensor,
    fraction: &'a Tensor,
    /// z-loss, if wanted, and entropy.
    means: Option<(Option<&'a Tensor>, &'a Tensor)>,
}

impl<'a> Losses<'a> {
    pub(super) fn new(
        cuda: &Cuda,
        tiling: Tiling,
        experts: usize,
        first_only: bool,
        balance: &'a Tensor,
        fraction: &'a Tensor,
        means: Option<(Option<&'a Tensor>, &'a Tensor)>,
    ) -> Result<Self> {
        Ok(Losses {
            columns: cuda.allocate([tiling.all(), experts].into(), DType::F32)?,
            sums: cuda.allocate([2, tiling.all()].into(), DType::F32)?,
            ticket: cuda.allocate([1].into(), DType::I32)?,
            firsts: cuda.allocate([tiling.groups, experts].into(), DType::I32)?,
            column_sums: cuda.allocate([experts].into(), DType::F32)?,
            first_only,
            balance,
            fraction,
            means,
        })
    }
}

impl Cuda {
    /// Room for the counts of k choices of a tiling: (G, k, tiles, E).
    pub(super) fn counts(&self, experts: usize, k: usize, tiling: Tiling) -> Result<Tensor> {
        self.allocate([tiling.groups, k, tiling.tiles, experts].into(), DType::I32)
    }

    /// The counts of every tile's choices; `order` (T) names the token in every place.
    pub(super) fn count_choices(
        &self,
        op: &str,
        experts: &Tensor,
        order: Option<&Tensor>,
        num_experts: usize,
        k: usize,
        tiling: Tiling,
    ) -> Result<Tensor> {
        let shared = 4 * k * num_experts;
        fits(op, shared, k, num_experts)?;
        let counts = self.counts(num_experts, k, tiling)?;
        let args = Args::new()
            .tensor(experts)
            .optional(order)
            .size(tiling.tokens)
            .int(num_experts as i32)
            .int(k as i32)
            .int(tiling.tile as i32)
            .int(tiling.tiles as i32)
            .tensor(&counts);
        // SAFETY: the kernel's parameters; a block per tile, counts of the shape it writes, shared memory as it asks.
        unsafe { self.launch("slots_count", tiling.blocks(), 512, shared, args, || format!("{experts:?}"))? };
        Ok(counts)
    }

    /// Turns counts into each tile's first slots, and writes the loads (G, E) and, if wanted, the losses.
    pub(super) fn scan_counts(
        &self,
        counts: &Tensor,
        k: usize,
        num_experts: usize,
        tiling: Tiling,
        loads: &Tensor,
        losses: Option<&Losses<'_>>,
    ) -> Result<()> {
        let means = losses.and_then(|l| l.means);
        let args = Args::new()
            .tensor(counts)
            .size(k * tiling.tiles)
            .size(tiling.tiles)
            .int(num_experts as i32)
            .size(tiling.groups)
            .tensor(loads)
            .optional(losses.map(|l| &l.firsts))
            .optional(losses.map(|l| &l.columns))
            .optional(losses.map(|l| &l.column_sums))
            .optional(losses.map(|l| &l.sums))
            .size(tiling.all())
            .size(tiling.tokens * tiling.groups)
            .int(i32::from(losses.is_some_and(|l| l.first_only)))
            .optional(losses.map(|l| l.balance))
            .optional(losses.map(|l| l.fraction))
            .optional(means.and_then(|(z, _)| z))
            .optional(means.map(|(_, entropy)| entropy))
            .optional(losses.map(|l| &l.ticket));
        let blocks = (num_experts.div_ceil(8) * tiling.groups) as u32;
        // SAFETY: the kernel's parameters; a block per 8 experts and group, counts and loads of the shapes it takes, and a
        // ticket that the kernel before has set to 0.
        unsafe { self.launch("slots_scan", blocks, 1024, 0, args, || format!("{counts:?}")) }
    }

    /// Turns counts (G, tiles, 256) of digits into their exclusive sums over tiles, and writes the totals (G, 256).
    pub(in super::super) fn scan_digits(&self, counts: &Tensor, totals: &Tensor) -> Result<()> {
        let (groups, tiles, digits) = (counts.dim(0), counts.dim(1), counts.dim(2));
        self.scan_counts(counts, 1, digits, Tiling { tokens: 0, groups, tile: 0, tiles }, totals, None)
    }

    /// Slots from scanned counts.
    pub(super) fn assign_from_counts(
        &self,
        op: &str,
        experts: &Tensor,
        order: Option<&Tensor>,
        counts: &Tensor,
        num_experts: usize,
        tiling: Tiling,
        capacity: usize,
        slots: &Tensor,
    ) -> Result<()> {
        let k = experts.dim(1);
        let shared = 4 * k * (num_experts + CHUNK);
        fits(op, shared, k, num_experts)?;
        let args = Args::new()
            .tensor(experts)
            .optional(order)
            .tensor(counts)
            .size(tiling.tokens)
            .int(num_experts as i32)
            .int(k as i32)
            .int(tiling.tile as i32)
            .int(tiling.tiles as i32)
            .int(capacity.min(tiling.tokens) as i32)
            .tensor(slots);
        let threads = 32 * k.clamp(4, 16) as u32;
        // SAFETY: the kernel's parameters; a block per tile, counts of the same tiling, shared memory as it asks.
        unsafe { self.launch("slots_assign", tiling.blocks(), threads, shared, args, || format!("{experts:?}")) }
    }

    /// Slots for choices in the order of tokens, or in the one given.
    pub(super) fn slots_in_order(
        &self,
        op: &str,
        experts: &Tensor,
        order: Option<&Tensor>,
        num_experts: usize,
        tiling: Tiling,
        capacity: usize,
        slots: &Tensor,
    ) -> Result<()> {
        let k = experts.dim(1);
        if k == 0 {
            return Ok(());
        }
        let counts = self.count_choices(op, experts, order, num_experts, k, tiling)?;
        let loads = self.allocate([tiling.groups, num_experts].into(), DType::I32)?;
        self.scan_counts(&counts, k, num_experts, tiling, &loads, None)?;
        self.assign_from_counts(op, experts, order, &counts, num_experts, tiling, capacity, slots)
    }
}

fn fits(op: &str, shared: usize, k: usize, experts: usize) -> Result<()> {
    if shared > SHARED {
        shape_err!(
            "{op}: k = {k} choices of E = {experts} experts take {shared} bytes of shared memory to count, and a block has \
             {SHARED}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_group_and_are_about_as_many_as_blocks_run_at_once() {
        for (tokens, groups) in [(1, 1), (31, 1), (33, 3), (8192, 1), (32768, 1), (40000, 1), (131_072, 4), (1, 500)] {
            let t = Tiling::new(tokens, groups);
            assert!(t.tile.is_multiple_of(32) && t.tiles * t.tile >= tokens, "{t:?}");
            assert!((t.tiles - 1) * t.tile < tokens && t.all() <= TILES + groups, "{t:?}");
        }
        assert_eq!((Tiling::new(32768, 1).tile, Tiling::new(32768, 1).tiles), (128, 256));
    }
}
