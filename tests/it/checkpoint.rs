//! Checkpoints: what is saved comes back, Hugging Face's folders load, and broken ones are refused by name.

use crate::model::{build, logits, tiny, tokens};
use crate::support::{bits, random, uniform};
use fsmoe::autograd::Init;
use fsmoe::device::Lane;
use fsmoe::model::checkpoint::{
    TensorFile, Whole, load, load_as, load_into, read_config, write, write_tensors, write_wholes,
};
use fsmoe::model::{Arch, ModelConfig, Transformer};
use fsmoe::moe::MoeConfig;
use fsmoe::moe::gate::{GateKind, SigmoidOptions};
use fsmoe::tensor::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A saved model and its folder.
fn saved(config: &ModelConfig, dtype: DType) -> (TempDir, Transformer) {
    let dir = TempDir::new().unwrap();
    let model = build(config, dtype);
    write(dir.path(), &Lane::cpu(), &model).unwrap();
    (dir, model)
}

/// All tensors of a file, by name.
fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let file = TensorFile::open(path).unwrap();
    file.names().map(|name| (name.to_owned(), file.read(name).unwrap())).collect()
}

/// Every weight and buffer, by name.
fn weights(model: &Transformer) -> BTreeMap<String, Vec<u64>> {
    let parameters = model.parameters().into_iter().map(|p| (p.name().to_owned(), p.value().clone()));
    parameters.chain(model.buffers()).map(|(name, t)| (name, bits(&t))).collect()
}

/// Another model of the same settings: other weights.
fn other(config: &ModelConfig, dtype: DType) -> Transformer {
    Transformer::new(&Init::new(&Lane::cpu(), dtype, 99), config).unwrap()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut value = json_of(&path);
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

pub(crate) fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = dir.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &Lane::cpu(), &tensors.into_iter().collect::<Vec<_>>()).unwrap();
}

#[test]
fn what_is_saved_comes_back_to_the_bit() {
    let lane = Lane::cpu();
    for arch in [Arch::Gpt2, Arch::Mixtral] {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            for shared_experts in [0, 2] {
                let config = ModelConfig { shared_experts, moe_every: 1 + shared_experts / 2, ..tiny(arch) };
                let (dir, model) = saved(&config, dtype);
                assert_ne!(weights(&other(&config, dtype)), weights(&model));
                let back = load(dir.path(), &lane, dtype).unwrap();
                assert_eq!(back.config(), &config);
                assert_eq!(weights(&back), weights(&model));
                let ids = tokens(&config, 1, 6);
                assert_eq!(bits(&logits(&back, &ids, 1)), bits(&logits(&model, &ids, 1)));
            }
        }
    }
}

#[test]
fn weights_are_converted_on_the_way() {
    let lane = Lane::cpu();
    let config = tiny(Arch::Mixtral);
    let (dir, model) = saved(&config, DType::F32);
    let narrow = load(dir.path(), &lane, DType::BF16).unwrap();
    for (p, q) in model.parameters().iter().zip(narrow.parameters()) {
        assert_eq!(bits(&lane.cast(p.value(), DType::BF16).unwrap()), bits(q.value()));
    }
    // 16 bits on disk come back exactly, in either width.
    write(dir.path(), &lane, &narrow).unwrap();
    assert_eq!(weights(&load(dir.path(), &lane, DType::BF16).unwrap()), weights(&narrow));
    assert_eq!(weights(&load(dir.path(), &lane, DType::F32).unwrap()), weights(&narrow));
    assert_eq!(json_of(&dir.path().join("config.json"))["torch_dtype"], "bfloat16");
}

#[test]
fn a_selection_bias_is_kept() {
    let lane = Lane::cpu();
    let base = tiny(Arch::Mixtral);
    let sigmoid = SigmoidOptions { bias_rate: 0.1, ..SigmoidOptions::default() };
    let moe = MoeConfig { gate: GateKind::Sigmoid, sigmoid, ..base.moe.clone() };
    let config = ModelConfig { moe, ..base };
    let model = build(&config, DType::F32);
    assert_eq!(model.buffers().len(), 2);
    for (i, (_, buffer)) in model.buffers().iter().enumerate() {
        let values: Vec<f32> = uniform(i as u64, buffer.elements()).iter().map(|v| *v as f32).collect();
        buffer.write(&values).unwrap();
    }
    let dir = TempDir::new().unwrap();
    write(dir.path(), &lane, &model).unwrap();
    assert_eq!(weights(&load(dir.path(), &lane, DType::F32).unwrap()), weights(&model));
}

