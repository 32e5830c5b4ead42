//! Properties of routings and orders, on random shapes with their edges.

use crate::support::{uniform, values};
use fsmoe::device::{ExpertGroups, Lane};
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Assignment, Capacity, Routing, RowSplit, Rows};
use fsmoe::tensor::{DType, Element, Shape, Tensor};
use proptest::prelude::*;

/// The shape of a routing, and what its scores are like.
#[derive(Clone, Debug)]
struct Case {
    groups: usize,
    per_group: usize,
    experts: usize,
    k: usize,
    capacity: Capacity,
    width: usize,
    scores: Scores,
    prioritised: bool,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Scores {
    Random,
    /// Few distinct values: ties everywhere.
    Ties,
    /// The last expert is everyone's first choice.
    OneTakesAll,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..=3_usize, prop_oneof![Just(1_usize), 1..=24_usize], prop_oneof![Just(1_usize), 1..=12_usize]);
    let capacity = prop_oneof![
        Just(Capacity::Dropless),
        Just(Capacity::Factor(1e-6)), // C = 1
        (0.2..3.0_f64).prop_map(Capacity::Factor),
    ];
    let scores = prop_oneof![3 => Just(Scores::Random), 1 => Just(Scores::Ties), 1 => Just(Scores::OneTakesAll)];
    sizes
        .prop_flat_map(|(groups, per_group, experts)| {
            let k = prop_oneof![3 => 1..=experts, 1 => Just(experts)];
            (Just((groups, per_group, experts)), k)
        })
        .prop_flat_map(move |(sizes, k)| {
            (Just(sizes), Just(k), capacity.clone(), 1..=5_usize, scores.clone(), any::<bool>(), any::<u64>())
        })
        .prop_map(|((groups, per_group, experts), k, capacity, width, scores, prioritised, seed)| Case {
            groups,
            per_group,
            experts,
            k,
            capacity,
            width,
            scores,
            prioritised,
            seed,
        })
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() }
}

/// `n` values in −1..1, the same for the same seed and purpose.
fn random(seed: u64, purpose: u64, n: usize) -> Vec<f64> {
    uniform(seed.wrapping_mul(16).wrapping_add(purpose), n)
}

fn tensor<T: Element>(data: &[T], shape: impl Into<Shape>) -> Tensor {
    Tensor::from_slice(data, shape).unwrap()
}

fn ints(t: &Tensor) -> Vec<i32> {
    t.to_vec().unwrap()
}

fn max_load(loads: &Tensor) -> usize {
    ints(loads).into_iter().max().unwrap() as usize
}

impl Case {
    fn tokens(&self) -> usize {
        self.groups * self.per_group
    }

    fn score_values(&self) -> Vec<f64> {
        let mut scores = random(self.seed, 0, self.tokens() * self.experts);
        for (i, s) in scores.iter_mut().enumerate() {
            match self.scores {
                Scores::Random => {}
                Scores::Ties => *s = (*s * 2.0).round(),
                Scores::OneTakesAll if i % self.experts == self.experts - 1 => *s = 2.0,
                Scores::OneTakesAll => {}
            }
        }
        scores
    }

    fn priority(&self) -> Option<Tensor> {
        let mut p = random(self.seed, 1, self.tokens());
        p.iter_mut().for_each(|p| *p = (*p * 4.0).round()); // with ties
        self.prioritised.then(|| tensor(&p, [self.tokens()]))
    }

    fn x(&self) -> Tensor {
        tensor(&random(self.seed, 2, self.tokens() * self.width), [self.tokens(), self.width])
    }

    fn routing(&self, capacity: usize, loads: Tensor, assignment: Assignment) -> Routing {
        Routing {
            tokens: self.tokens(),
            experts: self.experts,
            groups: self.groups,
            capacity,
            assignment,
            balance_loss: None,
            z_loss: None,
            loads,
            entropy: tensor(&[0.0], [1]),
        }
    }

