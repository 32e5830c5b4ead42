//! Every differentiable operation against finite differences in f64, and the tape's own rules.

use crate::support::{bits, check, indices, parameter, random, uniform, values, worst_error};
use fsmoe::Result;
use fsmoe::autograd::{Parameter, Tape, Var};
use fsmoe::device::{AttentionShape, Gelu, Lane, Rope};
use fsmoe::tensor::{DType, Layout, Place, Storage, Tensor};
use std::sync::Arc;

/// Checks an operation of several inputs: all of them leaves, all of them parameters, and each the only one that needs
/// a gradient.
fn check_op(name: &str, inputs: &[Tensor], f: impl Fn(&Tape, &[Var]) -> Result<Var>) {
    check(name, inputs, &[], |tape, x| Ok(vec![f(tape, x)?]));

    let params: Vec<Parameter> = inputs.iter().enumerate().map(|(i, t)| parameter(&format!("p{i}"), t)).collect();
    check(&format!("{name}, parameters"), &[], &params, |tape, _| {
        let vars: Vec<Var> = params.iter().map(|p| tape.param(p)).collect();
        Ok(vec![f(tape, &vars)?])
    });

    for i in 0..inputs.len() {
        check(&format!("{name}, input {i} alone"), &inputs[i..=i], &[], |tape, x| {
            let mut vars: Vec<Var> = inputs.iter().map(|t| tape.constant(t.clone())).collect();
            vars[i] = x[0].clone();
            Ok(vec![f(tape, &vars)?])
        });
    }
}

/// [`check_op`] on random inputs of these shapes.
fn check_shapes(name: &str, shapes: &[&[usize]], f: impl Fn(&Tape, &[Var]) -> Result<Var>) {
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| random(i as u64 + 1, *s)).collect();
    check_op(&format!("{name} {shapes:?}"), &inputs, f);
}

#[test]
fn matmul() {
    let shapes: [[&[usize]; 2]; 7] = [
        [&[3, 4], &[4, 5]],
        [&[1, 1], &[1, 1]],
        [&[17, 9], &[9, 3]],
        [&[2, 3, 4], &[2, 4, 5]],
        [&[2, 3, 2, 4], &[2, 3, 4, 2]],
        [&[2, 3, 4], &[4, 5]],
        [&[2, 2, 3, 4], &[4, 2]],
    ];
    for s in shapes {
        check_shapes("matmul", &s, |t, x| t.matmul(&x[0], &x[1]));
    }
}

#[test]
fn matmul_of_transposed_views() {
    check_shapes("aᵀ·b", &[&[4, 3], &[4, 5]], |t, x| t.matmul(&t.transpose(&x[0], 0, 1)?, &x[1]));
    check_shapes("a·bᵀ", &[&[3, 4], &[5, 4]], |t, x| t.matmul(&x[0], &t.transpose(&x[1], 0, 1)?));
    check_shapes("aᵀ·bᵀ", &[&[2, 4, 3], &[2, 5, 4]], |t, x| {
        t.matmul(&t.transpose(&x[0], 1, 2)?, &t.transpose(&x[1], 1, 2)?)
    });
    check_shapes("aᵀ·b, one b", &[&[2, 4, 3], &[4, 5]], |t, x| t.matmul(&t.transpose(&x[0], 1, 2)?, &x[1]));
    // Heads brought to the front, as attention written out has them.
    check_shapes("heads", &[&[2, 5, 3, 4], &[2, 5, 3, 4]], |t, x| {
        let (q, k) = (t.transpose(&x[0], 1, 2)?, t.transpose(&x[1], 1, 2)?);
        t.matmul(&q, &t.transpose(&k, 2, 3)?)
    });
}

#[test]
fn linear() {
    for x in [&[4][..], &[3, 4], &[2, 3, 4]] {
        check_shapes("linear", &[x, &[5, 4]], |t, x| t.linear(&x[0], &x[1], None));
        check_shapes("linear, bias", &[x, &[5, 4], &[5]], |t, x| t.linear(&x[0], &x[1], Some(&x[2])));
    }
    check_shapes("linear of a transposed x", &[&[4, 3], &[5, 4], &[5]], |t, x| {
        t.linear(&t.transpose(&x[0], 0, 1)?, &x[1], Some(&x[2]))
    });
    check_shapes("linear of a narrowed x", &[&[2, 3, 6], &[5, 4]], |t, x| {
        t.linear(&t.narrow(&x[0], 2, 1, 4)?, &x[1], None)
    });
    check_shapes("linear by a transposed w", &[&[3, 4], &[4, 5]], |t, x| {
        t.linear(&x[0], &t.transpose(&x[1], 0, 1)?, None)
    });
}

