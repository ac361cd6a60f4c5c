// The operators' arguments, and a backend's table of kernels: plain pointers and sizes, no torch.
//
// Shape legend (docs/derivations.md): B batch, J vector groups (heads), C channels of one group, d spatial
// dimensions, S = (D, H, W) spatial shape, N window width, r = (N - 1) / 2. A 2D problem is a 3D one with D = 1 and
// a window of 1 along D. All tensors are contiguous, but for warp's with their channels last. `acc` is the accumulation
// type: double for double, else float.
#pragma once

#include <cstdint>

namespace cover {

enum class Dtype { f64, f32, bf16, f16 };

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
  void* workspace;     // as many bytes as Kernels::veu_bwd_workspace says, aligned to 16, of any content
};

struct Warp {
  Dtype dtype, flow_dtype;  // flow_dtype: that of x or acc
  int64_t B, C, d;
  int64_t S[3], stride[3];  // stride 1 along D in 2D
  bool border;              // padding: clamp at the border instead of zeros
  bool channels_last;       // x, y and their gradients are [B, *S, C] in memory; only where Kernels says so
  const void* x;            // [B, C, *S]
  const void* flow;         // [B, d, *(S / stride)]
  void* y;                  // [B, C, *S]
  const void* grad_y;       // [B, C, *S]     backward only, as are the two below
  void* grad_x;             // [B, C, *S]
  void* grad_flow;          // [B, d, *(S / stride)]
  bool deterministic;       // the same bits in every run, which the CPU gives anyway
  void* workspace;          // as for Veu
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
  bool deterministic;    // as for Warp
  void* workspace;       // as for Veu
};

// One implementation of every operator: an instruction set of the CPU, or a GPU.
struct Kernels {
  const char* name;
  void (*veu_fwd)(const Veu&);
  void (*veu_bwd)(const Veu&);
  void (*warp_fwd)(const Warp&);
  void (*warp_bwd)(const Warp&);
  void (*compose_fwd)(const Compose&);
  void (*compose_bwd)(const Compose&);
  // Bytes of `workspace` that a backward needs; null: none.
  int64_t (*veu_bwd_workspace)(const Veu&);
  int64_t (*warp_bwd_workspace)(const Warp&);
  int64_t (*compose_bwd_workspace)(const Compose&);
  // warp takes channels last for multiples of this many channels; 0: never.
  int64_t warp_channels_last;
};

// The implementation that serves this machine. Throws std::runtime_error where there is none.
const Kernels& kernels();

}  // namespace cover
