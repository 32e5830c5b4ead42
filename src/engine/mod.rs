//! Graphs of tasks on lanes, and what executes them. Nothing here knows what a task does.
//!
//! A [`TaskGraph`] is a list of tasks, each with a lane and the tasks it waits for. A lane runs its tasks one at a time, in
//! the order they were added; a task starts when the one before it on its lane and all it waits for have ended. Because a
//! task can only wait for tasks that were added before it, no graph has a cycle, no execution can deadlock, and the order of
//! adding is one order in which a single thread can issue everything.
//!
//! The same graph has three executors:
//!
//! - [`CpuLanes`]: a thread per lane;
//! - [`issue`]: a device's queues, a stream per lane and an event per edge between lanes, behind the trait [`Streams`];
//! - [`Simulator`]: a cost per task in place of work.
//!
//! Each gives a [`Timeline`], which [`Timeline::check`] holds against the graph.

mod cancel;
mod cpu;
mod graph;
mod issue;
mod simulate;
mod timeline;

pub use cancel::Cancel;
pub(crate) use cpu::caught;
pub use cpu::{CpuLanes, Pending};
pub use graph::{TaskGraph, TaskId};
pub use issue::{Issued, LaneStreams, Streams, issue};
pub use simulate::{Bound, Price, Simulator, Slowdown};
pub use timeline::{Span, Timeline};

use crate::device::LaneKind;

/// The three lanes, in the order of [`LaneKind`]'s variants.
pub const LANES: [LaneKind; 3] = [LaneKind::Compute, LaneKind::IntraNode, LaneKind::InterNode];

/// A lane's name for people.
pub fn lane_name(lane: LaneKind) -> &'static str {
    match lane {
        LaneKind::Compute => "compute",
        LaneKind::IntraNode => "intra-node",
        LaneKind::InterNode => "inter-node",
    }
}

#[cfg(test)]
mod tests;
