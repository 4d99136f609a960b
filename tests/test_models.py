from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.config import ModelConfig
from fedlora.errors import AdapterError, ModelError
from fedlora.models import Classifier, families, load_classifier, locate_model, source
from fedlora.models.source import ModelSource
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(3)
TEXTS = ["the film was very good", "not bad", "a dull plot but the cast was fine and it is long"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "deberta", "deberta-v2"]
FAMILIES = [*ENCODERS, "llama"]


def load(folder: Path | str, *, head: str = "frozen", pooling: str = "auto", labels: int = 3, **how: Any) -> Classifier:
    model = ModelConfig(name=str(folder), head=head, pooling=pooling)  # type: ignore[arg-type]
    return load_classifier(model, num_labels=labels, seed=how.pop("seed", SEED), **how)


def tokens(classifier: Classifier, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(classifier.tokenizer(texts, padding=True, return_tensors="pt"))


# ------------------------------------------------------------------------------------------------ where models are


def test_a_local_folder_comes_first(tiny_model, monkeypatch):
    folder = tiny_model("bert")
    monkeypatch.chdir(folder.parent)
    found = locate_model(folder.name)
    assert (found.kind, found.folder) == ("folder", folder.resolve())


def test_digest_is_that_of_the_weights_file(tiny_model):
    folder = tiny_model("bert")
    assert locate_model(str(folder)).digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_digest_of_shards_depends_on_all_of_them(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    before = ModelSource("folder", "x", tmp_path).digest
    (tmp_path / "model-2.safetensors").write_bytes(b"other")
    assert ModelSource("folder", "x", tmp_path).digest != before


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls"), ("pooling_mode_lasttoken", "last")],
)
def test_pooling_is_read_from_the_sentence_transformers_files(tmp_path, mode, expected):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}])
    )
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({mode: True, "pooling_mode_max_tokens": False}))
    assert ModelSource("folder", "x", tmp_path).pooling == expected


def test_no_pooling_without_these_files(tiny_model):
    assert locate_model(str(tiny_model("bert"))).pooling is None


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"])
def test_minilm_is_found_in_its_weights_package(minilm, name):
    found = locate_model(name)
    assert (found.kind, found.pooling) == ("package", "mean")
    assert found.digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_a_hub_model_is_its_snapshot_folder(tiny_model, monkeypatch):
    snapshot = tiny_model("bert")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    found = locate_model("someone/some-bert")
    assert (found.kind, found.reference, found.folder) == ("hub", "someone/some-bert", snapshot)
    assert load("someone/some-bert").source == found


def test_offline_says_at_once_where_it_looked(monkeypatch):
    def refuse(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        assert local_files_only, "the network was asked although HF_HUB_OFFLINE is set"
        raise FileNotFoundError("not cached")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setitem(source._WEIGHTS_PACKAGES, "someone/some-bert", ("no_such_weights_package", "model"))
    with pytest.raises(ModelError) as caught:
        locate_model("someone/some-bert")
    for place in ("folder someone/some-bert", "weights package no-such-weights-package", "hub cache", "HF_HUB_OFFLINE"):
        assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_is_never_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="not a hub id"):
        locate_model("./no/such/folder")


# ------------------------------------------------------------------------------------------------- broken folders


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_one_clear_line(tiny_model, tmp_path, damaged):
    folder = shutil.copytree(tiny_model("bert"), tmp_path / "model")
    (folder / damaged).write_bytes(b"\x00broken")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "cannot load" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("bert"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"do not fit its config\.json"):
        load(folder)


def test_an_attention_kernel_the_family_lacks_is_refused(tiny_model):
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        load(tiny_model("deberta-v2"), attention="sdpa")


# ---------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["auto", "cls", "mean", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_every_family_and_pooling(tiny_model, family, pooling, dtype):
    classifier = load(tiny_model(family), pooling=pooling, dtype=dtype)
    batch = tokens(classifier)
    logits = classifier(batch)
    assert (logits.dtype, logits.shape) == (torch.float32, (3, 3))
    assert torch.isfinite(logits).all()
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert all(module.weight.dtype == torch.float32 for module in classifier.head_modules().values())
    assert torch.equal(classifier.train()(batch), logits), "training mode must change nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["auto", "mean", "last"])
