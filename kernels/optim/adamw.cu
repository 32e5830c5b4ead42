// AdamW (Loshchilov and Hutter, 2019) over up to 64 tensors in one launch, in f32, with the 16-bit copy of each weight written
// in the same pass:
//
//   adamw_many_{bf16,f16,f32}(table, count, scalars, grad_scale)       the suffix is the gradients' and the copies' type
//   adamw_scalars_f32(scalars, beta1, new1, beta2, new2, eps, rate, root, lr)
//
//   g = grad_scale[0]·grad,  m = β₁·m + (1 − β₁)·g,  v = β₂·v + (1 − β₂)·g²,
//   weight = (1 − lr·decay)·weight − rate·m / (√v·root + eps),  rate = lr/(1 − β₁ᵗ), root = 1/√(1 − β₂ᵗ)
//
// A grad_scale of 0 leaves everything as it is. What changes from step to step is in device memory, `scalars` in the order of
// adamw_scalars' parameters, so that a captured graph can be replayed for every step. The table is a kernel parameter: nothing
// has to be prepared, and nothing kept alive.
//
// Bound by memory: 26 bytes moved per weight with 16-bit gradients, and 2 more for the copy. A block of 256 threads takes 16,384
// elements of one tensor; tensors on 16-byte boundaries are moved in vectors of four elements.

#include "common/dtype.cuh"

namespace fsmoe::adamw {

constexpr int most_tensors = 64;
constexpr int block_elements = 16384;

struct Part {
  uint32_t first_block;  // of the launch, that takes this tensor
  float decay;
};

// Kernel parameters have 4 KiB.
struct Table {
  float* weight[most_tensors];
  float* m[most_tensors];
  float* v[most_tensors];
  const void* grad[most_tensors];
  void* copy[most_tensors];  // null where there is none
  index_t size[most_tensors];
  Part part[most_tensors];
};

struct Scalars {
  float beta1, new1, beta2, new2, eps, rate, root, lr;
};

// Four elements of a 16-bit type are 8 bytes, of f32 16.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

struct Update {
  Scalars s;
  float scale, keep;
  __device__ __forceinline__ void operator()(float& weight, float& m, float& v, float grad) const {
    const float g = scale * grad;
    m = s.beta1 * m + s.new1 * g;
    v = s.beta2 * v + s.new2 * g * g;
    weight = keep * weight - s.rate * m / (sqrtf(v) * s.root + s.eps);
  }
};

template <typename T>
__device__ __forceinline__ void many(const Table& table, int count, const float* __restrict__ scalars,
                                     const float* __restrict__ grad_scale) {
  const float scale = *grad_scale;
  if (scale == 0.0f) return;
  // The tensor whose blocks this one is among: the last that begins no later.
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (table.part[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Scalars s = {scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], scalars[6], scalars[7]};
  const Update update = {s, scale, 1.0f - s.lr * table.part[low].decay};
  const index_t first = static_cast<index_t>(blockIdx.x - table.part[low].first_block) * block_elements;
  const index_t left = table.size[low] - first;
  const int n = left < block_elements ? static_cast<int>(left) : block_elements;
  float* const weight = table.weight[low] + first;
  float* const m = table.m[low] + first;
  float* const v = table.v[low] + first;
  const T* const grad = static_cast<const T*>(table.grad[low]) + first;
  T* const copy = table.copy[low] ? static_cast<T*>(table.copy[low]) + first : nullptr;

  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = aligned(weight) && aligned(m) && aligned(v) && aligned(grad) && aligned(copy);
  const int whole = vector ? n / 4 * 4 : 0;
#pragma unroll 2
  for (int i = threadIdx.x * 4; i < whole; i += blockDim.x * 4) {
    Four<float> w4 = *reinterpret_cast<const Four<float>*>(weight + i);
    Four<float> m4 = *reinterpret_cast<const Four<float>*>(m + i);
    Four<float> v4 = *reinterpret_cast<const Four<float>*>(v + i);
    const Four<T> g4 = *reinterpret_cast<const Four<T>*>(grad + i);
    Four<T> c4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      update(w4.v[j], m4.v[j], v4.v[j], to_f32(g4.v[j]));
      c4.v[j] = from_f32<T>(w4.v[j]);
    }
    *reinterpret_cast<Four<float>*>(weight + i) = w4;
    *reinterpret_cast<Four<float>*>(m + i) = m4;
    *reinterpret_cast<Four<float>*>(v + i) = v4;
    if (copy) *reinterpret_cast<Four<T>*>(copy + i) = c4;
  }
  for (int i = whole + threadIdx.x; i < n; i += blockDim.x) {
    update(weight[i], m[i], v[i], to_f32(grad[i]));
    if (copy) copy[i] = from_f32<T>(weight[i]);
  }
}

}  // namespace fsmoe::adamw

#define FSMOE_ADAMW(suffix, T)                                                                                     \
  extern "C" __global__ void adamw_many_##suffix(const __grid_constant__ fsmoe::adamw::Table table, int count,     \
                                                 const float* scalars, const float* grad_scale) {                  \
    fsmoe::adamw::many<T>(table, count, scalars, grad_scale);                                                      \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_ADAMW)

// One thread.
extern "C" __global__ void adamw_scalars_f32(float* scalars, float beta1, float new1, float beta2, float new2, float eps,
                                             float rate, float root, float lr) {
  scalars[0] = beta1;
  scalars[1] = new1;
  scalars[2] = beta2;
  scalars[3] = new2;
  scalars[4] = eps;
  scalars[5] = rate;
  scalars[6] = root;
  scalars[7] = lr;
}
