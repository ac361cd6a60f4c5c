"""Every operator of the library with its schema: the table of contents of `torch.ops.cover_kernels`.

Shape legend: B batch, J vector groups (heads), C channels of one group, d spatial dimensions (2 or 3),
S spatial shape ((H, W) or (D, H, W)), N window width per axis. `acc` is the accumulation type: float64 for
float64 inputs, float32 for every other. A forward and its backward are two operators, and all that is saved
between them is an input or an output of the forward, so any backend's forward pairs with any backend's backward.
"""

SCHEMAS = {
    # q, k [B, J*C, *S]; mask bool [B, 1, *S] -> v [B, d, *S] acc, lse [B, J, *S] acc (-inf: no valid key)
    "veu_fwd": "(Tensor q, Tensor k, int[] window, int heads, float scale, Tensor? mask) -> (Tensor v, Tensor lse)",
    # grad_v, v [B, d, *S] acc -> grad_q, grad_k [B, J*C, *S]
    "veu_bwd": "(Tensor grad_v, Tensor q, Tensor k, Tensor v, Tensor lse, int[] window, int heads, float scale, "
    "Tensor? mask) -> (Tensor grad_q, Tensor grad_k)",
    # x [B, C, *S], flow [B, d, *(S / stride)] -> y [B, C, *S], in memory as `channels_last` says
    "warp_fwd": "(Tensor x, Tensor flow, int[] stride, bool border, bool channels_last) -> Tensor y",
    # deterministic: the same bits in every run; grad_y [B, C, *S] -> grad_x [B, C, *S], grad_flow [B, d, *(S / stride)]
    "warp_bwd": "(Tensor grad_y, Tensor x, Tensor flow, int[] stride, bool border, bool deterministic, "
    "bool channels_last) -> (Tensor grad_x, Tensor grad_flow)",
    # flow [B, d, *(S / stride)], residual [B, d, *S] -> y [B, d, *S]
    "compose_fwd": "(Tensor flow, Tensor residual, int[] stride) -> Tensor y",
    # grad_y [B, d, *S] -> grad_flow [B, d, *(S / stride)], grad_residual [B, d, *S]
    "compose_bwd": "(Tensor grad_y, Tensor flow, Tensor residual, int[] stride, bool deterministic) -> "
    "(Tensor grad_flow, Tensor grad_residual)",
}