def test_padding_changes_nothing(tiny_model, family, pooling):
    classifier = load(tiny_model(family), pooling=pooling)
    together = classifier(tokens(classifier))
    alone = torch.cat([classifier(tokens(classifier, [text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_native_logits_are_those_of_transformers_with_this_head(tiny_model, family):
    from transformers import AutoModelForSequenceClassification

    folder = tiny_model(family)
    classifier = load(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=classifier.tokenizer.pad_token_id
    ).eval()
    for path, module in classifier.head_modules().items():
        plain.get_submodule(path).load_state_dict(module.state_dict())
    batch = tokens(classifier)
    torch.testing.assert_close(classifier(batch), plain(**batch).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("electra", ["classifier.dense", "classifier.out_proj"]),
        ("deberta", ["pooler.dense", "classifier"]),
        ("deberta-v2", ["pooler.dense", "classifier"]),
        ("llama", ["score"]),
    ],
)
def test_head_modules_of_native_heads(tiny_model, family, expected):
    classifier = load(tiny_model(family))
    assert list(classifier.head_modules()) == expected
    assert list(classifier.fresh_modules) == expected
    assert classifier.pooling == "native"


def test_regression_has_one_output(tiny_model):
    for pooling in ("auto", "mean"):
        assert load(tiny_model("bert"), pooling=pooling, labels=1)(tokens(load(tiny_model("bert")))).shape == (3, 1)


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_new_heads_come_from_the_public_seed_alone(tiny_model, pooling, untouched_global_generator):
    def head(seed: PublicSeed) -> Tensor:
        linears = load(tiny_model("roberta"), pooling=pooling, seed=seed).head_modules().values()
        return torch.cat([linear.weight.flatten() for linear in linears])

    first = head(SEED)
    torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, head(SEED))
    assert not torch.equal(first, head(PublicSeed.from_int(4)))
    assert first.std() > 0


def test_a_pooler_without_weights_is_drawn_from_the_public_seed_too(tiny_model, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_model("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    for file in tiny_model("bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    first, second = load(tmp_path), load(tmp_path)
    assert first.fresh_modules == ("bert.pooler.dense", "classifier")
    assert torch.equal(first(tokens(first)), second(tokens(second)))


def test_a_head_that_the_checkpoint_brings_is_kept(tiny_model, tmp_path):
    trained = load(tiny_model("roberta"), seed=PublicSeed.from_int(99))
    trained.network.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.fresh_modules == ()
    assert torch.equal(again(tokens(again)), trained(tokens(trained)))


def test_a_head_for_another_number_of_labels_is_drawn_anew(tiny_model, tmp_path):
    load(tiny_model("bert"), labels=5).network.save_pretrained(tmp_path)
    for file in tiny_model("bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    again, fresh = load(tmp_path), load(tiny_model("bert"))
    assert torch.equal(again(tokens(again)), fresh(tokens(fresh)))


# ------------------------------------------------------------------------------------------------- pooled and prototype


@pytest.mark.parametrize(("family", "expected"), [("bert", "mean"), ("deberta-v2", "mean"), ("llama", "last")])
def test_prototype_pools_by_default_as_fits_the_model(tiny_model, family, expected):
    assert load(tiny_model(family), head="prototype").pooling == expected


def test_prototype_logits_are_linear_in_the_normalised_embedding(tiny_model):
    classifier = load(tiny_model("bert"), head="prototype")
    batch = tokens(classifier)
    assert torch.equal(classifier(batch), torch.zeros(3, 3))
    weight, bias = torch.randn(3, 16), torch.randn(3)
    classifier.set_head(weight, bias)
    embedded = classifier.embed(batch)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(classifier(batch), embedded @ weight.T + bias)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_by_hand(tiny_model, pooling):
    classifier = load(tiny_model("bert"), head="prototype", pooling=pooling)
    batch = tokens(classifier)
    hidden, mask = classifier.backbone(**batch).last_hidden_state, batch["attention_mask"].bool()
    by_hand = {
        "mean": lambda row, real: row[real].mean(dim=0),
        "cls": lambda row, real: row[0],
        "last": lambda row, real: row[real][-1],
    }[pooling]
    expected = torch.stack([by_hand(row, real) for row, real in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(classifier.embed(batch), nn.functional.normalize(expected, dim=-1))


def test_set_head_checks_what_it_is_given(tiny_model):
    with pytest.raises(AdapterError, match=r"wanted \(3, 16\)"):
        load(tiny_model("bert"), head="prototype").set_head(torch.zeros(2, 16), torch.zeros(2))
    with pytest.raises(AdapterError, match="own head"):
        load(tiny_model("bert")).set_head(torch.zeros(3, 16), torch.zeros(3))


def test_a_native_head_gives_no_embeddings(tiny_model):
    classifier = load(tiny_model("bert"))
    with pytest.raises(ModelError, match=r"set model\.pooling"):
        classifier.embed(tokens(classifier))


# ------------------------------------------------------------------------------------------------ inputs of a model


@pytest.mark.parametrize("family", ["distilbert", "roberta", "llama", "deberta-v2"])
def test_token_types_are_dropped_where_the_model_has_none(tiny_model, family):
    classifier = load(tiny_model(family))
    batch = tokens(classifier)
    assert torch.equal(classifier({**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}), classifier(batch))


def test_token_types_reach_a_model_that_has_them(tiny_model):
    classifier = load(tiny_model("bert"))
    batch = tokens(classifier)
    assert not torch.equal(
        classifier({**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}), classifier(batch)
    )


def test_the_tokenizer_pads_right_and_knows_how_many_positions_there_are(tiny_model):
    assert load(tiny_model("llama")).tokenizer.padding_side == "right"
    assert load(tiny_model("bert")).tokenizer.model_max_length == 64
    assert load(tiny_model("roberta")).tokenizer.model_max_length == 63  # positions count from behind the padding's


# ------------------------------------------------------------------------------------------------- target modules


ATTENTION_AND_FEED_FORWARD = ["query", "key", "value", "attention_output", "up", "down"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deberta"])
def test_the_types_cover_every_linear_of_every_block_once(tiny_model, family):
    classifier = load(tiny_model(family))
    types = [*ATTENTION_AND_FEED_FORWARD, *(["gate"] if family == "llama" else [])]
    found = [set(classifier.target_modules([name])) for name in types]
    assert [len(paths) for paths in found] == [2] * len(types)
    assert len(set.union(*found)) == 2 * len(types)
    in_blocks = {
        path
        for path, module in classifier.backbone.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in path and "embeddings" not in path
    }
    assert set.union(*found) == in_blocks


def test_order_is_the_models_and_attention_output_is_not_down(tiny_model):
    classifier = load(tiny_model("bert"))
    assert list(classifier.target_modules(["down", "attention_output"])) == [
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
    ]


def test_other_entries_are_endings_by_whole_components(tiny_model):
    classifier = load(tiny_model("bert"))
    assert list(classifier.target_modules(["1.attention.self.query"])) == ["encoder.layer.1.attention.self.query"]
    with pytest.raises(ModelError):
        classifier.target_modules(["ttention.self.query"])


@pytest.mark.parametrize(
    ("family", "entry", "said"),
    [
        ("bert", "querry", ["did you mean 'query'", "attention_output", "encoder.layer.0"]),
        ("bert", "gate", ["'gate' matches nothing"]),
        ("deberta", "query", ["in_proj", "query, key, value"]),
        ("llama", "q_prj", ["did you mean 'q_proj'"]),
    ],
)
def test_an_unknown_target_says_what_there_is(tiny_model, family, entry, said):
    with pytest.raises(ModelError) as caught:
        load(tiny_model(family)).target_modules([entry])
    for part in said:
        assert part in str(caught.value)


def test_deberta_v1_takes_its_fused_projection_by_name(tiny_model):
    assert len(load(tiny_model("deberta")).target_modules(["in_proj"])) == 2


@pytest.mark.parametrize(
    ("family", "config"), [*((family, {}) for family in FAMILIES), ("deberta-v2", {"share_att_key": False})]
)
def test_shared_input_modules_are_those_called_with_batch_size_one(tiny_model, family, config):
    classifier = load(tiny_model(family, **config))
    seen: set[str] = set()
    for path, module in classifier.backbone.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, x, path=path: seen.add(path) if len(x[0]) == 1 else None)
    classifier(tokens(classifier))
    assert classifier.shared_input_modules() == seen


@pytest.mark.parametrize(("pooling", "head"), [("auto", "classifier"), ("mean", "linear")])
def test_replaced_modules_are_called_and_the_originals_remembered(tiny_model, pooling, head):
    classifier = load(tiny_model("bert"), pooling=pooling)
    (path, original), *_ = classifier.target_modules(["query"]).items()
    calls: list[str] = []
    for place, module in ((path, original), (f"head:{head}", classifier.head_modules()[head])):
        replacement = nn.Sequential(module)
        replacement.register_forward_hook(lambda *_, place=place: calls.append(place))
        classifier.replace_module(place, replacement)
    classifier(tokens(classifier))
    assert calls == [path, f"head:{head}"]
    assert classifier.target_modules(["query"])[path] is original


# ------------------------------------------------------------------------------------- without the blocks below some


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("pooling", ["auto", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_the_states_before_a_block_are_the_same(tiny_model, family, pooling, block):
    classifier = load(tiny_model(family), pooling=pooling)
    batch = tokens(classifier)
    states = classifier.states_before(block, batch)
    ran = []
    for module in classifier.backbone.get_submodule(families.FAMILIES[family].blocks):
        module.register_forward_hook(lambda *_: ran.append(1))
    plain = classifier(batch)
    ran.clear()
    assert torch.equal(classifier(batch | {classifier.states_key(block): states}), plain)
    assert len(ran) == 2 - block
    assert not torch.equal(classifier(batch | {classifier.states_key(block): states.flip(0)}), plain)


def test_blocks_are_back_in_their_places_even_after_an_error(tiny_model):
    classifier = load(tiny_model("bert"), pooling="mean")
    batch = tokens(classifier)
    before = list(classifier.named_modules())
    states = classifier.states_before(1, batch)
    with pytest.raises(RuntimeError):
        classifier(batch | {classifier.states_key(1): states[:, :, :3]})
    with pytest.raises(IndexError):
        classifier.states_before(1, batch | {"input_ids": batch["input_ids"] + 10_000})
    after = list(classifier.named_modules())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    assert not any(block._forward_hooks for block in classifier.backbone.encoder.layer)


@pytest.mark.parametrize(("family", "block"), [("bert", 0), ("bert", 3), ("unheard-of", 1)])
def test_states_are_asked_for_before_a_block_that_there_is(tiny_model, family, block):
    classifier = load(tiny_model("bert"))
    classifier.family = family
    with pytest.raises(ModelError, match=f"before block {block} of"):
        classifier.states_before(block, tokens(classifier))


@pytest.mark.parametrize(
    ("family", "paths", "below"),
    [
        ("bert", ["encoder.layer.4.output.dense", "encoder.layer.11.attention.self.query"], 4),
        ("distilbert", ["transformer.layer.2.ffn.lin1"], 2),
        ("llama", ["layers.10.mlp.up_proj", "layers.3.mlp.up_proj"], 3),
        ("llama", ["layers.0.mlp.up_proj"], 0),
        ("bert", ["encoder.layer.4.output.dense", "pooler.dense"], 0),
        ("electra", ["encoder.layer.1.output.dense", "embeddings_project"], 0),
        ("unheard-of", ["encoder.layer.4.output.dense"], 0),
        ("bert", [], 0),
    ],
)
def test_blocks_below_the_lowest_of_some_modules(family, paths, below):
    assert families.blocks_below(paths, family) == below


# ----------------------------------------------------------------------------------------------------- real models


def test_minilm_embeds_meaning(minilm):
    classifier = load(minilm, head="prototype", labels=2)
    assert (classifier.pooling, classifier.family, classifier.hidden_size) == ("mean", "bert", 384)
    cat, kitten, tax = classifier.embed(tokens(classifier, ["a cat sleeps", "a kitten naps", "tax law reform"]))
    assert cat @ kitten > 0.5 > cat @ tax


def test_stories_decoder_pools_its_last_token(stories260k):
    classifier = load(stories260k, head="prototype", labels=2)
    assert classifier.pooling == "last"
    texts = ["Once upon a time", "One day, a girl named Lily went to the park."]
    alone = torch.cat([classifier.embed(tokens(classifier, [text])) for text in texts])
    torch.testing.assert_close(classifier.embed(tokens(classifier, texts)), alone, atol=1e-5, rtol=1e-4)
    native = load(stories260k, labels=2)
    assert native(tokens(native, texts)).shape == (2, 2)
