//! Whole models: shapes, gradients, parameter counts, sampling, bad settings.

use crate::support::{check, indices, uniform, values};
use fsmoe::autograd::{Init, Tape};
use fsmoe::device::Lane;
use fsmoe::model::{Arch, ModelConfig, Sampling, Transformer, generate, preset};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Capacity, MoeConfig, StepContext};
use fsmoe::tensor::{DType, Tensor};

pub(crate) const STEP: StepContext = StepContext { train: false, seed: 0, step: 0, first_token: 0 };

/// A small model of each kind; between them every part of a block.
pub(crate) fn tiny(arch: Arch) -> ModelConfig {
    let (expert, kv_heads) = match arch {
        Arch::Gpt2 => (ExpertKind::Gpt, 4),
        Arch::Mixtral => (ExpertKind::Mixtral, 2),
    };
    ModelConfig {
        arch,
        vocab: 13,
        max_seq: 7,
        layers: 2,
        hidden: 8,
        heads: 4,
        kv_heads,
        ffn: 6,
        moe: MoeConfig { expert, experts: 4, top_k: 2, ..MoeConfig::default() },
        moe_every: if arch == Arch::Gpt2 { 2 } else { 1 },
        tie_embeddings: arch == Arch::Gpt2,
        // Large enough for gradients and routing margins far above rounding.
        init_std: 0.5,
        ..ModelConfig::default()
    }
}

pub(crate) fn build(config: &ModelConfig, dtype: DType) -> Transformer {
    Transformer::new(&Init::new(&Lane::cpu(), dtype, 3), config).unwrap()
}

/// `n` token ids of the model's vocabulary.
pub(crate) fn tokens(config: &ModelConfig, seed: u64, n: usize) -> Vec<i32> {
    uniform(seed, n).iter().map(|u| ((u + 1.0) / 2.0 * config.vocab as f64) as i32).collect()
}

/// The logits of `batch` sequences, evaluated.
pub(crate) fn logits(model: &Transformer, ids: &[i32], batch: usize) -> Tensor {
    let tape = Tape::inference(&Lane::cpu());
    let out = model.forward(&tape, &indices(ids), batch, ids.len() / batch, STEP).unwrap();
    out.logits.value().clone()
}

const ARCHS: [Arch; 2] = [Arch::Gpt2, Arch::Mixtral];

#[test]
fn forward_shapes_and_finite_values() {
    let lane = Lane::cpu();
    for arch in ARCHS {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let config = tiny(arch);
            let model = build(&config, dtype);
            let ids = tokens(&config, 1, 10);
            let tape = Tape::new(&lane);
            let (loss, out) = model.loss(&tape, &indices(&ids), &indices(&ids), 2, 5, STEP).unwrap();
            assert_eq!(out.logits.value().shape().dims(), [10, config.vocab]);
            assert_eq!(out.logits.value().dtype(), dtype);
            assert_eq!(out.routings.len(), config.moe_layers());
            for t in [out.logits.value(), loss.value(), out.aux_loss.value()] {
                let seen = values(&lane.cast(t, DType::F64).unwrap());
                assert!(seen.iter().all(|v| v.is_finite()), "{arch:?} {dtype}: {seen:?}");
            }
            let balance: f64 = out.routings.iter().map(|r| r.stats(&lane).unwrap().balance_loss).sum();
            let aux = lane.scalar(out.aux_loss.value()).unwrap();
            assert!(aux > 0.0 && (aux - config.moe.balance_weight * balance).abs() < 1e-6 * aux, "{aux} of {balance}");
        }
    }
}

#[test]
fn gradients_of_whole_models() {
    for arch in ARCHS {
        for shared_experts in [0, 1] {
            let config = ModelConfig { shared_experts, tie_embeddings: shared_experts == 1, ..tiny(arch) };
            let model = build(&config, DType::F64);
            let (ids, targets) = (indices(&tokens(&config, 1, 6)), indices(&tokens(&config, 2, 6)));
            let name = format!("{arch:?}, {shared_experts} shared experts");
            check(&name, &[], &model.parameters(), |tape, _| {
                let (loss, out) = model.loss(tape, &ids, &targets, 2, 3, STEP)?;
                Ok(vec![loss, out.aux_loss])
            });
        }
    }
}

