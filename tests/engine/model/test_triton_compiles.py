"""The kernels compile for the GPUs they are meant for: the compiler and the assembler need no GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: install the extra `gpu` or `dev`")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandem.engine.model.kernels import fixed_linear, paged_decode, paged_prefill, rms_norm, tiles

SHARED_MEMORY = 99 * 1024
"""What one block may use on the smallest chips of the Ampere and Ada generations, bytes."""
HEAD_DIM = 128
GROUP = 4
FIXED: dict[str, Any] = {
    "GROUP": GROUP,
    "HEAD_DIM": HEAD_DIM,
    "BLOCK_D": HEAD_DIM,
    "BLOCK_SIZE": 16,
    "MIN_SPLIT": paged_decode.MIN_SPLIT_KEYS,
    "SPLITS": paged_decode.MAX_SPLITS,
    "ALWAYS_MASKED": False,
}
POINTERS = {
    "q": "*bf16",
    "k": "*bf16",
    "v": "*bf16",
    "tables": "*i64",
    "context_lens": "*i64",
    "slices": "*i32",
    "positions": "*i64",
    "partial": "*fp32",
    "partial_lse": "*fp32",
    "out": "*fp32",
    "lse": "*fp32",
}
SCALARS = {
    "scale_log2": "fp32",
    "stride_q": "i32",
    "stride_slot": "i32",
    "stride_table": "i32",
    "num_splits": "i32",
}
ALIGNED = {*POINTERS, "stride_q", "stride_slot"}
DECODE_TILES = paged_decode.decode_tiles(HEAD_DIM, GROUP, torch.bfloat16)
PREFILL_TILES = paged_prefill.prefill_tiles(HEAD_DIM, GROUP, torch.bfloat16)


def compile_for(
    capability: int, kernel: Any, values: dict[str, Any], types: dict[str, str], aligned: set[str], warps: int
) -> Any:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(i,): values[name] for i, name in enumerate(names) if name in values},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": warps, "num_stages": tiles.PIPELINE_STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert len(compiled.asm["cubin"]) > 0
    return compiled


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "sizes", "window"),
    [
        (paged_decode._decode_kernel, DECODE_TILES, 0),
        (paged_decode._decode_kernel, DECODE_TILES, 4096),
        (paged_decode._merge_kernel, DECODE_TILES, 0),
        (paged_prefill._prefill_kernel, PREFILL_TILES, 0),
        (paged_prefill._prefill_kernel, PREFILL_TILES, 4096),
    ],
    ids=["decode", "decode-window", "merge", "prefill", "prefill-window"],
)
def test_kernel_compiles_within_the_limits_of_the_gpu(
    kernel: Any,
    sizes: tiles.Tiles,
    window: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    values = {**FIXED, "WINDOW": window, "BLOCK_M": sizes.rows, "BLOCK_N": sizes.keys}
    compiled = compile_for(capability, kernel, values, {**POINTERS, **SCALARS}, ALIGNED, sizes.warps)
    if kernel is not paged_decode._merge_kernel:
        assert "cp.async" in compiled.asm["ptx"], "K and V must be loaded ahead of their use"
        assert "mma" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_layers_of_batch_invariant_compile_within_the_limits_of_the_gpu(
    element: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("x", "weight", "bias", "residual", "out"), f"*{element}")
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    fixed = {
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "BLOCK_M": fixed_linear.BLOCK_M,
        "BLOCK_N": fixed_linear.BLOCK_N,
        "BLOCK_K": fixed_linear.input_tile(dtype),
    }
    types = {**pointers, **dict.fromkeys(("rows", "inputs", "outputs"), "i32")}
    aligned = {*pointers, "inputs", "outputs"}
    compiled = compile_for(capability, fixed_linear._linear_kernel, fixed, types, aligned, fixed_linear.WARPS)
    assert ("mma" in compiled.asm["ptx"]) == (element == "bf16")
    types = {**pointers, "weight": "*fp32", "eps": "fp32", "size": "i32", "weights": "i32"}
    compile_for(capability, rms_norm._rms_norm_kernel, {"BLOCK": 4096}, types, {*pointers, "size"}, rms_norm.WARPS)
