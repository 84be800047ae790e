"""Every architecture of a library: found, encrypted, decrypted, or refused, and why.

For each of torchvision's classification networks, or the smallest member of each of timm's families, with
random weights and in a process of its own: the sites without and with residual streams, how much of the
layers' widths they cover, whether encryption by `paper-samp` changes the outputs, and whether decryption
gives back every tensor and output bit for bit. Results are appended to a file, one line of JSON a network;
started again with the same file, it goes on where it stopped.

    python benchmarks/families.py --suite torchvision --out torchvision.jsonl [--only 'resnet*']
    python benchmarks/families.py --suite timm --out timm.jsonl [--limit-seconds 900]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import deepenc
from deepenc.errors import DeepencError
from deepenc.network.find import Analysis, analyse
from deepenc.network.tracing.admit import tensors_in

MEMORY = 16 * 2**30
SIDES = (64, 96, 128, 224)  # images are as small as a network takes them
ENOUGH = 0.9
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# Of these reasons a width is not eligible: it is the network's output, or a statistic over all channels that
# confusion channels would shift.
INELIGIBLE = ("is an output of the network", "normalises over", "does not use it")


@dataclass
class Coverage:
    """How much of the widths of convolutions and linear layers sites cover, in channels."""

    total: int = 0
    eligible: int = 0
    covered: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    """Why eligible channels are not covered."""


def widths(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Each weight that makes channels: the dimension they lie along, their number, and that of groups."""
    seen: set[int] = set()
    result: dict[str, tuple[int, int, int]] = {}
    for path, module in model.named_modules():
        found: list[tuple[str, Tensor | None, int, int]] = []
        if isinstance(module, CONVOLUTIONS):
            dim = int(module.transposed)
            found = [("weight", module.weight, dim, module.groups if dim else 1)]
        elif isinstance(module, nn.Linear):
            found = [("weight", module.weight, 0, 1)]
        elif isinstance(module, nn.MultiheadAttention):
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            found = [(name, getattr(module, name), 0, 1) for name in names]
        for name, weight, dim, groups in found:
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                full = f"{path}.{name}" if path else name
                result[full] = (dim, weight.shape[dim] * groups, groups)
    return result


def coverage(model: nn.Module, found: Analysis) -> Coverage:
    """Count what sites cover, layer by layer.

    Args:
        model: The network.
        found: Its sites, and the reasons of what was left out.
    """
    slots: Counter[tuple[str, int]] = Counter()
    for site in found.sites:
        for slot in site.slots:
            slots[slot.tensor, slot.dim] += site.width * slot.block
    reasons: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for left in found.left_out:
        reasons[left.layer].append((left.reason, left.channels))
    result = Coverage()
    misses: Counter[str] = Counter()
    for name, (dim, width, groups) in widths(model).items():
        covered = slots[name, dim] * groups
        rest = width - covered
        result.total += width
        result.covered += covered
        result.eligible += covered
        for reason, count in [*reasons[name], ("not explained", width)]:
            count = min(rest, count * groups)
            rest -= count
            if count and not any(word in reason for word in INELIGIBLE):
                result.eligible += count
                misses[reason] += count
    result.misses = dict(misses.most_common())
    return result


