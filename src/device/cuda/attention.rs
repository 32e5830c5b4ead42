//! Causal attention: on tensor cores for 16-bit types, by plain multiply-adds for f32.

use super::Cuda;
use super::args::Args;
use super::model::int;
use crate::device::{AttentionShape, check};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// A head's width in the kernels, and what depends on it.
struct Plan {
    /// The number in the kernels' names.
    width: usize,
    forward: Tile,
    queries: Tile,
    keys: Tile,
}

/// How a kernel cuts the sequence.
struct Tile {
    /// Queries, or keys, of a block.
    rows: usize,
    threads: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl Plan {
    /// As `kernels/model/attention_*.cu` have it.
    fn new(op: &str, dim: usize, dtype: DType) -> Result<Self> {
        let widths: &[usize] = if dtype == DType::F32 { &[64, 128, 256] } else { &[32, 64, 128, 256] };
        let Some(&width) = widths.iter().find(|w| dim <= **w) else {
            shape_err!("{op}: heads of width {dim}: on a GPU they are at most 256 wide");
        };
        if dtype == DType::F32 {
            let rows = if width <= 64 { 64 } else { 32 };
            // Tiles of rows by width, and one of rows by rows; each row has one element more.
            let tile = |tiles: usize| Tile {
                rows,
                threads: 256,
                shared: (tiles * rows * (width + 1) + rows * (rows + 1)) * size_of::<f32>(),
            };
            return Ok(Plan { width, forward: tile(3), queries: tile(4), keys: tile(4) });
        }
        // `own` rows stay; of the others there are two tiles of `step` rows for each of two tensors. A row has eight elements
        // more than its width.
        let shared = |own: usize, step: usize| (own + 4 * step) * (width + 8) * dtype.size();
        let step = if width <= 64 { 64 } else { 32 };
        let queries = if width <= 128 { 128 } else { 64 };
        let threads = if width <= 128 { 128 } else { 256 };
        // lse and delta of two steps' queries lie beside them.
        let beside = 4 * step * size_of::<f32>();
        Ok(Plan {
            width,
            forward: Tile { rows: queries, threads: 128, shared: shared(queries, step) },
            queries: Tile { rows: 64, threads: 128, shared: shared(2 * 64, step) },
            keys: Tile { rows: 64, threads, shared: shared(2 * 64, step) + beside },
        })
    }
}

/// What the kernels take after their tensors.
fn sizes(op: &str, s: AttentionShape, args: Args) -> Result<Args> {
    Ok(args
        .int(int(op, "L", s.seq)?)
        .int(int(op, "Hq", s.heads)?)
        .int(int(op, "Hkv", s.kv_heads)?)
        .int(int(op, "D", s.head_dim)?))
}

fn prefix(dtype: DType) -> [&'static str; 3] {
    match dtype {
        DType::F32 => ["attention_plain_forward", "attention_plain_queries", "attention_plain_keys"],
        _ => ["attention_forward", "attention_backward_queries", "attention_backward_keys"],
    }
}

/// Blocks for `tile` over `heads` heads of each sequence.
fn grid(op: &str, s: AttentionShape, tile: &Tile, heads: usize) -> Result<u32> {
    Ok(int(op, "the number of tiles", s.seq.div_ceil(tile.rows) * s.batch * heads)? as u32)
}

pub(super) fn forward(
    lane: &Cuda,
    s: AttentionShape,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
) -> Result<()> {
    let op = "attention";
    check::attention(op, s, &[q, out], &[k, v], lse)?;
    lane.row_major(op, &[q, k, v, out, lse])?;
    check::all_apart(op, &[q, k, v], &[out, lse])?;
    let suffix = lane.suffix(op, q)?;
    let plan = Plan::new(op, s.head_dim, q.dtype())?;
    if s.batch == 0 {
        return Ok(());
    }
    let args = sizes(op, s, Args::new().tensor(q).tensor(k).tensor(v).tensor(out).tensor(lse))?;
    let name = format!("{}_{suffix}_{}", prefix(q.dtype())[0], plan.width);
    let tile = &plan.forward;
    let grid = grid(op, s, tile, s.heads)?;
    // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs, and the grid has a block
    // per tile of queries and head.
    unsafe { lane.launch(&name, grid, tile.threads as u32, tile.shared, args, || format!("{s:?}")) }
}

pub(super) fn backward(
    lane: &Cuda,
    s: AttentionShape,
    [q, k, v, out, d_out]: [&Tensor; 5],
    lse: &Tensor,
    [dq, dk, dv]: [&Tensor; 3],
) -> Result<()> {
    let op = "attention_backward";
    check::attention(op, s, &[q, out, d_out, dq], &[k, v, dk, dv], lse)?;
    lane.row_major(op, &[q, k, v, out, lse, d_out, dq, dk, dv])?;
    check::all_apart(op, &[q, k, v, out, d_out, lse], &[dq, dk, dv])?;
    let suffix = lane.suffix(op, q)?;
    let plan = Plan::new(op, s.head_dim, q.dtype())?;
    if s.batch == 0 {
        return Ok(());
    }
    let say = || format!("{s:?}");
    let [_, queries, keys] = prefix(q.dtype()).map(|name| format!("{name}_{suffix}_{}", plan.width));
    let tokens = s.batch * s.seq;
    let delta = lane.allocate(*lse.shape(), DType::F32)?;
    let args = Args::new().tensor(out).tensor(d_out).tensor(&delta).size(tokens);
    let args = args.int(int(op, "L", s.seq)?).int(int(op, "Hq", s.heads)?).int(int(op, "D", s.head_dim)?);
    let name = format!("attention_backward_delta_{suffix}");
    // SAFETY: the kernel's parameters; out and d_out hold (B·L, Hq·D), delta (B, Hq, L).
    unsafe { lane.launch(&name, lane.blocks(tokens * s.heads * 8), 256, 0, args, say)? };

    let inputs = || Args::new().tensor(q).tensor(k).tensor(v).tensor(lse).tensor(&delta).tensor(d_out);
    let (args, tile) = (sizes(op, s, inputs().tensor(dq))?, &plan.queries);
    let blocks = grid(op, s, tile, s.heads)?;
    // SAFETY: as in `forward`.
    unsafe { lane.launch(&queries, blocks, tile.threads as u32, tile.shared, args, say)? };
    let (args, tile) = (sizes(op, s, inputs().tensor(dk).tensor(dv))?, &plan.keys);
    let blocks = grid(op, s, tile, s.kv_heads)?;
    // SAFETY: as in `forward`; a block per tile of keys and key head.
    unsafe { lane.launch(&keys, blocks, tile.threads as u32, tile.shared, args, say) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a block can have at most: 163 KiB on sm_80, 227 on sm_90.
    #[test]
    fn tiles_fit_into_shared_memory() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for dim in 1..=256 {
                let plan = Plan::new("attention", dim, dtype).unwrap();
                assert!(plan.width >= dim);
                for tile in [&plan.forward, &plan.queries, &plan.keys] {
                    assert!(tile.shared <= 163 << 10, "{dtype}, D {dim}: {} bytes", tile.shared);
                }
            }
            assert!(Plan::new("attention", 257, dtype).is_err());
        }
    }
}
