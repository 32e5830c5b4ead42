//! The executor that only counts time.

use super::{LANES, TaskGraph, TaskId, Timeline};
use crate::device::LaneKind;
use std::cmp::Ordering;
use std::fmt::Display;

/// By lane, then by lane, in the order of [`LANES`]: by which part of its time a task of the first takes longer
/// while one of the second runs. Lanes share what they run on: memory, multiprocessors, links.
pub type Slowdown = [[f64; 3]; 3];

/// What a task costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    /// By itself.
    pub seconds: f64,
    /// Of which lane's tasks it is, for what it loses to others and they to it, where that is not the one it runs on.
    pub like: Option<LaneKind>,
}

impl From<f64> for Price {
    fn from(seconds: f64) -> Self {
        Price { seconds, like: None }
    }
}

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
    /// lanes that are busy. A task that takes longer may then make the whole take less: it keeps others apart.
    pub fn with(slowdown: Slowdown) -> Self {
        Simulator { slowdown, ..Self::default() }
    }

    /// Whether its lanes slow each other down.
    pub fn slows(&self) -> bool {
        self.slowdown != Slowdown::default()
    }

    /// When the last task ends, in seconds, if each takes its `cost`: finite seconds, at least 0.
    pub fn makespan<Op, P: Into<Price>>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> P) -> f64 {
        self.run(graph, cost)
    }

    /// The same run, task by task.
    pub fn timeline<Op: Display, P: Into<Price>>(
        &mut self,
        graph: &TaskGraph<Op>,
        cost: impl Fn(&Op) -> P,
    ) -> Timeline {
        self.run(graph, cost);
        Timeline::of(graph, self.times.iter().copied())
    }

    fn run<Op, P: Into<Price>>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> P) -> f64 {
        match self.slows() {
            true => self.shared(graph, |op| cost(op).into()),
            false => self.pass(graph, |op| cost(op).into().seconds, true),
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
    fn shared<Op>(&mut self, graph: &TaskGraph<Op>, cost: impl Fn(&Op) -> Price) -> f64 {
        /// What a lane is at: what is left to do of it, in seconds of its own, and like which lane's task it is.
        #[derive(Clone, Copy)]
        struct Task {
            id: TaskId,
            left: f64,
            like: usize,
        }
        self.times.clear();
        self.times.resize(graph.len(), (0.0, f64::INFINITY));
        let (mut now, mut next, mut tasks) = (0.0f64, [0usize; 3], [None::<Task>; 3]);
        loop {
            for (lane, (task, next)) in LANES.into_iter().zip(tasks.iter_mut().zip(&mut next)) {
                if let (None, Some(&id)) = (*task, graph.on_lane(lane).get(*next))
                    && graph.deps(id).iter().all(|dep| self.times[dep.index()].1 <= now)
                {
                    let Price { seconds, like } = cost(graph.op(id));
                    self.times[id.index()].0 = now;
                    *task = Some(Task { id, left: seconds, like: like.unwrap_or(lane) as usize });
                    *next += 1;
                }
            }
            let slowdown = &self.slowdown;
            let pace = |at: usize, task: &Task| {
                let others = tasks.iter().enumerate().filter(|(other, _)| *other != at);
                1.0 + others.filter_map(|(_, other)| other.map(|other| slowdown[task.like][other.like])).sum::<f64>()
            };
            let mut at = 0..3;
            let paces = tasks.map(|task| at.next().zip(task).map_or(1.0, |(at, task)| pace(at, &task)));
            let ends = tasks.iter().zip(paces).filter_map(|(task, pace)| task.map(|task| task.left * pace));
            let Some(step) = ends.reduce(f64::min) else { return now };
            now += step;
            for (task, pace) in tasks.iter_mut().zip(paces) {
                if let Some(Task { id, left, .. }) = task {
                    // Who ends first ends now, whatever rounding leaves; so does what is no number.
                    if (*left * pace).partial_cmp(&step) == Some(Ordering::Greater) {
                        *left = (*left - step / pace).max(0.0);
                    } else {
                        self.times[id.index()].1 = now;
                        *task = None;
                    }
                }
            }
        }
    }
}
