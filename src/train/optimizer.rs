//! AdamW over a model's parameters, with gradient clipping by global norm and a warm-up and cosine schedule.

use crate::autograd::{Parameter, ReduceGroup};
use crate::device::{AdamW, AdamWItem, Lane};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// What stays the same over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// The last step's learning rate over the peak's.
    pub min_lr_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps of the whole schedule, warm-up included.
    pub steps: u64,
    /// Decoupled weight decay, on parameters that decay.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The largest global gradient norm a step is taken with.
    pub clip: f64,
}

impl OptimizerConfig {
    /// The learning rate of step `step` (from 0): linear warm-up, then half a cosine down to the minimum.
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup + 1).max(1);
        let progress = ((step - self.warmup) as f64 / span as f64).min(1.0);
        let min = self.lr * self.min_lr_ratio;
        min + (self.lr - min) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

/// AdamW with its state: moments in the accumulation type, and a master copy of parameters stored in 16 bits.
pub struct Optimizer {
    lane: Lane,
    config: OptimizerConfig,
    params: Vec<State>,
    sum: Tensor,
    norm: Tensor,
    scale: Tensor,
    /// Of the step under way, where a GPU reads them.
    scalars: Tensor,
}

/// Makes of the sums of squares, (2) acc, of the gradients of one rank's experts and of its shards of the dense part those of
/// all ranks'.
pub type SumOverShards<'a> = &'a dyn Fn(&Tensor) -> Result<()>;

