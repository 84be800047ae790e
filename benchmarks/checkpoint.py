"""Encrypting and decrypting a sharded checkpoint larger than memory, beside ``cp`` of the same files.

Makes a checkpoint with the shapes of a Llama (hidden width 5120, MLP width 13824, vocabulary 32000, bf16) and
as many layers as the size asks for, of random bytes of which a block repeats. Then, each in a process of its
own, with what it reads dropped from the page cache before and what it wrote brought to the disk within the
time that counts:

* ``cp -r`` of the checkpoint;
* encrypt it with 5 % more channels at every site;
* decrypt that, and compare every file with the original, byte for byte (outside the time that counts).

Prints seconds, throughput (GB of the victim a second), the ratio to cp's, and peak memory; of cp's that is
what Python had before it became cp. Everything is deleted afterwards.

    python benchmarks/checkpoint.py [--gigabytes 30] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from deepenc.encryption.disk.sharded.shards import INDEX, Entry, header_of

HIDDEN, WIDE, WORDS, HEADS = 5120, 13824, 32000, 40
SHARD = 5 * 10**9
DEFENSE = {
    "name": "bench",
    "placement": {"name": "proportional", "proportion": 0.05},
    "weights": "samp",
}


def config(layers: int) -> dict[str, object]:
    """A configuration as save_pretrained writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """All tensors of the checkpoint."""
    square, up, down = (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        result |= {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        result |= {f"{layer}.mlp.gate_proj.weight": up, f"{layer}.mlp.up_proj.weight": up}
        result[f"{layer}.mlp.down_proj.weight"] = down
        result |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def size_of(layers: int) -> int:
    """Bytes of the tensors."""
    return sum(Entry(name, torch.bfloat16, shape).nbytes for name, shape in shapes(layers).items())


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(layers)))
    block = torch.randn(2**23, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    noise = block.view(torch.uint8).numpy().tobytes()
    shards: list[list[Entry]] = [[]]
    for name, shape in shapes(layers).items():
        entry = Entry(name, torch.bfloat16, shape)
        if sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD:
            shards.append([])
        shards[-1].append(entry)
    places = {}
    for number, entries in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= {entry.name: path.name for entry in entries}
        with path.open("wb", buffering=0) as file:
            file.write(header_of(entries, {"format": "pt"}))
            for entry in entries:
                left = entry.nbytes
                while left:
                    left -= file.write(memoryview(noise)[: min(left, len(noise))])
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": size_of(layers)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(command: list[str], read: Path, written: Path) -> tuple[float, float, float]:
    """Run a command; seconds until what it wrote is on the disk, CPU seconds, and peak memory in MiB."""
    forget(read)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    for path in written.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def work(what: str, source: Path, target: Path) -> None:
    """Encrypt or decrypt; in a process of its own."""
    from deepenc.encryption.disk.sharded.checkpoint import decrypt_checkpoint, encrypt_checkpoint, sites_of
    from deepenc.encryption.keys.key import load_key, save_key

    if what == "encrypt":
        save_key(encrypt_checkpoint(source, target, DEFENSE, seed=0), key_of(target), "bench")
    else:
        decrypt_checkpoint(source, load_key(key_of(source), "bench", sites_of(source)), target)


def key_of(folder: Path) -> Path:
    """Where the key of an encrypted folder is."""
    return folder.with_name(f"{folder.name}.key")


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=30)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]), Path(options.work[2]))
        return
    console = Console(width=120)
    layer = size_of(2) - size_of(1)
    layers = max(1, -int((size_of(0) - options.gigabytes * 1e9) // layer))
    room = int(shutil.disk_usage(options.folder).free - 2e9)
    if room < 2.06 * size_of(layers):
        layers = int((room / 2.06 - size_of(0)) // layer)
        if layers < 1:
            raise SystemExit(f"{options.folder} has no room for two copies of even one layer")
        console.print(
            f"NOTICE: only {room / 1e9:.0f} GB are free: scaled down to {size_of(layers) / 1e9:.1f} GB"
        )
    size = size_of(layers)
    largest = WORDS * HIDDEN * 2
    with tempfile.TemporaryDirectory(prefix="deepenc-checkpoint-", dir=options.folder) as name:
        base = Path(name)
        victim, copy, locked, opened = (base / part for part in ("victim", "copy", "encrypted", "decrypted"))
        started = time.perf_counter()
        make(victim, layers)
        files = sum(1 for path in victim.iterdir() if path.suffix == ".safetensors")
        console.print(
            f"{size / 1e9:.2f} GB in {files} files, {layers} layers, made in "
            f"{time.perf_counter() - started:.0f} s; largest tensor {largest / 2**20:.0f} MiB, "
            f"bound on memory {2 * largest / 2**20 + 1024:.0f} MiB"
        )
        me = [sys.executable, __file__, "--work"]
        table = Table()
        for column in ("what", "seconds", "CPU s", "GB/s", "of cp's", "peak MiB"):
            table.add_column(column)
        base_speed = 0.0
        steps = (
            ("cp -r", ["cp", "-r", str(victim), str(copy)], victim, copy),
            ("encrypt", [*me, "encrypt", str(victim), str(locked)], victim, locked),
            ("decrypt", [*me, "decrypt", str(locked), str(opened)], locked, opened),
        )
        for what, command, read, written in steps:
            if what == "decrypt":  # room for it: what was encrypted is enough to make the victim again
                forget(victim)
                shutil.rmtree(victim)
            seconds, busy, peak = timed(command, read, written)
            speed = size / 1e9 / seconds
            base_speed = base_speed or speed
            table.add_row(
                what,
                f"{seconds:.1f}",
                f"{busy:.1f}",
                f"{speed:.3f}",
                f"{speed / base_speed:.2f}",
                f"{peak:.0f}",
            )
            console.print(
                f"{what}: {seconds:.1f} s ({busy:.1f} s of CPU), {speed:.3f} GB/s, peak {peak:.0f} MiB"
            )
            if what == "cp -r":
                shutil.rmtree(copy)
        shutil.rmtree(locked)
        make(victim, layers)
        same, *others = filecmp.cmpfiles(opened, victim, os.listdir(victim), shallow=False)
        console.print(table)
        weights = [file for file in same if file.endswith(".safetensors")]
        console.print(
            f"decrypted files equal to the victim's: {len(weights)} of {files}"
            if len(weights) == files
            else f"NOT EQUAL: {others}"
        )


if __name__ == "__main__":
    main()
