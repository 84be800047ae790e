"""Ways to change or forge the files of an encrypted network and its key.

Whoever forges a file knows how its digest and its fingerprint are made: most forgeries here carry the right
ones, so that they reach the deep checks.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors import safe_open

from deepenc.encryption.disk import checkpoint
from deepenc.encryption.disk.checkpoint import write_tensors
from deepenc.encryption.keys import sealing
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.errors import DeepencError

IDENTITY = X25519PrivateKey.generate()
NASTY: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, -(2**63), 2**31, 2**63, 10**9, 10**30, 10**1000),
    *(0.5, -0.0, float("nan"), float("inf"), [], {}, [[]], "", "0", "../../x", "/etc/x", "a\x00b", "\ud800"),
    *("x" * 20_000, "[/red]", "__class__", "training", "weight", "f" * 64),
]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


NASTY += [nested(50), nested(210), {"a": nested(300)}]


def nasty(rng: random.Random) -> Any:
    """One of them, not shared: a document is changed several times."""
    return copy.deepcopy(rng.choice(NASTY))


def document_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deepenc.json").read_text())  # type: ignore[no-any-return]


def write_header(folder: Path, document: dict[str, Any]) -> None:
    """Write a header with its digest."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "deepenc.json").write_text(json.dumps(rest | {"digest": digest}))


def refit(folder: Path) -> None:
    """Give the header the fingerprint of whatever tensors now lie beside it."""
    with contextlib.suppress(DeepencError):
        tensors = checkpoint._read(folder / "model.safetensors")
        write_header(folder, document_of(folder) | {"fingerprint": fingerprint(tensors)})


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def mutate(document: Any, rng: random.Random) -> None:
    """One change somewhere in a JSON document."""
    holder, key = rng.choice(list(places(document)))
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how == 1:
        holder[rng.choice(["more", "../../x", "__class__"])] = nasty(rng)
    elif how == 2 and type(holder[key]) is int:
        holder[key] += rng.choice([-(2**40), -1, 1, 2, 2**20, 2**40])
    elif how == 3:
        other, place = rng.choice(list(places(document)))
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = nasty(rng)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    path.write_bytes(rng.choice([data[:stop], data[start:], data[:start] + data[stop:], data + data[start:]]))


