//! The tape: operations as they ran, and their backwards run in reverse.

use super::Parameter;
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};
use std::cell::RefCell;
use std::collections::HashMap;

/// A value on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    id: Option<usize>,
    param: Option<Parameter>,
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Whether a gradient flows to it.
    pub fn needs_grad(&self) -> bool {
        self.id.is_some() || self.param.is_some()
    }

    /// The parameter this is, if it is one: an operation may add to its gradient itself and return none for it.
    pub fn param(&self) -> Option<&Parameter> {
        self.param.as_ref()
    }
}

/// What a node's backward gives: a gradient per input, none where none flows or where it was added in place.
pub type InputGrads = Result<Vec<Option<Tensor>>>;

type Backward = Box<dyn FnOnce(&Lane, &[Option<Tensor>]) -> InputGrads>;

struct Node {
    inputs: Vec<Var>,
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
        Var { value, id: None, param: None }
    }

    /// A value whose gradient can be asked for after [`Tape::backward`].
    pub fn leaf(&self, value: Tensor) -> Var {
        let id = self.recording.then(|| self.new_id());
        Var { value, id, param: None }
    }

    /// A parameter; its gradient is added to [`Parameter::grad`].
    pub fn param(&self, p: &Parameter) -> Var {
        Var { value: p.value().clone(), id: None, param: self.recording.then(|| p.clone()) }
    }

    fn new_id(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.vars += 1;
        state.vars - 1
    }

    /// Records an operation that has run: from `inputs` to `outputs`, with the backward that turns the outputs'
    /// gradients (none for an output nothing depended on; never all none) into the inputs'.
    ///
    /// The backward keeps what it captures alive until it has run.
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
            inputs: inputs.iter().map(|v| Var { value: v.value.clone(), id: v.id, param: v.param.clone() }).collect(),
            outputs: vars.iter().filter_map(|v| v.id).collect(),
            backward: Box::new(backward),
        });
        vars
    }

    fn check(&self, inputs: &[&Var], outputs: &[Tensor]) {
        let mut state = self.state.borrow_mut();
        let params: Vec<&str> = inputs.iter().filter_map(|v| v.param.as_ref()).map(Parameter::name).collect();
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
    /// If a root's gradient has another shape than its value, or an operation fails.
    pub fn backward(&self, roots: &[(&Var, Tensor)]) -> Result<Grads> {
        let nodes = std::mem::take(&mut self.state.borrow_mut().nodes);
        let mut grads = Grads { by_id: HashMap::new() };
        for (var, grad) in roots {
            if grad.shape() != var.value.shape() {
                shape_err!("a gradient of shape {} for a value of shape {}", grad.shape(), var.value.shape());
            }
            grads.add(&self.lane, var, grad.clone())?;
        }
        for node in nodes.into_iter().rev() {
            let outputs: Vec<Option<Tensor>> = node.outputs.iter().map(|id| grads.take(*id)).collect();
            if outputs.iter().all(Option::is_none) {
                continue;
            }
            let inputs = (node.backward)(&self.lane, &outputs)?;
            for (var, grad) in node.inputs.iter().zip(inputs) {
                if let Some(grad) = grad {
                    grads.add(&self.lane, var, grad)?;
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
        self.by_id.get(&var.id?).map(|h| &h.grad)
    }

    fn take(&mut self, id: usize) -> Option<Tensor> {
        self.by_id.remove(&id).map(|h| h.grad)
    }

    fn add(&mut self, lane: &Lane, var: &Var, grad: Tensor) -> Result<()> {
        if let Some(p) = &var.param {
            return lane.axpby(1.0, &grad, 1.0, p.grad());
        }
        let Some(id) = var.id else { return Ok(()) };
        match self.by_id.get_mut(&id) {
            None => {
                self.by_id.insert(id, Held { grad, owned: false });
            }
            Some(held) if held.owned => lane.axpby(1.0, &grad, 1.0, &held.grad)?,
            Some(held) => {
                let sum = lane.empty_like(&grad)?;
                lane.add(&lane.contiguous(&held.grad)?, &lane.contiguous(&grad)?, &sum)?;
                *held = Held { grad: sum, owned: true };
            }
        }
        Ok(())
    }
}
