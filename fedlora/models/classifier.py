"""Classifier: a frozen base model, a pooling and a head, read from one `ModelConfig`.

Two shapes. *Native*: `AutoModelForSequenceClassification` with the head its family defines. *Pooled*: `AutoModel`,
then mean, first or last token, then one linear map of ours. The base may run in bfloat16; what leaves it is cast to
float32 at once, so pooling, normalisation, heads and logits are float32 always.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fedlora.config import ModelConfig
from fedlora.errors import AdapterError, ModelError
from fedlora.models.families import FAMILIES, is_decoder, select_linears, shared_input_paths
from fedlora.models.loading import load_network, load_tokenizer
from fedlora.models.source import ModelSource, Pooling, locate_model
from fedlora.randomness import PublicSeed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_PREFIX = "head:"
_STATES_BEFORE = "states before block "
_INITIAL_STD = 0.02  # where a config names no initializer_range


class PooledHead(nn.Module):
    """Our head over a pooled embedding: one linear map, for a prototype head of the L2-normalised embedding."""

    def __init__(self, hidden_size: int, num_labels: int, *, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        # Without torch's initialisation, which would draw from the global generator; `load_classifier` fills it.
        self.linear = nn.utils.skip_init(nn.Linear, hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:  # [N, h] -> [N, C]
        logits: Tensor = self.linear(nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled)
        return logits


class _HandsOn(nn.Module):
    """Stands in the place of a transformer block: hands on `states`, or what it is given."""

    def __init__(self, *, in_pairs: bool, states: Tensor | None = None) -> None:
        super().__init__()
        self.in_pairs, self.states = in_pairs, states

    def forward(self, given: Tensor, *_rest: Any, **_named: Any) -> Tensor | tuple[Tensor, None]:
        states = given if self.states is None else self.states
        return (states, None) if self.in_pairs else states


class Classifier(nn.Module):
    """Token batch in, logits out. Nothing in it requires a gradient: what trains lives outside, as one flat vector.

    Made by `load_classifier`.

    Attributes:
        network: the Hugging Face model: `AutoModelForSequenceClassification` if native, else `AutoModel`.
        tokenizer: its tokenizer; pads on the right and always has a padding token.
        source: where the model was found.
        family: the config's `model_type`, such as "bert".
        pooling: "native" or the pooling in use.
        head_kind: "prototype", "frozen" or "trained", as configured.
        fresh_modules: paths inside `network` of modules that the checkpoint has no weights for; they were drawn from
            the public seed.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: ModelSource,
        *,
        head_kind: Literal["prototype", "frozen", "trained"],
        pooling: Literal["native"] | Pooling,
        num_labels: int,
        fresh_modules: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.source = network, tokenizer, source
        self.head_kind, self.pooling, self.num_labels = head_kind, pooling, num_labels
        self.fresh_modules = tuple(fresh_modules)
        self.family: str = network.config.model_type
        self.hidden_size: int = network.config.hidden_size
        self.head: PooledHead | None = None
        if pooling != "native":
            self.head = PooledHead(self.hidden_size, num_labels, normalise=head_kind == "prototype")
        self._inputs = _accepted_inputs(network)
        # Remembered, because `replace_module` hides the originals.
        self._backbone_linears = _linears(self.backbone)
        self._head_linears = _linears(self.head or network, skip=self.backbone)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.backbone.register_forward_hook(_as_float32)
        self.eval()

    @property
    def backbone(self) -> nn.Module:
        """The `AutoModel` root; paths of `target_modules` are relative to it."""
        return cast(nn.Module, self.network.base_model)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.network.device)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [N, num_labels] float32 of a right-padded batch; regression has one label.

        Args:
            batch: `input_ids` and `attention_mask`, [N, T] int64; `token_type_ids` too, ignored by models without.
                With hidden states of `states_before` [N, T, h] under `states_key`, the blocks below are left out;
                what they hold where nothing is attended to does not matter, as long as it is finite.
        """
        with self._stand_ins(self._skipped(batch)):
            if self.head is not None:
                return cast(Tensor, self.head(self._pooled(batch)))
            return cast(Tensor, self.network(**self._known(batch)).logits)

    @torch.no_grad()
    def states_before(self, block: int, batch: dict[str, Tensor]) -> Tensor:
        """What `block`, 1 or more, is given for `batch`: hidden states [N, T, h] in the base's dtype.

        Constant for a record as long as nothing below is adapted.

        Raises:
            ModelError: the family's blocks are not known, or there are not as many.
        """
        blocks = self._blocks()
        if not 0 < block <= len(blocks):
            raise ModelError(f"no hidden states before block {block} of {len(blocks)}; wanted 1 to {len(blocks)}")
        seen: list[Any] = []
        hook = blocks[block - 1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with self._stand_ins(dict.fromkeys(range(block, len(blocks)), self._hands_on())):
                self.backbone(**self._known(batch))
        finally:
            hook.remove()
        return cast(Tensor, seen[0][0] if FAMILIES[self.family].blocks_return_pairs else seen[0])

    @staticmethod
    def states_key(block: int) -> str:
        """Under which `forward` finds the hidden states before `block` in a batch."""
        return f"{_STATES_BEFORE}{block}"

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled embeddings [N, h] float32 of L2 norm 1.

        Raises:
            ModelError: the model's own head is in use, which pools for itself.
        """
        return nn.functional.normalize(self._pooled(batch), dim=-1)

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Install the weight [C, h] and bias [C] of a pooled head, such as class prototypes.

        Raises:
            AdapterError: wrong shapes, or the head is the model's own.
        """
        if self.head is None:
            raise AdapterError("this classifier uses the model's own head; only a pooled head can be set")
        linear = self.head.linear
        if weight.shape != linear.weight.shape or bias.shape != linear.bias.shape:
            raise AdapterError(
                f"head of shape {tuple(weight.shape)} and {tuple(bias.shape)}, "
                f"wanted {tuple(linear.weight.shape)} and {tuple(linear.bias.shape)}"
            )
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def clear_head(self) -> None:
        """A prototype head as it was before any prototypes were set; nothing to do for the model's own."""
        if self.head is not None:
            self.set_head(torch.zeros_like(self.head.linear.weight), torch.zeros_like(self.head.linear.bias))

    def target_modules(self, types: Sequence[str]) -> dict[str, nn.Linear]:
        """The backbone's linears that `types` names: path inside `backbone` -> original module, in model order.

        Args:
            types: canonical types ("query", "value", …) or endings of paths; see `families.select_linears`.

        Raises:
            ModelError: an entry matches nothing.
        """
        return select_linears(self._backbone_linears, self.family, types)

    def shared_input_modules(self) -> set[str]:
        """Paths of backbone linears that see an input which all samples share, of batch size 1.

        DeBERTa projects its relative position embeddings once for the whole batch, v2 and v3 with the attention's own
        query and key. Such a module has no row per sample to attach a per-sample adapter to.
        """
        return shared_input_paths(list(self._backbone_linears), self.family, self.network.config)

    def head_modules(self) -> dict[str, nn.Linear]:
        """The head's linears: path inside the head's owner (`network` if native, else `head`) -> original module."""
        return dict(self._head_linears)

    def replace_module(self, path: str, module: nn.Module) -> None:
        """Put `module` at a path of `target_modules`, or of `head_modules` when prefixed "head:"."""
        owner: nn.Module = self.backbone
        if path.startswith(HEAD_PREFIX):
            owner, path = self.head or self.network, path.removeprefix(HEAD_PREFIX)
        owner.set_submodule(path, module)

    def _blocks(self) -> nn.ModuleList:
        known = FAMILIES.get(self.family)
        return cast(nn.ModuleList, self.backbone.get_submodule(known.blocks)) if known else nn.ModuleList()

    def _hands_on(self, states: Tensor | None = None) -> _HandsOn:
        return _HandsOn(in_pairs=FAMILIES[self.family].blocks_return_pairs, states=states)

    def _skipped(self, batch: Mapping[str, Tensor]) -> dict[int, _HandsOn]:
        """Stand-ins for the blocks below those states that `batch` brings."""
        for name, states in batch.items():
            if name.startswith(_STATES_BEFORE):
                last = int(name.removeprefix(_STATES_BEFORE)) - 1
                return {**dict.fromkeys(range(last), self._hands_on()), last: self._hands_on(states)}
        return {}

    @contextmanager
    def _stand_ins(self, stand_ins: Mapping[int, nn.Module]) -> Iterator[None]:
        """For the duration, put modules in the places of blocks.

        Embeddings, masks and positions are still made by the model's own code, which is each family's own; and the
        others stay in their places, since some depend on them.
        """
        blocks = self._blocks() if stand_ins else nn.ModuleList()
        originals = {place: blocks[place] for place in stand_ins}
        try:
            for place, module in stand_ins.items():
                blocks[place] = module
            yield
        finally:
            for place, module in originals.items():
                blocks[place] = module

    def _known(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in self._inputs if name in batch}

    def _pooled(self, batch: dict[str, Tensor]) -> Tensor:
        if self.pooling == "native":
            raise ModelError(
                "the model's own head pools for itself; set model.pooling to mean, cls or last for embeddings"
            )
        hidden = self.backbone(**self._known(batch)).last_hidden_state  # [N, T, h] float32
        return _pool(hidden, batch["attention_mask"], self.pooling)


