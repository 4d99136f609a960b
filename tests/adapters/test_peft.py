from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapters.dam import Candidate, ModuleMask
from fedlora.adapters.methods.layout import Places, build_layout, frozen_factors
from fedlora.adapters.peft import _batches_by_length, export_adapter, load_classifier_from_export
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import ModelConfig
from fedlora.engine.expanded import ExpandedBackend
from fedlora.errors import AdapterError, ModelError, RunFolderError
from fedlora.models import Classifier, load_classifier
from fedlora.models.families import block_position
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(5)
LABELS = ("bad", "fine", "good")
TEXTS = ["the film was very good", "not bad", "a dull plot but the cast was fine and it is long", "good"]
NATIVE = [
    ("bert", "frozen"),
    ("bert", "trained"),
    ("roberta", "trained"),
    ("distilbert", "trained"),
    ("electra", "trained"),
    ("deberta", "trained"),
    ("deberta-v2", "trained"),
    ("llama", "frozen"),
    ("llama", "trained"),
]
POOLED = [
    ("bert", "prototype", "auto"),
    ("bert", "trained", "mean"),
    ("roberta", "frozen", "cls"),
    ("llama", "prototype", "auto"),
]


def export(folder: Path, model: ModelConfig, **how: Any) -> tuple[Classifier, AdapterLayout, Tensor]:
    """Export random numbers; what comes back is a classifier that has them added to its weights by hand."""
    classifier = load_classifier(model, num_labels=3, seed=SEED)
    targets = classifier.target_modules(["in_proj" if classifier.family == "deberta" else "value", "up"])
    heads = classifier.head_modules() if model.head == "trained" else {}
    places = {path: (path,) for path in targets}
    layout = build_layout(targets, heads, places=places, rank=2, alpha=3.0)
    factors = frozen_factors(SEED, targets, places, 2)
    theta = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)) / 4
    head = None
    if model.head == "prototype":
        head = (torch.randn(3, classifier.hidden_size), torch.randn(3))
        classifier.set_head(*head)
    with torch.no_grad():
        for slot in layout.slots:
            path, _, kind = slot.name.rpartition("/")
            value = layout.view(theta, slot)
            if kind == "B":
                targets[path].weight += layout.scale * value @ factors[path]
            else:
                getattr(heads[path.removeprefix("head:")], kind).copy_(value)
    export_adapter(
        folder,
        model=model,
        seed=SEED,
        layout=layout,
        places=places,
        theta=theta,
        num_labels=3,
        labels=LABELS,
        head=head,
        **how,
    )
    return classifier, layout, theta


@pytest.fixture
def exported(tiny_model, tmp_path) -> Path:
    export(tmp_path / "adapter", ModelConfig(name=str(tiny_model("bert"))))
    return tmp_path


def logits(classifier: Classifier) -> Tensor:
    with torch.inference_mode():
        return classifier(dict(classifier.tokenizer(TEXTS, padding=True, return_tensors="pt")))


@pytest.mark.parametrize(("family", "head", "pooling"), [*((*case, "auto") for case in NATIVE), *POOLED])
def test_what_is_exported_loads_as_the_same_classifier(tiny_model, tmp_path, family, head, pooling):
    model = ModelConfig(name=str(tiny_model(family)), head=head, pooling=pooling)
    by_hand, _, _ = export(tmp_path, model)
    ready = load_classifier_from_export(tmp_path)
    torch.testing.assert_close(ready.logits(TEXTS), logits(by_hand), atol=1e-5, rtol=1e-5)
    assert ready.predict(TEXTS) == [LABELS[number] for number in logits(by_hand).argmax(dim=1)]


@pytest.mark.parametrize(("family", "head"), NATIVE)
def test_native_heads_load_with_plain_peft(tiny_model, tmp_path, family, head):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = tiny_model(family)
    by_hand, _, _ = export(tmp_path, ModelConfig(name=str(base), head=head))
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, pad_token_id=by_hand.tokenizer.pad_token_id
    )
    adapted = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    batch = by_hand.tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(adapted(**batch).logits, logits(by_hand), atol=1e-5, rtol=1e-5)