#[test]
fn add_and_mul() {
    let shapes: [[&[usize]; 2]; 5] =
        [[&[7], &[7]], [&[3, 4], &[3, 4]], [&[3, 4], &[4]], [&[2, 3, 4], &[3, 4]], [&[130, 2], &[2]]];
    for s in shapes {
        check_shapes("add", &s, |t, x| t.add(&x[0], &x[1]));
        check_shapes("mul", &s, |t, x| t.mul(&x[0], &x[1]));
    }
    check_shapes("add of a view", &[&[3, 4], &[4, 3]], |t, x| t.add(&x[0], &t.transpose(&x[1], 0, 1)?));
    check_shapes("mul of a view", &[&[4, 3], &[3, 4]], |t, x| t.mul(&t.transpose(&x[0], 0, 1)?, &x[1]));
    check_shapes("mul by a repeated view", &[&[5, 3, 4], &[4, 3]], |t, x| t.mul(&x[0], &t.transpose(&x[1], 0, 1)?));
}

#[test]
fn scale_sum_and_cast() {
    for s in [&[5][..], &[3, 4], &[2, 65, 3]] {
        check_shapes("scale", &[s], |t, x| t.scale(&x[0], -2.5));
        check_shapes("sum", &[s], |t, x| t.sum(&x[0]));
        check_shapes("cast to its own type", &[s], |t, x| t.cast(&x[0], DType::F64));
    }
    check_shapes("sum of a view", &[&[3, 4]], |t, x| t.sum(&t.transpose(&x[0], 0, 1)?));
    check_shapes("scale of a view", &[&[3, 4]], |t, x| t.scale(&t.transpose(&x[0], 0, 1)?, 3.0));
}

#[test]
fn cast_rounds_forward_and_returns_the_gradient_in_the_first_type() {
    let lane = Lane::cpu();
    let tape = Tape::new(&lane);
    let x = tape.leaf(Tensor::from_slice(&[1.0f64, 0.1, -3.0], [3]).unwrap());
    let y = tape.cast(&x, DType::F32).unwrap();
    assert_eq!(y.value().to_vec::<f32>().unwrap(), [1.0, 0.1, -3.0]);
    let dy = Tensor::from_slice(&[0.5f32, 2.0, 0.3], [3]).unwrap();
    let grads = tape.backward(&[(&y, dy)]).unwrap();
    assert_eq!(values(grads.get(&x).unwrap()), [0.5, 2.0, f64::from(0.3f32)]);
}

#[test]
fn views() {
    check_shapes("reshape", &[&[3, 4]], |t, x| t.reshape(&x[0], [2, 6]));
    check_shapes("reshape of a transposed view", &[&[3, 4]], |t, x| t.reshape(&t.transpose(&x[0], 0, 1)?, [12]));
    check_shapes("transpose", &[&[2, 3, 4]], |t, x| t.transpose(&x[0], 0, 2));
    check_shapes("narrow, first", &[&[5, 3]], |t, x| t.narrow(&x[0], 0, 1, 3));
    check_shapes("narrow, last", &[&[2, 3, 5]], |t, x| t.narrow(&x[0], 2, 3, 2));
    check_shapes("split, first", &[&[5, 3]], |t, x| {
        let parts = t.split(&x[0], 0, &[2, 1, 2])?;
        t.mul(&parts[0], &parts[2])
    });
    check_shapes("split, last, a part used twice", &[&[2, 3, 7]], |t, x| {
        let parts = t.split(&x[0], 2, &[3, 1, 3])?;
        t.add(&t.mul(&parts[0], &parts[0])?, &parts[2])
    });
    check_shapes("narrow twice, overlapping", &[&[4, 3]], |t, x| {
        t.mul(&t.narrow(&x[0], 0, 0, 3)?, &t.narrow(&x[0], 0, 1, 3)?)
    });
}

#[test]
fn softmax_and_sigmoid() {
    for s in [&[6][..], &[3, 5], &[2, 3, 7], &[4, 1]] {
        check_shapes("sigmoid", &[s], |t, x| t.sigmoid(&x[0]));
        // Ten times as large: rows near one-hot. A row of one has gradient zero.
        check_shapes("softmax", &[s], |t, x| t.softmax(&t.scale(&x[0], 10.0)?));
    }
    check_shapes("softmax of a view", &[&[3, 5]], |t, x| t.softmax(&t.transpose(&x[0], 0, 1)?));
}

