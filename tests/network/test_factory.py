"""Factories: structures by name, and what a file may not make a library do."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torchvision import models

from deepenc.errors import CheckpointError, ConfigError
from deepenc.network.factory import Factory, trusted
from deepenc.network.limits import Limits
from deepenc.network.structure import named_tensors

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"library": "transformers", "name": "BertModel", "arguments": {**TINY, "vocab_size": 20}}
NETWORKS: list[str | dict[str, Any]] = [
    "torchvision:squeezenet1_1",
    {"library": "torchvision", "name": "lraspp_mobilenet_v3_large", "arguments": {"num_classes": 3}},
    "timm:resnet10t",
    BERT,
    {"library": "python", "name": "deepenc.victims.models:CifarResNet", "arguments": {"depth": 8}},
]


def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A module of the user's that leaves a mark when it is imported; returns the mark's path."""
    mark = folder / f"{name}.mark"
    (folder / f"{name}.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(mark)!r}).touch()\n"
        "def build(width=4):\n    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))\n"
        "def number():\n    return 1\n"
        "def broken():\n    raise KeyError('no such thing')\n"
    )
    monkeypatch.syspath_prepend(folder)
    return mark


@pytest.mark.parametrize(
    "text", ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "transformers:BertModel", "my.models:build"]
)
def test_without_arguments_a_factory_is_one_text(text: str) -> None:
    factory = Factory.of(text)
    assert str(factory) == factory.model_dump(mode="json") == text
    assert Factory.model_validate_json(factory.model_dump_json()) == factory
    assert factory.library == ("python" if text.startswith("my") else text.partition(":")[0])


def test_with_arguments_it_is_a_mapping_that_survives_json() -> None:
    factory = Factory.of(BERT)
    assert Factory.model_validate_json(factory.model_dump_json()) == factory
    assert json.loads(factory.model_dump_json())["arguments"]["vocab_size"] == 20
    assert len({factory, Factory.of(BERT)}) == 1


@pytest.mark.parametrize("spec", NETWORKS, ids=str)
def test_the_structure_is_the_same_each_time_and_on_meta(spec: Any) -> None:
    factory = Factory.of(spec)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, sketch = factory.build(), factory.build(), factory.build("meta")
    assert torch.equal(before, torch.get_rng_state())
    assert factory == Factory.of(spec)
    assert not first.training
    tensors, others, shapes = named_tensors(first), named_tensors(again), named_tensors(sketch)
    assert set(tensors) == set(others) == set(shapes)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name])
        assert shapes[name].is_meta and shapes[name].shape == tensor.shape


def test_detection_and_segmentation_networks_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: object, **more: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", download)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    names = [name for part in (models.detection, models.segmentation) for name in models.list_models(part)]
    assert len(names) >= 15
    for name in names:
        assert isinstance(Factory.of(f"torchvision:{name}").build("meta"), nn.Module)


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "resnet18", {"weights": "DEFAULT"}),
        ("torchvision", "resnet18", {"pretrained": True}),
        ("torchvision", "fcn_resnet50", {"weights_backbone": "DEFAULT"}),
        ("torchvision", "fcn_resnet50", {"pretrained_backbone": True}),
        ("timm", "resnet10t", {"pretrained": True}),
        ("timm", "resnet10t", {"checkpoint_path": "stolen"}),
        ("timm", "resnet10t", {"pretrained_cfg": {"url": "x"}}),
        ("timm", "resnet10t", {"pretrained_cfg_overlay": {"hf_hub_id": "x"}}),
        ("timm", "resnet10t", {"cache_dir": "x"}),
        ("timm", "resnet10t", {"features_only": True}),
        ("transformers", "BertModel", {**TINY, "_name_or_path": "somebody"}),
        ("transformers", "BertModel", {**TINY, "auto_map": {"AutoModel": "evil.Model"}}),
        ("transformers", "BertModel", {**TINY, "quantization_config": {"bits": 4}}),
        ("transformers", "BertModel", {**TINY, "_attn_implementation": "kernels"}),
        ("transformers", "BertModel", {**TINY, "attn_implementation": "kernels"}),
        ("transformers", "DetrForObjectDetection", {"backbone": "resnet50"}),
        ("transformers", "DetrForObjectDetection", {"backbone_config": {"use_pretrained_backbone": True}}),
        ("transformers", "TimmWrapperModel", {"architecture": "hf-hub:somebody/evil"}),
        ("transformers", "TimmWrapperModel", {"model_args": [{"checkpoint_path": "x"}]}),
        ("transformers", "BertModel", {**TINY, "hidden_act": "../gelu"}),
        ("transformers", "BertModel", {**TINY, "hidden_act": "~root"}),
        ("transformers", "BertModel", {**TINY, "hidden_act": "C:\\gelu"}),
        ("python", "deepenc.victims.models:CifarResNet", {"depth": 8, "weights": "x"}),
    ],
)
def test_arguments_that_read_or_download_are_refused(
    library: str, name: str, arguments: dict[str, Any]
) -> None:
    factory = Factory.of({"library": library, "name": name, "arguments": arguments})
    with pytest.raises(ConfigError, match=r"is refused|looks like a path"):
        factory.build("meta")


def test_a_configuration_s_own_defaults_are_held_to_the_same() -> None:
    with pytest.raises(ConfigError, match="in the configuration, the argument 'backbone' is refused"):
        Factory.of("transformers:DetrForObjectDetection").build("meta")


