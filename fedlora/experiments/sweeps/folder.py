"""The folder of a sweep.

sweep.toml    as resolved        runs.sqlite    every cell that has ended      report/    tables, figures, one page
cells/        a run folder each, named by the digest of its config            trials/    the same, of tuning
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import tomli_w

from fedlora.claims import claim
from fedlora.errors import ConfigError, RunFolderError
from fedlora.experiments.run_folder import replace_file
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.experiments.sweeps.tuning_groups import replaced_trials
from fedlora.schema import shown


@dataclass(frozen=True)
class SweepFolder:
    """One sweep's files."""

    path: Path

    @classmethod
    @contextmanager
    def claimed(cls, path: Path, sweep: Sweep) -> Iterator[Self]:
        """The folder for `sweep`, new, or that of the same sweep before, or of a smaller one.

        No other process can run a sweep in it meanwhile; a claim ends with its process, however that ends.

        Raises:
            RunFolderError: the folder holds something else, or a sweep whose cells are others, or another process has
                it; nothing is changed.
        """
        folder = cls(path)
        with ExitStack() as opened:
            try:
                folder._check_same(sweep)
                path.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context((path / ".claim").open("w"))
                refusal = f"another process runs the sweep in {path}; wait for it, or stop it first"
                claim(file, RunFolderError(refusal))
                folder._check_same(sweep)  # again: another process may have made it meanwhile
                replace_file(folder.sweep_file, tomli_w.dumps(sweep.to_mapping()).encode())
            except (OSError, ValueError) as error:  # ValueError: a name that no file can have
                reason = getattr(error, "strerror", None) or str(error)
                raise RunFolderError(f"cannot make sweep folder {path}: {reason}; choose another with --out") from error
            yield folder

    def read_sweep(self) -> Sweep:
        """The sweep as resolved.

        Raises:
            RunFolderError: it cannot be read as one.
        """
        try:
            return Sweep.from_toml(self.sweep_file)
        except ConfigError as error:
            raise RunFolderError(f"cannot read the sweep in {self.path}: {error}") from error

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.toml"

    def run_folder(self, cell: Cell) -> Path:
        return self.path / cell.folder

    def _check_same(self, sweep: Sweep) -> None:
        """Refuse to mix cells that only look alike: those of one label have one meaning in a folder."""
        if not self.sweep_file.is_file():
            if not self.path.exists() or (self.path.is_dir() and not any(_foreign(self.path))):
                return
            raise RunFolderError(f"{self.path} is not empty and no sweep's folder; choose another with --out")
        earlier = self.read_sweep()
        if (difference := _difference(earlier, sweep)) is not None:
            raise RunFolderError(
                f"{self.path} holds a sweep with {difference}; choose another with --out "
                "(labels and values can be added to the axes of a sweep, and nothing else be changed)"
            )


def _foreign(path: Path) -> Iterator[Path]:
    """What a kill right after a folder was made cannot have left."""
    return (entry for entry in path.iterdir() if entry.name not in (".claim", "sweep.partial"))


def _difference(earlier: Sweep, sweep: Sweep) -> str | None:
    """What was decided otherwise, in words; None where every label still means what it meant."""
    for name in sorted({*earlier.base, *sweep.base}):
        if (old := earlier.base.get(name)) != (new := sweep.base.get(name)):
            return f"{name} = {_said(old)}, not {_said(new)}"
    if [axis.name for axis in earlier.axes] != [axis.name for axis in sweep.axes]:
        return f"axes {', '.join(axis.name for axis in earlier.axes)}"
    for old_axis, new_axis in zip(earlier.axes, sweep.axes, strict=True):
        for label, settings in old_axis.values.items():
            if new_axis.values.get(label, settings) != settings:
                return f"other settings for {old_axis.name} {label}"
    if earlier.tune != sweep.tune:
        return "another [tune]"
    return replaced_trials(earlier, sweep) if sweep.tune else None


def _said(value: object) -> str:
    return "its default" if value is None else shown(value)
