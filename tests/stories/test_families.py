"""Sites of torchvision's architectures, as many as a reader of them counts, and exact round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from benchmarks.families import build, coverage, measure, round_trip, table, torchvision_names, widths
from deepenc.network.find import Analysis, LeftOut, analyse
from deepenc.network.sites import Role, Site, Slot

# Without and with residual streams, counted from the papers' tables and torchvision's source:
#
# alexnet, vgg: each convolution and hidden linear layer: 5 + 2; 8 + 2.
# resnet18: the first convolution of 8 blocks; 4 stages, the stem's stream is the first one's.
# resnet50, resnext50: two convolutions of 16 bottlenecks, and the stem; 4 stages.
# densenet121: the stem, two convolutions of 58 layers, 3 transitions; nothing is added.
# mobilenet_v2: the stem, 16 expansions, the last convolution, the projections of the first and last stages,
#   which have one block and so no residual; the 5 other stages.
# mnasnet: the stem, its projection, 16 expansions, the projection of the last stage, the last convolution;
#   the 5 other stages.
# efficientnet_b0: as mobilenet_v2 with 15 expansions, and the squeeze of each of 16 blocks.
# regnet_y_400mf: three (two convolutions, one squeeze) of each of 16 blocks, and the stem; 4 stages.
# convnext_tiny, swin_t: the hidden width of 18 and 12 MLPs; LayerNorms normalise over the streams. swin_t has
#   the heads of 12 attentions besides, whose widths may be sites too.
COUNTS = {
    "alexnet": (7, 0),
    "vgg11": (10, 0),
    "resnet18": (8, 4),
    "resnet50": (33, 4),
    "resnext50_32x4d": (33, 4),
    "densenet121": (120, 0),
    "mobilenet_v2": (20, 5),
    "mnasnet0_5": (20, 5),
    "efficientnet_b0": (35, 5),
    "regnet_y_400mf": (49, 4),
    "convnext_tiny": (18, 0),
}
# Nothing is added in these, so that each convolution that runs is a site.
PLAIN = ("squeezenet1_1", "googlenet", "inception_v3")


def on_meta(name: str) -> tuple[nn.Module, torch.Tensor]:
    side = 96 if name == "inception_v3" else 64
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # A regnet computes its widths with tensors, and so cannot begin on the meta device.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    return model.to("meta").eval(), torch.zeros(1, 3, side, side, device="meta")


@pytest.mark.parametrize("name", COUNTS)
def test_sites_are_as_many_as_a_reader_counts(name: str) -> None:
    model, example = on_meta(name)
    found = analyse(model, example, streams=True)
    streams = sum(site.stream for site in found.sites)
    assert (len(found.sites) - streams, streams) == COUNTS[name]
    counted = coverage(model, found)
    assert counted.covered == counted.eligible


@pytest.mark.parametrize("name", PLAIN)
def test_every_convolution_is_a_site_where_nothing_is_added(name: str) -> None:
    model, example = on_meta(name)
    unused = "AuxLogits"  # at this size inception's auxiliary head does not run in training either
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [path for path in convolutions if not path.startswith(unused)]
    layers += [path for path in ("aux1.fc1", "aux2.fc1") if name == "googlenet"]
    sites = [site.name for site in analyse(model, example, streams=True).sites]
    assert set(sites) == {path for path in layers if path != "classifier.1"}  # squeezenet's output


def test_hidden_widths_of_swin() -> None:
    model, example = on_meta("swin_t")
    covered = {slot.tensor for site in analyse(model, example).sites for slot in site.slots}
    hidden = {f"{path}.weight" for path, _ in model.named_modules() if path.endswith(".mlp.0")}
    assert len(hidden) == 12 and hidden <= covered


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small"])
def test_small_ones_encrypt_and_decrypt_exactly(name: str) -> None:
    model, example = build("torchvision", name)
    found = analyse(model, example, streams=True)
    assert round_trip(model, example, found) == (True, True)
    counted = coverage(model, found)
    # Channel shuffles tie all channels of a stage to one another.
    assert counted.covered >= (0.8 if name.startswith("shuffle") else 1.0) * counted.eligible


@pytest.mark.long
@pytest.mark.parametrize("name", torchvision_names())
def test_all_of_torchvision(name: str) -> None:
    row = measure("torchvision", name, 1800)
    assert row["exact"] and row["changed"], row["why"]
    assert row["status"] in ("works", "partly"), row["why"]


def test_coverage_is_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ConvTranspose2d(6, 4, 1, groups=2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Linear(5, 2),
    )
    assert widths(model) == {
        "0.weight": (0, 6, 1),
        "1.weight": (1, 4, 2),
        "3.weight": (0, 5, 1),
        "4.weight": (0, 2, 1),
    }
    site = Site("1", 2, (Slot("1.weight", 1, Role.INCOMING), Slot("3.weight", 1, Role.OUTGOING, 0, 4)))
    left = (
        LeftOut("0.weight", 4, "in 0 it meets values of fixed width"),
        LeftOut("3.weight", 5, "3 normalises over it"),
        LeftOut("4.weight", 2, "it is an output of the network"),
    )
    counted = coverage(model, Analysis((site,), left))
    assert (counted.total, counted.eligible, counted.covered) == (17, 10, 4)
    assert counted.misses == {"in 0 it meets values of fixed width": 4, "not explained": 2}


def test_a_network_that_fails_is_a_row(tmp_path: Path) -> None:
    row = measure("torchvision", "resnet18", 0.01)
    assert row["status"] == "failed" and "took more than" in row["why"]
    lines = list(table([row]))
    assert lines[2].startswith("| resnet18 | 0.0 |") and "1 failed" in lines[4]
