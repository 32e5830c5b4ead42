//! Softmax and the norms, all over the last dimension.

use super::rows;
use crate::autograd::{Tape, Var};
use crate::error::Result;

impl Tape {
    /// Softmax over the last dimension.
    ///
    /// # Errors
    /// If the device fails.
    pub fn softmax(&self, x: &Var) -> Result<Var> {
        let y = self.lane().empty_like(x.value())?;
        self.lane().softmax(&self.lane().contiguous(x.value())?, &y)?;
        let kept = y.clone();
        Ok(self.record1(&[x], y, move |lane, dy| {
            let dx = lane.empty_like(&kept)?;
            lane.softmax_backward(&kept, &lane.contiguous(dy)?, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// Rows of non-negative values divided by their sum: `scale·x / (Σ x + eps)` over the last dimension.
    ///
    /// # Errors
    /// If the device fails.
    pub fn normalise_sum(&self, x: &Var, scale: f64, eps: f64) -> Result<Var> {
        let kept = rows(self.lane(), x.value())?;
        let y = self.lane().empty_like(&kept)?;
        self.lane().normalise_sum(&kept, scale, eps, &y)?;
        let shape = *x.value().shape();
        Ok(self.record1(&[x], y.reshape(shape)?, move |lane, dy| {
            let dx = lane.empty_like(&kept)?;
            lane.normalise_sum_backward(&kept, &y, scale, eps, &rows(lane, dy)?, &dx)?;
            Ok(vec![Some(dx.reshape(shape)?)])
        }))
    }

    /// Rows divided by their length: `x / max(‖x‖, eps)` over the last dimension.
    ///
    /// # Errors
    /// If the device fails.
    pub fn normalise_l2(&self, x: &Var, eps: f64) -> Result<Var> {
        let lane = self.lane();
        let xr = rows(lane, x.value())?;
        let (y, norm) = (lane.empty_like(&xr)?, lane.empty([xr.dim(0)], xr.dtype().accumulate())?);
        lane.normalise_l2(&xr, eps, &y, &norm)?;
        let shape = *x.value().shape();
        Ok(self.record1(&[x], y.reshape(shape)?, move |lane, dy| {
            let dx = lane.empty_like(&y)?;
            lane.normalise_l2_backward(&y, &norm, eps, &rows(lane, dy)?, &dx)?;
            Ok(vec![Some(dx.reshape(shape)?)])
        }))
    }

    /// LayerNorm over the last dimension: x (…, M), gain and bias (M).
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn layer_norm(&self, x: &Var, gain: &Var, bias: &Var, eps: f64) -> Result<Var> {
        let lane = self.lane();
        let (xr, g) = (rows(lane, x.value())?, lane.contiguous(gain.value())?);
        let (y, acc) = (lane.empty_like(&xr)?, xr.dtype().accumulate());
        let (mean, rstd) = (lane.empty([xr.dim(0)], acc)?, lane.empty([xr.dim(0)], acc)?);
        lane.layer_norm(&xr, &g, &lane.contiguous(bias.value())?, eps, &y, &mean, &rstd)?;
        let (shape, to_gain, to_bias) = (*x.value().shape(), gain.sink(), bias.sink());
        Ok(self.record1(&[x, gain, bias], y.reshape(shape)?, move |lane, dy| {
            let dx = lane.empty_like(&xr)?;
            let (d_gain, d_bias) = (to_gain.accumulator(lane)?, to_bias.accumulator(lane)?);
            lane.layer_norm_backward(&xr, &g, &mean, &rstd, &rows(lane, dy)?, &dx, &d_gain, &d_bias)?;
            Ok(vec![Some(dx.reshape(shape)?), to_gain.accumulated(d_gain), to_bias.accumulated(d_bias)])
        }))
    }

    /// RMSNorm over the last dimension: x (…, M), gain (M).
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn rms_norm(&self, x: &Var, gain: &Var, eps: f64) -> Result<Var> {
        let lane = self.lane();
        let (xr, g) = (rows(lane, x.value())?, lane.contiguous(gain.value())?);
        let (y, rstd) = (lane.empty_like(&xr)?, lane.empty([xr.dim(0)], xr.dtype().accumulate())?);
        lane.rms_norm(&xr, &g, eps, &y, &rstd)?;
        let (shape, to_gain) = (*x.value().shape(), gain.sink());
        Ok(self.record1(&[x, gain], y.reshape(shape)?, move |lane, dy| {
            let (dx, d_gain) = (lane.empty_like(&xr)?, to_gain.accumulator(lane)?);
            lane.rms_norm_backward(&xr, &g, &rstd, &rows(lane, dy)?, &dx, &d_gain)?;
            Ok(vec![Some(dx.reshape(shape)?), to_gain.accumulated(d_gain)])
        }))
    }
}