#[test]
fn later_tokens_change_nothing_before_them() {
    for arch in ARCHS {
        let config = tiny(arch);
        let model = build(&config, DType::F64);
        let mut ids = tokens(&config, 1, 6);
        let before = values(&logits(&model, &ids, 1));
        ids[4] = (ids[4] + 1) % config.vocab as i32;
        let after = values(&logits(&model, &ids, 1));
        let boundary = 4 * config.vocab;
        // Another routing can change how a product over an expert's rows is blocked.
        assert!(before[..boundary].iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-12), "{arch:?}");
        assert!(before[boundary..].iter().zip(&after[boundary..]).any(|(a, b)| (a - b).abs() > 1e-3), "{arch:?}");
    }
}

#[test]
fn sequences_of_a_batch_are_independent() {
    for arch in ARCHS {
        let config = tiny(arch);
        let model = build(&config, DType::F64);
        let ids = tokens(&config, 1, 10);
        let together = values(&logits(&model, &ids, 2));
        let apart = [&ids[..5], &ids[5..]].map(|ids| values(&logits(&model, ids, 1))).concat();
        assert!(together.iter().zip(&apart).all(|(a, b)| (a - b).abs() < 1e-12), "{arch:?}");
    }
}

#[test]
fn counted_parameters_are_those_that_are_built() {
    let mut configs = Vec::new();
    for arch in ARCHS {
        for gate in GateKind::ALL {
            let base = tiny(arch);
            let (capacity, order) = match gate {
                GateKind::Soft => (Capacity::Factor(1.0), OrderKind::GShard),
                GateKind::ExpertChoice => (Capacity::Factor(1.0), OrderKind::Tutel),
                _ => (Capacity::Dropless, OrderKind::Tutel),
            };
            configs.push(ModelConfig { moe: MoeConfig { gate: *gate, capacity, order, ..base.moe.clone() }, ..base });
        }
        for shared_experts in [1, 2] {
            let tie_embeddings = shared_experts == 2;
            configs.push(ModelConfig { shared_experts, tie_embeddings, layers: 5, moe_every: 2, ..tiny(arch) });
        }
        let base = tiny(arch);
        configs.push(ModelConfig { moe: MoeConfig { gate_noise: true, ..base.moe.clone() }, ..base });
    }
    for config in configs {
        let built: usize = build(&config, DType::F32).parameters().iter().map(|p| p.elements()).sum();
        assert_eq!(config.total_parameters(), built as u64, "{config:?}");
    }
    let tiny = preset("mixtral-tiny").unwrap();
    let idle = (8 - 2) * 4 * 3 * 128 * 256;
    assert_eq!(tiny.total_parameters() - tiny.active_parameters(), idle);
}

#[test]
fn flops_are_six_per_active_matrix_parameter_and_attention() {
    let config = preset("mixtral-8x7b").unwrap();
    let matrices = config.active_parameters() as f64 - 32_000.0 * 4096.0;
    let attention = 6.0 * 4096.0 * 4096.0 * 32.0;
    assert_eq!(config.flops_per_token(4096), 6.0 * matrices + attention);
}

