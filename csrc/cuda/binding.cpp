// The CUDA kernels in torch.ops.cover_kernels_cuda, on torch's current stream: the one file here that knows torch.
#include <torch/csrc/stable/accelerator.h>

#include "../binding.h"
#include "host.h"

namespace cover {
namespace cuda {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream() {
  void* stream = nullptr;
  const auto device = torch::stable::accelerator::getCurrentDeviceIndex();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t max_blocks() {
  return 0x7fffffff;
}

struct Guard {
  explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
  const DeviceGuard guard;
};

}  // namespace cuda
}  // namespace cover

// What this library was compiled for, for cover_kernels.backends: "sm_80 sm_90 compute_90".
extern "C" __attribute__((visibility("default"))) const char* cover_kernels_cuda_architectures() {
  return COVER_ARCHITECTURES;
}

COVER_REGISTER(cover_kernels_cuda, CUDA, cover::cuda::Guard)
