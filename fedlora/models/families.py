"""What each model family calls the linear maps of its transformer blocks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedlora.errors import ModelError

ALL = "all"
"""In the place of a type: every linear of a block that a type, or several fused into one, names."""
MODULE_TYPES = ("query", "key", "value", "attention_output", "up", "down", "gate")


@dataclass(frozen=True)
class Family:
    """Names inside a base model (`AutoModel`) of one architecture.

    Attributes:
        blocks: path of the list of transformer blocks.
        types: canonical module type -> path inside a block.
        decoder: whether a token sees only what is before it, so that the last one stands for the text.
        fused: a linear that computes several canonical types at once -> the types it stands for.
        shared_input: linears of a block that are also, or only, called on something that all samples share (relative
            position embeddings, batch size 1), and the config flag that makes them so, "" for always.
        blocks_return_pairs: whether a block returns hidden states and attention weights, and not the states alone.
    """

    blocks: str
    types: Mapping[str, str]
    decoder: bool = False
    fused: Mapping[str, Sequence[str]] | None = None
    shared_input: Mapping[str, str] | None = None
    blocks_return_pairs: bool = False


_BERT_REST = {"attention_output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
_BERT = Family(
    "encoder.layer",
    {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value", **_BERT_REST},
)
_DISTILBERT = Family(
    "transformer.layer",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
)
_DEBERTA = Family(
    "encoder.layer",
    _BERT_REST,
    fused={"attention.self.in_proj": ("query", "key", "value")},
    shared_input={"attention.self.pos_proj": "", "attention.self.pos_q_proj": ""},
    blocks_return_pairs=True,
)
_DEBERTA_V2 = Family(
    "encoder.layer",
    {
        "query": "attention.self.query_proj",
        "key": "attention.self.key_proj",
        "value": "attention.self.value_proj",
        **_BERT_REST,
    },
    shared_input={
        "attention.self.query_proj": "share_att_key",
        "attention.self.key_proj": "share_att_key",
        "attention.self.pos_key_proj": "",
        "attention.self.pos_query_proj": "",
    },
    blocks_return_pairs=True,
)
_LLAMA = Family(
    "layers",
    {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "gate": "mlp.gate_proj",
    },
    decoder=True,
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA_V2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def is_decoder(family: str) -> bool:
    return family in FAMILIES and FAMILIES[family].decoder


def select_linears(linears: Mapping[str, nn.Linear], family: str, types: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears that `types` names, in the model's order.

    Args:
        linears: all linears of the base model, path -> module, in module order.
        family: the config's `model_type`.
        types: canonical types (MODULE_TYPES), which mean linears of transformer blocks only; "all", which means all of
            them; or endings of paths, matched by whole components ("self.query" matches "….attention.self.query",
            "uery" does not).

    Raises:
        ModelError: an entry matches nothing.
    """
    chosen = set()
    for entry in types:
        matching = _matching(list(linears), family, entry)
        if not matching:
            raise ModelError(_explain_no_match(entry, family, list(linears)))
        chosen.update(matching)
    return {path: linear for path, linear in linears.items() if path in chosen}


def shared_input_paths(paths: Sequence[str], family: str, config: object) -> set[str]:
    """Those of `paths` that see something all samples share; see `Family.shared_input`."""
    if family not in FAMILIES or not getattr(config, "relative_attention", False):
        return set()
    known = FAMILIES[family]
    shared = {inner for inner, flag in (known.shared_input or {}).items() if not flag or getattr(config, flag, False)}
    return {path for path in paths if _inside_block(path, known.blocks) in shared}


def block_position(path: str, family: str) -> tuple[int, str]:
    """Layer and type of a linear: its block's number and canonical type, or what stands for them in its path.

    "encoder.layer.3.output.dense" -> (3, "down"). A linear of no known type has its path within the block for a type,
    one outside the blocks layer -1 and its whole path.
    """
    known = FAMILIES.get(family)
    numbers = [(place, part) for place, part in enumerate(path.split(".")) if part.isdigit()]
    if not numbers:
        return -1, path
    place, number = numbers[0]
    inner = ".".join(path.split(".")[place + 1 :])
    names = {inside: kind for kind, inside in known.types.items()} if known else {}
    return int(number), names.get(inner, inner)


def blocks_below(paths: Iterable[str], family: str) -> int:
    """How many blocks come before the first that any of `paths` lies in.

    0 where nothing certain can be said: no paths, one outside the blocks, or a family whose blocks are not known.
    """
    known = FAMILIES.get(family)
    if known is None:
        return 0
    first = (block_position(path, family)[0] if _inside_block(path, known.blocks) else 0 for path in paths)
    return min(first, default=0)


def _matching(paths: Sequence[str], family: str, entry: str) -> list[str]:
    if entry == ALL and family in FAMILIES:
        inside = {*FAMILIES[family].types.values(), *(FAMILIES[family].fused or {})}
        return [path for path in paths if _inside_block(path, FAMILIES[family].blocks) in inside]
    if entry not in MODULE_TYPES:
        return [path for path in paths if f".{path}".endswith(f".{entry}")]
    if family not in FAMILIES or entry not in FAMILIES[family].types:
        return []
    known = FAMILIES[family]
    return [path for path in paths if _inside_block(path, known.blocks) == known.types[entry]]


def _inside_block(path: str, blocks: str) -> str | None:
    """The path within its block ("encoder.layer.3.output.dense" -> "output.dense"), or None outside `blocks`."""
    prefix = f"{blocks}."
    index, _, inner = path.removeprefix(prefix).partition(".")
    return inner if path.startswith(prefix) and index.isdigit() else None


def _explain_no_match(entry: str, family: str, paths: Sequence[str]) -> str:
    known = FAMILIES.get(family)
    for path, types in ((known.fused or {}) if known else {}).items():
        if entry in types:
            name = path.rpartition(".")[2]
            return (
                f"target module {entry!r}: {family} computes {', '.join(types)} in one linear, {name}; "
                f'write target_modules = ["{name}"] to adapt all of them together'
            )
    endings = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    types = tuple(known.types) if known else ()
    near = difflib.get_close_matches(entry, [*types, *endings, *paths], n=1)
    return (
        f"target module {entry!r} matches nothing in this {family} model; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + (f"types: {', '.join(types)}; " if types else f"no types are known for {family}, give name endings; ")
        + f"name endings: {', '.join(endings[:12])}; for example {', '.join(paths[:2])}"
    )
