// A backend's kernels as implementations of cover_kernels/schemas.py, through LibTorch's stable ABI: what all
// backends share.
//
// The arguments were checked in Python; here outputs are allocated and sizes are copied out. `Guard` makes the device
// of a tensor current while it lives. Only the bindings know torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace cover {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "cover_kernels: tensors must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType acc_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Copies one value per spatial axis into [3], 1 standing for the missing D in 2D.
template <class Values>
inline void copy_axes(const Values& values, int64_t first, int64_t d, int64_t (&out)[3]) {
  out[0] = 1;
  for (int64_t i = 0; i < d; i++) out[3 - d + i] = values[first + i];
}

inline Veu veu_args(const Tensor& q, const Tensor& k, const Ints& window, int64_t heads, double scale,
                    const std::optional<Tensor>& mask) {
  Veu a{};
  a.dtype = dtype_of(q);
  a.B = q.size(0), a.J = heads, a.C = q.size(1) / heads, a.d = q.dim() - 2;
  copy_axes(q.sizes(), 2, a.d, a.S);
  copy_axes(window, 0, a.d, a.N);
  a.scale = scale;
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr();
  a.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  return a;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

// Allocates what a backward asks for, on the device of `like`; it lives as long as what is returned.
template <class Args>
std::optional<Tensor> allocate_workspace(const Tensor& like, int64_t (*bytes)(const Args&), Args& a) {
  const int64_t n = bytes ? bytes(a) : 0;
  if (n == 0) return std::nullopt;
  Tensor memory = torch::stable::new_empty(like, {n}, ScalarType::Byte);
  a.workspace = memory.mutable_data_ptr();
  return memory;
}

template <class Guard>
std::tuple<Tensor, Tensor> veu_fwd(Tensor q, Tensor k, Ints window, int64_t heads, double scale,
                                   std::optional<Tensor> mask) {
  const Guard guard(q);
  q = torch::stable::contiguous(q), k = torch::stable::contiguous(k), mask = contiguous(mask);
  Veu a = veu_args(q, k, window, heads, scale, mask);
  Ints v_shape{a.B, a.d}, lse_shape{a.B, a.J};
  for (int64_t i = 0; i < a.d; i++) v_shape.push_back(q.size(2 + i)), lse_shape.push_back(q.size(2 + i));
  Tensor v = torch::stable::new_empty(q, v_shape, acc_dtype(q));
  Tensor lse = torch::stable::new_empty(q, lse_shape, acc_dtype(q));
  a.v = v.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
  if (a.B) kernels().veu_fwd(a);
  return {v, lse};
}

template <class Guard>
std::tuple<Tensor, Tensor> veu_bwd(Tensor grad_v, Tensor q, Tensor k, Tensor v, Tensor lse, Ints window, int64_t heads,
                                   double scale, std::optional<Tensor> mask) {
  const Guard guard(q);
  grad_v = torch::stable::contiguous(grad_v), q = torch::stable::contiguous(q), k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v), lse = torch::stable::contiguous(lse), mask = contiguous(mask);
  Veu a = veu_args(q, k, window, heads, scale, mask);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes()), grad_k = torch::stable::new_empty(k, k.sizes());
  a.v = const_cast<void*>(v.const_data_ptr()), a.lse = const_cast<void*>(lse.const_data_ptr());
  a.grad_v = grad_v.const_data_ptr();
  a.grad_q = grad_q.mutable_data_ptr(), a.grad_k = grad_k.mutable_data_ptr();
  const auto workspace = allocate_workspace(q, kernels().veu_bwd_workspace, a);
  if (a.B) kernels().veu_bwd(a);
  return {grad_q, grad_k};
}

inline Warp warp_args(const Tensor& x, const Tensor& flow, const Ints& stride, bool border) {
  Warp a{};
  a.dtype = dtype_of(x), a.flow_dtype = dtype_of(flow);
  a.B = x.size(0), a.C = x.size(1), a.d = x.dim() - 2;
  copy_axes(x.sizes(), 2, a.d, a.S);
  copy_axes(stride, 0, a.d, a.stride);
  a.border = border;
  a.x = x.const_data_ptr(), a.flow = flow.const_data_ptr();
  return a;
}