#[test]
fn normalise() {
    for (r, n) in [(1, 3), (5, 4), (3, 70)] {
        let positive: Vec<f64> = uniform(3, r * n).iter().map(|v| v + 1.1).collect();
        let positive = Tensor::from_slice(&positive, [r, n]).unwrap();
        check_op("normalise_sum", &[positive], |t, x| t.normalise_sum(&x[0], 2.5, 1e-3));
        check_shapes("normalise_l2", &[&[r, n]], |t, x| t.normalise_l2(&x[0], 1e-6));
        // Every row is shorter than this eps, which then divides in its place.
        check_shapes("normalise_l2, short rows", &[&[r, n]], |t, x| t.normalise_l2(&x[0], 100.0));
    }
    check_shapes("normalise_l2, rank 3", &[&[2, 3, 4]], |t, x| t.normalise_l2(&x[0], 1e-6));
}

#[test]
fn norms() {
    for s in [&[1, 8][..], &[5, 6], &[2, 3, 10], &[130, 3]] {
        let m = &s[s.len() - 1..];
        check_shapes("layer_norm", &[s, m, m], |t, x| t.layer_norm(&x[0], &x[1], &x[2], 1e-5));
        check_shapes("rms_norm", &[s, m], |t, x| t.rms_norm(&x[0], &x[1], 1e-5));
    }
    check_shapes("layer_norm of a view", &[&[6, 5], &[6], &[6]], |t, x| {
        t.layer_norm(&t.transpose(&x[0], 0, 1)?, &x[1], &x[2], 1e-5)
    });
    check_shapes("rms_norm of a view", &[&[6, 5], &[6]], |t, x| t.rms_norm(&t.transpose(&x[0], 0, 1)?, &x[1], 1e-5));
}

#[test]
fn gelu_and_swiglu() {
    for s in [&[9][..], &[3, 4], &[2, 3, 5]] {
        for form in [Gelu::Erf, Gelu::Tanh] {
            check_shapes(&format!("gelu {form:?}"), &[s], |t, x| t.gelu(form, &t.scale(&x[0], 3.0)?));
        }
        check_shapes("swiglu", &[s, s], |t, x| t.swiglu(&t.scale(&x[0], 3.0)?, &x[1]));
    }
    check_shapes("swiglu of halves", &[&[2, 3, 8]], |t, x| {
        t.swiglu(&t.narrow(&x[0], 2, 0, 4)?, &t.narrow(&x[0], 2, 4, 4)?)
    });
    check_shapes("swiglu of transposed views", &[&[3, 4], &[3, 4]], |t, x| {
        t.swiglu(&t.transpose(&x[0], 0, 1)?, &t.transpose(&x[1], 0, 1)?)
    });
}

#[test]
fn rows_by_index() {
    let ids = indices(&[3, 0, 3, 3, 6]);
    check_shapes("embedding", &[&[7, 4]], |t, x| t.embedding(&ids, &x[0]));
    let index = indices(&[2, -1, 0, 2, 4, -1]);
    check_shapes("gather_rows", &[&[5, 3]], |t, x| t.gather_rows(&x[0], &index));
    check_shapes("scatter_rows", &[&[6, 3]], |t, x| t.scatter_rows(&x[0], &index, 5));
    check_shapes("gather_rows of a view", &[&[3, 5]], |t, x| t.gather_rows(&t.transpose(&x[0], 0, 1)?, &index));
    check_shapes("scatter_rows of a view", &[&[3, 6]], |t, x| t.scatter_rows(&t.transpose(&x[0], 0, 1)?, &index, 5));
}

#[test]
fn rope() {
    for (shape, first) in [([1, 1, 1, 2], 0), ([2, 3, 2, 6], 0), ([1, 4, 3, 8], 11)] {
        check_shapes("rope", &[&shape], |t, x| t.rope(&x[0], Rope { theta: 100.0, first }));
    }
    check_shapes("rope of a view", &[&[2, 2, 3, 4]], |t, x| {
        t.rope(&t.transpose(&x[0], 1, 2)?, Rope { theta: 100.0, first: 1 })
    });
}

