//! The layer.
/// c
pub struct MoeConfig;
/// l
pub struct MoeLayer;
