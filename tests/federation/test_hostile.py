"""Over 500 hostile instructions and run configurations against one real site with a policy and a ledger on disk.

Whatever arrives: one of the fixed codes is the answer, nothing is trained, nothing is charged, and the next honest
round gives the bits that a site gives which was never attacked.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import clients.app
from fedlora.config import SECTIONS, RunConfig
from fedlora.engine.prototypes import prototype_head, prototype_layout
from fedlora.errors import ConfigError, ProtocolError
from fedlora.federation import cohort, wire
from fedlora.federation.failures import FAILURE_CODES
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.workbench import build_workbench
from fedlora.models import locate_model
from fedlora.randomness import SecretRoot
from fedlora.site.connection import DaemonAddress
from fedlora.site.desk import Desk
from fedlora.site.protocol import Answer, Request

LAYOUT = prototype_layout(2, 16)
Settings = dict[str, Any]


@dataclass(kw_only=True)
class Node:
    """A deployed client app with its policy, and the honest server of its run."""

    folder: Path
    config: RunConfig
    context: Context
    desk: Desk
    digests: dict[str, str]
    theta: torch.Tensor
    computed: list[str] = field(default_factory=list)
    """The engine's calls, by name."""
    head: tuple[torch.Tensor, torch.Tensor] | None = None

    def ask(self, content: RecordDict, changes: Settings | None = None) -> RecordDict:
        """What the app answers to a message, in a run configured with `changes`; all is copied as between processes."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.context.run_config = {**self.config.to_flower(), **(changes or {})}
        answer = clients.app.app(pickle.loads(pickle.dumps(Message(content, 1, "train", ttl=60.0))), self.context)
        assert not answer.has_error()
        return answer.content

    def run_id(self, changes: Settings | None = None) -> str:
        """It begins with the digest of the configuration, where that is one."""
        try:
            config = RunConfig.from_flower({**self.config.to_flower(), **(changes or {})})
        except ConfigError:
            config = self.config
        return f"{config.digest()[:16]}-1"

    def instruction(self, index: int, changes: Settings | None = None) -> RoundInstruction:
        phase = "prototype" if index == 0 else "finetune"
        return RoundInstruction(
            run_id=self.run_id(changes),
            round_index=index,
            phase=phase,
            layout_digest=self.digests[phase],
            theta=self.theta,
            head=self.head,
        )

    def honest_round(self, index: int, changes: Settings | None = None) -> ClientUpdate:
        content = self.ask(packed(wire.encode_instruction(self.instruction(index, changes))), changes)
        update = wire.decode_update(bytes(content["update"]["bytes"].data))  # type: ignore[union-attr]
        if index == 0:
            self.head = prototype_head(update.vector, LAYOUT, 10.0)
        return update

    def charged(self) -> list[Any]:
        with sqlite3.connect(self.folder / "ledger.sqlite") as connection:
            return connection.execute("SELECT id, kind, round, digest FROM entry").fetchall()

    def refuses(self, content: RecordDict, changes: Settings | None = None) -> str:
        """The code of the refusal, which must be one and must have cost nothing."""
        charged, computed = self.charged(), len(self.computed)
        answer = self.ask(content, changes)
        assert [*answer] == ["failure"], "it was done"
        code = dict(answer["failure"])["code"]  # type: ignore[arg-type]
        assert dict(answer["failure"]) == {"code": code}, "and nothing beside the code"  # type: ignore[arg-type]
        assert code in FAILURE_CODES
        assert len(self.computed) == computed, "something was computed"
        assert self.charged() == charged, "something was charged"
        return str(code)


def packed(data: bytes) -> RecordDict:
    return RecordDict({"instruction": ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})})


@pytest.fixture
def make_node(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Node]]:
    """Two nodes hold the same records and, for this test, draw the same secret."""
    nodes: dict[str, Node] = {}
    monkeypatch.setattr(SecretRoot, "from_os", classmethod(lambda cls: cls(b"k" * 32)))
    options = ["model.head=prototype", "federation.clients=1", "federation.rounds=2", "privacy.seeded_noise=false"]
    config = tiny_config(*options, "privacy.accountant=rdp")
    bench = build_workbench(config)
    digests = {"prototype": LAYOUT.digest, "finetune": bench.layout.digest}

    def make() -> Node:
        folder = tmp_path / f"site{len([*tmp_path.iterdir()])}"
        folder.mkdir()
        rows = {
            "sentence": [f"the plot was {'very ' * (n % 7)}good" for n in range(211)],
            "label": [0, 1, 1] * 70 + [0],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "train.parquet")
        model = config.model.name
        policy = f'[models]\n"{model}" = "{locate_model(model).digest}"\n[limits]\nsmallest_noise_multiplier = 0.2\n'
        policy += '[data.ward]\ntask = "sst2"\nsource = "."\nmax_epsilon = 7.0\nmax_delta = 1e-3\n'
        (folder / "site.toml").write_text(policy)
        where: Settings = {"partition-id": 0, "site": str(folder)}
        nodes[str(folder)] = Node(
            folder=folder,
            config=config,
            context=Context(run_id=7, node_id=1, node_config=where, state=RecordDict(), run_config={}),
            desk=Desk(folder / "site.toml"),
            digests=digests,
            theta=torch.zeros(bench.layout.size),
        )
        return nodes[str(folder)]

    def ask(self: DaemonAddress, request: Request, *, limit: float) -> Answer:
        """Through the wire's form, without a socket."""
        return nodes[self.place].desk.answer(Request.read(io.BytesIO(request.encode())))

    monkeypatch.setattr(DaemonAddress, "ask", ask)
    yield make
    for node in nodes.values():
        node.desk.close()


