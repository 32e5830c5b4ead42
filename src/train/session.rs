//! A training run from its settings to its last checkpoint.

use super::checkpoint::{self, RunState};
use super::config::{Settings, TrainConfig};
use super::data::Corpus;
use super::progress::{DoneEvent, EvalEvent, Reporter, StepEvent};
use super::run::{Metrics, RunDir};
use super::start::{launched, on_ranks};
use super::trainer::{StepOutcome, Trainer};
use super::world::{CommKind, WorldConfig};
use super::{ceiling, interrupt, memory};
use crate::comm::launch::Launch;
use crate::comm::nccl;
use crate::device::{Lane, LaneKind};
use crate::error::{Error, Result, config_err};
use crate::fsio::atomic_write;
use crate::model::ModelConfig;
use crate::moe::RoutingStats;
use crate::moe::distributed::Parallel;
use crate::report::{DeviceUse, LossCurves, Summary, loss_svg};
use crate::tensor::{DType, Place};
use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What to do.
pub struct Request {
    /// The settings given for this run.
    pub settings: Settings,
    /// A run folder, or a checkpoint in one, to go on from.
    pub resume: Option<PathBuf>,
    /// Where JSON lines go, if they are asked for.
    pub json: Option<Box<dyn Write + Send>>,
}

/// Steps whose training loss and loads the summary is about.
const LAST: usize = 20;

/// Runs a training run to its end and returns what it came to.
///
/// # Errors
/// For settings, data or checkpoints that break a rule; [`Error::Numeric`] if the loss is not finite;
/// [`Error::Interrupted`] after Ctrl-C, with a checkpoint saved.
pub fn train(request: Request) -> Result<Summary> {
    train_rank(request)?.ok_or_else(|| Error::Config("no summary of a run on a rank that is not the first".into()))
}

/// [`train`], where this process may be one rank of several: none where it is not the first.
///
/// # Errors
/// As [`train`].
pub fn train_rank(request: Request) -> Result<Option<Summary>> {
    let resumed = request.resume.as_deref().map(checkpoint::find).transpose()?;
    let settings = match &resumed {
        // Where a run stops early is said anew each time: a run that goes on without a word goes to its schedule's end.
        Some(dir) => request.settings.clone().or(Settings { stop_at: None, ..RunDir::of(dir)?.settings()? }),
        None => request.settings.clone(),
    };
    let launch = match settings.comm {
        Some(CommKind::Nccl) => Some(launched(settings.device)?),
        _ => None,
    };
    let settings = match &launch {
        // How many ranks there are is what the launcher has started, not what a run before this one had.
        Some(launch) => Settings {
            ranks: request.settings.ranks.or(Some(launch.world)),
            nodes: request.settings.nodes.or(launch.nodes()),
            ..settings
        },
        None => settings,
    };
    let place = match &launch {
        Some(launch) => Place::Cuda(nccl::gpu(launch, settings.share_gpu.unwrap_or(false))?),
        None => settings.place(),
    };
    let settings = match (place, settings.dtype, &resumed) {
        // A run on a GPU wrote its type down: one that did not was begun on the CPU, in the CPU's.
        (Place::Cuda(_), None, Some(_)) => Settings { dtype: Some(TrainConfig::default().dtype), ..settings },
        _ => settings,
    };
    let (mut config, model) = settings.resolve_on(place)?;
    config.world.hosts = launch.as_ref().and_then(Launch::nodes);
    let world = config.world.clone();
    let run = Run { place, config, model, settings, out: request.settings.out, resumed };
    let summaries = if world.sizes.ranks == 1 && launch.is_none() {
        vec![run.session(None, request.json)?.run()?]
    } else {
        let options = |launch| {
            let WorldConfig { share_gpu, comm_ctas: ctas, timeout, .. } = world;
            let (rendezvous, agree) = (run.settings.rendezvous.clone(), run.agree()?);
            let options = nccl::Options { rendezvous, share_gpu, ctas, agree, ..nccl::Options::new(timeout) };
            Ok::<_, Error>((launch, options))
        };
        let processes = launch.as_ref().map(options).transpose()?;
        let json = Mutex::new(request.json);
        on_ranks(place, &world, processes, |parallel| {
            let json = match parallel.groups().rank() {
                0 => json.lock().unwrap_or_else(PoisonError::into_inner).take(),
                _ => None,
            };
            run.session(Some(parallel), json)?.run()
        })?
    };
    Ok(summaries.into_iter().flatten().next())
}

