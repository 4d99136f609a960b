"""A folder for a site without internet: base model, list of packages or the packages themselves, digests, what to do.

OUT/models/<name>/…   what a classifier needs, under the name by which runs ask for it
OUT/wheels.txt        for pip, with OUT/wheels/ where they are packed too
OUT/INSTALL.md        what to do at the site
OUT/SHA256SUMS        for a machine that has no fedlora yet
OUT/manifest.json     size and SHA-256 of every file; written last, so that no half of a bundle passes the check
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

from fedlora.errors import ConfigError, ModelError
from fedlora.models.source import ModelSource, locate_model
from fedlora.provenance import code_digest, file_digest, versions
from fedlora.schema import read_settings
from fedlora.site.distributions import collect_wheels, needed_distributions, version_list

FORMAT = 1
MANIFEST = "manifest.json"
_SUMS, _LIST, _WHEELS, _MODELS = "SHA256SUMS", "wheels.txt", "wheels", "models"
_WITH_WHEELS = f"pip install --no-index --find-links {_WHEELS} --require-hashes --requirement {_LIST}"
_WITHOUT = f"pip install --requirement {_LIST}"
_OFFLINE = "Nothing below asks the internet."
_NO_WHEELS = (
    "No packages are in it: step 2 needs a package index that the site can reach, or a bundle made with --wheels."
)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder that was packed, or that passed the check."""

    folder: Path
    model: str
    """The name by which runs ask for it."""
    model_digest: str
    """As a policy's [models] wants it."""
    digest: str
    """SHA-256 of the manifest, which stands for all the rest."""
    here: tuple[str, ...] = ()
    """What is different on this machine from the one that packed it."""


def pack(model: str, out: Path, *, name: str = "", wheels: bool = False, extras: Sequence[str] = ()) -> Bundle:
    """Pack `model`, with the versions of this environment, into the new folder `out`.

    Args:
        model: folder, installed weights package or hub id, which may be downloaded.
        name: by which runs ask for it; empty: `model`, or of a folder its last part.
        wheels: whether the packages themselves are packed.
        extras: of fedlora, whose packages the site needs as well.

    Raises:
        ConfigError: `out` exists, the name is none, or pip lacks a wheel.
        ModelError: the model is found nowhere.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten; give a new folder")
    source = locate_model(model)
    name = name or _plain_name(model)
    if not _is_inside(name):
        raise ConfigError(f"--name {name!r} is no name of a model; give one such as organisation/model")
    needed = needed_distributions(extras)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        digest = _copy_model(source, scratch / _MODELS / name)
        listed = collect_wheels(needed, scratch / _WHEELS) if wheels else version_list(needed)
        (scratch / _LIST).write_text(listed, encoding="utf-8")
        facts = _facts(name, digest, wheels=wheels)
        (scratch / "INSTALL.md").write_text(_instructions(facts), encoding="utf-8")
        sums = [f"{entry['sha256']}  {path}\n" for path, entry in _contents(scratch).items()]
        (scratch / _SUMS).write_text("".join(sums), encoding="utf-8")
        manifest = json.dumps(facts | {"files": _contents(scratch)}, ensure_ascii=False, indent=1) + "\n"
        (scratch / MANIFEST).write_text(manifest, encoding="utf-8")
        scratch.chmod(0o755)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Bundle(folder=out, model=name, model_digest=digest, digest=file_digest(out / MANIFEST))


def check_bundle(folder: Path) -> Bundle:
    """Look at every file of a bundle.

    Raises:
        ConfigError: there is no whole bundle, or a file is missing, changed or added; all of them are named.
    """
    content = read_settings(
        folder / MANIFEST, "the bundle's manifest", wanted=f"a folder of `fedlora bundle` ({MANIFEST})"
    )
    try:
        manifest = json.loads(content)
        told = {str(path): (str(entry["sha256"]), int(entry["size"])) for path, entry in manifest["files"].items()}
        version, model, model_digest = manifest["format"], manifest["model"]["name"], manifest["model"]["digest"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{folder / MANIFEST} is no manifest of a bundle; pack it again") from error
    if version != FORMAT or not all(map(_is_inside, (*told, model))):
        raise ConfigError(f"{folder / MANIFEST} is no manifest of format {FORMAT}; pack it again")
    problems = _differences(folder, told)
    if not problems and locate_model(str(folder / _MODELS / model)).digest != model_digest:
        problems.append(f"the weights of {model} are not those of the manifest")
    if problems:
        raise ConfigError(f"{folder} is not as it was packed: {'; '.join(problems)}. Copy it again")
    return Bundle(
        folder=folder,
        model=model,
        model_digest=model_digest,
        digest=hashlib.sha256(content).hexdigest(),
        here=tuple(_elsewhere(manifest)),
    )


def _differences(folder: Path, told: Mapping[str, tuple[str, int]]) -> list[str]:
    there = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    del there[MANIFEST]
    changed = [
        path
        for path, (digest, size) in told.items()
        if path in there
        and (not _is_plain(there[path]) or there[path].stat().st_size != size or file_digest(there[path]) != digest)
    ]
    found = {
        "missing": sorted(set(told) - set(there)),
        "changed": sorted(changed),
        "added": sorted(set(there) - set(told)),
    }
    return [f"{what} {', '.join(paths)}" for what, paths in found.items() if paths]


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _elsewhere(manifest: Mapping[str, Any]) -> list[str]:
    """What a person should know who installs it here."""
    ours = _facts("", "", wheels=False)
    return [
        f"{key} here is {ours[key]}, of the bundle {manifest.get(key)}"
        for key in ("fedlora_version", "code_digest", "python", "platform")
        if manifest.get(key) != ours[key]
    ]


def _plain_name(model: str) -> str:
    """A hub id stays; of a path its last part is a name."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        return model
    return Path(model).expanduser().resolve().name


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and path.isprintable()


def _copy_model(source: ModelSource, folder: Path) -> str:
    """Copy what a classifier needs; the digest of the copy.

    Raises:
        ModelError: it is not that of the original.
    """
    for path in source.files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, folder / path)  # of a hub's cache: the file, not the link
    copied = ModelSource("folder", str(folder), folder).digest
    if copied != source.digest:
        raise ModelError(f"the model in {source.folder} changed while it was copied; bundle again")
    return copied


def _facts(model: str, digest: str, *, wheels: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fedlora_version": versions(("fedlora",))["fedlora"],
        "code_digest": code_digest(),
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "wheels": wheels,
        "model": {"name": model, "digest": digest},
    }


def _instructions(facts: Mapping[str, Any]) -> str:
    template = Template(files("fedlora.site").joinpath("install.md").read_text(encoding="utf-8"))
    name, digest = facts["model"]["name"], facts["model"]["digest"]
    return template.substitute(
        fedlora_version=facts["fedlora_version"],
        python=facts["python"],
        python_short=".".join(facts["python"].split(".")[:2]),
        platform=facts["platform"],
        internet=_OFFLINE if facts["wheels"] else _NO_WHEELS,
        install=f"       {_WITH_WHEELS if facts['wheels'] else _WITHOUT}",
        model=name,
        entry=f'"{name}" = "{digest}"',
    )


def _contents(folder: Path) -> dict[str, dict[str, str | int]]:
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
