//! A run's settings: flags, a TOML file with the same names, defaults.

use super::world::{CommKind, WorldConfig};
use crate::comm::AllToAllKind;
use crate::device::DeviceChoice;
use crate::error::{Error, Result, config_err};
use crate::model::{self, ModelConfig};
use crate::moe::Capacity;
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::moe::order::OrderKind;
use crate::tensor::{DType, Place};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Declares the settings once: as flags, as keys of a TOML file, and as the merge of the two.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $(#[arg($($arg:tt)*)])? $name:ident: $t:ty,)*) => {
        /// What a user may set, each by a flag or by the key of the same name (with `_` for `-`) in a TOML file. What is
        /// not set comes from the preset or the defaults.
        #[derive(clap::Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Settings {
            $(
                $(#[doc = $doc])+
                // A negative number is a value that a rule refuses, not a flag that nobody knows.
                #[arg(long, allow_negative_numbers = true, $($($arg)*)?)]
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $name: Option<$t>,
            )*
        }

        impl Settings {
            /// These settings, completed by `other`'s where they say nothing.
            pub fn or(self, other: Settings) -> Settings {
                Settings { $($name: self.$name.or(other.$name)),* }
            }
        }
    };
}

settings! {
    /// Model: gpt2-moe-tiny, mixtral-tiny (the default), gpt2-moe-small, gpt2-xl-moe, mixtral-8x7b or mixtral-8x22b
    preset: String,
    /// Text to train on: a file, or a folder whose files are read in order; without it, this project's own sources
    data: PathBuf,
    /// Optimizer steps of the whole schedule (300)
    steps: u64,
    /// End early after this many steps, with a checkpoint that --resume goes on from
    stop_at: u64,
    /// Seed of everything random (1)
    seed: u64,
    /// Sequences of a micro-batch (16)
    batch: usize,
    /// Tokens of a sequence (128)
    seq: usize,
    /// Micro-batches whose gradients are accumulated for a step (1)
    accumulate: usize,
    /// Peak learning rate (0.003)
    lr: f64,
    /// The last step's learning rate over the peak's (0.1)
    min_lr_ratio: f64,
    /// Steps of linear warm-up (50, or half of fewer than 100 steps)
    warmup: u64,
    /// Decoupled weight decay, on matrices (0.1)
    weight_decay: f64,
    /// Decay of the first moment (0.9)
    beta1: f64,
    /// Decay of the second moment (0.95)
    beta2: f64,
    /// Added to the root of the second moment (1e-8)
    eps: f64,
    /// Largest global gradient norm; larger ones are scaled down to it (1)
    clip: f64,
    /// Steps between evaluations on held-out text (50)
    eval_every: u64,
    /// Held-out windows of an evaluation (64)
    eval_windows: usize,
    /// Steps between checkpoints; the last step always has one (100)
    save_every: u64,
    /// Checkpoints kept (2)
    keep_last: usize,
    /// Gate: top-k, sigmoid, x-moe, expert-choice or soft
    gate: GateKind,
    /// Order: gshard, tutel or ragged
    order: OrderKind,
    /// Expert: gpt (GELU) or mixtral (SwiGLU)
    expert: ExpertKind,
    /// Experts a token takes
    top_k: usize,
    /// Experts per MoE layer
    experts: usize,
    /// Rows an expert takes over an even share; * drops nothing
    capacity_factor: Capacity,
    /// Weight of the balance loss
    balance_weight: f64,
    /// The balance loss counts first choices only, not all k
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    balance_first_only: bool,
    /// Weight of the z-loss
    z_weight: f64,
    /// Slots go to tokens by descending best probability, not in token order
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    batch_prioritised: bool,
    /// Learned noise on the top-k gate's logits
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    gate_noise: bool,
    /// Rate of the sigmoid gate's selection bias (DeepSeek-V3); 0 has none
    bias_rate: f64,
    /// Routing groups: runs of consecutive tokens routed apart
    routing_groups: usize,
    /// The backward computes the experts' inner products again rather than keeping them
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    recompute: bool,
    /// Dense FFN beside every MoE layer, in multiples of an expert's width
    shared_experts: usize,
    /// MoE in every n-th block
    moe_every: usize,
    /// Blocks
    layers: usize,
    /// Model width M
    hidden: usize,
    /// Query heads
    heads: usize,
    /// Key and value heads
    kv_heads: usize,
    /// Inner width H of an expert
    ffn: usize,
    /// Type of parameters and activations: f32 (the default on the CPU), f64 (CPU only), bf16 (the default on a GPU) or f16
    dtype: DType,
    /// Where to run: cpu, cuda, cuda:N (GPU number N), or auto: a GPU if one works, else the CPU (auto)
    device: DeviceChoice,
    /// Ranks (1; with --comm nccl, as many as the launcher has started)
    ranks: usize,
    /// Nodes that the ranks are on, with as many on each (1; with --comm nccl, as the launcher says)
    nodes: usize,
    /// Data-parallel ranks: has to be the ranks over --mp
    dp: usize,
    /// Ranks that have the same tokens and share the work on them: attention heads, dense FFNs, an MoE layer's tokens (1)
    mp: usize,
    /// Ranks that the experts are divided among (as many as the ranks over --esp and the experts allow)
    ep: usize,
    /// Ranks that each expert's width is divided among (1)
    esp: usize,
    /// All-to-all: direct (the default), 1dh or 2dh
    a2a: AllToAllKind,
    /// Schedule: deepspeed, tutel, tutel-improved, pipemoe-lina, no-iio or fsmoe (the default)
    schedule: String,
    /// Costs that schedules are planned by: fsmoe-paper, or a TOML file; without it, those of these ranks, measured once and
    /// kept in the user's cache
    profile: String,
    /// Measure the ranks' costs anew
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    reprofile: bool,
    /// Neither read nor write the cache of costs and plans
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    no_cache: bool,
    /// How ranks talk: local, threads of this process, or nccl, processes that torchrun, mpirun or srun has started, with a
    /// GPU each (local)
    comm: CommKind,
    /// Seconds that a rank waits for the others (600)
    comm_timeout: u64,
    /// CTAs that a collective of NCCL takes of a GPU at most, 1 to 64 (NCCL's choice)
    comm_ctas: u32,
    /// Where ranks that are processes meet: HOST:PORT, a free port on the host of rank 0 (where the launcher says)
    rendezvous: String,
    /// Ranks that are processes share the GPUs of their host, for testing
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    share_gpu: bool,
    /// Folder for the run; by default runs/PRESET-DATE-TIME
    #[arg(value_name = "DIR")]
    out: PathBuf,
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// If it cannot be read, is not TOML, or has a key or a value that no setting takes; the message has the line.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        toml::from_str(&text).map_err(|e| Error::Config(format!("{}: {}", path.display(), e.to_string().trim_end())))
    }

    /// As TOML.
    ///
    /// # Errors
    /// If a value cannot be written as TOML (an integer above 2⁶³ − 1).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Config(format!("settings as TOML: {e}")))
    }

    /// Where the run will be: what `device` says, and the CPU if it says nothing and the type is one that only the CPU has.
    pub fn place(&self) -> Place {
        match self.device.unwrap_or_default() {
            // What only the CPU does.
            DeviceChoice::Auto if self.dtype == Some(DType::F64) || self.ranks.unwrap_or(1) > 1 => Place::Cpu,
            device => device.place(),
        }
    }

    /// The run these settings mean on the CPU.
    ///
    /// # Errors
    /// As [`Settings::resolve_on`].
    pub fn resolve(&self) -> Result<(TrainConfig, ModelConfig)> {
        self.resolve_on(Place::Cpu)
    }

    /// The run these settings mean on a device: without a word about the type, f32 on the CPU and bf16 on a GPU.
    ///
    /// # Errors
    /// Names the first value that breaks a rule, and the rule.
    pub fn resolve_on(&self, place: Place) -> Result<(TrainConfig, ModelConfig)> {
        let model = self.model()?;
        let train = TrainConfig { world: WorldConfig::of(self, &model)?, ..self.train(place)? };
        let dp = train.world.sizes.dp;
        if !train.batch.is_multiple_of(dp) {
            config_err!("--batch {} with --dp {dp}: each data-parallel rank has as many sequences", train.batch);
        }
        if train.seq > model.max_seq {
            config_err!("--seq {}: {}'s positions end at {}", train.seq, train.preset, model.max_seq);
        }
        Ok((train, model))
    }

    fn train(&self, place: Place) -> Result<TrainConfig> {
        let d = TrainConfig::default();
        let steps = self.steps.unwrap_or(d.steps);
        let config = TrainConfig {
            preset: self.preset.clone().unwrap_or(d.preset),
            steps,
            stop_at: self.stop_at.unwrap_or(steps),
            seed: self.seed.unwrap_or(d.seed),
            batch: self.batch.unwrap_or(d.batch),
            seq: self.seq.unwrap_or(d.seq),
            accumulate: self.accumulate.unwrap_or(d.accumulate),
            lr: self.lr.unwrap_or(d.lr),
            min_lr_ratio: self.min_lr_ratio.unwrap_or(d.min_lr_ratio),
            warmup: self.warmup.unwrap_or(d.warmup.min(steps / 2)),
            weight_decay: self.weight_decay.unwrap_or(d.weight_decay),
            beta1: self.beta1.unwrap_or(d.beta1),
            beta2: self.beta2.unwrap_or(d.beta2),
            eps: self.eps.unwrap_or(d.eps),
            clip: self.clip.unwrap_or(d.clip),
            eval_every: self.eval_every.unwrap_or(d.eval_every),
            eval_windows: self.eval_windows.unwrap_or(d.eval_windows),
            save_every: self.save_every.unwrap_or(d.save_every),
            keep_last: self.keep_last.unwrap_or(d.keep_last),
            dtype: self.dtype.unwrap_or(if place == Place::Cpu { d.dtype } else { DType::BF16 }),
            world: d.world,
        };
        if config.dtype == DType::F64 && place != Place::Cpu {
            config_err!("--dtype f64 on {place}: a GPU's operations take f32, bf16 and f16; or --device cpu");
        }
        config.validate()?;
        Ok(config)
    }

    fn model(&self) -> Result<ModelConfig> {
        let mut model = model::preset(self.preset.as_deref().unwrap_or(&TrainConfig::default().preset))?;
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                *to = value.clone();
            }
        }
        set(&mut model.layers, &self.layers);
        set(&mut model.hidden, &self.hidden);
        set(&mut model.heads, &self.heads);
        // Without a number of its own, a model with another number of heads has one key head per query head.
        if self.heads.is_some() {
            model.kv_heads = model.heads;
        }
        set(&mut model.kv_heads, &self.kv_heads);
        set(&mut model.ffn, &self.ffn);
        set(&mut model.moe_every, &self.moe_every);
        set(&mut model.shared_experts, &self.shared_experts);
        let moe = &mut model.moe;
        set(&mut moe.gate, &self.gate);
        // What a gate needs and nobody has asked otherwise: SoftMoE's mixes take the dense order, and the gates whose
        // experts take a fixed number of rows an even share of them.
        if moe.gate == GateKind::Soft {
            moe.order = OrderKind::GShard;
        }
        if matches!(moe.gate, GateKind::Soft | GateKind::ExpertChoice) {
            moe.capacity = Capacity::Factor(1.0);
        }
        set(&mut moe.order, &self.order);
        set(&mut moe.expert, &self.expert);
        set(&mut moe.top_k, &self.top_k);
        set(&mut moe.experts, &self.experts);
        set(&mut moe.capacity, &self.capacity_factor);
        set(&mut moe.balance_weight, &self.balance_weight);
        set(&mut moe.balance_first_only, &self.balance_first_only);
        set(&mut moe.z_weight, &self.z_weight);
        set(&mut moe.batch_prioritised, &self.batch_prioritised);
        set(&mut moe.gate_noise, &self.gate_noise);
        set(&mut moe.sigmoid.bias_rate, &self.bias_rate);
        set(&mut moe.groups, &self.routing_groups);
        set(&mut moe.recompute, &self.recompute);
        model.validate()?;
        Ok(model)
    }
}

