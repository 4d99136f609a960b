"""What is installed for fedlora in this environment, and wheels of the very same versions for one without internet."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from fedlora.errors import ConfigError
from fedlora.provenance import file_digest

_OWN = "fedlora"
_LONGEST_REASON = 400
_SOURCES = ("pyproject.toml", "README.md", "LICENSE")
_LOCAL_FILES = ("/INSTALLER", "/REQUESTED", "/RECORD", "/direct_url.json")
"""Of a dist-info folder: written anew by each installation."""


def needed_distributions(extras: Sequence[str] = ()) -> dict[str, Distribution]:
    """fedlora and all that it needs, by canonical name, as installed here.

    Args:
        extras: of fedlora's own, such as "flower" for a machine that runs the courier too.

    Raises:
        ConfigError: something that is needed is not installed, or there is no such extra.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(_OWN, frozenset(extras))]
    source = own_source()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            here = found[name] = distribution(name)
        except PackageNotFoundError as error:
            raise ConfigError(
                f"{name} is needed and not installed here; pip install {name}, then bundle again"
            ) from error
        waiting += _wanted_by_checkout(source, wanted) if name == _OWN and source else _wanted_by(here, wanted)
    return dict(sorted(found.items()))


def _wanted_by(one: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    return _applying([Requirement(line) for line in one.requires or []], extras)


def _wanted_by_checkout(source: Path, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """As the wheel will say, and not as an editable installation of some time ago says."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    offered = project.get("optional-dependencies", {})
    if unknown := extras - set(offered):
        raise ConfigError(f"fedlora has no extra {', '.join(sorted(unknown))}; it has {', '.join(sorted(offered))}")
    lines = [*project["dependencies"], *(line for extra in extras for line in offered[extra])]
    return _applying([Requirement(line) for line in lines], frozenset())


def _applying(requirements: Iterable[Requirement], extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    return [
        (canonicalize_name(one.name), frozenset(one.extras))
        for one in requirements
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def record_digest(of: Distribution) -> str:
    """SHA-256 over the digests of a distribution's own files, by path: equal wherever the same wheel is installed.

    Without what each installation writes for itself: compiled files, scripts, notes of the installer.
    """
    lines = [
        f"{path},{path.hash.value}\n"
        for path in of.files or []
        if path.hash is not None and ".." not in path.parts and not str(path).endswith((".pyc", *_LOCAL_FILES))
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def version_list(needed: Mapping[str, Distribution]) -> str:
    """For `pip install --requirement`, without hashes of wheels: none are at hand."""
    lines = [
        "# Versions only: no wheels were packed, so pip cannot check hashes. `fedlora bundle --wheels` packs them.",
        "# RECORD: SHA-256 over the digests of the installed files, as they were where this was packed.",
        *(f"{name}=={one.version}  # RECORD sha256:{record_digest(one)}" for name, one in needed.items()),
    ]
    return "\n".join(lines) + "\n"


def collect_wheels(needed: Mapping[str, Distribution], folder: Path) -> str:
    """Put a wheel of each distribution into `folder`, by pip for the running interpreter, with pip's own settings.

    Returns:
        A list for `pip install --require-hashes --requirement`.

    Raises:
        ConfigError: pip does not find one of them.
    """
    folder.mkdir()
    others = [f"{name}=={one.version}" for name, one in needed.items() if name != _OWN]
    _pip_wheel(folder, others)
    with tempfile.TemporaryDirectory() as scratch:
        source = own_source()
        copy = f"{_OWN}=={needed[_OWN].version}" if source is None else str(_clean_copy(source, Path(scratch)))
        _pip_wheel(folder, [copy])
    listed = _hashed_list(needed, folder)
    _rehearse(listed, folder)
    return listed


def _pip_wheel(folder: Path, requirements: Sequence[str]) -> None:
    """Wheels as they are offered, and built where only a source is: at the site nothing has to be built."""
    if requirements:
        _pip(
            ["wheel", "--no-deps", "--wheel-dir", str(folder), *requirements],
            "tell pip where to look, by PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS (versions such as 2.9.0+cpu are on their "
            "publisher's own index), or bundle without --wheels",
        )


def _rehearse(listed: str, folder: Path) -> None:
    """What is missing would be noticed where nobody can fetch it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(listed)
        file.flush()
        options = ["--dry-run", "--ignore-installed", "--no-index", "--find-links", str(folder), "--require-hashes"]
        _pip(["install", *options, "--requirement", file.name], "pip check says what this environment lacks")


def _pip(words: Sequence[str], advice: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.replace("ERROR: ", "").split())
        raise ConfigError(f"pip {words[0]}: {reason[:_LONGEST_REASON]}; {advice}")


def _hashed_list(needed: Mapping[str, Distribution], folder: Path) -> str:
    wheels: dict[tuple[str, Version], Path] = {}
    for path in sorted(folder.glob("*.whl")):
        wheel, version, *_ = parse_wheel_filename(path.name)
        wheels[wheel, version] = path
    lines = []
    for name, one in needed.items():
        path = wheels.get((name, Version(one.version)), folder)
        if path is folder:
            raise ConfigError(f"pip gave no wheel of {name} {one.version}; bundle without --wheels")
        lines += [f"{name}=={one.version} \\", f"    --hash=sha256:{file_digest(path)}"]
    return "\n".join(lines) + "\n"


def own_source() -> Path | None:
    """The checkout that this code is in; None where it was installed from a wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def _clean_copy(source: Path, scratch: Path) -> Path:
    """What the wheel is made of and nothing else: an old build folder would go into it."""
    for name in _SOURCES:
        shutil.copy(source / name, scratch)
    shutil.copytree(source / _OWN, scratch / _OWN, ignore=shutil.ignore_patterns("__pycache__"))
    return scratch
