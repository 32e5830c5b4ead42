//! The watchdog of a process: it sees how far collectives have come, and ends the process when one of them waits too long.
//!
//! A collective has an event before it on its stream and one behind. Between the two it runs, or waits for its peers. A
//! thread looks at them, at the calls that a host thread is in, at NCCL's own errors, and at the line to the other ranks.

use super::library::{IN_PROGRESS, Library, SUCCESS, ncclComm_t};
use crate::comm::rendezvous::Control;
use crate::device::cuda::{Cuda, Event};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the watchdog looks.
const POLL: Duration = Duration::from_millis(20);
/// A collective that has run for so long when a rank is gone is taken to wait for it.
const WAITS: Duration = Duration::from_millis(100);

/// A collective, for messages.
#[derive(Clone)]
pub(super) struct What {
    pub(super) op: &'static str,
    /// How many of its group have been issued before it.
    pub(super) number: u64,
    /// `group ep (ranks 0, 2)`.
    pub(super) group: Arc<str>,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} number {} in {}", self.op, self.number + 1, self.group)
    }
}

/// A communicator, as NCCL has it.
pub(super) struct Handle {
    raw: ncclComm_t,
    watch: Arc<Watch>,
    /// Whether it is ours to destroy.
    owned: bool,
}

// SAFETY: NCCL's communicators are used from any thread, by one at a time, but for calls that ask for errors and that abort.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Has `watch` watch over a communicator.
    pub(super) fn new(watch: &Arc<Watch>, raw: ncclComm_t, owned: bool) -> Arc<Self> {
        watch.lock().comms.push(Watched { raw: Raw(raw), owned, pending: VecDeque::new() });
        Arc::new(Handle { raw, watch: watch.clone(), owned })
    }

    pub(super) fn raw(&self) -> ncclComm_t {
        self.raw
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Where a world is watched, its communicators end with it: others may still be waiting in this one.
        if self.watch.timeout.is_some() {
            return;
        }
        let failed = {
            let mut state = self.watch.lock();
            state.comms.retain(|c| c.raw.0 != self.raw);
            state.failure.is_some()
        };
        // What has failed has been aborted, which frees it.
        if self.owned && !failed {
            // SAFETY: nobody else has it any more.
            unsafe { (self.watch.library.destroy)(self.raw) };
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Raw(ncclComm_t);
// SAFETY: an address.
unsafe impl Send for Raw {}

/// A communicator and what has been issued on it.
struct Watched {
    raw: Raw,
    owned: bool,
    /// In the order of issue, which is that of their stream.
    pending: VecDeque<Pending>,
}

struct Pending {
    what: What,
    started: Event,
    ended: Event,
    /// When it was first seen to have started.
    since: Option<Instant>,
}

/// What watches over the communicators of a world in this process.
pub(super) struct Watch {
    library: &'static Library,
    /// This process's rank in the world.
    rank: usize,
    /// How long anything may wait for other ranks; none: nobody watches.
    timeout: Option<Duration>,
    control: Option<Arc<Control>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    comms: Vec<Watched>,
    /// The call that a host thread is in.
    calls: Vec<(u64, String, Instant)>,
    next_call: u64,
    /// Why nothing goes on.
    failure: Option<String>,
    /// When the process is to have ended.
    end: Option<Instant>,
    /// The watchdog has said why the process ends.
    told: bool,
    /// The world has ended in good order.
    over: bool,
}

impl Watch {
    /// A watch that nobody keeps: over communicators whose owner is somebody else.
    pub(super) fn idle(library: &'static Library, rank: usize) -> Arc<Self> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Watch { library, rank, timeout: None, control: None, state, changed })
    }

    /// Starts to watch.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub(super) fn start(
        library: &'static Library,
        rank: usize,
        timeout: Duration,
        control: Arc<Control>,
    ) -> Result<Arc<Self>> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let watch = Arc::new(Watch { library, rank, timeout: Some(timeout), control: Some(control), state, changed });
        let keeper = watch.clone();
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || keeper.keep(timeout))
            .map_err(|e| Error::Comm(format!("no thread for the watchdog: {e}")))?;
        Ok(watch)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is guarded is changed in single steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails once anything has failed: streams of aborted communicators hold nothing that may be used.
    pub(super) fn check(&self) -> Result<()> {
        match &self.lock().failure {
            Some(reason) => Err(Error::Comm(reason.clone())),
            None => Ok(()),
        }
    }

    /// Calls `f`, which may wait for other ranks, under watch.
    pub(super) fn during<T>(&self, what: impl FnOnce() -> String, f: impl FnOnce() -> T) -> T {
        if self.timeout.is_none() {
            return f();
        }
        let id = {
            let mut state = self.lock();
            let id = state.next_call;
            state.next_call += 1;
            state.calls.push((id, what(), Instant::now()));
            id
        };
        let result = f();
        self.lock().calls.retain(|(call, ..)| *call != id);
        result
    }

    /// An event behind what has been issued on `cuda`; none where nobody watches.
    pub(super) fn mark(&self, cuda: &Cuda) -> Result<Option<Event>> {
        if self.timeout.is_none() {
            return Ok(None);
        }
        cuda.mark(false).map(Some)
    }

    /// Watches over a collective between two events.
    pub(super) fn pend(&self, handle: &Handle, what: What, started: Option<Event>, ended: Option<Event>) {
        let (Some(started), Some(ended)) = (started, ended) else { return };
        let mut state = self.lock();
        if let Some(comm) = state.comms.iter_mut().find(|c| c.raw.0 == handle.raw) {
            comm.pending.push_back(Pending { what, started, ended, since: None });
        }
    }

    /// Waits until NCCL has done what it said it was about to do: what borrowed communicators, which may not block, say.
    ///
    /// # Errors
    /// The status, where it is an error.
    pub(super) fn settle(&self, raw: ncclComm_t, mut status: i32) -> Result<(), i32> {
        while status == IN_PROGRESS && !raw.is_null() {
            thread::yield_now();
            // SAFETY: the communicator is valid as long as its handle.
            let asked = unsafe { (self.library.async_error)(raw, &raw mut status) };
            if asked != SUCCESS {
                return Err(asked);
            }
        }
        if status == SUCCESS { Ok(()) } else { Err(status) }
    }

    /// What is known of why other ranks do not answer: waits a moment for word of it.
    pub(super) fn culprit(&self) -> Option<String> {
        self.control.as_ref()?.failure_within(Duration::from_millis(300))
    }

    /// Ends everything: this rank's calls from here on fail with `reason`, the other ranks hear of it, and NCCL gives up
    /// what it has pending.
    pub(super) fn fail(&self, reason: &str) {
        if self.doom(reason, false) {
            if let Some(control) = &self.control {
                control.fail(reason);
            }
            self.abort_all();
        }
    }

    /// Sets the end of this process; whether it was not set before. `told` where the watchdog says why.
    fn doom(&self, reason: &str, told: bool) -> bool {
        let mut state = self.lock();
        if state.failure.is_some() {
            return false;
        }
        (state.failure, state.told) = (Some(reason.to_owned()), told);
        // What is left of it is for the system to take the process down in.
        state.end = self.timeout.map(|timeout| Instant::now() + grace(timeout) * 3 / 4);
        self.changed.notify_all();
        true
    }

    fn abort_all(&self) {
        let owned: Vec<Raw> = self.lock().comms.iter().filter(|c| c.owned).map(|c| c.raw).collect();
        for raw in owned {
            // SAFETY: a communicator in use: that is what aborting is for. Nothing calls it after a failure.
            unsafe { (self.library.abort)(raw.0) };
        }
    }

    /// The world ends in good order, on all ranks: nobody has one of its communicators any more, nor waits in one.
    pub(super) fn over(&self) {
        let comms = {
            let mut state = self.lock();
            state.failure = Some("the world of ranks has ended".to_owned());
            std::mem::take(&mut state.comms)
        };
        for comm in comms.iter().filter(|c| c.owned) {
            // SAFETY: as the caller says.
            self.during(|| "the end of a communicator".to_owned(), || unsafe { (self.library.destroy)(comm.raw.0) });
        }
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Waits for the end of the process, if the watchdog has said why it ends: there is nothing to add to that.
    pub(super) fn wait_for_end(&self) {
        while self.lock().told {
            thread::sleep(POLL);
        }
    }

    /// The watchdog's own life.
    fn keep(&self, timeout: Duration) {
        let limit = timeout - grace(timeout);
        // Word of a rank that has failed, and since when.
        let mut word: Option<(String, Instant)> = None;
        loop {
            {
                let state = self.lock();
                let state = self.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner).0;
                if state.over {
                    return;
                }
                if let Some(end) = state.end {
                    if Instant::now() >= end {
                        exit();
                    }
                    continue;
                }
            }
            let waiting = self.progress();
            let longest = waiting.iter().map(|(_, since)| since.elapsed()).max().unwrap_or_default();
            let failed = || self.control.as_ref().and_then(|c| c.failure()).or_else(|| self.broken());
            if word.is_none() {
                word = failed().map(|reason| (reason, Instant::now()));
            }
            match &word {
                // A moment in which the next collective is issued, that this rank will wait in.
                Some((reason, since))
                    if (longest >= WAITS && since.elapsed() >= WAITS) || since.elapsed() >= grace(timeout) / 2 =>
                {
                    // By now it may be known which rank it was.
                    let named = self.control.as_ref().and_then(|control| control.failure());
                    self.end(named.as_ref().unwrap_or(reason), &waiting);
                }
                None if longest >= limit => self.end(&format!("no answer within {limit:?}"), &waiting),
                _ => {}
            }
        }
    }

    /// Looks at what is pending: the collectives and calls that wait, each with since when.
    fn progress(&self) -> Vec<(String, Instant)> {
        let now = Instant::now();
        // Taken out while the driver is asked, so that the thread that issues does not wait.
        let (mut taken, mut waiting) = {
            let mut state = self.lock();
            let taken: Vec<_> = state.comms.iter_mut().map(|c| (c.raw, std::mem::take(&mut c.pending))).collect();
            let calls = state.calls.iter().map(|(_, what, since)| (format!("the call of {what}"), *since));
            (taken, calls.collect::<Vec<_>>())
        };
        for (_, pending) in &mut taken {
            // A device that has failed says so to whoever uses it next.
            let done = pending.iter().take_while(|p| p.ended.is_done().unwrap_or(false)).count();
            pending.drain(..done);
            if let Some(first) = pending.front_mut()
                && first.started.is_done().unwrap_or(false)
            {
                waiting.push((first.what.to_string(), *first.since.get_or_insert(now)));
            }
        }
        let mut state = self.lock();
        for (raw, mut pending) in taken {
            if let Some(comm) = state.comms.iter_mut().find(|c| c.raw == raw) {
                pending.append(&mut comm.pending);
                comm.pending = pending;
            }
        }
        waiting
    }

    /// What NCCL itself has found to be wrong.
    fn broken(&self) -> Option<String> {
        let state = self.lock();
        if state.failure.is_some() {
            return None;
        }
        state.comms.iter().find_map(|comm| {
            let mut status = SUCCESS;
            // SAFETY: what is in the list has not been destroyed.
            let asked = unsafe { (self.library.async_error)(comm.raw.0, &raw mut status) };
            let status = if asked == SUCCESS { status } else { asked };
            (status != SUCCESS && status != IN_PROGRESS).then(|| format!("NCCL: {}", self.library.explain(status)))
        })
    }

    /// Says what was waited for, aborts, and ends the process.
    fn end(&self, reason: &str, waiting: &[(String, Instant)]) {
        let mut text = format!("rank {}: {reason}", self.rank);
        let mut waiting: Vec<_> = waiting.iter().collect();
        waiting.sort_by_key(|(_, since)| *since);
        for (i, (what, since)) in waiting.iter().enumerate() {
            let verb = if i == 0 { "; this rank has waited" } else { ", and" };
            text += &format!("{verb} for {:.1} s in {what}", since.elapsed().as_secs_f64());
        }
        if waiting.is_empty() {
            text += "; this rank waited in no collective";
        }
        if !self.doom(&text, true) {
            return;
        }
        eprintln!("error: {text}");
        if let Some(control) = &self.control {
            control.fail(&format!("rank {} gave up: {reason}", self.rank));
        }
        // Aborting may itself wait for what does not come.
        let (done, aborted) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                self.abort_all();
                let _ = done.send(());
            });
            let _ = aborted.recv_timeout(self.timeout.map(grace).unwrap_or_default() / 8);
            exit();
        });
    }
}

/// The part of the time that ranks wait for each other which is left to a process to end in.
fn grace(timeout: Duration) -> Duration {
    // Several processes that leave one GPU take the system more than a second.
    (timeout / 3).min(Duration::from_secs(4))
}

/// Ends the process as it is: whatever runs at its end might wait for what does not come.
fn exit() -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(1) }
}
