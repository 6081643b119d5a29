"""The Triton path of `patch_attention` without a GPU: see `test_triton.py`, of `nearest_patch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.offline import check, interpret


def test_in_the_interpreter() -> None:
    interpret("interpreted_attention.py")


# Heads, queries, patches, numbers of a query and of a value: MetaFormer's stages at 224 and 384 pixels, with 1 and 33
# more tokens, sizes 0 and 2; CCT's slots, and as many as there may be.
SMALL, LONG, DEEP = (8, 197, 197, 48, 48), (8, 609, 609, 64, 64), (8, 177, 177, 128, 128)
FEW, SLOTS, MANY = (1, 13, 196, 1024, 1024), (1, 108, 196, 192, 192), (1, 200, 49, 1536, 1536)
SIZES = {
    ("patches", "bfloat16"): [SMALL, LONG, DEEP],
    ("patches", "high"): [SMALL, DEEP],
    ("patches", "highest"): [LONG, DEEP],
    ("queries", "bfloat16"): [FEW, SLOTS, MANY],
    ("queries", "high"): [SLOTS, MANY],
    ("queries", "highest"): [MANY],
}


@pytest.mark.parametrize("normalize, precision", SIZES)
def test_compiles_without_spills(launched: list[Any], normalize: str, precision: str, tmp_path: Path) -> None:
    from fgvczoo.ops.patch_attention import layout
    from fgvczoo.ops.patch_attention import triton as gpu

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "on_cpu", lambda tensor: False)
        torch.set_float32_matmul_precision("highest" if precision == "bfloat16" else precision)
        try:
            for h, queries, patches, depth, width in SIZES[normalize, precision]:
                sizes = ((queries, depth), (patches, depth), (patches, width))
                operands = [torch.empty(1, count, h, columns, dtype=dtype).transpose(1, 2) for count, columns in sizes]
                for bias in (torch.empty(h, queries, patches), *([None] if queries < 200 else [])):
                    results = gpu.forward(*operands, bias, 1.0, normalize, True)
                    arguments = (results[0], *operands, bias, *results, 1.0, normalize, bias is not None)
                    gpu.backward(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)
    check(launched, tmp_path)
