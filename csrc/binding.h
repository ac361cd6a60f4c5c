// A backend's kernels as implementations of cover_kernels/schemas.py, through LibTorch's stable ABI: what all
// backends share.
//
// Python has checked the arguments and named what was wrong; the checks here keep a raw call of the operators inside
// its tensors, as `check_raw` of cover_kernels/checks.py does for other backends, in the same words. Then outputs are
// allocated and sizes are copied out. `Guard` makes the device of a tensor current while it lives. Only the bindings
// know torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace cover {

using torch::headeronly::MemoryFormat;
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

// Fails unless `t` has this shape and dtype, and is where `like` is.
inline void expect(const char* what, const Tensor& t, const Ints& shape, ScalarType dtype, const Tensor& like) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(Ints(sizes.begin(), sizes.end()) == shape, what, " does not have the shape that the others ask for");
  STD_TORCH_CHECK(t.scalar_type() == dtype, what, " does not have the dtype that the others ask for");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), what,
                  " is not on the device of the others");
}

// Fails unless `t` is an image or a volume, and `per_axis` has a number above 0 for each of its axes.
inline void expect_image(const char* op, const Tensor& t, const Ints& per_axis) {
  STD_TORCH_CHECK(t.dim() == 4 || t.dim() == 5, op, ": expected [B, C, *S] with 2 or 3 spatial axes");
  STD_TORCH_CHECK(static_cast<int64_t>(per_axis.size()) == t.dim() - 2, op, ": expected a number for each axis");
  for (int64_t i = 1; i < t.dim(); i++) STD_TORCH_CHECK(t.size(i) > 0, op, ": expected no empty axis");
  for (const int64_t n : per_axis) STD_TORCH_CHECK(n > 0, op, ": expected numbers above 0 for the axes");
}

// [B, channels, *(S / stride)] for an image [B, C, *S].
inline Ints shape_like(const char* op, const Tensor& image, int64_t channels, const Ints& stride = {}) {
  Ints shape{image.size(0), channels};
  for (int64_t i = 0; i < image.dim() - 2; i++) {
    const int64_t s = stride.empty() ? 1 : stride[i];
    STD_TORCH_CHECK(image.size(2 + i) % s == 0, op, ": the stride does not divide the spatial shape");
    shape.push_back(image.size(2 + i) / s);
  }
  return shape;
}

inline Veu veu_args(const Tensor& q, const Tensor& k, const Ints& window, int64_t heads, double scale,
                    const std::optional<Tensor>& mask) {
  expect_image("veu", q, window);
  for (const int64_t n : window) STD_TORCH_CHECK(n % 2 == 1, "veu: expected an odd window");
  STD_TORCH_CHECK(heads > 0 && q.size(1) % heads == 0, "veu: the heads do not divide the channels");
  expect("veu: k", k, shape_like("veu", q, q.size(1)), q.scalar_type(), q);
  if (mask) expect("veu: mask", *mask, shape_like("veu", q, 1), ScalarType::Bool, q);
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
  Tensor v = torch::stable::new_empty(q, shape_like("veu", q, a.d), acc_dtype(q));
  Tensor lse = torch::stable::new_empty(q, shape_like("veu", q, a.J), acc_dtype(q));
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
  expect("veu: grad_v", grad_v, shape_like("veu", q, a.d), acc_dtype(q), q);
  expect("veu: v", v, shape_like("veu", q, a.d), acc_dtype(q), q);
  expect("veu: lse", lse, shape_like("veu", q, a.J), acc_dtype(q), q);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes()), grad_k = torch::stable::new_empty(k, k.sizes());
  a.v = const_cast<void*>(v.const_data_ptr()), a.lse = const_cast<void*>(lse.const_data_ptr());
  a.grad_v = grad_v.const_data_ptr();
  a.grad_q = grad_q.mutable_data_ptr(), a.grad_k = grad_k.mutable_data_ptr();
  const auto workspace = allocate_workspace(q, kernels().veu_bwd_workspace, a);
  if (a.B) kernels().veu_bwd(a);
  return {grad_q, grad_k};
}

// The order in memory of what is of the size of x.
inline MemoryFormat order_of(const Tensor& x, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// Whether the kernels take an image with its channels last as it is; else it is copied.
inline bool takes_channels_last(const Tensor& x) {
  const int64_t channels = kernels().warp_channels_last;
  return channels && x.size(1) % channels == 0;
}

inline Warp warp_args(const Tensor& x, const Tensor& flow, const Ints& stride, bool border) {
  const bool same = flow.scalar_type() == x.scalar_type();
  expect("warp: flow", flow, shape_like("warp", x, x.dim() - 2, stride), same ? x.scalar_type() : acc_dtype(x), x);
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
Tensor warp_fwd(Tensor x, Tensor flow, Ints stride, bool border, bool channels_last) {
  const Guard guard(x);
  expect_image("warp", x, stride);
  const bool as_it_is = channels_last && takes_channels_last(x);
  x = torch::stable::contiguous(x, order_of(x, as_it_is)), flow = torch::stable::contiguous(flow);
  Warp a = warp_args(x, flow, stride, border);
  Tensor y = torch::stable::empty_like(x);
  a.channels_last = as_it_is;
  a.y = y.mutable_data_ptr();
  if (a.B) kernels().warp_fwd(a);
  return torch::stable::contiguous(y, order_of(y, channels_last));
}

template <class Guard>
std::tuple<Tensor, Tensor> warp_bwd(Tensor grad_y, Tensor x, Tensor flow, Ints stride, bool border, bool deterministic,
                                    bool channels_last) {
  const Guard guard(x);
  expect_image("warp", x, stride);
  const bool as_it_is = channels_last && takes_channels_last(x);
  x = torch::stable::contiguous(x, order_of(x, as_it_is)), flow = torch::stable::contiguous(flow);
  Warp a = warp_args(x, flow, stride, border);
  expect("warp: grad_y", grad_y, shape_like("warp", x, a.C), x.scalar_type(), x);
  grad_y = torch::stable::contiguous(grad_y, order_of(x, as_it_is));
  Tensor grad_x = torch::stable::empty_like(x), grad_flow = torch::stable::new_empty(flow, flow.sizes());
  a.channels_last = as_it_is;
  a.grad_y = grad_y.const_data_ptr();
  a.deterministic = deterministic;
  a.grad_x = grad_x.mutable_data_ptr(), a.grad_flow = grad_flow.mutable_data_ptr();
  const auto workspace = allocate_workspace(x, kernels().warp_bwd_workspace, a);
  if (a.B) kernels().warp_bwd(a);
  return {torch::stable::contiguous(grad_x, order_of(x, channels_last)), grad_flow};
}

inline Compose compose_args(const Tensor& flow, const Tensor& residual, const Ints& stride) {
  const int64_t d = residual.dim() - 2;
  expect_image("compose", residual, stride);
  expect("compose: residual", residual, shape_like("compose", residual, d), residual.scalar_type(), residual);
  expect("compose: flow", flow, shape_like("compose", residual, d, stride), residual.scalar_type(), residual);
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
  expect("compose: grad_y", grad_y, shape_like("compose", residual, a.d), residual.scalar_type(), residual);
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
