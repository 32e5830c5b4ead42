//! An expert of one's own: the bilinear gated unit, y = (x·aᵀ ⊙ x·bᵀ)·cᵀ (Shazeer 2020), with a shared c.
//!
//! `cargo run --release --example custom_expert`
//!
//! Every expert has its own a and b (H, M); the way back, c (M, H), is one for all: fewer parameters, and a sign that an
//! expert may hold its weights as it likes.

mod common;

use fsmoe::Result;
use fsmoe::autograd::{Init, Parameter, ReduceGroup};
use fsmoe::device::Lane;
use fsmoe::moe::{Capacity, Expert, Hooks, MoeConfig, MoeLayer, Rows, Saved, gate, saved};
use fsmoe::tensor::{DType, Tensor};

struct Bilinear {
    /// (E, H, M).
    a: Parameter,
    /// (E, H, M).
    b: Parameter,
    /// (M, H).
    c: Parameter,
}

/// What forward leaves for backward: (R, H) each.
struct Hidden {
    /// x·aᵀ.
    left: Tensor,
    /// x·bᵀ.
    right: Tensor,
    /// left ⊙ right.
    product: Tensor,
}

/// The gradients of [`Hidden`]'s left and right, which backward_data leaves for backward_weights.
struct HiddenGrad {
    left: Tensor,
    right: Tensor,
}

impl Bilinear {
    fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let (e, m, h) = (config.experts, config.hidden, config.ffn);
        // The group says over which ranks a gradient is summed: an expert's own weights, or weights that all ranks hold.
        Ok(Bilinear {
            a: init.normal("a", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            b: init.normal("b", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            c: init.normal("c", [m, h], config.init_std, ReduceGroup::Replicated)?,
        })
    }
}

/// Calls `f` with every expert that has rows, its first row and the number of its rows, however they are split.
fn for_experts(rows: &Rows, mut f: impl FnMut(usize, usize, usize) -> Result<()>) -> Result<()> {
    for e in 0..rows.split.experts() {
        let range = rows.split.range(e)?;
        if !range.is_empty() {
            f(e, range.start, range.len())?;
        }
    }
    Ok(())
}

impl Expert for Bilinear {
    fn name(&self) -> &str {
        "bilinear"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.a.clone(), self.b.clone(), self.c.clone()]
    }

    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)> {
        let x = &rows.data;
        let left = lane.empty([x.dim(0), self.c.value().dim(1)], x.dtype())?;
        let (right, product) = (lane.empty_like(&left)?, lane.empty_like(&left)?);
        for (w, hidden) in [(&self.a, &left), (&self.b, &right)] {
            for_experts(rows, |e, first, n| {
                let w = w.value().index(e)?.t()?;
                lane.gemm(1.0, &x.narrow(0, first, n)?, &w, 0.0, &hidden.narrow(0, first, n)?)
            })?;
        }
        lane.mul(&left, &right, &product)?;
        let y = lane.empty_like(x)?;
        lane.gemm(1.0, &product, &self.c.value().t()?, 0.0, &y)?;
        Ok((y, Box::new(Hidden { left, right, product })))
    }

    fn backward_data(&self, lane: &Lane, rows: &Rows, state: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)> {
        let Hidden { left, right, product } = saved(state)?;
        let d_product = lane.empty_like(product)?;
        lane.gemm(1.0, d_out, self.c.value(), 0.0, &d_product)?;
        let d = HiddenGrad { left: lane.empty_like(left)?, right: lane.empty_like(right)? };
        lane.mul(&d_product, right, &d.left)?;
        lane.mul(&d_product, left, &d.right)?;

        let dx = lane.empty_like(&rows.data)?;
        for_experts(rows, |e, first, n| {
            let dx = dx.narrow(0, first, n)?;
            lane.gemm(1.0, &d.left.narrow(0, first, n)?, &self.a.value().index(e)?, 0.0, &dx)?;
            lane.gemm(1.0, &d.right.narrow(0, first, n)?, &self.b.value().index(e)?, 1.0, &dx)
        })?;
        Ok((dx, Box::new(d)))
    }

    fn backward_weights(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        d_out: &Tensor,
        state_backward: &Saved,
    ) -> Result<()> {
        let hidden: &Hidden = saved(state)?;
        let d: &HiddenGrad = saved(state_backward)?;
        // Weight gradients are added to what is there (beta = 1): micro-batches accumulate.
        lane.gemm(1.0, &d_out.t()?, &hidden.product, 1.0, self.c.grad())?;
        for (w, d) in [(&self.a, &d.left), (&self.b, &d.right)] {
            for_experts(rows, |e, first, n| {
                let d = d.narrow(0, first, n)?.t()?;
                lane.gemm(1.0, &d, &rows.data.narrow(0, first, n)?, 1.0, &w.grad().index(e)?)
            })?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let init = Init::new(&Lane::cpu(), DType::F32, 1);
    let config = MoeConfig {
        experts: 4,
        top_k: 2,
        hidden: 8,
        ffn: 32,
        capacity: Capacity::Dropless,
        init_std: 0.3,
        ..MoeConfig::default()
    };
    let gate = gate::build(&init.child("gate"), &config)?;
    let expert = Box::new(Bilinear::new(&init.child("experts"), &config)?);
    let layer = MoeLayer::with_modules(config.clone(), gate, config.order.build(), expert, Hooks::default())?;
    common::train("bilinear expert", &layer)
}
