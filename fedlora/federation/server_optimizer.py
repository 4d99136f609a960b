"""What the server makes of the aggregated move: takes it, or remembers earlier ones too.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2: the opposite of a move is used as a gradient. All of
it is computed from noised vectors, so it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fedlora.config.sections import FederationConfig
from fedlora.errors import AdapterError
from fedlora.federation.messages import LARGEST_VALUE

SECOND_MOMENT_DECAY = 0.99
"""β₂ of adam and yogi, as Reddi et al. have it."""
ADAPTIVITY = 1e-3
"""τ of adam and yogi, as Reddi et al. have it: moves of much less than that in a coordinate are not magnified."""

_REMEMBERED = {
    "none": (),
    "momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "yogi": ("exp_avg", "exp_avg_sq"),
}
"""What each rule keeps for a coordinate, under torch's names; zero at first."""
_AGE = "age"
"""How many rounds have moved a coordinate."""


class ServerOptimizer:
    """`federation.server_optimizer`: momentum and adam are torch's SGD and Adam, with bias correction.

    Where a round moves a part of the vector, only that part is stepped, and its bias is corrected for the rounds that
    have moved it.
    """

    def __init__(self, config: FederationConfig) -> None:
        self._rule = config.server_optimizer
        rate, momentum = config.server_rate, config.server_momentum
        betas = (momentum, SECOND_MOMENT_DECAY)
        self._make = {
            "none": None,
            "momentum": partial(torch.optim.SGD, lr=rate, momentum=momentum),
            "adam": partial(torch.optim.Adam, lr=rate, betas=betas, eps=ADAPTIVITY),
            "yogi": partial(_Yogi, lr=rate, betas=betas, eps=ADAPTIVITY),
        }[self._rule]
        self._state: dict[str, Tensor] = {}

    def step(self, start: Tensor, reached: Tensor, moved: Tensor | None = None) -> Tensor:
        """The new global vector, [P] float32.

        Args:
            start: what the round started from, [P].
            reached: what the clients' vectors were aggregated to, [P]; with `none`, its very bits are returned.
            moved: which coordinates this round trains, [P] bool; None: all. The others keep their value and what is
                remembered of them.

        Raises:
            AdapterError: what is remembered belongs to a vector of another size.
        """
        moved = torch.ones_like(start, dtype=torch.bool) if moved is None else moved
        if self._make is None:
            return torch.where(moved, reached, start)
        self._fit(len(start))
        new, ages = start.clone(), self._state[_AGE]
        for age in ages[moved].unique():  # a few at most: as many as there are parts that take turns
            part = moved & (ages == age)
            parameter = nn.Parameter(start[part])
            parameter.grad = (start - reached)[part]
            optimizer = self._make([parameter])
            known = {name: self._state[name][part] for name in _REMEMBERED[self._rule]}
            optimizer.state[parameter] = {"step": age.clone(), **known}
            optimizer.step()
            new[part] = parameter.detach().clamp(-LARGEST_VALUE, LARGEST_VALUE)  # a larger one no site would take
            for name in known:
                self._state[name][part] = optimizer.state[parameter][name]
        self._state[_AGE] = ages + moved
        return new

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, a copy: by name, [P] float32 each; nothing before the first step."""
        return {name: value.clone() for name, value in self._state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` once returned, with the very bits; from nothing: as new.

        Raises:
            AdapterError: it is another rule's.
        """
        wanted = {_AGE, *_REMEMBERED[self._rule]} if self._make else set()
        if state and state.keys() != wanted:
            raise AdapterError(
                f"a state of the server's optimiser has {', '.join(sorted(state))}, but federation.server_optimizer = "
                f"{self._rule} keeps {', '.join(sorted(wanted)) or 'none'}; go on with the settings it was made with"
            )
        self._state = {name: value.clone() for name, value in state.items()}

    def _fit(self, size: int) -> None:
        if not self._state:
            self._state = {name: torch.zeros(size) for name in (_AGE, *_REMEMBERED[self._rule])}
        if len(self._state[_AGE]) != size:
            raise AdapterError(
                f"the server's optimiser remembers {len(self._state[_AGE])} coordinates and is given {size}; "
                "where the layout changes, it starts anew"
            )


class _Yogi(torch.optim.Optimizer):
    """Zaheer et al. 2018 as in Reddi et al. 2021, algorithm 2: v changes by no more than (1 - β₂) g², either way.

    Neither corrects a bias. v starts at 0 rather than at τ², as in Flower's FedYogi: τ is in the divisor anyway.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        (parameter,), (first, second) = group["params"], group["betas"]
        gradient, known = parameter.grad, self.state[parameter]
        square = gradient.square()
        known["exp_avg"].lerp_(gradient, 1 - first)
        known["exp_avg_sq"].sub_((1 - second) * square * torch.sign(known["exp_avg_sq"] - square))
        parameter.addcdiv_(known["exp_avg"], known["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])
