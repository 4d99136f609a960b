"""Out of fedlora and back: the trained vector as a PEFT adapter folder. The only file that imports peft.

With the model's own head, the folder loads with plain PEFT on `AutoModelForSequenceClassification` and brings that
head along. With a pooled head, the adapter is for `AutoModel` and the head lies beside it:

    adapter_config.json, adapter_model.safetensors    PEFT's own format
    head.json                                         pooling, labels, base model and its digest, token limit
    head.safetensors                                  weight [C, h] and bias [C]; pooled heads only
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fedlora.adapters.methods.layout import Places, Subspace, check_places, frozen_parts
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import ModelConfig
from fedlora.errors import AdapterError, ConfigError, ModelError, RunFolderError
from fedlora.models import Classifier, load_classifier
from fedlora.models.classifier import HEAD_PREFIX
from fedlora.randomness import PublicSeed

if TYPE_CHECKING:
    from peft import PeftModel

_TOKENS_PER_BATCH = 8192
_NEGLIGIBLE = 1e-6
"""Of the largest singular value: what float32 rounds away in any case."""

_Factors = dict[str, tuple[Tensor, Tensor]]
"""By base name B [d_out, r] and A [r, d_in]."""


@dataclass(frozen=True, kw_only=True)
class _HeadFile:
    """Contents of `head.json`: what PEFT's own files do not say about a classifier."""

    base_model: str
    base_digest: str
    kind: Literal["prototype", "frozen", "trained"]
    pooling: Literal["native", "mean", "cls", "last"]
    normalise: bool
    num_labels: int
    labels: list[str]
    max_length: int
    version: int = 1


def export_adapter(
    folder: Path,
    *,
    model: ModelConfig,
    seed: PublicSeed,
    layout: AdapterLayout,
    places: Places,
    theta: Tensor,
    folded: Tensor | None = None,
    subspace: Subspace = "random",
    num_labels: int,
    labels: Sequence[str] = (),
    head: tuple[Tensor, Tensor] | None = None,
    max_length: int = 128,
) -> None:
    """Write the trained vector as a PEFT adapter. The base is read afresh; no live model is touched.

    Args:
        folder: created if missing; files of an earlier export are replaced.
        model: the run's model section; its name is written down as the adapter's base.
        seed: the run's public seed, which A and a random head come from.
        layout: what the numbers of `theta` mean.
        places: paths of the modules that each slot's base name adapts. PEFT knows no sharing: the folder has a copy of
            a shared A and B for each of its modules.
        theta: [P] float32.
        folded: [F] float32 that the base was given beside its weights; PEFT's adapter then has the rank it takes.
        subspace: of fed_sb, where the factors that nobody trains come from.
        num_labels: classes, or 1 for regression.
        labels: class names by id; empty for regression or unnamed classes.
        head: weight [C, h] and bias [C] of a prototype head.
        max_length: tokens at which `ReadyClassifier` cuts its input.

    Raises:
        AdapterError: `theta` or `places` do not fit the layout, or `head` not the model.
        ModelError: the base model is not where it was.
    """
    check_places(layout, places)
    classifier = load_classifier(model, num_labels=num_labels, seed=seed)
    if head is not None:
        classifier.set_head(*head)
    _fill_trained_head(classifier, layout, theta)
    modules = classifier.target_modules([path for paths in places.values() for path in paths])
    frozen = frozen_parts(subspace, seed, modules, layout, places)
    factors = _products(layout, places, theta, *frozen)
    rank, alpha = layout.rank, layout.alpha
    if folded is not None:
        factors = _with_folded(factors, folded, layout.scale)
        rank = alpha = max(len(inner) for _, inner in factors.values())
    adapted = _attach(classifier, places, rank=rank, alpha=alpha, base_name=model.name)
    _fill_adapter(adapted, _prefix(classifier), factors, places)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    if classifier.head is not None:
        from safetensors.torch import save_file

        linear = classifier.head.linear
        save_file({"weight": linear.weight.data, "bias": linear.bias.data}, folder / "head.safetensors")
    facts = _HeadFile(
        base_model=model.name,
        base_digest=classifier.source.digest,
        kind=classifier.head_kind,
        pooling=classifier.pooling,
        normalise=classifier.head is not None and classifier.head.normalise,
        num_labels=num_labels,
        labels=list(labels),
        max_length=max_length,
    )
    (folder / "head.json").write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")


