//! The executor that only counts time.

use super::{TaskGraph, TaskId, Timeline};
use crate::device::LaneKind;
use std::fmt::Display;

/// Runs graphs on costs in place of work: exact, and without allocation once it has seen a graph as large.
#[derive(Clone, Debug, Default)]
pub struct Simulator {
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

    /// When the last task ends, in seconds, if each takes its `cost`: finite seconds, at least 0.
    pub fn makespan<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> f64 {
        self.pass(graph, cost, true)
    }

    /// The same run, task by task.
    pub fn timeline<Op: Display>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> f64) -> Timeline {
        self.pass(graph, cost, true);
        Timeline::of(graph, self.times.iter().copied())
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
        for lane in super::LANES {
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
}
