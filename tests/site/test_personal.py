"""What a site keeps for itself: never sent, kept through a restart, exported when its last round is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.adapters.peft import load_classifier_from_export
from fedlora.federation.workbench import build_workbench
from fedlora.site.desk import Desk
from tests.site.conftest import Asking, SiteFolder, update_in

ALLOWED = ("[allow]", '[allow]\nmethods = ["fedsa"]')


@pytest.fixture
def asking(site_folder: SiteFolder) -> Asking:
    site_folder.write_policy(ALLOWED)
    config = site_folder.config.with_overrides("adapter.method=fedsa")
    return Asking(config=config, workbench=build_workbench(config), run_id=f"{config.digest()[:16]}-{'0' * 16}")


def own_model(folder: SiteFolder) -> list[Path]:
    return [*(folder.path / "personal").glob("*/adapter_model.safetensors")]


def test_the_sites_own_model_is_exported_after_its_last_round_and_outlives_restarts(
    site_folder: SiteFolder, asking: Asking
) -> None:
    for index in range(4):
        desk = Desk(site_folder.settings)  # a new daemon for every round
        sent = update_in(desk.answer(asking.round(index, theta=0.1 if index else 0.0))).vector
        desk.close()
        assert bool(own_model(site_folder)) == (index == 3)
    wanted = sum(slot.size for slot in asking.workbench.layout.slots if slot.part == "A")
    assert len(sent) == wanted, "B stays"
    (path,) = own_model(site_folder)
    adapter = load_file(path)
    exported = torch.cat([value.flatten() for name, value in sorted(adapter.items()) if "lora_A" in name])
    assert torch.equal(exported.sort().values, sent.sort().values), "its own A, as it was sent"
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert load_classifier_from_export(path.parent).predict(["a good film"])
    card = (path.parent / "README.md").read_text()
    assert "this site's own model" in card
    assert "[More Information Needed]" not in card, "PEFT's own template"


def test_a_run_whose_name_is_a_path_writes_nowhere_else(site_folder: SiteFolder, asking: Asking) -> None:
    desk, outside = Desk(site_folder.settings), site_folder.path.parent / "fedlora-escaped"
    run = f"{asking.config.digest()[:16]}-/../../../{outside.name}"
    for index in range(4):
        update_in(desk.answer(asking.round(index, run_id=run)))
    desk.close()
    assert not outside.exists()
    assert [path.parent.parent for path in own_model(site_folder)] == [site_folder.path / "personal"]


def test_a_round_is_answered_though_the_model_cannot_be_written(
    site_folder: SiteFolder, asking: Asking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedlora.site.desk.export_personal", full)
    desk = Desk(site_folder.settings)
    assert len(update_in(desk.answer(asking.round(0))).vector) > 0
    desk.close()
    assert "OSError" in caplog.text


def test_that_what_was_kept_is_lost_is_said(
    site_folder: SiteFolder, asking: Asking, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(3):
        desk = Desk(site_folder.settings)
        update_in(desk.answer(asking.round(index)))
        desk.close()
        assert ("starts anew" in caplog.text) == (index == 2)
        if index == 1:
            (site_folder.path / "answers.sqlite").unlink()
