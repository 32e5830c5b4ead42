//! A training run from its settings to its last checkpoint.

use super::checkpoint::{self, RunState};
use super::config::{Settings, TrainConfig};
use super::data::Corpus;
use super::progress::{DoneEvent, EvalEvent, Reporter, StepEvent};
use super::run::{Metrics, RunDir};
use super::trainer::{StepOutcome, Trainer};
use super::{ceiling, interrupt, memory};
use crate::device::Lane;
use crate::error::{Error, Result, config_err};
use crate::fsio::atomic_write;
use crate::model::ModelConfig;
use crate::moe::RoutingStats;
use crate::report::{DeviceUse, LossCurves, Summary, loss_svg};
use crate::tensor::{DType, Place};
use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to do.
pub struct Request {
    /// The settings given for this run.
    pub settings: Settings,
    /// A run folder, or a checkpoint in one, to go on from.
    pub resume: Option<PathBuf>,
    /// Where JSON lines go, if they are asked for.
    pub json: Option<Box<dyn Write>>,
}

/// Steps whose training loss and loads the summary is about.
const LAST: usize = 20;

/// Runs a training run to its end and returns what it came to.
///
/// # Errors
/// For settings, data or checkpoints that break a rule; [`Error::Numeric`] if the loss is not finite;
/// [`Error::Interrupted`] after Ctrl-C, with a checkpoint saved.
pub fn train(request: Request) -> Result<Summary> {
    let resumed = request.resume.as_deref().map(checkpoint::find).transpose()?;
    let settings = match &resumed {
        // Where a run stops early is said anew each time: a run that goes on without a word goes to its schedule's end.
        Some(dir) => request.settings.clone().or(Settings { stop_at: None, ..RunDir::of(dir)?.settings()? }),
        None => request.settings.clone(),
    };
    let place = settings.place();
    let settings = match (place, settings.dtype, &resumed) {
        // A run on a GPU wrote its type down: one that did not was begun on the CPU, in the CPU's.
        (Place::Cuda(_), None, Some(_)) => Settings { dtype: Some(TrainConfig::default().dtype), ..settings },
        _ => settings,
    };
    let (config, model) = settings.resolve_on(place)?;
    let corpus = match &settings.data {
        Some(path) => Corpus::open(path)?,
        None => Corpus::builtin(),
    };
    let data = corpus.name().to_owned();
    let lane = Lane::at(place)?;
    memory::check(&lane, &config, &model)?;
    let mut trainer = Trainer::new(&lane, &config, &model, corpus)?;
    if let Some(dir) = &resumed {
        let state = checkpoint::restore(dir, &lane, &mut trainer)?;
        check_continuation(dir, &state, &config)?;
    }
    let folder = match (&resumed, &request.settings.out) {
        (Some(dir), None) => RunDir::of(dir)?,
        (_, out) => RunDir::create(out.as_deref(), &config.preset)?,
    };
    // Where a run is going on is said anew each time, what its checkpoints hold is not.
    let dtype = if place == Place::Cpu { settings.dtype } else { Some(config.dtype) };
    let settings = Settings { out: None, device: None, dtype, ..settings };
    let first = trainer.steps_done();
    // Before the settings: rows that cannot be read end the attempt, and the run stays what it was.
    let metrics = folder.append_metrics(first + 1)?;
    folder.write_config(&settings.to_toml()?)?;
    interrupt::install()?;
    let reporter = Reporter::new(request.json, first, config.stop_at);
    if let Some(device) = lane.device()? {
        reporter.note(&format!("on {} ({}), {}", lane.place(), device.name, config.dtype));
    }
    if trainer.model().sees_other_tokens() {
        reporter.note(&format!(
            "note: the {} gate routes a token by looking at others of its batch, later ones included, so this causal \
             model's loss is not comparable with other gates'",
            model.moe.gate
        ));
    }
    let session = Session {
        lane,
        config,
        model,
        data,
        trainer,
        folder,
        metrics,
        reporter,
        outcomes: VecDeque::new(),
        saved: None,
        evaluated: None,
        train_seconds: 0.0,
        first,
    };
    session.run()
}