def load_classifier(
    model: ModelConfig,
    *,
    num_labels: int,
    seed: PublicSeed,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Literal["auto", "eager", "sdpa"] = "auto",
) -> Classifier:
    """Find, read and freeze the model that `model` describes.

    Weights that the checkpoint lacks (a new head) come from `seed`, each from a stream of its own name; torch's global
    generators are left as they were.

    Args:
        model: name, head and pooling are read; its dtype and attention may be "auto" and are resolved by the caller.
        num_labels: classes, or 1 for regression.
        seed: the run's public seed.
        device: where the classifier is put.
        dtype: of the frozen base; heads are float32.
        attention: kernel; "auto" leaves the choice to transformers.

    Raises:
        ModelError: not found, unreadable, incomplete, or without the asked attention kernel.
    """
    source = locate_model(model.name)
    native = model.head != "prototype" and model.pooling == "auto"
    network, missing = load_network(source, num_labels=num_labels if native else None, dtype=dtype, attention=attention)
    tokenizer = load_tokenizer(source, network)
    fresh = _draw_missing(network, missing, seed)
    classifier = Classifier(
        network,
        tokenizer,
        source,
        head_kind=model.head,
        pooling="native" if native else _resolve_pooling(model, source, network.config.model_type),
        num_labels=num_labels,
        fresh_modules=fresh,
    )
    if classifier.head is not None:
        _initialise_pooled_head(classifier.head, model.head, seed, _initial_std(network))
    return classifier.to(device)


