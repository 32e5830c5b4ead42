//! Where the ranks of a group meet: each leaves what it brings and gets what all have brought.

use super::super::{describe_group, list};
use super::staging::Staged;
use crate::device::Mark;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// What is common to all groups that came of one world.
pub(super) struct World {
    pub(super) timeout: Duration,
    /// Whether a rank leaves a group when it drops its handle. Otherwise whoever runs the ranks says when one leaves: a
    /// handle may go because its rank has failed, and why it did is the better reason.
    pub(super) leave_on_drop: bool,
    /// Ranks of each node.
    pub(super) per_node: usize,
    /// How long a rank that waits keeps looking before it sleeps: a thread that sleeps is slow to wake.
    pub(super) spin: Duration,
    state: Mutex<WorldState>,
}

#[derive(Default)]
struct WorldState {
    failure: Option<Failure>,
    groups: Vec<Weak<Group>>,
}

/// How often a rank that keeps looking pauses between looks.
const SPINS: usize = 50;

thread_local! {
    /// How long this thread has waited for ranks that came later than it did.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// How long this thread has waited, in all, for ranks that came to a meeting later: what it was held up by them, and not by
/// its own work.
pub(crate) fn waited() -> Duration {
    WAITED.get()
}

/// Why a world is of no more use.
#[derive(Clone)]
pub(super) struct Failure {
    /// The world rank whose fault it is, where that is one's.
    pub(super) rank: Option<usize>,
    pub(super) reason: String,
}

/// A lock that a panic cannot spoil: nothing panics while one is held.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(super) fn new(timeout: Duration, leave_on_drop: bool, per_node: usize, spin: Duration) -> Arc<World> {
        Arc::new(World { timeout, leave_on_drop, per_node, spin, state: Mutex::default() })
    }

    pub(super) fn failure(&self) -> Option<Failure> {
        lock(&self.state).failure.clone()
    }

    fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.state).groups.iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends what is pending in every group. The first reason is the one that counts.
    pub(super) fn fail(&self, failure: Failure) {
        lock(&self.state).failure.get_or_insert(failure);
        for group in self.groups() {
            // A rank looks for a failure under this lock before it waits: taken once, no rank can be in between.
            drop(lock(&group.state));
            group.changed.notify_all();
        }
    }

    /// World rank `rank` comes to no more meetings of any group.
    pub(super) fn leave(&self, rank: usize) {
        for group in self.groups() {
            if let Some(member) = group.ranks.iter().position(|&r| r == rank) {
                group.leave(member);
            }
        }
    }
}

/// A group of ranks.
pub(super) struct Group {
    pub(super) label: String,
    /// World ranks.
    pub(super) ranks: Vec<usize>,
    pub(super) world: Arc<World>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each member has brought to the meeting under way.
    brought: Vec<Option<Brought>>,
    /// Whether a member has gone for good.
    left: Vec<bool>,
    /// The number of meetings held.
    held: u64,
    /// When that was.
    when: Instant,
    /// What came of the last meeting. Members take it before they can come to the next, so it stays until all have.
    outcome: Result<Arc<Vec<Brought>>, String>,
}

/// What a member calls, in so far as all must call the same.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) op: &'static str,
    pub(super) dtype: Option<DType>,
    /// Elements of each rank's part; none where parts differ.
    pub(super) elements: Option<usize>,
    pub(super) root: Option<usize>,
}

impl Call {
    pub(super) fn new(op: &'static str) -> Call {
        Call { op, dtype: None, elements: None, root: None }
    }

    pub(super) fn of(op: &'static str, part: &Tensor) -> Call {
        Call { op, dtype: Some(part.dtype()), elements: Some(part.elements()), root: None }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.op)?;
        match (self.elements, self.dtype) {
            (Some(n), Some(dtype)) => write!(f, " of {n} {dtype}")?,
            (None, Some(dtype)) => write!(f, " of {dtype}")?,
            _ => {}
        }
        self.root.map_or(Ok(()), |root| write!(f, " from rank {root} of the group"))
    }
}

/// What a member brings.
#[derive(Clone)]
pub(super) struct Brought {
    pub(super) call: Call,
    /// What it sends: one tensor, or one per rank.
    pub(super) sends: Vec<Tensor>,
    /// How many elements it means to receive from each rank, where these differ.
    pub(super) expects: Vec<usize>,
    /// When the others may read what it sends, or when it has read what they sent.
    pub(super) mark: Option<Mark>,
    /// Where ranks of other nodes find what it sends.
    pub(super) staged: Option<Staged>,
    /// For a split.
    pub(super) split: Option<(usize, usize)>,
    pub(super) group: Option<Arc<Group>>,
}

