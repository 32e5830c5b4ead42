//! Which device a run asks for.

use std::fmt;
use std::str::FromStr;

use super::cuda::probe::probe;
use crate::error::{Error, Result, config_err};
use crate::tensor::Place;

/// What `--device` takes: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceChoice {
    /// The host's processor.
    Cpu,
    /// The GPU of this number, among those that the process sees.
    Cuda(usize),
    /// A GPU if there is one that works, otherwise the host's processor.
    #[default]
    Auto,
}

impl DeviceChoice {
    /// Where the run's tensors will lie. `auto` tries the GPUs, which takes about a second where there are any.
    pub fn place(self) -> Place {
        match self {
            DeviceChoice::Cpu => Place::Cpu,
            DeviceChoice::Cuda(ordinal) => Place::Cuda(ordinal),
            DeviceChoice::Auto => match probe().usable.found().map(|gpu| gpu.parse()) {
                Some(Ok(DeviceChoice::Cuda(ordinal))) => Place::Cuda(ordinal),
                _ => Place::Cpu,
            },
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "cpu" => return Ok(DeviceChoice::Cpu),
            "cuda" => return Ok(DeviceChoice::Cuda(0)),
            "auto" => return Ok(DeviceChoice::Auto),
            _ => {}
        }
        match s.strip_prefix("cuda:") {
            // Digits only: `parse` alone would take a sign.
            Some(number) if number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() => match number.parse() {
                Ok(ordinal) => Ok(DeviceChoice::Cuda(ordinal)),
                Err(_) => config_err!("device {s:?}: {number} is no number of a GPU"),
            },
            Some(number) => {
                config_err!("device {s:?}: {number:?} is no number of a GPU; they count from 0, as in cuda:0")
            }
            None => config_err!("unknown device {s:?}: it is one of cpu, cuda, cuda:N (N a GPU's number), auto"),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Cpu => f.pad("cpu"),
            DeviceChoice::Cuda(ordinal) => f.pad(&format!("cuda:{ordinal}")),
            DeviceChoice::Auto => f.pad("auto"),
        }
    }
}

impl serde::Serialize for DeviceChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for DeviceChoice {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_shown() {
        for (text, choice) in [
            ("cpu", DeviceChoice::Cpu),
            ("cuda:0", DeviceChoice::Cuda(0)),
            ("cuda:12", DeviceChoice::Cuda(12)),
            ("auto", DeviceChoice::Auto),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string(), text);
            assert_eq!(serde_json::to_value(choice).unwrap(), text);
            assert_eq!(serde_json::from_value::<DeviceChoice>(text.into()).unwrap(), choice);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("gpu", "unknown device \"gpu\""),
            ("", "cpu, cuda, cuda:N"),
            ("CUDA:0", "unknown device"),
            ("cuda:", "\"\" is no number"),
            ("cuda:+1", "\"+1\" is no number"),
            ("cuda:-1", "\"-1\" is no number"),
            ("cuda:x", "they count from 0"),
            ("cuda:99999999999999999999", "99999999999999999999 is no number"),
        ] {
            let message = text.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn auto_takes_the_gpu_that_works() {
        let found = probe().usable.found().is_some();
        assert_eq!(DeviceChoice::Auto.place() == Place::Cpu, !found);
        assert_eq!(DeviceChoice::Cpu.place(), Place::Cpu);
        assert_eq!(DeviceChoice::Cuda(3).place(), Place::Cuda(3));
    }
}