/// A run that goes on must be the run that was begun: what decides the samples may not change. A longer or shorter
/// schedule is the user's to choose.
fn check_continuation(dir: &Path, state: &RunState, config: &TrainConfig) -> Result<()> {
    let samples_per_step = (config.batch * config.accumulate) as u64;
    if state.seed != config.seed {
        config_err!("--seed {} to go on from {}: that run has seed {}", config.seed, dir.display(), state.seed);
    }
    if state.step.checked_mul(samples_per_step) != Some(state.samples) {
        config_err!(
            "{samples_per_step} sequences a step to go on from {}: that run saw {} in {} steps; keep --batch times \
             --accumulate as it was",
            dir.display(),
            state.samples,
            state.step
        );
    }
    if state.step >= config.stop_at {
        config_err!(
            "{} has {} steps done, and this run would end after {}: raise --stop-at or --steps",
            dir.display(),
            state.step,
            config.stop_at
        );
    }
    Ok(())
}

struct Session {
    lane: Lane,
    config: TrainConfig,
    model: ModelConfig,
    data: String,
    trainer: Trainer,
    folder: RunDir,
    metrics: Metrics,
    reporter: Reporter,
    /// The last steps'.
    outcomes: VecDeque<StepOutcome>,
    /// The newest checkpoint of this run, and its step.
    saved: Option<(u64, PathBuf)>,
    /// The newest held-out loss, and its step.
    evaluated: Option<(u64, f64)>,
    train_seconds: f64,
    first: u64,
}