#[test]
fn attention() {
    for (batch, seq, heads, kv_heads, head_dim) in
        [(1, 1, 1, 1, 2), (2, 5, 2, 2, 3), (2, 4, 4, 2, 3), (1, 6, 6, 1, 2), (1, 70, 2, 1, 2)]
    {
        let shape = AttentionShape { batch, seq, heads, kv_heads, head_dim };
        let (q, kv) = ([batch * seq, heads * head_dim], [batch * seq, kv_heads * head_dim]);
        check_shapes("attention", &[&q, &kv, &kv], |t, x| {
            t.attention(shape, &t.scale(&x[0], 3.0)?, &t.scale(&x[1], 3.0)?, &x[2])
        });
    }
    let shape = AttentionShape { batch: 2, seq: 3, heads: 4, kv_heads: 2, head_dim: 4 };
    check_shapes("attention of (B, L, H, D) after rope", &[&[2, 3, 4, 4], &[2, 3, 2, 4], &[2, 3, 2, 4]], |t, x| {
        let rope = Rope { theta: 100.0, first: 0 };
        t.attention(shape, &t.rope(&x[0], rope)?, &t.rope(&x[1], rope)?, &x[2])
    });
    // Query, key and value out of one projection, as GPT-2 has them.
    let shape = AttentionShape { batch: 2, seq: 3, heads: 2, kv_heads: 2, head_dim: 2 };
    check_shapes("attention of a split projection", &[&[6, 12]], |t, x| {
        let part = |i: usize| t.narrow(&x[0], 1, 4 * i, 4);
        t.attention(shape, &part(0)?, &part(1)?, &part(2)?)
    });
}

#[test]
fn cross_entropy() {
    let targets = indices(&[2, 0, 4, 2]);
    check_shapes("cross_entropy", &[&[4, 5]], |t, x| t.cross_entropy(&t.scale(&x[0], 4.0)?, &targets));
    check_shapes("cross_entropy of a view", &[&[5, 4]], |t, x| t.cross_entropy(&t.transpose(&x[0], 0, 1)?, &targets));
    let many = indices(&(0..70).map(|n| n % 3).collect::<Vec<i32>>());
    check_shapes("cross_entropy", &[&[70, 3]], |t, x| t.cross_entropy(&x[0], &many));
    // The loss's own gradient is passed on.
    check_shapes("half of cross_entropy", &[&[4, 5]], |t, x| t.scale(&t.cross_entropy(&x[0], &targets)?, 0.5));
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    check_shapes("x·x", &[&[3, 4]], |t, x| t.mul(&x[0], &x[0]));
    check_shapes("x + x", &[&[3, 4]], |t, x| t.add(&x[0], &x[0]));
    check_shapes("x·xᵀ", &[&[3, 4]], |t, x| t.matmul(&x[0], &t.transpose(&x[0], 0, 1)?));
    check_shapes("x used four times", &[&[4]], |t, x| {
        let s = t.add(&t.sigmoid(&x[0])?, &t.mul(&x[0], &x[0])?)?;
        t.add(&s, &x[0])
    });
}

#[test]
fn a_diamond_and_several_outputs() {
    let inputs = [random(1, [3, 4]), random(2, [4, 4])];
    check("diamond", &inputs, &[], |t, x| {
        let h = t.matmul(&x[0], &x[1])?;
        let (left, right) = (t.sigmoid(&h)?, t.softmax(&h)?);
        Ok(vec![t.add(&t.mul(&left, &right)?, &h)?])
    });
    let p = parameter("w", &inputs[1]);
    check("two outputs, one shared parameter", &inputs[..1], std::slice::from_ref(&p), |t, x| {
        let w = t.param(&p);
        let h = t.linear(&x[0], &w, None)?;
        let tied = t.embedding(&indices(&[1, 3]), &w)?;
        Ok(vec![t.gelu(Gelu::Erf, &h)?, t.mul(&tied, &tied)?, t.sum(&h)?])
    });
}

