//! Causal attention and rotary positions.

use crate::autograd::{Tape, Var};
use crate::device::{AttentionShape, Rope};
use crate::error::{Result, shape_err};

impl Tape {
    /// Rotary position embedding of x: (B, L, H, D).
    ///
    /// # Errors
    /// If x has another rank or D is odd, or the device fails.
    pub fn rope(&self, x: &Var, rope: Rope) -> Result<Var> {
        if x.value().rank() != 4 {
            shape_err!("rope of {}: it takes (B, L, H, D)", x.value().shape());
        }
        let y = self.lane().empty_like(x.value())?;
        self.lane().rope(&self.lane().contiguous(x.value())?, rope, false, &y)?;
        Ok(self.record1(&[x], y, move |lane, dy| {
            let dx = lane.empty_like(dy)?;
            lane.rope(&lane.contiguous(dy)?, rope, true, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// Causal attention: q (B·L, Hq·D), k and v (B·L, Hkv·D), or any shapes with those elements in that order, such as
    /// (B, L, H, D); the result has q's shape.
    ///
    /// # Errors
    /// If q, k or v has another number of elements than `shape` says, or the device fails.
    pub fn attention(&self, shape: AttentionShape, q: &Var, k: &Var, v: &Var) -> Result<Var> {
        let lane = self.lane();
        let (tokens, heads) = (shape.batch * shape.seq, [shape.heads, shape.kv_heads, shape.kv_heads]);
        let mut kept = Vec::with_capacity(3);
        for ((name, var), heads) in [("q", q), ("k", k), ("v", v)].into_iter().zip(heads) {
            let width = heads * shape.head_dim;
            if var.value().elements() != tokens * width {
                shape_err!("attention of {name} {}: {shape:?} takes ({tokens}, {width})", var.value().shape());
            }
            kept.push(lane.contiguous(var.value())?.reshape([tokens, width])?);
        }
        let out = lane.empty_like(&kept[0])?;
        let lse = lane.empty([shape.batch, shape.heads, shape.seq], out.dtype().accumulate())?;
        lane.attention(shape, &kept[0], &kept[1], &kept[2], &out, &lse)?;
        let shapes = [q, k, v].map(|v| *v.value().shape());
        Ok(self.record1(&[q, k, v], out.reshape(shapes[0])?, move |lane, dy| {
            let (q, k, v) = (&kept[0], &kept[1], &kept[2]);
            let (dq, dk, dv) = (lane.empty_like(q)?, lane.empty_like(k)?, lane.empty_like(v)?);
            let dy = lane.contiguous(dy)?.reshape(*q.shape())?;
            lane.attention_backward(shape, q, k, v, &out, &lse, &dy, &dq, &dk, &dv)?;
            [dq, dk, dv].into_iter().zip(shapes).map(|(d, shape)| Ok(Some(d.reshape(shape)?))).collect()
        }))
    }
}
