//! Blocks and logits against Hugging Face's transformers, in float64; `tests/golden/hf_models.py` made the values.
//!
//! A block's file holds `in.x` (B, L, M), `in.dy`, `in.NAME` for every parameter, `y`, `grad.x` and `grad.NAME`, with the
//! block's own parameter names and experts stacked; `heads`, `kv_heads`, `top_k` and `rope_theta` are metadata.

use crate::model::{STEP, logits};
use crate::support::values;
use fsmoe::autograd::{Init, Tape};
use fsmoe::device::{Gelu, Lane};
use fsmoe::model::checkpoint::{TensorFile, load, write_tensors};
use fsmoe::model::{Arch, Block, ModelConfig};
use fsmoe::moe::MoeConfig;
use fsmoe::moe::expert::ExpertKind;
use fsmoe::tensor::{DType, Tensor};
use std::path::PathBuf;

const TOLERANCE: f64 = 1e-9;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[track_caller]
fn near(what: &str, seen: &Tensor, expected: &Tensor) {
    assert_eq!(seen.elements(), expected.elements(), "{what}");
    let (seen, expected) = (values(seen), values(expected));
    let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    assert!(largest > 0.0, "{what}: a reference of zeros shows nothing");
    let off = seen.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, |m, v| if v > m || v.is_nan() { v } else { m });
    assert!(off / largest < TOLERANCE, "{what}: off by {:.1e} of its largest element", off / largest);
}

/// Gives the first block of a model with `config`, its sizes still to be set, the file's weights, and compares its output
/// and all gradients.
fn check_block(file: &str, config: ModelConfig) {
    let lane = Lane::cpu();
    let file = TensorFile::open(&golden(file)).unwrap();
    let number = |key: &str| file.metadata()[key].parse::<usize>().unwrap();
    let x = file.read("in.x").unwrap();
    let (batch, seq, hidden) = (x.dim(0), x.dim(1), x.dim(2));
    let config = ModelConfig { hidden, heads: number("heads"), kv_heads: number("kv_heads"), ..config };
    let block = Block::new(&Init::zeros(&lane, DType::F64), &config, 0).unwrap();
    for p in block.parameters() {
        let given = file.read(&format!("in.{}", p.name())).unwrap();
        assert_eq!(given.shape(), p.value().shape(), "{}", p.name());
        lane.copy(&given, p.value()).unwrap();
    }

    let tape = Tape::new(&lane);
    let input = tape.leaf(x.reshape([batch * seq, hidden]).unwrap());
    let out = block.forward(&tape, &input, batch, seq, STEP).unwrap();
    near("y", out.y.value(), &file.read("y").unwrap());
    let dy = file.read("in.dy").unwrap().reshape([batch * seq, hidden]).unwrap();
    let grads = tape.backward(&[(&out.y, dy)]).unwrap();
    near("grad.x", grads.get(&input).unwrap(), &file.read("grad.x").unwrap());
    for p in block.parameters() {
        let name = format!("grad.{}", p.name());
        near(&name, p.grad(), &file.read(&name).unwrap());
    }
}

#[test]
fn mixtral_block() {
    const FILE: &str = "hf_mixtral_block.safetensors";
    let file = TensorFile::open(&golden(FILE)).unwrap();
    let stack = file.info("in.block_sparse_moe.experts.w1").unwrap().1;
    let top_k = file.metadata()["top_k"].parse().unwrap();
    let moe = MoeConfig { expert: ExpertKind::Mixtral, experts: stack[0], top_k, ..MoeConfig::default() };
    let rope_theta = file.metadata()["rope_theta"].parse().unwrap();
    check_block(FILE, ModelConfig { arch: Arch::Mixtral, ffn: stack[1], moe, rope_theta, ..ModelConfig::default() });
}

#[test]
fn gpt2_block() {
    const FILE: &str = "hf_gpt2_block.safetensors";
    let ffn = TensorFile::open(&golden(FILE)).unwrap().info("in.mlp.c_fc.weight").unwrap().1[1];
    let moe = MoeConfig { expert: ExpertKind::Gpt, gelu: Gelu::Tanh, ..MoeConfig::default() };
    // With experts in every second block, the first is GPT-2's own.
    check_block(FILE, ModelConfig { arch: Arch::Gpt2, ffn, moe, moe_every: 2, ..ModelConfig::default() });
}

#[test]
fn a_saved_mixtral_has_the_same_logits() {
    let model = load(&golden("hf_tiny_mixtral"), &Lane::cpu(), DType::F64).unwrap();
    let file = TensorFile::open(&golden("hf_tiny_mixtral_logits.safetensors")).unwrap();
    let ids = file.read("ids").unwrap();
    let expected = file.read("logits").unwrap();
    near("logits", &logits(&model, &ids.to_vec::<i32>().unwrap(), ids.dim(0)), &expected);
}

/// The other way round, for `hf_load_check.py` to compare: logits, as fsmoe computes them, beside the weights of the
/// checkpoint `FSMOE_CHECKPOINT`.
#[test]
#[ignore = "writes the input of tests/golden/hf_load_check.py: set FSMOE_CHECKPOINT to a checkpoint's folder"]
fn logits_for_transformers() {
    let dir = PathBuf::from(std::env::var("FSMOE_CHECKPOINT").unwrap());
    let lane = Lane::cpu();
    let model = load(&dir, &lane, DType::F64).unwrap();
    let ids: Vec<i32> = (0..96).map(|i| (i * i + 7 * i) % model.config().vocab as i32).collect();
    let expected = logits(&model, &ids, 2).reshape([2, 48, model.config().vocab]).unwrap();
    let ids = Tensor::from_slice(&ids, [2, 48]).unwrap();
    let tensors = vec![("input_ids".to_owned(), ids), ("logits".to_owned(), expected)];
    write_tensors(&dir.join("expected_logits.safetensors"), &lane, &tensors).unwrap();
}