impl Brought {
    pub(super) fn new(call: Call) -> Brought {
        Brought { call, sends: Vec::new(), expects: Vec::new(), mark: None, staged: None, split: None, group: None }
    }
}

impl Group {
    pub(super) fn new(label: String, ranks: Vec<usize>, world: &Arc<World>) -> Arc<Group> {
        let state = State {
            brought: vec![None; ranks.len()],
            left: vec![false; ranks.len()],
            held: 0,
            when: Instant::now(),
            outcome: Err("no meeting was held".to_owned()),
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let group = Arc::new(Group { label, ranks, world: world.clone(), state, changed });
        lock(&world.state).groups.push(Arc::downgrade(&group));
        group
    }

    /// Leaves `brought` as what `member` brings, waits for the others and returns what all have brought.
    pub(super) fn meet(&self, member: usize, brought: Brought) -> Result<Arc<Vec<Brought>>> {
        let op = brought.call.op;
        self.wait(member, brought).map_err(|reason| {
            let group = describe_group(&self.label, &self.ranks);
            let message = format!("{op} in {group} on rank {}: {reason}", self.ranks[member]);
            self.world.fail(Failure { rank: None, reason: message.clone() });
            Error::Comm(message)
        })
    }

    fn wait(&self, member: usize, brought: Brought) -> Result<Arc<Vec<Brought>>, String> {
        if let Some(failure) = self.world.failure() {
            return Err(failure.reason);
        }
        let begin = Instant::now();
        let (deadline, spin_until) = (begin + self.world.timeout, begin + self.world.spin);
        let mut state = lock(&self.state);
        if let Some(other) = &state.brought[member] {
            return Err(format!("this rank has {} pending: one collective of a group at a time", other.call));
        }
        state.brought[member] = Some(brought);
        let meeting = state.held;
        if state.brought.iter().all(Option::is_some) {
            let all: Vec<Brought> = state.brought.iter_mut().filter_map(Option::take).collect();
            state.outcome = self.compare(&all).map(|()| Arc::new(all));
            state.held += 1;
            state.when = Instant::now();
            self.changed.notify_all();
        }
        loop {
            if state.held != meeting {
                WAITED.set(WAITED.get() + state.when.saturating_duration_since(begin));
                return state.outcome.clone();
            }
            if let Some(failure) = self.world.failure() {
                return Err(failure.reason);
            }
            let absent = |who: &dyn Fn(usize) -> bool| {
                list((0..self.ranks.len()).filter(|&i| state.brought[i].is_none() && who(i)).map(|i| self.ranks[i]))
            };
            let left = absent(&|i| state.left[i]);
            if !left.is_empty() {
                return Err(format!("rank {left} has left"));
            }
            let now = Instant::now();
            if now >= deadline {
                let timeout = self.world.timeout;
                return Err(format!("rank {} did not come within {timeout:?}", absent(&|_| true)));
            }
            if now < spin_until {
                drop(state);
                (0..SPINS).for_each(|_| std::hint::spin_loop());
                state = lock(&self.state);
                continue;
            }
            let waited = self.changed.wait_timeout(state, deadline - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fails unless all have called the same.
    fn compare(&self, all: &[Brought]) -> Result<(), String> {
        for (i, b) in all.iter().enumerate() {
            if b.call != all[0].call {
                return Err(format!(
                    "rank {} called {}, rank {} {}: all call the same",
                    self.ranks[0], all[0].call, self.ranks[i], b.call
                ));
            }
        }
        for (to, receiver) in all.iter().enumerate() {
            for (from, &expected) in receiver.expects.iter().enumerate() {
                let sent = all[from].sends[to].elements();
                if sent != expected {
                    return Err(format!(
                        "rank {} sends {sent} elements to rank {}, which receives {expected}",
                        self.ranks[from], self.ranks[to]
                    ));
                }
            }
        }
        Ok(())
    }

    /// `member` comes to no more meetings.
    pub(super) fn leave(&self, member: usize) {
        lock(&self.state).left[member] = true;
        self.changed.notify_all();
    }
}
