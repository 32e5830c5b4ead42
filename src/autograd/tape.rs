//! The tape: operations as they ran, and their backwards run in reverse.

use super::Parameter;
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Shape, Tensor};
use std::cell::RefCell;
use std::collections::HashMap;

/// A value on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    dest: Dest,
}

/// Where a value's gradient goes.
#[derive(Clone, Debug)]
enum Dest {
    Nowhere,
    /// The tape, under this number.
    Tape(usize),
    /// The parameter's own gradient.
    Param(Parameter),
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Whether a gradient flows to it.
    pub fn needs_grad(&self) -> bool {
        !matches!(self.dest, Dest::Nowhere)
    }

    /// The parameter this is, if it is one: an operation may add to its gradient itself and return none for it.
    pub fn param(&self) -> Option<&Parameter> {
        match &self.dest {
            Dest::Param(p) => Some(p),
            _ => None,
        }
    }

    fn id(&self) -> Option<usize> {
        match self.dest {
            Dest::Tape(id) => Some(id),
            _ => None,
        }
    }

    /// Where its gradient goes, for a backward that does not read the value and so must not keep it alive.
    pub(super) fn sink(&self) -> Sink {
        Sink { dest: self.dest.clone(), shape: *self.value.shape(), dtype: self.value.dtype() }
    }
}

/// Where the gradient of an operation's input goes, and its shape and dtype.
pub(super) struct Sink {
    dest: Dest,
    shape: Shape,
    dtype: DType,
}

impl Sink {
    /// Whether a gradient is wanted at all.
    pub(super) fn needed(&self) -> bool {
        !matches!(self.dest, Dest::Nowhere)
    }

    /// The input's shape, and its gradient's.
    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// The input's type, and its gradient's.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// A row-major tensor for a kernel to write the gradient to.
    pub(super) fn empty(&self, lane: &Lane) -> Result<Tensor> {
        lane.empty(self.shape, self.dtype)
    }

    /// A row-major tensor for a kernel to add the gradient to: a parameter's own gradient, otherwise zeros. A backward
    /// returns [`Sink::accumulated`] of it.
    pub(super) fn accumulator(&self, lane: &Lane) -> Result<Tensor> {
        match &self.dest {
            Dest::Param(p) => Ok(p.grad().clone()),
            _ => lane.zeros(self.shape, self.dtype),
        }
    }

    /// What a backward returns after it has added to [`Sink::accumulator`]: nothing where that was a parameter's.
    pub(super) fn accumulated(&self, grad: Tensor) -> Option<Tensor> {
        matches!(self.dest, Dest::Tape(_)).then_some(grad)
    }

    /// The gradient `a·b` of a matrix operand, added by the product itself where it is a parameter's. Rank-2 `a` and
    /// `b` give the gradient's rows, whatever its rank.
    pub(super) fn product(&self, lane: &Lane, a: &Tensor, b: &Tensor) -> InputGrad {
        let (out, beta) = match &self.dest {
            Dest::Nowhere => return Ok(None),
            Dest::Tape(_) => (self.empty(lane)?, 0.0),
            Dest::Param(p) => {
                let (grad, beta) = p.grad_to_write();
                (grad.clone(), beta)
            }
        };
        let c = if a.rank() == 2 && b.rank() == 2 { out.reshape([a.dim(0), b.dim(1)])? } else { out.clone() };
        lane.gemm(1.0, a, b, beta, &c)?;
        Ok(self.accumulated(out))
    }
}

/// The gradient of one input, none where none flows or where it was added in place.
pub(super) type InputGrad = Result<Option<Tensor>>;

/// What a node's backward gives: a gradient per input, none where none flows or where it was added in place.
pub type InputGrads = Result<Vec<Option<Tensor>>>;

type Backward = Box<dyn FnOnce(&Lane, &[Option<Tensor>]) -> InputGrads>;

struct Node {
    inputs: Vec<Sink>,
    outputs: Vec<usize>,
    backward: Backward,
}

