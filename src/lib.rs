//! fsmoe: an engine that trains sparse Mixture-of-Experts (MoE) models, after the paper "FSMoE: A Flexible and Scalable
//! Training System for Sparse Mixture-of-Experts Models" (ASPLOS 2025, arXiv 2501.10714).
//!
//! # Where things are
//!
//! Arrows point one way: tensor ← device ← autograd ← moe ← model ← train; device ← engine ← schedule ← moe and
//! device ← comm ← schedule; bench over train; report and the command on top.
//!
//! | module | holds |
//! |---|---|
//! | [`tensor`] | `DType`, `Shape`, `Layout`, `Storage`, `Tensor`; no arithmetic |
//! | [`device`] | lanes, the [`Kernels`](device::Kernels) traits (every primitive operation), and what implements them: [`cpu`](device::cpu), the specification, and [`cuda`](device::cuda), the only place that names the CUDA driver |
//! | [`comm`] | collectives among ranks, the groups that ranks are divided into, all-to-all algorithms; [`local`](comm::local), ranks as threads, on the CPU or sharing a GPU; [`nccl`](comm::nccl), ranks as processes, which [meet](comm::rendezvous) first |
//! | [`engine`] | `TaskGraph`, its executors (threads, a device's queues, the simulator), `Timeline`; knows nothing of MoE |
//! | [`schedule`] | pure planning, for the ranks and groups that `comm` describes: costs and their fit, profiles, policies, the planner, plans and their graphs |
//! | [`autograd`] | the tape, `Var`, parameters, and the differentiable operations over `Kernels` |
//! | [`moe`] | the MoE layer: [`gate`](moe::gate), [`order`](moe::order), [`expert`](moe::expert), hooks, routing, and the layer that runs them |
//! | [`model`] | presets, attention, blocks, GPT-2-MoE and Mixtral transformers, sampling, and checkpoints under Hugging Face's names |
//! | [`train`] | data, optimizer, the loop, checkpoints of a run, and its folder |
//! | [`bench`](mod@bench) | the layer and every operation timed beside what the device can do at most; somebody's kernel checked and timed in ours' place; a step over ranks under every schedule, beside its prediction |
//! | [`report`] | tables, bars, loss curves, timelines in the terminal, as SVG and for Perfetto |
//! | [`rng`], [`fsio`] | counter-based random numbers; files that appear whole or not at all |
//!
//! Beside `src/`: `kernels/`, CUDA C++, a folder per family and a file per operation, its backward beside its forward
//! (`common/` has what they share); `build.rs` and `build/`, which compile them into one embedded fat binary; `src/main.rs`
//! and `src/cli/`, the command, one file per subcommand; `tests/it/`, the integration tests, and `tests/golden/`, values
//! of independent implementations with the scripts that made them; `benches/`; `examples/`, modules written outside the
//! crate; `profiles/`, measured costs of clusters; `docs/`, the reasoning and the figures; `scripts/`, the pinned CUDA
//! compiler, the package for GPU hosts, and what measures and checks there.
//!
//! # A layer by hand
//!
//! ```
//! use fsmoe::autograd::{Init, Tape};
//! use fsmoe::device::Lane;
//! use fsmoe::moe::{MoeConfig, MoeLayer, StepContext};
//! use fsmoe::tensor::DType;
//!
//! # fn main() -> fsmoe::Result<()> {
//! let lane = Lane::cpu();
//! let config = MoeConfig { experts: 4, top_k: 2, hidden: 16, ffn: 32, ..MoeConfig::default() };
//! let layer = MoeLayer::new(&Init::new(&lane, DType::F32, 1), &config)?;
//! let tape = Tape::new(&lane);
//! let x = tape.leaf(lane.full([10, 16], DType::F32, 0.5)?);
//! let step = StepContext { train: true, seed: 1, step: 0, first_token: 0 };
//! let out = layer.forward(&tape, &x, step)?;
//! assert_eq!(out.y.value().shape().dims(), [10, 16]);
//! // Gradients of the input and of every parameter, given that of y.
//! let dy = lane.full([10, 16], DType::F32, 1.0)?;
//! let grads = tape.backward(&[(&out.y, dy)])?;
//! assert!(grads.get(&x).is_some() && layer.parameters().iter().all(|p| p.grad().elements() > 0));
//! # Ok(())
//! # }
//! ```

pub mod autograd;
pub mod bench;
pub mod comm;
pub mod device;
pub mod engine;
mod error;
pub mod fsio;
pub mod model;
pub mod moe;
mod named;
pub mod report;
pub mod rng;
pub mod schedule;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
