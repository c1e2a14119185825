"""A run with all weights trained resumes to the byte in every family.

Those that docs/models.md names, and some that it does not.
"""

import os
import signal

import numpy as np
import pytest
import torch
import transformers
from test_families import COMMON, FAMILIES, GROUPED, OLD
from transformers import AutoModelForCausalLM, set_seed

from dpo_lab.loop import Interrupted, LoopConfig
from dpo_lab.models import load_model, load_tokenizer, save_policy
from dpo_lab.preferences import Preferences
from dpo_lab.train import DPOConfig, train_dpo

MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MORE = {
    "GPT2": OLD,
    "Llama": GROUPED,
    "GPTNeo": COMMON
    | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "BioGpt": COMMON,
    "Olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": MOE | {"head_dim": 8},
}
CONFIG = DPOConfig(
    beta=0.5,
    epochs=4,
    batch_pairs=1,
    loop=LoopConfig(learning_rate=1e-2, warmup_steps=1, eval_every=1),
)


def preferences(model):
    ends = {"prompt_of": np.array([0, 0]), "chosen": np.array([0]), "rejected": np.array([1])}
    return Preferences([[1, 5]], [[6, 6, 2], [5, 2]], **ends).with_reference(model)


def make(name):
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(**(FAMILIES | MORE)[name])
    return AutoModelForCausalLM.from_config(config).eval()


def stops(model, step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return {}


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES | MORE)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_stopped_run_resumes_to_the_same_bytes(name, tied, tmp_path):
    def fresh():
        model = make(name)
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model

    data, whole, resumed = preferences(fresh()), fresh(), fresh()
    train_dpo(whole, data, CONFIG, progress=None)
    with pytest.raises(Interrupted):
        train_dpo(fresh(), data, CONFIG, run=tmp_path, callback=stops, progress=None)
    train_dpo(resumed, data, CONFIG, run=tmp_path, resume=True, progress=None)
    assert same(resumed, whole) and not same(whole, fresh())


def test_a_generation_config_that_transformers_does_not_write_stops_no_run(tiny, tmp_path):
    def fresh():
        model = load_model(str(tiny))
        model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
        model.generation_config.eos_token_id = [0, 7]
        return model

    model = fresh()
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "theirs")
    train_dpo(model, preferences(model), CONFIG, run=tmp_path / "run", progress=None)
    save_policy(model, load_tokenizer(str(tiny)), tmp_path / "policy")
    assert model.generation_config.temperature == 0.6
    loaded = load_model(str(tmp_path / "policy"))
    assert (
        same(loaded, model)
        and loaded.generation_config.to_dict() == model.generation_config.to_dict()
    )


def test_an_ordinary_generation_config_is_saved_as_transformers_saves_it(tiny, tmp_path):
    model = load_model(str(tiny))
    model.generation_config.eos_token_id = [0, 7]
    model.save_pretrained(tmp_path / "theirs")
    save_policy(model, load_tokenizer(str(tiny)), tmp_path / "ours")
    for name in ("generation_config.json", "config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
