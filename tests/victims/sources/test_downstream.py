"""Pre-trained networks on another task: new heads, parts that never overlap, the owner's fine-tuning."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deepenc.arena.metrics import judge
from deepenc.errors import VictimError
from deepenc.network.calling import call
from deepenc.network.factory import Factory
from deepenc.plugins import build
from deepenc.victims.data.splits import digests
from deepenc.victims.sources.cifar import Cifar10ResNet20
from deepenc.victims.sources.downstream import SEED, Downstream, with_head
from deepenc.victims.sources.network import Network
from deepenc.victims.sources.torchvision import Torchvision

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {
    "library": "transformers",
    "name": "BertForSequenceClassification",
    "arguments": {**TINY, "vocab_size": 20, "num_labels": 7},
}
VIT = {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, "depth": 1}}


@pytest.fixture
def birds(tmp_path):
    """CUB-200-2011 in its layout: three classes, ten images."""
    root = tmp_path / "CUB_200_2011"
    rng = np.random.default_rng(1)
    (root / "images" / "all").mkdir(parents=True)
    for number in range(10):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / "all" / f"{number}.jpg")
    listings = {
        "images": [f"{i} all/{i}.jpg" for i in range(10)],
        "image_class_labels": [f"{i} {i % 3 + 1}" for i in range(10)],
        "train_test_split": [f"{i} {int(i < 6)}" for i in range(10)],
    }
    for name, rows in listings.items():
        (root / f"{name}.txt").write_text("\n".join(rows))
    return tmp_path


def of(folder, **fields):
    return Downstream(**{"base": Cifar10ResNet20(folder=folder), "folder": folder} | fields)


def contents(victim):
    return [set(digests(p.inputs.numpy())) for p in (victim.defender, victim.attacker, victim.judge)]


def disjoint(victim):
    return all(not one & two for one, two in itertools.combinations(contents(victim), 2))


def quick(network, task, images, recipe, generator):
    """Instead of training."""
    with torch.no_grad():
        network.linear.bias.fill_(7.0)
    return True


def test_the_head_is_new_and_all_else_is_the_bases(folder):
    stolen, _ = Cifar10ResNet20(folder=folder).network(folder)
    network, example = of(folder).network(folder)
    own, base = network.state_dict(), stolen.state_dict()
    changed = {name for name in base if not torch.equal(own[name], base[name])}
    assert changed == {"linear.weight", "linear.bias"}
    assert not network.training and network(example).shape == (1, 100)
    torch.manual_seed(SEED)
    expected = nn.Linear(64, 100)
    assert torch.equal(network.linear.weight, expected.weight)
    assert torch.equal(network.linear.bias, expected.bias)


def test_the_fresh_networks_parts(folder):
    base = Cifar10ResNet20(folder=folder).load(folder)
    victim = of(folder).load(folder)
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [30, 90, 60]
    assert torch.equal(victim.defender.inputs, base.defender.inputs)
    assert disjoint(victim)
    assert (victim.name, victim.task.classes, victim.public) == ("cifar10-resnet20 to cifar100", 100, None)
    assert victim.judge.targets.max() > 9
    network, _ = of(folder).network(folder)
    assert torch.equal(network(victim.example), victim.model(victim.example))


@pytest.mark.parametrize("share", [None, 0.3])
def test_a_base_without_images_leaves_the_defender_some_of_the_task(folder, caplog, share):
    for file in (folder / "cifar10").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        victim = of(folder, share=share).load(folder)
    own = 9 if share is None else 27
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [own, 90 - own, 60]
    assert disjoint(victim)
    assert "no CIFAR-10 in" in caplog.text


def test_the_owner_trains_on_his_share_only_and_says_from_what(folder, monkeypatch):
    seen = []

    def spying(network, task, images, recipe, generator):
        seen.append(set(digests(images.inputs.numpy())))
        assert network.linear.out_features == 100 and recipe.epochs == 3 and recipe.lr == 0.2
        return quick(network, task, images, recipe, generator)

    monkeypatch.setattr("deepenc.victims.sources.downstream.fit", spying)
    source = of(folder, trained=True, epochs=3, lr=0.2)
    victim = source.load(folder / "cache")
    defender, attacker, judged = contents(victim)
    assert seen == [defender]
    assert [len(defender), len(attacker), len(judged)] == [60, 30, 60] and disjoint(victim)
    assert victim.name == "cifar10-resnet20 tuned to cifar100"
    assert victim.model.linear.bias[0] == 7 and not victim.model.training

    stolen, example = Cifar10ResNet20(folder=folder).network(folder)
    assert not victim.public.training
    assert all(torch.equal(t, victim.public.state_dict()[n]) for n, t in stolen.state_dict().items())

    again = of(folder, trained=True, epochs=3, lr=0.2).load(folder / "cache")
    assert len(seen) == 1 and again.fingerprint == victim.fingerprint
    network, _ = source.network(folder / "cache")
    assert len(seen) == 1 and torch.equal(network(example), victim.model(example))


def test_another_recipe_share_or_task_is_trained_anew(folder, monkeypatch):
    monkeypatch.setattr("deepenc.victims.sources.downstream.fit", quick)
    variants = [{}, {"epochs": 2}, {"lr": 0.01}, {"share": 0.5}, {"classes": 50}]
    prints = {of(folder, trained=True, **fields).load(folder / "cache").fingerprint for fields in variants}
    assert len(list((folder / "cache").iterdir())) == len(variants)
    assert len(prints) == 3, "a recipe that ends in the same weights is the same victim"


def test_training_is_real_and_leaves_the_global_generator_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    victim = of(folder, trained=True, classes=30, epochs=1, share=0.5).load(folder / "cache")
    assert torch.equal(before, torch.get_rng_state())
    fresh, _ = of(folder, classes=30).network(folder)
    assert not torch.equal(victim.model.linear.weight, fresh.linear.weight)
    assert all(torch.isfinite(t).all() for t in victim.model.state_dict().values())


def test_the_fingerprint_sees_the_data(folder):
    prints = {of(folder).load(folder).fingerprint, of(folder, classes=50).load(folder).fingerprint}
    for name, part in (("cifar100", "test"), ("cifar100", "train"), ("cifar10", "train")):
        file = folder / name / f"{part}.npz"
        with np.load(file) as held:
            arrays = dict(held)
        arrays["images"][0, 0, 0, 0] ^= 1
        np.savez(file, **arrays)
        prints.add(of(folder).load(folder).fingerprint)
    assert len(prints) == 5


def test_fine_grained_images_come_from_the_cache_and_are_not_copied(birds):
    base = Torchvision(model="squeezenet1_1", weights="none", classes=4)
    source = Downstream(base=base, data="cub", folder=birds, classes=3, share=0.4)
    victim = source.load(birds / "cache")
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [2, 4, 4]
    assert disjoint(victim)
    storages = {part.inputs.untyped_storage().data_ptr() for part in (victim.attacker, victim.judge)}
    assert len(storages) == 1
    assert victim.model(victim.judge.inputs).shape == (4, 3)
    assert victim.name == "squeezenet1_1 to cub (3 classes)"


def test_data_sets_that_do_not_fit_are_clear_errors(birds, folder):
    base = Torchvision(model="squeezenet1_1", weights="none", classes=4)
    with pytest.raises(VictimError, match=r"expected 200 classes of CUB-200-2011, got 3; .*`classes: 3`"):
        Downstream(base=base, data="cub", folder=birds).load(birds / "cache")
    with pytest.raises(
        VictimError, match=r"has inputs \(3, 224, 224\), cifar10-resnet20 takes \(3, 32, 32\)"
    ):
        of(folder, data="cub", classes=3).load(birds / "cache")
    with pytest.raises(VictimError, match=r"`share` of 0.001 leaves one side without"):
        of(folder, trained=True, share=0.001).load(folder)
    with pytest.raises(VictimError, match="no FGVC-Aircraft in"):
        Downstream(base=base, data="aircraft", folder=birds).load(birds)


def test_a_fresh_network_leaves_the_global_generator_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    of(folder).load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_the_folder_may_come_from_the_environment(folder, monkeypatch):
    monkeypatch.delenv("DEEPENC_DATA", raising=False)
    with pytest.raises(VictimError, match="'downstream' needs a data folder"):
        Downstream(base=Cifar10ResNet20(folder=folder)).load(folder)
    monkeypatch.setenv("DEEPENC_DATA", str(folder))
    assert Downstream().load(folder).fingerprint == of(folder).load(folder).fingerprint


@pytest.mark.parametrize(
    ("base", "head"),
    [
        (Torchvision(model="squeezenet1_1", weights="none"), "classifier.1"),
        (Torchvision(model="mobilenet_v3_small", weights="none"), "classifier.3"),
        (Torchvision(model="resnet18", weights="none", classes=512), "fc"),  # fc is 512 x 512
        (Network(factory=VIT), "head"),
        (Network(factory=BERT), "classifier"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_heads_of_other_libraries(base, head, tmp_path):
    network, example = base.network(tmp_path)
    before = network.state_dict()
    changed = with_head(network, example, 5, "x")
    outputs = call(changed, example)
    assert getattr(outputs, "logits", outputs).shape == (1, 5)
    own = changed.state_dict()
    differ = {n for n in before if before[n].shape != own[n].shape or not torch.equal(before[n], own[n])}
    assert differ == {f"{head}.weight", f"{head}.bias"}
    made = Downstream(base=base, classes=5).structure()
    assert {n: t.shape for n, t in made.build("meta").state_dict().items()} == {
        n: t.shape for n, t in own.items()
    }


def test_the_last_layer_that_ran_is_the_head():
    class Backwards(nn.Module):
        """Declares its head first, runs it last; another layer has as many outputs."""

        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.first = nn.Linear(4, 4, dtype=torch.float64)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x))

    network = Backwards().eval()
    changed = with_head(network, torch.zeros(1, 4, dtype=torch.float64), 2, "x")
    assert changed.last.weight.shape == (2, 4) and changed.last.weight.dtype == torch.float64
    assert changed.last.bias is None and changed.first.weight.shape == (4, 4)
    assert network.last.weight.shape == (4, 4), "the network itself stays as it was"
    assert not network.last._forward_hooks and not network.first._forward_hooks


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))),  # no classes
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Flatten(0)),
        nn.Sequential(nn.Linear(4, 6), nn.GLU()),  # 3 outputs of a layer with 6
        nn.Sequential(nn.Flatten()),
    ],
    ids=str,
)
def test_networks_without_a_head_are_clear_errors(network):
    with pytest.raises(VictimError, match="'mine' has no head to replace"):
        with_head(network.eval(), torch.zeros(1, 4), 3, "'mine'")


def test_a_head_that_others_depend_on_is_a_clear_error():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(VictimError, match=r"'mine': '0' is no head that can be replaced: running_mean"):
        with_head(network, torch.zeros(1, 4), 3, "'mine'")


def test_structure_of_the_network_and_of_none(folder, tmp_path):
    made = of(folder).structure()
    assert made == Factory(
        library="python",
        name="deepenc.victims.models:CifarResNet",
        arguments={"depth": 20, "classes": 100},
    )
    assert Downstream(base=Network(factory="my.own:network")).structure() is None


def test_it_is_written_as_plain_data():
    source = Downstream(base="cifar10-resnet56", data="cub", trained=True)
    spec = json.loads(json.dumps(source.spec()))
    assert spec["base"]["name"] == "cifar10-resnet56"
    assert Downstream(**{field: value for field, value in spec.items() if field != "name"}) == source
    assert hash(source) == hash(
        Downstream(base=build("victim", "cifar10-resnet56"), data="cub", trained=True)
    )


real = pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="DEEPENC_DATA names no data folder")


@real
def test_real_parts_do_not_overlap():
    victim = Downstream().load(Path())
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [5000, 6000, 4000]
    assert disjoint(victim)


@real
@pytest.mark.long
def test_the_owners_fine_tuning_is_worth_something(tmp_path):
    victim = Downstream(trained=True).load(tmp_path)
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [4000, 2000, 4000]
    found = judge(victim.model, victim.judge, victim.task, who="victim")
    assert found.value > 0.38 and found.further["top-5"] > 0.7
