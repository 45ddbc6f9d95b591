"""The Triton kernels against plain references; run where there is no GPU in a process of its own.

``TRITON_INTERPRET=1 python -m support.token_kernels interpret`` runs them on the CPU (Triton reads the variable when it
is imported); ``python -m support.token_kernels compile`` compiles them for a GPU that need not be there.
"""

import sys

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64, torch.int64, torch.bool, torch.complex64)
SHAPES = ((3, 9, 5, 4), (2, 7, 300, 7), (1, 3, 9000, 2))


def check_all(device: str) -> None:
    for check in (check_moves, check_sampling):
        check(device)


def check_moves(device: str) -> None:
    from penstock.data_pipeline.random_ltd.kernels import gpu

    torch.manual_seed(0)
    for dtype in DTYPES:
        for batch_first in (True, False):
            for batch, length, width, kept in SHAPES if dtype in FLOATS else SHAPES[:1]:
                order = (lambda b, s: (b, s)) if batch_first else (lambda b, s: (s, b))
                x = (torch.randn(*order(batch, length), 2 * width) * 3).to(dtype).to(device)[..., ::2]
                y = (torch.randn(*order(batch, kept), width) * 3).to(dtype).to(device)
                indices = torch.stack([torch.randperm(length)[:kept] for _ in range(batch)]).int().to(device)
                gathered, merged, cleared, placed, added = _reference(x, y, indices, batch_first)
                assert torch.equal(gpu.gather(x, indices, batch_first), gathered)
                assert torch.equal(gpu.combine(x, y, indices, length, batch_first, False), merged)
                assert torch.equal(gpu.combine(x, None, indices, length, batch_first, False), cleared)
                assert torch.equal(gpu.combine(None, y, indices, length, batch_first, False), placed)
                if dtype != torch.bool:
                    sums = gpu.combine(x, y, indices, length, batch_first, True)
                    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
                    loose = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 0.0, "atol": 0.0}
                    torch.testing.assert_close(sums, added, **loose)


def check_sampling(device: str) -> None:
    from penstock.data_pipeline.random_ltd.sampling import _drawn_on_gpu, keyed_indices

    for seq, kept in ((1, 1), (7, 3), (64, 64), (300, 150)):
        drawn = _drawn_on_gpu(2**64 - 3, [5, 2**40, 0], [4, 1], seq, kept, torch.device(device))
        assert np.array_equal(drawn.cpu().numpy(), keyed_indices(2**64 - 3, [5, 2**40, 0], [4, 1], seq, kept))


def compile_all() -> None:
    """Compile to machine code for an NVIDIA H100; needs Triton's own assembler, no GPU."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from penstock.data_pipeline.random_ltd.kernels import gpu, gpu_sampling

    tile = {"TOKENS": 4, "WIDTH": 1024}
    both = {"HAS_X": True, "HAS_Y": True}
    jobs = [
        (gpu._gather_kernel, {"x": "*i16", "indices": "*i32", "out": "*i16"}, {**tile, "x_word": 1}),
        (
            gpu._combine_kernel,
            {"x": "*i16", "y": "*i16", "inverse": "*i32", "out": "*i16"},
            {**tile, **both, "ADD": False, "SUM_TYPE": tl.int64, "x_word": 1, "y_word": 1},
        ),
        (
            gpu._combine_kernel,
            {"x": "*bf16", "y": "*bf16", "inverse": "*i32", "out": "*bf16"},
            {**tile, **both, "ADD": True, "SUM_TYPE": tl.float32},
        ),
        (gpu_sampling._sample_kernel, {"streams": "*i64", "indices": "*i32"}, {"BLOCK": 2048}),
    ]
    for kernel, pointers, constants in jobs:
        signature = {name: pointers.get(name, "i64") for name in kernel.arg_names}
        signature.update(dict.fromkeys(constants, "constexpr"))
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"debug": bool(kernel.debug)})
        assert len(built.asm["cubin"]) > 0
        assert ("__assertfail" in built.asm["ptx"]) == (kernel is gpu._gather_kernel)


def _reference(x: Tensor, y: Tensor, indices: Tensor, batch_first: bool) -> tuple[Tensor, ...]:
    """Gathered, merged, cleared, placed, added; token by token."""
    if not batch_first:
        return tuple(one.transpose(0, 1) for one in _reference(x.transpose(0, 1), y.transpose(0, 1), indices, True))
    gathered, merged, cleared, added = torch.empty_like(y), x.clone(), x.clone(), x.clone()
    placed = torch.zeros_like(x)
    for row, at in enumerate(indices.tolist()):
        for token, where in enumerate(at):
            gathered[row, token] = x[row, where]
            merged[row, where] = placed[row, where] = y[row, token]
            cleared[row, where] = 0
            added[row, where] = x[row, where] + y[row, token]
    return gathered, merged, cleared, placed, added


if __name__ == "__main__":
    compile_all() if sys.argv[1] == "compile" else check_all("cpu")
