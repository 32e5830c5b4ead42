use super::*;
use crate::comm::{AllToAllKind, Topology, local};
use crate::device::LaneKind;
use crate::engine::LANES;
use crate::moe::expert::ExpertKind;
use crate::moe::gate::{GateKind, SigmoidOptions};
use crate::moe::order::OrderKind;
use crate::moe::{Hook, MoeLayer};
use crate::rng::{Counter, Purpose};
use crate::schedule::{GradGroup, policy};
use proptest::prelude::*;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(30);
const WIDTH: usize = 5;

/// A world and a layer on it.
#[derive(Clone, Debug)]
struct Case {
    sizes: Sizes,
    config: MoeConfig,
    all_to_all: AllToAllKind,
    /// Of each rank.
    tokens: usize,
    train: bool,
    hooks: bool,
}

/// Which policy cuts the passes, and how.
#[derive(Clone, Debug)]
struct Cutting {
    policy: usize,
    degrees: [Degree; 2],
}

impl Cutting {
    fn plan(&self) -> LayerPlan {
        let policy: Arc<dyn Policy> = Arc::from(policy::all().remove(self.policy));
        LayerPlan { policy, degrees: self.degrees, ..LayerPlan::default() }
    }
}

fn divisor(n: usize, pick: usize) -> usize {
    let all: Vec<usize> = (1..=n).filter(|i| n.is_multiple_of(*i)).collect();
    all[pick % all.len()]
}

fn cases(ranks: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Case> {
    let kinds = (
        prop::sample::select(GateKind::ALL),
        prop::sample::select(OrderKind::ALL),
        prop::sample::select(ExpertKind::ALL),
        prop::sample::select(AllToAllKind::ALL),
    );
    let switches = prop::array::uniform5(prop::bool::ANY);
    (ranks, prop::array::uniform8(0usize..720), kinds, switches, 0.4f64..2.5).prop_map(
        |(p, picks, (gate, order, expert, all_to_all), [dropless, train, hooks, noise, first], factor)| {
            let (mp, ep) = (divisor(p, picks[0]), divisor(p, picks[1]));
            let esp = divisor(p / ep, picks[2]);
            let sizes = Sizes { ranks: p, nodes: divisor(p, picks[3]), dp: p / mp, mp, ep, esp };
            let experts = ep * (1 + picks[4] % 2).max(2_usize.div_ceil(ep));
            let groups = 1 + picks[5] % 2;
            let fixed = matches!(gate, GateKind::Soft | GateKind::ExpertChoice);
            let config = MoeConfig {
                gate,
                order: if gate == GateKind::Soft { OrderKind::GShard } else { order },
                expert,
                experts,
                top_k: 1 + picks[6] % experts.min(3),
                hidden: WIDTH,
                ffn: esp * (1 + picks[7] % 3),
                capacity: if dropless && !fixed { Capacity::Dropless } else { Capacity::Factor(factor) },
                groups,
                balance_weight: 0.3,
                balance_first_only: first,
                z_weight: 0.2,
                batch_prioritised: noise && !fixed,
                gate_noise: noise && gate == GateKind::TopK,
                sigmoid: SigmoidOptions { bias_rate: 0.01, ..SigmoidOptions::default() },
                soft_slots: 1 + picks[5] % 3,
                x_moe_dim: 3,
                init_std: 0.7,
                ..MoeConfig::default()
            };
            Case { sizes, config, all_to_all, tokens: groups * (1 + picks[6] % 7), train, hooks }
        },
    )
}

fn cuttings() -> impl Strategy<Value = Cutting> {
    let degree = (1usize..=16, 1usize..=16).prop_map(|(r, d)| Degree { r, d: d.min(r) });
    (0usize..policy::all().len(), degree.clone(), degree)
        .prop_map(|(policy, forward, backward)| Cutting { policy, degrees: [forward, backward] })
}

fn random(step: u64, shape: [usize; 2]) -> Tensor {
    let t = Tensor::host(shape, DType::F64);
    Lane::cpu().normal(Counter { seed: 7, purpose: Purpose::Test, step }, 0, &t).unwrap();
    t
}

fn values(t: &Tensor) -> Vec<f64> {
    let t = Lane::cpu().cast(t, DType::F64).unwrap();
    t.to_vec().unwrap()
}

fn close(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    let off =
        got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, |m, v| if v > m || v.is_nan() { v } else { m });
    assert!(off <= 1e-10 * largest, "{what} is off by {off:e} of {largest:e}");
}

