"""A bundle holds what a site without internet needs, says what was changed in it, and works where no network is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.federation.workbench import build_workbench
from fedlora.models import locate_model
from fedlora.site import bundle, distributions
from fedlora.site.bundle import check_bundle, pack
from fedlora.site.desk import Desk
from fedlora.site.distributions import collect_wheels, needed_distributions, record_digest, version_list
from tests.command_line import Said, typed
from tests.site.conftest import Asking, SiteFolder, update_in

NAME = "someone/tiny"


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


@pytest.fixture
def packed(tiny: Path, tmp_path: Path) -> Path:
    return pack(str(tiny), tmp_path / "out", name=NAME).folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *words: typed(("bundle", *words), monkeypatch, capfd)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks up a name or opens a connection fails, and so does the test."""

    def refuse(*words: Any, **_: Any) -> None:
        pytest.fail(f"the network was asked: {words}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- packing


def test_a_bundle_has_the_model_under_its_name_and_says_what_to_do(packed: Path, tiny: Path) -> None:
    digest = locate_model(str(tiny)).digest
    assert {"INSTALL.md", "SHA256SUMS", "manifest.json", "wheels.txt"} <= files_of(packed)
    model = packed / "models" / NAME
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files_of(model)
    assert locate_model(str(model)).digest == digest
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["model"] == {"name": NAME, "digest": digest}
    assert set(manifest["files"]) == files_of(packed) - {"manifest.json"}
    for path, entry in manifest["files"].items():
        content = (packed / path).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    instructions = (packed / "INSTALL.md").read_text()
    assert f'"{NAME}" = "{digest}"' in instructions
    assert "$" not in instructions
    found = check_bundle(packed)
    assert (found.model, found.model_digest, found.here) == (NAME, digest, ())


def test_only_what_a_classifier_needs_is_copied(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    for name in ("pytorch_model.bin", "tf_model.h5", "model.onnx", "onnx/config.json", "records/train.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    pack(str(source), tmp_path / "out", name=NAME)
    assert files_of(tmp_path / "out" / "models" / NAME) == files_of(tiny)


def test_a_link_of_the_hubs_cache_becomes_a_file_and_the_pooling_comes_along(minilm: str, tmp_path: Path) -> None:
    source = locate_model(minilm)
    linked = tmp_path / "snapshot"
    for path in source.files:
        (linked / path).parent.mkdir(parents=True, exist_ok=True)
        (linked / path).symlink_to(source.folder / path)
    made = pack(str(linked), tmp_path / "out", name=minilm)
    copy = locate_model(str(made.folder / "models" / minilm))
    assert (copy.digest, copy.pooling) == (source.digest, source.pooling)
    assert made.model_digest == source.digest
    assert not [path for path in made.folder.rglob("*") if path.is_symlink()]
    check_bundle(made.folder)


@pytest.mark.parametrize(
    ("given", "name"),
    [("org/model-1.5", "org/model-1.5"), ("model", "model"), ("/srv/x/model", "model"), ("../model/", "model")],
)
def test_the_name_of_a_hub_stays_and_a_path_gives_its_last_part(given: str, name: str) -> None:
    assert bundle._plain_name(given) == name


@pytest.mark.parametrize("name", ["/etc/model", "../model", "a/../../b"])
def test_no_name_leads_out_of_the_bundle(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a model"):
        pack(str(tiny), tmp_path / "out", name=name)


def test_nothing_is_overwritten_and_no_half_is_left(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="not found"):
        pack("nobody/no-model", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="not overwritten"):
        pack(str(tiny), tmp_path / "there")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for step in ("_copy_model", "version_list", "_instructions", "_contents"):
        with monkeypatch.context() as patch:
            patch.setattr(bundle, step, die)
            with pytest.raises(KeyboardInterrupt):
                pack(str(tiny), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_a_killed_attempt_leaves_passes_no_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle.shutil, "rmtree", lambda *_, **__: None)  # as if killed at once
    monkeypatch.setattr(bundle, "_facts", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(str(tiny), tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    with pytest.raises(ConfigError, match="manifest"):
        check_bundle(left)


# ------------------------------------------------------------------------------------------------------------- checking


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.parent.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (Path.unlink, f"models/{NAME}/config.json", "missing"),
        (_append, "wheels.txt", "changed"),
        (_flip, f"models/{NAME}/model.safetensors", "changed"),
        (_link, f"models/{NAME}/tokenizer.json", "changed"),
        (Path.touch, "models/more.safetensors", "added"),
        (lambda path: path.symlink_to("/etc"), "wheels", "added"),
    ],
)
def test_whatever_is_not_as_it_was_is_named(
    packed: Path, command: Callable[..., Said], harm: Callable[[Path], Any], file: str, says: str
) -> None:
    assert command("--check", packed).code == 0
    harm(packed / file)
    said = command("--check", packed)
    assert said.code == 2
    assert f"{says} {file}" in said.err


def test_all_of_them_are_named_at_once(packed: Path, command: Callable[..., Said]) -> None:
    (packed / "INSTALL.md").unlink()
    _append(packed / "wheels.txt")
    (packed / "new").touch()
    message = command("--check", packed).err
    assert "missing INSTALL.md; changed wheels.txt; added new" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "files": 3, "model": {}}',
        '{"format": 2, "files": {}, "model": {"name": "a", "digest": "b"}}',
        '{"format": 1, "files": {"../x": {"sha256": "", "size": 0}}, "model": {"name": "a", "digest": "b"}}',
        '{"format": 1, "files": {}, "model": {"name": "/etc", "digest": "b"}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(packed: Path, text: str) -> None:
    (packed / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="no manifest"):
        check_bundle(packed)


def test_weights_other_than_the_manifest_names_are_refused(packed: Path) -> None:
    path = packed / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="weights"):
        check_bundle(packed)


def test_another_machine_is_told_what_is_different_here(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle.platform, "python_version", lambda: "3.99.1")
    (found,) = check_bundle(packed).here
    assert "3.99.1" in found


@pytest.mark.parametrize("words", [(), ("model",), ("--check", "a", "b")])
def test_the_command_says_what_it_wants(command: Callable[..., Said], words: tuple[str, ...]) -> None:
    said = command(*words)
    assert said.code == 2
    assert "Traceback" not in said.err


# ------------------------------------------------------------------------------------------------------------- packages


def test_everything_that_is_needed_is_listed_with_its_version(packed: Path) -> None:
    needed = needed_distributions()
    assert {"fedlora", "torch", "transformers", "safetensors", "huggingface-hub", "randomgen"} <= set(needed)
    assert not {"flwr", "opacus", "pytest", "ray"} & set(needed)
    assert "flwr" in needed_distributions(["flower"])
    listed = (packed / "wheels.txt").read_text()
    assert listed == version_list(needed)
    assert "no wheels were packed" in listed
    for name, one in needed.items():
        assert f"\n{name}=={one.version}  # RECORD sha256:" in listed


def test_what_is_not_installed_or_offered_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no extra flowers"):
        needed_distributions(["flowers"])
    real = distributions.distribution

    def without_torch(name: str) -> Distribution:
        if name == "torch":
            raise distributions.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(distributions, "distribution", without_torch)
    with pytest.raises(ConfigError, match="torch is needed"):
        needed_distributions()


def _installed(folder: Path, **record: str) -> Distribution:
    info = folder / "thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},{digest},1\n" for path, digest in record.items()))
    return PathDistribution(info)


