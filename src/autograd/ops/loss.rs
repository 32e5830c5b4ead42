//! The language-model loss.

use super::{filled_with, total};
use crate::autograd::{Tape, Var};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

impl Tape {
    /// The mean over N tokens of −ln softmax(logits)\[target\], in nats: logits (N, V), targets (N) i32 in 0..V; (1) acc.
    ///
    /// # Errors
    /// If the shapes do not fit, there are no tokens, a target is out of range, or the device fails.
    pub fn cross_entropy(&self, logits: &Var, targets: &Tensor) -> Result<Var> {
        let lane = self.lane();
        let (x, n) = (lane.contiguous(logits.value())?, targets.elements());
        if x.rank() != 2 || n == 0 || targets.shape().dims() != [x.dim(0)] || targets.dtype() != DType::I32 {
            shape_err!("cross_entropy of logits {x:?} and targets {targets:?}: it takes (N, V) and i32 (N), N above 0");
        }
        let acc = x.dtype().accumulate();
        let (loss, lse) = (lane.empty([n], acc)?, lane.empty([n], acc)?);
        let targets = lane.contiguous(targets)?;
        lane.cross_entropy(&x, &targets, &loss, &lse)?;
        let mean = total(lane, &loss, 1.0 / n as f64)?;
        Ok(self.record1(&[logits], mean, move |lane, dy| {
            let each = lane.empty([n], acc)?;
            lane.axpby(1.0 / n as f64, &filled_with(lane, dy, [n].into(), acc)?, 0.0, &each)?;
            let dx = lane.empty_like(&x)?;
            lane.cross_entropy_backward(&x, &targets, &lse, &each, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }
}
