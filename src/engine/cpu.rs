//! The executor whose lanes are threads.

use super::{Cancel, LANES, TaskGraph, TaskId, Timeline, lane_name};
use crate::device::LaneKind;
use crate::error::{Error, Result, config_err};
use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Job = Box<dyn FnOnce() + Send>;

/// The lanes of one rank as threads that live as long as this does, each a queue that runs in order.
pub struct CpuLanes {
    name: String,
    /// One lock for all: jobs that several lanes must take in the same order are sent under it. Empty once dropped.
    queues: Mutex<Vec<Sender<Job>>>,
    workers: Vec<JoinHandle<()>>,
}

/// A job on its way; see [`CpuLanes::submit`].
#[must_use = "a job's error is only seen by who waits for it"]
pub struct Pending(Receiver<Result<()>>);

impl Pending {
    /// Waits for the job's end.
    ///
    /// # Errors
    /// The job's own; [`Error::Panicked`] if it panicked.
    pub fn wait(self) -> Result<()> {
        self.0.recv().unwrap_or_else(|_| Err(Error::Device("a lane's thread has gone".into())))
    }
}

impl CpuLanes {
    /// Starts the three threads of the rank called `name`, as messages and debuggers show it.
    ///
    /// # Errors
    /// If the operating system has no more threads.
    pub fn new(name: &str) -> Result<Self> {
        let mut lanes = CpuLanes {
            name: name.to_owned(),
            queues: Mutex::new(Vec::new()),
            workers: Vec::with_capacity(LANES.len()),
        };
        for lane in LANES {
            let (queue, jobs) = channel::<Job>();
            let thread = std::thread::Builder::new()
                .name(format!("{name} {}", lane_name(lane)))
                .spawn(move || jobs.into_iter().for_each(|job| job()))
                .map_err(|e| Error::Device(format!("a thread for the {} lane of {name}: {e}", lane_name(lane))))?;
            lanes.workers.push(thread);
            locked(&lanes.queues).push(queue);
        }
        Ok(lanes)
    }

    /// Puts a job at the end of a lane's queue and returns at once.
    pub fn submit(&self, lane: LaneKind, job: impl FnOnce() -> Result<()> + Send + 'static) -> Pending {
        send(&locked(&self.queues), lane, job)
    }

    /// Runs a graph: `task` is called for every task, on its lane's thread, when those it waits for have ended. Returns
    /// when all lanes are done.
    ///
    /// # Errors
    /// The first task that fails or panics ends the run, as [`Error::Task`], and cancels `cancel`; so does whoever else
    /// cancels it, as [`Error::Cancelled`]. Tasks that have begun are waited for: one that itself waits for something has
    /// to look at `cancel`. Also if called on one of its own lanes, which would wait for itself.
    pub fn run<Op: Display + Sync>(
        &self,
        graph: &TaskGraph<Op>,
        cancel: &Cancel,
        task: impl Fn(TaskId, &Op) -> Result<()> + Sync,
    ) -> Result<Timeline> {
        self.execute(graph, cancel, None, &task)
    }

    /// The same, on a machine that is not there: after its work every task waits until its start plus its `cost` in
    /// seconds, or ends with its work where that takes longer.
    ///
    /// # Errors
    /// As [`CpuLanes::run`].
    pub fn emulate<Op: Display + Sync>(
        &self,
        graph: &TaskGraph<Op>,
        cancel: &Cancel,
        cost: impl Fn(&Op) -> f64 + Sync,
        task: impl Fn(TaskId, &Op) -> Result<()> + Sync,
    ) -> Result<Timeline> {
        self.execute(graph, cancel, Some(&cost), &task)
    }