def test_pooled_heads_are_a_plain_peft_adapter_and_a_linear_map(tiny_model, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel

    base = tiny_model("bert")
    by_hand, _, _ = export(tmp_path, ModelConfig(name=str(base)))
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path)).eval()
    batch = by_hand.tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = adapted(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    embedded = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    head = load_file(tmp_path / "head.safetensors")
    torch.testing.assert_close(embedded @ head["weight"].T + head["bias"], logits(by_hand), atol=1e-5, rtol=1e-5)


def masked_places(classifier: Classifier, *, shared: bool) -> Places:
    """Two linears of every five; the others share with their type or have no adapter."""
    candidates = tuple(
        Candidate(
            module=path,
            layer=block_position(path, classifier.family)[0],
            kind=block_position(path, classifier.family)[1],
            in_features=linear.in_features,
            out_features=linear.out_features,
        )
        for path, linear in classifier.target_modules(["all"]).items()
    )
    mask = ModuleMask(candidates, tuple(place % 5 in (1, 4) for place in range(len(candidates))))
    return {path: (path,) for path in mask.modules} | (dict(mask.sharing) if shared else {})


@pytest.mark.parametrize("shared", [False, True], ids=["chosen only", "sharing"])
@pytest.mark.parametrize("layers", [2, 11], ids=["short list", "a list that PEFT condenses"])
@pytest.mark.parametrize("head", ["trained", "prototype"])
def test_plain_peft_adapts_exactly_the_masked_modules_and_gives_our_logits(tiny_model, tmp_path, head, layers, shared):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModel, AutoModelForSequenceClassification

    base = tiny_model("bert", num_hidden_layers=layers)
    model = ModelConfig(name=str(base), head=head)
    ours = load_classifier(model, num_labels=3, seed=SEED)
    places = masked_places(ours, shared=shared)
    modules = ours.target_modules(["all"])
    layout = build_layout(modules, ours.head_modules() if head == "trained" else {}, places=places, rank=2, alpha=3.0)
    theta = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)) / 8
    own_head = (torch.randn(3, 16), torch.randn(3)) if head == "prototype" else None
    if own_head is not None:
        ours.set_head(*own_head)
    backend = ExpandedBackend(ours, layout, frozen_factors(SEED, modules, places, 2), places)
    encoded = ours.tokenizer(TEXTS, padding=True, return_tensors="pt")
    wanted = backend.logits(theta, dict(encoded))
    facts = {"model": model, "seed": SEED, "layout": layout, "places": places, "theta": theta, "num_labels": 3}
    export_adapter(tmp_path, **facts, labels=LABELS, head=own_head)
    torch.testing.assert_close(load_classifier_from_export(tmp_path).logits(TEXTS), wanted, atol=1e-5, rtol=1e-5)

    plain = AutoModel.from_pretrained(base)
    if head == "trained":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    prefix = "base_model.model.bert." if head == "trained" else "base_model.model."
    covered = {prefix + path for paths in places.values() for path in paths}
    found = {path: module for path, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert found.keys() == covered
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {f"base_model.model.{path}" for path in written} == covered
    for paths in places.values():
        first, *others = (found[prefix + path] for path in paths)
        for other in others:
            assert torch.equal(first.lora_A["default"].weight, other.lora_A["default"].weight)
            assert torch.equal(first.lora_B["default"].weight, other.lora_B["default"].weight)
    if head == "trained":
        torch.testing.assert_close(adapted(**encoded).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_pooler_without_weights_travels_with_the_adapter(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    base = tmp_path / "base"
    AutoModel.from_pretrained(tiny_model("bert"), add_pooling_layer=False).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model("bert")).save_pretrained(base)
    by_hand, _, _ = export(tmp_path / "adapter", ModelConfig(name=str(base), head="frozen"))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    batch = by_hand.tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(adapted(**batch).logits, logits(by_hand), atol=1e-5, rtol=1e-5)


def test_the_files_name_the_base_and_no_wrapper(tiny_model, tmp_path, monkeypatch, untouched_global_generator):
    from safetensors import safe_open

    folder = tiny_model("roberta")
    monkeypatch.chdir(folder.parent)
    name = folder.name
    _, layout, _ = export(tmp_path, ModelConfig(name=name, head="trained"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (name, "SEQ_CLS")
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    for slot in layout.slots:
        if slot.name.endswith("/B"):
            assert f"base_model.model.roberta.{slot.name.removesuffix('/B')}.lora_B.weight" in keys
    assert not any("_module." in key or ".default" in key for key in keys)
    for file in tmp_path.iterdir():
        assert str(folder.parent).encode() not in file.read_bytes(), f"{file.name} names a folder of this machine"


def test_regression_predicts_scores(tiny_model, tmp_path):
    model = ModelConfig(name=str(tiny_model("bert")), head="trained")
    classifier = load_classifier(model, num_labels=1, seed=SEED)
    queries = classifier.target_modules(["query"])
    places = {path: (path,) for path in queries}
    layout = build_layout(queries, classifier.head_modules(), places=places, rank=2, alpha=2)
    theta = torch.ones(layout.size)
    export_adapter(tmp_path, model=model, seed=SEED, layout=layout, places=places, theta=theta, num_labels=1)
    ready = load_classifier_from_export(tmp_path)
    assert ready.predict(TEXTS, TEXTS) == pytest.approx(ready.logits(TEXTS, TEXTS).flatten().tolist())
    assert all(isinstance(score, float) for score in ready.predict(TEXTS))


def test_a_run_folder_serves_as_well_and_order_and_batching_change_nothing(exported, monkeypatch):
    ready = load_classifier_from_export(exported)
    expected = ready.logits(TEXTS)
    monkeypatch.setattr("fedlora.adapters.peft._TOKENS_PER_BATCH", 12)
    torch.testing.assert_close(ready.logits(TEXTS), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ready.logits(TEXTS[::-1]), expected.flip(0), atol=1e-6, rtol=1e-5)
    assert ready.logits([]).shape == (0, 3)
    assert ready.predict([]) == []


def test_long_input_is_cut(tiny_model, tmp_path):
    export(tmp_path, ModelConfig(name=str(tiny_model("bert"))), max_length=8)
    ready = load_classifier_from_export(tmp_path)
    torch.testing.assert_close(ready.logits(["good " * 500]), ready.logits(["good " * 6]))


def test_batches_stay_within_the_budget(monkeypatch):
    monkeypatch.setattr("fedlora.adapters.peft._TOKENS_PER_BATCH", 10)
    lengths = [3, 12, 5, 1, 5, 2]
    batches = _batches_by_length(lengths)
    assert sorted(row for rows in batches for row in rows) == list(range(6))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 10 for rows in batches)


def test_a_vector_of_another_layout_is_refused(tiny_model, tmp_path):
    model = ModelConfig(name=str(tiny_model("bert")))
    given = {"model": model, "seed": SEED, "num_labels": 3}
    query = "encoder.layer.0.attention.self.query"
    layout = AdapterLayout.build({f"{query}/B": (16, 2)}, method="ffa", rank=2, alpha=2)
    with pytest.raises(AdapterError, match="31 numbers"):
        export_adapter(tmp_path, layout=layout, places={query: (query,)}, theta=torch.zeros(31), **given)
    with pytest.raises(AdapterError, match="places are for 0"):
        export_adapter(tmp_path, layout=layout, places={}, theta=torch.zeros(32), **given)
    wrong = AdapterLayout.build({"head:nowhere/weight": (3, 16)}, method="ffa", rank=2, alpha=2)
    with pytest.raises(AdapterError, match="nowhere"):
        export_adapter(tmp_path, layout=wrong, places={}, theta=torch.zeros(48), **given)


# -------------------------------------------------------------------------------------------------- damaged folders


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(RunFolderError, match="does not exist"):
        load_classifier_from_export(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="empty or unfinished"):
        load_classifier_from_export(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors", "head.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [None, b"\x00broken", b"{}"])
def test_missing_and_damaged_files_are_named(exported, name, content):
    path = exported / "adapter" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        load_classifier_from_export(exported)
    assert "\n" not in str(caught.value)
    assert str(exported) in str(caught.value)


def test_an_adapter_that_lost_tensors_is_refused(exported):
    from safetensors.torch import load_file, save_file

    path = exported / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(RunFolderError, match="1 tensors are missing"):
        load_classifier_from_export(exported)


def test_other_base_weights_are_refused(exported):
    path = exported / "adapter" / "head.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "base_digest": "0" * 64}))
    with pytest.raises(ModelError, match="other weights"):
        load_classifier_from_export(exported)
