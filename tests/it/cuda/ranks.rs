//! Ranks that share the GPU: what their collectives are made of, the collectives, and the layer over them, against the same
//! on the CPU.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fsmoe::Result;
use fsmoe::autograd::{Init, Tape};
use fsmoe::comm::local::{self, Cluster};
use fsmoe::comm::{AllToAllKind, GroupKind, Sizes, Topology};
use fsmoe::device::{CommKernels, Lane, LaneKind};
use fsmoe::engine::{LANES, LaneStreams, TaskGraph, issue};
use fsmoe::moe::distributed::{DistributedMoe, LayerPlan, Parallel};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Capacity, MoeConfig, StepContext};
use fsmoe::schedule::{Degree, Policy, policy};
use fsmoe::tensor::{DType, Tensor};

use super::support::{assert_as_documented, assert_close, down, gpu, uniform, up};

const TIMEOUT: Duration = Duration::from_secs(20);

fn gpu_lane() -> Lane {
    Lane::new(Arc::new(gpu()), LaneKind::Compute)
}

fn host(lane: &Lane, t: &Tensor) -> Vec<f64> {
    let t = lane.to_host(t).unwrap();
    match t.dtype() {
        DType::I32 => t.to_vec::<i32>().unwrap().into_iter().map(f64::from).collect(),
        _ => Lane::cpu().cast(&t, DType::F64).unwrap().to_vec().unwrap(),
    }
}

/// Values that depend on `id`, exact in every type.
fn numbers(lane: &Lane, id: usize, n: usize, dtype: DType) -> Tensor {
    let value = |i: usize| ((i * 7 + id * 13) % 31) as i32 - 15;
    let t = Tensor::from_slice(&(0..n).map(value).collect::<Vec<i32>>(), [n]).unwrap();
    let t = match dtype {
        DType::I32 => t,
        dtype => {
            let wide: Vec<f64> = (0..n).map(|i| f64::from(value(i)) / 8.0).collect();
            Lane::cpu().cast(&Tensor::from_slice(&wide, [n]).unwrap(), dtype).unwrap()
        }
    };
    lane.to_device(&t).unwrap()
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_copies_and_sums_of_parts() {
    let cpu = Lane::cpu();
    for n in [0usize, 1, 7, 4096, 70_001] {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let part =
                |id: u64| cpu.cast(&Tensor::from_slice(&uniform(id, n, -1.0, 1.0), [n]).unwrap(), dtype).unwrap();
            for parts in [1u64, 3, 8] {
                let parts: Vec<Tensor> = (0..parts).map(part).collect();
                let right = cpu.empty([n], dtype).unwrap();
                cpu.sum_parts(&parts, &right).unwrap();
                let there: Vec<Tensor> = parts.iter().map(up).collect();
                // Into one of the parts, as an all-reduce does.
                gpu().sum_parts(&there, &there[0]).unwrap();
                assert_eq!(host(&cpu, &down(&there[0])), host(&cpu, &right), "{} parts of {n} {dtype}", parts.len());
            }
        }
        // More pairs than a launch takes, aligned and not.
        let lengths: Vec<usize> = (0..70).map(|i| n * (i % 3) + i).collect();
        let total: usize = lengths.iter().sum();
        let from = up(&Tensor::from_slice(&(0..total as i32).collect::<Vec<_>>(), [total]).unwrap());
        let to = up(&Tensor::from_slice(&vec![-1; total], [total]).unwrap());
        let mut at = 0;
        let pair = |&length: &usize| {
            at += length;
            (from.narrow(0, at - length, length).unwrap(), to.narrow(0, at - length, length).unwrap())
        };
        let pairs: Vec<_> = lengths.iter().map(pair).collect();
        gpu().copy_many(&pairs).unwrap();
        assert!(down(&to).to_vec::<i32>().unwrap().into_iter().eq(0..total as i32), "{n}");
    }
    let (a, b) = (up(&Tensor::host_zeros([3], DType::F32)), up(&Tensor::host_zeros([4], DType::F32)));
    let error = gpu().copy_many(&[(a.clone(), b.clone())]).unwrap_err().to_string();
    assert!(error.contains("as many elements"), "{error}");
    let error = gpu().sum_parts(&[a], &b).unwrap_err().to_string();
    assert!(error.contains("as many elements"), "{error}");
}

