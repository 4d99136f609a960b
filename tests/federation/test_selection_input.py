"""A choice of modules that cannot be made is one clear line at the command line; nothing is written or charged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.cli import main
from fedlora.config import RunConfig

QUERY = "encoder.layer.0.attention.self.query"
FILES = {
    "unknown.txt": "encoder.layer.0.attention.self.qery\n",
    "other model.txt": "encoder.layer.7.attention.self.query\n",
    "nothing.txt": "# nobody\n",
    "twice.txt": f"{QUERY}\n{QUERY}\n",
    "other sizes.json": json.dumps(
        {"candidates": [{"module": QUERY, "in_features": 384, "out_features": 384, "selected": True}]}
    ),
    "broken.json": '{"candidates": [',
    "one text.txt": "a good film\n",
}
SEARCH = "adapter.select=alignment"
# What is asked for, and what the one line says beside how to put it right.
REFUSED: dict[str, tuple[list[str], str]] = {
    "no share": ([SEARCH, "adapter.ratio=0"], "adapter.ratio = 0.0, wanted > 0"),
    "more than all": ([SEARCH, "adapter.ratio=1.5"], "adapter.ratio = 1.5, wanted > 0 and <= 1"),
    "a negative share": ([SEARCH, "adapter.ratio=-1"], "adapter.ratio = -1.0, wanted > 0"),
    "too little of a layer": ([SEARCH, "adapter.ratio=0.16"], "set adapter.ratio to at least 0.1667"),
    "too little of all": (
        ["adapter.select=random", "adapter.discretise=global_topk", "adapter.ratio=0.08"],
        "set adapter.ratio to at least 0.0834",
    ),
    "too little of all, to fall back on": (
        [SEARCH, "adapter.discretise=cost_aware", "adapter.ratio=0.08"],
        "set adapter.ratio to at least 0.0834",
    ),
    "no direction to align with": ([SEARCH, "adapter.warmup_rounds=0"], "set it to at least 1"),
    "nothing to compare": (["adapter.select=warmup", "adapter.warmup_rounds=1"], "set it to at least 2"),
    "gates at zero weights": (["adapter.select=bilevel", "adapter.warmup_rounds=0"], "set it to at least 1"),
    "nothing but warm-up": (["adapter.select=warmup", "federation.rounds=2"], "set federation.rounds above 2"),
    "nothing but search": (["adapter.select=bilevel", "federation.rounds=4"], "set federation.rounds above 4"),
    "random costs": (["adapter.select=random", "adapter.discretise=cost_aware"], "use select = alignment or warmup"),
    "probed costs": (["adapter.select=probe", "adapter.discretise=cost_aware"], "use select = alignment or warmup"),
    "gated costs": (["adapter.select=bilevel", "adapter.discretise=cost_aware"], "use select = alignment or warmup"),
    "costs of one round": (
        [SEARCH, "adapter.discretise=cost_aware", "adapter.warmup_rounds=1"],
        "set it to at least 2",
    ),
    "halves of too few": (["adapter.select=bilevel", "training.expected_batch_size=41"], "more than half the records"),
    "a choice without a file": (["adapter.select=mask"], "set both or neither"),
    "a file without a choice": (["adapter.mask='unknown.txt'"], "set both or neither"),
    "texts without a probe": ([SEARCH, "adapter.probe_texts='one text.txt'"], "does not read it"),
    "no such file": (["adapter.select=mask", "adapter.mask='no such file'"], "no such file"),
    "a folder": (["adapter.select=mask", "adapter.mask='.'"], "adapter.mask"),
    "a misspelt module": (["adapter.select=mask", "adapter.mask='unknown.txt'"], QUERY),
    "another model's module": (["adapter.select=mask", "adapter.mask='other model.txt'"], "no module"),
    "another model's selection": (["adapter.select=mask", "adapter.mask='other sizes.json'"], "another model"),
    "an empty choice": (["adapter.select=mask", "adapter.mask='nothing.txt'"], "chooses no module"),
    "a module twice": (["adapter.select=mask", "adapter.mask='twice.txt'"], "twice"),
    "no JSON": (["adapter.select=mask", "adapter.mask='broken.json'"], "not valid JSON"),
    "too few texts": (["adapter.select=probe", "adapter.probe_texts='one text.txt'"], "wanted at least 2"),
    "no texts": (["adapter.select=probe", "adapter.probe_texts='no such file'"], "no such file"),
}  # fmt: skip
Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Ask:
    """The exit code and the line of `fedlora simulate` with some settings; checks that nothing was written."""
    config = tiny_config("federation.rounds=6", "privacy.accountant=rdp", "privacy.seeded_noise=false")
    (tmp_path / "recipe.toml").write_text(config.to_toml())
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        settings = [part for override in overrides for part in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["fedlora", "simulate", "recipe.toml", *settings, "--out", "run"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("fedlora: ")
        assert err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        assert isinstance(ended.value.code, int)
        return ended.value.code, err

    return run


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_chosen_is_one_line(ask: Ask, case: str) -> None:
    overrides, hint = REFUSED[case]
    code, line = ask(*overrides)
    assert code == 2, line
    assert hint in line


def test_a_search_that_eats_the_whole_budget_is_refused_as_one(ask: Ask) -> None:
    code, line = ask("adapter.select=alignment", "privacy.alignment_noise_multiplier=0.01")
    assert code == 3, line
    assert "nothing is left for training" in line
    assert "privacy.alignment_noise_multiplier" in line
