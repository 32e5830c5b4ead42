//! The one error type of the crate. Every message names the offending value and the rule it broke.

use std::path::{Path, PathBuf};

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that breaks a rule, or a combination of settings that does.
    #[error("{0}")]
    Config(String),
    /// A tensor whose shape, layout or dtype an operation cannot take.
    #[error("{0}")]
    Shape(String),
    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder in question.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A checkpoint that cannot be read as what it should be.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// The checkpoint file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A device that is missing, or an operation on it that failed.
    #[error("{0}")]
    Device(String),
    /// A collective that did not come about: which, in which group, and which rank failed or never came.
    #[error("{0}")]
    Comm(String),
    /// A value that is not finite, with where it first appeared.
    #[error("{0}")]
    Numeric(String),
    /// A task of a graph that failed.
    #[error("task {task}: {source}")]
    Task {
        /// The task's name.
        task: String,
        /// Why it failed.
        source: Box<Error>,
    },
    /// Code that panicked where a panic must not spread; its message.
    #[error("panicked: {0}")]
    Panicked(String),
    /// Work given up because something else failed: another lane, another rank. Says what.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The user asked to stop; what had to be saved is saved.
    #[error("interrupted")]
    Interrupted,
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O error at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }
}

/// Returns early with [`Error::Shape`].
macro_rules! shape_err {
    ($($arg:tt)*) => { return Err($crate::Error::Shape(format!($($arg)*))) };
}
/// Returns early with [`Error::Config`].
macro_rules! config_err {
    ($($arg:tt)*) => { return Err($crate::Error::Config(format!($($arg)*))) };
}
pub(crate) use {config_err, shape_err};
