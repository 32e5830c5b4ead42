//! What a run says while it runs: a bar for people, JSON lines for programs.

use crate::error::{Error, Result};
use crate::report::{DeviceUse, count, seconds};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// A step, as `--json` and metrics.jsonl have it.
#[derive(Clone, Debug, Serialize)]
pub struct StepEvent {
    /// `step`.
    pub event: &'static str,
    /// Steps done, this one included.
    pub step: u64,
    /// Mean cross-entropy, nats per byte.
    pub loss: f64,
    /// Of this step.
    pub tokens_per_s: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Balance loss before its weight, mean over layers.
    pub balance_loss: f64,
    /// Dropped choices over all choices.
    pub dropped_fraction: f64,
}

/// An evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct EvalEvent {
    /// `eval`.
    pub event: &'static str,
    /// Steps done.
    pub step: u64,
    /// Mean cross-entropy on held-out text, nats per byte.
    pub val_loss: f64,
}

/// The end of a run.
#[derive(Clone, Debug, Serialize)]
pub struct DoneEvent {
    /// `done`.
    pub event: &'static str,
    /// Steps done.
    pub steps: u64,
    /// Mean training loss of the last steps.
    pub train_loss: f64,
    /// Held-out loss.
    pub val_loss: f64,
    /// Dropped choices over all choices of the last steps.
    pub dropped_fraction: f64,
    /// Tokens per second of training.
    pub tokens_per_s: f64,
    /// The last checkpoint.
    pub checkpoint: String,
    /// What the run made of a device apart from the host; left out on the CPU.
    #[serde(flatten)]
    pub device: Option<DeviceUse>,
}

/// Says what happens in a run.
pub struct Reporter {
    json: Option<Box<dyn Write + Send>>,
    bar: ProgressBar,
    /// Where no terminal shows a bar: when the next line is due.
    plain: Option<(Instant, u64)>,
    total: u64,
}

impl Reporter {
    /// For steps `start` to `total`. With `json`, JSON lines go to it, one per event; everything else goes to stderr.
    pub fn new(json: Option<Box<dyn Write + Send>>, start: u64, total: u64) -> Self {
        let bar = ProgressBar::new(total);
        bar.set_position(start);
        // What was done before this run says nothing about how long the rest takes.
        bar.reset_eta();
        let style = ProgressStyle::with_template("{bar:32.cyan/238} {pos}/{len}  {msg}  {eta} left");
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━━─"));
        }
        let plain = (!std::io::stderr().is_terminal()).then(|| (Instant::now(), start));
        Reporter { json, bar, plain, total }
    }

    fn line(&mut self, event: &impl Serialize) -> Result<()> {
        let Some(out) = &mut self.json else { return Ok(()) };
        let text = serde_json::to_string(event).map_err(|e| Error::Config(format!("an event as JSON: {e}")))?;
        writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|e| Error::io("standard output", e))
    }

    /// A step was done.
    ///
    /// # Errors
    /// If the JSON line cannot be written (a closed pipe).
    pub fn step(&mut self, e: &StepEvent) -> Result<()> {
        self.bar.set_message(format!("loss {:.4}  {} tokens/s", e.loss, count(e.tokens_per_s)));
        self.bar.set_position(e.step);
        if let Some((since, first)) = self.plain
            && (e.step.is_multiple_of((self.total / 20).max(1)) || e.step == self.total)
        {
            let left = since.elapsed().as_secs_f64() / (e.step - first).max(1) as f64 * (self.total - e.step) as f64;
            let (rate, left) = (count(e.tokens_per_s), seconds(left));
            eprintln!("step {}/{}  loss {:.4}  {rate} tokens/s  {left} left", e.step, self.total, e.loss);
        }
        self.line(e)
    }

    /// The held-out loss was measured.
    ///
    /// # Errors
    /// As [`Reporter::step`].
    pub fn eval(&mut self, e: &EvalEvent) -> Result<()> {
        self.note(&format!("step {}: held-out loss {:.4} nats per byte", e.step, e.val_loss));
        self.line(e)
    }

    /// Something a person should know.
    pub fn note(&self, text: &str) {
        if self.plain.is_some() { eprintln!("{text}") } else { self.bar.println(text) }
    }

    /// The run has ended; takes the bar away.
    ///
    /// # Errors
    /// As [`Reporter::step`].
    pub fn done(&mut self, e: &DoneEvent) -> Result<()> {
        self.bar.finish_and_clear();
        self.line(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>, bool);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.1 {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn event(loss: f64) -> StepEvent {
        StepEvent {
            event: "step",
            step: 3,
            loss,
            tokens_per_s: 10.0,
            lr: 0.1,
            grad_norm: 1.0,
            balance_loss: 1.0,
            dropped_fraction: 0.0,
        }
    }

    #[test]
    fn json_lines() {
        let out = Shared::default();
        let mut r = Reporter::new(Some(Box::new(out.clone())), 0, 10);
        r.step(&event(2.5)).unwrap();
        r.step(&event(f64::NAN)).unwrap();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let rows: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((rows[0]["event"].as_str(), rows[0]["loss"].as_f64()), (Some("step"), Some(2.5)));
        assert!(rows[1]["loss"].is_null());
    }

    #[test]
    fn a_closed_pipe_is_an_error() {
        let mut r = Reporter::new(Some(Box::new(Shared(Arc::default(), true))), 0, 10);
        assert!(r.step(&event(1.0)).unwrap_err().to_string().contains("standard output"));
    }
}