def any_file(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def apply(folder: Path, rng: random.Random) -> None:
        change(folder / rng.choice(["deepenc.json", "model.safetensors", "key"]), rng)

    return apply


def swap(folder: Path, rng: random.Random) -> None:
    """A valid file with two tensors exchanged, renamed, cast or with other values."""
    tensors = checkpoint._read(folder / "model.safetensors")
    first, second = rng.choices(list(tensors), k=2)
    how = rng.randrange(5)
    if how <= 1:
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif how == 2:
        tensors[rng.choice([second, "../../x", "/etc/x", "a\x00b", "", "x" * 5000])] = tensors.pop(first)
    elif how == 3:
        dtypes = [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
        tensors[first] = tensors[first].to(rng.choice(dtypes))
    else:
        tensors[first] = torch.full_like(tensors[first], rng.choice([0, 1, -1]))
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", {name: tensor.clone() for name, tensor in tensors.items()})
    if rng.random() < 0.7:
        refit(folder)


def raw_header(folder: Path, rng: random.Random) -> None:
    """The table of contents of the tensor file, forged."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    table, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    entries = [name for name in table if name != "__metadata__"]
    entry = table[rng.choice(entries)]
    how = rng.randrange(9)
    length = None
    if how == 0:
        entry["shape"] = rng.choice([[2**40, 0], [0, 2**62], [2**62, 2], [10**9], [-1], [], [1] * 500, [1.5]])
    elif how == 1:
        entry["data_offsets"] = rng.choice(
            [[0, 2**63], [5, 1], [0, 0], [-4, 4], table[entries[0]]["data_offsets"]]
        )
    elif how == 2:
        names = [
            "F64",
            "F16",
            "BOOL",
            "U8",
            "I8",
            "U16",
            "U64",
            "C64",
            "F8_E4M3",
            "F8_E8M0",
            "F4",
            "F6_E2M3",
            "X",
        ]
        entry["dtype"] = rng.choice(names)
        width = {"F64": 8, "U64": 8, "C64": 8, "F16": 2, "U16": 2}.get(entry["dtype"], 1)
        start, stop = entry["data_offsets"]
        entry["shape"] = rng.choice([entry["shape"], [(stop - start) // width], [2 * (stop - start)]])
    elif how == 3:
        length = rng.choice([2**60, 2**63, 0, 1, size + 1, size - 1, 100_000_000])
    elif how == 4:
        empty = {"dtype": "F32", "shape": rng.choice([[2**40, 0], [0]]), "data_offsets": [0, 0]}
        table = {rng.choice(["../../x", "0.weight", "empty"]): empty} | table
    elif how == 5:
        pairs = {"../../x": entries[0], entries[0]: entries[-1], "y": "../../x", "format": "pt", "z": "y"}
        chosen = rng.sample(sorted(pairs), rng.randrange(1, 5))
        table["__metadata__"] = {"format": "pt"} | {name: pairs[name] for name in chosen}
    elif how == 6:
        table["__metadata__"] = rng.choice(
            [None, {}, {"format": 3}, {"format": "pt", "a": nested(200)}, "pt"]
        )
    else:
        mutate(table, rng)
    text = json.dumps(table).encode()
    if how == 7:  # one name twice
        text = text[:-1] + b"," + json.dumps({entries[0]: table.get(entries[0])}).encode()[1:]
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    if rng.random() < 0.7:
        refit(folder)


def header(folder: Path, rng: random.Random) -> None:
    """Anything anywhere in the header."""
    document = document_of(folder)
    for _ in range(rng.choice([1, 1, 2, 5])):
        mutate(document, rng)
    write_header(folder, document)


def sites(folder: Path, rng: random.Random) -> None:
    """The header's sites, forged with an eye for what they are used for."""
    document = document_of(folder)
    site = rng.choice(document["sites"])
    slot = rng.choice(site["slots"])
    huge = rng.choice([10**9, 2**40, 2**63 - 1, 10**30])
    how = rng.randrange(11)
    if how == 0:
        document["allocation"][site["name"]] = huge
    elif how == 1:
        site["width"], site["slots"] = huge, []
        document["allocation"][site["name"]] = huge
    elif how == 2:
        slot[rng.choice(["start", "block", "dim"])] = rng.choice([huge, -1, 0, 2, -huge])
    elif how == 3:
        slot["start"], slot["block"] = -huge, huge
    elif how == 4:
        document["sites"] = [site | {"name": f"s{n}"} for n in range(300)]
        document["allocation"] = {f"s{n}": 0 for n in range(300)}
    elif how == 5:
        site["slots"] = [slot | {"start": n} for n in range(300)]
    elif how == 6:
        document["sites"].append(copy.deepcopy(site) | {"name": rng.choice(["../../x", site["name"]])})
    elif how == 7:
        names = [
            "training",
            "__class__",
            "forward",
            "weight",
            "in_features",
            "in_channels",
            "",
            "kernel_size",
        ]
        module = rng.choice(["", "0", "2", "no", "0.weight", "../../x"])
        setting = {"module": module, "name": rng.choice(names), "victim": rng.choice([1, True, huge])}
        site["settings"] = [setting | {"step": rng.choice([0, 1, huge])}]
    elif how == 8:
        site["width"] -= 1
        document["allocation"][site["name"]] += 1
    elif how == 9:  # room in a tensor that takes no bytes
        path = folder / "model.safetensors"
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        table, body = json.loads(path.read_bytes()[8 : 8 + size]), path.read_bytes()[8 + size :]
        table["empty"] = {"dtype": "U8", "shape": [2**45, 0], "data_offsets": [0, 0]}
        text = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        count = rng.choice([2**22, 2**30, 2**44])
        site["width"], site["slots"] = 1, [slot | {"tensor": "empty", "dim": 0, "start": 0, "block": 1}]
        document["allocation"][site["name"]] = count
        document["fingerprint"] = fingerprint(checkpoint._read(path))
    else:
        slot["tensor"] = rng.choice(["../../x", "", "no", site["slots"][0]["tensor"]])
    write_header(folder, document)


def flood(folder: Path, rng: random.Random) -> None:
    """A header with thousands of faults, which none should collect."""
    text = (folder / "deepenc.json").read_text()
    document = json.loads(text)
    many = [rng.choice([1, "x", [], {}, None, {"name": 3}])] * 20_000
    how = rng.randrange(6)
    if how == 5:
        depth = rng.choice([150, 230, 900, 10_000])
        (folder / "deepenc.json").write_text(text.replace('"mlp"', "[" * depth + "]" * depth))
        return
    if how == 0:
        document["sites"] = many
    elif how == 1:
        document["sites"][0][rng.choice(["slots", "settings"])] = many
    elif how == 2:
        document["allocation"] = {str(n): "x" for n in range(20_000)}
    elif how == 3:
        document["buffers"] = many
    else:
        document |= {f"x{n}": n for n in range(20_000)}
    write_header(folder, document)


def key_fields(folder: Path, rng: random.Random) -> None:
    """A key file with a forged frame."""
    document = json.loads((folder / "key").read_bytes())
    how = rng.randrange(6)
    if how == 0:
        document["passphrase"]["n"] = rng.choice([2**40, 2**19, 2**11, 2**14, 0, 1023, 2.0**17])
    elif how == 1:
        many = rng.choice([2, 257, 1000, 100_000])
        document["recipients"] = [rng.choice(["00" * 80, "ff" * 80, document["recipients"][0]])] * many
    elif how == 2:
        zero = "00" * 32 + document["recipients"][0][64:]  # a point of low order as ephemeral key
        document["recipients"] = [rng.choice([zero, zero[:-2], zero + "00", 3])]
    elif how == 3:
        document["version"] = rng.choice([0, 1, 3, -1, 10**1000, True])
    else:
        for _ in range(rng.choice([1, 2])):
            mutate(document, rng)
    with contextlib.suppress(UnicodeEncodeError):
        (folder / "key").write_bytes(sealing._canonical(document))


def key_contents(folder: Path, rng: random.Random) -> None:
    """What anybody can seal who knows the passphrase or a public key, with contents of his own."""
    document = document_of(folder)
    name = document["sites"][0]["name"]
    content = json.loads(sealing.unlock((folder / "key").read_bytes(), "p"))
    how = rng.randrange(5)
    huge = rng.choice([2**18, 10**9, 2**63, 10**30])
    if how == 0:
        content["ranks"][name] = [
            rng.choice([huge, -1, 0, 1, 3]),
            rng.choice(["0", "f" * 50_000, "-1", "0x1", "_", ""]),
        ]
    elif how == 1:
        content["ranks"] = {str(n): [1, "0"] for n in range(20_000)} | content["ranks"]
    elif how == 2:
        content["ranks"] = rng.choice([{}, {"../../x": [2, "0"]}, [], {name: [2]}, {name: [huge, "ff"]}])
    else:
        mutate(content, rng)
    text = json.dumps(content).encode()
    (folder / "key").write_bytes(sealing.lock(text, "p", 2**10, recipients=[IDENTITY.public_key()]))


def factory(folder: Path, rng: random.Random) -> None:
    """How the structure is made, forged: other networks, and sizes that would take all memory or time."""
    document = document_of(folder)
    huge = rng.choice([10**5, 600_002, 10**6, 4 * 10**7, 10**8, 10**12, 2**63, 10**30, -1, 0])
    names = {
        "python": ["deepenc.victims.models:CifarResNet", "os:system", "builtins:exec", "no:thing", "x"],
        "torchvision": ["resnet18", "squeezenet1_1", "mobilenet_v2", "../../x"],
        "timm": ["resnet18", "vit_tiny_patch16_224", "hf-hub:a/b"],
        "transformers": ["BertModel", "LlamaForCausalLM", "AutoModel", "pipeline"],
    }
    fields = ["depth", "channels", "classes", "width", "num_classes", "num_labels", "num_hidden_layers"]
    fields += ["hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings", "width_mult"]
    fields += ["embed_dim", "weights", "auto_map", "cache_dir", "id2label", "layers", "depths"]
    values = [huge, [huge] * 3, [2] * 100_000, nasty(rng), 8, {"0": huge}, float(huge)]
    library = rng.choice(list(names))
    arguments = {rng.choice(fields): rng.choice(values) for _ in range(rng.choice([1, 1, 2, 4]))}
    if rng.random() < 0.3:
        arguments["depth"] = 8
    document["factory"] = {"library": library, "name": rng.choice(names[library]), "arguments": arguments}
    write_header(folder, document)


def index(folder: Path, rng: random.Random) -> None:
    """An index of several files beside the one, or in its place."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    file_names = [
        "model.safetensors",
        "../a/model.safetensors",
        "a\x00.safetensors",
        "none.safetensors",
        "key",
    ]
    document: Any = {
        "metadata": {"total_size": rng.choice([0, 10**30, "x"])},
        "weight_map": {name: rng.choice([file_names[0]] * 9 + file_names) for name in names},
    }
    if rng.random() < 0.7:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        for name in names:
            document["weight_map"][name] = "one.safetensors"
    if rng.random() < 0.7:
        mutate(document, rng)
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def special(folder: Path, rng: random.Random) -> None:
    """What is no file in the place of one."""
    path = folder / rng.choice(["deepenc.json", "model.safetensors", "key", "owner.pem", "public.pem"])
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    else:
        path.symlink_to(["/dev/zero", "/dev/null", path.name, "none"][how - 2])


def pem(folder: Path, rng: random.Random) -> None:
    """A changed PEM file."""
    path = folder / rng.choice(["owner.pem", "public.pem"])
    if rng.random() < 0.3:
        data = path.read_bytes()
        label = rng.choice([b"RSA PRIVATE KEY", b"ENCRYPTED PRIVATE KEY", b"CERTIFICATE", b"X" * 5000])
        path.write_bytes(data.replace(b"PRIVATE KEY", label) * rng.choice([1, 2, 3000]))
    else:
        rng.choice([flip, cut])(path, rng)


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flips": any_file(flip),
    "cuts": any_file(cut),
    "swapped tensors": swap,
    "safetensors header": raw_header,
    "header": header,
    "sites": sites,
    "flood": flood,
    "key frame": key_fields,
    "key contents": key_contents,
    "factory": factory,
    "index": index,
    "special": special,
    "pem": pem,
}
WEIGHTS = [18, 12, 14, 18, 14, 14, 1, 12, 12, 12, 8, 8, 8]
