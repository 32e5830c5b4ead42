use super::*;
use crate::error::{Error, Result};
use LaneKind::{Compute, InterNode, IntraNode};
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A graph of tasks called by their numbers, from a lane and dependencies for each: numbers taken modulo what there is.
fn graph_of(drawn: &[(usize, Vec<usize>)]) -> TaskGraph<usize> {
    let mut graph = TaskGraph::new();
    let mut ids: Vec<TaskId> = Vec::new();
    for (i, (lane, deps)) in drawn.iter().enumerate() {
        let after: Vec<TaskId> = deps.iter().filter(|_| i > 0).map(|d| ids[d % i]).collect();
        ids.push(graph.add(LANES[*lane], i, after).unwrap());
    }
    graph
}

fn graphs(tasks: std::ops::Range<usize>) -> impl Strategy<Value = TaskGraph<usize>> {
    let task = (0usize..3, prop::collection::vec(0usize..1000, 0..4));
    prop::collection::vec(task, tasks).prop_map(|drawn| graph_of(&drawn))
}

/// D → E → C on two lanes, in two chunks.
fn two_chunks() -> TaskGraph<&'static str> {
    let mut graph = TaskGraph::new();
    let d1 = graph.add(InterNode, "D1", []).unwrap();
    let d2 = graph.add(InterNode, "D2", []).unwrap();
    let e1 = graph.add(Compute, "E1", [d1]).unwrap();
    let e2 = graph.add(Compute, "E2", [d2]).unwrap();
    graph.add(InterNode, "C1", [e1]).unwrap();
    graph.add(InterNode, "C2", [e2]).unwrap();
    graph
}

#[test]
fn a_task_waits_only_for_what_is_there() {
    let mut graph = two_chunks();
    let last = graph.ids().next_back().unwrap();
    let mut other = TaskGraph::new();
    let first = other.add(Compute, 0, []).unwrap();
    let error = other.add(IntraNode, 1, [first, last]).unwrap_err().to_string();
    assert_eq!(error, "task 1 waits for task 5: a task waits only for tasks added before it");
    // Refused whole: what came before it and what comes next is as if it had not been tried.
    let second = other.add(IntraNode, 1, [first]).unwrap();
    assert_eq!((other.len(), other.deps(second), other.on_lane(IntraNode)), (2, &[first][..], &[second][..]));
    graph.clear();
    assert!(graph.is_empty() && graph.on_lane(InterNode).is_empty());
    let first = graph.add(InterNode, "D1", []).unwrap();
    assert!(graph.deps(first).is_empty());
}

#[test]
fn simulated_by_hand() {
    let cost = |op: &&str| match op.as_bytes()[0] {
        b'D' => 2.0,
        b'E' => 5.0,
        _ => 1.0,
    };
    let (graph, mut simulator) = (two_chunks(), Simulator::new());
    let timeline = simulator.timeline(&graph, cost);
    let times: Vec<(&str, f64, f64)> = timeline.spans.iter().map(|s| (s.name.as_str(), s.start, s.end)).collect();
    let expected =
        [("D1", 0.0, 2.0), ("D2", 2.0, 4.0), ("E1", 2.0, 7.0), ("E2", 7.0, 12.0), ("C1", 7.0, 8.0), ("C2", 12.0, 13.0)];
    assert_eq!(times, expected);
    assert_eq!((simulator.makespan(&graph, cost), timeline.makespan(), timeline.busy(InterNode)), (13.0, 13.0, 6.0));
    // Compute: 2 before it, 10 of its own, 1 after it. One chunk alone: 2 + 5 + 1.
    assert_eq!(simulator.bound(&graph, cost), Bound { busiest: 13.0, lane: Compute, critical_path: 8.0 });
    timeline.check(&graph, 0.0).unwrap();

    let mut early = timeline.clone();
    early.spans[3].start = 6.5;
    let error = early.check(&graph, 0.25).unwrap_err().to_string();
    assert!(error.contains("E2 on compute ran from 6.5 s") && error.contains("wait for E1 on compute"), "{error}");
    early.check(&graph, 0.75).unwrap();
    let mut early = timeline;
    (early.spans[5].start, early.spans[5].end) = (9.0, 10.0);
    assert!(early.check(&graph, 0.0).unwrap_err().to_string().contains("C2 on inter-node"));
}

