// csrc/kernels.h for numpy: what csrc/binding.h is for torch, without any check. bfloat16 arrives as uint16, so the
// type of the tensors is an argument. Outputs and workspaces start as NaN.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/cuda/host.h"
#include "csrc/cuda/types.cuh"
#include "csrc/kernels.h"

namespace py = pybind11;
using py::array;
using Ints = std::vector<int64_t>;
using cover::Compose;
using cover::Dtype;
using cover::Veu;
using cover::Warp;

static int64_t block_limit = 0x7fffffff;

namespace cover {
namespace cuda {
cudaStream_t current_stream() {
  return nullptr;
}
int64_t max_blocks() {
  return block_limit;
}
}  // namespace cuda
}  // namespace cover

static Dtype dtype_of(const std::string& name) {
  if (name == "float64") return Dtype::f64;
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::f16;
  throw py::value_error("no such dtype: " + name);
}

static py::dtype storage(Dtype dtype) {
  return py::dtype(dtype == Dtype::f64 ? "f8" : dtype == Dtype::f32 ? "f4" : "u2");
}

static Dtype acc(Dtype dtype) {
  return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
}

// All bits set: NaN in every type.
static array empty(Dtype dtype, const Ints& shape) {
  array a(storage(dtype), shape);
  std::memset(a.mutable_data(), 0xff, a.nbytes());
  return a;
}

static Ints shape_of(const array& a) {
  return {a.shape(), a.shape() + a.ndim()};
}

// Runs a backward with the memory that it asks for, and not a byte more.
template <class Arguments>
static void run_bwd(Arguments& a, int64_t (*bytes)(const Arguments&), void (*bwd)(const Arguments&)) {
  std::unique_ptr<void, void (*)(void*)> workspace(nullptr, std::free);
  if (const int64_t size = bytes ? bytes(a) : 0) {
    workspace.reset(aligned_alloc(16, (size + 15) / 16 * 16));
    std::memset(workspace.get(), 0xff, size);
  }
  a.workspace = workspace.get();
  bwd(a);
}

// One value per spatial axis, 1 standing for the missing D in 2D.
static void copy_axes(const Ints& values, int64_t d, int64_t (&out)[3]) {
  out[0] = 1;
  for (int64_t i = 0; i < d; i++) out[3 - d + i] = values[values.size() - d + i];
}

static Veu veu_args(const std::string& dtype, const array& q, const array& k, const Ints& window, int64_t heads,
                    double scale, const std::optional<array>& mask) {
  Veu a{};
  a.dtype = dtype_of(dtype);
  a.B = q.shape(0), a.J = heads, a.C = q.shape(1) / heads, a.d = q.ndim() - 2;
  copy_axes(shape_of(q), a.d, a.S);
  copy_axes(window, a.d, a.N);
  a.scale = scale;
  a.q = q.data(), a.k = k.data();
  a.mask = mask ? static_cast<const bool*>(mask->data()) : nullptr;
  return a;
}

static std::tuple<array, array> veu_fwd(const std::string& dtype, const array& q, const array& k, const Ints& window,
                                        int64_t heads, double scale, const std::optional<array>& mask) {
  Veu a = veu_args(dtype, q, k, window, heads, scale, mask);
  Ints shape = shape_of(q);
  shape[1] = a.d;
  array v = empty(acc(a.dtype), shape);
  shape[1] = a.J;
  array lse = empty(acc(a.dtype), shape);
  a.v = v.mutable_data(), a.lse = lse.mutable_data();
  if (a.B) cover::kernels().veu_fwd(a);
  return {v, lse};
}

static std::tuple<array, array> veu_bwd(const std::string& dtype, const array& grad_v, const array& q, const array& k,
                                        array v, array lse, const Ints& window, int64_t heads, double scale,
                                        const std::optional<array>& mask) {
  Veu a = veu_args(dtype, q, k, window, heads, scale, mask);
  array grad_q = empty(a.dtype, shape_of(q)), grad_k = empty(a.dtype, shape_of(k));
  a.v = v.mutable_data(), a.lse = lse.mutable_data(), a.grad_v = grad_v.data();
  a.grad_q = grad_q.mutable_data(), a.grad_k = grad_k.mutable_data();
  if (a.B) run_bwd(a, cover::kernels().veu_bwd_workspace, cover::kernels().veu_bwd);
  return {grad_q, grad_k};
}

static Warp warp_args(const std::string& dtype, const std::string& flow_dtype, const array& x, const array& flow,
                      const Ints& stride, bool border) {
  Warp a{};
  a.dtype = dtype_of(dtype), a.flow_dtype = dtype_of(flow_dtype);
  a.B = x.shape(0), a.C = x.shape(1), a.d = x.ndim() - 2;
  copy_axes(shape_of(x), a.d, a.S);
  copy_axes(stride, a.d, a.stride);
  a.border = border;
  a.x = x.data(), a.flow = flow.data();
  return a;
}