#[test]
fn experts_are_apart_on_disk_under_mixtrals_names() {
    let config = tiny(Arch::Mixtral);
    let (dir, model) = saved(&config, DType::F32);
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    assert_eq!((length % 8, &header["__metadata__"]), (0, &json!({"format": "pt"})));
    let tensors = read_tensors(&path);
    let stack = model.parameters().into_iter().find(|p| p.name().ends_with("layers.1.block_sparse_moe.experts.w2"));
    let stack = stack.unwrap();
    for j in 0..4 {
        let one = &tensors[&format!("model.layers.1.block_sparse_moe.experts.{j}.w2.weight")];
        assert_eq!(one.shape().dims(), [config.hidden, config.ffn]);
        assert_eq!(bits(one), bits(&stack.value().index(j).unwrap()));
    }
    // Embedding, last norm and head; per layer two norms, four projections, a router and three matrices an expert.
    assert_eq!(tensors.len(), 3 + 2 * (2 + 4 + 1 + 4 * 3));
}

#[test]
fn config_json_is_transformers_where_it_computes_the_same() {
    let config = ModelConfig { rope_theta: 5e5, ..tiny(Arch::Mixtral) };
    let (dir, _) = saved(&config, DType::F32);
    let seen = json_of(&dir.path().join("config.json"));
    for (field, value) in [
        ("architectures", json!(["MixtralForCausalLM"])),
        ("model_type", json!("mixtral")),
        ("vocab_size", json!(13)),
        ("hidden_size", json!(8)),
        ("intermediate_size", json!(6)),
        ("num_hidden_layers", json!(2)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("num_local_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
        ("max_position_embeddings", json!(7)),
        ("hidden_act", json!("silu")),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(5e5)),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5})),
        ("tie_word_embeddings", json!(false)),
        ("sliding_window", Value::Null),
        ("torch_dtype", json!("float32")),
        ("dtype", json!("float32")),
    ] {
        assert_eq!(seen.get(field), Some(&value), "{field}");
    }
    let sigmoid = MoeConfig { gate: GateKind::Sigmoid, ..config.moe.clone() };
    for foreign in [
        tiny(Arch::Gpt2),
        ModelConfig { shared_experts: 1, ..config.clone() },
        ModelConfig { moe_every: 2, ..config.clone() },
        ModelConfig { moe: MoeConfig { normalise_weights: Some(false), ..config.moe.clone() }, ..config.clone() },
        ModelConfig { moe: sigmoid, ..config.clone() },
    ] {
        let (dir, _) = saved(&foreign, DType::F32);
        assert_eq!(json_of(&dir.path().join("config.json"))["model_type"], "fsmoe", "{foreign:?}");
        assert_eq!(read_config(dir.path()).unwrap(), foreign);
    }
}

