"""`fedlora bundle`: what a site without internet needs, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.site.bundle import Bundle


def bundle(
    model: Annotated[str | None, typer.Argument(help="base model: hub id, folder or installed package")] = None,
    out: Annotated[Path | None, typer.Argument(help="new folder that is packed")] = None,
    name: Annotated[str, typer.Option(help="by which runs ask for the model; empty: as it is called here")] = "",
    wheels: Annotated[bool, typer.Option("--wheels", help="pack the packages too, fetched or built by pip")] = False,
    extra: Annotated[
        list[str] | None, typer.Option(help="extra of fedlora that the site needs, such as flower", show_default=False)
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="look at a bundle instead: is every file as it was packed?", show_default=False)
    ] = None,
) -> None:
    """Pack base model and packages for a site without internet, with a digest of every file."""
    from rich.console import Console

    from fedlora.site.bundle import check_bundle, pack

    if check is not None:
        if model is not None or out is not None:
            raise ConfigError("--check looks at one bundle and packs none; leave MODEL and OUT out")
        with Console(stderr=True).status("looking at every file"):
            found = check_bundle(check)
        for difference in found.here:
            typer.echo(f"to be known: {difference}")
        _print(found, "is as it was packed")
        return
    if model is None or out is None:
        raise ConfigError("fedlora bundle wants a model and a new folder: fedlora bundle MODEL OUT")
    with Console(stderr=True).status("packing"):
        made = pack(model, out, name=name, wheels=wheels, extras=extra or ())
    _print(made, "is packed")
    typer.echo(f"next: {out / 'INSTALL.md'} says what to do at the site")


def _print(found: Bundle, what: str) -> None:
    typer.echo(f"{found.folder} {what}")
    typer.echo(f'for [models]: "{found.model}" = "{found.model_digest}"')
    typer.echo(f"SHA-256 of its manifest, to be told to the site by other means: {found.digest}")
