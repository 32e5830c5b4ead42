//! Which device is benchmarked.

use super::Bench;
use crate::error::{Error, Result, config_err};
use std::str::FromStr;

/// A device as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A GPU where there is one that can be used, otherwise the processor.
    Auto,
    /// The host's processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match (s, s.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(DeviceName::Auto),
            ("cpu", _) => Ok(DeviceName::Cpu),
            ("cuda", _) => Ok(DeviceName::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(DeviceName::Cuda(ordinal)),
            _ => config_err!("unknown device {s:?}: it is auto, cpu, cuda or cuda:N"),
        }
    }
}

impl DeviceName {
    /// The device, ready to be measured.
    ///
    /// # Errors
    /// If there is no such device, or it cannot be used.
    pub fn open(self) -> Result<Bench> {
        match self {
            DeviceName::Cpu => Bench::cpu(),
            DeviceName::Cuda(ordinal) => super::gpu::open(ordinal),
            DeviceName::Auto if crate::device::cuda::probe::probe().usable.found().is_some() => super::gpu::open(0),
            DeviceName::Auto => Bench::cpu(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_name() {
        let parse = |s: &str| s.parse::<DeviceName>();
        assert_eq!(parse("auto").unwrap(), DeviceName::Auto);
        assert_eq!(parse("cpu").unwrap(), DeviceName::Cpu);
        assert_eq!(parse("cuda").unwrap(), DeviceName::Cuda(0));
        assert_eq!(parse("cuda:3").unwrap(), DeviceName::Cuda(3));
        for wrong in ["gpu", "cuda:", "cuda:x", "CUDA", ""] {
            assert!(parse(wrong).unwrap_err().to_string().contains("auto, cpu, cuda or cuda:N"));
        }
    }
}
