"""What a site remembers of a run between two messages, as bytes, for transports that may use a new process for each.

Nothing of it leaves the site. It holds no record and no secret: sampling and noise may come from a new secret root in
every process, because no stream is ever used twice.
"""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from fedlora.federation.site import Site

_ROUND, _RUN, _MASK, _KEPT, _OPTIMIZER = "next_round", "run_id", "mask", "kept", "optimizer/"


def remember(site: Site) -> bytes:
    """Its run, which rounds of it are over, which modules were chosen, the optimiser's state and its own part of the
    adapter, where they are kept.
    """
    kept = {key: torch.as_tensor(value) for key, value in (site.optimizer_state or {}).items() if value is not None}
    tensors = {_OPTIMIZER + key: value.cpu().contiguous() for key, value in kept.items()}
    run = torch.tensor(list((site.run_id or "").encode()), dtype=torch.uint8)
    mask = torch.tensor(site.mask or (), dtype=torch.bool)
    if site.kept is not None:
        tensors[_KEPT] = site.kept.contiguous()
    return bytes(save(tensors | {_ROUND: torch.tensor(site.next_round), _RUN: run, _MASK: mask}))


def recall(site: Site, memory: bytes) -> None:
    """Put back what `remember` gave, wherever the site was rebuilt; a round that is over stays over."""
    tensors = load(memory)
    site.next_round = max(site.next_round, int(tensors.pop(_ROUND)))
    run = bytes(tensors.pop(_RUN).tolist()).decode()
    site.run_id = site.run_id or run or None
    told = tuple(tensors.pop(_MASK).tolist())
    site.mask = site.mask or told or None
    site.kept = tensors.pop(_KEPT, None)
    site.optimizer_state = {key.removeprefix(_OPTIMIZER): value for key, value in tensors.items()} or None