#[test]
fn simulated_by_hand_on_lanes_that_slow_each_other_down() {
    let mut graph = TaskGraph::new();
    graph.add(Compute, 6.0, []).unwrap();
    let inter = graph.add(InterNode, 2.0, []).unwrap();
    graph.add(IntraNode, 1.0, [inter]).unwrap();
    // Compute takes half as long again beside InterNode and twice as long beside IntraNode, which takes three times as long
    // beside it: 3 s in which 2 are done, 3 s of which 1.5 are, and the rest.
    let slowdown = [[0.0, 1.0, 0.5], [2.0, 0.0, 0.0], [0.5, 0.0, 0.0]];
    let timeline = Simulator::with(slowdown).timeline(&graph, |seconds| *seconds);
    let times: Vec<(f64, f64)> = timeline.spans.iter().map(|s| (s.start, s.end)).collect();
    assert_eq!(times, [(0.0, 8.5), (0.0, 3.0), (3.0, 6.0)]);
    // Everything like Compute's own, or like IntraNode's: of one kind, tasks lose nothing to each other.
    let like = |lane| move |seconds: &f64| Price { seconds: *seconds, like: Some(lane) };
    let alone = Simulator::new().makespan(&graph, |seconds| *seconds);
    assert_eq!(Simulator::with(slowdown).makespan(&graph, like(Compute)), alone);
    // 2 s are 6 beside Compute, in which it does 3, and 1 s is 3, in which it does 1.5.
    let on_inter = |seconds: &f64| Price { like: (*seconds < 6.0).then_some(IntraNode), ..Price::from(*seconds) };
    assert_eq!(Simulator::with(slowdown).makespan(&graph, on_inter), 10.5);
}