struct State {
    param: Parameter,
    /// The weights that are updated; the parameter's own value where that has the accumulation type.
    master: Tensor,
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// Zero moments for `params`.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(lane: &Lane, config: OptimizerConfig, params: Vec<Parameter>) -> Result<Self> {
        let params = params
            .into_iter()
            .map(|param| {
                let (value, acc) = (param.value(), param.value().dtype().accumulate());
                let master = if value.dtype() == acc { value.clone() } else { lane.cast(value, acc)? };
                let (m, v) = (lane.zeros(*value.shape(), acc)?, lane.zeros(*value.shape(), acc)?);
                Ok(State { param, master, m, v })
            })
            .collect::<Result<Vec<_>>>()?;
        let acc = params.first().map_or(DType::F32, |p| p.m.dtype());
        let one = || lane.zeros([1], acc);
        let scalars = lane.zeros([AdamW::SCALARS], acc)?;
        Ok(Optimizer { lane: lane.clone(), config, params, sum: one()?, norm: one()?, scale: one()?, scalars })
    }

    /// The settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self) {
        self.params.iter().for_each(|p| p.param.zero_grad());
    }

    /// Computes the global norm of the gradients times `grad_scale` (one over the number of accumulated micro-batches),
    /// and the clipping factor that [`Optimizer::step`] will use; returns the norm.
    ///
    /// # Errors
    /// If the device fails, and [`Error::Numeric`] naming the parameter if a gradient is not finite.
    pub fn measure(&self, grad_scale: f64) -> Result<f64> {
        let norm = self.lane.scalar(self.clip(grad_scale, None, None)?)?;
        if norm.is_finite() { Ok(norm) } else { Err(self.blame()) }
    }

    /// [`Optimizer::measure`] without waiting for the device: returns the norm where it will be, (1) acc. Where it, or one
    /// of `losses`, is not finite, [`Optimizer::step`] will change nothing. Where these parameters are those of one rank,
    /// `all_shards` makes of the sums over what ranks do not all hold those over all of it.
    ///
    /// # Errors
    /// If the device fails, and those of `all_shards`.
    pub fn clip(
        &self,
        grad_scale: f64,
        losses: Option<&Tensor>,
        all_shards: Option<SumOverShards<'_>>,
    ) -> Result<&Tensor> {
        self.lane.fill(&self.sum, 0.0)?;
        if let Some(losses) = losses {
            // Nothing, or, of a loss that is not finite, what is no number.
            let zeros = self.lane.zeros(*losses.shape(), losses.dtype())?;
            self.lane.dot(losses, &zeros, &self.sum)?;
        }
        let add = |groups: &[ReduceGroup], sum: &Tensor| {
            let params = self.params.iter().map(|p| &p.param).filter(|p| groups.contains(&p.group()));
            self.lane.sum_squares_many(&params.map(Parameter::grad).collect::<Vec<_>>(), sum)
        };
        let apart = [ReduceGroup::Expert, ReduceGroup::Sharded];
        if let Some(all_shards) = all_shards {
            add(&[ReduceGroup::Replicated], &self.sum)?;
            let sums = self.lane.zeros([apart.len()], self.sum.dtype())?;
            let parts = [sums.narrow(0, 0, 1)?, sums.narrow(0, 1, 1)?];
            apart.iter().zip(&parts).try_for_each(|(&group, sum)| add(&[group], sum))?;
            all_shards(&sums)?;
            parts.iter().try_for_each(|sum| self.lane.axpby(1.0, sum, 1.0, &self.sum))?;
        } else {
            add(&[&[ReduceGroup::Replicated], &apart[..]].concat(), &self.sum)?;
        }
        self.lane.clip_scale(&self.sum, grad_scale, self.config.clip, &self.norm, &self.scale)?;
        Ok(&self.norm)
    }

    /// One step with the learning rate of `step` (from 0), after [`Optimizer::measure`] or [`Optimizer::clip`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn step(&mut self, step: u64) -> Result<()> {
        let settings = AdamW {
            lr: self.config.lr_at(step),
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            step: step + 1,
        };
        let items: Vec<AdamWItem<'_>> = self
            .params
            .iter()
            .map(|p| AdamWItem {
                weight_decay: if p.param.decay() { self.config.weight_decay } else { 0.0 },
                weight: &p.master,
                m: &p.m,
                v: &p.v,
                grad: p.param.grad(),
                copy: (p.master.dtype() != p.param.value().dtype()).then(|| p.param.value()),
            })
            .collect();
        self.lane.adamw_scalars(settings, &self.scalars)?;
        self.lane.adamw_many(settings, &self.scalars, &self.scale, &items)
    }

    /// The state a checkpoint keeps, by name: `m.NAME`, `v.NAME`, and `master.NAME` for 16-bit parameters.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut out = Vec::new();
        for p in &self.params {
            let name = p.param.name();
            out.push((format!("m.{name}"), p.m.clone()));
            out.push((format!("v.{name}"), p.v.clone()));
            if p.master.dtype() != p.param.value().dtype() {
                out.push((format!("master.{name}"), p.master.clone()));
            }
        }
        out
    }

    /// The error that names the first parameter whose gradient is not finite.
    pub(super) fn blame(&self) -> Error {
        for p in &self.params {
            let host = self.lane.cast(p.param.grad(), DType::F64).and_then(|t| self.lane.to_host(&t));
            match host.and_then(|t| t.to_vec::<f64>()) {
                Ok(values) if values.iter().all(|v| v.is_finite()) => {}
                Ok(_) => return Error::Numeric(format!("the gradient of {} is not finite", p.param.name())),
                Err(e) => return e,
            }
        }
        Error::Numeric("the global gradient norm overflows, though every gradient is finite".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_cosine() {
        let c = OptimizerConfig {
            lr: 1.0,
            min_lr_ratio: 0.1,
            warmup: 4,
            steps: 101,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
        };
        assert_eq!(c.lr_at(0), 0.25);
        assert_eq!(c.lr_at(3), 1.0);
        assert_eq!(c.lr_at(4), 1.0);
        assert!((c.lr_at(52) - 0.55).abs() < 1e-12, "halfway");
        assert!((c.lr_at(100) - 0.1).abs() < 1e-12, "the last step has the minimum");
        assert!((c.lr_at(500) - 0.1).abs() < 1e-12);
    }
}
