"""python -m cover_kernels: what serves each device here and why, and a self-test of every backend that can.

The self-test compares outputs and gradients with the reference in float64, on images and volumes of a few hundred
voxels. The exit status is 1 where something differs.
"""

import sys

import torch

import cover_kernels
from cover_kernels.backends import devices, serving, use_backend

# rounding (halves accumulate in float32), many times over, of the largest value
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def samples(operator: str, device: str, dtype: torch.dtype):
    """(function of the differentiable tensors, those tensors) in 2D and in 3D."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    # C and N: of CUDA kernels that are compiled for them, the second on tensor cores in float16, and of neither
    for S, C, window in (((13, 18), 8, 5), ((5, 6, 10), 32, 3), ((4, 8), 3, (3, 9))):
        d, coarse = len(S), (*S[:-1], S[-1] // 2)
        stride = (*(1 for _ in S[1:]), 2)
        # eighths: exact in every dtype, and no position is on the border between two cells
        flow = (torch.randint(-16, 16, (2, d, *coarse), generator=generator) / 8 + 1 / 16).to(device, dtype)
        if operator == "veu":
            mask = (torch.rand((2, 1, *S), generator=generator) < 0.8).to(device)
            q, k = normal(2, 2 * C, *S), normal(2, 2 * C, *S)
            yield lambda q, k, window=window, mask=mask: cover_kernels.veu(q, k, window, 2, mask=mask), (q, k)
        elif operator == "warp":
            yield lambda x, u, stride=stride: cover_kernels.warp(x, u, stride), (normal(2, 3, *S), flow)
        else:
            residual = (torch.randint(-16, 16, (2, d, *S), generator=generator) / 8 + 1 / 16).to(device, dtype)
            yield lambda u, w, stride=stride: cover_kernels.compose(u, w, stride), (flow, residual)


def outputs(function, tensors, backend: str) -> list[torch.Tensor]:
    """[output, gradients...] on one backend."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with use_backend(backend):
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum() / 8, leaves)]


def self_test(device: str, backend: str) -> dict[str, float]:
    """Operator -> largest error, in units of what is allowed: at most 1 where all is well."""
    errors = dict.fromkeys(("veu", "warp", "compose"), 0.0)
    for operator in errors:
        for dtype, tolerance in TOLERANCE.items():
            for function, tensors in samples(operator, device, dtype):
                exact = outputs(function, [t.double() for t in tensors], "reference")
                for actual, expected in zip(outputs(function, tensors, backend), exact, strict=True):
                    error = (actual - expected).abs().max() / (tolerance * expected.abs().max())
                    errors[operator] = max(errors[operator], error.nan_to_num(torch.inf).item())
    return errors


def main() -> int:
    info = cover_kernels.backend_info()
    print(f"cover_kernels {cover_kernels.__version__}, torch {torch.__version__}")
    for device in devices():
        print(f"{device}: {info[device]['backend']} ({info[device]['reason']})")
    for name, target in info["compiled"].items():
        used = any(name in serving(device) for device in devices())
        print(f"backend {name}: {target}{'' if used else '; it serves no device here'}")
    failed = False
    for device in devices():
        for backend in serving(device):
            if backend == "reference":
                continue
            try:
                errors = self_test(device, backend)
            except Exception as error:  # whatever it is, the other backends are to be tested too
                failed = True
                print(f"self-test of {backend} on {device}: FAILED: {type(error).__name__}: {error}")
                continue
            failed |= any(error > 1 for error in errors.values())
            verdicts = (f"{o} {'passed' if e <= 1 else f'FAILED, {e:.1f} times the bound'}" for o, e in errors.items())
            print(f"self-test of {backend} on {device}: {', '.join(verdicts)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