fn bits(all: &[Vec<f64>]) -> Vec<Vec<u64>> {
    all.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect()
}

/// The logistic function: elementwise, so that it does not matter which rows it is given at once, and not linear, so that it
/// matters that they are whole.
struct Squash;

impl Hook for Squash {
    fn forward(&self, lane: &Lane, t: &Tensor) -> Result<(Tensor, Saved)> {
        let out = lane.empty_like(t)?;
        lane.sigmoid(t, &out)?;
        Ok((out.clone(), Box::new(out)))
    }

    fn backward(&self, lane: &Lane, saved: &Saved, d: &Tensor) -> Result<Tensor> {
        let (y, out): (&Tensor, Tensor) = (crate::moe::saved(saved)?, lane.empty_like(d)?);
        lane.sigmoid_backward(y, d, &out)?;
        Ok(out)
    }
}

fn hooks(set: bool) -> Hooks {
    let hook = || set.then(|| Box::new(Squash) as Box<dyn Hook>);
    Hooks {
        before_moe_start: hook(),
        before_dispatch: hook(),
        after_dispatch: hook(),
        before_combine: hook(),
        after_combine: hook(),
        before_moe_end: hook(),
    }
}

/// What a rank gives: y, aux, dx, gate gradients summed over all ranks, expert gradients over replicas, biases; and, as a
/// single rank, all of it.
struct Results {
    y: Vec<f64>,
    aux: Vec<f64>,
    dx: Vec<f64>,
    parameters: Vec<Tensor>,
    buffers: Vec<Vec<f64>>,
    loads: Vec<u64>,
    dropped: u64,
}

const SEED: u64 = 11;

fn step(case: &Case, first_token: usize) -> StepContext {
    StepContext { train: case.train, seed: 3, step: 5, first_token: 1000 + first_token as u64 }
}

fn single(case: &Case) -> Results {
    let (lane, p) = (Lane::cpu(), case.sizes.ranks);
    let init = Init::new(&lane, DType::F64, SEED);
    let config = MoeConfig { groups: case.config.groups * p, ..case.config.clone() };
    let gate = gate::build(&init.child("gate"), &config).unwrap();
    let expert = expert::build(&init.child("experts"), &config).unwrap();
    let layer = MoeLayer::with_modules(config.clone(), gate, config.order.build(), expert, hooks(case.hooks)).unwrap();
    let tape = Tape::new(&lane);
    let x = tape.leaf(random(1, [p * case.tokens, WIDTH]));
    let out = layer.forward(&tape, &x, step(case, 0)).unwrap();
    let d_aux = lane.full([1], DType::F64, 0.9).unwrap();
    let grads = tape.backward(&[(&out.y, random(2, [p * case.tokens, WIDTH])), (&out.aux_loss, d_aux)]).unwrap();
    layer.after_step(&lane).unwrap();
    let stats = out.routing.stats(&lane).unwrap();
    Results {
        y: values(out.y.value()),
        aux: values(out.aux_loss.value()),
        dx: values(grads.get(&x).unwrap()),
        parameters: layer.parameters().iter().map(|p| p.grad().clone()).collect(),
        buffers: layer.buffers().iter().map(|(_, t)| values(t)).collect(),
        loads: stats.loads,
        dropped: stats.dropped,
    }
}

/// The layer of a case on one rank. Hooks are set from outside, where modules are.
fn layer(case: &Case, parallel: &Arc<Parallel>) -> Result<DistributedMoe> {
    let init = Init::new(&Lane::cpu(), DType::F64, SEED);
    let mut layer = DistributedMoe::new(&init, &case.config, parallel)?;
    Arc::get_mut(&mut layer.0).unwrap().hooks = hooks(case.hooks);
    Ok(layer)
}

