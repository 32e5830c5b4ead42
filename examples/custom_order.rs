//! An order of one's own: every expert's rows lie in reverse, the last token first.
//!
//! `cargo run --release --example custom_order`
//!
//! An order says in which row of the experts' buffer a token lies. This one works the row numbers out on the host, in
//! plain Rust, and lets the device's kernels move the rows.

mod common;

use fsmoe::autograd::Init;
use fsmoe::device::Lane;
use fsmoe::moe::{Assignment, Capacity, Hooks, MoeConfig, MoeLayer, Order, Routing, RowSplit, Rows, Saved, saved};
use fsmoe::moe::{expert, gate};
use fsmoe::tensor::{DType, Tensor};
use fsmoe::{Error, Result};

struct Reversed;

/// Where the rows are: what dispatch leaves for combine and for both backwards. −1 stands for "none" everywhere.
struct Index {
    /// (T·k) i32: the row of each choice, in token order; −1 for a dropped one.
    rows: Tensor,
    /// (R) i32: the token in each row; −1 in an empty slot.
    token: Tensor,
    /// (R) i32: the choice t·k + j in each row.
    choice: Tensor,
}

/// The experts, slots and weights of a routing in which tokens choose.
fn choices(routing: &Routing) -> Result<(&Tensor, &Tensor, &Tensor)> {
    match &routing.assignment {
        Assignment::TokenChoice { experts, slots, weights } => Ok((experts, slots, weights)),
        _ => Err(Error::Config("the reversed order takes routings in which tokens choose experts".into())),
    }
}

impl Index {
    fn new(lane: &Lane, routing: &Routing) -> Result<Self> {
        let (experts, slots, _) = choices(routing)?;
        let k = experts.dim(1);
        let experts = lane.to_host(experts)?.to_vec::<i32>()?;
        let slots = lane.to_host(slots)?.to_vec::<i32>()?;

        // Rows of one expert, and tokens of one routing group: every group has its own slots.
        let each = routing.groups * routing.capacity;
        let group_tokens = routing.tokens / routing.groups;
        let mut rows = vec![-1i32; slots.len()];
        let (mut token, mut choice) = (vec![-1i32; routing.padded_rows()], vec![-1i32; routing.padded_rows()]);
        for (n, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let t = n / k;
            let place = (t / group_tokens) * routing.capacity + slot as usize;
            let row = experts[n] as usize * each + (each - 1 - place);
            rows[n] = row as i32;
            token[row] = t as i32;
            choice[row] = n as i32;
        }
        let device = |v: &[i32]| lane.to_device(&Tensor::from_slice(v, [v.len()])?);
        Ok(Index { rows: device(&rows)?, token: device(&token)?, choice: device(&choice)? })
    }
}

impl Order for Reversed {
    fn name(&self) -> &str {
        "reversed"
    }

    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)> {
        let index = Index::new(lane, routing)?;
        let data = lane.empty([routing.padded_rows(), x.dim(1)], x.dtype())?;
        lane.gather_rows(x, &index.token, &data)?;
        let split = RowSplit::Even { experts: routing.experts, each: routing.groups * routing.capacity };
        Ok((Rows { data, split }, Box::new(index)))
    }

    fn dispatch_backward(
        &self,
        lane: &Lane,
        _routing: &Routing,
        state: &Saved,
        _x: &Tensor,
        d_rows: &Tensor,
        dx: &Tensor,
    ) -> Result<Option<Tensor>> {
        // A token was copied to its rows, so its gradient is their sum.
        lane.combine_rows(d_rows, &saved::<Index>(state)?.rows, None, None, dx)?;
        Ok(None) // Only a dense routing has a dispatch matrix with a gradient.
    }

    fn combine(&self, lane: &Lane, routing: &Routing, state: &Saved, rows: &Tensor) -> Result<Tensor> {
        let (_, _, weights) = choices(routing)?;
        let y = lane.empty([routing.tokens, rows.dim(1)], rows.dtype())?;
        let weights = weights.reshape([weights.elements()])?;
        lane.combine_rows(rows, &saved::<Index>(state)?.rows, None, Some(&weights), &y)?;
        Ok(y)
    }

    fn combine_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        state: &Saved,
        rows: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (_, _, weights) = choices(routing)?;
        let Index { token, choice, .. } = saved(state)?;
        let (d_rows, d_weights) = (lane.empty_like(rows)?, lane.empty_like(weights)?);
        let flat = [weights.elements()];
        let (weights, d_flat) = (weights.reshape(flat)?, d_weights.reshape(flat)?);
        lane.combine_rows_backward(dy, rows, token, choice, &weights, &d_rows, &d_flat)?;
        Ok((d_rows, d_weights))
    }
}

fn main() -> Result<()> {
    let init = Init::new(&Lane::cpu(), DType::F32, 1);
    let config = MoeConfig {
        experts: 4,
        top_k: 2,
        hidden: 8,
        ffn: 32,
        capacity: Capacity::Factor(1.5),
        groups: 2,
        init_std: 0.3,
        ..MoeConfig::default()
    };
    let gate = gate::build(&init.child("gate"), &config)?;
    let expert = expert::build(&init.child("experts"), &config)?;
    let layer = MoeLayer::with_modules(config, gate, Box::new(Reversed), expert, Hooks::default())?;
    common::train("reversed order", &layer)
}