/// Every collective on every rank of 8 on `nodes` nodes: what came of them.
fn collectives(lane: &Lane, nodes: usize, n: usize, dtype: DType) -> Vec<Vec<Vec<f64>>> {
    let cluster = Cluster { nodes, ..Cluster::on(lane, 8, TIMEOUT) };
    local::run_on(&cluster, |comm| {
        let lane = lane.beside(LaneKind::InterNode, local::share(lane, 8))?;
        let (me, p) = (comm.rank(), comm.size());
        let mut all = Vec::new();
        let mut keep = |t: &Tensor| all.push(host(&lane, t));
        // Twice, so that what is used again has been used before.
        for round in 0..2 {
            let id = |rank: usize| rank + 8 * round;
            let own = numbers(&lane, id(me), n, dtype);
            let every = lane.empty([p, n], dtype)?;
            comm.all_gather(&lane, &own, &every)?;
            keep(&every);
            let swapped = lane.empty([p, n], dtype)?;
            comm.all_to_all(&lane, &every, &swapped)?;
            keep(&swapped);
            // As many as the ranks' numbers say, none from the first.
            let sends: Vec<Tensor> = (0..p).map(|to| numbers(&lane, id(to), me * (to + 1) * n / 8, dtype)).collect();
            let recvs: Vec<Tensor> =
                (0..p).map(|from| lane.empty([from * (me + 1) * n / 8], dtype)).collect::<Result<_>>()?;
            comm.all_to_all_ragged(&lane, &sends, &recvs)?;
            recvs.iter().for_each(&mut keep);
            comm.broadcast(&lane, &own, 5)?;
            keep(&own);
            if dtype.is_float() {
                let sum = numbers(&lane, id(me), n, dtype);
                comm.all_reduce(&lane, &sum)?;
                keep(&sum);
                let part = lane.empty([n], dtype)?;
                comm.reduce_scatter(&lane, &every, &part)?;
                keep(&part);
            }
            comm.barrier(&lane)?;
            // The other halves of both nodes.
            let pair = comm.split("pairs", me % 4, me)?;
            let both = lane.empty([2, n], dtype)?;
            pair.all_gather(&lane, &numbers(&lane, me, n, dtype), &both)?;
            keep(&both);
        }
        Ok(all)
    })
    .unwrap()
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_collectives_give_the_bits_of_the_cpu() {
    let (cpu, gpu) = (Lane::cpu(), gpu_lane());
    for dtype in [DType::F32, DType::BF16, DType::I32] {
        for n in [0, 1, 100, 40_009] {
            let right = collectives(&cpu, 1, n, dtype);
            for nodes in [1, 2, 4, 8] {
                assert_eq!(collectives(&gpu, nodes, n, dtype), right, "{n} {dtype} on {nodes} nodes");
            }
        }
    }
}

const STEP: StepContext = StepContext { train: true, seed: 3, step: 5, first_token: 0 };
const WIDTH: usize = 32;
/// Of each rank.
const TOKENS: usize = 24;

struct Case {
    sizes: Sizes,
    config: MoeConfig,
    all_to_all: AllToAllKind,
}

/// (y, aux, dx, gradients) of every rank, and the slots and drops, for each of `plans`.
type Outcome = (Vec<(String, Vec<f64>)>, u64);

fn layer(lane: &Lane, case: &Case, plans: &[LayerPlan]) -> Vec<Vec<Outcome>> {
    let p = case.sizes.ranks;
    let cluster = Cluster { nodes: case.sizes.nodes, ..Cluster::on(lane, p, TIMEOUT) };
    local::run_on(&cluster, |world| {
        let lane = lane.beside(LaneKind::Compute, local::share(lane, p))?;
        let parallel = Parallel::new(&lane, world, Topology::new(case.sizes)?, case.all_to_all.build())?;
        // The CPU's values on both.
        let init = Init::new(&lane, DType::F32, 11);
        let layer = DistributedMoe::new(&init, &case.config, &parallel)?;
        let on_cpu = fsmoe::moe::MoeLayer::new(&Init::new(&Lane::cpu(), DType::F32, 11), &case.config)?;
        let (experts, rank) = (on_cpu.parameters().len() - layer.shards().len(), parallel.groups().rank());
        for (i, (whole, part)) in on_cpu.parameters().iter().zip(layer.parameters()).enumerate() {
            let value = Lane::cpu().empty(*part.value().shape(), DType::F32)?;
            match i.checked_sub(experts) {
                None => Lane::cpu().copy(whole.value(), &value)?,
                Some(i) => layer.shards()[i].take(&Lane::cpu(), rank, whole.value(), &value)?,
            }
            lane.upload(&value, part.value())?;
        }
        let each = TOKENS * case.sizes.mp;
        let draw = |seed| {
            let all = Tensor::from_slice(&uniform(seed, p * TOKENS * WIDTH, -1.0, 1.0), [p * TOKENS, WIDTH])?;
            let own = all.narrow(0, rank / case.sizes.mp * each, each)?;
            lane.to_device(&Lane::cpu().cast(&own, DType::F32)?)
        };
        let (x, dy) = (draw(1)?, draw(2)?);
        let mut all = Vec::new();
        for plan in plans {
            layer.set_plan(plan.clone());
            layer.parameters().iter().for_each(|p| p.zero_grad());
            let tape = Tape::new(&lane);
            let x = tape.leaf(x.clone());
            let step = StepContext { first_token: (rank / case.sizes.mp * each) as u64, ..STEP };
            let out = layer.forward(&tape, &x, step)?;
            let d_aux = lane.full([1], DType::F32, 0.9)?;
            let grads = tape.backward(&[(&out.y, dy.clone()), (&out.aux_loss, d_aux)])?;
            let groups = parallel.groups();
            for (parameters, kind) in
                [(layer.gate_parameters(), GroupKind::World), (layer.expert_parameters(), GroupKind::Replica)]
            {
                parameters.iter().try_for_each(|p| {
                    parallel.beside(groups.lane(kind), |lane| groups.get(kind).all_reduce(lane, p.grad()))
                })?;
            }
            let mut values = vec![
                ("y".to_owned(), host(&lane, out.y.value())),
                ("the loss".to_owned(), host(&lane, out.aux_loss.value())),
                ("dx".to_owned(), host(&lane, grads.get(&x).unwrap())),
            ];
            values.extend(layer.parameters().iter().map(|p| (p.name().to_owned(), host(&lane, p.grad()))));
            all.push((values, out.routing.stats(&lane)?.dropped));
        }
        Ok(all)
    })
    .unwrap()
}

fn plans() -> Vec<LayerPlan> {
    let cut = |policy: Arc<dyn Policy>, i: usize| {
        let degrees = [Degree { r: 1 + i % 4, d: 1 + i % 2 }, Degree { r: 1 + (i + 1) % 3, d: 1 }];
        let degrees = degrees.map(|Degree { r, d }| Degree { r, d: d.min(r) });
        LayerPlan { policy, degrees, ..LayerPlan::default() }
    };
    policy::all().into_iter().enumerate().map(|(i, policy)| cut(Arc::from(policy), i)).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_over_ranks_equal_the_cpus() {
    let usual = Sizes { ranks: 8, nodes: 2, dp: 2, mp: 4, ep: 2, esp: 4 };
    let wide = Sizes { ranks: 8, nodes: 2, dp: 4, mp: 2, ep: 4, esp: 2 };
    let replicas = Sizes { ranks: 8, nodes: 4, dp: 8, mp: 1, ep: 2, esp: 1 };
    let config = |gate, order, expert, capacity| MoeConfig {
        gate,
        order,
        expert,
        experts: 4,
        top_k: 2,
        hidden: WIDTH,
        ffn: 48,
        capacity,
        init_std: 0.2,
        balance_weight: 0.3,
        z_weight: 0.2,
        ..MoeConfig::default()
    };
    let factor = Capacity::Factor(1.1);
    let direct = AllToAllKind::Direct;
    let cases = [
        (usual, config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Mixtral, factor), direct),
        (usual, config(GateKind::Sigmoid, OrderKind::Ragged, ExpertKind::Gpt, Capacity::Dropless), direct),
        (
            wide,
            config(GateKind::XMoe, OrderKind::Tutel, ExpertKind::Gpt, Capacity::Dropless),
            AllToAllKind::Hierarchical1d,
        ),
        (wide, config(GateKind::TopK, OrderKind::Ragged, ExpertKind::Mixtral, factor), AllToAllKind::Hierarchical2d),
        (replicas, config(GateKind::ExpertChoice, OrderKind::Tutel, ExpertKind::Mixtral, factor), direct),
        (wide, config(GateKind::Soft, OrderKind::GShard, ExpertKind::Gpt, factor), AllToAllKind::Hierarchical2d),
    ];
    for (number, (sizes, config, all_to_all)) in cases.into_iter().enumerate() {
        let case = Case { sizes, config, all_to_all };
        let right = layer(&Lane::cpu(), &case, &plans()[..1]);
        let got = layer(&gpu_lane(), &case, &plans());
        for (rank, (right, got)) in right.iter().zip(&got).enumerate() {
            for (plan, (values, dropped)) in got.iter().enumerate() {
                assert_eq!(*dropped, right[0].1, "case {number}, plan {plan}, rank {rank}: drops");
                for ((name, got), (_, right)) in values.iter().zip(&right[0].0) {
                    let tensor = |v: &[f64]| Tensor::from_slice(v, [v.len()]).unwrap();
                    let what = format!("case {number}, plan {plan}, rank {rank}: {name}");
                    assert_close(&what, &tensor(got), &tensor(right), 2e-5);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_ranks_end_when_one_fails() {
    let lane = gpu_lane();
    let begin = Instant::now();
    let error = local::run_on(&Cluster::on(&lane, 4, TIMEOUT), |comm| {
        let lane = lane.beside(LaneKind::InterNode, local::share(&lane, 4))?;
        let t = lane.zeros([if comm.rank() == 2 { 5 } else { 4 }], DType::F32)?;
        comm.all_reduce(&lane, &t)
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("all-reduce of 5 f32") || error.contains("all-reduce of 4 f32"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

/// Lanes run side by side, in the order and with the edges of the graph; and what a task costs the host.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_streams_run_a_graph() {
    let compute = gpu_lane();
    let lanes = LANES.map(|kind| compute.beside(kind, Default::default()).unwrap());
    let big = |lane: &Lane| lane.zeros([64 << 20], DType::F32).unwrap();
    let data: Vec<(Tensor, Tensor)> = lanes.iter().map(|lane| (big(lane), big(lane))).collect();
    lanes.iter().for_each(|lane| lane.synchronize().unwrap());
    let mut graph = TaskGraph::new();
    let mut before = Vec::new();
    for i in 0..12usize {
        let after: Vec<_> = before.iter().rev().step_by(2).take(2).copied().collect();
        before.push(graph.add(LANES[i % 3], i, after).unwrap());
    }
    let mut streams = LaneStreams(&lanes);
    let issued = issue(&mut streams, &graph, true, |id, _| {
        let lane = graph.lane(id) as usize;
        lanes[lane].copy(&data[lane].0, &data[lane].1)
    })
    .unwrap();
    let timeline = issued.timeline(&mut streams, &graph).unwrap();
    timeline.check(&graph, 2e-6).unwrap();
    assert!(timeline.makespan() > 0.0);

    let mut empty = TaskGraph::new();
    let mut last = None;
    for i in 0..3000usize {
        let after = last.filter(|_| i % 2 == 0);
        last = Some(empty.add(LANES[i % 3], i, after).unwrap());
    }
    let counted = Mutex::new(0);
    let mut best = f64::MAX;
    for _ in 0..5 {
        let begin = Instant::now();
        issue(&mut LaneStreams(&lanes), &empty, false, |_, _| {
            *counted.lock().unwrap() += 1;
            Ok(())
        })
        .unwrap();
        best = best.min(begin.elapsed().as_secs_f64());
        lanes[0].synchronize().unwrap();
    }
    println!("a task with its events: {:.2} us of the host", best * 1e6 / 3000.0);
    assert_eq!(*counted.lock().unwrap(), 15_000);
    assert_as_documented("microseconds of the host for a task", best * 1e6 / 3000.0, 2.0);
}