fn parallel(case: &Case, world: Arc<dyn Communicator>) -> Result<Arc<Parallel>> {
    Parallel::new(&Lane::cpu(), world, Topology::new(case.sizes)?, case.all_to_all.build())
}

/// The tokens of a rank's MP group.
fn tokens(case: &Case, rank: usize, t: &Tensor) -> Tensor {
    let each = case.tokens * case.sizes.mp;
    t.narrow(0, rank / case.sizes.mp * each, each).unwrap()
}

fn distributed(case: &Case, cutting: &Cutting, parallel: &Arc<Parallel>) -> Result<Results> {
    let (lane, p, rank) = (Lane::cpu(), case.sizes.ranks, parallel.groups().rank());
    let layer = layer(case, parallel)?;
    layer.set_plan(cutting.plan());
    let tape = Tape::new(&lane);
    let x = tape.leaf(tokens(case, rank, &random(1, [p * case.tokens, WIDTH])));
    let out = layer.forward(&tape, &x, step(case, rank / case.sizes.mp * case.sizes.mp * case.tokens))?;
    let d_aux = lane.full([1], DType::F64, 0.9)?;
    let dy = tokens(case, rank, &random(2, [p * case.tokens, WIDTH]));
    let grads = tape.backward(&[(&out.y, dy), (&out.aux_loss, d_aux)])?;
    layer.after_step(&lane)?;
    let groups = parallel.groups();
    for (parameters, kind) in
        [(layer.gate_parameters(), GroupKind::World), (layer.expert_parameters(), GroupKind::Replica)]
    {
        parameters.iter().try_for_each(|p| groups.get(kind).all_reduce(&lane, p.grad()))?;
    }
    let stats = out.routing.stats(&lane)?;
    Ok(Results {
        y: values(out.y.value()),
        aux: values(out.aux_loss.value()),
        dx: values(grads.get(&x).unwrap()),
        parameters: layer.parameters().iter().map(|p| p.grad().clone()).collect(),
        buffers: layer.buffers().iter().map(|(_, t)| values(t)).collect(),
        loads: stats.loads,
        dropped: stats.dropped,
    })
}