/// A run's settings, complete and checked; the model's are a [`ModelConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// The preset the model comes from.
    pub preset: String,
    /// Optimizer steps of the whole schedule.
    pub steps: u64,
    /// The step after which this run ends; at most `steps`.
    pub stop_at: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// The last step's learning rate over the peak's.
    pub min_lr_ratio: f64,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest global gradient norm.
    pub clip: f64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Held-out windows of an evaluation.
    pub eval_windows: usize,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep_last: usize,
    /// Type of parameters and activations.
    pub dtype: DType,
    /// The ranks that share the work.
    pub world: WorldConfig,
}

impl Default for TrainConfig {
    /// Five minutes at most for a tiny preset on a laptop.
    fn default() -> Self {
        TrainConfig {
            preset: "mixtral-tiny".to_owned(),
            steps: 300,
            stop_at: 300,
            seed: 1,
            batch: 16,
            seq: 128,
            accumulate: 1,
            lr: 3e-3,
            min_lr_ratio: 0.1,
            warmup: 50,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
            eval_every: 50,
            eval_windows: 64,
            save_every: 100,
            keep_last: 2,
            dtype: DType::F32,
            world: WorldConfig::default(),
        }
    }
}

impl TrainConfig {
    fn validate(&self) -> Result<()> {
        for (flag, value) in [
            ("steps", self.steps),
            ("stop-at", self.stop_at),
            ("batch", self.batch as u64),
            ("seq", self.seq as u64),
            ("accumulate", self.accumulate as u64),
            ("eval-every", self.eval_every),
            ("eval-windows", self.eval_windows as u64),
            ("save-every", self.save_every),
            ("keep-last", self.keep_last as u64),
        ] {
            if value == 0 {
                config_err!("--{flag} 0: it is at least 1");
            }
        }
        for (flag, value) in [("steps", self.steps), ("seed", self.seed)] {
            if i64::try_from(value).is_err() {
                config_err!("--{flag} {value}: it is at most {}", i64::MAX);
            }
        }
        // The first product is T, and rows of tokens are indexed by 32 bits on every device.
        let most = i32::MAX as usize;
        if self.batch.checked_mul(self.seq).is_none_or(|tokens| tokens > most) {
            config_err!("--batch {} × --seq {}: a micro-batch has at most {most} tokens", self.batch, self.seq);
        }
        if self.accumulate > most {
            config_err!("--accumulate {}: it is at most {most}", self.accumulate);
        }
        for (flag, value) in [("lr", self.lr), ("eps", self.eps), ("clip", self.clip)] {
            if !(value.is_finite() && value > 0.0) {
                config_err!("--{flag} {value}: it is a finite number above 0");
            }
        }
        for (flag, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                config_err!("--{flag} {value}: it is at least 0 and below 1");
            }
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            config_err!("--weight-decay {}: it is a finite number, at least 0", self.weight_decay);
        }
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            config_err!("--min-lr-ratio {}: it is between 0 and 1", self.min_lr_ratio);
        }
        if !self.dtype.is_float() {
            config_err!("--dtype {}: it is one of f32, f64, bf16, f16", self.dtype);
        }
        if self.stop_at > self.steps {
            config_err!(
                "--stop-at {} of --steps {}: a run ends at the schedule's end at the latest",
                self.stop_at,
                self.steps
            );
        }
        if self.warmup > self.steps {
            config_err!("--warmup {} of --steps {}: the warm-up is part of the schedule", self.warmup, self.steps);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(settings: Settings) -> String {
        settings.resolve().unwrap_err().to_string()
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file: Settings =
            toml::from_str("steps = 7\nbatch = 3\ngate = \"sigmoid\"\ncapacity_factor = \"*\"").unwrap();
        let flags = Settings { steps: Some(9), ..Settings::default() };
        let (train, model) = flags.or(file).resolve().unwrap();
        assert_eq!((train.steps, train.stop_at, train.batch, train.seq), (9, 9, 3, 128));
        assert_eq!((model.moe.gate, model.moe.capacity), (GateKind::Sigmoid, Capacity::Dropless));
    }

    #[test]
    fn what_is_written_reads_back() {
        let settings = Settings {
            steps: Some(5),
            capacity_factor: Some(Capacity::Factor(1.25)),
            dtype: Some(DType::F64),
            gate_noise: Some(true),
            ..Settings::default()
        };
        assert_eq!(toml::from_str::<Settings>(&settings.to_toml().unwrap()).unwrap(), settings);
    }

    #[test]
    fn a_gpu_trains_in_16_bits_unless_told_otherwise() {
        let gpu = Place::Cuda(1);
        let dtype = |settings: &Settings, place| settings.resolve_on(place).map(|(train, _)| train.dtype);
        let base = Settings::default();
        assert_eq!((dtype(&base, Place::Cpu).unwrap(), dtype(&base, gpu).unwrap()), (DType::F32, DType::BF16));
        let wide = Settings { dtype: Some(DType::F32), ..base.clone() };
        assert_eq!(dtype(&wide, gpu).unwrap(), DType::F32);
        let wider = Settings { dtype: Some(DType::F64), ..base.clone() };
        assert_eq!(wider.place(), Place::Cpu);
        let error = dtype(&wider, gpu).unwrap_err().to_string();
        assert!(error.contains("f64") && error.contains("cuda:1"), "{error}");
        let chosen = Settings { device: Some(DeviceChoice::Cuda(2)), ..base };
        assert_eq!(chosen.place(), Place::Cuda(2));
        assert_eq!(toml::from_str::<Settings>("device = \"cuda:2\"").unwrap(), chosen);
        let unknown = toml::from_str::<Settings>("device = \"gpu\"").unwrap_err().to_string();
        assert!(unknown.contains("\"gpu\""), "{unknown}");
    }

    #[test]
    fn bad_values_are_named() {
        let base = Settings::default();
        assert!(refused(Settings { steps: Some(0), ..base.clone() }).contains("--steps 0"));
        assert!(refused(Settings { lr: Some(f64::NAN), ..base.clone() }).contains("--lr NaN"));
        assert!(refused(Settings { beta2: Some(1.0), ..base.clone() }).contains("--beta2 1"));
        assert!(refused(Settings { stop_at: Some(301), ..base.clone() }).contains("--stop-at 301"));
        assert!(refused(Settings { top_k: Some(9), ..base.clone() }).contains("top_k = 9 with 8 experts"));
        assert!(refused(Settings { hidden: Some(130), heads: Some(4), ..base.clone() }).contains("130"));
        assert!(refused(Settings { seq: Some(1000), ..base.clone() }).contains("--seq 1000"));
        assert!(refused(Settings { preset: Some("x".into()), ..base }).contains("mixtral-tiny"));
        let unknown = toml::from_str::<Settings>("speed = 9").unwrap_err().to_string();
        assert!(unknown.contains("speed"), "{unknown}");
        let gate = toml::from_str::<Settings>("gate = \"topk\"").unwrap_err().to_string();
        assert!(gate.contains("expert-choice"), "{gate}");
    }

    /// The settings of a command line.
    fn parsed(args: &[&str]) -> Result<Settings, clap::Error> {
        use clap::{Args, FromArgMatches};
        let command = Settings::augment_args(clap::Command::new("train").no_binary_name(true));
        Settings::from_arg_matches(&command.try_get_matches_from(args)?)
    }

    #[test]
    fn a_negative_number_meets_its_rule() {
        assert_eq!(parsed(&["--lr", "-1"]).unwrap().lr, Some(-1.0));
        assert!(refused(parsed(&["--lr", "-1"]).unwrap()).contains("--lr -1: it is a finite number above 0"));
        let steps = parsed(&["--steps", "-5"]).unwrap_err().to_string();
        assert!(steps.contains("'-5'") && steps.contains("--steps"), "{steps}");
    }

    #[test]
    fn numbers_that_cannot_work_are_refused() {
        let base = Settings::default();
        for (name, settings) in [
            ("balance", Settings { balance_weight: Some(f64::NAN), ..base.clone() }),
            ("z", Settings { z_weight: Some(-1.0), ..base.clone() }),
            ("bias", Settings { bias_rate: Some(f64::INFINITY), ..base.clone() }),
            ("capacity", Settings { capacity_factor: Some(Capacity::Factor(0.0)), ..base.clone() }),
            ("batch", Settings { batch: Some(usize::MAX), ..base.clone() }),
            ("seq", Settings { seq: Some(usize::MAX), ..base }),
        ] {
            assert!(refused(settings).contains(name), "{name}");
        }
    }

    #[test]
    fn a_bad_file_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "steps = 5\nlr = \"fast\"\n").unwrap();
        let error = Settings::read(&path).unwrap_err().to_string();
        assert!(error.contains("run.toml") && error.contains("line 2") && error.contains("lr"), "{error}");
        let missing = Settings::read(&dir.path().join("no.toml")).unwrap_err().to_string();
        assert!(missing.contains("no.toml"), "{missing}");
    }
}
