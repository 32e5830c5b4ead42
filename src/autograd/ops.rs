//! The differentiable operations.
