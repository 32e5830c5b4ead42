//! Text from a model: one token after the other, drawn from its predictions.

use super::Transformer;
use super::transformer::SequenceCache;
use crate::autograd::Tape;
use crate::device::Lane;
use crate::error::{Error, Result, config_err};
use crate::moe::StepContext;
use crate::rng::{Counter, Purpose};
use crate::tensor::{DType, Tensor};

/// How the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Only the most probable tokens that together reach this probability are drawn from (Holtzman et al. 2020); 1: all.
    pub top_p: f64,
    /// The same seed, model and prompt give the same tokens.
    pub seed: u64,
    /// Tokens that the model looks back at; beyond its `max_seq` it cannot. A model that was trained on shorter sequences
    /// has never seen later positions, and does better without them.
    pub context: usize,
}

impl Sampling {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the first value that breaks a rule, and the rule.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            config_err!("temperature = {}: it is a finite number, at least 0", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            config_err!("top_p = {}: it is above 0 and at most 1", self.top_p);
        }
        if self.context == 0 {
            config_err!("context = 0: the model looks at one token at least");
        }
        Ok(())
    }

    /// The token drawn as number `index`.
    fn draw(&self, logits: &[f64], index: u64) -> Result<usize> {
        if let Some((token, value)) = logits.iter().enumerate().find(|(_, l)| !l.is_finite()) {
            return Err(Error::Numeric(format!("the logit of token {token} is {value} at generated token {index}")));
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Stable, so ties go to the lowest token.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        if self.temperature == 0.0 {
            return Ok(order[0]);
        }
        let top = logits[order[0]];
        let weights: Vec<f64> = order.iter().map(|&t| ((logits[t] - top) / self.temperature).exp()).collect();
        let nucleus = self.top_p * weights.iter().sum::<f64>();
        let mut reached = 0.0;
        let kept = weights.iter().position(|w| {
            reached += w;
            reached >= nucleus
        });
        // Rounding can keep the sum just below a top_p of 1.
        let weights = &weights[..kept.map_or(weights.len(), |last| last + 1)];
        let rng = Counter { seed: self.seed, purpose: Purpose::Sample, step: 0 };
        let mut left = rng.uniform(index) * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(order[drawn.unwrap_or(weights.len() - 1)])
    }
}

/// Continues `prompt` by `count` tokens, which `each` is given as they come. The model sees at most the last
/// [`Sampling::context`] of them.
///
/// Keys and values are cached; when they fill the context, they are computed anew for its later half, so what the model
/// sees then varies between half of the context and all of it. A gate that sees other tokens rules a cache out, and every token costs
/// a forward of the whole context.
///
/// # Errors
/// If the prompt is empty or has an id outside the vocabulary, a setting is out of range, the logits are not finite, the
/// device fails, or `each` does.
pub fn generate(
    lane: &Lane,
    model: &Transformer,
    prompt: &[i32],
    count: usize,
    sampling: Sampling,
    mut each: impl FnMut(i32) -> Result<()>,
) -> Result<()> {
    sampling.validate()?;
    let vocab = model.config().vocab;
    if prompt.is_empty() {
        config_err!("an empty prompt: a model continues at least one token");
    }
    if let Some(id) = prompt.iter().find(|&&id| id < 0 || id as usize >= vocab) {
        config_err!("token {id} in the prompt: the vocabulary is 0..{vocab}");
    }
    let mut tokens = prompt.to_vec();
    let mut context = Context::new(lane, model, sampling.context)?;
    for index in 0..count {
        let logits = context.next_logits(&tokens)?;
        let token = sampling.draw(&logits, index as u64)? as i32;
        tokens.push(token);
        each(token)?;
    }
    Ok(())
}

/// The model at the end of a growing sequence.
struct Context<'a> {
    lane: &'a Lane,
    model: &'a Transformer,
    cache: SequenceCache,
    /// Tokens of the sequence that have been given to the cache or left out.
    done: usize,
    /// The most tokens that the model sees.
    most: usize,
}