/// Records operations on one lane and runs their backwards in reverse order.
pub struct Tape {
    lane: Lane,
    recording: bool,
    checking: bool,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    nodes: Vec<Node>,
    vars: usize,
    /// The last parameter an operation used, to say where in a model an operation is.
    near: Option<String>,
    first_non_finite: Option<String>,
}

impl Tape {
    /// A tape that records.
    pub fn new(lane: &Lane) -> Self {
        Tape { lane: lane.clone(), recording: true, checking: false, state: RefCell::default() }
    }

    /// A tape that looks at every output for values that are not finite: slow, for finding where one first appeared.
    pub fn checking(lane: &Lane) -> Self {
        Tape { checking: true, ..Self::new(lane) }
    }

    /// Where the first value that is not finite appeared, on a tape made by [`Tape::checking`].
    pub fn first_non_finite(&self) -> Option<String> {
        self.state.borrow().first_non_finite.clone()
    }

    /// A tape that computes values only: nothing is kept for a backward.
    pub fn inference(lane: &Lane) -> Self {
        Tape { recording: false, ..Self::new(lane) }
    }

    /// The lane operations are issued on.
    pub fn lane(&self) -> &Lane {
        &self.lane
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A value no gradient flows to.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, dest: Dest::Nowhere }
    }

    /// A value whose gradient can be asked for after [`Tape::backward`].
    pub fn leaf(&self, value: Tensor) -> Var {
        let dest = if self.recording { Dest::Tape(self.new_id()) } else { Dest::Nowhere };
        Var { value, dest }
    }

    /// A parameter; its gradient is added to [`Parameter::grad`].
    pub fn param(&self, p: &Parameter) -> Var {
        let dest = if self.recording { Dest::Param(p.clone()) } else { Dest::Nowhere };
        Var { value: p.value().clone(), dest }
    }

    fn new_id(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.vars += 1;
        state.vars - 1
    }

    /// Records an operation that has run: from `inputs` to `outputs`, with the backward that turns the outputs'
    /// gradients (none for an output nothing depended on; never all none) into the inputs'. A gradient has its value's
    /// shape and dtype, but any layout; it may be shared, so a backward never writes into one it was given.
    ///
    /// The backward keeps what it captures alive until it has run; the tape itself keeps no values.
    pub fn record(
        &self,
        inputs: &[&Var],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&Lane, &[Option<Tensor>]) -> InputGrads + 'static,
    ) -> Vec<Var> {
        if self.checking {
            self.check(inputs, &outputs);
        }
        if !self.recording || !inputs.iter().any(|v| v.needs_grad()) {
            return outputs.into_iter().map(|t| self.constant(t)).collect();
        }
        let vars: Vec<Var> = outputs.into_iter().map(|t| self.leaf(t)).collect();
        self.state.borrow_mut().nodes.push(Node {
            inputs: inputs.iter().map(|v| v.sink()).collect(),
            outputs: vars.iter().filter_map(Var::id).collect(),
            backward: Box::new(backward),
        });
        vars
    }

    fn check(&self, inputs: &[&Var], outputs: &[Tensor]) {
        let mut state = self.state.borrow_mut();
        let params: Vec<&str> = inputs.iter().filter_map(|v| v.param()).map(Parameter::name).collect();
        if let Some(last) = params.last() {
            state.near = Some((*last).to_owned());
        }
        if state.first_non_finite.is_some() {
            return;
        }
        for out in outputs.iter().filter(|t| t.dtype().is_float() && !self.is_finite(t)) {
            let place = match (&state.near, params.is_empty()) {
                (Some(name), false) => format!("of the operation with {name}"),
                (Some(name), true) => format!("of an operation after the one with {name}"),
                (None, _) => "before any parameter was used".to_owned(),
            };
            state.first_non_finite = Some(format!("in an output of shape {} {place}", out.shape()));
        }
    }

    fn is_finite(&self, t: &Tensor) -> bool {
        let values = self.lane.cast(t, DType::F64).and_then(|t| self.lane.to_host(&t)).and_then(|t| t.to_vec::<f64>());
        // A tensor that cannot be read is not known to be bad; the operation that fails on it will say so.
        values.map_or(true, |v| v.iter().all(|v| v.is_finite()))
    }

    /// [`Tape::record`] for the usual operation of one output.
    pub fn record1(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&Lane, &Tensor) -> InputGrads + 'static,
    ) -> Var {
        let value = output.clone();
        self.record(inputs, vec![output], move |lane, dy| match &dy[0] {
            Some(dy) => backward(lane, dy),
            None => shape_err!("a backward was run without a gradient"),
        })
        .pop()
        .unwrap_or_else(|| self.constant(value))
    }

    /// Runs the recorded backwards in reverse from `roots`, each with its gradient, and clears the tape.
    ///
    /// # Errors
    /// If a gradient has another shape or dtype than its value, or an operation fails.
    pub fn backward(&self, roots: &[(&Var, Tensor)]) -> Result<Grads> {
        let nodes = std::mem::take(&mut self.state.borrow_mut().nodes);
        let mut grads = Grads { by_id: HashMap::new() };
        for (var, grad) in roots {
            grads.add(&self.lane, &var.sink(), grad.clone())?;
        }
        for node in nodes.into_iter().rev() {
            let outputs: Vec<Option<Tensor>> = node.outputs.iter().map(|id| grads.take(*id)).collect();
            if outputs.iter().all(Option::is_none) {
                continue;
            }
            let inputs = (node.backward)(&self.lane, &outputs)?;
            if inputs.len() != node.inputs.len() {
                shape_err!("a backward gave {} gradients for {} inputs: one each", inputs.len(), node.inputs.len());
            }
            for (sink, grad) in node.inputs.iter().zip(inputs) {
                if let Some(grad) = grad {
                    grads.add(&self.lane, sink, grad)?;
                }
            }
        }
        Ok(grads)
    }
}