    /// The tokens choose. Weights are random, or all `unit`.
    fn token_choice(&self, lane: &Lane, unit: bool) -> Routing {
        let (t, k) = (self.tokens(), self.k);
        let experts = Tensor::host([t, k], DType::I32);
        lane.top_k(&tensor(&self.score_values(), [t, self.experts]), None, None, &experts).unwrap();
        let loads = Tensor::host([self.groups, self.experts], DType::I32);
        lane.count_experts(&experts, &loads).unwrap();
        let capacity = self.capacity.rows(k, self.per_group, self.experts).unwrap_or_else(|| max_load(&loads));
        let slots = Tensor::host([t, k], DType::I32);
        lane.assign_slots(&experts, self.priority().as_ref(), self.experts, self.groups, capacity, &slots).unwrap();
        let weights = if unit { vec![1.0; t * k] } else { random(self.seed, 3, t * k) };
        let assignment = Assignment::TokenChoice { experts, slots, weights: tensor(&weights, [t, k]) };
        self.routing(capacity, loads, assignment)
    }

    /// The experts choose.
    fn expert_choice(&self, lane: &Lane, unit: bool) -> Routing {
        let capacity = self.capacity.rows(self.k, self.per_group, self.experts).unwrap_or(self.per_group);
        let shape = [self.experts, self.groups * capacity];
        let (tokens, weights) = (Tensor::host(shape, DType::I32), Tensor::host(shape, DType::F64));
        let probs = tensor(&self.score_values(), [self.tokens(), self.experts]);
        lane.expert_choice(&probs, self.groups, capacity, &tokens, &weights).unwrap();
        if unit {
            weights.write(&vec![1.0; weights.elements()]).unwrap();
        }
        let loads = tensor(&vec![capacity as i32; self.groups * self.experts], [self.groups, self.experts]);
        self.routing(capacity, loads, Assignment::ExpertChoice { tokens, weights })
    }
}

/// All that an order computes for a routing, given the same rows (by padded row number) and gradients.
struct Run {
    rows: Rows,
    y: Vec<f64>,
    dx: Vec<f64>,
    d_rows: Vec<f64>,
    d_weights: Tensor,
}

fn run(lane: &Lane, kind: OrderKind, routing: &Routing, x: &Tensor, pick: &[usize], seed: u64) -> Run {
    let (order, width) = (kind.build(), x.dim(1));
    let picked = |purpose| {
        let all = random(seed, purpose, routing.padded_rows() * width);
        let rows: Vec<f64> = pick.iter().flat_map(|&r| all[r * width..(r + 1) * width].to_vec()).collect();
        tensor(&rows, [pick.len(), width])
    };
    let (rows, saved) = order.dispatch(lane, routing, x).unwrap();
    let (outputs, d_inputs) = (picked(10), picked(11));
    let dy = tensor(&random(seed, 12, x.elements()), *x.shape());
    let dx = tensor(&vec![f64::NAN; x.elements()], *x.shape());
    assert!(order.dispatch_backward(lane, routing, &saved, x, &d_inputs, &dx).unwrap().is_none());
    let y = values(&order.combine(lane, routing, &saved, &outputs).unwrap());
    let (d_rows, d_weights) = order.combine_backward(lane, routing, &saved, &outputs, &dy).unwrap();
    Run { rows, y, dx: values(&dx), d_rows: values(&d_rows), d_weights }
}

fn close(what: &str, a: &[f64], b: &[f64]) -> Result<(), TestCaseError> {
    prop_assert_eq!(a.len(), b.len(), "{}", what);
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        prop_assert!((a - b).abs() <= 1e-12, "{} [{}]: {} and {}", what, i, a, b);
    }
    Ok(())
}

/// The padded rows that are taken, sorted by expert and group: the ragged order's rows.
fn taken_rows(routing: &Routing) -> Vec<usize> {
    let (experts, groups, capacity) = (routing.experts, routing.groups, routing.capacity);
    let loads = ints(&routing.loads);
    let taken = |e: usize, g: usize| capacity.min(loads[g * experts + e] as usize);
    (0..experts * groups)
        .flat_map(|i| (0..taken(i / groups, i % groups)).map(move |slot| i * capacity + slot))
        .collect()
}