def test_arguments_that_say_nothing_and_labels_are_no_harm() -> None:
    arguments = {**TINY, "vocab_size": 20, "_name_or_path": "", "auto_map": None}
    labels = {"id2label": {"0": "N/A", "1": "http://x"}, "label2id": {"N/A": 0, "http://x": 1}}
    factory = Factory.of({**BERT, "arguments": arguments | labels})
    config: Any = factory.build("meta").config
    assert config.vocab_size == 20 and config.id2label == {0: "N/A", 1: "http://x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("timm:vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:zzzzzzzz", "none with a name like it"),
        ("transformers:BertMdel", "did you mean 'BertModel'"),
        ("transformers:AutoModel", "no network 'AutoModel'"),
        ("transformers:PreTrainedModel", "no network 'PreTrainedModel'"),
        ("transformers:BertConfig", "no network 'BertConfig'"),
        ("transformers:pipeline", "no network 'pipeline'"),
        ("timm:hf-hub:somebody", "a name of timm"),
        ("timm:../x", "a name of timm"),
        ("resnet18", "library:name"),
        ("a b:c", "package.module:function"),
        ("models:make.it", "package.module:function"),
        (":", "package.module:function"),
    ],
)
def test_unknown_names_are_clear_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Factory.of(text).build("meta")


@pytest.mark.parametrize(("library", "extra"), [("timm", "timm"), ("transformers", "text")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, library: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf'pip install "deepenc\[{extra}\]"'):
        Factory.of(f"{library}:BertModel").build("meta")


def test_a_function_is_not_even_imported_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = own_module(tmp_path, monkeypatch, "own_models_a")
    factory = Factory.of({"library": "python", "name": "own_models_a:build", "arguments": {"width": 7}})
    for allow in ((), ("own_models_a:number",), ("own_models_a",)):
        with pytest.raises(CheckpointError, match=r"allow=\('own_models_a:build',\)"):
            factory.build(allow=allow)
    assert not mark.exists() and "own_models_a" not in sys.modules
    assert factory.build(allow=("own_models_a:build",)).get_submodule("0").out_features == 7
    assert mark.exists()


@pytest.mark.parametrize("name", ["deepenc.plugins:load_file", "deepenc.victims.models:Block", "os:system"])
def test_no_other_function_of_ours_or_of_python_is_free(name: str) -> None:
    assert name not in trusted()
    with pytest.raises(CheckpointError, match="allow"):
        Factory.of(name).build()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_models_b:number", {}, "expected a torch.nn.Module, got int"),
        ("own_models_b:broken", {}, "raised KeyError"),
        ("own_models_b:build", {"wide": 3}, "raised TypeError"),
        ("own_models_b:missing", {}, "cannot import"),
        ("own_models_c:build", {}, "cannot import"),
    ],
)
def test_functions_that_do_not_do_are_clear_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], message: str
) -> None:
    own_module(tmp_path, monkeypatch, "own_models_b")
    with pytest.raises(ConfigError, match=message):
        Factory.of({"library": "python", "name": name, "arguments": arguments}).build(allow=(name,))


def test_a_transformer_s_factory_leaves_its_origin_out() -> None:
    config = transformers.BertConfig(**TINY, vocab_size=20)
    config._name_or_path = "somebody/bert"
    model = transformers.BertModel(config)
    factory = Factory.of_transformer(model)
    assert "somebody" not in factory.model_dump_json()
    own, made = model.state_dict(), factory.build("meta").state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in made.items()}
    with pytest.raises(ConfigError, match="expected a network of transformers"):
        Factory.of_transformer(nn.Linear(2, 2))


HUGE = {
    "layers": {**BERT, "arguments": {**TINY, "vocab_size": 20, "num_hidden_layers": 10**6}},
    "labels": {
        "library": "transformers",
        "name": "BertForSequenceClassification",
        "arguments": {**TINY, "vocab_size": 20, "num_labels": 10**8},
    },
    "words": {**BERT, "arguments": {**TINY, "vocab_size": 10**9}},
    "a list": {"library": "timm", "name": "resnet18", "arguments": {"layers": [1] * 10**5}},
    "types of layers": {
        "library": "transformers",
        "name": "Qwen2Model",
        "arguments": {**TINY, "vocab_size": 20, "num_hidden_layers": 2**32 - 1},
    },
    "a number": {**BERT, "arguments": {**TINY, "vocab_size": 10**30}},
    "depth": {
        "library": "python",
        "name": "deepenc.victims.models:CifarResNet",
        "arguments": {"depth": 600_002},
    },
    "channels": {
        "library": "python",
        "name": "deepenc.victims.models:CifarResNet",
        "arguments": {"depth": 8, "channels": 4 * 10**7},
    },
}


@pytest.mark.parametrize("name", HUGE)
def test_a_network_stops_growing_at_the_limits(name: str) -> None:
    """The limits are those of the networks that small files are of."""
    device = "cpu" if HUGE[name]["library"] == "python" else "meta"
    with pytest.raises(CheckpointError, match="larger than its tensors allow"):
        Factory.of(HUGE[name]).build(device, limits=Limits.of([(64, 64, 3, 3)] * 20))
    assert len(nn.Sequential(*(nn.ReLU() for _ in range(3000)))) == 3000  # nothing is left behind


@pytest.mark.parametrize("spec", NETWORKS, ids=str)
def test_a_network_keeps_the_limits_of_its_own_tensors(spec: Any) -> None:
    shapes = [tensor.shape for tensor in named_tensors(Factory.of(spec).build("meta")).values()]
    assert Factory.of(spec).build("meta", limits=Limits.of(shapes)) is not None


def test_limits_hold_in_their_own_thread_alone() -> None:
    with Limits(modules=0, elements=0, labels=0, number=0).held():
        made: list[nn.Module] = []
        other = threading.Thread(target=lambda: made.append(nn.Sequential(nn.Linear(2, 2))))
        other.start()
        other.join()
        assert made
        with pytest.raises(CheckpointError):
            nn.Linear(2, 2)