/// The gradients of a tape's leaves after [`Tape::backward`].
pub struct Grads {
    by_id: HashMap<usize, Held>,
}

struct Held {
    grad: Tensor,
    /// Whether this map made the tensor, so that it may add to it: a backward may hand the same tensor to two inputs.
    owned: bool,
}

impl Grads {
    /// The gradient that reached `var`, if one did. Parameters' gradients are in [`Parameter::grad`].
    pub fn get(&self, var: &Var) -> Option<&Tensor> {
        self.by_id.get(&var.id()?).map(|h| &h.grad)
    }

    fn take(&mut self, id: usize) -> Option<Tensor> {
        self.by_id.remove(&id).map(|h| h.grad)
    }

    fn add(&mut self, lane: &Lane, sink: &Sink, grad: Tensor) -> Result<()> {
        if grad.shape() != &sink.shape || grad.dtype() != sink.dtype {
            let (shape, dtype) = (sink.shape, sink.dtype);
            shape_err!("a gradient {grad:?} for a value {dtype} {shape}: both have one shape and dtype");
        }
        let id = match &sink.dest {
            Dest::Nowhere => return Ok(()),
            Dest::Param(p) => return lane.axpby(1.0, &lane.contiguous(&grad)?, 1.0, p.grad()),
            Dest::Tape(id) => *id,
        };
        match self.by_id.get_mut(&id) {
            None => {
                self.by_id.insert(id, Held { grad, owned: false });
            }
            Some(held) if held.owned => lane.axpby(1.0, &lane.contiguous(&grad)?, 1.0, &held.grad)?,
            Some(held) => {
                let sum = lane.empty_like(&grad)?;
                lane.add(&lane.contiguous(&held.grad)?, &lane.contiguous(&grad)?, &sum)?;
                *held = Held { grad: sum, owned: true };
            }
        }
        Ok(())
    }
}
