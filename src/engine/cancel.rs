//! The word that everybody stops.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A token that lanes, ranks and whoever waits for them share: once it is cancelled, all of them give up. What waits for
/// something else looks at it at least every [`Cancel::POLL`].
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<State>);

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicBool,
    reason: Mutex<Option<String>>,
    changed: Condvar,
}

impl Cancel {
    /// How long anything may wait without looking at the token.
    pub const POLL: Duration = Duration::from_millis(20);

    /// A token that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels; `reason` is what everybody will report. The first reason stays.
    pub fn cancel(&self, reason: impl Into<String>) {
        let mut known = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| reason.into());
        self.0.cancelled.store(true, Ordering::Release);
        self.0.changed.notify_all();
    }

    /// Whether it has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Goes on, unless it has been cancelled.
    ///
    /// # Errors
    /// [`Error::Cancelled`] with the reason.
    pub fn check(&self) -> Result<()> {
        if !self.is_cancelled() {
            return Ok(());
        }
        let reason = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        Err(Error::Cancelled(reason.clone().unwrap_or_default()))
    }

    /// Sleeps until `deadline`, or until it is cancelled.
    ///
    /// # Errors
    /// As [`Cancel::check`].
    pub fn sleep_until(&self, deadline: Instant) -> Result<()> {
        let mut reason = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(reason) = &*reason {
                return Err(Error::Cancelled(reason.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            reason = self.0.changed.wait_timeout(reason, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