fn orders_agree(lane: &Lane, case: &Case, routing: &Routing) -> Result<(), TestCaseError> {
    let (x, width) = (case.x(), case.width);
    let all: Vec<usize> = (0..routing.padded_rows()).collect();
    let taken = taken_rows(routing);
    let tutel = run(lane, OrderKind::Tutel, routing, &x, &all, case.seed);
    let gshard = run(lane, OrderKind::GShard, routing, &x, &all, case.seed);
    let ragged = run(lane, OrderKind::Ragged, routing, &x, &taken, case.seed);
    // Ragged rows spread to their padded places; the places nothing took are zeros.
    let spread = |rows: &[f64]| {
        let mut padded = vec![0.0; all.len() * width];
        for (i, &r) in taken.iter().enumerate() {
            padded[r * width..(r + 1) * width].copy_from_slice(&rows[i * width..(i + 1) * width]);
        }
        padded
    };
    let even = RowSplit::Even { experts: case.experts, each: case.groups * routing.capacity };
    for padded in [&tutel, &gshard] {
        prop_assert_eq!(format!("{:?}", padded.rows.split), format!("{even:?}"));
    }
    for e in 0..case.experts {
        let of_expert: Vec<_> = (0..taken.len()).filter(|&i| even.range(e).unwrap().contains(&taken[i])).collect();
        prop_assert_eq!(ragged.rows.split.range(e).unwrap().collect::<Vec<_>>(), of_expert, "expert {}", e);
    }
    let rows = values(&tutel.rows.data);
    close("rows, gshard", &values(&gshard.rows.data), &rows)?;
    close("rows, ragged", &spread(&values(&ragged.rows.data)), &rows)?;
    close("d_rows, gshard", &gshard.d_rows, &tutel.d_rows)?;
    close("d_rows, ragged", &spread(&ragged.d_rows), &tutel.d_rows)?;
    for (name, other) in [("gshard", &gshard), ("ragged", &ragged)] {
        close(&format!("y, {name}"), &other.y, &tutel.y)?;
        close(&format!("dx, {name}"), &other.dx, &tutel.dx)?;
        prop_assert_eq!(other.d_weights.shape(), tutel.d_weights.shape());
        close(&format!("d_weights, {name}"), &values(&other.d_weights), &values(&tutel.d_weights))?;
    }
    Ok(())
}

/// Combine after dispatch, with unit weights, is every token times the number of its rows.
fn rows_come_back(lane: &Lane, case: &Case, routing: &Routing, kept: &[usize]) -> Result<(), TestCaseError> {
    let x = case.x();
    let want: Vec<f64> = values(&x).iter().enumerate().map(|(i, x)| kept[i / case.width] as f64 * x).collect();
    for &kind in OrderKind::ALL {
        let order = kind.build();
        let (rows, saved) = order.dispatch(lane, routing, &x).unwrap();
        close(kind.name(), &values(&order.combine(lane, routing, &saved, &rows.data).unwrap()), &want)?;
    }
    Ok(())
}

