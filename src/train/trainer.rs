//! A training run in memory: model, optimizer, data, and one step after another.

use super::config::TrainConfig;
use super::data::Corpus;
use super::optimizer::{Optimizer, OptimizerConfig};
use super::readings::Readings;
use crate::autograd::{Init, Tape};
use crate::device::Lane;
use crate::error::{Error, Result, config_err};
use crate::model::{ModelConfig, Transformer};
use crate::moe::{Routing, RoutingStats, StepContext};
use crate::tensor::{DType, Tensor};

const ADVICE: &str = "try a lower --lr or a lower --clip from the last checkpoint";

/// What one optimizer step did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean cross-entropy of the step's tokens, nats per byte, before the update.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Per MoE layer, over the micro-batches.
    pub routing: Vec<RoutingStats>,
}

/// Model, optimizer and data of a run.
pub struct Trainer {
    lane: Lane,
    config: TrainConfig,
    corpus: Corpus,
    model: Transformer,
    optimizer: Optimizer,
    step: u64,
}

impl Trainer {
    /// A fresh run: parameters from the seed, zero moments, step 0.
    ///
    /// # Errors
    /// If the configuration breaks a rule, or the corpus is too small for it.
    pub fn new(lane: &Lane, config: &TrainConfig, model: &ModelConfig, corpus: Corpus) -> Result<Self> {
        if config.seq > model.max_seq {
            config_err!("--seq {}: the model's positions end at {}", config.seq, model.max_seq);
        }
        if model.vocab < 256 {
            config_err!("vocabulary of {}: byte-level training takes at least 256", model.vocab);
        }
        if !(config.batch * config.seq).is_multiple_of(model.moe.groups) {
            config_err!(
                "{} routing groups do not divide the {}·{} tokens of a micro-batch",
                model.moe.groups,
                config.batch,
                config.seq
            );
        }
        corpus.require(config.seq)?;
        let model = Transformer::new(&Init::new(lane, config.dtype, config.seed), model)?;
        let optimizer = OptimizerConfig {
            lr: config.lr,
            min_lr_ratio: config.min_lr_ratio,
            warmup: config.warmup,
            steps: config.steps,
            weight_decay: config.weight_decay,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            clip: config.clip,
        };
        let optimizer = Optimizer::new(lane, optimizer, model.parameters())?;
        Ok(Trainer { lane: lane.clone(), config: config.clone(), corpus, model, optimizer, step: 0 })
    }

    /// The model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Goes on from `step` steps, once model and optimizer hold a checkpoint's state.
    pub fn set_steps_done(&mut self, step: u64) {
        self.step = step;
    }

