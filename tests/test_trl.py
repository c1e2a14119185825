"""TRL scores the same tokens, and has the same losses, rewards and gradients."""

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_reviews
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer, KTOTrainer
from trl import KTOConfig as TRLKTOConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import dpo_lab
from dpo_lab.batching import completion_batch
from dpo_lab.logprobs import Scorer, completion_logps
from dpo_lab.loop import LoopConfig
from dpo_lab.losses import dpo_loss
from dpo_lab.models import load_model
from dpo_lab.preferences import from_rankings, from_rows, from_scores
from dpo_lab.train import DPOConfig, check_config, plan_prompts, train_dpo
from dpo_lab.variants.feedback import BinaryFeedback
from dpo_lab.variants.kto import KTOConfig, KTOObjective
from dpo_lab.variants.relatives import aot_loss, cpo_loss, orpo_loss, simpo_loss

EOS = 0

# of TRL's trainers, on this machine
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def preferences(tokenizer):
    """Twelve pairs: four prompts, three completions each; two end with EOS, one is truncated."""
    words = iter(make_reviews(16, seed=1)[0])
    prompts, rankings = ["This film", "The plot", "", "Was it a joy?"], []
    for ends in ((5, 9, 30), (30, 9, 5), (9, 30, 5), (30, 5, 9)):
        rankings.append([" " + " ".join(next(words).split()[2:end]) for end in ends])
    found = from_rankings(
        prompts, rankings, tokenizer, context=64, max_completion_tokens=16
    ).as_text(tokenizer)
    assert found.report == replace(found.report, pairs=12, cut=4, without_eos=4, retokenized=0)
    return found


@pytest.fixture
def reference(tiny):
    """Far from the policy, so that margins lie on both sides of hinge's 1."""
    generator, model = torch.Generator().manual_seed(0), load_model(str(tiny))
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1 + 5 * torch.randn(weights.shape, generator=generator))
    return model


@pytest.fixture
def make_trainer(tiny, tokenizer, reference, tmp_path):
    """TRL's trainer of the tiny model as transformers loads it, in float32."""

    def make(preferences, **settings):
        return DPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny),
            ref_model=copy.deepcopy(reference),
            args=TRLConfig(output_dir=str(tmp_path), **SETTINGS | settings),
            train_dataset=preferences.to_trl(tokenizer),
            processing_class=tokenizer,
        )

    return make


def trained_ids(trainer):
    """The ids that the trainer made of each row."""
    return [
        tuple(row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for row in trainer.train_dataset
    ]


def pair_ids(p):
    return [
        (p.prompts[p.prompt_of[c]], p.completions[c], p.completions[r])
        for c, r in zip(p.chosen, p.rejected)
    ]


def trl_loss(trainer, pairs):
    """TRL's mean loss of some pairs, and the mean rewards of chosen and rejected that it logs."""
    inputs = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[i] for i in pairs])
    )
    loss = trainer.compute_loss(trainer.model, inputs)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    return loss, [metrics[f"rewards/{side}"][-1] for side in ("chosen", "rejected")]


# Tokens


def test_the_trainer_makes_our_tokens_of_our_rows(preferences, make_trainer):
    assert trained_ids(make_trainer(preferences)) == pair_ids(preferences)


def test_a_tokenizer_that_adds_no_bos_gets_no_bos(tokenizer, make_trainer):
    tokenizer.backend_tokenizer.post_processor = None
    found = from_rows(
        [{"prompt": "This film", "chosen": " was a joy", "rejected": " was a bore"}],
        tokenizer,
        context=64,
    )
    assert found.prompts[0][0] != tokenizer.bos_token_id
    assert trained_ids(make_trainer(found)) == pair_ids(found)


def test_characters_of_several_tokens_braces_and_line_breaks_come_through(tokenizer, make_trainer):
    rows = [
        {
            "prompt": "{{ é 🎬 }}\n",
            "chosen": " {% joy %}\r\n ",
            "rejected": "<b>&amp; ‘bore’ 映画</b>  \n",
        }
    ]
    found = from_rows(rows, tokenizer, context=64)
    assert trained_ids(make_trainer(found)) == pair_ids(found)


