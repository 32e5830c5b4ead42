//! What gates are made of, on the GPU and on the CPU.

use fsmoe::device::cpu::Cpu;
use fsmoe::device::{ChoiceRule, Chosen, ChosenGrad, ExpertGroups, GateKernels, Score, Slots};
use fsmoe::tensor::{DType, Tensor};

use super::support::{DTYPES, In, Out, acc, compare, data, gpu, int, uniform, up};

const F32: DType = DType::F32;

/// `n` numbers out of 0..`end`.
fn whole(seed: u64, n: usize, end: usize) -> Vec<i32> {
    uniform(seed, n, 0.0, end as f64).into_iter().map(|v| (v as usize).min(end - 1) as i32).collect()
}

/// Values with many ties: multiples of a quarter.
fn quarters(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n, -3.0, 3.0).into_iter().map(|v| (4.0 * v).round() / 4.0).collect()
}

/// k different experts for each of T tokens.
fn experts(seed: u64, tokens: usize, num_experts: usize, k: usize) -> Vec<i32> {
    let scores = Tensor::from_slice(&uniform(seed, tokens * num_experts, 0.0, 1.0), [tokens, num_experts]).unwrap();
    let out = Tensor::host([tokens, k], DType::I32);
    Cpu.top_k(&scores, None, None, &out).unwrap();
    out.to_vec().unwrap()
}

/// Tokens, experts, choices and routing groups, edges among them.
const SHAPES: [[usize; 4]; 11] = [
    [1, 1, 1, 1],
    [7, 3, 3, 1],
    [33, 8, 2, 1],
    [96, 8, 2, 3],
    [9, 100, 1, 9],
    [300, 128, 8, 1],
    [65, 130, 6, 5],
    [50, 64, 32, 2],
    [40, 257, 16, 1],
    [17, 1024, 16, 1],
    [1200, 16, 3, 2],
];