static array warp_fwd(const std::string& dtype, const std::string& flow_dtype, const array& x, const array& flow,
                      const Ints& stride, bool border) {
  Warp a = warp_args(dtype, flow_dtype, x, flow, stride, border);
  array y = empty(a.dtype, shape_of(x));
  a.y = y.mutable_data();
  if (a.B) cover::kernels().warp_fwd(a);
  return y;
}

static std::tuple<array, array> warp_bwd(const std::string& dtype, const std::string& flow_dtype, const array& grad_y,
                                         const array& x, const array& flow, const Ints& stride, bool border,
                                         bool deterministic) {
  Warp a = warp_args(dtype, flow_dtype, x, flow, stride, border);
  array grad_x = empty(a.dtype, shape_of(x)), grad_flow = empty(a.flow_dtype, shape_of(flow));
  a.grad_y = grad_y.data(), a.deterministic = deterministic;
  a.grad_x = grad_x.mutable_data(), a.grad_flow = grad_flow.mutable_data();
  if (a.B) run_bwd(a, cover::kernels().warp_bwd_workspace, cover::kernels().warp_bwd);
  return {grad_x, grad_flow};
}

static Compose compose_args(const std::string& dtype, const array& flow, const array& residual, const Ints& stride) {
  Compose a{};
  a.dtype = dtype_of(dtype);
  a.B = residual.shape(0), a.d = residual.ndim() - 2;
  copy_axes(shape_of(residual), a.d, a.S);
  copy_axes(stride, a.d, a.stride);
  a.flow = flow.data(), a.residual = residual.data();
  return a;
}

static array compose_fwd(const std::string& dtype, const array& flow, const array& residual, const Ints& stride) {
  Compose a = compose_args(dtype, flow, residual, stride);
  array y = empty(a.dtype, shape_of(residual));
  a.y = y.mutable_data();
  if (a.B) cover::kernels().compose_fwd(a);
  return y;
}

static std::tuple<array, array> compose_bwd(const std::string& dtype, const array& grad_y, const array& flow,
                                            const array& residual, const Ints& stride, bool deterministic) {
  Compose a = compose_args(dtype, flow, residual, stride);
  array grad_flow = empty(a.dtype, shape_of(flow)), grad_residual = empty(a.dtype, shape_of(residual));
  a.grad_y = grad_y.data(), a.deterministic = deterministic;
  a.grad_flow = grad_flow.mutable_data(), a.grad_residual = grad_residual.mutable_data();
  if (a.B) run_bwd(a, cover::kernels().compose_bwd_workspace, cover::kernels().compose_bwd);
  return {grad_flow, grad_residual};
}

PYBIND11_MODULE(kernels_on_cpu, m) {
  m.def("veu_fwd", &veu_fwd);
  m.def("veu_bwd", &veu_bwd);
  m.def("warp_fwd", &warp_fwd);
  m.def("warp_bwd", &warp_bwd);
  m.def("compose_fwd", &compose_fwd);
  m.def("compose_bwd", &compose_bwd);
  // blocks of a launch along x, bytes of a block's shared memory, and the architecture, such as 90
  m.def("set_device", [](int64_t blocks, size_t shared, int architecture) {
    block_limit = blocks;
    cuda_on_cpu::set_shared_limit(shared);
    cuda_on_cpu::set_architecture(architecture);
  });
  m.def("to_bits", [](const std::string& dtype, py::array_t<float> values) {
    array bits(storage(dtype_of(dtype)), shape_of(values));
    uint16_t* out = static_cast<uint16_t*>(bits.mutable_data());
    for (py::ssize_t i = 0; i < values.size(); i++)
      dtype == "float16" ? cover::cuda::store(reinterpret_cast<__half*>(out + i), values.data()[i])
                         : cover::cuda::store(reinterpret_cast<__nv_bfloat16*>(out + i), values.data()[i]);
    return bits;
  });
  m.def("from_bits", [](const std::string& dtype, py::array_t<uint16_t> bits) {
    py::array_t<float> values(shape_of(bits));
    for (py::ssize_t i = 0; i < bits.size(); i++)
      values.mutable_data()[i] = dtype == "float16"
                                     ? cover::cuda::load(reinterpret_cast<const __half*>(bits.data() + i))
                                     : cover::cuda::load(reinterpret_cast<const __nv_bfloat16*>(bits.data() + i));
    return values;
  });
  m.def("set_schedule", [](const std::string& name, unsigned seed) {
    using cuda_on_cpu::Schedule;
    cuda_on_cpu::set_schedule(name == "forward"   ? Schedule::forward
                              : name == "reverse" ? Schedule::reverse
                                                  : Schedule::random,
                              seed);
  });
}
