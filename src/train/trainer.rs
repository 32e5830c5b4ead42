//! A training run in memory: model, optimizer, data, and one step after another.

use super::config::TrainConfig;
use super::data::Corpus;
use super::optimizer::{Optimizer, OptimizerConfig};
use super::plans;
use super::ranks::Ranks;
use super::readings::Readings;
use crate::autograd::{Init, Tape};
use crate::comm::{Sizes, Topology};
use crate::device::Lane;
use crate::device::cuda::range;
use crate::error::{Error, Result, config_err};
use crate::model::checkpoint::Whole;
use crate::model::{ModelConfig, Transformer};
use crate::moe::distributed::Parallel;
use crate::moe::{Routing, RoutingStats, StepContext};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

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

/// How many of `windows` held-out windows an evaluation is on, a micro-batch after the other: of the last, shorter one as many
/// as have tokens that `parts` divide on each of `dp` data-parallel ranks, or on every rank where these do not divide it.
fn held_out(windows: usize, config: &TrainConfig, dp: usize, parts: usize) -> Result<usize> {
    let TrainConfig { batch, seq, .. } = *config;
    let fits = |&n: &usize| (if n.is_multiple_of(dp) { n / dp } else { n } * seq).is_multiple_of(parts);
    let last = (0..=windows % batch).rev().find(fits).unwrap_or(0);
    match windows - windows % batch + last {
        0 => config_err!(
            "{windows} held-out windows of --seq {seq}: MP ranks times routing groups, {parts}, divide the tokens of no number \
             of them; --batch {batch} or more of --eval-windows, in as much text, are divided"
        ),
        n => Ok(n),
    }
}

/// Model, optimizer and data of a run.
pub struct Trainer {
    lane: Lane,
    config: TrainConfig,
    corpus: Corpus,
    model: Transformer,
    optimizer: Optimizer,
    /// What the tokens of a micro-batch are divided among on a data-parallel rank: MP ranks times routing groups.
    parts: usize,
    /// Where other ranks share the work.
    ranks: Option<Ranks>,
    /// What is worth telling of how it began.
    notes: Vec<String>,
    step: u64,
}

impl Trainer {
    /// A fresh run on one rank: parameters from the seed, zero moments, step 0.
    ///
    /// # Errors
    /// If the configuration breaks a rule, or the corpus is too small for it.
    pub fn new(lane: &Lane, config: &TrainConfig, model: &ModelConfig, corpus: Corpus) -> Result<Self> {
        Self::on(lane, config, model, corpus, None)
    }

    /// One rank's part of a fresh run on the ranks of a world: each has its share of the sequences. What it learns is what
    /// one rank with as many routing groups learns. Whatever it does, all ranks do together.
    ///
    /// # Errors
    /// As [`Trainer::new`]; also if the work cannot be shared so, or another rank fails or never comes.
    pub fn on_ranks(
        lane: &Lane,
        config: &TrainConfig,
        model: &ModelConfig,
        corpus: Corpus,
        parallel: &Arc<Parallel>,
    ) -> Result<Self> {
        Self::on(lane, config, model, corpus, Some(parallel))
    }

    fn on(
        lane: &Lane,
        config: &TrainConfig,
        model: &ModelConfig,
        corpus: Corpus,
        parallel: Option<&Arc<Parallel>>,
    ) -> Result<Self> {
        if config.seq > model.max_seq {
            config_err!("--seq {}: the model's positions end at {}", config.seq, model.max_seq);
        }
        if model.vocab < 256 {
            config_err!("vocabulary of {}: byte-level training takes at least 256", model.vocab);
        }
        let Sizes { dp, mp, .. } = parallel.map_or(Topology::single(), |p| *p.groups().topology()).sizes();
        if !config.batch.is_multiple_of(dp) {
            config_err!("--batch {} with --dp {dp}: each data-parallel rank has as many sequences", config.batch);
        }
        let (tokens, parts) = (config.batch / dp * config.seq, mp * model.moe.groups);
        if !tokens.is_multiple_of(parts) {
            config_err!(
                "{} routing groups on each of {mp} MP ranks do not divide the {}·{} tokens of a micro-batch",
                model.moe.groups,
                config.batch / dp,
                config.seq
            );
        }
        corpus.require(config.seq)?;
        let mut notes = Vec::new();
        let windows = corpus.held_out_windows(config.seq, config.eval_windows).len();
        let evaluated = held_out(windows, config, dp, parts)?;
        if evaluated < windows {
            notes.push(format!(
                "note: evaluations are on {evaluated} held-out windows, not {windows}: {mp} MP ranks × {} routing groups do not \
                 divide the tokens of the last ones",
                model.moe.groups
            ));
        }
        let init = Init::new(lane, config.dtype, config.seed);
        let model = match parallel {
            None => Transformer::new(&init, model)?,
            Some(parallel) => Transformer::on_ranks(&init, model, parallel)?,
        };
        let ranks = parallel.map(|parallel| {
            let plan = plans::of_run(&config.world, parallel, &model, tokens, &mut notes)?;
            Ranks::new(lane, parallel, &model, plan, None)
        });
        let ranks = ranks.transpose()?;
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
        let (lane, config) = (lane.clone(), config.clone());
        Ok(Trainer { lane, config, corpus, model, optimizer, parts, ranks, notes, step: 0 })
    }

