"""Memory of fine-tuning on a folder of images: the same for two hundred images and for twenty thousand.

python benchmarks/fine_tuning.py [--images 200,2000,20000] [--side 224] [--steps 12]

Each row is a process of its own, which trains ResNet-18 on images that are decoded when they are needed; the
peak is the process's own (resident set). The images are random JPEG files; a larger folder holds links to the
same files, which deepenc does not know and reads one by one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = 64


def make_images(folder: Path, count: int, side: int) -> None:
    """A folder with two classes of images."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index < FILES:
            pixels = rng.integers(0, 255, (side + 32, side + 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            os.link(folder / str(index % FILES % 2) / f"{index % FILES}.jpg", path)


def train(folder: Path, side: int, steps: int, batch: int) -> float:
    """Fine-tune on the folder; the peak of this process's memory, in MiB."""
    import torch
    from torchvision.models import resnet18

    from deepenc.tasks.classification import Classification
    from deepenc.tasks.examples import Examples
    from deepenc.victims.data.datasets import DEVIATION, MEAN
    from deepenc.victims.data.images import image_folder, preparing
    from deepenc.victims.recipe import Recipe
    from deepenc.victims.training import fit

    task = Classification(classes=2)
    examples = Examples.read(image_folder(folder, preparing(side, MEAN, DEVIATION)), task.collate)
    network = resnet18(num_classes=2)
    fit(network, task, examples, Recipe(steps=steps, batch_size=batch), torch.Generator().manual_seed(0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a row for each number of images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="200,2000,20000")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(train(options.folder, options.side, options.steps, options.batch))
        return
    print("| images | decoded, they would take | peak of the process |\n| --- | --- | --- |")
    for count in map(int, options.images.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            make_images(Path(temporary), count, options.side)
            settings = ("--side", "--steps", "--batch")
            values = map(str, (options.side, options.steps, options.batch))
            same = [part for pair in zip(settings, values, strict=True) for part in pair]
            command = [sys.executable, __file__, "--folder", temporary, *same]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {count:,} | {count * 3 * options.side**2 * 4 / 2**20:,.0f} MiB | {peak:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