/// Holds a world against one rank with the same routing groups, and cuttings against each other.
fn check(case: &Case, cuttings: &[Cutting]) {
    let want = single(case);
    let stats = local::run(case.sizes.ranks, TIMEOUT, |world| {
        let parallel = parallel(case, world)?;
        let rank = parallel.groups().rank();
        let mut first: Option<Vec<Vec<u64>>> = None;
        let mut stats = (Vec::new(), 0);
        for cutting in cuttings {
            let got = distributed(case, cutting, &parallel)?;
            let rows = |all: &[f64]| {
                let each = case.tokens * case.sizes.mp * WIDTH;
                all[rank / case.sizes.mp * each..][..each].to_vec()
            };
            close("y", &got.y, &rows(&want.y));
            close("dx", &got.dx, &rows(&want.dx));
            close("the auxiliary loss", &got.aux, &want.aux);
            let shards = layer(case, &parallel)?.shards().to_vec();
            let routers = want.parameters.len() - shards.len();
            for (i, (got, want)) in got.parameters.iter().zip(&want.parameters).enumerate() {
                let mine = Lane::cpu().empty(*got.shape(), got.dtype())?;
                let want = match i.checked_sub(routers) {
                    None => want,
                    Some(i) => {
                        shards[i].take(&Lane::cpu(), rank, want, &mine)?;
                        &mine
                    }
                };
                close(&format!("the gradient of parameter {i}"), &values(got), &values(want));
            }
            assert_eq!(bits(&got.buffers), bits(&want.buffers), "selection biases");
            let mut all = vec![got.y, got.aux, got.dx];
            all.extend(got.parameters.iter().map(values));
            let all = bits(&all);
            assert!(*first.get_or_insert_with(|| all.clone()) == all, "{cutting:?}: other bits than {:?}", cuttings[0]);
            stats = (got.loads, got.dropped);
        }
        Ok(stats)
    })
    .unwrap();
    let loads = (0..case.config.experts).map(|e| stats.iter().map(|s| s.0[e]).sum::<u64>()).collect::<Vec<_>>();
    assert_eq!((loads, stats.iter().map(|s| s.1).sum::<u64>()), (want.loads, want.dropped));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn random_worlds_equal_one_rank(case in cases(1..=8), cuttings in prop::collection::vec(cuttings(), 3)) {
        check(&case, &cuttings);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn larger_random_worlds_equal_one_rank(case in cases(9..=16), cuttings in prop::collection::vec(cuttings(), 2)) {
        check(&case, &cuttings);
    }
}

fn usual(gate: GateKind, order: OrderKind) -> Case {
    let sizes = Sizes { ranks: 8, nodes: 2, dp: 2, mp: 4, ep: 2, esp: 4 };
    let config = MoeConfig { gate, order, experts: 4, hidden: WIDTH, ffn: 8, init_std: 0.7, ..MoeConfig::default() };
    Case { sizes, config, all_to_all: AllToAllKind::Hierarchical2d, tokens: 20, train: true, hooks: false }
}

#[test]
fn every_policy_runs_the_usual_layout() {
    let cuttings: Vec<Cutting> = (0..policy::all().len())
        .map(|policy| Cutting { policy, degrees: [Degree { r: 1 + policy, d: 1 + policy / 2 }, Degree { r: 4, d: 2 }] })
        .collect();
    for (gate, order) in [(GateKind::TopK, OrderKind::Tutel), (GateKind::XMoe, OrderKind::Ragged)] {
        check(&usual(gate, order), &cuttings);
    }
    // EP over two nodes of several ranks each: all-to-alls of several phases.
    for all_to_all in [AllToAllKind::Hierarchical1d, AllToAllKind::Hierarchical2d] {
        let sizes = Sizes { ranks: 8, nodes: 2, dp: 4, mp: 2, ep: 4, esp: 2 };
        check(&Case { sizes, all_to_all, ..usual(GateKind::TopK, OrderKind::Ragged) }, &cuttings);
    }
}

/// In multiples of a rank's rows, forward and backward each, with one piece per chunk.
#[test]
fn rows_are_moved_no_more_often_than_the_way_needs() {
    let sizes = |ranks, nodes, ep, esp| Sizes { ranks, nodes, dp: ranks, mp: 1, ep, esp };
    let (direct, two) = (AllToAllKind::Direct, AllToAllKind::Hierarchical2d);
    for (sizes, all_to_all, r, hooks, times) in [
        (sizes(2, 1, 1, 1), direct, 1, false, 0),
        // Out of the order's layout, to where the chunk ends, and back into the layout.
        (sizes(2, 1, 1, 1), direct, 2, false, 3),
        // After the dispatch and before the combine.
        (sizes(2, 1, 2, 1), direct, 1, false, 2),
        (sizes(2, 1, 2, 1), direct, 2, false, 4),
        // After the all-gather and before the reduce-scatter, which bring twice as many.
        (sizes(2, 1, 1, 2), direct, 1, false, 4),
        (sizes(2, 1, 1, 2), direct, 2, false, 6),
        (sizes(4, 1, 2, 2), direct, 1, false, 4),
        (sizes(4, 1, 2, 2), direct, 2, false, 6),
        (sizes(4, 1, 2, 2), direct, 1, true, 6),
        // Twice for each all-to-all of two levels.
        (sizes(4, 2, 4, 1), two, 1, false, 6),
    ] {
        let case = usual(GateKind::TopK, OrderKind::Tutel);
        // One row to a routing group and expert: as many rows as chunks.
        let config =
            MoeConfig { experts: 8, top_k: 1, groups: r, capacity: Capacity::Factor(0.01), ..case.config.clone() };
        let case = Case { sizes, config, all_to_all, tokens: 2 * r, hooks, ..case };
        local::run(sizes.ranks, TIMEOUT, |world| {
            let parallel = parallel(&case, world)?;
            let layer = layer(&case, &parallel)?;
            layer.set_plan(LayerPlan { degrees: [Degree::all_first(r); 2], ..LayerPlan::default() });
            let moved = || parallel.groups().expert().arranger().rows_moved();
            let tape = Tape::new(&Lane::cpu());
            let mine =
                |step| tokens(&case, parallel.groups().rank(), &random(step, [sizes.ranks * case.tokens, WIDTH]));
            let out = layer.forward(&tape, &tape.leaf(mine(1)), step(&case, 0))?;
            let (rows, forward) = (out.routing.padded_rows() as u64, moved());
            assert_eq!(rows, 8 * r as u64);
            tape.backward(&[(&out.y, mine(2))])?;
            assert_eq!((forward, moved() - forward), (times * rows, times * rows), "{sizes:?}, r = {r}, {hooks}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn timelines_are_of_the_graph_that_was_asked_for() {
    let case = usual(GateKind::TopK, OrderKind::Tutel);
    local::run(8, TIMEOUT, |world| {
        let parallel = parallel(&case, world)?;
        let layer = layer(&case, &parallel)?;
        layer.set_plan(LayerPlan { degrees: [Degree { r: 3, d: 2 }, Degree { r: 2, d: 1 }], ..LayerPlan::default() });
        let tape = Tape::new(&Lane::cpu());
        let x = tape.leaf(tokens(&case, parallel.groups().rank(), &random(1, [160, WIDTH])));
        assert!(parallel.traced().unwrap_err().to_string().contains("not begun"));
        parallel.trace()?;
        let out = layer.forward(&tape, &x, step(&case, 0))?;
        assert!(layer.timelines()[1].is_none());
        parallel.span("between", LaneKind::InterNode, || Ok(()))?;
        tape.backward(&[(&out.y, tokens(&case, parallel.groups().rank(), &random(2, [160, WIDTH])))])?;
        let names = layer.timelines().map(|t| t.unwrap().spans.iter().map(|s| s.name.clone()).collect::<Vec<_>>());
        // D, AG, E, RS and C of every chunk; backward W as well.
        assert_eq!((names[0].len(), names[1].len()), (15, 12));
        assert!(names[0].contains(&"AG3 L1".to_owned()) && names[1].contains(&"W'2 L1".to_owned()), "{names:?}");
        // The trace has both passes and what came between, the dense part included, one after the other on every lane.
        let spans = parallel.traced()?.spans;
        let traced: Vec<String> = spans.iter().map(|s| s.name.clone()).collect();
        assert_eq!(traced, [&names[0][..], &["between", "dense L2"].map(str::to_owned), &names[1][..]].concat());
        for lane in LANES {
            let own: Vec<_> = spans.iter().filter(|s| s.lane == lane).collect();
            assert!(own.iter().all(|s| 0.0 <= s.start && s.start <= s.end));
            assert!(own.windows(2).all(|pair| pair[0].end <= pair[1].start + 1e-6));
        }
        Ok(())
    })
    .unwrap();
}

/// Two layers, one after the other, whose gradients lie in buffers; those of the second are summed during the backward of
/// the first.
#[test]
fn slices_are_summed_in_the_backward_of_the_layer_in_front() {
    let case = usual(GateKind::TopK, OrderKind::Tutel);
    // Two replicas of the experts.
    let sizes = Sizes { ranks: 8, nodes: 4, dp: 4, mp: 2, ep: 2, esp: 2 };
    let case = Case { sizes, tokens: 6, ..case };
    let begin = |name: &str| Init::new(&Lane::cpu(), DType::F64, SEED).child(name);
    local::run(8, TIMEOUT, |world| {
        let parallel = parallel(&case, world)?;
        let (lane, groups, rank) = (Lane::cpu(), parallel.groups(), parallel.groups().rank());
        let layers = || -> crate::Result<[DistributedMoe; 2]> {
            Ok([
                DistributedMoe::new(&begin("0"), &case.config, &parallel)?,
                DistributedMoe::new(&begin("1"), &case.config, &parallel)?,
            ])
        };
        let run = |layers: &[DistributedMoe; 2]| {
            let tape = Tape::new(&lane);
            let x = tape.leaf(tokens(&case, rank, &random(1, [48, WIDTH])));
            let h = layers[0].forward(&tape, &x, step(&case, 0))?.y;
            let y = layers[1].forward(&tape, &h, step(&case, 0))?.y;
            tape.backward(&[(&y, tokens(&case, rank, &random(2, [48, WIDTH])))]).map(|_| ())
        };
        let plain: [DistributedMoe; 2] = layers()?;
        run(&plain)?;
        let grads = |layers: &[DistributedMoe; 2]| {
            layers.iter().flat_map(|l| l.parameters()).map(|p| values(p.grad())).collect::<Vec<_>>()
        };
        for layer in &plain {
            layer
                .gate_parameters()
                .iter()
                .try_for_each(|p| groups.get(GroupKind::World).all_reduce(&lane, p.grad()))?;
            layer
                .expert_parameters()
                .iter()
                .try_for_each(|p| groups.get(GroupKind::Replica).all_reduce(&lane, p.grad()))?;
        }
        let want = bits(&grads(&plain));

        let sliced: [DistributedMoe; 2] = layers()?;
        let of = |layer: &DistributedMoe| {
            let gate = layer.gate_parameters().into_iter().map(|p| (p, GradGroup::Replicated));
            gate.chain(layer.expert_parameters().into_iter().map(|p| (p, GradGroup::Expert))).collect::<Vec<_>>()
        };
        let order = [of(&sliced[1]), of(&sliced[0])].concat();
        let gradients = Arc::new(GradientBuffers::new(&lane, groups, &order)?);
        let bytes =
            |layer: &DistributedMoe| layer.expert_parameters().iter().map(|p| 8 * p.elements() as u64).sum::<u64>();
        let (experts, cut) = (bytes(&sliced[1]), 8 * 7);
        let slice = |group, begin, end| Slice { group, begin, end };
        let slices = vec![
            slice(GradGroup::Expert, 0, cut),
            slice(GradGroup::Expert, cut, experts),
            slice(GradGroup::Replicated, 0, 8 * 9),
        ];
        for policy in 0..policy::all().len() {
            gradients.zero(&lane)?;
            let cutting = Cutting { policy, degrees: [Degree::all_first(2); 2] };
            sliced[1].set_plan(cutting.plan());
            sliced[0].set_plan(LayerPlan {
                slices: slices.clone(),
                gradients: Some(gradients.clone()),
                ..cutting.plan()
            });
            run(&sliced)?;
            let backward = sliced[0].timelines()[1].clone().unwrap();
            assert_eq!(backward.spans.iter().filter(|s| s.name.starts_with("G ")).count(), 3);
            let rest = gradients.rest();
            assert_eq!(rest.iter().map(|s| s.begin).collect::<Vec<_>>(), [experts, 8 * 9]);
            rest.into_iter().try_for_each(|s| gradients.reduce(&lane, s))?;
            assert!(gradients.rest().is_empty());
            assert!(bits(&grads(&sliced)) == want, "policy {policy}: other bits than without slices");
        }
        let again = gradients.reduce(&lane, slice(GradGroup::Expert, 0, 8)).unwrap_err().to_string();
        assert!(again.contains("bytes 0..8 of the expert gradients") && again.contains("are summed"), "{again}");
        Ok(())
    })
    .unwrap();
}

/// An expert that goes wrong on one rank.
struct Broken {
    inner: Box<dyn Expert>,
    rank: usize,
    panics: bool,
}

impl Expert for Broken {
    fn name(&self) -> &str {
        "broken"
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.inner.parameters()
    }

    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)> {
        match (self.rank, self.panics) {
            (3, true) => panic!("a hot expert"),
            (3, false) => config_err!("a cold expert"),
            _ => self.inner.forward(lane, rows),
        }
    }

    fn backward_data(&self, lane: &Lane, rows: &Rows, saved: &Saved, d: &Tensor) -> Result<(Tensor, Saved)> {
        self.inner.backward_data(lane, rows, saved, d)
    }

    fn backward_weights(&self, lane: &Lane, rows: &Rows, saved: &Saved, d: &Tensor, left: &Saved) -> Result<()> {
        self.inner.backward_weights(lane, rows, saved, d, left)
    }
}

#[test]
fn an_expert_that_fails_or_panics_ends_every_rank_within_a_second() {
    let case = usual(GateKind::TopK, OrderKind::Tutel);
    for (panics, says) in [(false, "a cold expert"), (true, "a hot expert")] {
        let begin = Instant::now();
        let messages = local::run(8, TIMEOUT, |world| {
            let parallel = parallel(&case, world)?;
            let rank = parallel.groups().rank();
            let mut layer = layer(&case, &parallel)?;
            let inner = Arc::get_mut(&mut layer.0).unwrap();
            let whole = std::mem::replace(&mut inner.expert, Box::new(Nothing));
            inner.expert = Box::new(Broken { inner: whole, rank, panics });
            layer.set_plan(LayerPlan { degrees: [Degree::all_first(4); 2], ..LayerPlan::default() });
            let tape = Tape::new(&Lane::cpu());
            let x = tape.leaf(tokens(&case, rank, &random(1, [160, WIDTH])));
            Ok(layer.forward(&tape, &x, step(&case, 0)).err().unwrap().to_string())
        })
        .unwrap();
        assert!(begin.elapsed() < Duration::from_secs(1), "it took {:?}", begin.elapsed());
        for (rank, message) in messages.iter().enumerate() {
            let named = message.contains("rank 3") || rank == 3;
            assert!(named && message.contains("E1 L1"), "rank {rank}: {message}");
        }
        assert!(messages[3].contains(says), "{}", messages[3]);
    }
}

/// Stands in for an expert that has been taken out.
struct Nothing;

impl Expert for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }
    fn parameters(&self) -> Vec<Parameter> {
        Vec::new()
    }
    fn forward(&self, _: &Lane, _: &Rows) -> Result<(Tensor, Saved)> {
        config_err!("no expert")
    }
    fn backward_data(&self, _: &Lane, _: &Rows, _: &Saved, _: &Tensor) -> Result<(Tensor, Saved)> {
        config_err!("no expert")
    }
    fn backward_weights(&self, _: &Lane, _: &Rows, _: &Saved, _: &Tensor, _: &Saved) -> Result<()> {
        config_err!("no expert")
    }
}

#[test]
fn layers_that_do_not_fit_the_world_are_refused() {
    let case = usual(GateKind::TopK, OrderKind::Tutel);
    let errors = local::run(8, TIMEOUT, |world| {
        let parallel = parallel(&case, world)?;
        let init = Init::new(&Lane::cpu(), DType::F64, SEED);
        let new = |config: MoeConfig| DistributedMoe::new(&init, &config, &parallel).err().unwrap().to_string();
        let layer = layer(&case, &parallel)?;
        let tape = Tape::new(&Lane::cpu());
        let forward =
            |shape| layer.forward(&tape, &tape.leaf(random(1, shape)), step(&case, 0)).err().unwrap().to_string();
        Ok([
            new(MoeConfig { experts: 3, ..case.config.clone() }),
            new(MoeConfig { ffn: 6, ..case.config.clone() }),
            forward([6, WIDTH]),
            forward([8, 2]),
        ])
    });
    for errors in errors.unwrap() {
        for (message, parts) in errors.iter().zip([
            ["3 experts", "ep = 2"],
            ["ffn = 6", "esp = 4"],
            ["T = 6", "4 MP ranks"],
            ["(8, 2)", "width 5"],
        ]) {
            assert!(parts.iter().all(|part| message.contains(part)), "{message:?} does not name {parts:?}");
        }
    }
}