    /// The model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// What is worth telling of how it began: where its costs come from.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The rank it is on.
    pub fn rank(&self) -> usize {
        self.ranks.as_ref().map_or(0, Ranks::rank)
    }

    /// This rank's share of the sequences, of how many.
    fn share(&self) -> (usize, usize) {
        self.ranks.as_ref().map_or((0, 1), Ranks::share)
    }

    /// The mean over ranks of a number.
    fn mean(&self, value: f64) -> Result<f64> {
        self.ranks.as_ref().map_or(Ok(value), |ranks| ranks.mean(&self.lane, value))
    }

    /// Whether any rank says so: what all do next depends on it.
    ///
    /// # Errors
    /// If another rank fails or never comes.
    pub fn any(&self, value: bool) -> Result<bool> {
        self.ranks.as_ref().map_or(Ok(value), |ranks| ranks.any(&self.lane, value))
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// If another rank fails or never comes.
    pub fn barrier(&self) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.barrier(&self.lane))
    }

    /// What tensors of the model or the optimizer are as wholes.
    pub fn wholes(&self, tensors: &[(String, Tensor)]) -> Vec<Whole> {
        let mut wholes = Whole::of(tensors);
        for whole in &mut wholes {
            if let Some(shard) = self.ranks.as_ref().and_then(|ranks| ranks.shard(&whole.name)) {
                whole.shape = shard.full();
            }
        }
        wholes
    }

    /// A tensor of the model or the optimizer, by name, as a whole, in host memory: the other ranks [`Trainer::give`] it.
    ///
    /// # Errors
    /// If another rank fails or never comes, or the device has no memory left for a part.
    pub fn whole(&self, (name, part): &(String, Tensor)) -> Result<Tensor> {
        match &self.ranks {
            None => self.lane.to_host(part),
            Some(ranks) => ranks.whole(&self.lane, name, part),
        }
    }

    /// Gives this rank's part of a tensor to the one that asks for the [`Trainer::whole`].
    ///
    /// # Errors
    /// As there.
    pub fn give(&self, (name, part): &(String, Tensor)) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.give(&self.lane, name, part))
    }

    /// Takes this rank's part of a tensor of the model or the optimizer from the whole of it, in host memory, whose floats may
    /// be of another type.
    ///
    /// # Errors
    /// If the whole has another shape, or the device fails.
    pub fn take(&self, (name, part): &(String, Tensor), whole: &Tensor) -> Result<()> {
        let own = self.ranks.as_ref().map_or(Ok(None), |ranks| ranks.own(name, whole))?;
        self.lane.copy(&self.lane.to_device(own.as_ref().unwrap_or(whole))?, part)
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
        let _range = range(format_args!("step {}", self.step + 1));
        let micro = self.config.accumulate;
        let windows = self.upload_windows()?;
        self.ranks.as_ref().map_or_else(
            || {
                self.optimizer.zero_grad();
                Ok(())
            },
            |ranks| ranks.zero_grad(&self.lane),
        )?;
        let (_, shares) = self.share();
        let losses = self.lane.empty([micro], self.model.dtype().accumulate())?;
        let mut readings = Readings::default();
        let mut layers = 0;
        for m in 0..micro {
            let (ids, targets) = micro_batch(&windows, m)?;
            if let Some(ranks) = &self.ranks {
                ranks.begin(&self.model, m + 1 == micro)?;
            }
            let tape = Tape::new(&self.lane);
            let cx = self.context(m);
            let result = self.model.forward(&tape, &ids, self.config.batch / shares, self.config.seq, cx)?;
            let loss = tape.cross_entropy(&result.logits, &targets)?;
            self.lane.copy(loss.value(), &losses.narrow(0, m, 1)?)?;
            layers = result.routings.len();
            result.routings.iter().map(Routing::tally).for_each(|tally| readings.routing(tally));
            // The tape lets go of what its backward has read; the routings must not hold it.
            let (aux_loss, logits) = (result.aux_loss, result.logits);
            drop((logits, result.routings));
            // The loss is the mean over shares, the auxiliary one already that of all.
            let root = |like: &Tensor, d: f64| self.lane.full(*like.shape(), like.dtype(), d);
            let d_loss = root(loss.value(), 1.0 / shares as f64)?;
            self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.turn(&self.model))?;
            tape.backward(&[(&loss, d_loss), (&aux_loss, root(aux_loss.value(), 1.0)?)])?;
        }
        let losses = match &self.ranks {
            None => losses,
            Some(ranks) => {
                ranks.finish()?;
                ranks.mean_of(&self.lane, &losses)?
            }
        };
        (0..micro).try_for_each(|m| losses.narrow(0, m, 1).map(|loss| readings.float(&loss)))?;
        let over_shards = self.ranks.as_ref().map(|ranks| |sums: &Tensor| ranks.sum_over_shards(&self.lane, sums));
        let over_shards = over_shards.as_ref().map(|f| f as &dyn Fn(&Tensor) -> Result<()>);
        // Changes nothing where a loss or a gradient is not finite.
        readings.float(self.optimizer.clip(1.0 / micro as f64, Some(&losses), over_shards)?);
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
        for of_micro_batch in values.stats.chunks(layers.max(1)) {
            for (sum, stats) in out.routing.iter_mut().zip(of_micro_batch) {
                let mut stats = stats.clone();
                self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.merge(&self.lane, &mut stats))?;
                sum.merge(&stats);
            }
        }
        self.model.after_step(&self.lane)?;
        self.step += 1;
        Ok(out)
    }

    /// What micro-batch `m` of the step under way is.
    fn context(&self, m: usize) -> StepContext {
        let (share, shares) = self.share();
        let first = m * self.config.batch + share * (self.config.batch / shares);
        StepContext {
            train: true,
            seed: self.config.seed,
            step: self.step,
            first_token: (first * self.config.seq) as u64,
        }
    }

    /// Mean cross-entropy over `windows` fixed held-out windows, nats per byte, dropping nothing where the gate allows; over
    /// fewer, where MP ranks and routing groups do not divide the tokens of the last ones.
    ///
    /// # Errors
    /// If they divide those of none, if the device fails, and [`Error::Numeric`] if the loss is not finite.
    pub fn evaluate(&self, windows: usize) -> Result<f64> {
        let _range = range("evaluation");
        let seq = self.config.seq;
        let (share, shares) = self.share();
        let windows = self.corpus.held_out_windows(seq, windows);
        let evaluated = held_out(windows.len(), &self.config, shares, self.parts)?;
        // Spread evenly over the text, however many there are.
        let windows = self.corpus.held_out_windows(seq, evaluated);
        let mut sum = 0.0;
        for all in windows.chunks(self.config.batch) {
            // What cannot be shared evenly, every rank has whole.
            let each = all.len() / shares;
            let chunk = if all.len() == each * shares { &all[share * each..(share + 1) * each] } else { all };
            let ids: Vec<i32> = chunk.iter().flat_map(|w| w[..seq].iter().map(|&b| i32::from(b))).collect();
            let targets: Vec<i32> = chunk.iter().flat_map(|w| w[1..].iter().map(|&b| i32::from(b))).collect();
            let (ids, targets) = (self.upload(&ids)?, self.upload(&targets)?);
            let tape = Tape::inference(&self.lane);
            let cx = StepContext { train: false, seed: self.config.seed, step: self.step, first_token: 0 };
            let out = self.model.forward(&tape, &ids, chunk.len(), seq, cx)?;
            let loss = tape.cross_entropy(&out.logits, &targets)?;
            let value = self.mean(self.lane.scalar(loss.value())?)?;
            if !value.is_finite() {
                let what = format!("step {}: the held-out loss is {value}", self.step);
                return Err(self.find_non_finite(&what, &ids, &targets, cx));
            }
            sum += value * all.len() as f64;
        }
        Ok(sum / windows.len() as f64)
    }

    fn upload(&self, ids: &[i32]) -> Result<Tensor> {
        self.lane.to_device(&Tensor::from_slice(ids, [ids.len()])?)
    }

    /// This rank's samples of the step, (accumulate, 2, batch·seq): of every micro-batch inputs and targets. One copy to the
    /// device, made while it has nothing else to do.
    fn upload_windows(&self) -> Result<Tensor> {
        let TrainConfig { seq, batch, accumulate, seed, .. } = self.config;
        let (share, shares) = self.share();
        let own = batch / shares;
        let mut all = Vec::with_capacity(2 * accumulate * own * seq);
        for m in 0..accumulate {
            let first = (self.step * accumulate as u64 + m as u64) * batch as u64 + (share * own) as u64;
            let windows: Vec<_> =
                (first..first + own as u64).map(|sample| self.corpus.train_window(seed, sample, seq)).collect();
            all.extend(windows.iter().flat_map(|w| &w[..seq]).map(|&b| i32::from(b)));
            all.extend(windows.iter().flat_map(|w| &w[1..]).map(|&b| i32::from(b)));
        }
        self.lane.to_device(&Tensor::from_slice(&all, [accumulate, 2, own * seq])?)
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
            let host = self.lane.to_host(p.value()).and_then(|t| Lane::cpu().cast(&t, DType::F64));
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