def test_conversations_keep_the_tokens_of_their_own_template(tokenizer, make_trainer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {
        "prompt": ("user", "Hi"),
        "chosen": ("assistant", "Joy"),
        "rejected": ("assistant", "Bore"),
    }
    row = {name: [{"role": role, "content": content}] for name, (role, content) in row.items()}
    found = from_rows([row], tokenizer, context=64)
    assert trained_ids(make_trainer(found)) == pair_ids(found)


@pytest.fixture
def sampled(tokenizer):
    """Three pairs of one prompt; the best completion is spelled out, as no tokenizer does."""
    prompt, film, bore = tokenizer(["This", " film", " was a bore"], add_special_tokens=False)[
        "input_ids"
    ]
    spelt = [
        i
        for letter in tokenizer(list(" film"), add_special_tokens=False)["input_ids"]
        for i in letter
    ]
    assert tokenizer.decode(spelt) == tokenizer.decode(film) and spelt != film
    return from_scores([[EOS, *prompt]], [[spelt, film, bore]], [[3, 2, 1]], tokenizer, context=64)


def test_pairs_whose_text_has_other_tokens_are_refused(sampled, tokenizer):
    with pytest.raises(
        ValueError,
        match=r"text of 2 of 3 pairs has other tokens .* pair 0 .*This film.*as_text\(tokenizer\)",
    ):
        sampled.to_trl(tokenizer)


def test_pairs_whose_text_has_other_tokens_are_dropped_and_counted(
    sampled, tokenizer, make_trainer
):
    kept = sampled.as_text(tokenizer)
    assert (kept.report.pairs, kept.report.retokenized) == (1, 2)
    assert trained_ids(make_trainer(kept)) == pair_ids(kept) == pair_ids(sampled)[2:]
    assert kept.as_text(tokenizer).report == kept.report


def test_a_token_across_the_boundary_and_half_a_character_are_other_tokens(tokenizer):
    (film,) = tokenizer(" film", add_special_tokens=False)["input_ids"]
    halves = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (" fi", "lm")]
    across = from_scores(
        [[EOS, *halves[0]]], [[halves[1], [film]]], [[1, 0]], tokenizer, context=64
    )
    camera = tokenizer("🎬", add_special_tokens=False)["input_ids"]
    half = from_scores(
        [[EOS, *camera[:1]]], [[camera[1:], [film]]], [[1, 0]], tokenizer, context=64
    )
    assert len(camera) > 1
    for found in (across, half):
        with pytest.raises(
            ValueError, match=re.escape("there is no pair left (pairs 0") + ".*retokenized 1"
        ):
            found.as_text(tokenizer)


# Numbers


@pytest.mark.parametrize(
    "kind, reduction, beta, label_smoothing",
    [
        ("sigmoid", "sum", 0.1, 0),
        ("hinge", "sum", 0.1, 0),
        ("ipo", "mean", 0.5, 0),
        ("robust", "sum", 0.1, 0.2),
        ("exo_pair", "sum", 0.1, 0.01),
    ],
)
def test_losses_rewards_and_gradients_are_those_of_trl(
    kind, reduction, beta, label_smoothing, preferences, tiny, reference, make_trainer
):
    p = preferences
    batch = completion_batch(p.prompts, p.completions, p.prompt_of.tolist(), compact=True)
    chosen, rejected = torch.from_numpy(p.chosen), torch.from_numpy(p.rejected)
    policy = load_model(str(tiny))
    with torch.no_grad():
        reference_logps = completion_logps(reference, batch, reduction=reduction)
    logps = completion_logps(policy, batch, reduction=reduction)
    ours = dpo_loss(
        logps,
        reference_logps,
        chosen,
        rejected,
        beta,
        loss_type=kind,
        label_smoothing=label_smoothing,
    )
    ours.losses.mean().backward()

    trainer = make_trainer(p, beta=beta, loss_type=[kind], label_smoothing=label_smoothing)
    losses, rewards = zip(*(trl_loss(trainer, [i]) for i in range(len(chosen))))
    assert ours.losses.tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-5, abs=1e-5)
    # TRL logs sums, whatever the loss
    lengths = torch.bincount(batch.owners) if reduction == "mean" else torch.ones(batch.n)
    sums = ours.rewards * lengths
    assert torch.stack([sums[chosen], sums[rejected]], 1).numpy() == pytest.approx(
        np.array(rewards), rel=1e-5, abs=1e-5
    )
    assert reduction == "mean" or ours.margins.min() < 1 < ours.margins.max()

    trl_loss(trainer, range(len(chosen)))[0].backward()
    theirs = dict(trainer.model.named_parameters())
    assert theirs.keys() == dict(policy.named_parameters()).keys()
    for name, parameter in policy.named_parameters():
        scale = min(1, float(parameter.grad.abs().max()))
        assert 0 < scale and torch.allclose(
            parameter.grad, theirs[name].grad, atol=1e-5 * scale, rtol=0
        ), name


def test_aot_sorts_the_same_ratios(preferences, tiny, reference, make_trainer):
    p = preferences
    batch = completion_batch(p.prompts, p.completions, p.prompt_of.tolist())
    chosen, rejected = torch.from_numpy(p.chosen), torch.from_numpy(p.rejected)
    with torch.no_grad():
        logps, known = (completion_logps(m, batch) for m in (load_model(str(tiny)), reference))
    ours = aot_loss(logps, known, chosen, rejected, 0.1).losses.mean()
    theirs, _ = trl_loss(make_trainer(p, beta=0.1, loss_type=["aot"]), range(len(chosen)))
    plain = dpo_loss(logps, known, chosen, rejected, 0.1).losses.mean()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5) and abs(ours - plain) > 1e-4