#[test]
fn a_folder_of_transformers_loads_as_it_is() {
    let lane = Lane::cpu();
    let config = ModelConfig { rope_theta: 5e5, ..tiny(Arch::Mixtral) };
    let (dir, model) = saved(&config, DType::F32);
    // Weights in two shards with an index.
    let single = dir.path().join("model.safetensors");
    let tensors = read_tensors(&single);
    fs::remove_file(single).unwrap();
    let mut map = BTreeMap::new();
    for (i, name) in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate() {
        let part: Vec<(String, Tensor)> = tensors.clone().into_iter().skip(i).step_by(2).collect();
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        write_tensors(&dir.path().join(name), &lane, &part).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();

    let theta = |v: &mut Value, four: Value, five: Value| {
        v.as_object_mut().unwrap().remove("fsmoe");
        v["rope_theta"] = four;
        v["rope_parameters"] = five;
        v["transformers_version"] = json!("any");
    };
    let four = |v: &mut Value| theta(v, json!(5e5), Value::Null);
    let five = |v: &mut Value| theta(v, Value::Null, json!({"rope_type": "default", "rope_theta": 5e5}));
    let window = |v: &mut Value| v["sliding_window"] = json!(5);
    let edits: [&dyn Fn(&mut Value); 2] = [&four, &five];
    for edit in edits {
        edit_config(dir.path(), edit);
        let back = load(dir.path(), &lane, DType::F32).unwrap();
        let expected = MoeConfig { normalise_weights: Some(true), ..config.moe.clone() };
        assert_eq!(back.config(), &ModelConfig { moe: expected, ..config.clone() });
        assert_eq!(weights(&back), weights(&model));
    }
    edit_config(dir.path(), window);
    assert_eq!(read_config(dir.path()).unwrap().max_seq, 5);
}

#[test]
fn other_settings_can_be_given_that_take_the_same_tensors() {
    let lane = Lane::cpu();
    let config = tiny(Arch::Mixtral);
    let (dir, model) = saved(&config, DType::F32);
    let mut other = read_config(dir.path()).unwrap();
    other.moe.top_k = 1;
    let other = load_as(dir.path(), &lane, DType::F32, &other).unwrap();
    assert_eq!(weights(&other), weights(&model));
    let ids = tokens(&config, 1, 6);
    assert_ne!(bits(&logits(&other, &ids, 1)), bits(&logits(&model, &ids, 1)));
}

/// Breaks a fresh checkpoint with `edit`, and asserts that loading it fails with an error that has all of `parts`, and
/// leaves the model it would have changed as it was.
#[track_caller]
fn refused(edit: impl FnOnce(&Path), parts: &[&str]) {
    let lane = Lane::cpu();
    let config = tiny(Arch::Mixtral);
    let (dir, _) = saved(&config, DType::F32);
    edit(dir.path());
    let error = load(dir.path(), &lane, DType::F32).err().expect("loaded a broken checkpoint").to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    assert!(error.contains(dir.path().to_str().unwrap()), "no path: {error}");

    let target = other(&config, DType::F32);
    let before = weights(&target);
    if load_into(dir.path(), &lane, &target).is_err() {
        assert_eq!(weights(&target), before);
    }
}

/// Removes our own settings, so that transformers' are read, and changes a field of those.
fn theirs(field: &'static str, value: Value) -> impl FnOnce(&Path) {
    move |dir| {
        edit_config(dir, |v| {
            v.as_object_mut().unwrap().remove("fsmoe");
            v[field] = value;
        });
    }
}

#[test]
fn folders_that_are_no_model_are_refused() {
    refused(|dir| fs::remove_file(dir.join("config.json")).unwrap(), &["config.json", "No such file"]);
    refused(|dir| fs::write(dir.join("config.json"), "{").unwrap(), &["config.json", "not the configuration"]);
    refused(theirs("model_type", json!("llama")), &["config.json", "\"llama\"", "\"mixtral\""]);
    refused(theirs("model_type", Value::Null), &["config.json", "no model_type"]);
    refused(theirs("hidden_act", json!("gelu")), &["config.json", "hidden_act \"gelu\"", "silu"]);
    refused(theirs("head_dim", json!(16)), &["config.json", "head_dim = 16", "hidden_size = 8"]);
    refused(theirs("rope_scaling", json!({"type": "yarn"})), &["config.json", "\"yarn\""]);
    refused(theirs("num_attention_heads", json!(3)), &["config.json", "3 heads"]);
    refused(theirs("hidden_size", json!("8")), &["config.json", "invalid type"]);
    refused(|dir| edit_config(dir, |v| v["fsmoe"]["layer"] = json!(2)), &["config.json", "unknown field `layer`"]);
    refused(|dir| edit_config(dir, |v| v["fsmoe"]["moe"]["top_k"] = json!(9)), &["config.json", "top_k = 9"]);
}

#[test]
fn broken_weight_files_are_refused() {
    const FILE: &str = "model.safetensors";
    let cut = |keep: fn(usize) -> usize| {
        move |dir: &Path| {
            let mut bytes = fs::read(dir.join(FILE)).unwrap();
            bytes.truncate(keep(bytes.len()));
            fs::write(dir.join(FILE), bytes).unwrap();
        }
    };
    refused(|dir| fs::remove_file(dir.join(FILE)).unwrap(), &["neither model.safetensors nor"]);
    refused(cut(|n| n - 1), &[FILE, "truncated"]);
    refused(cut(|n| n / 2), &[FILE, "truncated"]);
    refused(cut(|_| 100), &[FILE, "truncated"]);
    refused(cut(|_| 3), &[FILE, "truncated"]);
    refused(cut(|_| 0), &[FILE, "truncated"]);
    refused(|dir| fs::write(dir.join(FILE), "once upon a time, in a land").unwrap(), &[FILE, "no safetensors file"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";
    const EXPERT: &str = "model.layers.0.block_sparse_moe.experts.3.w1.weight";
    let put = |name: &'static str, t: Tensor| {
        move |dir: &Path| edit_tensors(dir, |all| std::mem::drop(all.insert(name.to_owned(), t)))
    };
    let remove = |name: &'static str| move |dir: &Path| edit_tensors(dir, |all| std::mem::drop(all.remove(name)));
    refused(remove(GATE), &["model.safetensors", GATE, "(4, 8)", "missing"]);
    refused(remove(EXPERT), &["model.safetensors", EXPERT, "(6, 8)", "missing"]);
    refused(put(GATE, random(1, [8, 4])), &["model.safetensors", GATE, "(8, 4)", "(4, 8)"]);
    refused(put(EXPERT, random(1, [6, 9])), &["model.safetensors", EXPERT, "(6, 9)", "(6, 8)"]);
    refused(
        put(GATE, Tensor::host_zeros([4, 8], DType::I32)),
        &["model.safetensors", GATE, "i32 (4, 8), expected f32 (4, 8)"],
    );
    refused(put("model.extra", random(1, [1])), &["model.safetensors", "1 tensors", "model.extra"]);
}

#[test]
fn broken_indices_are_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    let index = |text: Value| {
        move |dir: &Path| {
            fs::rename(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
            fs::copy(dir.join("a.safetensors"), dir.join("b.safetensors")).unwrap();
            fs::write(dir.join(INDEX), text.to_string()).unwrap();
        }
    };
    refused(index(json!({"weights": {}})), &[INDEX, "weight_map"]);
    refused(index(json!({"weight_map": {"x": "a.safetensors", "y": "c.safetensors"}})), &[INDEX, "c.safetensors"]);
    refused(index(json!({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})), &["b.safetensors", "as well"]);
}

#[test]
fn tensors_of_every_type_come_back() {
    let lane = Lane::cpu();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("state.safetensors");
    let base = random(3, [3, 5]);
    let mut tensors: Vec<(String, Tensor)> = [DType::BF16, DType::F16, DType::F32, DType::F64]
        .into_iter()
        .map(|d| (format!("m.{d}"), lane.cast(&base, d).unwrap()))
        .collect();
    tensors.push(("ids".into(), Tensor::from_slice(&[1, -2, i32::MAX], [3]).unwrap()));
    tensors.push(("view".into(), base.transpose(0, 1).unwrap()));
    tensors.push(("none".into(), Tensor::host([0, 4], DType::F32)));
    tensors.push(("scalar".into(), random(4, [])));
    write_tensors(&path, &lane, &tensors).unwrap();
    let back = read_tensors(&path);
    assert_eq!(back.len(), tensors.len());
    for (name, t) in &tensors {
        assert_eq!((back[name].shape(), back[name].dtype()), (t.shape(), t.dtype()));
        if t.dtype().is_float() {
            assert_eq!(bits(&back[name]), bits(t), "{name}");
        } else {
            assert_eq!(back[name].to_vec::<i32>().unwrap(), t.to_vec::<i32>().unwrap());
        }
    }
    // A failed write leaves the file that was there.
    let twice = vec![tensors[0].clone(), tensors[3].clone(), ("m.bf16".into(), base)];
    let error = write_tensors(&path, &lane, &twice).unwrap_err().to_string();
    assert!(error.contains("two tensors are named m.bf16"), "{error}");
    assert_eq!(read_tensors(&path).len(), tensors.len());

    // Into tensors of other float types, all or nothing.
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
    let zeros = |(name, t): &(String, Tensor)| {
        let dtype = if t.dtype().is_float() { DType::F64 } else { t.dtype() };
        (name.clone(), Tensor::host_zeros(*t.shape(), dtype))
    };
    let targets: Vec<(String, Tensor)> = tensors.iter().map(zeros).collect();
    file.check(&Whole::of(&targets)).unwrap();
    file.read_into(&lane, &targets).unwrap();
    assert_eq!(bits(&targets[0].1), bits(&tensors[0].1));
    let error = file.check(&Whole::of(&targets[1..])).unwrap_err().to_string();
    assert!(error.contains("1 tensors that are not expected: m.bf16"), "{error}");
}

/// Whoever writes has one whole tensor at a time, in the file's order, and a failure in the middle leaves what was there.
#[test]
fn tensors_are_written_one_at_a_time() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("t.safetensors");
    let tensors: Vec<(String, Tensor)> =
        ["c", "a", "b"].iter().zip(1..).map(|(name, seed)| ((*name).to_owned(), random(seed, [2, 3]))).collect();
    let mut asked = Vec::new();
    let give = &mut |i: usize| {
        asked.push(i);
        Lane::cpu().to_host(&tensors[i].1)
    };
    write_wholes(&path, &Whole::of(&tensors), give).unwrap();
    assert_eq!(asked, [1, 2, 0]);
    let back = read_tensors(&path);
    tensors.iter().for_each(|(name, t)| assert_eq!(bits(&back[name]), bits(t)));
    let fail = &mut |i: usize| match i {
        0 => Err(fsmoe::Error::Config("rank 3 is gone".into())),
        _ => Lane::cpu().zeros([2, 3], tensors[i].1.dtype()),
    };
    let error = write_wholes(&path, &Whole::of(&tensors), fail).unwrap_err().to_string();
    assert!(error.contains("rank 3 is gone"), "{error}");
    assert_eq!(bits(&read_tensors(&path)["a"]), bits(&tensors[1].1));
    let other = &mut |_| Lane::cpu().zeros([3, 2], DType::F64);
    let error = write_wholes(&path, &Whole::of(&tensors), other).unwrap_err().to_string();
    assert!(error.contains("(3, 2)") && error.contains("(2, 3)"), "{error}");
}