#[test]
fn a_wrong_backward_is_caught() {
    let inputs = [random(1, [3, 4])];
    let scaled = |factor: f64| {
        worst_error(&inputs, &[], |t, x| {
            let y = t.lane().empty_like(x[0].value())?;
            t.lane().axpby(2.0, x[0].value(), 0.0, &y)?;
            Ok(vec![t.record1(&[&x[0]], y, move |lane, dy| {
                let dx = lane.empty_like(dy)?;
                lane.axpby(factor, &lane.contiguous(dy)?, 0.0, &dx)?;
                Ok(vec![Some(dx)])
            })])
        })
        .0
    };
    assert!(scaled(2.0) < 1e-9);
    let wrong = scaled(2.00001);
    assert!((wrong - 5e-6).abs() < 1e-8, "a factor wrong by 5e-6 is measured as {wrong}");
    assert!(scaled(f64::NAN).is_nan());

    // A parameter's gradient that replaces what was there.
    let p = parameter("p", &inputs[0]);
    let (error, name) = worst_error(&[], std::slice::from_ref(&p), |t, _| {
        let (v, q) = (t.param(&p), p.clone());
        Ok(vec![t.record1(&[&v], v.value().clone(), move |lane, dy| {
            lane.copy(dy, q.grad())?;
            Ok(vec![None])
        })])
    });
    assert!(error > 0.1 && name == "p", "{name}: {error}");

    // A gradient left out.
    let (error, _) =
        worst_error(&inputs, &[], |t, x| Ok(vec![t.record1(&[&x[0]], x[0].value().clone(), |_, _| Ok(vec![None]))]));
    assert_eq!(error, 1.0);
}

#[test]
fn no_gradient_flows_to_constants_unused_leaves_or_off_the_tape() {
    let lane = Lane::cpu();
    let tape = Tape::new(&lane);
    let (a, b) = (tape.leaf(random(1, [3])), tape.constant(random(2, [3])));
    let unused = tape.leaf(random(3, [3]));
    let dead_end = tape.sigmoid(&unused).unwrap();
    let y = tape.mul(&a, &b).unwrap();
    assert!(y.needs_grad() && dead_end.needs_grad() && !tape.sigmoid(&b).unwrap().needs_grad());
    let grads = tape.backward(&[(&y, lane.full([3], DType::F64, 1.0).unwrap())]).unwrap();
    assert_eq!(values(grads.get(&a).unwrap()), values(b.value()));
    assert!(grads.get(&b).is_none() && grads.get(&unused).is_none());

    let tape = Tape::inference(&lane);
    let p = parameter("p", &random(4, [3]));
    let y = tape.mul(&tape.param(&p), &tape.leaf(random(5, [3]))).unwrap();
    assert!(!y.needs_grad());
}

#[test]
fn a_gradient_of_another_shape_or_type_is_refused() {
    let lane = Lane::cpu();
    let tape = Tape::new(&lane);
    let x = tape.leaf(random(1, [3]));
    let error = |grad: Tensor| tape.backward(&[(&x, grad)]).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error(random(1, [4])).contains("(4)"), "{}", error(random(1, [4])));
    assert!(error(lane.zeros([3], DType::F32).unwrap()).contains("f32"));
    let y = tape.record1(&[&x], random(1, [3]), |_, dy| Ok(vec![Some(dy.clone()), None]));
    let error = tape.backward(&[(&y, random(1, [3]))]).err().unwrap().to_string();
    assert!(error.contains("2 gradients for 1 inputs"), "{error}");
}

#[test]
fn shapes_that_do_not_fit_are_refused_by_name() {
    let tape = Tape::new(&Lane::cpu());
    let var = |shape: &[usize]| tape.leaf(random(1, shape));
    let refused = |what: &str, result: Result<Var>| {
        let error = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    };
    refused("(3, 4) and (3, 4)", tape.matmul(&var(&[3, 4]), &var(&[3, 4])));
    refused("(2, 3, 4) and (3, 4, 5)", tape.matmul(&var(&[2, 3, 4]), &var(&[3, 4, 5])));
    refused("x (3, 4) and w (5, 3)", tape.linear(&var(&[3, 4]), &var(&[5, 3]), None));
    refused("bias (4)", tape.linear(&var(&[3, 4]), &var(&[5, 4]), Some(&var(&[4]))));
    refused("add of (3, 4) and (3)", tape.add(&var(&[3, 4]), &var(&[3])));
    refused("mul of (4) and (3, 4)", tape.mul(&var(&[4]), &var(&[3, 4])));
    refused("swiglu of (3, 4) and (4, 3)", tape.swiglu(&var(&[3, 4]), &var(&[4, 3])));
    refused("(B, L, H, D)", tape.rope(&var(&[3, 4]), Rope { theta: 1e4, first: 0 }));
    let shape = AttentionShape { batch: 1, seq: 3, heads: 2, kv_heads: 1, head_dim: 2 };
    refused("k (3, 4)", tape.attention(shape, &var(&[3, 4]), &var(&[3, 4]), &var(&[3, 2])));
    refused("N above 0", tape.cross_entropy(&var(&[3, 4]), &indices(&[0, 1])));
    refused("scatter_rows of 3 rows by 2 indices", tape.scatter_rows(&var(&[3, 4]), &indices(&[0, 1]), 2));
}

