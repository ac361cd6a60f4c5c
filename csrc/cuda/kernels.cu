// The table of the CUDA kernels.
#include "kernels.cuh"

namespace cover {

const Kernels& kernels() {
  static const Kernels table = {
      "cuda",
      cuda::veu_fwd,
      cuda::veu_bwd,
      cuda::warp_fwd,
      cuda::warp_bwd,
      cuda::compose_fwd,
      cuda::compose_bwd,
      cuda::veu_bwd_workspace,
      cuda::warp_bwd_workspace,
      cuda::compose_bwd_workspace,
      0,
  };
  return table;
}

}  // namespace cover
