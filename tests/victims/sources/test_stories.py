"""The public language model: its published figures, parts apart, both layouts of its tokens."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import deepenc
from deepenc.arena.duel import judged
from deepenc.errors import VictimError
from deepenc.victims.sources.stories import Stories, read_rows
from deepenc.victims.validation import validated

real = pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="DEEPENC_DATA names no data folder")


@real
def test_it_predicts_as_published_and_comes_back_from_encryption() -> None:
    victim = validated(Stories().load(Path()))
    assert victim.task.vocabulary == 512
    with np.load(Path(os.environ["DEEPENC_DATA"]) / "stories" / "tokens.npz") as held:
        rows = torch.from_numpy(held["tokens"][:100].astype(np.int64))
    with torch.no_grad():
        outputs = victim.task.run(victim.model, {"input_ids": rows})
    worth = victim.task.worth(victim.task.outcomes(outputs, rows))
    assert (round(worth.value, 2), round(worth.further["perplexity"], 1)) == (0.61, 5.7)  # with the file
    encrypted, key = deepenc.encrypt(victim.model, victim.example, "paper-samp", seed=0)
    assert judged(encrypted, victim, "victim", 100, torch.device("cpu")).value < 0.5
    state = deepenc.decrypt(encrypted, key).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in victim.model.state_dict().items())


@real
def test_parts_share_no_story() -> None:
    victim = Stories().load(Path())
    parts = [set(part.digests()) for part in (victim.defender, victim.attacker, victim.judge)]
    assert [len(part) for part in parts] == [224, 314, 361]
    assert all(not one & two for one, two in itertools.combinations(parts, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(config)
    config.to_json_file(tmp_path / "config.json")
    state = {name: t for name, t in network.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


ROWS = np.random.default_rng(0).integers(3, 32, (20, 128)).astype(np.uint16)


def test_rows_and_llama2_c_s_files_are_the_same_stories(folder: Path) -> None:
    rows = ROWS.copy()
    rows[:, 0] = 1
    np.savez(folder / "tokens.npz", tokens=rows)
    victim = validated(Stories(folder=folder).load(Path()))
    assert sum(len(part) for part in (victim.defender, victim.attacker, victim.judge)) == 20
    (folder / "tokens.npz").unlink()
    short = np.array([1, 5, 6], dtype=np.uint16)  # too short, and left out
    longer = np.append(rows[0], [7, 8]).astype(np.uint16)
    np.concatenate([short, longer, rows[1:].ravel()]).tofile(folder / "data00.bin")
    assert np.array_equal(read_rows(folder), np.unique(rows, axis=0))
    assert validated(Stories(folder=folder).load(Path())).fingerprint == victim.fingerprint


def test_what_a_folder_must_not_be(folder: Path) -> None:
    source = Stories(folder=folder)
    with pytest.raises(VictimError, match=r"no tokens in .*tokens\.npz"):
        source.load(Path())
    np.savez(folder / "tokens.npz", tokens=ROWS[:, :64])
    with pytest.raises(VictimError, match=r"expected whole numbers \(rows, 128\), got uint16 \(20, 64\)"):
        source.load(Path())
    np.savez(folder / "tokens.npz", tokens=ROWS[:2])
    with pytest.raises(VictimError, match="got 2; add some"):
        source.load(Path())
    np.savez(folder / "tokens.npz", tokens=ROWS + 1)  # one id is not in the vocabulary of 32
    with pytest.raises(VictimError, match="victim 'stories'"):
        validated(source.load(Path()))
    (folder / "config.json").write_text("[]")
    with pytest.raises(VictimError, match="expected a JSON object, got list"):
        source.load(Path())
