//! The executor over a device's queues: what is issued runs later, in the order of its lane.

use super::{LANES, TaskGraph, TaskId, Timeline, lane_name};
use crate::device::{Lane, LaneKind, Mark};
use crate::error::{Error, Result};
use std::fmt::Display;

/// A device's three queues (streams), as far as the executor needs them.
pub trait Streams {
    /// A point in a queue.
    type Event;

    /// Marks the end of what has been issued on `lane` so far. Only an event that is `timed` is asked for its time.
    ///
    /// # Errors
    /// If the device fails.
    fn record(&mut self, lane: LaneKind, timed: bool) -> Result<Self::Event>;

    /// Holds what will be issued on `lane` back until `event` has been reached. Does not wait itself.
    ///
    /// # Errors
    /// If the device fails.
    fn wait(&mut self, lane: LaneKind, event: &Self::Event) -> Result<()>;

    /// Seconds between two timed events; waits until both have been reached.
    ///
    /// # Errors
    /// If the device, or work issued before the events, fails.
    fn seconds(&mut self, from: &Self::Event, to: &Self::Event) -> Result<f64>;
}

/// A rank's lanes as queues, in the order of [`LANES`].
pub struct LaneStreams<'a>(pub &'a [Lane; 3]);

impl Streams for LaneStreams<'_> {
    type Event = Mark;

    fn record(&mut self, lane: LaneKind, timed: bool) -> Result<Mark> {
        self.0[lane as usize].record(timed)
    }

    fn wait(&mut self, lane: LaneKind, event: &Mark) -> Result<()> {
        self.0[lane as usize].wait(event)
    }

    fn seconds(&mut self, from: &Mark, to: &Mark) -> Result<f64> {
        from.seconds_to(to)
    }
}

/// The events of a graph that has been issued.
pub struct Issued<E> {
    /// Compute's, before the first task.
    begin: E,
    /// Each task's, before it; empty unless timed.
    starts: Vec<E>,
    /// Each task's, after it, where somebody needs it.
    ends: Vec<Option<E>>,
}

/// Issues a graph: `task` is called for every task, in the order they were added, to put its work on its lane's queue.
/// Lanes wait for each other by an event for an edge between lanes, and for no other. The graph begins after what Compute
/// has been given before, and what Compute is given next begins after the graph.
///
/// # Errors
/// [`Error::Task`] if issuing a task fails; nothing after it is issued, and Compute waits for what was.
pub fn issue<S: Streams, Op: Display>(
    streams: &mut S,
    graph: &TaskGraph<Op>,
    timed: bool,
    mut task: impl FnMut(TaskId, &Op) -> Result<()>,
) -> Result<Issued<S::Event>> {
    let begin = streams.record(LaneKind::Compute, timed)?;
    for lane in &LANES[1..] {
        if !graph.on_lane(*lane).is_empty() {
            streams.wait(*lane, &begin)?;
        }
    }
    let mut needed = vec![timed; graph.len()];
    for id in graph.ids() {
        graph
            .deps(id)
            .iter()
            .filter(|&&dep| graph.lane(dep) != graph.lane(id))
            .for_each(|dep| needed[dep.index()] = true);
    }
    let mut issued = Issued { begin, starts: Vec::new(), ends: Vec::with_capacity(graph.len()) };
    // waited[to][from]: the latest task of lane `from` that lane `to` is held back for. Queues run in order, so whoever
    // waits for a task need not wait for those before it.
    let mut waited = [[None; 3]; 3];
    let mut one = |id: TaskId, streams: &mut S| {
        let lane = graph.lane(id);
        for &dep in graph.deps(id) {
            let from = graph.lane(dep);
            let known = &mut waited[lane as usize][from as usize];
            if from != lane && known.is_none_or(|latest| latest < dep) {
                if let Some(event) = &issued.ends[dep.index()] {
                    streams.wait(lane, event)?;
                }
                *known = Some(dep);
            }
        }
        if timed {
            issued.starts.push(streams.record(lane, true)?);
        }
        task(id, graph.op(id))?;
        issued.ends.push(if needed[id.index()] { Some(streams.record(lane, timed)?) } else { None });
        Ok(())
    };
    let result = graph.ids().try_for_each(|id| {
        one(id, streams).map_err(|error| {
            let task = format!("{} ({})", graph.op(id), lane_name(graph.lane(id)));
            Error::Task { task, source: Box::new(error) }
        })
    });
    let joined = LANES[1..].iter().filter(|&&lane| !graph.on_lane(lane).is_empty()).try_for_each(|&lane| {
        let end = streams.record(lane, false)?;
        streams.wait(LaneKind::Compute, &end)
    });
    result.and(joined).map(|()| issued)
}

impl<E> Issued<E> {
    /// Where every task begins and ends, in the order of the graph, if it was issued `timed`; otherwise nothing.
    pub fn events(&self) -> impl Iterator<Item = (&E, &E)> {
        self.starts.iter().zip(self.ends.iter().flatten())
    }

    /// When every task ran, of a graph that was issued `timed`; waits for its end.
    ///
    /// # Errors
    /// If it was not timed, or the device fails.
    pub fn timeline<S: Streams<Event = E>, Op: Display>(
        &self,
        streams: &mut S,
        graph: &TaskGraph<Op>,
    ) -> Result<Timeline> {
        if self.starts.len() != graph.len() {
            return Err(Error::Config("a timeline of a graph that was not issued with timed events".into()));
        }
        let mut times = Vec::with_capacity(graph.len());
        for (start, end) in self.events() {
            times.push((streams.seconds(&self.begin, start)?, streams.seconds(&self.begin, end)?));
        }
        Ok(Timeline::of(graph, times))
    }
}