template <class Guard>
Tensor warp_fwd(Tensor x, Tensor flow, Ints stride, bool border) {
  const Guard guard(x);
  x = torch::stable::contiguous(x), flow = torch::stable::contiguous(flow);
  Warp a = warp_args(x, flow, stride, border);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  a.y = y.mutable_data_ptr();
  if (a.B) kernels().warp_fwd(a);
  return y;
}

template <class Guard>
std::tuple<Tensor, Tensor> warp_bwd(Tensor grad_y, Tensor x, Tensor flow, Ints stride, bool border,
                                    bool deterministic) {
  const Guard guard(x);
  grad_y = torch::stable::contiguous(grad_y), x = torch::stable::contiguous(x), flow = torch::stable::contiguous(flow);
  Warp a = warp_args(x, flow, stride, border);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes()), grad_flow = torch::stable::new_empty(flow, flow.sizes());
  a.grad_y = grad_y.const_data_ptr();
  a.deterministic = deterministic;
  a.grad_x = grad_x.mutable_data_ptr(), a.grad_flow = grad_flow.mutable_data_ptr();
  const auto workspace = allocate_workspace(x, kernels().warp_bwd_workspace, a);
  if (a.B) kernels().warp_bwd(a);
  return {grad_x, grad_flow};
}

inline Compose compose_args(const Tensor& flow, const Tensor& residual, const Ints& stride) {
  Compose a{};
  a.dtype = dtype_of(residual);
  a.B = residual.size(0), a.d = residual.dim() - 2;
  copy_axes(residual.sizes(), 2, a.d, a.S);
  copy_axes(stride, 0, a.d, a.stride);
  a.flow = flow.const_data_ptr(), a.residual = residual.const_data_ptr();
  return a;
}

template <class Guard>
Tensor compose_fwd(Tensor flow, Tensor residual, Ints stride) {
  const Guard guard(flow);
  flow = torch::stable::contiguous(flow), residual = torch::stable::contiguous(residual);
  Compose a = compose_args(flow, residual, stride);
  Tensor y = torch::stable::new_empty(residual, residual.sizes());
  a.y = y.mutable_data_ptr();
  if (a.B) kernels().compose_fwd(a);
  return y;
}

template <class Guard>
std::tuple<Tensor, Tensor> compose_bwd(Tensor grad_y, Tensor flow, Tensor residual, Ints stride, bool deterministic) {
  const Guard guard(flow);
  grad_y = torch::stable::contiguous(grad_y);
  flow = torch::stable::contiguous(flow), residual = torch::stable::contiguous(residual);
  Compose a = compose_args(flow, residual, stride);
  Tensor grad_flow = torch::stable::new_empty(flow, flow.sizes());
  Tensor grad_residual = torch::stable::new_empty(residual, residual.sizes());
  a.grad_y = grad_y.const_data_ptr();
  a.deterministic = deterministic;
  a.grad_flow = grad_flow.mutable_data_ptr(), a.grad_residual = grad_residual.mutable_data_ptr();
  const auto workspace = allocate_workspace(flow, kernels().compose_bwd_workspace, a);
  if (a.B) kernels().compose_bwd(a);
  return {grad_flow, grad_residual};
}

}  // namespace cover

// Registers the kernels in torch.ops.<ns> for a dispatch key.
#define COVER_REGISTER(ns, key, Guard)                            \
  STABLE_TORCH_LIBRARY_IMPL(ns, key, m) {                         \
    m.impl("veu_fwd", TORCH_BOX(&cover::veu_fwd<Guard>));         \
    m.impl("veu_bwd", TORCH_BOX(&cover::veu_bwd<Guard>));         \
    m.impl("warp_fwd", TORCH_BOX(&cover::warp_fwd<Guard>));       \
    m.impl("warp_bwd", TORCH_BOX(&cover::warp_bwd<Guard>));       \
    m.impl("compose_fwd", TORCH_BOX(&cover::compose_fwd<Guard>)); \
    m.impl("compose_bwd", TORCH_BOX(&cover::compose_bwd<Guard>)); \
  }
