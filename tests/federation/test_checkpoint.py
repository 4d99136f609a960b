"""A stopped run goes on as if it had not been stopped, or says in one line why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedlora.errors import RunFolderError
from fedlora.federation import checkpoint
from fedlora.federation.checkpoint import load_checkpoint, save_checkpoint

RUNS = {
    "sgd": [],
    "prototype": ["model.head=prototype"],
    "trained head": ["model.head=trained"],
    "adam kept": ["training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.05"],
    "adam afresh": ["training.optimizer=adam", "training.learning_rate=0.05"],
    "momentum kept": ["training.optimizer=momentum", "training.keep_state=true", "training.learning_rate=0.05"],
    "partial": ["federation.participation=0.67", "training.optimizer=momentum", "training.keep_state=true"],
    "no noise": ["privacy.epsilon=inf", "training.optimizer=adamw", "training.keep_state=true"],
}


class Stop(Exception):
    """Stands for a kill between two rounds."""


def run_until(federation: Any, path: Path, state: Any, last: int) -> None:
    def on_round(report: Any, state: Any) -> None:
        save_checkpoint(path, state, federation.sites)
        if report.round == last:
            raise Stop

    with pytest.raises(Stop):
        federation.server(None, on_round).run(state)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("last", [0, 1])
def test_a_resumed_run_gives_the_same_bits_as_one_that_was_not_stopped(
    make_federation: Any, tmp_path: Path, kind: str, last: int
) -> None:
    whole, first, second = (make_federation(*RUNS[kind]) for _ in range(3))
    wanted = whole.server().run(whole.start())
    run_until(first, tmp_path / "c", first.start(), last)
    state = load_checkpoint(tmp_path / "c", second.sites)
    assert state.next_round == last + 1
    resumed = second.server().run(state)
    assert torch.equal(resumed.theta, wanted.theta)
    assert (resumed.head is None) == (wanted.head is None)
    for one, other in zip(resumed.head or (), wanted.head or (), strict=True):
        assert torch.equal(one, other)
    assert resumed.facts == wanted.facts
    assert (resumed.bytes_up, resumed.bytes_down, resumed.next_round) == (
        wanted.bytes_up,
        wanted.bytes_down,
        wanted.next_round,
    )


def test_what_is_saved_is_what_is_loaded(make_federation: Any, tmp_path: Path) -> None:
    federation, fresh = (make_federation("model.head=prototype", *RUNS["adam kept"]) for _ in range(2))
    state = federation.start()
    run_until(federation, tmp_path / "c", state, 2)
    loaded = load_checkpoint(tmp_path / "c", fresh.sites)
    assert loaded.theta.dtype == torch.float32
    assert torch.equal(loaded.theta, state.theta)
    assert all(torch.equal(one, other) for one, other in zip(loaded.head, state.head, strict=True))
    for name in ("run_id", "next_round", "facts", "bytes_up", "bytes_down"):
        assert getattr(loaded, name) == getattr(state, name)
    for site, original in zip(fresh.sites, federation.sites, strict=True):
        assert site.next_round == original.next_round
        assert site.optimizer_state.keys() == original.optimizer_state.keys()
        for key, value in original.optimizer_state.items():
            assert torch.equal(site.optimizer_state[key], value)


def test_a_resumed_site_refuses_the_rounds_that_are_over(make_federation: Any, tmp_path: Path) -> None:
    federation, fresh = make_federation(), make_federation()
    run_until(federation, tmp_path / "c", federation.start(), 1)
    load_checkpoint(tmp_path / "c", fresh.sites)
    assert [site.next_round for site in fresh.sites] == [2, 2, 2]


@pytest.fixture
def saved(make_federation: Any, tmp_path: Path) -> tuple[Any, Path]:
    federation = make_federation("model.head=prototype", *RUNS["adam kept"], "privacy.seeded_noise=false")
    run_until(federation, tmp_path / "c", federation.start(), 1)
    return federation, tmp_path / "c"


def test_the_file_holds_no_secret(saved: tuple[Any, Path]) -> None:
    federation, path = saved
    content = path.read_bytes()
    for site in federation.sites:
        for part in (site.secret.root, site.secret.root[:8], site.secret.root.hex().encode()):
            assert part not in content
        assert repr(site.secret.root)[2:-1].encode() not in content
        for stream in ("noise", "sampling"):
            key = site.secret.numpy(stream, site.client, 1).bit_generator.state["state"]["keysetup"]
            assert key.tobytes() not in content
            assert all(str(part).encode() not in content for part in key.tolist())
    assert b"secret" not in content


def test_every_truncation_is_one_clear_line(saved: tuple[Any, Path]) -> None:
    federation, path = saved
    content = path.read_bytes()
    before = [(site.next_round, site.optimizer_state) for site in federation.sites]
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(RunFolderError, match="missing or broken; start the run anew"):
            load_checkpoint(path, federation.sites)
    assert [(site.next_round, site.optimizer_state) for site in federation.sites] == before


def test_every_damaged_byte_is_noticed_in_one_clear_line(saved: tuple[Any, Path]) -> None:
    """In the header as in the numbers: a flipped bit in the round's number would repeat rounds that are spent."""
    federation, path = saved
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    state = content.index(b"next_round")
    for position in [*range(0, end, 23), *range(state, state + 20), *range(end, len(content), 997), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError) as caught:
            load_checkpoint(path, federation.sites)
        assert "\n" not in str(caught.value)


def test_anything_else_than_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(RunFolderError, match="missing or broken"):
        load_checkpoint(path, [])
    path.mkdir()
    with pytest.raises(RunFolderError):
        load_checkpoint(path, [])
    other = tmp_path / "other"
    for metadata in (None, {"format": "fedlora-checkpoint-0"}, {"format": checkpoint.FORMAT}):
        save_file({"theta": torch.zeros(2)}, other, metadata=metadata)
        with pytest.raises(RunFolderError):
            load_checkpoint(other, [])
    for state in ("{}", "null", "[]", "not JSON"):
        save_file({"theta": torch.zeros(2)}, other, metadata={"format": checkpoint.FORMAT, "state": state})
        with pytest.raises(RunFolderError):
            load_checkpoint(other, [])


def test_a_kill_while_writing_leaves_the_old_file_whole(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, path = saved
    content = path.read_bytes()

    def half(tensors: Any, target: Path, **_: Any) -> None:
        target.write_bytes(content[:100])
        raise Stop

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(Stop):
        save_checkpoint(path, load_checkpoint(path, federation.sites), federation.sites)
    assert path.read_bytes() == content
    assert load_checkpoint(path, federation.sites).next_round == 2


def test_changed_records_are_not_gone_on_with(make_federation: Any, tmp_path: Path) -> None:
    """The plan was made for other records: q, n and the accounting would be of a data set that is no more."""
    federation = make_federation()
    save_checkpoint(tmp_path / "c", federation.start(), federation.sites)
    assert len({site.fingerprint for site in federation.sites}) == len(federation.sites)
    federation.sites[1].fingerprint = "0" * 64
    with pytest.raises(RunFolderError, match="client 1 have changed"):
        load_checkpoint(tmp_path / "c", federation.sites)
