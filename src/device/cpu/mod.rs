//! The CPU backend: plain loops over slices, generic over the element type, threaded with rayon. It is the specification
//! that other backends are checked against.

mod attention;
mod exp;
mod expert;
mod gate;
mod gemm;
mod math;
mod memory;
mod model;
mod optim;
mod order;
mod util;

/// The host's processor. Operations run before their call returns, on rayon's global pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;