proptest! {
    /// The simulator against the definition, by fixed-point iteration: a start is the latest end of what is waited for.
    #[test]
    fn simulator_is_the_definition(graph in graphs(0..40), costs in prop::collection::vec(0u32..50, 40)) {
        let cost = |op: &usize| f64::from(costs[*op]);
        let mut ends = vec![0.0f64; graph.len()];
        loop {
            let before = ends.clone();
            for lane in LANES {
                let queue = graph.on_lane(lane);
                for (i, &id) in queue.iter().enumerate() {
                    let waits = graph.deps(id).iter().chain(i.checked_sub(1).map(|i| &queue[i]));
                    let start = waits.map(|w| ends[w.index()]).fold(0.0, f64::max);
                    ends[id.index()] = start + cost(graph.op(id));
                }
            }
            if ends == before {
                break;
            }
        }
        let mut simulator = Simulator::new();
        let timeline = simulator.timeline(&graph, cost);
        prop_assert_eq!(&timeline.spans.iter().map(|s| s.end).collect::<Vec<_>>(), &ends);
        timeline.check(&graph, 0.0).unwrap();
        let time = simulator.makespan(&graph, cost);
        prop_assert_eq!(time, ends.iter().copied().fold(0.0, f64::max));
        prop_assert!(time >= simulator.bound(&graph, cost).seconds());
    }

    /// However little lanes slow each other down, it is another way of simulating.
    #[test]
    fn lanes_that_slow_each_other_down(
        graph in graphs(0..40),
        costs in prop::collection::vec(0.0f64..50.0, 40),
        drawn in prop::collection::vec(0.0f64..1.0, 9),
    ) {
        let cost = |op: &usize| costs[*op];
        let with = |scale: f64| {
            let mut slowdown = Slowdown::default();
            slowdown.iter_mut().flatten().zip(&drawn).for_each(|(s, drawn)| *s = scale * drawn);
            Simulator::with(slowdown)
        };
        let alone = Simulator::new().timeline(&graph, cost);
        let hardly = with(1e-12).timeline(&graph, cost);
        for (a, b) in alone.spans.iter().zip(&hardly.spans) {
            prop_assert!((a.start - b.start).abs() < 1e-6 && (a.end - b.end).abs() < 1e-6);
        }
        let mut simulator = with(1.0);
        let slower = simulator.timeline(&graph, cost);
        slower.check(&graph, 0.0).unwrap();
        for (span, id) in slower.spans.iter().zip(graph.ids()) {
            // A task takes its cost at least, and at most what it takes while all lanes are busy all the time.
            let (took, most) = (span.end - span.start, 1.0 + drawn[3 * graph.lane(id) as usize..][..3].iter().sum::<f64>());
            let cost = cost(graph.op(id));
            prop_assert!(took > cost - 1e-9 && took < cost * most + 1e-9, "{took} s of {cost}");
        }
        prop_assert_eq!(simulator.makespan(&graph, cost), slower.makespan());
        prop_assert!(slower.makespan() >= simulator.bound(&graph, cost).seconds() - 1e-9);
    }

    #[test]
    fn no_cost_that_grows_makes_a_graph_faster(
        graph in graphs(1..40),
        costs in prop::collection::vec(0.0f64..50.0, 40),
        which in 0usize..40,
        more in 0.0f64..50.0,
    ) {
        let mut simulator = Simulator::new();
        let grown = |op: &usize| costs[*op] + if *op == which % graph.len() { more } else { 0.0 };
        prop_assert!(simulator.makespan(&graph, grown) >= simulator.makespan(&graph, |op| costs[*op]));
    }

    #[test]
    fn threads_keep_the_order(graph in graphs(0..60)) {
        let lanes = CpuLanes::new("rank 0").unwrap();
        let orders: [Mutex<Vec<TaskId>>; 3] = Default::default();
        let ended: Vec<AtomicUsize> = (0..graph.len()).map(|_| AtomicUsize::new(0)).collect();
        let timeline = lanes.run(&graph, &Cancel::new(), |id, op| {
            assert_eq!(id.index(), *op);
            assert!(graph.deps(id).iter().all(|dep| ended[dep.index()].load(Ordering::Relaxed) == 1));
            let thread = std::thread::current();
            assert_eq!(thread.name(), Some(format!("rank 0 {}", lane_name(graph.lane(id))).as_str()));
            orders[graph.lane(id) as usize].lock().unwrap().push(id);
            ended[id.index()].fetch_add(1, Ordering::Relaxed);
            Ok(())
        }).unwrap();
        for lane in LANES {
            prop_assert_eq!(&*orders[lane as usize].lock().unwrap(), graph.on_lane(lane));
        }
        timeline.check(&graph, 0.0).unwrap();
    }

    /// Issued on queues that only count time, a graph takes the time that the simulator says, task by task: the events
    /// between lanes are enough. They are also no more than one per task and other lane.
    #[test]
    fn streams_run_as_simulated(graph in graphs(0..60), costs in prop::collection::vec(0u32..50, 60)) {
        let cost = |op: &usize| f64::from(costs[*op]);
        let clock = Mutex::new([7.0f64, 0.0, 0.0]);
        let mut queues = Queues { clock: &clock, waits: 0 };
        let issued = issue(&mut queues, &graph, true, |id, op| {
            clock.lock().unwrap()[graph.lane(id) as usize] += cost(op);
            Ok(())
        }).unwrap();
        let expected = Simulator::new().timeline(&graph, cost);
        prop_assert_eq!(&issued.timeline(&mut queues, &graph).unwrap(), &expected);
        prop_assert_eq!(clock.lock().unwrap()[0], 7.0 + expected.makespan());
        prop_assert!(queues.waits <= 4 + graph.ids().map(|id| graph.deps(id).len().min(2)).sum::<usize>());

        let issued = issue(&mut queues, &graph, false, |_, _| Ok(())).unwrap();
        prop_assert!(issued.timeline(&mut queues, &graph).is_err() || graph.is_empty());
    }
}

/// Streams that have nothing to do but count: an event is a time.
struct Queues<'a> {
    clock: &'a Mutex<[f64; 3]>,
    waits: usize,
}

