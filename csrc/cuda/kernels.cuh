// The CUDA kernels' entry points: each launches one operator on the current stream of the current device.
#pragma once

#include "../kernels.h"

namespace cover {
namespace cuda {

void veu_fwd(const Veu&);
void veu_bwd(const Veu&);
void warp_fwd(const Warp&);
void warp_bwd(const Warp&);
void compose_fwd(const Compose&);
void compose_bwd(const Compose&);

// Bytes that the backward needs at `workspace`.
int64_t veu_bwd_workspace(const Veu&);
int64_t warp_bwd_workspace(const Warp&);
int64_t compose_bwd_workspace(const Compose&);

}  // namespace cuda
}  // namespace cover