#[test]
fn parameter_names_are_unique_and_hugging_faces() {
    for (arch, expected) in [
        (Arch::Gpt2, ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.attn.c_attn.weight"]),
        (
            Arch::Mixtral,
            ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.block_sparse_moe.gate.weight", "lm_head.weight"],
        ),
    ] {
        let parameters = build(&tiny(arch), DType::F32).parameters();
        let mut names: Vec<&str> = parameters.iter().map(|p| p.name()).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(expected.iter().all(|name| names.contains(name)), "{names:?}");
    }
}

#[test]
fn settings_that_do_not_fit_are_named_with_the_rule() {
    let base = tiny(Arch::Mixtral);
    let with_moe = |moe: MoeConfig| ModelConfig { moe, ..base.clone() };
    for (config, parts) in [
        (ModelConfig { heads: 3, ..base.clone() }, ["hidden = 8", "3 heads"]),
        (ModelConfig { kv_heads: 3, ..base.clone() }, ["heads = 4", "3 kv_heads"]),
        (ModelConfig { heads: 8, ..base.clone() }, ["here 1", "even"]),
        (ModelConfig { layers: 0, ..base.clone() }, ["layers = 0", "at least 1"]),
        (ModelConfig { moe_every: 3, ..base.clone() }, ["moe_every = 3", "2 layers"]),
        (ModelConfig { rope_theta: f64::NAN, ..base.clone() }, ["rope_theta = NaN", "above 0"]),
        (with_moe(MoeConfig { top_k: 5, ..base.moe.clone() }), ["top_k = 5", "4 experts"]),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(Transformer::new(&Init::new(&Lane::cpu(), DType::F32, 0), &config).is_err());
    }
}

#[test]
fn token_counts_that_do_not_fit_are_named() {
    let config = tiny(Arch::Mixtral);
    let model = build(&config, DType::F32);
    let tape = Tape::inference(&Lane::cpu());
    for (ids, batch, seq, part) in [
        (vec![], 0, 5, "0 sequences"),
        (vec![], 1, 0, "0 tokens"),
        (vec![0; 8], 1, 8, "max_seq = 7"),
        (vec![0; 5], 2, 3, "2 sequences of 3"),
        (vec![99; 2], 1, 2, "99"),
    ] {
        let error = model.forward(&tape, &indices(&ids), batch, seq, STEP).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// The most probable continuation of `prompt` by one forward per token.
fn greedy_by_forward(model: &Transformer, prompt: &[i32], count: usize) -> Vec<i32> {
    let mut all = prompt.to_vec();
    for _ in 0..count {
        let out = values(&logits(model, &all, 1));
        let last = &out[out.len() - model.config().vocab..];
        let best = (0..last.len()).fold(0, |best, t| if last[t] > last[best] { t } else { best });
        all.push(best as i32);
    }
    all.split_off(prompt.len())
}

fn sampled(model: &Transformer, prompt: &[i32], count: usize, sampling: Sampling) -> Vec<i32> {
    let mut out = Vec::new();
    let each = |token| {
        out.push(token);
        Ok(())
    };
    generate(&Lane::cpu(), model, prompt, count, sampling, each).unwrap();
    out
}

const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0, context: usize::MAX };

#[test]
fn cached_generation_agrees_with_whole_forwards() {
    for arch in ARCHS {
        for shared_experts in [0, 1] {
            let config = ModelConfig { max_seq: 40, layers: 3, shared_experts, ..tiny(arch) };
            let model = build(&config, DType::F64);
            let prompt = tokens(&config, 1, 3);
            let expected = greedy_by_forward(&model, &prompt, 37);
            let distinct = expected.iter().collect::<std::collections::BTreeSet<_>>().len();
            assert!(distinct > 2, "a continuation that tells nothing: {expected:?}");
            assert_eq!(sampled(&model, &prompt, 37, GREEDY), expected, "{arch:?}");
        }
    }
}

#[test]
fn generation_goes_on_past_the_context() {
    for arch in ARCHS {
        let config = tiny(arch);
        let model = build(&config, DType::F64);
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 5, context: usize::MAX };
        for prompt in [1, 7, 20] {
            let prompt = tokens(&config, 1, prompt);
            let text = sampled(&model, &prompt, 30, sampling);
            assert_eq!(text, sampled(&model, &prompt, 30, sampling));
            assert_ne!(text, sampled(&model, &prompt, 30, Sampling { seed: 6, ..sampling }));
            // Only the end of a prompt that is too long is seen.
            let seen = &prompt[prompt.len().saturating_sub(7)..];
            assert_eq!(text, sampled(&model, seen, 30, sampling));
            // And of that, as much as is asked for.
            let short = Sampling { context: 3, ..sampling };
            let seen = &prompt[prompt.len().saturating_sub(3)..];
            assert_eq!(sampled(&model, &prompt, 30, short), sampled(&model, seen, 30, short));
        }
    }
}

#[test]
fn a_gate_that_sees_other_tokens_generates_by_whole_forwards() {
    let base = tiny(Arch::Mixtral);
    let moe = MoeConfig { gate: GateKind::ExpertChoice, capacity: Capacity::Factor(1.0), ..base.moe.clone() };
    let model = build(&ModelConfig { moe, ..base }, DType::F64);
    assert!(model.sees_other_tokens());
    assert_eq!(sampled(&model, &[1, 2], 5, GREEDY), greedy_by_forward(&model, &[1, 2], 5));
    assert_eq!(sampled(&model, &[1, 2], 12, GREEDY).len(), 12);
}

#[test]
fn prompts_that_cannot_be_continued_are_refused() {
    let config = tiny(Arch::Mixtral);
    let model = build(&config, DType::F32);
    for (prompt, part) in [(&[][..], "empty prompt"), (&[1, 13], "token 13"), (&[-1], "token -1")] {
        let error = generate(&Lane::cpu(), &model, prompt, 1, GREEDY, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
