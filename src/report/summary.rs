//! The table at the end of a run.

use super::{Align, Table, bytes, count, load_bars, percent, seconds};
use std::fmt;
use std::path::PathBuf;

/// What a run made of a device apart from the host.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct DeviceUse {
    /// Where, and its maker's name for it.
    pub device: String,
    /// The most that was in tensors at one time.
    pub peak_memory_bytes: u64,
    /// All the device has.
    pub device_memory_bytes: u64,
    /// The model's FLOP/s in training: those of one forward and backward per token, nothing recomputed counted.
    pub useful_flops_per_s: f64,
    /// FLOP/s of a large matrix product in the run's type, timed after the run.
    pub ceiling_flops_per_s: f64,
    /// The one over the other.
    pub share_of_ceiling: f64,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// The model's preset.
    pub preset: String,
    /// What was trained on.
    pub data: String,
    /// All parameters.
    pub total_parameters: u64,
    /// Parameters a token meets.
    pub active_parameters: u64,
    /// Steps done, of the schedule's.
    pub steps: (u64, u64),
    /// Tokens seen in this run.
    pub tokens: u64,
    /// Seconds of this run, evaluation included.
    pub seconds: f64,
    /// Tokens per second of training, evaluation left out.
    pub tokens_per_s: f64,
    /// Mean training loss of the last steps, nats per byte.
    pub train_loss: f64,
    /// Held-out loss, nats per byte.
    pub val_loss: f64,
    /// Dropped choices over all choices of the last steps.
    pub dropped_fraction: f64,
    /// Choices per expert over the last steps, per MoE layer.
    pub loads: Vec<Vec<u64>>,
    /// Of the gates' probabilities, nats, mean over layers and the last steps.
    pub entropy: f64,
    /// What the run made of its device; none on the CPU.
    pub device: Option<DeviceUse>,
    /// Files written: what, and where.
    pub files: Vec<(&'static str, PathBuf)>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut t = Table::new(&[Align::Left, Align::Left]);
        let bits = self.val_loss / std::f64::consts::LN_2;
        t.row([
            "model",
            &format!(
                "{}, {} parameters, {} active per token",
                self.preset,
                count(self.total_parameters as f64),
                count(self.active_parameters as f64)
            ),
        ]);
        t.row(["data", &self.data]);
        t.row(["steps", &format!("{} of {}, {} tokens", self.steps.0, self.steps.1, count(self.tokens as f64))]);
        t.row(["time", &format!("{}, {} tokens/s", seconds(self.seconds), count(self.tokens_per_s))]);
        if let Some(d) = &self.device {
            let (peak, all) = (bytes(d.peak_memory_bytes as f64), bytes(d.device_memory_bytes as f64));
            t.row(["device", &d.device]);
            t.row(["memory", &format!("at most {peak} of {all}")]);
            let [useful, ceiling] = [d.useful_flops_per_s, d.ceiling_flops_per_s].map(|f| f / 1e12);
            let share = percent(d.share_of_ceiling);
            t.row(["useful work", &format!("{useful:.1} TFLOP/s, {share} of a matrix product's {ceiling:.0}")]);
        }
        t.row(["training loss", &format!("{:.4} nats per byte", self.train_loss)]);
        t.row([
            "held-out loss",
            &format!("{:.4} nats per byte ({bits:.3} bits, perplexity {:.2})", self.val_loss, self.val_loss.exp()),
        ]);
        t.row(["dropped choices", &percent(self.dropped_fraction)]);
        t.row(["gate entropy", &format!("{:.3} nats", self.entropy)]);
        for (layer, loads) in self.loads.iter().enumerate() {
            for (i, line) in load_bars(loads).into_iter().enumerate() {
                t.row([if i == 0 { format!("load, MoE layer {}", layer + 1) } else { String::new() }, line]);
            }
        }
        for (what, path) in &self.files {
            t.row([*what, &path.display().to_string()]);
        }
        t.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_its_rows() {
        let device = DeviceUse {
            device: "cuda:0, a GPU".into(),
            peak_memory_bytes: 3 << 30,
            device_memory_bytes: 80 << 30,
            useful_flops_per_s: 2e14,
            ceiling_flops_per_s: 8e14,
            share_of_ceiling: 0.25,
        };
        let text = Summary { device: Some(device), ..Summary::default() }.to_string();
        for part in ["cuda:0, a GPU", "at most 3.00 GiB of 80.0 GiB", "200.0 TFLOP/s, 25.0 % of a matrix product's 800"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!Summary::default().to_string().contains("TFLOP/s"));
    }
}
