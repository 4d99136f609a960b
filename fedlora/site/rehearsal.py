"""What the largest run that a policy allows would need of this machine, tried out on public texts."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import numpy as np
import torch

from fedlora.config import RunConfig
from fedlora.data.encode import encode
from fedlora.data.glue import Records
from fedlora.data.public_texts import public_records
from fedlora.engine.batching import fixed_shapes
from fedlora.engine.execution import choose_execution, find_device
from fedlora.errors import ConfigError, FedloraError, ModelError, PrivacyError
from fedlora.federation.shelf import Shelf
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.policy import SitePolicy
from fedlora.randomness import PublicSeed
from fedlora.site.finding import Finding, bad, good

_TEXTS = 8
_SEARCHES = {"warmup", "alignment", "bilevel"}


def largest_run(policy: SitePolicy, model: str, task: str) -> RunConfig:
    """The run that takes most memory among those that the policy allows, in float32, which every device has.

    A search for modules adapts all of them at first.
    """
    return RunConfig.from_mapping(
        {
            "model": {
                "name": model,
                "dtype": "float32",
                "attention": "eager",
                "head": "frozen" if task == "stsb" else "prototype",
            },
            "adapter": {
                "rank": policy.limits.largest_rank,
                "select": "warmup" if _SEARCHES & set(policy.allow.phases) else "none",
            },
            "data": {"task": task, "max_length": policy.limits.longest_input},
        }
    )


def check_device(policy: SitePolicy) -> Finding:
    """Whether the device that the policy names is there."""
    check, asked = "device", policy.site.device
    try:
        device = find_device(asked)
    except ConfigError:
        return bad(check, f"site.device = {asked} is not there", "use auto or cpu, or see to the driver: nvidia-smi")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return good(check, f"{asked}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return good(check, f"{asked}: {device}, {torch.get_num_threads()} threads, {memory / 1e9:.1f} GB of memory free")


class Rehearsal:
    """Passes public texts through each model and takes one step; remembers how large an adapter was at most."""

    def __init__(self, policy: SitePolicy) -> None:
        self._policy = policy
        self.most_weights: int | None = None
        """Trained numbers of the largest adapter seen; None before any was."""

    def check(self) -> Iterator[Finding]:
        """Every model of the policy on every task of it."""
        for model in self._policy.models:
            for task in sorted({data.task for data in self._policy.data.values()}):
                yield self._try(model, task)

    def _try(self, model: str, task: str) -> Finding:
        check = f"step of {model} on {task}"
        try:
            config = self._policy.localised(largest_run(self._policy, model, task))
            shelf = Shelf()
            _forward(config, shelf)
            workbench = build_workbench(config, shelf)
            self.most_weights = max(self.most_weights or 0, workbench.layout.size)
            rows, columns = _step(workbench)
        except PrivacyError as error:
            return bad(check, str(error), "set site.token_budget = 1, or let another device compute")
        except FedloraError as error:
            return bad(check, str(error), "put the model's files, site.device or the limits right")
        except (RuntimeError, MemoryError) as error:  # torch has no name of its own for a CPU without memory
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            advice = "lower site.token_budget, limits.largest_rank or limits.longest_input"
            return bad(check, f"failed on public texts: {reason}", advice)
        return good(
            check,
            f"{workbench.layout.size} trained numbers at rank {config.adapter.rank}; gradients of {rows} texts of "
            f"{columns} tokens, none of which depends on another; {_memory_used(workbench.execution.device)}",
        )


def _forward(config: RunConfig, shelf: Shelf) -> None:
    """One pass over public texts, before anything is put onto the model.

    Raises:
        ModelError: it cannot be loaded, or gives no numbers.
    """
    execution = choose_execution(config)
    classifier = shelf.classifier(config, execution)
    dataset = encode(_long_texts(config), classifier.tokenizer, config.data.max_length)
    batch, _ = dataset.batch(np.arange(1), execution.device)
    with torch.no_grad():
        logits = classifier(batch)
    if not bool(logits.isfinite().all()):
        raise ModelError("its outputs for public texts are not finite; get a sound copy of the model")


def _step(workbench: Workbench) -> tuple[int, int]:
    """Per-record gradients of public texts as long as they may get; rows and columns of their micro-batch.

    Raises:
        ModelError: they are not finite.
    """
    device, config = workbench.execution.device, workbench.config
    dataset = encode(_long_texts(config), workbench.classifier.tokenizer, config.data.max_length)
    shape = next(fixed_shapes(dataset.lengths, workbench.execution.token_budget, dataset.longest))
    batch, labels = dataset.batch(shape.positions, device, shape=(shape.rows, shape.columns))
    owner = torch.zeros(shape.rows, dtype=torch.int64, device=device)
    parts = workbench.backend.gradients(workbench.initial_theta[None], batch, labels, owner)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise ModelError("its gradients for public texts are not finite; get a sound copy of the model")
    return shape.rows, shape.columns


def _long_texts(config: RunConfig) -> Records:
    records = public_records(config.data.task, "", PublicSeed.from_int(0), count=_TEXTS)
    texts = tuple([" ".join([text] * config.data.max_length) for text in column] for column in records.texts)
    return Records(texts=texts, labels=np.asarray(records.labels))


def _memory_used(device: torch.device) -> str:
    if device.type == "cuda":
        return f"at most {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the device"
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB of memory"