    /// Tokens of one step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.config.batch * self.config.accumulate * self.config.seq) as u64
    }

    /// One optimizer step. All of it is issued before anything is read: the device is waited for once.
    ///
    /// # Errors
    /// [`Error::Numeric`] if the loss or a gradient is not finite, saying where that first appeared; the parameters are
    /// then as they were before the step.
    pub fn step(&mut self) -> Result<StepOutcome> {
        let micro = self.config.accumulate;
        let windows = self.upload_windows()?;
        self.optimizer.zero_grad();
        let losses = self.lane.empty([micro], self.model.dtype().accumulate())?;
        let mut readings = Readings::default();
        let mut layers = 0;
        for m in 0..micro {
            let (ids, targets) = micro_batch(&windows, m)?;
            let tape = Tape::new(&self.lane);
            let cx = self.context(m);
            let result = self.model.forward(&tape, &ids, self.config.batch, self.config.seq, cx)?;
            let loss = tape.cross_entropy(&result.logits, &targets)?;
            let own = losses.narrow(0, m, 1)?;
            self.lane.copy(loss.value(), &own)?;
            readings.float(&own);
            layers = result.routings.len();
            result.routings.iter().map(Routing::tally).for_each(|tally| readings.routing(tally));
            // The tape lets go of what its backward has read; the routings must not hold it.
            let (aux_loss, logits) = (result.aux_loss, result.logits);
            drop((logits, result.routings));
            let one = |like: &Tensor| self.lane.full(*like.shape(), like.dtype(), 1.0);
            tape.backward(&[(&loss, one(loss.value())?), (&aux_loss, one(aux_loss.value())?)])?;
        }
        // Changes nothing where a loss or a gradient is not finite.
        readings.float(self.optimizer.clip(1.0 / micro as f64, Some(&losses))?);
        self.optimizer.step(self.step)?;

        let values = readings.read(&self.lane)?;
        let mut out = StepOutcome { lr: self.optimizer.config().lr_at(self.step), ..StepOutcome::default() };
        for (m, loss) in values.floats[..micro].iter().enumerate() {
            if !loss.is_finite() {
                let (ids, targets) = micro_batch(&windows, m)?;
                let what = format!("step {}: the loss is {loss}", self.step + 1);
                return Err(self.find_non_finite(&what, &ids, &targets, self.context(m)));
            }
            out.loss += loss / micro as f64;
        }
        out.grad_norm = values.floats[micro];
        if !out.grad_norm.is_finite() {
            return Err(match self.optimizer.blame() {
                Error::Numeric(what) => Error::Numeric(format!("step {}: {what}; {ADVICE}", self.step + 1)),
                e => e,
            });
        }
        out.routing.resize(layers, RoutingStats::default());
        for stats in values.stats.chunks(layers.max(1)) {
            out.routing.iter_mut().zip(stats).for_each(|(sum, stats)| sum.merge(stats));
        }
        self.model.after_step(&self.lane)?;
        self.step += 1;
        Ok(out)
    }

    /// What micro-batch `m` of the step under way is.
    fn context(&self, m: usize) -> StepContext {
        StepContext {
            train: true,
            seed: self.config.seed,
            step: self.step,
            first_token: (m * self.config.batch * self.config.seq) as u64,
        }
    }

    /// Mean cross-entropy over `windows` fixed held-out windows, nats per byte, dropping nothing where the gate allows.
    ///
    /// # Errors
    /// If the device fails, and [`Error::Numeric`] if the loss is not finite.
    pub fn evaluate(&self, windows: usize) -> Result<f64> {
        let (seq, batch) = (self.config.seq, self.config.batch.min(windows));
        let windows = self.corpus.held_out_windows(seq, windows);
        let mut sum = 0.0;
        for chunk in windows.chunks(batch) {
            let ids: Vec<i32> = chunk.iter().flat_map(|w| w[..seq].iter().map(|&b| i32::from(b))).collect();
            let targets: Vec<i32> = chunk.iter().flat_map(|w| w[1..].iter().map(|&b| i32::from(b))).collect();
            let (ids, targets) = (self.upload(&ids)?, self.upload(&targets)?);
            let tape = Tape::inference(&self.lane);
            let cx = StepContext { train: false, seed: self.config.seed, step: self.step, first_token: 0 };
            let out = self.model.forward(&tape, &ids, chunk.len(), seq, cx)?;
            let loss = tape.cross_entropy(&out.logits, &targets)?;
            let value = self.lane.scalar(loss.value())?;
            if !value.is_finite() {
                let what = format!("step {}: the held-out loss is {value}", self.step);
                return Err(self.find_non_finite(&what, &ids, &targets, cx));
            }
            sum += value * chunk.len() as f64;
        }
        Ok(sum / windows.len() as f64)
    }

    fn upload(&self, ids: &[i32]) -> Result<Tensor> {
        self.lane.to_device(&Tensor::from_slice(ids, [ids.len()])?)
    }

    /// The step's samples, (accumulate, 2, batch·seq): of every micro-batch inputs and targets. One copy to the device, made
    /// while it has nothing else to do.
    fn upload_windows(&self) -> Result<Tensor> {
        let TrainConfig { seq, batch, accumulate, seed, .. } = self.config;
        let mut all = Vec::with_capacity(2 * accumulate * batch * seq);
        for m in 0..accumulate as u64 {
            let first = (self.step * accumulate as u64 + m) * batch as u64;
            let windows: Vec<_> =
                (first..first + batch as u64).map(|sample| self.corpus.train_window(seed, sample, seq)).collect();
            all.extend(windows.iter().flat_map(|w| &w[..seq]).map(|&b| i32::from(b)));
            all.extend(windows.iter().flat_map(|w| &w[1..]).map(|&b| i32::from(b)));
        }
        self.lane.to_device(&Tensor::from_slice(&all, [accumulate, 2, batch * seq])?)
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Numeric`] naming the first that holds a value that is not finite.
    pub fn check_finite(&self) -> Result<()> {
        match self.non_finite_parameter() {
            Some(name) => Err(Error::Numeric(format!(
                "step {}: a value that is not finite first appeared in the parameter {name}; {ADVICE}",
                self.step
            ))),
            None => Ok(()),
        }
    }

    fn non_finite_parameter(&self) -> Option<String> {
        let bad = self.model.parameters().into_iter().find(|p| {
            let host = self.lane.cast(p.value(), DType::F64).and_then(|t| self.lane.to_host(&t));
            host.and_then(|t| t.to_vec::<f64>()).is_ok_and(|v| v.iter().any(|v| !v.is_finite()))
        });
        bad.map(|p| p.name().to_owned())
    }

    /// The error for a loss that is not finite: runs the forward once more, looking at every output.
    fn find_non_finite(&self, what: &str, ids: &Tensor, targets: &Tensor, cx: StepContext) -> Error {
        let place = match self.non_finite_parameter() {
            Some(name) => format!("in the parameter {name}"),
            None => {
                let tape = Tape::checking(&self.lane);
                let run = self
                    .model
                    .forward(&tape, ids, ids.elements() / self.config.seq, self.config.seq, cx)
                    .and_then(|out| tape.cross_entropy(&out.logits, targets));
                match (run, tape.first_non_finite()) {
                    (_, Some(place)) => place,
                    (Err(e), None) => format!("in a forward that failed: {e}"),
                    (Ok(_), None) => "in the loss itself".to_owned(),
                }
            }
        };
        Error::Numeric(format!("{what}; a value that is not finite first appeared {place}; {ADVICE}"))
    }
}

/// Inputs and targets, (batch·seq) each, of micro-batch `m` of a step's windows.
fn micro_batch(windows: &Tensor, m: usize) -> Result<(Tensor, Tensor)> {
    let both = windows.index(m)?;
    Ok((both.index(0)?, both.index(1)?))
}
