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

pub use memory::available_memory;

/// The host's processor. Operations run before their call returns, on rayon's global pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// The processor's name, where the system tells it.
pub(super) fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")).and_then(|rest| rest.split(':').nth(1));
    name.map_or(std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}
