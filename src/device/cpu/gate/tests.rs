use crate::device::cpu::Cpu;
use crate::device::cpu::util::random;
use crate::device::{ExpertGroups, GateKernels};
use crate::tensor::{DType, Element, Shape, Tensor};

fn tensor<T: Element>(data: &[T], shape: impl Into<Shape>) -> Tensor {
    Tensor::from_slice(data, shape).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

fn ints(t: &Tensor) -> Vec<i32> {
    t.to_vec().unwrap()
}

fn top_k(scores: &Tensor, bias: Option<&Tensor>, groups: Option<ExpertGroups>, k: usize) -> Vec<i32> {
    let out = Tensor::host([scores.dim(0), k], DType::I32);
    Cpu.top_k(scores, bias, groups, &out).unwrap();
    ints(&out)
}

/// Central differences of `f` at x, against `grad`.
fn check_gradient(x: &[f64], grad: &[f64], f: impl Fn(&[f64]) -> f64) {
    let largest = grad.iter().fold(0.0_f64, |a, g| a.max(g.abs()));
    assert!(largest > 0.0, "a gradient of zeros shows nothing");
    for i in 0..x.len() {
        let (mut low, mut high) = (x.to_vec(), x.to_vec());
        low[i] -= 1e-6;
        high[i] += 1e-6;
        let want = (f(&high) - f(&low)) / 2e-6;
        assert!((grad[i] - want).abs() < 1e-7 * largest.max(1.0), "element {i}: {} for {want}", grad[i]);
    }
}

#[test]
fn top_k_takes_the_largest_and_ties_go_to_the_lowest_index() {
    let scores = tensor(&[1.0, 3.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [2, 4]);
    assert_eq!(top_k(&scores, None, None, 3), [1, 2, 3, 0, 1, 2]);
    let bias = tensor(&[9.0, 0.0, 0.0, 0.5], [4]);
    assert_eq!(top_k(&scores, Some(&bias), None, 4), [0, 1, 2, 3, 0, 3, 1, 2]);
    let f32s = tensor(&[0.5_f32, 0.25, 0.75], [1, 3]);
    assert_eq!(top_k(&f32s, None, None, 2), [2, 0]);
}

#[test]
fn top_k_stays_inside_the_groups_with_the_best_two_scores() {
    // Sums of the two best: 1.9, 2.0, 1.0; the best score, 3.0, is in a group that is not kept.
    let scores = tensor(&[1.0, 0.9, -5.0, 1.0, 0.5, 1.0, 3.0, -2.0, -9.0], [1, 9]);
    assert_eq!(top_k(&scores, None, Some(ExpertGroups { groups: 3, kept: 2 }), 3), [0, 3, 5]);
    assert_eq!(top_k(&scores, None, Some(ExpertGroups { groups: 3, kept: 3 }), 1), [6]);
    // Equal groups: the first is kept. A group of one expert ranks by that one.
    let equal = tensor(&[1.0, 2.0, 2.0, 1.0], [1, 4]);
    assert_eq!(top_k(&equal, None, Some(ExpertGroups { groups: 2, kept: 1 }), 2), [1, 0]);
    assert_eq!(top_k(&equal, None, Some(ExpertGroups { groups: 4, kept: 2 }), 2), [1, 2]);
}

#[test]
fn top_k_gives_distinct_experts_even_for_nan() {
    let scores = tensor(&[f64::NAN, 1.0, f64::NAN, 2.0], [1, 4]);
    assert_eq!(top_k(&scores, None, None, 3), [3, 1, 0]);
}

#[test]
fn top_k_refuses_what_cannot_be_chosen() {
    let scores = tensor(&[0.0; 8], [1, 8]);
    let out = |k: usize| Tensor::host([1, k], DType::I32);
    let message = |k, groups| Cpu.top_k(&scores, None, groups, &out(k)).unwrap_err().to_string();
    assert!(message(9, None).contains("k = 9 of 8"), "{}", message(9, None));
    assert!(message(5, Some(ExpertGroups { groups: 2, kept: 1 })).contains("k = 5 of 4"));
    assert!(message(1, Some(ExpertGroups { groups: 3, kept: 1 })).contains("of 3 groups of 8 experts"));
    assert!(Cpu.top_k(&tensor(&[0; 8], [1, 8]), None, None, &out(1)).is_err(), "scores are floats");
}

#[test]
fn columns_are_gathered_and_scattered_by_index() {
    let x = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]);
    let index = tensor(&[2, -1, 0, 0], [2, 2]);
    let out = Tensor::host([2, 2], DType::F64);
    Cpu.gather_cols(&x, &index, &out).unwrap();
    assert_eq!(values(&out), [3.0, 0.0, 4.0, 4.0]);
    let back = tensor(&[10.0_f32; 6], [2, 3]);
    Cpu.scatter_cols(&out, &index, &back).unwrap();
    assert_eq!(back.to_vec::<f32>().unwrap(), [10.0, 10.0, 13.0, 18.0, 10.0, 10.0]);
    let outside = tensor(&[3, 0, 0, 0], [2, 2]);
    let message = Cpu.gather_cols(&x, &outside, &out).unwrap_err().to_string();
    assert!(message.contains("index[0] is 3, outside -1..3"), "{message}");
}

