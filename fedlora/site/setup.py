"""`fedlora site init`: a folder with a commented policy and an empty ledger, from a few answers of the records' owner.

The policy is the last thing that appears, whole or not at all, so that an attempt that was cut off is simply made
again. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

from fedlora.config import RunConfig
from fedlora.data.glue import load_records
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.models.source import ModelSource, locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.policy import NO_FOLDER, DataPolicy, SitePolicy, SiteSection
from fedlora.randomness import PublicSeed
from fedlora.schema import build_section

POLICY = "site.toml"
MAX_EPSILON = 6.0


@dataclass(frozen=True, kw_only=True)
class NewSite:
    """What the owner says of a new site."""

    task: str
    data: str
    """Folder of the records, which stay where they are; or "generated"."""
    name: str = ""
    """The site's own for them; empty: the folder's."""
    model: str = RunConfig().model.name
    """Name or folder."""
    max_epsilon: float = MAX_EPSILON
    max_delta: float | None = None
    """None: `suggested_delta`."""
    public_size: int | Literal["exact"] = "exact"


@dataclass(frozen=True, kw_only=True)
class MadeSite:
    """What `set_up_site` has made."""

    policy: SitePolicy
    new_folder: bool
    delta_from: str
    """Why `max_delta` is what it is."""


def set_up_site(folder: Path, site: NewSite) -> MadeSite:
    """Make `folder`, where it does not exist, and in it a policy and an empty ledger.

    Raises:
        ConfigError: there is a policy already, a ledger that has charges, or an answer is out of range.
        DataError: the records cannot be read, or δ does not suit their number.
        ModelError: the model's files are not on this machine.
        LedgerBroken, LedgerUnavailable: what lies in the ledger's place is none.
    """
    if (folder / POLICY).exists():
        raise ConfigError(f"{folder / POLICY} exists and is not overwritten; edit it, or set up another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one that is, or one that can be made")
    name = site.name or Path(site.data).expanduser().resolve().name
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"--name {name!r} is no name for a data set; give letters, digits or -, such as ward-7")
    num_records = _count(site)
    max_delta, delta_from = _delta(site, num_records)
    model, source = _find_model(folder, site.model)
    data = build_section(
        DataPolicy,
        {
            "task": site.task,
            "source": _source(folder, site.data),
            "max_epsilon": site.max_epsilon,
            "max_delta": max_delta,
            "public_size": site.public_size,
        },
        f"data.{name}",
    )
    if data.max_delta >= 1 / num_records:
        raise DataError(
            f"max_delta = {data.max_delta:g} is not below one over the number of records: at that δ one of them may "
            "be published; give a smaller --max-delta"
        )
    new_folder, text = not folder.exists(), policy_text(name, data, model=model, model_digest=source.digest)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_ledger(folder / SiteSection().ledger)
        _put(folder / POLICY, text)
    except OSError as error:
        raise ConfigError(f"cannot make a site in {folder}: {error.strerror or error}; give another folder") from error
    return MadeSite(policy=SitePolicy.from_toml(folder / POLICY), new_folder=new_folder, delta_from=delta_from)


def policy_text(name: str, data: DataPolicy, *, model: str, model_digest: str) -> str:
    """A policy of one data set and one model; all else has its default, and is explained."""
    template = Template(files("fedlora.site").joinpath(POLICY).read_text(encoding="utf-8"))
    return template.substitute(
        name=name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _quoted(name),
        model=_quoted(model),
        model_digest=model_digest,
        task=data.task,
        source=_quoted(data.source),
        max_epsilon=data.max_epsilon,
        max_delta=data.max_delta,
        public_size=_quoted(data.public_size) if isinstance(data.public_size, str) else data.public_size,
    )


def suggested_delta(num_records: int) -> float:
    """The power of ten at or below 1 / (10 n)."""
    return float(f"1e-{len(str(10 * num_records - 1))}")


def _quoted(text: str) -> str:
    """As a TOML string: JSON's notation, but for one sign that JSON leaves alone."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _count(site: NewSite) -> int:
    """How many records there are, after a look at columns and labels."""
    if site.data == "hub":
        raise DataError('--data hub: a site\'s daemon asks no hub; give the folder of its records, or "generated"')
    place = Path(site.data).expanduser()
    if site.data not in NO_FOLDER and not place.is_dir():
        raise DataError(f'--data {site.data} is no folder; give that of the records, or "generated" to try things out')
    settings = RunConfig().data
    return len(
        load_records(
            site.task,
            site.data if site.data in NO_FOLDER else str(place.absolute()),
            "train",
            generated_records=settings.generated_records,
            seed=PublicSeed.from_int(0),
        )
    )


def _delta(site: NewSite, num_records: int) -> tuple[float, str]:
    """A number of records that is to stay decides nothing here: a run can find out which δ it may ask for."""
    if site.max_delta is not None:
        return site.max_delta, "as asked"
    if site.public_size == "exact":
        return suggested_delta(num_records), "the power of ten at or below a tenth of one over the number of records"
    return suggested_delta(max(1, site.public_size)), "the power of ten at or below a tenth of one over public_size"


def _find_model(folder: Path, name: str) -> tuple[str, ModelSource]:
    """The model, on this machine, and the name by which runs ask for it."""
    own = folder / SiteSection().model_folder
    if not Path(name).is_absolute() and (own / name).is_dir():
        return name, locate_model(str(own / name))
    try:
        source = locate_model(name)
    except ModelError as error:
        raise ModelError(
            f"{error}. A site asks no hub: run `fedlora bundle {name} OUT` on a machine with internet and copy its "
            f"models/ to {own}"
        ) from error
    if source.kind != "folder":
        return name, source
    inside = source.folder.is_relative_to(own.resolve())
    return (str(source.folder.relative_to(own.resolve())) if inside else str(source.folder)), source


def _source(folder: Path, data: str) -> str:
    """As the policy writes it: from its own folder where it lies in there, so that the folder can move as a whole."""
    if data in NO_FOLDER:
        return data
    place, root = Path(data).expanduser().resolve(), folder.resolve()
    if not place.is_relative_to(root):
        return str(place)
    inside = str(place.relative_to(root))
    return f"./{inside}" if inside in NO_FOLDER else inside


def _make_ledger(path: Path) -> None:
    """An empty ledger; one that an earlier attempt has left serves as well."""
    ledger = Ledger.open(path)
    try:
        rows = len(ledger.entries())
    finally:
        ledger.close()
    if rows:
        raise ConfigError(
            f"{path} is a ledger with {rows} rows, which say what was spent; keep it: put its policy back beside it, "
            "or set up another folder"
        )


def _put(path: Path, text: str) -> None:
    """The whole file, for its owner's eyes only, or none; never in another's place."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError as error:
            raise ConfigError(f"{path} exists and is not overwritten; edit it, or set up another folder") from error