def test_a_record_digest_is_of_the_files_and_not_of_the_installation(tmp_path: Path) -> None:
    files = {"thing/a.py": "sha256=aaaa", "thing/b.so": "sha256=bbbb"}
    local = {
        "thing/__pycache__/a.cpython-311.pyc": "sha256=cccc",
        "../../bin/thing": "sha256=dddd",
        "thing-1.0.dist-info/INSTALLER": "sha256=eeee",
    }
    one = record_digest(_installed(tmp_path / "1", **files))
    assert one == record_digest(_installed(tmp_path / "2", **local, **dict(reversed(files.items()))))
    assert one != record_digest(_installed(tmp_path / "3", **files | {"thing/a.py": "sha256=aaab"}))
    assert one != record_digest(_installed(tmp_path / "4", **{"thing/a.py": "sha256=aaaa"}))


def _wheel(folder: Path, name: str, *, needs: str = "") -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}\n")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in (files | {f"{info}/RECORD": "".join(lines) + f"{info}/RECORD,,\n"}).items():
            archive.writestr(inside, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip knows: wheels of "fedlora" and "thing" 1.0."""
    folder = tmp_path / "index"
    folder.mkdir()
    _wheel(folder, "thing")
    _wheel(folder, "fedlora", needs="Requires-Dist: thing\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(distributions, "own_source", lambda: None)
    return folder


class Installed:
    """As much of a distribution as wheels are asked for by."""

    def __init__(self, version: str) -> None:
        self.version = version


def test_wheels_are_listed_with_the_hashes_of_the_files_themselves(index: Path, tmp_path: Path) -> None:
    needed: Any = {"fedlora": Installed("1.0"), "thing": Installed("1.0")}
    listed = collect_wheels(needed, tmp_path / "wheels")
    assert files_of(tmp_path / "wheels") == files_of(index)
    for name in needed:
        (path,) = (tmp_path / "wheels").glob(f"{name}-*.whl")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"{name}==1.0 \\\n    --hash=sha256:{digest}\n" in listed


@pytest.mark.parametrize(
    ("needed", "says"),
    [({"fedlora": "1.0", "thing": "2.0"}, "thing==2.0"), ({"fedlora": "1.0"}, "thing")],
    ids=["a version that is nowhere", "a package that the list forgets"],
)
def test_a_wheel_that_lacks_is_said_before_the_bundle_travels(
    index: Path, tmp_path: Path, needed: dict[str, str], says: str
) -> None:
    installed: Any = {name: Installed(version) for name, version in needed.items()}
    with pytest.raises(ConfigError, match=says):
        collect_wheels(installed, tmp_path / "wheels")


def test_with_wheels_the_instructions_need_no_index(
    tiny: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: Any = {"fedlora": Installed("1.0"), "thing": Installed("1.0")}
    monkeypatch.setattr(bundle, "needed_distributions", lambda _: needed)
    folder = pack(str(tiny), tmp_path / "out", wheels=True).folder
    assert "--no-index --find-links wheels --require-hashes" in (folder / "INSTALL.md").read_text()
    assert len(list((folder / "wheels").iterdir())) == 2
    check_bundle(folder)


def test_the_own_wheel_is_made_of_the_package_and_not_of_old_builds(tmp_path: Path) -> None:
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "fedlora/a.py",
        "fedlora/__pycache__/a.pyc",
        "build/lib/b.py",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    scratch.mkdir()
    distributions._clean_copy(source, scratch)
    assert files_of(scratch) == {"pyproject.toml", "README.md", "LICENSE", "fedlora/a.py"}


# ---------------------------------------------------------------------------------------------------- without a network


def test_a_site_whose_model_came_in_a_bundle_does_its_rounds_without_a_network(
    packed: Path, site_folder: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    tables = site_folder.config.to_mapping()
    tables["model"]["name"] = NAME
    config = RunConfig.from_mapping(tables)
    shutil.move(packed / "models", site_folder.path / "models")
    site_folder.write_policy((f'"{site_folder.config.model.name}"', f'"{NAME}"'))
    theirs = build_workbench(site_folder.config)  # the server has the same model under another name
    asking = Asking(config=config, workbench=theirs, run_id=f"{config.digest()[:16]}-{'0' * 16}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub's cache was asked"))
    desk = Desk(site_folder.settings)
    try:
        assert desk.answer(asking.enrol()).code == "ok"
        for index in range(2):
            assert update_in(desk.answer(asking.round(index))).round_index == index
    finally:
        desk.close()


def test_the_same_site_without_the_folder_takes_part_in_nothing(
    site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test before passes for is the folder, and no cache."""
    tables = site_folder.config.to_mapping()
    tables["model"]["name"] = NAME
    config = RunConfig.from_mapping(tables)
    site_folder.write_policy((f'"{site_folder.config.model.name}"', f'"{NAME}"'))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    desk = Desk(site_folder.settings)
    try:
        asking = Asking(config=config, workbench=build_workbench(site_folder.config), run_id="")
        assert desk.answer(asking.enrol()).code == "bad_input"
    finally:
        desk.close()


def test_no_hub_is_asked_for_a_model_that_is_not_here(
    site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_network: None
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    words = ("--data", site_folder.path / "records", "--task", "sst2", "--model", NAME)
    said = typed(("site", "init", site_folder.path / "new", *words), monkeypatch, capfd)
    assert said.code == 2
    assert f"fedlora bundle {NAME} OUT" in said.err
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    site_folder.write_policy((f'"{site_folder.config.model.name}"', f'"{NAME}"'))
    assert typed(("site", "check", site_folder.settings), monkeypatch, capfd).code == 2