/// A run, before it begins.
struct Run {
    place: Place,
    config: TrainConfig,
    model: ModelConfig,
    settings: Settings,
    /// The folder that this attempt asks for.
    out: Option<PathBuf>,
    /// The checkpoint it goes on from.
    resumed: Option<PathBuf>,
}

impl Run {
    /// What ranks that are processes have to agree in: what they are asked for, and from where they go on.
    fn agree(&self) -> Result<Vec<(String, String)>> {
        let settings = Settings { out: None, device: None, ..self.settings.clone() }.to_toml()?;
        let settings: toml::Table = toml::from_str(&settings).map_err(|e| Error::Config(format!("settings: {e}")))?;
        let flag = |(key, value): (&String, &toml::Value)| (format!("--{}", key.replace('_', "-")), value.to_string());
        let resumed = self.resumed.as_ref().map(|dir| ("--resume".to_owned(), dir.display().to_string()));
        Ok(settings.iter().map(flag).chain(resumed).collect())
    }

    /// The part of it on one rank.
    fn session(&self, parallel: Option<&Arc<Parallel>>, json: Option<Box<dyn Write + Send>>) -> Result<Session> {
        let lane = match parallel {
            Some(parallel) => parallel.lane(LaneKind::Compute).clone(),
            None => Lane::at(self.place)?,
        };
        let (config, model) = (self.config.clone(), self.model.clone());
        memory::check(&lane, &config, &model)?;
        let corpus = match &self.settings.data {
            Some(path) => Corpus::open(path)?,
            None => Corpus::builtin(),
        };
        let data = corpus.name().to_owned();
        let mut trainer = match parallel {
            None => Trainer::new(&lane, &config, &model, corpus)?,
            Some(parallel) => Trainer::on_ranks(&lane, &config, &model, corpus, parallel)?,
        };
        if let Some(dir) = &self.resumed {
            let state = checkpoint::restore(dir, &mut trainer)?;
            check_continuation(dir, &state, &config)?;
        }
        let first = trainer.steps_done();
        interrupt::install()?;
        let lead = if trainer.rank() == 0 { Some(self.lead(&lane, &trainer, json)?) } else { None };
        // What the first rank refuses, it refuses before a step is done.
        trainer.barrier()?;
        Ok(Session {
            lane,
            config,
            model,
            data,
            trainer,
            lead,
            outcomes: VecDeque::new(),
            saved: None,
            evaluated: None,
            train_seconds: 0.0,
            first,
        })
    }