#[test]
fn a_16_bit_column_is_rounded_once() {
    // 256 + 1 is 256 in bf16, but 256 + 1 + 1 is 258.
    let out = tensor(&[half::bf16::from_f32(256.0)], [1, 1]);
    Cpu.scatter_cols(&tensor(&[1.0_f32, 1.0], [1, 2]), &tensor(&[0, 0], [1, 2]), &out).unwrap();
    assert_eq!(out.to_vec::<half::bf16>().unwrap()[0].to_f32(), 258.0);
}

#[test]
fn slots_go_to_first_choices_then_second_within_each_group() {
    // Two groups of three tokens, two choices, two experts, capacity 2.
    let experts = tensor(&[0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0], [6, 2]);
    let loads = Tensor::host([2, 2], DType::I32);
    Cpu.count_experts(&experts, &loads).unwrap();
    assert_eq!(ints(&loads), [3, 3, 3, 3]);
    let slots = Tensor::host([6, 2], DType::I32);
    Cpu.assign_slots(&experts, None, 2, 2, 2, &slots).unwrap();
    assert_eq!(ints(&slots), [0, 0, 1, 1, -1, -1, 0, 1, 0, -1, 1, -1]);
    // Descending priority, equals in token order: group 0 takes 2, 0, 1; group 1 takes 3, 4, 5.
    let priority = tensor(&[0.5, 0.25, 0.75, 0.5, 0.5, 0.5], [6]);
    Cpu.assign_slots(&experts, Some(&priority), 2, 2, 2, &slots).unwrap();
    assert_eq!(ints(&slots), [1, 1, -1, -1, 0, 0, 0, 1, 0, -1, 1, -1]);
    let message = Cpu.assign_slots(&experts, None, 1, 2, 2, &slots).unwrap_err().to_string();
    assert!(message.contains("experts[1] is 1, outside 0..1"), "{message}");
    assert!(Cpu.assign_slots(&experts, None, 2, 4, 2, &slots).is_err(), "6 tokens are not 4 equal groups");
}

#[test]
fn expert_choice_takes_each_groups_best_tokens() {
    let probs = tensor(&[0.1, 0.9, 0.3, 0.7, 0.3, 0.1, 0.8, 0.1, 0.6, 0.1, 0.2, 0.5], [6, 2]);
    let (tokens, weights) = (Tensor::host([2, 4], DType::I32), Tensor::host([2, 4], DType::F64));
    Cpu.expert_choice(&probs, 2, 2, &tokens, &weights).unwrap();
    assert_eq!(ints(&tokens), [1, 2, 3, 4, 0, 1, 5, 3]);
    assert_eq!(values(&weights), [0.3, 0.3, 0.8, 0.6, 0.9, 0.7, 0.5, 0.1]);
    let d_probs = tensor(&[1.0; 12], [6, 2]);
    Cpu.expert_choice_backward(&tokens, &weights, &d_probs).unwrap();
    assert_eq!(values(&d_probs), [1.0, 1.9, 1.3, 1.7, 1.3, 1.0, 1.8, 1.1, 1.6, 1.0, 1.0, 1.5]);
    let wide = (Tensor::host([2, 8], DType::I32), Tensor::host([2, 8], DType::F64));
    let message = Cpu.expert_choice(&probs, 2, 4, &wide.0, &wide.1).unwrap_err().to_string();
    assert!(message.contains("capacity 4 of 3 tokens"), "{message}");
}

fn balance_loss(probs: &[f64], experts: &Tensor, first_only: bool, fraction: &Tensor) -> f64 {
    let tokens = experts.dim(0);
    let loss = Tensor::host([1], DType::F64);
    let probs = tensor(probs, [tokens, probs.len() / tokens]);
    Cpu.balance_loss(&probs, experts, first_only, &loss, fraction).unwrap();
    values(&loss)[0]
}

#[test]
fn balance_loss_counts_first_or_all_choices() {
    let fraction = Tensor::host([3], DType::F64);
    let experts = tensor(&[0, 1, 0, 2, 2, 1, 0, 1], [4, 2]);
    let probs: Vec<f64> = [0.5, 0.25, 0.25].repeat(4);
    // First choices: 3/4, 0, 1/4. All: 3/4, 3/4, 2/4.
    assert_eq!(balance_loss(&probs, &experts, true, &fraction), 3.0 * (0.5 * 0.75 + 0.25 * 0.25));
    assert_eq!(values(&fraction), [0.75, 0.0, 0.25]);
    assert_eq!(balance_loss(&probs, &experts, false, &fraction), 3.0 * (0.5 * 0.75 + 0.25 * 0.75 + 0.25 * 0.5));
    assert_eq!(values(&fraction), [0.75, 0.75, 0.5]);
}