def _resolve_pooling(model: ModelConfig, source: ModelSource, family: str) -> Pooling:
    if model.pooling != "auto":
        return model.pooling
    return source.pooling or ("last" if is_decoder(family) else "mean")


def _draw_missing(network: PreTrainedModel, missing: Sequence[str], seed: PublicSeed) -> list[str]:
    """Fill parameters that the checkpoint lacks from `seed`, cast the head to float32; the modules they are in."""
    backbone = network.base_model
    for child in network.children():
        if child is not backbone and network is not backbone:
            child.float()
    parameters = dict(network.named_parameters())
    for name in missing:
        _draw(parameters[name], name, seed, _initial_std(network))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in missing))


def _initialise_pooled_head(head: PooledHead, kind: str, seed: PublicSeed, std: float) -> None:
    for name, parameter in head.named_parameters():
        if kind == "prototype":
            nn.init.zeros_(parameter)
        else:
            _draw(parameter, name, seed, std)


def _draw(parameter: nn.Parameter, name: str, seed: PublicSeed, std: float) -> None:
    """Normal matrices and zero vectors, as BERT's authors initialise a new head."""
    with torch.no_grad():
        if parameter.dim() < 2:
            parameter.zero_()
        else:
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=seed.torch("head", name))
            parameter.copy_(values)


def _initial_std(network: PreTrainedModel) -> float:
    return float(getattr(network.config, "initializer_range", _INITIAL_STD))


def _linears(root: nn.Module, skip: nn.Module | None = None) -> dict[str, nn.Linear]:
    skipped = set(skip.modules()) if skip is not None else set()
    return {
        path: module for path, module in root.named_modules() if isinstance(module, nn.Linear) and module not in skipped
    }


def _accepted_inputs(network: PreTrainedModel) -> tuple[str, ...]:
    """Tokenizers return token types for models that have none (DistilBERT) or know a single one (RoBERTa)."""
    accepted = ("input_ids", "attention_mask")
    segments = getattr(network.config, "type_vocab_size", 0) or 0
    if segments > 1 and "token_type_ids" in inspect.signature(network.forward).parameters:
        return (*accepted, "token_type_ids")
    return accepted


def _as_float32(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Cast what leaves the backbone; the one seam between its dtype and ours."""
    for key, value in output.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            output[key] = value.float()
    return output


def _pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text, [N, h], from hidden states [N, T, h] under a right-padded mask [N, T]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)  # a text without tokens
