"""What the documents tell people to type works, and what they point at is there."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.cli import main
from fedlora.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path for folder in (".", "docs", "benchmarks", "deploy") for path in (ROOT / folder).glob("*.md"))
RECIPES = sorted(ROOT.glob("simulations/recipes/*.toml"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TINY = ("data.source=generated", "data.generated_records=240", "data.max_length=16", "federation.rounds=2")
TINY += (
    "data.train_share=1",
    "federation.local_steps=2",
    "training.expected_batch_size=16",
    "privacy.delta=1e-3",
    "privacy.accountant=rdp",
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(document: Path) -> list[list[str]]:
    """The `fedlora` commands of the code blocks, in order, as words."""
    lines = [line for block in BLOCK.findall(document.read_text()) for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["fedlora"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [target for target in LINK.findall(document.read_text()) if "://" not in target]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_the_readmes_commands_run_one_after_the_other(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As written, but for a tiny model and tiny data; what needs Flower, a stop or a daemon has tests of its own."""
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, f"model.name='{tiny_model('bert')}'", "model.dtype=float32", "model.attention=eager"]
    done = []
    for words in commands(ROOT / "README.md"):
        if "flower" in words or "--resume" in words or words[0] in ("site", "watch", "bundle"):
            continue
        if words[0] == "audit":
            words = [*words, "--trials", "1000", "--canaries", "20"]
        if words[0] in ("simulate", "sweep", "audit"):
            words = [*words, *(part for override in tiny for part in ("--set", override))]
        if "adapter.select=alignment" in words:
            words = [*words, "--set", "federation.rounds=3"]  # two of them are its warm-up
        if "--source" in words:
            words[words.index("--source") + 1] = "generated"
        monkeypatch.setattr(sys, "argv", ["fedlora", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (words, capfd.readouterr().err)
        done.append(words[0])
    commands_shown = {"simulate", "sweep", "runs", "report", "calibrate", "audit", "budget", "evaluate", "predict"}
    assert set(done) == commands_shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_command_in_the_documents_parses(document: Path) -> None:
    import typer

    from fedlora.cli import app

    group = typer.main.get_command(app)
    for words in commands(document):
        context = group.make_context("fedlora", [*words], resilient_parsing=False)
        assert isinstance(group, typer.core.TyperGroup)
        _, command, rest = group.resolve_command(context, words)
        assert command is not None
        parsed = command.make_context(words[0], rest, parent=context)
        if overrides := parsed.params.get("overrides"):
            RunConfig.from_mapping({}, overrides)


@pytest.mark.parametrize("recipe", RECIPES, ids=relative)
def test_a_recipe_builds_with_a_tiny_model(recipe: Path, tiny_model: Callable[..., Path]) -> None:
    from fedlora.federation.sites import load_simulated_data, make_sites
    from fedlora.federation.workbench import build_workbench

    config = RunConfig.from_toml(recipe)
    assert config != RunConfig(), "a recipe says something"
    text = recipe.read_text()
    assert f"simulations/recipes/{recipe.name}" in text, "it names the command that runs it"
    config = config.with_overrides(
        f"model.name='{tiny_model('bert')}'", "model.dtype=float32", "model.attention=eager", "run.device=cpu"
    ).with_overrides(*TINY)
    workbench = build_workbench(config)
    sites = make_sites(config, load_simulated_data(config), workbench.schedule)
    assert len(sites) == config.federation.clients
    assert all(site.plan.epsilon() <= config.privacy.epsilon for site in sites)


def test_there_are_recipes_and_documents() -> None:
    assert RECIPES
    assert {"README.md", "CONTRIBUTING.md", "docs/privacy.md"} <= set(map(relative, DOCUMENTS))