impl Streams for Queues<'_> {
    type Event = f64;

    fn record(&mut self, lane: LaneKind, _timed: bool) -> Result<f64> {
        Ok(self.clock.lock().unwrap()[lane as usize])
    }

    fn wait(&mut self, lane: LaneKind, event: &f64) -> Result<()> {
        let now = &mut self.clock.lock().unwrap()[lane as usize];
        *now = now.max(*event);
        self.waits += 1;
        Ok(())
    }

    fn seconds(&mut self, from: &f64, to: &f64) -> Result<f64> {
        Ok(to - from)
    }
}

#[test]
fn a_stream_whose_task_fails_is_still_joined() {
    let graph = two_chunks();
    let clock = Mutex::new([0.0; 3]);
    let mut queues = Queues { clock: &clock, waits: 0 };
    let result = issue(&mut queues, &graph, false, |id, op| {
        clock.lock().unwrap()[graph.lane(id) as usize] += 3.0;
        if *op == "E1" { Err(Error::Device("no kernel".into())) } else { Ok(()) }
    });
    assert_eq!(result.err().unwrap().to_string(), "task E1 (compute): no kernel");
    assert_eq!(*clock.lock().unwrap(), [6.0, 0.0, 6.0], "D1, D2 and E1 were issued, and compute waits for D2");
}

fn within_a_second<T>(f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = f();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    result
}

#[test]
fn a_task_that_fails_or_panics_ends_the_run_with_its_name() {
    let (graph, lanes) = (two_chunks(), CpuLanes::new("rank 3").unwrap());
    for (fail, expected) in [
        (true, "task E1 (compute): capacity = 0: it is at least 1"),
        (false, "task E1 (compute): panicked: index 7 of 3"),
    ] {
        let (cancel, begun) = (Cancel::new(), Mutex::new(Vec::new()));
        let run = || {
            lanes.run(&graph, &cancel, |_, op| {
                begun.lock().unwrap().push(*op);
                match *op {
                    "E1" if fail => Err(Error::Config("capacity = 0: it is at least 1".into())),
                    "E1" => panic!("index {} of 3", 7),
                    _ => Ok(()),
                }
            })
        };
        let error = within_a_second(run).unwrap_err();
        assert!(matches!(&error, Error::Task { task, .. } if task == "E1 (compute)"));
        assert_eq!(error.to_string(), expected);
        assert_eq!(cancel.check().unwrap_err().to_string(), format!("cancelled: rank 3: {expected}"));
        let begun = begun.into_inner().unwrap();
        assert!(!["E2", "C1", "C2"].iter().any(|op| begun.contains(op)), "{begun:?}");
    }
    // The lanes are as good as new.
    lanes.run(&graph, &Cancel::new(), |_, _| Ok(())).unwrap();
}

#[test]
fn one_rank_fails_and_all_end() {
    let (graph, cancel) = (two_chunks(), Cancel::new());
    // C1 is a collective of three ranks that rank 1 never comes to.
    let there = AtomicUsize::new(0);
    let rank = |rank: usize| {
        let lanes = CpuLanes::new(&format!("rank {rank}")).unwrap();
        lanes.run(&graph, &cancel, |_, op| match *op {
            "E1" if rank == 1 => Err(Error::Numeric("NaN in the rows of expert 2".into())),
            "C1" => {
                there.fetch_add(1, Ordering::Relaxed);
                while there.load(Ordering::Relaxed) < 3 {
                    cancel.sleep_until(Instant::now() + Duration::from_millis(5))?;
                }
                Ok(())
            }
            _ => Ok(()),
        })
    };
    let errors: Vec<Error> = within_a_second(|| {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..3).map(|r| scope.spawn(move || rank(r))).collect();
            ranks.into_iter().map(|r| r.join().unwrap().unwrap_err()).collect()
        })
    });
    let cause = "task E1 (compute): NaN in the rows of expert 2";
    assert_eq!(errors[1].to_string(), cause);
    for other in [&errors[0], &errors[2]] {
        assert!(matches!(other, Error::Cancelled(_)), "{other}");
        assert_eq!(other.to_string(), format!("cancelled: rank 1: {cause}"));
    }
}