def test_the_losses_without_a_reference_are_those_of_trl_s_trainers():
    """Its losses as it computes them from log-probs, which for SimPO and ORPO are means."""
    logps, lengths = torch.tensor([-22.0, -31.5, -27.0, -14.5]), torch.tensor([8, 12, 9, 5])
    chosen, rejected = torch.tensor([0, 2, 0]), torch.tensor([1, 3, 3])
    sides = [logps[chosen], logps[rejected]]
    means = [(logps / lengths)[side] for side in (chosen, rejected)]
    settings = {"alpha": 0.0, "label_smoothing": 0, "accelerator": SimpleNamespace(device="cpu")}

    simpo = SimpleNamespace(loss_type="simpo", beta=2.0, simpo_gamma=1.0, **settings)
    theirs, *rewards = CPOTrainer.cpo_loss(simpo, *means)
    ours = simpo_loss(logps, lengths, chosen, rejected, 2.0, gamma=1.0)
    assert ours.losses.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert ours.margins.tolist() == pytest.approx((rewards[0] - rewards[1]).tolist(), rel=1e-5)

    cpo = SimpleNamespace(loss_type="sigmoid", beta=0.1, **settings)
    theirs, *_ = CPOTrainer.cpo_loss(cpo, *sides)
    ours = cpo_loss(logps, lengths, chosen, rejected, 0.1, alpha=0.0)
    assert ours.losses.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)

    orpo = SimpleNamespace(beta=0.3, accelerator=settings["accelerator"])
    theirs, _, _, _, odds = ORPOTrainer.odds_ratio_loss(orpo, *means)
    ours = orpo_loss(logps, lengths, chosen, rejected, 0.3)
    assert (ours.losses + means[0]).tolist() == pytest.approx((-theirs).tolist(), rel=1e-4)
    assert float(ours.margins.mean()) == pytest.approx(odds.item(), rel=1e-4)


def test_kto_is_that_of_trl(tiny, tokenizer, reference, tmp_path):
    """Two rows: each completion is the mismatched one of the other, here as there."""
    rows = [
        {"prompt": "This film", "completion": " was a joy", "label": True},
        {"prompt": "The plot", "completion": " was such a bore", "label": False},
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    trainer = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        ref_model=copy.deepcopy(reference),
        args=TRLKTOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            beta=0.3,
            **{**SETTINGS, **weights},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    found = BinaryFeedback.from_rows(rows, tokenizer, context=64).with_reference(reference)
    ids = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset]
    assert ids == list(zip(found.prompts, found.completions))

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    policy = load_model(str(tiny))
    config = KTOConfig(beta=0.3, batch_completions=2, **weights)
    objective = KTOObjective(policy, found, config, seed=0)
    (micro,) = objective.micro_batches(0, 1)
    ours, sums = objective.loss(Scorer(policy), micro)
    assert ours.item() / 2 == pytest.approx(theirs.item(), rel=1e-4)
    assert ours.item() / 2 != pytest.approx(0.5625, rel=1e-2) and sums["kl"] >= 0


def test_every_call_in_the_table_of_losses_is_one(tmp_path):
    """The last two columns of docs/losses.md, as Python."""
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text(encoding="utf-8")
    first = page[page.index("| name |") :].split("\n\n")[0]
    table = [line for line in first.splitlines() if line.startswith("| ")][1:]
    assert len(table) == 13
    settings = {"output_dir": str(tmp_path), **SETTINGS}
    ours = {name: getattr(dpo_lab, name) for name in dpo_lab.__all__}
    theirs = {
        one.__name__: partial(one, **settings)
        for one in (TRLConfig, TRLKTOConfig, CPOConfig, ORPOConfig)
    }
    for line in table:
        here, there = line.split(" | ")[-2:]
        for column, names in ((here, ours), (there, theirs)):
            for code in re.findall("`(.*?)`", column):
                made = eval(code, dict(names))
                if isinstance(made, DPOConfig):
                    check_config(made)


def test_a_run_of_trl_logs_what_ours_does(preferences, tiny, tokenizer, reference, make_trainer):
    loop = LoopConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
    ours = train_dpo(
        load_model(str(tiny)),
        preferences.with_reference(reference),
        DPOConfig(0.1, batch_pairs=6, loop=loop),
        progress=None,
    )
    groups = preferences.linked_pairs()
    order = [
        pair
        for step in plan_prompts(groups, 1, 6, seed=0)
        for group in step
        for pair in groups[group]
    ]
    in_order = replace(
        preferences, chosen=preferences.chosen[order], rejected=preferences.rejected[order]
    )
    settings = {
        "per_device_train_batch_size": 6,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
    }
    trainer = make_trainer(
        in_order,
        beta=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        **settings,
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == trainer.state.global_step == 2
    names = "loss grad_norm learning_rate logps/chosen logps/rejected"
    names += " rewards/chosen rewards/rejected rewards/margins rewards/accuracies"
    for name in names.split():
        assert [line[name] for line in ours] == pytest.approx(
            [line[name] for line in theirs], rel=1e-4, abs=1e-4
        ), name
    assert abs(ours[0]["loss"] - ours[1]["loss"]) > 1e-3
