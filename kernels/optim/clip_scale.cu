// The factor that clips gradients to a global norm: one thread.
//
//   clip_scale_f32(sum, pre_scale, max_norm, norm, scale)
//
// norm[0] = √sum[0]·pre_scale, scale[0] = pre_scale·min(1, max_norm/norm[0]), 0 where the norm is not finite.

extern "C" __global__ void clip_scale_f32(const float* sum, float pre_scale, float max_norm, float* norm, float* scale) {
  const float length = sqrtf(*sum) * pre_scale;
  *norm = length;
  *scale = isfinite(length) ? pre_scale * (length > max_norm ? max_norm / length : 1.0f) : 0.0f;
}