#[test]
fn cancelled_from_outside() {
    let (graph, lanes, cancel) = (two_chunks(), CpuLanes::new("rank 0").unwrap(), Cancel::new());
    let error = within_a_second(|| {
        std::thread::scope(|scope| {
            // Emulated: every task would take an hour.
            let run = scope.spawn(|| lanes.emulate(&graph, &cancel, |_| 3600.0, |_, _| Ok(())));
            std::thread::sleep(Duration::from_millis(30));
            cancel.cancel("the user asked to stop");
            cancel.cancel("a second reason");
            run.join().unwrap().unwrap_err()
        })
    });
    assert_eq!(error.to_string(), "cancelled: the user asked to stop");
    let error = lanes.run(&graph, &cancel, |_, op| panic!("{op} began")).unwrap_err();
    assert_eq!(error.to_string(), "cancelled: the user asked to stop");
}

#[test]
fn emulated_tasks_take_their_cost() {
    let (graph, lanes) = (two_chunks(), CpuLanes::new("rank 0").unwrap());
    let cost = |op: &&str| if op.starts_with('E') { 0.1 } else { 0.05 };
    let timeline = lanes.emulate(&graph, &Cancel::new(), cost, |_, _| Ok(())).unwrap();
    timeline.check(&graph, 0.0).unwrap();
    for (span, id) in timeline.spans.iter().zip(graph.ids()) {
        assert!(span.end - span.start >= cost(graph.op(id)), "{span:?}");
    }
    assert!(timeline.makespan() >= Simulator::new().makespan(&graph, cost));
    // Real work that takes longer than its cost is not cut short.
    let late = |_: TaskId, op: &&str| {
        std::thread::sleep(Duration::from_millis(if *op == "D2" { 60 } else { 0 }));
        Ok(())
    };
    let timeline = lanes.emulate(&graph, &Cancel::new(), cost, late).unwrap();
    let spans = timeline.spans.iter().filter(|span| span.name == "D2");
    assert!(spans.map(|span| span.end - span.start).all(|seconds| seconds >= 0.06), "{timeline:?}");
}

#[test]
fn jobs_run_in_their_lanes_order() {
    let lanes = CpuLanes::new("rank 0").unwrap();
    let order = std::sync::Arc::new(Mutex::new(Vec::new()));
    let push = |n: usize| {
        let order = order.clone();
        move || {
            order.lock().unwrap().push(n);
            Ok(())
        }
    };
    let first = lanes.submit(InterNode, push(0));
    let panicking = lanes.submit(InterNode, || panic!("gone"));
    let graph = graph_of(&[(2, vec![]), (0, vec![0])]);
    lanes.run(&graph, &Cancel::new(), |id, _| push(1 + id.index())()).unwrap();
    let last = lanes.submit(Compute, push(3));
    first.wait().unwrap();
    assert_eq!(panicking.wait().unwrap_err().to_string(), "panicked: gone");
    last.wait().unwrap();
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
    // What has been submitted is done before the lanes go.
    let waiting = lanes.submit(IntraNode, push(4));
    drop(lanes);
    waiting.wait().unwrap();
    assert_eq!(order.lock().unwrap().len(), 5);
}

#[test]
fn lanes_shared_by_threads_and_graphs_within_graphs() {
    let (graph, lanes) = (two_chunks(), CpuLanes::new("rank 0").unwrap());
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let count = |_: TaskId, _: &&str| {
                        count.fetch_add(1, Ordering::Relaxed);
                        Ok(())
                    };
                    lanes.run(&graph, &Cancel::new(), count).unwrap();
                }
            });
        }
    });
    assert_eq!(count.load(Ordering::Relaxed), 600);
    let nested = |_: TaskId, _: &&str| lanes.run(&graph, &Cancel::new(), |_, _| Ok(())).map(|_| ());
    let error = within_a_second(|| lanes.run(&graph, &Cancel::new(), nested)).unwrap_err().to_string();
    assert!(error.starts_with("task D1 (inter-node): a graph run from inside a task of rank 0"), "{error}");
}