fn choices(routing: &Routing) -> (Vec<i32>, Vec<i32>) {
    match &routing.assignment {
        Assignment::TokenChoice { experts, slots, .. } => (ints(experts), ints(slots)),
        _ => panic!("not a token choice"),
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_orders_agree_on_token_choice(case in cases()) {
        let lane = Lane::cpu();
        orders_agree(&lane, &case, &case.token_choice(&lane, false))?;
    }

    #[test]
    fn the_orders_agree_on_expert_choice(case in cases()) {
        let lane = Lane::cpu();
        orders_agree(&lane, &case, &case.expert_choice(&lane, false))?;
    }

    #[test]
    fn unit_weights_bring_back_each_token_times_its_kept_choices(case in cases()) {
        let lane = Lane::cpu();
        let routing = case.token_choice(&lane, true);
        let (_, slots) = choices(&routing);
        let kept: Vec<usize> = slots.chunks(case.k).map(|s| s.iter().filter(|s| **s >= 0).count()).collect();
        rows_come_back(&lane, &case, &routing, &kept)?;

        let routing = case.expert_choice(&lane, true);
        let mut kept = vec![0; case.tokens()];
        if let Assignment::ExpertChoice { tokens, .. } = &routing.assignment {
            ints(tokens).into_iter().for_each(|t| kept[t as usize] += 1);
        }
        rows_come_back(&lane, &case, &routing, &kept)?;
    }

    #[test]
    fn slots_are_given_once_in_order_and_within_capacity(case in cases()) {
        let lane = Lane::cpu();
        let routing = case.token_choice(&lane, false);
        let (experts, slots) = choices(&routing);
        let (k, c) = (case.k, routing.capacity);
        let priority = case.priority().map(|p| values(&p));
        let mut want = vec![-2; slots.len()];
        let (mut kept, mut dropped) = (0, 0);
        for g in 0..case.groups {
            let mut tokens: Vec<usize> = (g * case.per_group..(g + 1) * case.per_group).collect();
            if let Some(p) = &priority {
                tokens.sort_by(|&a, &b| p[b].partial_cmp(&p[a]).unwrap().then(a.cmp(&b)));
            }
            // First choices before second, the tokens in order: an expert takes the first C of these.
            let queue: Vec<usize> = (0..k).flat_map(|j| tokens.iter().map(move |t| t * k + j)).collect();
            for e in 0..case.experts {
                let takers: Vec<usize> = queue.iter().copied().filter(|&i| experts[i] == e as i32).collect();
                prop_assert_eq!(ints(&routing.loads)[g * case.experts + e] as usize, takers.len());
                takers.iter().enumerate().for_each(|(s, &i)| want[i] = if s < c { s as i32 } else { -1 });
                kept += takers.len().min(c) as u64;
                dropped += takers.len().saturating_sub(c) as u64;
            }
        }
        prop_assert_eq!(&slots, &want);
        prop_assert_eq!(slots.iter().filter(|s| **s >= 0).count() as u64, kept);
        let stats = routing.stats(&lane).unwrap();
        prop_assert_eq!(stats.dropped, dropped);
        prop_assert_eq!(kept + dropped, (case.tokens() * k) as u64);
        prop_assert_eq!(stats.choices, kept + dropped);
        if case.capacity == Capacity::Dropless {
            prop_assert_eq!(dropped, 0);
        }
        // No row has two choices: Tutel's inverse index would refuse it, but see it here as well.
        let mut places: Vec<(usize, i32, i32)> = (0..slots.len())
            .filter(|&i| slots[i] >= 0)
            .map(|i| (i / k / case.per_group, experts[i], slots[i]))
            .collect();
        places.sort_unstable();
        prop_assert!(places.windows(2).all(|w| w[0] != w[1]));
        prop_assert!(places.iter().all(|p| (p.2 as usize) < c));
    }

    #[test]
    fn expert_choice_takes_the_best_tokens_of_each_group(case in cases()) {
        let lane = Lane::cpu();
        let routing = case.expert_choice(&lane, false);
        let (scores, c) = (case.score_values(), routing.capacity);
        if let Assignment::ExpertChoice { tokens, weights } = &routing.assignment {
            let (tokens, weights) = (ints(tokens), values(weights));
            for (i, chosen) in tokens.chunks(c).enumerate() {
                let (e, g) = (i / case.groups, i % case.groups);
                let p = |t: usize| scores[t * case.experts + e];
                let mut want: Vec<usize> = (g * case.per_group..(g + 1) * case.per_group).collect();
                want.sort_by(|&a, &b| p(b).partial_cmp(&p(a)).unwrap().then(a.cmp(&b)));
                want.truncate(c);
                prop_assert_eq!(chosen.iter().map(|t| *t as usize).collect::<Vec<_>>(), want.clone());
                prop_assert_eq!(&weights[i * c..(i + 1) * c], want.into_iter().map(p).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn top_k_is_a_stable_sort_inside_the_kept_groups(
        case in cases(), biased in any::<bool>(), size in 1..=4_usize, groups in 1..=4_usize, keep in 0.0..1.0_f64,
    ) {
        let lane = Lane::cpu();
        let case = Case { experts: size * groups, ..case };
        let kept = 1 + (keep * groups as f64) as usize;
        let k = case.k.min(kept * size);
        let (t, e, scores) = (case.tokens(), case.experts, case.score_values());
        let bias = if biased { random(case.seed, 4, e).iter().map(|b| (b * 2.0).round()).collect() } else { vec![0.0; e] };
        let out = Tensor::host([t, k], DType::I32);
        let bias_tensor = biased.then(|| tensor(&bias, [e]));
        let expert_groups = (kept < groups || biased).then_some(ExpertGroups { groups, kept });
        lane.top_k(&tensor(&scores, [t, e]), bias_tensor.as_ref(), expert_groups, &out).unwrap();
        let sorted = |values: &[f64]| {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
            order
        };
        for (t, chosen) in ints(&out).chunks(k).enumerate() {
            let row: Vec<f64> = (0..e).map(|i| scores[t * e + i] + bias[i]).collect();
            let rank = |g: &[f64]| sorted(g).iter().take(2).map(|&i| g[i]).sum::<f64>();
            let ranks: Vec<f64> = row.chunks(size).map(rank).collect();
            let usable = &sorted(&ranks)[..kept];
            let want: Vec<i32> =
                sorted(&row).iter().filter(|&e| usable.contains(&(e / size))).take(k).map(|&e| e as i32).collect();
            prop_assert_eq!(chosen, want);
        }
    }

    #[test]
    fn a_dense_routing_mixes_tokens_and_slots_of_a_group(case in cases()) {
        let lane = Lane::cpu();
        let c = case.capacity.rows(case.k, case.per_group, case.experts).unwrap_or(2);
        let (t, m, slots) = (case.tokens(), case.width, case.experts * c);
        let [dispatch, combine] = [5, 6].map(|p| random(case.seed, p, t * slots));
        let loads = tensor(&vec![c as i32; case.groups * case.experts], [case.groups, case.experts]);
        let matrix = |v: &[f64]| tensor(v, [t, slots]);
        let routing =
            case.routing(c, loads, Assignment::Dense { dispatch: matrix(&dispatch), combine: matrix(&combine) });
        let r = routing.padded_rows();
        let x = case.x();
        let [outputs, d_inputs] = [7, 8].map(|p| random(case.seed, p, r * m));
        let dy = random(case.seed, 9, t * m);
        // Every pair of a token and a slot of its group: (entry of the matrices, token, row).
        let pairs: Vec<(usize, usize, usize)> = (0..t * slots)
            .map(|i| {
                let (token, e, s) = (i / slots, i % slots / c, i % c);
                (i, token, (e * case.groups + token / case.per_group) * c + s)
            })
            .collect();
        let gather = |w: &[f64], x: &[f64]| {
            let mut rows = vec![0.0; r * m];
            pairs.iter().for_each(|&(i, t, r)| (0..m).for_each(|j| rows[r * m + j] += w[i] * x[t * m + j]));
            rows
        };
        let scatter = |w: &[f64], rows: &[f64]| {
            let mut y = vec![0.0; t * m];
            pairs.iter().for_each(|&(i, t, r)| (0..m).for_each(|j| y[t * m + j] += w[i] * rows[r * m + j]));
            y
        };
        let d_matrix = |x: &[f64], rows: &[f64]| -> Vec<f64> {
            pairs.iter().map(|&(_, t, r)| (0..m).map(|j| x[t * m + j] * rows[r * m + j]).sum()).collect()
        };
        let order = OrderKind::GShard.build();
        let (rows, saved) = order.dispatch(&lane, &routing, &x).unwrap();
        close("rows", &values(&rows.data), &gather(&dispatch, &values(&x)))?;
        let dx = Tensor::host([t, m], DType::F64);
        let d = order.dispatch_backward(&lane, &routing, &saved, &x, &tensor(&d_inputs, [r, m]), &dx).unwrap().unwrap();
        close("dx", &values(&dx), &scatter(&dispatch, &d_inputs))?;
        close("d_dispatch", &values(&d), &d_matrix(&values(&x), &d_inputs))?;
        let outputs_tensor = tensor(&outputs, [r, m]);
        close("y", &values(&order.combine(&lane, &routing, &saved, &outputs_tensor).unwrap()), &scatter(&combine, &outputs))?;
        let (d_rows, d) =
            order.combine_backward(&lane, &routing, &saved, &outputs_tensor, &tensor(&dy, [t, m])).unwrap();
        close("d_rows", &values(&d_rows), &gather(&combine, &dy))?;
        close("d_combine", &values(&d), &d_matrix(&dy, &outputs))?;
    }
}