class ReadyClassifier:
    """A trained classifier: texts in, logits or labels out. Made by `load_classifier_from_export`.

    Attributes:
        classifier: with the adapter merged into the base's weights, float32.
        labels: class names by id; empty for regression.
        max_length: tokens at which input is cut.
    """

    def __init__(self, classifier: Classifier, labels: Sequence[str], max_length: int) -> None:
        self.classifier, self.labels, self.max_length = classifier, tuple(labels), max_length

    @torch.inference_mode()
    def logits(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> Tensor:
        """Logits [n, num_labels] float32 on the CPU, in the order of `texts`; `text_pairs` are their second halves."""
        pairs = [] if text_pairs is None else [list(text_pairs)]
        if not texts:
            return torch.empty(0, self.classifier.num_labels)
        tokenizer = self.classifier.tokenizer
        limit = min(self.max_length, tokenizer.model_max_length)
        encoded = tokenizer(list(texts), *pairs, truncation=True, max_length=limit)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        logits = torch.empty(len(lengths), self.classifier.num_labels)
        for rows in _batches_by_length(lengths):
            chosen = {name: [values[row] for row in rows] for name, values in encoded.items()}
            padded = tokenizer.pad(chosen, return_tensors="pt", verbose=False)
            logits[rows] = self.classifier(dict(padded.to(self.classifier.device))).cpu()
        return logits

    def predict(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> list[str] | list[float]:
        """The most likely label of each text, as its name or else its number; for regression, the score."""
        logits = self.logits(texts, text_pairs)
        if self.classifier.num_labels == 1:
            scores: list[float] = logits.squeeze(-1).tolist()
            return scores
        return [self.labels[number] if self.labels else str(number) for number in logits.argmax(dim=-1).tolist()]


def load_classifier_from_export(folder: Path | str, *, device: str | torch.device = "cpu") -> ReadyClassifier:
    """Read what `export_adapter` wrote.

    Args:
        folder: the adapter's folder, or the run folder it lies in.
        device: where the classifier is put.

    Raises:
        RunFolderError: no such folder, or a file in it is missing or damaged.
        ModelError: the base model is not found, or has other weights than the adapter was trained on.
    """
    folder = _adapter_folder(Path(folder))
    facts = _read_facts(folder)
    try:
        model = ModelConfig(
            name=facts.base_model, head=facts.kind, pooling="auto" if facts.pooling == "native" else facts.pooling
        )
    except ConfigError as error:
        raise RunFolderError(f"{folder / 'head.json'} is damaged: {error}") from error
    # All that the public seed had drawn is in the folder, so any seed serves.
    classifier = load_classifier(model, num_labels=facts.num_labels, seed=PublicSeed.from_int(0))
    if classifier.source.digest != facts.base_digest:
        raise ModelError(
            f"base model {facts.base_model} at {classifier.source.reference} has other weights than the adapter in "
            f"{folder} was trained on (SHA-256 {classifier.source.digest[:12]}, wanted {facts.base_digest[:12]}); "
            "put the original weights there"
        )
    _merge_adapter(classifier, folder)
    if classifier.head is not None:
        saved = _read_tensors(folder / "head.safetensors")
        if saved.keys() != {"weight", "bias"}:
            raise RunFolderError(f"{folder / 'head.safetensors'} holds {sorted(saved)}, wanted weight and bias")
        classifier.set_head(saved["weight"], saved["bias"])
    return ReadyClassifier(classifier.to(device), facts.labels, facts.max_length)


def _products(
    layout: AdapterLayout, places: Places, theta: Tensor, inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]
) -> _Factors:
    """B and A of each adapter, with what is frozen of them and, of three factors, the core taken into B."""
    known = {f"{name}/A": factor for name, factor in inner.items()}
    known |= {f"{name}/B": factor for name, factor in outer.items()}
    known |= {slot.name: layout.view(theta, slot) for slot in layout.slots}
    found = {}
    for name in places:
        b, core = known[f"{name}/B"], known.get(f"{name}/R")
        found[name] = (b if core is None else b @ core, known[f"{name}/A"])
    return found


def _with_folded(factors: _Factors, folded: Tensor, scale: float) -> _Factors:
    """Factors of scale B A plus what was folded into the base, all of one rank: the largest that one of them needs."""
    sums, start = {}, 0
    for name, (b, a) in factors.items():
        rows, columns = len(b), a.shape[1]
        sums[name] = (
            folded[start : start + rows * columns].view(rows, columns).double() + scale * b.double() @ a.double()
        )
        start += rows * columns
    divided = {name: torch.linalg.svd(total, full_matrices=False) for name, total in sums.items()}
    rank = max(max(1, int((s > _NEGLIGIBLE * s[0]).sum())) for _, s, _ in divided.values())
    return {
        name: ((u * s.sqrt())[:, :rank].float(), (s.sqrt()[:, None] * vt)[:rank].float())
        for name, (u, s, vt) in divided.items()
    }


def _attach(classifier: Classifier, places: Places, *, rank: int, alpha: float, base_name: str) -> PeftModel:
    """`classifier.network` with an empty PEFT adapter at every module of `places`."""
    from peft import LoraConfig, TaskType, get_peft_model

    # PEFT writes these into the config and the card; the folder they name by default is this machine's alone.
    classifier.network.name_or_path = classifier.network.config.name_or_path = base_name
    prefix = _prefix(classifier)
    targets = [prefix + path for paths in places.values() for path in paths]
    native = classifier.head is None
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if native else TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=_modules_to_save(classifier) if native else None,
    )
    with _undisturbed():
        adapted = get_peft_model(classifier.network, config)
    # PEFT shortens long lists to endings that fit this network: "dense" would mean the pooler too, where there is one.
    adapted.peft_config["default"].target_modules = targets
    return adapted


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """PEFT draws an A that is overwritten at once, and warns about what is handled here or is its own affair."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _modules_to_save(classifier: Classifier) -> list[str]:
    """The head's modules, and what else the base's checkpoint has no weights for, such as BERT's pooler."""
    paths = [*classifier.head_modules(), *classifier.fresh_modules]
    prefix = _prefix(classifier)
    return list(dict.fromkeys(path.removeprefix(prefix).partition(".")[0] for path in paths))


