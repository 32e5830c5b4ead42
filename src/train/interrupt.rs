//! Ctrl-C: the first lets the step finish and a checkpoint be saved, the second ends the process.

use crate::error::{Error, Result};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<bool> = OnceLock::new();

/// Handles SIGINT (and SIGTERM, which schedulers send) from now on, for the whole process.
///
/// # Errors
/// If the handler cannot be installed.
pub fn install() -> Result<()> {
    let ok = *INSTALLED.get_or_init(|| {
        ctrlc::set_handler(|| {
            if REQUESTED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })
        .is_ok()
    });
    if ok { Ok(()) } else { Err(Error::Device("the handler for Ctrl-C cannot be installed".into())) }
}

/// Whether Ctrl-C was pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
