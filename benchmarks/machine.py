"""Where and with what a figure was measured. Names no host, user or path."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from fedlora.provenance import versions

PACKAGES = ("torch", "transformers", "peft", "opacus", "flwr", "ray", "numpy", "fedlora")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load, versions and date, as they are now."""
    import torch

    model, flags = _cpu()
    card = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": model,
        "cpu_features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "versions": versions(PACKAGES),
    } | card


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes; well above 0 before a start, others share the cores."""
    return [round(value, 2) for value in os.getloadavg()]


def _cpu() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", platform.machine()), set(facts.get("flags", "").split())
