"""`fedlora calibrate`: how much noise a guarantee takes, before anything runs."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from fedlora.errors import ConfigError


def calibrate(
    records: Annotated[int, typer.Option(help="records of the site, n", min=1)],
    epsilon: Annotated[float, typer.Option(help="target ε of the whole run")] = 6.0,
    delta: Annotated[float, typer.Option(help="δ, below 1/n")] = 1e-5,
    batch: Annotated[int, typer.Option(help="expected batch size", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="private steps of the whole run, rounds × local steps", min=1)] = 300,
    prototype: Annotated[float, typer.Option(help="noise multiplier of a prototype release; 0: none", min=0)] = 0.0,
    accountant: Annotated[str, typer.Option(help="pld (tight) or rdp (fast bound)")] = "pld",
) -> None:
    """Which noise multiplier σ makes a site's run cost ε? The same answer that a run would use."""
    from fedlora.privacy.accounting import Charge
    from fedlora.privacy.calibration import calibrate_noise_multiplier

    if batch > records:
        raise ConfigError(f"--batch {batch} is more than --records {records}; give at most {records}")
    if delta >= 1 / records:
        raise ConfigError(f"--delta {delta:g} is not below 1/n = {1 / records:.3g}; give less")
    fixed = [Charge(1.0, prototype, 1)] if prototype else []
    sigma = calibrate_noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        sampling_probability=batch / records,
        num_steps=steps,
        fixed=fixed,
        accountant=accountant,
    )
    typer.echo(f"noise_multiplier = {sigma:.4f}")
    if math.isinf(epsilon):
        typer.echo("no guarantee: ε = ∞, a run without noise")
        return
    typer.echo(
        f"ε <= {epsilon:g} at δ = {delta:g}, one record added or removed, {accountant.upper()}; "
        f"q = {batch / records:.6f}, {steps} steps"
        + (f", after one prototype release at σ = {prototype:g}" if prototype else "")
    )
