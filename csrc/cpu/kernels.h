// The CPU kernels as the host sees them: plain pointers and sizes, no torch.
//
// Shape legend (docs/derivations.md): B batch, J vector groups (heads), C channels of one group, d spatial
// dimensions, S = (D, H, W) spatial shape, N window width, r = (N - 1) / 2. A 2D problem is a 3D one with D = 1 and
// a window of 1 along D. All tensors are contiguous. `acc` is the accumulation type: double for double, else float.
#pragma once

#include <cstdint>

namespace cover {

enum class Dtype { f64, f32, bf16, f16 };

// Runs body(begin, end, context) over disjoint ranges that cover [0, n), on the host's threads.
// The host defines it: the torch binding with at::parallel_for, a test harness with a plain loop.
void parallel_for(int64_t n, void (*body)(int64_t begin, int64_t end, const void* context), const void* context);

template <class F>
void parallel_for(int64_t n, const F& f) {
  parallel_for(
      n, [](int64_t begin, int64_t end, const void* context) { (*static_cast<const F*>(context))(begin, end); },
      static_cast<const void*>(&f));
}

struct Veu {
  Dtype dtype;  // of q, k and their gradients
  int64_t B, J, C, d;
  int64_t S[3], N[3];
  double scale;
  const void* q;       // [B, J*C, *S]
  const void* k;       // [B, J*C, *S]
  const bool* mask;    // [B, 1, *S] or null
  void* v;             // [B, d, *S] acc, read by the backward
  void* lse;           // [B, J, *S] acc, read by the backward
  const void* grad_v;  // [B, d, *S] acc      backward only, as are the two below
  void* grad_q;        // [B, J*C, *S]
  void* grad_k;        // [B, J*C, *S]
};

struct Warp {
  Dtype dtype, flow_dtype;  // flow_dtype: that of x or acc
  int64_t B, C, d;
  int64_t S[3], stride[3];  // stride 1 along D in 2D
  bool border;              // padding: clamp at the border instead of zeros
  const void* x;            // [B, C, *S]
  const void* flow;         // [B, d, *(S / stride)]
  void* y;                  // [B, C, *S]
  const void* grad_y;       // [B, C, *S]     backward only, as are the two below
  void* grad_x;             // [B, C, *S]
  void* grad_flow;          // [B, d, *(S / stride)]
};

struct Compose {
  Dtype dtype;
  int64_t B, d;
  int64_t S[3], stride[3];
  const void* flow;      // [B, d, *(S / stride)]
  const void* residual;  // [B, d, *S]
  void* y;               // [B, d, *S]
  const void* grad_y;    // [B, d, *S]     backward only, as are the two below
  void* grad_flow;       // [B, d, *(S / stride)]
  void* grad_residual;   // [B, d, *S]
};

// One instruction set's implementation of every operator.
struct Kernels {
  const char* isa;
  void (*veu_fwd)(const Veu&);
  void (*veu_bwd)(const Veu&);
  void (*warp_fwd)(const Warp&);
  void (*warp_bwd)(const Warp&);
  void (*compose_fwd)(const Compose&);
  void (*compose_bwd)(const Compose&);
};

// The widest instruction set that this processor has; COVER_KERNELS_ISA = avx512, avx2 or generic forces one.
// Throws std::runtime_error if the forced one is unknown or beyond this processor.
const Kernels& kernels();

}  // namespace cover
