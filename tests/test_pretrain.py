"""Packing, the held-out loss and the tokenizer of the embedded model; and the shipped model."""

import json
import math

import pytest
import torch
from conftest import make_reviews
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.assets import EMBEDDED
from dpo_lab.batching import pack
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model, load_tokenizer
from dpo_lab.sentiment import pretrain as module
from dpo_lab.sentiment.pretrain import PretrainConfig, held_out_loss, pretrain
from dpo_lab.sentiment.reviews import load_imdb


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(4, 24))
def test_packing_keeps_every_token_once(lengths, context):
    documents = [[1 + i] * n for i, n in enumerate(lengths)]
    rows = pack(documents, context, 0)
    assert all(2 <= len(row) <= context for row in rows)
    kept = sum(map(len, rows))
    total = sum(lengths) + len(lengths)
    assert total - sum((n + 1) % context == 1 for n in lengths) <= kept <= total


def test_packing_is_tight():
    rows = pack([[1] * (3 + i % 40) for i in range(2_000)], 64, 0)
    assert sum(map(len, rows)) / (64 * len(rows)) > 0.97


def test_the_tokenizer_round_trips_any_text(tokenizer):
    for text in ("plain", "naïve café — 映画 🎬\n\ttabs", " leading space", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0 and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_held_out_loss_is_the_mean_over_every_token(model, tokenizer):
    texts = ["this film was a joy", make_reviews(1)[0][0] * 4]
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = [*tokenizer(text)["input_ids"], 0]
            for t in range(1, len(ids)):
                start = 0 if t < 64 else t - 32 - (t - 64) % 32
                logits = model(torch.tensor([ids[start:t]])).logits[0, -1].double()
                nats -= float(logits.log_softmax(-1)[ids[t]])
                tokens += 1
    found = held_out_loss(model, tokenizer, texts)
    assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    n_bytes = sum(len(t.encode()) for t in texts)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_pretraining_learns_resumes_and_writes_a_card(tmp_path, monkeypatch):
    train, test = make_reviews(120)[0], make_reviews(20, seed=9)[0]
    monkeypatch.setattr(
        module, "load_imdb", lambda: {"train": {"text": train}, "test": {"text": test}}
    )
    loop = LoopConfig(
        learning_rate=1e-2,
        optimizer="muon",
        schedule="linear",
        warmup_steps=3,
        eval_every=10,
        save_every=5,
    )
    config = PretrainConfig(
        vocabulary=300, context=64, width=32, layers=2, heads=2, rows=8, steps=20, loop=loop
    )
    folder = pretrain(tmp_path / "run", config)
    card = json.loads((folder / "card.json").read_text())
    assert card["curve"][0]["eval/nats_per_token"] > card["curve"][-1]["eval/nats_per_token"] + 0.5
    assert len(card["samples"]) == 10 and card["provenance"]["commit"] and card["minutes"] >= 0
    found = held_out_loss(load_model(str(folder)), load_tokenizer(str(folder)), test)
    assert found["bits_per_byte"] == pytest.approx(card["held_out"]["bits_per_byte"], rel=1e-5)
    with pytest.raises(ValueError, match="--resume"):
        pretrain(tmp_path / "run", config)
    again = pretrain(tmp_path / "run", config, resume=True)
    assert json.loads((again / "card.json").read_text())["held_out"] == card["held_out"]


def test_the_shipped_model_is_small_and_as_good_as_its_card_says():
    card = json.loads((EMBEDDED / "card.json").read_text())
    model, tokenizer = load_model(), load_tokenizer()
    assert sum(p.numel() for p in model.parameters()) == card["parameters"] <= 10_000_000
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 20e6
    assert len(tokenizer) == 8_192 and model.config.model_type == "gpt2"
    found = held_out_loss(model, tokenizer, list(load_imdb()["test"]["text"])[:100])
    assert found["bits_per_byte"] == pytest.approx(card["held_out"]["bits_per_byte"], rel=0.03)
