//! The executor that only counts time.

use super::{LANES, TaskGraph, TaskId, Timeline};
use crate::device::LaneKind;
use std::fmt::Display;

/// By lane, then by lane, in the order of [`LANES`]: by which part of its time a task of the first takes longer
/// while the second is busy. Lanes share what they run on: memory, multiprocessors, links.
pub type Slowdown = [[f64; 3]; 3];

/// Runs graphs on costs in place of work: exact, and without allocation once it has seen a graph as large.
#[derive(Clone, Debug, Default)]
pub struct Simulator {
    slowdown: Slowdown,
    times: Vec<(f64, f64)>,
    /// For the bound: how long the tasks that must follow a task take.
    tails: Vec<f64>,
}

/// Times below which no order of a graph's tasks can get, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// What the busiest lane needs: its tasks, after the least that comes before any of them and before the least that
    /// follows any of them.
    pub busiest: f64,
    /// The busiest lane.
    pub lane: LaneKind,
    /// The longest chain of dependencies.
    pub critical_path: f64,
}

impl Bound {
    /// The greater of the two.
    pub fn seconds(&self) -> f64 {
        self.busiest.max(self.critical_path)
    }
}

impl Simulator {
    /// One that has seen no graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// One whose lanes slow each other down: what a lane has to do goes on at 1/(1 + s) of its speed, s being the sum over the
    /// lanes that are busy.
    pub fn with(slowdown: Slowdown) -> Self {
        Simulator { slowdown, ..Self::default() }
    }

    /// When the last task ends, in seconds, if each takes its `cost`: finite seconds, at least 0.
    pub fn makespan<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> f64 {
        self.run(graph, cost)
    }

    /// The same run, task by task.
    pub fn timeline<Op: Display>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> Timeline {
        self.run(graph, cost);
        Timeline::of(graph, self.times.iter().copied())
    }

    fn run<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> f64 {
        match self.slowdown == Slowdown::default() {
            true => self.pass(graph, cost, true),
            false => self.shared(graph, cost),
        }
    }

    /// What no order of the tasks can beat, their lanes, costs and dependencies given.
    pub fn bound<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> Bound {
        let critical_path = self.pass(graph, &cost, false);
        self.tails.clear();
        self.tails.resize(graph.len(), 0.0);
        for id in graph.ids().rev() {
            let tail = self.tails[id.index()] + cost(graph.op(id));
            for dep in graph.deps(id) {
                let known = &mut self.tails[dep.index()];
                *known = known.max(tail);
            }
        }
        let least = |ids: &[TaskId], of: &dyn Fn(TaskId) -> f64| ids.iter().map(|&id| of(id)).fold(f64::MAX, f64::min);
        let mut bound = Bound { busiest: 0.0, lane: LaneKind::Compute, critical_path };
        for lane in LANES {
            let ids = graph.on_lane(lane);
            if ids.is_empty() {
                continue;
            }
            let busy: f64 = ids.iter().map(|&id| cost(graph.op(id))).sum();
            let needs = least(ids, &|id| self.times[id.index()].0) + busy + least(ids, &|id| self.tails[id.index()]);
            if needs > bound.busiest {
                bound = Bound { busiest: needs, lane, critical_path };
            }
        }
        bound
    }

    /// Start and end of every task, and the last end; with lanes that run one task at a time, or, if not `queued`, as many
    /// as are ready.
    fn pass<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64, queued: bool) -> f64 {
        self.times.clear();
        let mut free = [0.0f64; 3];
        let mut last = 0.0f64;
        // Everything a task waits for was added before it, so one pass in that order knows all it needs.
        for id in graph.ids() {
            let lane = graph.lane(id) as usize;
            let ready = if queued { free[lane] } else { 0.0 };
            let start = graph.deps(id).iter().fold(ready, |start, dep| start.max(self.times[dep.index()].1));
            let end = start + cost(graph.op(id));
            self.times.push((start, end));
            free[lane] = end;
            last = last.max(end);
        }
        last
    }

    /// As [`Simulator::pass`], with lanes that slow each other down: from one start or end to the next.
    fn shared<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> f64 {
        self.times.clear();
        self.times.resize(graph.len(), (0.0, f64::INFINITY));
        let (mut now, mut next) = (0.0f64, [0usize; 3]);
        // What is left to do of the task that each lane is at, in seconds of its own.
        let mut left: [Option<(TaskId, f64)>; 3] = [None; 3];
        loop {
            for lane in LANES {
                let at = lane as usize;
                if let (None, Some(&id)) = (left[at], graph.on_lane(lane).get(next[at]))
                    && graph.deps(id).iter().all(|dep| self.times[dep.index()].1 <= now)
                {
                    self.times[id.index()].0 = now;
                    left[at] = Some((id, cost(graph.op(id))));
                    next[at] += 1;
                }
            }
            let busy = left.map(|task| f64::from(u8::from(task.is_some())));
            let pace = |at: usize| 1.0 + (0..3).map(|other| busy[other] * self.slowdown[at][other]).sum::<f64>();
            let paces = [pace(0), pace(1), pace(2)];
            let ends = |(task, pace): (&Option<(TaskId, f64)>, f64)| task.map(|(_, seconds)| seconds * pace);
            let Some(step) = left.iter().zip(paces).filter_map(ends).reduce(f64::min) else { return now };
            now += step;
            for (task, pace) in left.iter_mut().zip(paces) {
                if let Some((id, seconds)) = task {
                    // Who ends first ends now, whatever rounding leaves.
                    *seconds = if *seconds * pace <= step { 0.0 } else { *seconds - step / pace };
                    if *seconds == 0.0 {
                        self.times[id.index()].1 = now;
                        *task = None;
                    }
                }
            }
        }
    }
}