    fn execute<Op: Display + Sync>(
        &self,
        graph: &TaskGraph<Op>,
        cancel: &Cancel,
        cost: Option<&(dyn Fn(&Op) -> f64 + Sync)>,
        task: &(dyn Fn(TaskId, &Op) -> Result<()> + Sync),
    ) -> Result<Timeline> {
        let (times, start) = (vec![None; graph.len()], Instant::now());
        let progress = Mutex::new(Progress { times, failure: None });
        let run = Run { rank: &self.name, graph, cancel, cost, task, start, progress, changed: Condvar::new() };
        self.on_every_lane(&|lane| run.lane(lane))?;
        let Progress { times, failure } = run.progress.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)?;
        // Without a failure every task has ended.
        Ok(Timeline::of(graph, times.into_iter().flatten()))
    }

    /// Calls `work` on every lane's thread and waits for all of them.
    fn on_every_lane(&self, work: &(dyn Fn(LaneKind) + Sync)) -> Result<()> {
        if self.workers.iter().any(|worker| worker.thread().id() == std::thread::current().id()) {
            config_err!("a graph run from inside a task of {}: its lanes would wait for themselves", self.name);
        }
        // SAFETY: only the lifetime changes. The reference is used by the jobs below alone, and this function does not
        // return, nor unwind, before each has said that it is done with it or has been dropped without having run:
        // `Pending::wait` waits for exactly that.
        let work: &'static (dyn Fn(LaneKind) + Sync) = unsafe { std::mem::transmute(work) };
        let pending = {
            let queues = locked(&self.queues);
            LANES.map(|lane| {
                send(&queues, lane, move || {
                    work(lane);
                    Ok(())
                })
            })
        };
        pending.map(Pending::wait).into_iter().collect()
    }
}

impl Drop for CpuLanes {
    fn drop(&mut self) {
        locked(&self.queues).clear();
        for worker in self.workers.drain(..) {
            // It cannot have panicked: jobs catch what they do.
            let _ = worker.join();
        }
    }
}

fn send(queues: &[Sender<Job>], lane: LaneKind, job: impl FnOnce() -> Result<()> + Send + 'static) -> Pending {
    let (done, pending) = channel();
    // Who does not wait is not told; a lane that has gone drops the job, and `Pending::wait` says so.
    let _ = queues[lane as usize].send(Box::new(move || drop(done.send(caught(job)))));
    Pending(pending)
}

/// One run of one graph, shared by the lanes' threads.
struct Run<'a, Op> {
    rank: &'a str,
    graph: &'a TaskGraph<Op>,
    cancel: &'a Cancel,
    cost: Option<&'a (dyn Fn(&Op) -> f64 + Sync)>,
    task: &'a (dyn Fn(TaskId, &Op) -> Result<()> + Sync),
    start: Instant,
    progress: Mutex<Progress>,
    changed: Condvar,
}

struct Progress {
    /// Start and end of every task that has ended.
    times: Vec<Option<(f64, f64)>>,
    failure: Option<Error>,
}

impl<Op: Display> Run<'_, Op> {
    /// A lane's part.
    fn lane(&self, lane: LaneKind) {
        for &id in self.graph.on_lane(lane) {
            if let Err(error) = self.ready(id).and_then(|()| self.one(id)) {
                return self.fail(error);
            }
        }
    }

    /// Waits for what a task waits for.
    fn ready(&self, id: TaskId) -> Result<()> {
        let mut progress = locked(&self.progress);
        loop {
            self.cancel.check()?;
            if self.graph.deps(id).iter().all(|dep| progress.times[dep.index()].is_some()) {
                return Ok(());
            }
            progress = self.changed.wait_timeout(progress, Cancel::POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn one(&self, id: TaskId) -> Result<()> {
        let op = self.graph.op(id);
        let start = self.start.elapsed();
        caught(|| (self.task)(id, op)).map_err(|error| match error {
            // Its own name would say nothing of what failed.
            Error::Cancelled(_) => error,
            error => {
                Error::Task { task: format!("{op} ({})", lane_name(self.graph.lane(id))), source: Box::new(error) }
            }
        })?;
        if let Some(cost) = self.cost {
            let due = start + Duration::try_from_secs_f64(cost(op)).unwrap_or_default();
            self.cancel.sleep_until(self.start + due)?;
        }
        let mut progress = locked(&self.progress);
        progress.times[id.index()] = Some((start.as_secs_f64(), self.start.elapsed().as_secs_f64()));
        drop(progress);
        self.changed.notify_all();
        Ok(())
    }

    /// Keeps the first failure and ends the others' work.
    fn fail(&self, error: Error) {
        let mut progress = locked(&self.progress);
        if progress.failure.is_none() {
            self.cancel.cancel(format!("{}: {error}", self.rank));
            progress.failure = Some(error);
        }
        drop(progress);
        self.changed.notify_all();
    }
}

/// Calls `f`; a panic becomes an error.
pub(crate) fn caught(f: impl FnOnce() -> Result<()>) -> Result<()> {
    // Whoever shares state with a task sees its error and gives up the run.
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(Error::Panicked(message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "with no message".to_owned())
}

/// The lock, also of who panicked with it: what it guards is changed in single steps.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