@dataclass
class Row:
    """What became of one network."""

    suite: str
    family: str
    network: str = ""
    status: str = "failed"
    why: str = ""
    parameters: int = 0
    side: int = 0
    sites: int = 0
    streams: int = 0
    inner: Coverage = field(default_factory=Coverage)
    whole: Coverage = field(default_factory=Coverage)
    changed: bool = False
    exact: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def torchvision_names() -> list[str]:
    """The classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def timm_families() -> dict[str, list[str]]:
    """The python modules of timm.models, and the networks that each defines."""
    import timm
    from timm.models import _registry

    families: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        families[_registry._model_to_module[name]].append(name)
    return dict(sorted(families.items()))


def create(suite: str, name: str, **options: Any) -> nn.Module:
    """A network with random weights."""
    if suite == "torchvision":
        options |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options)
    import timm

    return timm.create_model(name, pretrained=False, **options)


def smallest(names: Sequence[str]) -> str:
    """The timm network with the fewest parameters."""

    def parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in _without_weights("timm", name, {}).parameters())

    return min(names, key=parameters) if len(names) > 1 else names[0]


def build(suite: str, name: str) -> tuple[nn.Module, Tensor]:
    """The network, with the smallest images that it takes.

    Raises:
        RuntimeError: It takes none.
    """
    for side, options in _sizes(suite, name):
        try:
            _without_weights(suite, name, options)(torch.zeros(1, 3, side, side, device="meta"))
        except Exception:
            continue  # another size, then
        torch.manual_seed(0)
        model = create(suite, name, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # a head that begins with zero would hide what leads to it
                    parameter.normal_(std=0.1)
        return model, torch.randn(1, 3, side, side)
    raise RuntimeError(f"{name} runs on no size of images tried")


@torch.no_grad()
def _without_weights(suite: str, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            return create(suite, name, **options).eval()
    except NotImplementedError:  # regnets compute their widths with tensors
        return create(suite, name, **options).eval().to("meta")


def _sizes(suite: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    option = "img_size" if suite == "timm" else "image_size"
    for side in SIDES:
        yield side, {option: side}
        yield side, {}
    if suite == "torchvision":
        yield 299, {}
    else:
        import timm

        yield timm.get_pretrained_cfg(name).input_size[-1], {}


def examine(suite: str, family: str) -> Row:
    """Do everything with one network."""
    row = Row(suite, family)
    clock = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal clock
        row.seconds[what] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()

    row.network = family if suite == "torchvision" else smallest(timm_families()[family])
    model, example = build(suite, row.network)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    row.side = example.shape[-1]
    row.inner.total = row.whole.total = sum(width for _, width, _ in widths(model).values())
    lap("build")
    try:
        inner = analyse(model, example)
        lap("analyse")
        whole = analyse(model, example, streams=True)
        lap("analyse with streams")
        row.sites, row.streams = len(inner.sites), len(whole.sites) - len(inner.sites)
        row.inner, row.whole = coverage(model, inner), coverage(model, whole)
        if not whole.sites:
            row.status, row.why = "refused", "no site"
            return row
        outcomes = [round_trip(model, example, found) for found in (inner, whole) if found.sites]
        lap("encrypt and decrypt")
    except DeepencError as error:
        row.status, row.why = "refused", str(error)
        return row
    row.changed, row.exact = (all(part) for part in zip(*outcomes, strict=True))
    if not row.exact:
        row.why = "decryption is not exact"
    elif not row.changed:
        row.why = "encryption does not change the outputs"
    else:
        row.status = "works" if row.whole.covered >= ENOUGH * row.whole.eligible else "partly"
        row.why = "; ".join(f"{reason} ({count})" for reason, count in list(row.whole.misses.items())[:2])
    return row


def round_trip(model: nn.Module, example: Tensor, found: Analysis) -> tuple[bool, bool]:
    """Whether encryption changes the outputs, and whether decryption gives back the victim."""

    def outputs(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return tensors_in(network(example))

    expected = outputs(model)
    victim = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encrypted, key = deepenc.encrypt(model, example, "paper-samp", sites=found.sites, seed=0)
    got = outputs(encrypted)
    changed = any(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    decrypted = deepenc.decrypt(encrypted, key)
    state = decrypted.state_dict()
    exact = state.keys() == victim.keys()
    exact = exact and all(torch.equal(state[name], tensor) for name, tensor in victim.items())
    exact = exact and all(torch.equal(a, b) for a, b in zip(outputs(decrypted), expected, strict=True))
    return changed, exact


def measure(suite: str, family: str, seconds: float) -> dict[str, Any]:
    """Examine a network in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--suite", suite, "--one", family]
    row = Row(suite, family, family)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        row.why = f"took more than {seconds:.0f} s"
        return asdict(row)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    row.why = f"ended with {done.returncode}: {last[:200]}"
    return asdict(row)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line a network, and the totals."""
    yield "| network | M | images | sites | with streams | covered | of eligible | result | why |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|---|"
    for row in sorted(rows, key=lambda row: (row["family"], row["network"])):
        inner, whole = row["inner"], row["whole"]
        name = row["network"] if row["network"] == row["family"] else f"{row['family']}: {row['network']}"
        why = row["why"].replace("|", "\\|").splitlines()[0][:160] if row["why"] else ""
        yield (
            f"| {name} | {row['parameters'] / 1e6:.1f} | {row['side']} | {row['sites']} | +{row['streams']} "
            f"| {share(inner)} | {share(whole)} | {row['status']} | {why} |"
        )
    counts = Counter(row["status"] for row in rows)
    covered, eligible, total = (
        sum(row["whole"][k] for row in rows) for k in ("covered", "eligible", "total")
    )
    narrow = sum(row["inner"]["covered"] for row in rows)
    yield ""
    yield f"{len(rows)} networks: " + ", ".join(f"{count} {status}" for status, count in counts.items())
    yield f"Exact: {sum(row['exact'] for row in rows)}. Widths: {total} channels, {eligible} eligible; "
    yield f"covered {percent(narrow, eligible)}, with residual streams {percent(covered, eligible)}."


def share(found: dict[str, Any]) -> str:
    """Covered of eligible channels."""
    return percent(found["covered"], found["eligible"])


def percent(part: int, whole: int) -> str:
    """A share, where there is something to share."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=["torchvision", "timm"], required=True)
    parser.add_argument("--out", type=Path, help="results, one line of JSON a network; appended to")
    parser.add_argument("--only", default="*", help="pattern of networks (timm: of families)")
    parser.add_argument("--limit-seconds", type=float, default=1800)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(asdict(examine(options.suite, options.one))))
        return
    out = options.out or Path(f"{options.suite}.jsonl")
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["family"] for row in rows}
    names = torchvision_names() if options.suite == "torchvision" else list(timm_families())
    for name in names:
        if name not in done and fnmatchcase(name, options.only):
            row = measure(options.suite, name, options.limit_seconds)
            rows.append(row)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {row['status']} {row['why'][:100]}", file=sys.stderr)
    print("\n".join(table([row for row in rows if fnmatchcase(row["family"], options.only)])))


if __name__ == "__main__":
    main()
