"""What is free is the least that anyone allows, and what a computation took is what torch's own profiler counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.engine.device_memory import exhaustion_named, free_bytes, free_host_bytes, peak_bytes
from fedlora.errors import ModelError

CPU = torch.device("cpu")
MEBI = 2**20


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """/proc of a machine with 1,000 MiB available, and control groups that know no limit."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 5 kB\nMemAvailable: {1000 * 1024} kB\n")
    (proc / "self" / "cgroup").write_text("0::/\n")
    groups.mkdir()
    return proc, groups


def limit(folder: Path, most: int | str, used: int, cache: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = version == 1
    (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{most}\n")
    (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{'total_' if first else ''}inactive_file {cache}\n")


def test_without_limits_the_machine_says_what_is_free(machine: tuple[Path, Path]) -> None:
    assert free_host_bytes(*machine) == 1000 * MEBI


def test_a_limit_of_the_second_version_leaves_what_is_not_used_and_what_is_cache(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/jobs/one\n")
    limit(groups / "jobs" / "one", 500 * MEBI, 300 * MEBI, 100 * MEBI, version=2)
    limit(groups / "jobs", "max", 300 * MEBI, 0, version=2)
    assert free_host_bytes(*machine) == 300 * MEBI


def test_a_limit_of_a_parent_holds_too(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/jobs/one\n")
    limit(groups / "jobs" / "one", 500 * MEBI, 0, 0, version=2)
    limit(groups / "jobs", 200 * MEBI, 50 * MEBI, 0, version=2)
    assert free_host_bytes(*machine) == 150 * MEBI


def test_a_limit_of_the_first_version_counts_also_where_a_container_sees_only_its_own_group(
    machine: tuple[Path, Path],
) -> None:
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("8:pids:/\n4:memory:/docker/abc\n0::/\n")
    limit(groups / "memory", 400 * MEBI, 150 * MEBI, 50 * MEBI, version=1)
    assert free_host_bytes(*machine) == 300 * MEBI


def test_a_limit_larger_than_the_machine_limits_nothing(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("4:memory:/\n")
    limit(groups / "memory", 2**63 - 4096, 0, 0, version=1)
    assert free_host_bytes(*machine) == 1000 * MEBI


def test_without_proc_there_is_a_number_all_the_same(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path, tmp_path) > MEBI
    assert 0 < free_bytes(CPU) <= free_host_bytes(tmp_path, tmp_path)


def test_the_peak_is_what_was_alive_at_once() -> None:
    before = torch.zeros(1000)

    def task() -> None:
        first = before + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 beside it
        del first
        second.view(2, -1)[0].add_(1)  # a view, in place: nothing
        before.t().mul_(2)  # what was there before is not counted
        (second * 2).sum()  # 8,000 beside 8,000, and then 4

    assert peak_bytes(CPU, task) == 16_004


def test_the_peak_of_a_backward_pass_is_what_the_profiler_counts() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)), torch.nn.GELU())
    inputs = torch.ones(32, 64)

    def task() -> None:
        torch.autograd.grad(layers(inputs).square().sum(), list(layers.parameters()))

    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        task()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    assert peak_bytes(CPU, task) == pytest.approx(int(sizes.cumsum(0).max()), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_gpu_says_what_it_has_and_what_was_taken() -> None:
    device = torch.device("cuda")
    free = free_bytes(device)
    assert peak_bytes(device, lambda: torch.zeros(2**20, device=device) + 1) == 2 * 2**22
    assert 0 < free <= torch.cuda.mem_get_info(device)[1]
    assert free_bytes(device) == pytest.approx(free, abs=2**26), "what torch keeps ready is free"


def test_exhausted_memory_is_an_error_that_helps() -> None:
    with pytest.raises(ModelError, match=r"one client does not fit .*lower engine\.token_budget") as raised:  # noqa: SIM117
        with exhaustion_named("one client"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB for the private")
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