    /// What the first rank alone has: the run's folder and its words.
    fn lead(&self, lane: &Lane, trainer: &Trainer, json: Option<Box<dyn Write + Send>>) -> Result<Lead> {
        let folder = match (&self.resumed, &self.out) {
            (Some(dir), None) => RunDir::of(dir)?,
            (_, out) => RunDir::create(out.as_deref(), &self.config.preset)?,
        };
        // Where a run is going on, and how its ranks talk, is said anew each time, what its checkpoints hold is not.
        let dtype = if self.place == Place::Cpu { self.settings.dtype } else { Some(self.config.dtype) };
        let settings = Settings {
            out: None,
            device: None,
            comm: None,
            comm_ctas: None,
            rendezvous: None,
            share_gpu: None,
            no_cache: None,
            reprofile: None,
            dtype,
            ..self.settings.clone()
        };
        let first = trainer.steps_done();
        // Before the settings: rows that cannot be read end the attempt, and the run stays what it was.
        let metrics = folder.append_metrics(first + 1)?;
        folder.write_config(&settings.to_toml()?)?;
        let reporter = Reporter::new(json, first, self.config.stop_at);
        if let Some(device) = lane.device()? {
            reporter.note(&format!("on {} ({}), {}", lane.place(), device.name, self.config.dtype));
        }
        trainer.notes().iter().for_each(|note| reporter.note(note));
        if trainer.model().sees_other_tokens() {
            reporter.note(&format!(
                "note: the {} gate routes a token by looking at others of its batch, later ones included, so this causal \
                 model's loss is not comparable with other gates'",
                self.model.moe.gate
            ));
        }
        Ok(Lead { folder, metrics, reporter })
    }
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

/// The run's folder and its words: the first rank's.
struct Lead {
    folder: RunDir,
    metrics: Metrics,
    reporter: Reporter,
}

struct Session {
    lane: Lane,
    config: TrainConfig,
    model: ModelConfig,
    data: String,
    trainer: Trainer,
    lead: Option<Lead>,
    /// The last steps'.
    outcomes: VecDeque<StepOutcome>,
    /// The newest checkpoint of this run, and its step.
    saved: Option<(u64, Option<PathBuf>)>,
    /// The newest held-out loss, and its step.
    evaluated: Option<(u64, f64)>,
    train_seconds: f64,
    first: u64,
}

impl Session {
    /// To its end: the summary is the first rank's.
    fn run(mut self) -> Result<Option<Summary>> {
        let start = Instant::now();
        while self.trainer.steps_done() < self.config.stop_at {
            self.step()?;
            let done = self.trainer.steps_done();
            if self.trainer.any(interrupt::requested())? {
                let path = self.save()?;
                self.draw()?;
                if let (Some(lead), Some(path)) = (&self.lead, path) {
                    lead.reporter.note(&format!(
                        "interrupted after step {done}; go on with --resume {}",
                        lead.folder.path().display()
                    ));
                    lead.reporter.note(&format!("checkpoint: {}", path.display()));
                }
                self.trainer.barrier()?;
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
        match (self.lead.take(), checkpoint) {
            (Some(lead), Some(checkpoint)) => {
                self.finish(lead, start.elapsed().as_secs_f64(), val_loss, &checkpoint).map(Some)
            }
            _ => Ok(None),
        }
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
        match &mut self.lead {
            None => Ok(()),
            Some(lead) => lead.metrics.append(&event).and_then(|()| lead.reporter.step(&event)),
        }
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
        if let Some(lead) = &mut self.lead {
            lead.metrics.append(&event)?;
            lead.reporter.eval(&event)?;
        }
        Ok(val_loss)
    }

    /// A checkpoint, which all ranks take part in; its folder, on the first.
    fn save(&mut self) -> Result<Option<PathBuf>> {
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
        let dir = self.lead.as_ref().map(|lead| lead.folder.checkpoints());
        let path = checkpoint::save(dir.as_deref(), &self.trainer, &state, self.config.keep_last)?;
        self.saved = Some((step, path.clone()));
        Ok(path)
    }

    /// loss.svg, from the whole history in metrics.jsonl.
    fn draw(&self) -> Result<()> {
        let Some(lead) = &self.lead else { return Ok(()) };
        let rows = lead.folder.read_metrics()?;
        let points = |event: &str, key: &str| {
            let rows = rows.iter().filter(|r| r["event"] == event);
            rows.filter_map(|r| Some((r["step"].as_u64()?, r[key].as_f64()?))).collect()
        };
        let curves = LossCurves {
            title: format!("{} on {}", self.config.preset, self.data),
            train: points("step", "loss"),
            held_out: points("eval", "val_loss"),
        };
        let (path, svg) = (lead.folder.loss_svg(), loss_svg(&curves)?);
        atomic_write(&path, |w| w.write_all(svg.as_bytes()).map_err(|e| Error::io(&path, e)))
    }

    fn finish(self, mut lead: Lead, seconds: f64, val_loss: f64, checkpoint: &Path) -> Result<Summary> {
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
                ("metrics", lead.folder.metrics()),
                ("loss curve", lead.folder.loss_svg()),
                ("settings", lead.folder.config()),
            ],
        };
        lead.reporter.done(&DoneEvent {
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