impl Session {
    fn run(mut self) -> Result<Summary> {
        let start = Instant::now();
        while self.trainer.steps_done() < self.config.stop_at {
            self.step()?;
            let done = self.trainer.steps_done();
            if interrupt::requested() {
                let path = self.save()?;
                self.draw()?;
                self.reporter.note(&format!(
                    "interrupted after step {done}; go on with --resume {}",
                    self.folder.path().display()
                ));
                self.reporter.note(&format!("checkpoint: {}", path.display()));
                return Err(Error::Interrupted);
            }
            if done.is_multiple_of(self.config.eval_every) {
                self.evaluate()?;
            }
            if done.is_multiple_of(self.config.save_every) {
                self.save()?;
            }
        }
        let val_loss = self.evaluate()?;
        let checkpoint = self.save()?;
        self.draw()?;
        self.finish(start.elapsed().as_secs_f64(), val_loss, &checkpoint)
    }

    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let outcome = self.trainer.step()?;
        let seconds = start.elapsed().as_secs_f64();
        self.train_seconds += seconds;
        let event = StepEvent {
            event: "step",
            step: self.trainer.steps_done(),
            loss: outcome.loss,
            tokens_per_s: self.trainer.tokens_per_step() as f64 / seconds,
            lr: outcome.lr,
            grad_norm: outcome.grad_norm,
            balance_loss: mean(outcome.routing.iter().map(|r| r.balance_loss)),
            dropped_fraction: merged(&outcome.routing).dropped_fraction(),
        };
        if self.outcomes.len() == LAST {
            self.outcomes.pop_front();
        }
        self.outcomes.push_back(outcome);
        self.metrics.append(&event)?;
        self.reporter.step(&event)
    }

    fn evaluate(&mut self) -> Result<f64> {
        let step = self.trainer.steps_done();
        if let Some((at, loss)) = self.evaluated
            && at == step
        {
            return Ok(loss);
        }
        let val_loss = self.trainer.evaluate(self.config.eval_windows)?;
        self.evaluated = Some((step, val_loss));
        let event = EvalEvent { event: "eval", step, val_loss };
        self.metrics.append(&event)?;
        self.reporter.eval(&event)?;
        Ok(val_loss)
    }

    fn save(&mut self) -> Result<PathBuf> {
        let step = self.trainer.steps_done();
        if let Some((at, path)) = &self.saved
            && *at == step
        {
            return Ok(path.clone());
        }
        let state = RunState {
            format: checkpoint::FORMAT,
            step,
            seed: self.config.seed,
            steps: self.config.steps,
            samples: step * (self.config.batch * self.config.accumulate) as u64,
        };
        let dir = self.folder.checkpoints();
        let path = checkpoint::save(&dir, &self.lane, &self.trainer, &state, self.config.keep_last)?;
        self.saved = Some((step, path.clone()));
        Ok(path)
    }

    /// loss.svg, from the whole history in metrics.jsonl.
    fn draw(&self) -> Result<()> {
        let rows = self.folder.read_metrics()?;
        let points = |event: &str, key: &str| {
            let rows = rows.iter().filter(|r| r["event"] == event);
            rows.filter_map(|r| Some((r["step"].as_u64()?, r[key].as_f64()?))).collect()
        };
        let curves = LossCurves {
            title: format!("{} on {}", self.config.preset, self.data),
            train: points("step", "loss"),
            held_out: points("eval", "val_loss"),
        };
        let (path, svg) = (self.folder.loss_svg(), loss_svg(&curves)?);
        atomic_write(&path, |w| w.write_all(svg.as_bytes()).map_err(|e| Error::io(&path, e)))
    }

    fn finish(mut self, seconds: f64, val_loss: f64, checkpoint: &Path) -> Result<Summary> {
        let layers = self.model.moe_layers();
        let mut by_layer = vec![RoutingStats::default(); layers];
        for outcome in &self.outcomes {
            for (sum, stats) in by_layer.iter_mut().zip(&outcome.routing) {
                sum.merge(stats);
            }
        }
        let tokens = (self.trainer.steps_done() - self.first) * self.trainer.tokens_per_step();
        let tokens_per_s = tokens as f64 / self.train_seconds;
        let device = self.device_use(tokens_per_s)?;
        let summary = Summary {
            preset: self.config.preset.clone(),
            data: self.data.clone(),
            total_parameters: self.model.total_parameters(),
            active_parameters: self.model.active_parameters(),
            steps: (self.trainer.steps_done(), self.config.steps),
            tokens,
            seconds,
            tokens_per_s,
            train_loss: mean(self.outcomes.iter().map(|o| o.loss)),
            val_loss,
            dropped_fraction: merged(&by_layer).dropped_fraction(),
            entropy: mean(by_layer.iter().map(|s| s.entropy)),
            loads: by_layer.into_iter().map(|s| s.loads).collect(),
            device,
            files: vec![
                ("checkpoint", checkpoint.to_path_buf()),
                ("metrics", self.folder.metrics()),
                ("loss curve", self.folder.loss_svg()),
                ("settings", self.folder.config()),
            ],
        };
        self.reporter.done(&DoneEvent {
            event: "done",
            steps: summary.steps.0,
            train_loss: summary.train_loss,
            val_loss,
            dropped_fraction: summary.dropped_fraction,
            tokens_per_s: summary.tokens_per_s,
            checkpoint: checkpoint.display().to_string(),
            device: summary.device.clone(),
        })?;
        Ok(summary)
    }

    /// What the run made of its device, if that is one apart from the host.
    fn device_use(&self, tokens_per_s: f64) -> Result<Option<DeviceUse>> {
        let Some(device) = self.lane.device()? else { return Ok(None) };
        // Products large enough that a device is at its best, and that take milliseconds.
        let size = if self.config.dtype == DType::F32 { 4096 } else { 8192 };
        let ceiling = ceiling::product_flops(&self.lane, self.config.dtype, size)?;
        let useful = self.model.flops_per_token(self.config.seq) * tokens_per_s;
        Ok(Some(DeviceUse {
            device: format!("{}, {}, {}", self.lane.place(), device.name, self.config.dtype),
            peak_memory_bytes: device.peak_memory as u64,
            device_memory_bytes: device.total_memory as u64,
            useful_flops_per_s: useful,
            ceiling_flops_per_s: ceiling,
            share_of_ceiling: useful / ceiling,
        }))
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = values.fold((0u64, 0.0), |(n, s), v| (n + 1, s + v));
    if n == 0 { 0.0 } else { sum / n as f64 }
}

fn merged(stats: &[RoutingStats]) -> RoutingStats {
    stats.iter().fold(RoutingStats::default(), |mut sum, s| {
        sum.merge(s);
        sum
    })
}
