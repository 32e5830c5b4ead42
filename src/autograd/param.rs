//! Trainable parameters.

use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::rng::{Counter, Purpose};
use crate::tensor::{DType, Shape, Tensor};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// The ranks over which a parameter's gradient is summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceGroup {
    /// Held by every rank: routers, norms, embeddings, dense layers where no MP ranks share them (DP × MP).
    Replicated,
    /// An MP rank's part of a matrix or bias of a dense layer: the ranks that hold the same part (DP).
    Sharded,
    /// An expert's weights: the ranks that hold the same expert.
    Expert,
}

/// A trainable tensor and its gradient, which backward passes add to. Cloning shares both.
#[derive(Clone)]
pub struct Parameter(Arc<Inner>);

struct Inner {
    name: String,
    value: Tensor,
    lane: Lane,
    grad: Tensor,
    /// The gradient is zero by decree: its memory holds anything, and whoever writes first need not add.
    fresh: AtomicBool,
    /// Where the gradient lies once it has been placed.
    placed: OnceLock<Tensor>,
    group: ReduceGroup,
    decay: bool,
}

impl Parameter {
    /// A parameter with a zero gradient of its own dtype, both used on `lane`. `decay`: whether weight decay applies (matrices, not norms).
    ///
    /// # Errors
    /// If the device has no memory left for the gradient.
    pub fn new(lane: &Lane, name: impl Into<String>, value: Tensor, group: ReduceGroup, decay: bool) -> Result<Self> {
        if !value.is_contiguous() || !value.dtype().is_float() {
            shape_err!("a parameter is a contiguous float tensor, not {value:?}");
        }
        let (grad, fresh) = (lane.empty(*value.shape(), value.dtype())?, AtomicBool::new(true));
        let (name, lane, placed) = (name.into(), lane.clone(), OnceLock::new());
        Ok(Parameter(Arc::new(Inner { name, value, lane, grad, fresh, placed, group, decay })))
    }

    /// Its name, unique in a model, as checkpoints have it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.0.value
    }

    /// The gradient, same shape; backward adds to it.
    pub fn grad(&self) -> &Tensor {
        let (grad, beta) = self.grad_to_write();
        if beta == 0.0 {
            // A device that cannot fill cannot do what comes next either, and will say so then.
            let _ = self.0.lane.fill(grad, 0.0);
        }
        grad
    }

    /// The gradient for an operation that writes all of it, with the factor of what it holds: 0 for the first one since
    /// [`Parameter::zero_grad`], which saves a pass over memory, then 1.
    pub fn grad_to_write(&self) -> (&Tensor, f64) {
        let fresh = self.0.fresh.swap(false, Ordering::Relaxed);
        (self.0.placed.get().unwrap_or(&self.0.grad), if fresh { 0.0 } else { 1.0 })
    }

    /// Has the gradient lie in `place` from now on, a part of a buffer that is reduced as a whole; it is what the place
    /// holds. Whoever owns the buffer sets it to zero.
    ///
    /// # Errors
    /// If the place is not contiguous, of another shape or dtype, or the gradient has been placed before.
    pub fn place_grad(&self, place: Tensor) -> Result<()> {
        let grad = &self.0.grad;
        if place.shape() != grad.shape() || place.dtype() != grad.dtype() || !place.is_contiguous() {
            shape_err!("a place {place:?} for the gradient of {self:?}: contiguous, of the same shape and dtype");
        }
        if self.0.placed.set(place).is_err() {
            shape_err!("the gradient of {self:?} has its place already");
        }
        self.0.fresh.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The ranks its gradient is summed over.
    pub fn group(&self) -> ReduceGroup {
        self.0.group
    }

    /// Whether weight decay applies.
    pub fn decay(&self) -> bool {
        self.0.decay
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.0.value.elements()
    }

    /// Sets the gradient to zero. Nothing is written yet (see [`Parameter::grad_to_write`]), except where the gradient has
    /// been placed: the buffer around it is read without asking for it.
    pub fn zero_grad(&self) {
        match self.0.placed.get() {
            Some(place) => {
                // As in `grad`.
                let _ = self.0.lane.fill(place, 0.0);
            }
            None => self.0.fresh.store(true, Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameter({} {:?})", self.0.name, self.0.value)
    }
}

/// Makes parameters: where, of which type, under which name prefix, from which seed. A parameter's initial values
/// depend on the seed and its name alone, so they are the same whatever else the model holds.
#[derive(Clone)]
pub struct Init {
    lane: Lane,
    dtype: DType,
    /// None: zeros.
    seed: Option<u64>,
    prefix: String,
}

impl Init {
    /// Parameters on `lane`'s device, of `dtype`, from `seed`.
    pub fn new(lane: &Lane, dtype: DType, seed: u64) -> Self {
        Init { lane: lane.clone(), dtype, seed: Some(seed), prefix: String::new() }
    }

    /// Parameters that are zero where [`Init::new`] has them random: for weights that are to be loaded.
    pub fn zeros(lane: &Lane, dtype: DType) -> Self {
        Init { lane: lane.clone(), dtype, seed: None, prefix: String::new() }
    }

    /// The same with `name.` put before every name.
    pub fn child(&self, name: impl fmt::Display) -> Self {
        Init { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// The lane.
    pub fn lane(&self) -> &Lane {
        &self.lane
    }

    /// The parameters' type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `name` with the prefix before it.
    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A parameter of normal deviates with standard deviation `std`; it decays.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn normal(&self, name: &str, shape: impl Into<Shape>, std: f64, group: ReduceGroup) -> Result<Parameter> {
        let name = self.name(name);
        let value = self.lane.zeros(shape, self.dtype)?;
        if let Some(seed) = self.seed {
            // FNV-1a of the name: a stable number per parameter.
            let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
            let id = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
            let unit = self.lane.empty(*value.shape(), self.dtype.accumulate())?;
            self.lane.normal(Counter { seed, purpose: Purpose::Init, step: id }, 0, &unit)?;
            self.lane.axpby(std, &unit, 0.0, &value)?;
        }
        Parameter::new(&self.lane, name, value, group, true)
    }

    /// A parameter with every element `value` that does not decay: gains, biases, scales.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn constant(&self, name: &str, shape: impl Into<Shape>, value: f64) -> Result<Parameter> {
        let value = self.lane.full(shape, self.dtype, value)?;
        Parameter::new(&self.lane, self.name(name), value, ReduceGroup::Replicated, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placed_gradient_is_what_its_buffer_holds() {
        let lane = Lane::cpu();
        let p = Init::new(&lane, DType::F32, 1).normal("p", [3], 1.0, ReduceGroup::Expert).unwrap();
        let buffer = lane.full([5], DType::F32, 2.0).unwrap();
        p.place_grad(buffer.narrow(0, 1, 3).unwrap()).unwrap();
        // Nobody writes it: what others have added up there stays.
        assert_eq!(p.grad().to_vec::<f32>().unwrap(), [2.0; 3]);
        assert_eq!(p.grad_to_write().1, 1.0);
        p.zero_grad();
        assert_eq!(buffer.to_vec::<f32>().unwrap(), [2.0, 0.0, 0.0, 0.0, 2.0]);
        lane.fill(&buffer, 3.0).unwrap();
        assert_eq!(p.grad().to_vec::<f32>().unwrap(), [3.0; 3]);
        assert!(p.place_grad(lane.zeros([3], DType::F32).unwrap()).is_err());
    }
}
