"""What a stopped run needs to go on, in one safetensors file that is replaced atomically.

Holds the server's public state and, in simulation, what the sites would keep to themselves: optimiser states and their
own parts of the adapter (derived from noised gradients only) and fingerprints of their records. It goes when the run
has ended.

It never holds a secret root: a resumed run draws new noise, which the accounting allows since every round is released
once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from fedlora.adapters.dam import Selection, UpdateProducts
from fedlora.adapters.slots import Slot
from fedlora.errors import RunFolderError
from fedlora.federation.module_scores import SearchState
from fedlora.federation.server import ServerState
from fedlora.federation.site import Site

FORMAT = "fedlora-checkpoint-4"


def save_checkpoint(path: Path, state: ServerState, sites: Sequence[Site]) -> None:
    """Write `state` and the sites' optimiser states to `path`; a kill leaves the old file or the new one, whole."""
    tensors: dict[str, Tensor] = {"theta": state.theta}
    if state.head is not None:
        tensors["head/weight"], tensors["head/bias"] = (tensor.cpu() for tensor in state.head)
    if state.folded is not None:
        tensors["folded"] = state.folded
    tensors |= {f"server/{key}": value for key, value in state.optimizer_state.items()}
    for site in sites:
        for key, value in (site.optimizer_state or {}).items():
            if value is not None:
                tensors[f"site/{site.client}/{key}"] = torch.as_tensor(value).cpu()
        if site.kept is not None:
            tensors[f"kept/{site.client}"] = site.kept
    tensors |= _search_tensors(state.search)
    facts: dict[str, Any] = {
        "run_id": state.run_id,
        "next_round": state.next_round,
        "facts": {str(client): known for client, known in state.facts.items()},
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "rounds_done": state.rounds_done,
        "last_report": state.last_report,
        "search": _search_facts(state.search),
        "told": [site.client for site in sites if site.mask is not None],
        "fingerprints": {str(site.client): site.fingerprint for site in sites},
    }
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    save_file(contiguous, partial, metadata={"format": FORMAT, "state": text, "sha256": _checksum(contiguous, text)})
    partial.replace(path)


def load_checkpoint(path: Path, sites: Sequence[Site]) -> ServerState:
    """The state saved at `path`; puts the sites' optimiser states and round counts back in place.

    Raises:
        RunFolderError: the file is missing, broken or of another format, or a site's records are not those of then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("format") != FORMAT:
            raise RunFolderError(f"{path} has format {metadata.get('format')}, wanted {FORMAT}; start the run anew")
        if metadata["sha256"] != _checksum(tensors, metadata["state"]):
            raise ValueError("contents do not match their checksum")
        facts = json.loads(metadata["state"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(f"cannot resume from {path}: it is missing or broken; start the run anew") from error
    for site in sites:
        if site.fingerprint != facts["fingerprints"].get(str(site.client), site.fingerprint):
            raise RunFolderError(
                f"cannot resume from {path}: the records of client {site.client} have changed since; start the run anew"
            )
        prefix = f"site/{site.client}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        site.optimizer_state, site.kept = own or None, tensors.get(f"kept/{site.client}")
        site.next_round = facts["next_round"]
    search = _read_search(facts["search"], tensors)
    chosen = None if search.selection is None else search.selection.mask.chosen
    for site in sites:  # one that was not told yet drops its optimiser's state when it is
        site.mask = chosen if site.client in facts["told"] else None
    return ServerState(
        run_id=facts["run_id"],
        theta=tensors["theta"],
        head=(tensors["head/weight"], tensors["head/bias"]) if "head/weight" in tensors else None,
        folded=tensors.get("folded"),
        optimizer_state={
            name.removeprefix("server/"): tensor for name, tensor in tensors.items() if name.startswith("server/")
        },
        next_round=facts["next_round"],
        facts={int(client): known for client, known in facts["facts"].items()},
        bytes_up=facts["bytes_up"],
        bytes_down=facts["bytes_down"],
        rounds_done=facts["rounds_done"],
        last_report=facts["last_report"],
        search=search,
    )


def _search_tensors(search: SearchState) -> dict[str, Tensor]:
    found = {"scores": search.scores, "gates": search.gates}
    if search.products is not None:
        found |= {"products/total": search.products.total, "products/squares": search.products.squares}
    return {f"search/{name}": tensor.cpu() for name, tensor in found.items() if tensor is not None}


def _search_facts(search: SearchState) -> dict[str, Any]:
    products, selection = search.products, search.selection
    return {
        "selection": None if selection is None else selection.to_json(),
        "scored": search.scored,
        "count": None if products is None else products.count,
        "slots": [] if products is None else [[slot.name, slot.shape, slot.offset] for slot in products.slots],
    }


def _read_search(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SearchState:
    products = selection = None
    if facts["selection"] is not None:
        selection = Selection.from_json(facts["selection"])
    if facts["count"] is not None:
        products = UpdateProducts(
            slots=tuple(Slot(name, tuple(shape), offset) for name, shape, offset in facts["slots"]),
            count=facts["count"],
            total=tensors["search/products/total"],
            squares=tensors["search/products/squares"],
        )
    return SearchState(
        products=products,
        scores=tensors.get("search/scores"),
        scored=facts["scored"],
        gates=tensors.get("search/gates"),
        selection=selection,
    )


def _checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """A flipped bit in `next_round` would repeat rounds that are spent, so damage must not pass for a state."""
    return hashlib.sha256(save(dict(tensors)) + state.encode()).hexdigest()