fn rule(score: Score, normalise: bool) -> ChoiceRule {
    let scale = if score == Score::Sigmoid { 2.5 } else { 1.0 };
    ChoiceRule { score, expert_groups: None, normalise, scale, balance_first_only: !normalise }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_top_k_takes_the_same_experts() {
    for [tokens, e, k, _] in SHAPES {
        for bias in [false, true] {
            let mut scores = quarters(1, tokens * e);
            for (value, at) in [(f64::NAN, 0), (f64::INFINITY, 3), (f64::NEG_INFINITY, 5), (-0.0, 7)] {
                if at < scores.len() {
                    scores[at] = value;
                }
            }
            compare!(
                &format!("top {k} of {tokens} x {e}, bias {bias}"),
                F32,
                [acc([tokens, e], scores), acc([e], quarters(2, e))],
                [Out::Int([tokens, k].into())],
                |gate, i, o| gate.top_k(&i[0], bias.then_some(&i[1]), None, &o[0])
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_top_k_stays_inside_the_kept_groups() {
    for (tokens, e, k, groups, kept) in [(20, 8, 2, 4, 2), (65, 128, 8, 8, 3), (9, 256, 8, 256, 9), (5, 1024, 16, 4, 1)]
    {
        compare!(
            &format!("top {k} of {tokens} x {e} in {kept} of {groups}"),
            F32,
            [acc([tokens, e], quarters(3, tokens * e)), acc([e], quarters(4, e))],
            [Out::Int([tokens, k].into())],
            |gate, i, o| gate.top_k(&i[0], Some(&i[1]), Some(ExpertGroups { groups, kept }), &o[0])
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_columns_are_gathered_and_scattered() {
    for (tokens, k, width) in [(1, 1, 1), (37, 5, 9), (300, 8, 128), (0, 2, 3)] {
        // Repeated columns, and none.
        let index: Vec<i32> = whole(5, tokens * k, width + 1).iter().map(|i| i - 1).collect();
        for dtype in DTYPES {
            let x = || data([tokens, width], uniform(6, tokens * width, -1.0, 1.0));
            let picked = || data([tokens, k], uniform(7, tokens * k, -1.0, 1.0));
            let what = format!("{tokens} x {k} of {width}");
            compare!(
                &what,
                dtype,
                [x(), int([tokens, k], index.clone())],
                [Out::Data([tokens, k].into())],
                |gate, i, o| gate.gather_cols(&i[0], &i[1], &o[0])
            );
            let out = |wide: bool| {
                let values = uniform(8, tokens * width, -1.0, 1.0);
                Out::Add(if wide { acc([tokens, width], values) } else { data([tokens, width], values) })
            };
            compare!(
                &what,
                dtype,
                [picked(), int([tokens, k], index.clone())],
                [out(false), out(true)],
                |gate, i, o| {
                    gate.scatter_cols(&i[0], &i[1], &o[0])?;
                    gate.scatter_cols(&i[0], &i[1], &o[1])
                }
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_slots_and_loads_are_the_same() {
    for [tokens, e, k, groups] in SHAPES {
        let choices = || int([tokens, k], experts(9, tokens, e, k));
        for capacity in [1, (2 * tokens * k).div_ceil(3 * e * groups), tokens / groups] {
            // Ties, both zeros and NaN.
            let mut priority = quarters(10, tokens);
            priority[0] = f64::NAN;
            priority[tokens / 2] = -0.0;
            compare!(
                &format!("slots of {tokens} x {k} of {e} in {groups} groups, {capacity} each"),
                F32,
                [choices(), acc([tokens], priority)],
                [Out::Int([tokens, k].into()), Out::Int([tokens, k].into()), Out::Int([groups, e].into())],
                |gate, i, o| {
                    gate.assign_slots(&i[0], None, e, groups, capacity, &o[0])?;
                    gate.assign_slots(&i[0], Some(&i[1]), e, groups, capacity, &o[1])?;
                    gate.count_experts(&i[0], &o[2])
                }
            );
        }
    }
}

/// The same expert twice in a token, and all choices of one expert: neither comes out of a top k, both may be asked for.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_slots_of_skewed_choices_are_the_same() {
    for (tokens, e, k) in [(1000, 4, 3), (513, 1, 1), (300, 1024, 16)] {
        let choices: Vec<i32> = whole(11, tokens * k, e).iter().map(|i| i / 3).collect();
        compare!(
            &format!("slots of {tokens} x {k} of {e}"),
            F32,
            [int([tokens, k], choices)],
            [Out::Int([tokens, k].into()), Out::Int([1, e].into())],
            |gate, i, o| {
                gate.assign_slots(&i[0], None, e, 1, 70, &o[0])?;
                gate.count_experts(&i[0], &o[1])
            }
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_experts_choose_the_same_tokens() {
    let cases = [
        (1, 1, 1, 1),
        (40, 3, 2, 20),
        (96, 40, 3, 1),
        (3000, 5, 1, 700),
        (2100, 2, 3, 333),
        // Beyond shared memory: the lists, then the keys too.
        (16_000, 2, 1, 10_000),
        (60_000, 1, 1, 16_000),
        // As many tokens as experts choose of: T·k/E each, for k = 2.
        (131_072, 8, 1, 32_768),
    ];
    for (tokens, e, groups, capacity) in cases {
        // Few values, so many ties at the threshold, or many; none at all, and all the same.
        let spread = uniform(12, tokens * e, 0.0, 1.0);
        let few: Vec<f64> = spread.iter().map(|v| (8.0 * v).round() / 8.0).collect();
        for (which, probs) in [("spread", spread), ("few values", few), ("zeros", vec![0.0; tokens * e])] {
            compare!(
                &format!("{capacity} of {tokens} tokens for {e} experts in {groups} groups, {which}"),
                F32,
                [acc([tokens, e], probs)],
                [Out::Int([e, groups * capacity].into()), Out::Acc([e, groups * capacity].into())],
                |gate, i, o| gate.expert_choice(&i[0], groups, capacity, &o[0], &o[1])
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_expert_choice_backward_adds_where_tokens_were_chosen() {
    let (tokens, e, width) = (77, 6, 20);
    let chosen: Vec<i32> = (0..e * width).map(|i| ((i % width * 3 + i / width) % tokens) as i32).collect();
    compare!(
        "expert choice",
        F32,
        [int([e, width], chosen), acc([e, width], uniform(13, e * width, -1.0, 1.0))],
        [Out::Add(acc([tokens, e], uniform(14, tokens * e, -1.0, 1.0)))],
        |gate, i, o| gate.expert_choice_backward(&i[0], &i[1], &o[0])
    );
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_losses_and_entropy_apart_are_the_same() {
    for [tokens, e, k, _] in SHAPES {
        let what = format!("{tokens} x {e}");
        let matrix = |seed, low| acc([tokens, e], uniform(seed, tokens * e, low, 1.0));
        for first_only in [false, true] {
            compare!(
                &what,
                F32,
                [matrix(15, 0.0), int([tokens, k], experts(16, tokens, e, k))],
                [Out::Acc([1].into()), Out::Acc([e].into())],
                |gate, i, o| gate.balance_loss(&i[0], &i[1], first_only, &o[0], &o[1])
            );
        }
        compare!(
            &what,
            F32,
            [acc([tokens, e], uniform(17, tokens * e, -30.0, 30.0)), matrix(18, 0.0)],
            [Out::Acc([tokens].into()), Out::Acc([1].into()), Out::Acc([1].into())],
            |gate, i, o| {
                gate.z_loss(&i[0], &o[0], &o[1])?;
                gate.mean_entropy(&i[1], &o[2])
            }
        );
        compare!(
            &what,
            F32,
            [
                acc([e], uniform(19, e, 0.0, 1.0)),
                acc([1], vec![0.7]),
                matrix(20, -1.0),
                acc([tokens], uniform(21, tokens, 2.0, 4.0)),
            ],
            [Out::Add(matrix(22, -1.0)), Out::Add(matrix(23, -1.0))],
            |gate, i, o| {
                gate.balance_loss_backward(&i[0], &i[1], &o[0])?;
                gate.z_loss_backward(&i[2], &i[3], &i[1], &o[1])
            }
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_noise_scale_and_bias_are_the_same() {
    for (tokens, e) in [(1, 1), (33, 7), (64, 128), (0, 4)] {
        noise(tokens, e);
    }
    for (groups, e) in [(1, 1), (3, 8), (2, 1500)] {
        let mut loads = whole(27, groups * e, 100);
        // An exact mean.
        loads[0] = 0;
        compare!(
            &format!("bias of {e} experts, {groups} groups"),
            F32,
            [int([groups, e], loads)],
            [Out::Add(acc([e], uniform(28, e, -1.0, 1.0)))],
            |gate, i, o| gate.update_bias(&o[0], &i[0], 0.25)
        );
    }
}

/// Noise on logits (T, E), its scale, and their backwards.
pub(super) fn noise(tokens: usize, e: usize) {
    let matrix = |seed, size: f64| acc([tokens, e], uniform(seed, tokens * e, -size, size));
    let shape = || Out::Acc([tokens, e].into());
    compare!(
        &format!("noise on {tokens} x {e}"),
        F32,
        [matrix(24, 1.0), matrix(25, 20.0), matrix(26, 3.0)],
        [shape(), Out::Add(matrix(24, 1.0)), shape(), shape(), shape()],
        |gate, i, o| {
            gate.add_gate_noise(&i[0], &i[1], &i[2], &o[0])?;
            gate.add_gate_noise(&o[1], &i[1], &i[2], &o[1])?;
            gate.add_gate_noise_backward(&i[1], &i[2], &i[0], &o[2])?;
            gate.clamped_exp(&i[2], 2.0, &o[3])?;
            gate.clamped_exp_backward(&o[3], 2.0, &i[0], &o[4])
        }
    );
}

/// Logits whose scores, biased and summed by two, are apart from each other by more than rounding, or the same.
fn apart(seed: u64, n: usize) -> Vec<f64> {
    whole(seed, n, 7).into_iter().map(|v| 0.1 + 0.375 * f64::from(v)).collect()
}

fn choose(
    gate: &impl GateKernels,
    rule: &ChoiceRule,
    capacity: usize,
    [logits, bias]: [Option<&Tensor>; 2],
    o: &[Tensor],
) -> fsmoe::Result<()> {
    gate.choose_experts(
        rule,
        logits.unwrap(),
        bias,
        &Chosen {
            experts: &o[0],
            weights: &o[1],
            best: None,
            slots: Some(Slots { capacity, slots: &o[2] }),
            loads: &o[3],
            balance_loss: &o[4],
            fraction: &o[5],
            z_loss: (rule.score == Score::Softmax).then(|| &o[7]),
            entropy: &o[6],
        },
    )
}

fn chosen([tokens, e, k, groups]: [usize; 4], score: Score) -> Vec<Out> {
    let ints = |shape: [usize; 2]| Out::Int(shape.into());
    let floats = |n: usize| Out::Acc([n].into());
    let mut out = vec![ints([tokens, k]), Out::Acc([tokens, k].into()), ints([tokens, k]), ints([groups, e])];
    out.extend([floats(1), floats(e), floats(1)]);
    out.extend((score == Score::Softmax).then(|| floats(1)));
    out
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_tokens_choose_the_same_experts() {
    for shape in SHAPES {
        let [tokens, e, k, groups] = shape;
        let capacity = (tokens * k).div_ceil(e * groups);
        let logits = [
            ("spread", uniform(29, tokens * e, -4.0, 4.0)),
            ("ties", quarters(30, tokens * e)),
            ("far", uniform(31, tokens * e, -60.0, 60.0)),
        ];
        for (which, logits) in logits {
            for (score, normalise) in
                [(Score::Softmax, true), (Score::Softmax, false), (Score::Sigmoid, true), (Score::Sigmoid, false)]
            {
                let rule = rule(score, normalise);
                compare!(
                    &format!("{shape:?}, {which}, {rule:?}"),
                    F32,
                    [acc([tokens, e], logits.clone())],
                    chosen(shape, score),
                    |gate, i, o| choose(gate, &rule, capacity, [Some(&i[0]), None], o)
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_tokens_choose_by_bias_and_groups() {
    let cases = [
        ([40, 8, 2, 2], None),
        ([40, 8, 2, 2], Some((4, 2))),
        ([70, 128, 8, 1], Some((8, 3))),
        ([33, 24, 3, 1], Some((12, 4))),
        ([9, 1024, 16, 1], Some((8, 4))),
    ];
    for (shape, groups) in cases {
        let [tokens, e, ..] = shape;
        for score in [Score::Sigmoid, Score::Softmax] {
            let expert_groups = groups.map(|(groups, kept)| ExpertGroups { groups, kept });
            // A softmax's scores are near each other: a bias decides alone between them, not the sums of two.
            if score == Score::Softmax && expert_groups.is_some() {
                continue;
            }
            let rule = ChoiceRule { expert_groups, ..rule(score, true) };
            // One for all experts of a group: else two sums would be equal but for the order of their parts.
            let parts = groups.map_or(e, |(groups, _)| groups);
            let bias = whole(32, parts, 2);
            let bias: Vec<f64> = (0..e).map(|i| 0.5 * f64::from(bias[i / (e / parts)])).collect();
            compare!(
                &format!("{shape:?}, {rule:?}"),
                F32,
                [acc([tokens, e], apart(33, tokens * e)), acc([e], bias)],
                chosen(shape, score),
                |gate, i, o| choose(gate, &rule, 5, [Some(&i[0]), Some(&i[1])], o)
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_the_most_certain_tokens_get_slots_first() {
    for [tokens, e, k, groups] in [[60, 5, 2, 3], [700, 16, 4, 1], [64, 130, 2, 1]] {
        // Every token's best probability is another, by far more than rounding.
        let mut logits = vec![0.0; tokens * e];
        for (t, row) in logits.chunks_mut(e).enumerate() {
            row[t * 7 % e] = 1.0 + 0.01 * (t * 37 % tokens) as f64;
            row[(t * 7 + 1) % e] = 0.5;
        }
        let rule = rule(Score::Softmax, true);
        let shape = [tokens, e, k, groups];
        let mut out = chosen(shape, Score::Softmax);
        out.push(Out::Acc([tokens].into()));
        compare!(&format!("{shape:?}, prioritised"), F32, [acc([tokens, e], logits)], out, |gate, i, o| {
            let chosen = Chosen {
                experts: &o[0],
                weights: &o[1],
                best: Some(&o[8]),
                slots: Some(Slots { capacity: tokens * k / (2 * e * groups) + 1, slots: &o[2] }),
                loads: &o[3],
                balance_loss: &o[4],
                fraction: &o[5],
                z_loss: Some(&o[7]),
                entropy: &o[6],
            };
            gate.choose_experts(&rule, &i[0], None, &chosen)
        });
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_the_gradient_of_a_choice_is_the_same() {
    for shape in SHAPES {
        let [tokens, e, k, _] = shape;
        let logits = uniform(34, tokens * e, -4.0, 4.0);
        for (score, normalise) in
            [(Score::Softmax, true), (Score::Softmax, false), (Score::Sigmoid, true), (Score::Sigmoid, false)]
        {
            let rule = rule(score, normalise);
            // The one weight of one sigmoid has no gradient but what rounding leaves.
            if score == Score::Sigmoid && e == 1 {
                continue;
            }
            // What a forward has chosen and given.
            let wide = Tensor::from_slice(&logits, [tokens, e]).unwrap();
            let host = |shape: &[usize], dtype| Tensor::host(shape, dtype);
            let o = [
                host(&[tokens, k], DType::I32),
                host(&[tokens, k], DType::F64),
                host(&[tokens, k], DType::I32),
                host(&[1, e], DType::I32),
                host(&[1], DType::F64),
                host(&[e], DType::F64),
                host(&[1], DType::F64),
                host(&[1], DType::F64),
            ];
            choose(&Cpu, &rule, tokens, [Some(&wide), None], &o).unwrap();
            let inputs = || -> Vec<In> {
                vec![
                    acc([tokens, e], logits.clone()),
                    int([tokens, k], o[0].to_vec().unwrap()),
                    acc([tokens, k], o[1].to_vec().unwrap()),
                    acc([e], o[5].to_vec().unwrap()),
                    acc([tokens, k], uniform(35, tokens * k, -1.0, 1.0)),
                    acc([1], vec![0.3]),
                    acc([1], vec![-0.2]),
                ]
            };
            for dtype in DTYPES {
                compare!(
                    &format!("{shape:?}, {rule:?}"),
                    dtype,
                    inputs(),
                    [Out::Data([tokens, e].into())],
                    |gate, i, o| {
                        let given = ChosenGrad {
                            experts: &i[1],
                            weights: &i[2],
                            fraction: &i[3],
                            d_weights: &i[4],
                            d_balance: &i[5],
                            d_z: (score == Score::Softmax).then_some(&i[6]),
                        };
                        gate.choose_experts_backward(&rule, &i[0], &given, &o[0])
                    }
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gates_refuse_what_they_cannot_take() {
    let gpu = gpu();
    let floats = |shape: [usize; 2]| up(&Tensor::host_zeros(shape, F32));
    let ints = |shape: [usize; 2]| up(&Tensor::host_zeros(shape, DType::I32));
    let message = |r: fsmoe::Result<()>| r.unwrap_err().to_string();
    let text = message(gpu.top_k(&floats([2, 8]), None, None, &ints([2, 9])));
    assert!(text.contains("k = 9 of 8"), "{text}");
    let text = message(gpu.top_k(&floats([2, 1025]), None, None, &ints([2, 2])));
    assert!(text.contains("1025") && text.contains("1024"), "{text}");
    let text = message(gpu.top_k(&Tensor::host_zeros([2, 8], F32), None, None, &ints([2, 2])));
    assert!(text.contains("not on cuda:0"), "{text}");
    let text = message(gpu.assign_slots(&ints([6, 2]), None, 2, 4, 1, &ints([6, 2])));
    assert!(text.contains("6 tokens in 4 groups"), "{text}");
    let text = message(gpu.expert_choice(&floats([6, 2]), 2, 4, &ints([2, 8]), &floats([2, 8])));
    assert!(text.contains("capacity 4 of 3 tokens"), "{text}");
}
