"""The hand-written derivative of an adapted linear map against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlora.engine.expanded import ExpandedLoraLinear, PlainLoraLinear
from fedlora.engine.lora_function import LoraFunction

RANK, INPUTS, OUTPUTS = 2, 5, 7


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaf_of(records: int, *, common: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """One E per record, or the same one for all of them, as for the records of a single client."""
    if common:
        return made(1, OUTPUTS, RANK, seed=1, dtype=dtype).expand(records, -1, -1)
    return made(records, OUTPUTS, RANK, seed=1, dtype=dtype)


def derivatives(module: ExpandedLoraLinear, x: Tensor, leaf: Tensor) -> list[Tensor]:
    """Output and gradients of input and leaf, under a sum with random weights."""
    leaf, x = leaf.detach().requires_grad_(), x.clone().requires_grad_()
    module.expanded["B"] = leaf
    output = module(x)
    weights = made(*output.shape, seed=2).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [x, leaf])]


@pytest.mark.parametrize("shape", [(4, 3, INPUTS), (4, INPUTS), (4, 2, 3, INPUTS)])
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_it_is_what_torch_would_do(
    shape: tuple[int, ...], common: bool, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype).requires_grad_(False)
    factor, x, leaf = made(RANK, INPUTS, seed=3), made(*shape, seed=4).to(dtype), leaf_of(4, common=common)
    ours, torchs = (derivatives(kind(base, factor, 1.7), x, leaf) for kind in (ExpandedLoraLinear, PlainLoraLinear))
    for found, wanted in zip(ours, torchs, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        scale = wanted.abs().max().item()
        assert (found - wanted).abs().max().item() <= tolerance * scale
    assert ours[2].dtype == torch.float32, "what is clipped is float32 whatever the base is"


def test_numerical_derivatives() -> None:
    """Not of a common leaf: there the gradient is each record's own by design, and no derivative of one leaf."""
    leaf = leaf_of(3, common=False, dtype=torch.float64).requires_grad_()
    x = made(3, 2, INPUTS, dtype=torch.float64).requires_grad_()
    weight, bias, factor = (
        made(*shape, seed=5, dtype=torch.float64) for shape in ((OUTPUTS, INPUTS), (OUTPUTS,), (RANK, INPUTS))
    )

    def output(x: Tensor, leaf: Tensor) -> Tensor:
        found: Tensor = LoraFunction.apply(x, leaf, weight, bias, factor, 0.3)[0]  # type: ignore[no-untyped-call]
        return found

    assert torch.autograd.gradcheck(output, (x, leaf))