@torch.no_grad()
def _fill_adapter(adapted: PeftModel, prefix: str, factors: _Factors, places: Places) -> None:
    for name, paths in places.items():
        for path in paths:
            layer: Any = adapted.base_model.model.get_submodule(prefix + path)
            for linear, factor in zip((layer.lora_B["default"], layer.lora_A["default"]), factors[name], strict=True):
                linear.weight.copy_(factor)


def _fill_trained_head(classifier: Classifier, layout: AdapterLayout, theta: Tensor) -> None:
    heads = classifier.head_modules()
    for slot in layout.slots:
        if not slot.name.startswith(HEAD_PREFIX):
            continue
        path, _, kind = slot.name.removeprefix(HEAD_PREFIX).rpartition("/")
        if path not in heads or kind not in ("weight", "bias"):
            raise AdapterError(f"slot {slot.name} is no part of this head; it has {', '.join(heads)}")
        with torch.no_grad():
            getattr(heads[path], kind).copy_(layout.view(theta, slot))


def _merge_adapter(classifier: Classifier, folder: Path) -> None:
    """Add B A to the base's weights in place, and put a saved native head where it belongs."""
    from peft import PeftModel, get_peft_model_state_dict

    saved = _read_tensors(folder / "adapter_model.safetensors")
    try:
        with _undisturbed():
            adapted = PeftModel.from_pretrained(classifier.network, str(folder))
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunFolderError(f"adapter in {folder} does not load on {classifier.source.reference}: {reason}") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if wanted != saved.keys():
        raise RunFolderError(
            f"{folder / 'adapter_model.safetensors'} does not fit adapter_config.json: {len(wanted - saved.keys())} "
            f"tensors are missing, {len(saved.keys() - wanted)} unknown; export the adapter again"
        )
    adapted.merge_and_unload()
    for parameter in classifier.parameters():
        parameter.requires_grad_(False)


def _prefix(classifier: Classifier) -> str:
    """What lies before a layout's module path inside `classifier.network`: "bert." under a native head."""
    return "" if classifier.head is not None else f"{classifier.network.base_model_prefix}."


def _batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups of similar length, each of at most `_TOKENS_PER_BATCH` padded tokens, or of a single row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= _TOKENS_PER_BATCH:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    state = "is empty or unfinished" if folder.is_dir() else "does not exist"
    raise RunFolderError(
        f"no adapter in {folder}, which {state}; wanted adapter_config.json there or in its adapter/ folder, "
        "as a finished `fedlora simulate` leaves it"
    )


def _read_facts(folder: Path) -> _HeadFile:
    path = folder / "head.json"
    try:
        facts = _HeadFile(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunFolderError(f"no {path}: not an adapter that fedlora exported; load it with PEFT itself") from error
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; export the adapter again") from error
    if facts.version != 1:
        raise RunFolderError(f"{path} has version {facts.version}, this fedlora reads 1; use a newer fedlora")
    return facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; export the adapter again") from error
    return tensors
