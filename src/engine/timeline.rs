//! When every task of a graph ran.

use super::{LANES, TaskGraph, TaskId, lane_name};
use crate::device::LaneKind;
use crate::error::{Error, Result};
use std::fmt::Display;

/// When one task ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The task's name.
    pub name: String,
    /// Its lane.
    pub lane: LaneKind,
    /// Seconds from the beginning of the run.
    pub start: f64,
    /// Seconds from the beginning of the run.
    pub end: f64,
}

/// When every task of a graph ran, measured or simulated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// A span per task, in the order of the graph.
    pub spans: Vec<Span>,
}

impl Timeline {
    /// The tasks of `graph` with the (start, end) of each, in its order.
    pub(super) fn of<Op: Display>(graph: &TaskGraph<Op>, times: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let span = |(id, (start, end)): (TaskId, _)| {
            let (name, lane) = (graph.op(id).to_string(), graph.lane(id));
            Span { name, lane, start, end }
        };
        Timeline { spans: graph.ids().zip(times).map(span).collect() }
    }

    /// When the last task ended: seconds.
    pub fn makespan(&self) -> f64 {
        self.spans.iter().map(|s| s.end).fold(0.0, f64::max)
    }

    /// How long a lane had a task: seconds.
    pub fn busy(&self, lane: LaneKind) -> f64 {
        self.spans.iter().filter(|s| s.lane == lane).map(|s| s.end - s.start).sum()
    }

    /// Holds the timeline against the graph it is of: every lane ran its tasks in order, one at a time, and no task
    /// started before those it waits for had ended. `slack`, in seconds, is what the clock may be wrong by.
    ///
    /// # Errors
    /// Names the two tasks in question.
    pub fn check<Op: Display>(&self, graph: &TaskGraph<Op>, slack: f64) -> Result<()> {
        if self.spans.len() != graph.len() {
            let (spans, tasks) = (self.spans.len(), graph.len());
            return Err(Error::Config(format!("a timeline of {spans} spans for a graph of {tasks} tasks")));
        }
        let after = |before: TaskId, id: TaskId| {
            let (before, span) = (&self.spans[before.index()], &self.spans[id.index()]);
            if span.start >= before.end - slack && span.end >= span.start {
                return Ok(());
            }
            Err(Error::Config(format!(
                "{} on {} ran from {} s to {} s, and had to wait for {} on {}, which ended at {} s",
                span.name,
                lane_name(span.lane),
                span.start,
                span.end,
                before.name,
                lane_name(before.lane),
                before.end
            )))
        };
        for lane in LANES {
            graph.on_lane(lane).windows(2).try_for_each(|pair| after(pair[0], pair[1]))?;
        }
        graph.ids().try_for_each(|id| graph.deps(id).iter().try_for_each(|&dep| after(dep, id)))
    }
}