/// A tensor whose memory `owner` counts the handles of.
fn counted(owner: &Arc<Vec<f64>>) -> Tensor {
    let (ptr, bytes) = (owner.as_ptr() as *mut u8, owner.len() * 8);
    // SAFETY: the vector lives as long as its owner, and nothing here writes to it.
    let storage = unsafe { Storage::from_raw(ptr, bytes, Place::Cpu, owner.clone()) };
    Tensor::new(storage, Layout::contiguous([owner.len()].into()), DType::F64).unwrap()
}

#[test]
fn the_tape_keeps_only_what_a_backward_reads() {
    let tape = Tape::new(&Lane::cpu());
    let (a, b) = (Arc::new(uniform(1, 4)), Arc::new(uniform(2, 4)));
    let x = tape.leaf(counted(&a));
    let y = tape.scale(&x, 2.0).unwrap();
    drop(x);
    assert_eq!(Arc::strong_count(&a), 1, "scale's backward does not read x");
    let z = tape.mul(&y, &tape.constant(counted(&b))).unwrap();
    assert_eq!(Arc::strong_count(&b), 2, "mul's backward reads the other factor");
    tape.backward(&[(&z, random(3, [4]))]).unwrap();
    assert_eq!(Arc::strong_count(&b), 1, "a backward frees what it kept");
}

/// One transformer block's worth of operations, large enough that the kernels run in parallel; all gradients' bits.
fn block_gradients(dtype: DType) -> Vec<Vec<u64>> {
    let lane = Lane::cpu();
    let tape = Tape::new(&lane);
    let (b, l, m, heads) = (2, 80, 128, 4);
    let tensor = |seed, shape: &[usize]| lane.cast(&random(seed, shape), dtype).unwrap();
    let params = [
        parameter("gain", &tensor(1, &[m])),
        parameter("bias", &tensor(2, &[m])),
        parameter("w", &tensor(3, &[m, m])),
        parameter("table", &tensor(4, &[50, m])),
    ];
    let [gain, bias, w, table] = params.each_ref().map(|p| tape.param(p));
    let x = tape.leaf(tensor(5, &[b * l, m]));
    let ids = indices(&(0..(b * l) as i32).map(|i| i * i % 50).collect::<Vec<i32>>());
    let run = || -> Result<Var> {
        let h = tape.add(&x, &tape.embedding(&ids, &table)?)?;
        let n = tape.layer_norm(&h, &gain, &bias, 1e-5)?;
        let q = tape.linear(&n, &w, Some(&bias))?;
        let q = tape.rope(&tape.reshape(&q, [b, l, heads, m / heads])?, Rope { theta: 1e4, first: 0 })?;
        let shape = AttentionShape { batch: b, seq: l, heads, kv_heads: heads, head_dim: m / heads };
        let a = tape.attention(shape, &q, &q, &tape.reshape(&n, [b, l, heads, m / heads])?)?;
        let h = tape.add(&h, &tape.reshape(&a, [b * l, m])?)?;
        let f = tape.swiglu(&tape.linear(&tape.rms_norm(&h, &gain, 1e-5)?, &w, None)?, &h)?;
        tape.cross_entropy(&tape.linear(&f, &table, None)?, &ids)
    };
    let loss = run().unwrap();
    let one = lane.full([1], dtype.accumulate(), 1.0).unwrap();
    let grads = tape.backward(&[(&loss, one)]).unwrap();
    let all = [loss.value(), grads.get(&x).unwrap()].into_iter().chain(params.iter().map(Parameter::grad));
    all.map(bits).collect()
}

#[test]
fn a_backward_gives_the_same_bits_every_time() {
    for dtype in [DType::F64, DType::F32] {
        let first = block_gradients(dtype);
        assert!(first.iter().all(|g| g.iter().any(|&v| f64::from_bits(v) != 0.0)), "a gradient is all zero");
        for _ in 0..3 {
            assert!(block_gradients(dtype) == first, "{dtype}");
        }
    }
}