impl<'a> Context<'a> {
    fn new(lane: &'a Lane, model: &'a Transformer, most: usize) -> Result<Self> {
        Ok(Context { lane, model, cache: model.cache(lane)?, done: 0, most: most.min(model.config().max_seq) })
    }

    /// The logits after all of `tokens`, which begin with those of the call before.
    fn next_logits(&mut self, tokens: &[i32]) -> Result<Vec<f64>> {
        let logits = if self.model.sees_other_tokens() { self.forward(tokens)? } else { self.decode(tokens)? };
        self.lane.to_host(&self.lane.cast(&logits, DType::F64)?)?.to_vec()
    }

    fn forward(&self, tokens: &[i32]) -> Result<Tensor> {
        let window = &tokens[tokens.len().saturating_sub(self.most)..];
        let tape = Tape::inference(self.lane);
        let out = self.model.forward(&tape, &self.ids(window)?, 1, window.len(), evaluation(0))?;
        out.logits.value().index(window.len() - 1)
    }

    fn decode(&mut self, tokens: &[i32]) -> Result<Tensor> {
        if self.cache.len() + tokens.len() - self.done > self.most {
            // A prompt that is too long keeps all the model can see; a sequence that has grown out of it, half of that.
            let kept = if self.done == 0 { self.most } else { self.most.div_ceil(2) };
            self.cache.clear();
            self.done = tokens.len() - kept;
        }
        let mut logits = None;
        for token in &tokens[self.done..] {
            let step = evaluation(self.cache.len() as u64);
            logits =
                Some(self.model.decode(self.lane, &self.ids(std::slice::from_ref(token))?, &mut self.cache, step)?);
        }
        self.done = tokens.len();
        logits.ok_or_else(|| Error::Shape("no token was added to the sequence".to_owned()))
    }

    fn ids(&self, tokens: &[i32]) -> Result<Tensor> {
        self.lane.to_device(&Tensor::from_slice(tokens, [tokens.len()])?)
    }
}

/// No noise, no statistics.
fn evaluation(first_token: u64) -> StepContext {
    StepContext { train: false, seed: 0, step: 0, first_token }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f64; 4] = [1.0, 3.0, 2.0, 3.0];

    fn frequencies(sampling: Sampling) -> [f64; 4] {
        const DRAWS: u64 = 20_000;
        let mut counts = [0.0; 4];
        for i in 0..DRAWS {
            counts[sampling.draw(&LOGITS, i).unwrap()] += 1.0 / DRAWS as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_most_probable() {
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1, context: 1 };
        assert_eq!(sampling.draw(&LOGITS, 7).unwrap(), 1);
        assert!(sampling.draw(&[0.0, f64::NAN], 3).unwrap_err().to_string().contains("token 1 is NaN"));
    }

    #[test]
    fn tokens_come_as_often_as_they_are_probable() {
        let temperature = 0.7;
        let weights = LOGITS.map(|l| (l / temperature).exp());
        let sum: f64 = weights.iter().sum();
        let seen = frequencies(Sampling { temperature, top_p: 1.0, seed: 3, context: 1 });
        for (f, w) in seen.iter().zip(weights) {
            assert!((f - w / sum).abs() < 0.015, "{seen:?}");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_that_reaches_top_p() {
        // Probabilities are 0.06, 0.40, 0.15, 0.40.
        let seen = |top_p| frequencies(Sampling { temperature: 1.0, top_p, seed: 3, context: 1 }).map(|f| f > 0.0);
        assert_eq!(seen(0.3), [false, true, false, false]);
        assert_eq!(seen(0.7), [false, true, false, true]);
        assert_eq!(seen(0.9), [false, true, true, true]);
        assert_eq!(seen(1.0), [true; 4]);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        for (temperature, top_p, context, rule) in [
            (-1.0, 1.0, 1, "temperature = -1"),
            (1.0, 0.0, 1, "top_p = 0"),
            (1.0, 1.5, 1, "1.5"),
            (1.0, 1.0, 0, "context = 0"),
        ] {
            let error = Sampling { temperature, top_p, seed: 0, context }.validate().unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
    }
}
