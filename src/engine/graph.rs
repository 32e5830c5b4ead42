//! The graph.

use crate::device::LaneKind;
use crate::error::{Result, config_err};

/// A task of one graph: the how-manieth it is that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(u32);

impl TaskId {
    /// Its place in the order of adding, from 0.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Debug)]
struct Task<Op> {
    op: Op,
    lane: LaneKind,
    /// Where its dependencies end in the graph's list; they begin where those of the task before it end.
    deps_end: usize,
}

/// Tasks with lanes and dependencies; see the [module](crate::engine)'s description. `Op` says what a task is to do, and its
/// `Display` is the task's name.
#[derive(Clone, Debug)]
pub struct TaskGraph<Op> {
    tasks: Vec<Task<Op>>,
    deps: Vec<TaskId>,
    lanes: [Vec<TaskId>; 3],
}

impl<Op> Default for TaskGraph<Op> {
    fn default() -> Self {
        TaskGraph { tasks: Vec::new(), deps: Vec::new(), lanes: Default::default() }
    }
}

impl<Op> TaskGraph<Op> {
    /// A graph without tasks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes all tasks out and keeps the memory: a planner builds thousands of graphs.
    pub fn clear(&mut self) {
        self.tasks.clear();
        self.deps.clear();
        self.lanes.iter_mut().for_each(Vec::clear);
    }

    /// Adds a task at the end of `lane`'s queue. It starts when the lane's task before it and all of `after` have ended.
    ///
    /// # Errors
    /// If one of `after` is not a task of this graph yet: a task waits only for tasks added before it.
    pub fn add(&mut self, lane: LaneKind, op: Op, after: impl IntoIterator<Item = TaskId>) -> Result<TaskId> {
        let known = self.deps.len();
        self.deps.extend(after);
        let id = self.tasks.len();
        if let Some(missing) = self.deps[known..].iter().copied().find(|dep| dep.index() >= id) {
            self.deps.truncate(known);
            config_err!("task {id} waits for task {}: a task waits only for tasks added before it", missing.index());
        }
        let Ok(number) = u32::try_from(id) else { config_err!("a graph of {id} tasks: it holds at most {}", u32::MAX) };
        self.tasks.push(Task { op, lane, deps_end: self.deps.len() });
        self.lanes[lane as usize].push(TaskId(number));
        Ok(TaskId(number))
    }

    /// The number of tasks.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether there are no tasks.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// All tasks, in the order of adding.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = TaskId> + use<Op> {
        (0..self.tasks.len() as u32).map(TaskId)
    }

    /// What a task is to do.
    pub fn op(&self, id: TaskId) -> &Op {
        &self.tasks[id.index()].op
    }

    /// The lane a task runs on.
    pub fn lane(&self, id: TaskId) -> LaneKind {
        self.tasks[id.index()].lane
    }

    /// The tasks that a task waits for, besides the one before it on its lane.
    pub fn deps(&self, id: TaskId) -> &[TaskId] {
        let begin = id.index().checked_sub(1).map_or(0, |before| self.tasks[before].deps_end);
        &self.deps[begin..self.tasks[id.index()].deps_end]
    }

    /// A lane's tasks in the order they run.
    pub fn on_lane(&self, lane: LaneKind) -> &[TaskId] {
        &self.lanes[lane as usize]
    }
}