#[test]
fn balance_loss_backward_is_its_derivative() {
    let (tokens, e) = (150, 5);
    let probs = random(1, tokens * e);
    let experts = tensor(&top_k(&tensor(&probs, [tokens, e]), None, None, 2), [tokens, 2]);
    let fraction = Tensor::host([e], DType::F64);
    balance_loss(&probs, &experts, false, &fraction);
    let d_probs = tensor(&vec![7.0; tokens * e], [tokens, e]);
    Cpu.balance_loss_backward(&fraction, &tensor(&[1.5], [1]), &d_probs).unwrap();
    let grad: Vec<f64> = values(&d_probs).iter().map(|d| d - 7.0).collect();
    check_gradient(&probs, &grad, |p| 1.5 * balance_loss(p, &experts, false, &Tensor::host([e], DType::F64)));
}

fn z_loss(logits: &[f64], e: usize) -> (f64, Tensor) {
    let tokens = logits.len() / e;
    let (lse, loss) = (Tensor::host([tokens], DType::F64), Tensor::host([1], DType::F64));
    Cpu.z_loss(&tensor(logits, [tokens, e]), &lse, &loss).unwrap();
    (values(&loss)[0], lse)
}

#[test]
fn z_loss_is_the_mean_squared_log_sum_and_does_not_overflow() {
    let (loss, lse) = z_loss(&[0.0, 0.0, 1000.0, 1000.0], 2);
    let ln2 = 2.0_f64.ln();
    assert_eq!(values(&lse), [ln2, 1000.0 + ln2]);
    assert_eq!(loss, (ln2.powi(2) + (1000.0 + ln2).powi(2)) / 2.0);
}

#[test]
fn z_loss_backward_is_its_derivative() {
    let (tokens, e) = (70, 4);
    let logits = random(2, tokens * e);
    let (_, lse) = z_loss(&logits, e);
    let d_logits = tensor(&vec![-2.0; tokens * e], [tokens, e]);
    Cpu.z_loss_backward(&tensor(&logits, [tokens, e]), &lse, &tensor(&[0.5], [1]), &d_logits).unwrap();
    let grad: Vec<f64> = values(&d_logits).iter().map(|d| d + 2.0).collect();
    check_gradient(&logits, &grad, |l| 0.5 * z_loss(l, e).0);
}

#[test]
fn mean_entropy_normalises_and_takes_zeros() {
    let out = Tensor::host([1], DType::F64);
    Cpu.mean_entropy(&tensor(&[2.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0], [2, 4]), &out).unwrap();
    assert!((values(&out)[0] - 2.0_f64.ln() / 2.0).abs() < 1e-15);
}

#[test]
fn gate_noise_may_be_added_in_place_and_its_backward_is_its_derivative() {
    let (tokens, e) = (6, 5);
    let n = tokens * e;
    let shaped = |v: &[f64]| tensor(v, [tokens, e]);
    let (clean, raw, noise, d_out) = (random(3, n), random(4, n), random(5, n), random(6, n));
    let noisy = |raw: &[f64]| {
        let out = Tensor::host([tokens, e], DType::F64);
        Cpu.add_gate_noise(&shaped(&clean), &shaped(raw), &shaped(&noise), &out).unwrap();
        values(&out)
    };
    let want = |i: usize| clean[i] + noise[i] * (1.0 + raw[i].exp()).ln();
    assert!(noisy(&raw).iter().enumerate().all(|(i, v)| (v - want(i)).abs() < 1e-15));
    let in_place = shaped(&clean);
    Cpu.add_gate_noise(&in_place, &shaped(&raw), &shaped(&noise), &in_place).unwrap();
    assert_eq!(values(&in_place), noisy(&raw));
    assert!(noisy(&vec![800.0; n]).iter().all(|v| v.is_finite()), "softplus of a large number is the number");

    let d_raw = Tensor::host([tokens, e], DType::F64);
    Cpu.add_gate_noise_backward(&shaped(&raw), &shaped(&noise), &shaped(&d_out), &d_raw).unwrap();
    check_gradient(&raw, &values(&d_raw), |r| noisy(r).iter().zip(&d_out).map(|(v, d)| v * d).sum());
}

#[test]
fn the_bias_rises_for_underloaded_experts_and_an_exact_mean_leaves_it() {
    let bias = tensor(&[0.5, 0.5, 0.5], [3]);
    Cpu.update_bias(&bias, &tensor(&[1, 4, 2, 0, 5, 3], [2, 3]), 0.25).unwrap(); // loads 1, 9, 5: mean 5
    assert_eq!(values(&bias), [0.75, 0.25, 0.5]);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (tokens, e) = (3000, 16);
    let probs = tensor(&random(7, tokens * e), [tokens, e]);
    let run = || {
        let experts = tensor(&top_k(&probs, None, None, 4), [tokens, 4]);
        let (lse, loss) = (Tensor::host([tokens], DType::F64), Tensor::host([1], DType::F64));
        Cpu.z_loss(&probs, &lse, &loss).unwrap();
        (values(&loss), balance_loss(&values(&probs), &experts, true, &Tensor::host([e], DType::F64)))
    };
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(run);
    assert_eq!(one, rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(run));
}
