// One instruction set's table of kernels. Each isa_*.cpp includes this once, with COVER_ISA, COVER_BYTES and
// COVER_REGISTERS (how many vector registers there are) defined and the compiler's target set.
#include "simd.h"
#include "veu_tiles.h"
#include "veu_fwd.h"
#include "veu_bwd.h"
#include "tile.h"
#include "sample.h"
#include "warp.h"
#include "compose.h"

namespace cover {
namespace COVER_ISA {

// Calls a kernel with the accumulation type of a storage type.
#define COVER_BY_ACC(kernel, args) (args.dtype == Dtype::f64 ? kernel<double>(args) : kernel<float>(args))

extern const Kernels table;
const Kernels table = {
    COVER_ISA_NAME,
    [](const Veu& a) { COVER_BY_ACC(veu_fwd, a); },
    [](const Veu& a) { COVER_BY_ACC(veu_bwd, a); },
    [](const Warp& a) { warp_fwd(a); },
    [](const Warp& a) { warp_bwd(a); },
    [](const Compose& a) { compose_fwd(a); },
    [](const Compose& a) { compose_bwd(a); },
    nullptr,
    nullptr,
    nullptr,
    kWidth<float>,
};

}  // namespace COVER_ISA
}  // namespace cover
