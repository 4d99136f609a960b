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


def factors_of(records: int, *, common: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A and B of each record, or the same for all of them, as for the records of a single client."""
    found = {}
    for factor, shape in {"B": (OUTPUTS, RANK), "A": (RANK, INPUTS)}.items():
        one = factor in common
        value = made(1 if one else records, *shape, seed=1 + ord(factor), dtype=dtype)
        found[factor] = value.expand(records, -1, -1) if one else value
    return found


def derivatives(kind: type[ExpandedLoraLinear], base: nn.Linear, x: Tensor, factors: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients of input and factors, under a sum with random weights."""
    module, x = kind(base, {}, 1.7), x.clone().requires_grad_()
    module.expanded = {name: value.detach().requires_grad_() for name, value in factors.items()}
    leaves = [*module.expanded.values()]
    output = module(x)
    weights = made(*output.shape, seed=2).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [x, *leaves])]


@pytest.mark.parametrize("shape", [(4, 3, INPUTS), (4, INPUTS), (4, 2, 3, INPUTS)])
@pytest.mark.parametrize("common", [(), ("A",), ("B",), ("A", "B")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_it_is_what_torch_would_do(
    shape: tuple[int, ...], common: tuple[str, ...], bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype).requires_grad_(False)
    x, factors = made(*shape, seed=4).to(dtype), factors_of(4, common=common, dtype=dtype)
    ours, torchs = (derivatives(kind, base, x, factors) for kind in (ExpandedLoraLinear, PlainLoraLinear))
    for found, wanted in zip(ours, torchs, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        scale = wanted.abs().max().item()
        assert (found - wanted).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("trained", ["A", "B"])
def test_what_is_not_trained_gets_no_gradient_and_changes_no_other(trained: str) -> None:
    base = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    x, factors = made(4, 3, INPUTS, seed=4), factors_of(4, common=())
    both = derivatives(ExpandedLoraLinear, base, x, factors)
    frozen = {name: value for name, value in factors.items() if name != trained}
    module = ExpandedLoraLinear(base, {}, 1.7)
    leaf = factors[trained].detach().requires_grad_()
    module.expanded = frozen | {trained: leaf}
    output = module(x)
    (alone,) = torch.autograd.grad((output * made(*output.shape, seed=2)).sum(), [leaf])
    assert torch.equal(alone, both[2 + [*factors].index(trained)])


def test_numerical_derivatives() -> None:
    """Not of a common factor: there the gradient is each record's own by design, and no derivative of one leaf."""
    factors = factors_of(3, common=(), dtype=torch.float64)
    x = made(3, 2, INPUTS, dtype=torch.float64).requires_grad_()
    weight, bias = (made(*shape, seed=5, dtype=torch.float64) for shape in ((OUTPUTS, INPUTS), (OUTPUTS,)))

    def output(x: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        found: Tensor = LoraFunction.apply(x, outer, inner, weight, bias, 0.3)[0]  # type: ignore[no-untyped-call]
        return found

    assert torch.autograd.gradcheck(output, (x, factors["B"].requires_grad_(), factors["A"].requires_grad_()))
