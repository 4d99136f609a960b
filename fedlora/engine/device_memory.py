"""How much memory a device has left, and how much a computation takes of it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora.errors import ModelError

ADVICE = (
    "lower engine.token_budget, data.max_length or adapter.rank, end what else uses the device, or choose another "
    "(run.device, at a real site site.device)"
)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on `device`; for anything but CUDA the host's memory."""
    if device.type != "cuda":
        return free_host_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, held ready
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def free_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the kernel could give this process without swapping, within the limits of its control groups.

    Args:
        proc: where /proc is mounted.
        cgroups: where control groups are, version 1 or 2.
    """
    return min([_free_of_machine(proc), *_free_in_groups(proc, cgroups)])


def _free_of_machine(proc: Path) -> int:
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux: nobody says what is free


def _free_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What is left in each group that this process belongs to and that has a limit; a parent's holds as well."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, limit, used, cache = cgroups, "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            own = root / path.lstrip("/")  # inside a container it may be called otherwise, and only `root` be there
            for folder in (own, *own.parents[: len(own.parts) - len(root.parts)]):
                with suppress(OSError, ValueError):  # no such folder; or "max", which is no limit
                    files = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    given_back = int(files.get(cache, 0))
                    yield int((folder / limit).read_text()) - int((folder / used).read_text()) + given_back


def peak_bytes(device: torch.device, task: Callable[[], object]) -> int:
    """How many bytes of tensors `task` holds on `device` at most, beyond those that were there before.

    On CUDA torch's allocator says so. Elsewhere it counts nothing, so tensors are counted as operations of this thread
    return them, and torch is told to do with one; what an operation's own code takes for its duration is not seen. The
    resident size of the process would say less: it moves with what the C library keeps of earlier tensors.
    """
    if device.type == "cuda":
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        task()
        return int(torch.cuda.max_memory_allocated(device)) - before
    meter, threads = _Meter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with meter:
            task()
    finally:
        torch.set_num_threads(threads)
    return meter.most


class _Meter(TorchDispatchMode):
    """Follows the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and (address := leaf.untyped_storage().data_ptr()) not in given:
                given.add(address)
                self._follow(leaf.untyped_storage())
        return results

    def _follow(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def exhaustion_named(what: str) -> Iterator[None]:
    """Say what did not fit, and what helps, where an accelerator's memory ends.

    Raises:
        ModelError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        # Not from the error: its frames hold on to tensors.
        raise ModelError(f"{what} does not fit into the device's memory; {ADVICE}") from None