@pytest.fixture
def attacked(make_node: Callable[[], Node], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node in the middle of a run; afterwards its next round is compared with that of one which was left alone."""
    node, untouched = make_node(), make_node()
    node.honest_round(0)
    untouched.honest_round(0)

    def spy(name: str) -> None:
        genuine = getattr(cohort, name)

        def counted(*arguments: Any, **how: Any) -> Any:
            node.computed.append(name)
            return genuine(*arguments, **how)

        monkeypatch.setattr(cohort, name, counted)

    spy("train")
    spy("class_sums")
    yield node
    for index in (1, 2):
        ours, theirs = node.honest_round(index), untouched.honest_round(index)
        assert torch.equal(ours.vector, theirs.vector), "an attack has changed the site"
        assert ours.facts == theirs.facts
    assert node.computed == ["train"] * 4, "the spies see what is computed"
    assert [row[1:3] for row in node.charged()] == [row[1:3] for row in untouched.charged()]
    assert len(node.charged()) == 6


# ---------------------------------------------------------------------------------------------------------------- bytes


def random_bytes(count: int) -> list[bytes]:
    draw = random.Random(0)
    return [draw.randbytes(draw.randint(0, 400)) for _ in range(count)]


def sized(length: int, rest: bytes) -> bytes:
    return length.to_bytes(8, "little") + rest


def bombs() -> list[bytes]:
    """Headers that claim much, nest deeply, or are not what they should be."""
    headers = [b"[" * 30_000, b'{"a":' * 9_000, b'{"__metadata__":null}', b"null", b"[]", b"3", b'"x"', b"{}", b"NaN"]
    headers += [b'{"n":' + b"9" * 6000 + b"}", b'{"__metadata__":{"fields":3}}', b"\xff" * 64, b"{" * 64_000]
    headers += [
        b'{"theta":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**n, 2 ** (n + 2)) for n in (30, 62)
    ]
    headers += [b'{"theta":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}']
    claims = [sized(2**n, b"{}") for n in (16, 17, 32, 40, 62, 63)] + [b"\xff" * 8, b"\xff" * 4000, sized(0, b"")]
    return [sized(len(header), header) for header in headers] + claims


class Evil:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def pickles() -> list[bytes]:
    buffer = io.BytesIO()
    torch.save({"theta": torch.zeros(256)}, buffer)
    return [pickle.dumps(Evil()), pickle.dumps({"theta": [0.0] * 256}), buffer.getvalue()]


def asks_for_another_run(data: bytes, asked: RoundInstruction) -> bool:
    try:
        other = wire.decode_instruction(data)
    except ProtocolError:
        return False
    same_recipe = other.run_id != asked.run_id and other.run_id[:16] == asked.run_id[:16]
    return same_recipe and replace(other, run_id=asked.run_id).digest == asked.digest


def test_bytes_that_are_no_instruction(attacked: Node) -> None:
    good = wire.encode_instruction(attacked.instruction(1))
    header = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(1)
    cut = [good[:length] for length in [*range(0, header, 16), *range(header, len(good), 97), len(good) - 1]]
    flipped = []
    for position in draw.sample(range(header), 150):
        data = bytearray(good)
        data[position] ^= 1 << draw.randrange(8)
        flipped.append(bytes(data))
    # The blob's order varies, so a bit may fall on a run's name behind the digest: the honest question of another run.
    flipped = [data for data in flipped if not asks_for_another_run(data, attacked.instruction(1))]
    attacks = [*cut, *flipped, *random_bytes(40), *bombs(), *pickles(), good + b"x", good + good, b"x" + good]
    attacks += [good[:8] + good]
    assert attacked.refuses(packed(wire.encode_instruction(attacked.instruction(0)))) == "over", "its head is another"
    assert len(attacks) >= 250
    for data in attacks:
        assert attacked.refuses(packed(data)) == "protocol", data[:300]
    for content in (
        RecordDict(),
        RecordDict({"instruction": ConfigRecord({"bytes": good})}),
        RecordDict({"instruction": ArrayRecord()}),
        RecordDict({"update": ArrayRecord()}),
        RecordDict({"instruction": ConfigRecord({"policy": "/dev/null"})}),
    ):
        assert attacked.refuses(content) == "protocol"


# ------------------------------------------------------------------------------------------------------ fields, numbers

ODD: list[Any] = [None, True, False, -1, 1.0, 1.5, 0.0, -0.0, 99, 3, 2**31, 2**63, 2**64, 10**30, "1", "", "x" * 129]
ODD += [
    "x" * 10_000,
    "\ud800",
    "nul\0",
    "line\nline",
    "prototype",
    "FINETUNE",
    "search",
    "evaluation",
    "0" * 64,
    [],
    {},
]
ODD += [[1], {"a": 1}, [[[[]]]], "../../etc/passwd", "'; DROP TABLE entry; --", "run-2", "run-1 ", "run-1\u200b"]


def test_fields_that_are_not_those_of_the_round(attacked: Node) -> None:
    genuine = attacked.instruction(1)
    fields = {key: getattr(genuine, key) for key in ("run_id", "round_index", "phase", "layout_digest")}
    assert attacked.head is not None
    tensors = {"theta": genuine.theta, "weight": attacked.head[0], "bias": attacked.head[1]}

    def blob(changed: Any, kind: str = "instruction+head", form: str = wire.FORMAT) -> bytes:
        return bytes(save(tensors, metadata={"format": form, "kind": kind, "fields": json.dumps(changed)}))

    assert wire.decode_instruction(blob(fields)).run_id == genuine.run_id, "the forger can forge"
    attacks = [blob({**fields, key: value}) for key in fields for value in ODD]
    attacks += [blob({name: value for name, value in fields.items() if name != key}) for key in fields]
    attacks += [blob({**fields, key: 1}) for key in ("epsilon", "policy", "client", "num_steps", "seed", "", "facts")]
    attacks += [blob(fields, kind) for kind in ("instruction", "update", "", "x" * 1000)]
    attacks += [blob(fields, form=form) for form in ("", "fedlora-wire-0", "fedlora-wire-2")]
    attacks += [blob(whole) for whole in (None, [], 3, "x", [fields], [[]] * 1000)]
    attacks += [blob({**fields, "phase": "prototype", "layout_digest": LAYOUT.digest})]
    assert len(attacks) >= 160
    for data in attacks:
        assert attacked.refuses(packed(data)) == "protocol", data[:300]


def forged_tensors(genuine: RoundInstruction) -> list[dict[str, torch.Tensor]]:
    assert genuine.head is not None
    theta, (weight, bias) = genuine.theta, genuine.head
    sound = {"theta": theta, "weight": weight.contiguous(), "bias": bias.contiguous()}
    spoilt = []
    for name, tensor in sound.items():
        for value in (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1001.0, 3.4e38):
            one = tensor.clone()
            one.view(-1)[-1] = value
            spoilt += [{**sound, name: one}, {**sound, name: torch.full_like(tensor, value)}]
        for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
            spoilt.append({**sound, name: tensor.to(kind)})
        shapes = [tensor[:-1], tensor[:0], tensor.reshape(-1, 1), tensor[None], tensor.sum(), torch.cat([tensor] * 2)]
        spoilt += [{**sound, name: shape.contiguous()} for shape in shapes]
        spoilt.append({other: value for other, value in sound.items() if other != name})
    spoilt += [{**sound, "more": theta.clone()}, {**sound, "theta": torch.full_like(theta, 10.1)}]
    spoilt += [{**sound, "weight": torch.zeros(2, 5)}, {**sound, "weight": torch.zeros(3, 16), "bias": torch.zeros(3)}]
    spoilt += [{**sound, "weight": torch.zeros(16, 2)}, {**sound, "weight": torch.zeros(0, 16), "bias": torch.zeros(0)}]
    return spoilt


def test_numbers_that_no_sound_server_sends(attacked: Node) -> None:
    genuine = attacked.instruction(1)
    fields = {key: getattr(genuine, key) for key in ("run_id", "round_index", "phase", "layout_digest")}
    metadata = {"format": wire.FORMAT, "kind": "instruction+head", "fields": json.dumps(fields)}
    attacks = forged_tensors(genuine)
    assert len(attacks) >= 80
    for tensors in attacks:
        assert attacked.refuses(packed(bytes(save(tensors, metadata=metadata)))) == "protocol"


# ------------------------------------------------------------------------------------------------------- configurations

LOOSER: dict[str, list[Settings]] = {
    "refused": [
        *({"privacy.epsilon": value} for value in (7.01, 8, 1e9, 1e308, float("inf"))),
        *({"privacy.delta": value} for value in (1.1e-3, 0.01, 0.5)),
        *({"privacy.clip_norm": value} for value in (10.1, 1e6, 1e308)),
        *({"privacy.prototype_noise_multiplier": value} for value in (0.19, 0.01, 1e-9, 1e-300)),
        *({"federation.local_steps": value} for value in (101, 10**6, 10**12, 2**63 - 1)),
        *({"federation.rounds": value} for value in (1001, 10**9, 2**63 - 1)),
        *({"federation.clients": value} for value in (1001, 10**9, 2**63 - 1)),
        *({"adapter.rank": value} for value in (65, 10**9, 2**63 - 1)),
        *({"data.max_length": value} for value in (513, 10**9, 2**63 - 1)),
        *({"data.task": value, "model.head": "trained"} for value in ("cola", "stsb", "mnli")),
        *({"model.name": value} for value in ("bert-base-uncased", "/etc", "..", "", "x" * 10_000, "\ud800")),
        {"privacy.seeded_noise": True},
        {"privacy.mechanism": "gredp"},
        {"privacy.mechanism": "gredp", "privacy.gredp_noise": "real"},
        {"privacy.mechanism": "gredp", "privacy.gredp_noise": "real", "privacy.allow_unsound": True},
        {"engine.noise": "device"},
        {"federation.private_evaluation": True},
        {"federation.private_evaluation": True, "privacy.evaluation_noise_multiplier": 1e-9},
    ],
    "bad_input": [
        *({"privacy.mechanism": value} for value in ("none", "laplace", "", "gaussian ", "GAUSSIAN")),
        *({"privacy.epsilon": value} for value in (float("nan"), -1.0, 0, "6", True)),
        *({"privacy.delta": value} for value in (float("nan"), 0.0, -1e-5, 1.0, float("inf"))),
        *({"privacy.clip_norm": value} for value in (0.0, -1.0, float("inf"), float("nan"))),
        *({"federation.local_steps": value} for value in (0, -1, 1.5, True, "ten")),
        *({"federation.rounds": value} for value in (0, -(2**63), 1e9)),
        *({"training.expected_batch_size": value} for value in (0, 212, 10**12, 2**63 - 1)),
        *({"engine.token_budget": value} for value in (0, -1, 1e12, "all")),
        {"adapter.target_modules": ","},
        *(
            {key: "x"}
            for key in ("privacy.epsilom", "policy", "site.ledger", "limits.most_rounds", "a.b.c", "", ".", "x.")
        ),
    ],
    "protocol": [{"adapter.target_modules": ",".join(f"module{number}" for number in range(100_000))}],
}
FREE_TEXT = {"model.name", "data.source", "data.label_skew", "data.partition_column", "adapter.target_modules"}
FREE_TEXT |= {"run.device", "run.out"}


def wrong_types(config: RunConfig) -> list[Settings]:
    """A value of another type for every key there is."""
    flat = config.to_flower()
    assert {key.partition(".")[0] for key in flat} == set(SECTIONS)
    swapped: list[Settings] = [{key: 1 if isinstance(value, bool) else True} for key, value in flat.items()]
    return swapped + [{key: "no such thing"} for key in flat if key not in FREE_TEXT]


def test_configurations_that_the_policy_or_the_schema_does_not_allow(attacked: Node) -> None:
    attacks = [(changes, code) for code, many in LOOSER.items() for changes in many]
    attacks += [(changes, "bad_input") for changes in wrong_types(attacked.config)]
    assert len(attacks) >= 170
    for changes, code in attacks:
        asked = packed(wire.encode_instruction(attacked.instruction(1, changes)))
        assert attacked.refuses(asked, changes) == code, str(changes)[:300]


def test_what_only_the_site_decides_is_not_looked_at(make_node: Callable[[], Node], tmp_path: Path) -> None:
    """Where records lie, what is computed on and how much at once: the same bits, whatever a run says of it."""
    theirs, asked, wanted = tmp_path / "theirs", make_node(), make_node()
    changes = {"data.source": str(theirs), "run.out": str(theirs), "run.device": "cuda:7"}
    changes |= {"engine.token_budget": 10**12, "data.generated_records": 10**12}
    for index in range(2):
        assert torch.equal(asked.honest_round(index, changes).vector, wanted.honest_round(index).vector)
    assert not theirs.exists()
