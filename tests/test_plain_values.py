"""Values of numpy and torch are as good as plain ones at every door.

What is neither is refused by name.
"""

import json
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict

from dpo_lab import plots
from dpo_lab.assets import EMBEDDED
from dpo_lab.batching import completion_batch
from dpo_lab.engine.runs import read_metrics
from dpo_lab.evaluate import distinct_n, evaluate_policy, win_rate
from dpo_lab.logprobs import score_completions
from dpo_lab.losses import (
    bradley_terry_nll,
    clipped_value_loss,
    dpo_loss,
    plackett_luce_loss,
    ppo_clip_loss,
    unlikelihood_loss,
)
from dpo_lab.models import ScalarModel, load_model, load_tokenizer
from dpo_lab.preferences import Preferences, from_rankings, from_rows, from_scores
from dpo_lab.rlhf.ppo import PPOConfig, adapted_kl_coefficient, gae, train_ppo
from dpo_lab.sampling import texts_of
from dpo_lab.sentiment import results as contenders
from dpo_lab.theory import bandit, log_linear
from dpo_lab.theory.bradley_terry import fit_bradley_terry
from dpo_lab.theory.frontier import best_of_n, frontier_band, optimal_frontier
from dpo_lab.theory.objective import (
    implicit_reward,
    log_partition,
    objective_value,
    optimal_policy,
    value_gap,
)

ROW = {"prompt": "this film", "chosen": " was a joy", "rejected": " was a bore"}
SEQUENCES = {
    "numpy": np.array,
    "numpy int32": lambda values: np.array(values, dtype=np.int32),
    "torch": torch.tensor,
    "torch int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "tuple": tuple,
    "list of numpy": lambda values: [np.int64(value) for value in values],
    "list of tensors": lambda values: [torch.tensor(value) for value in values],
}
FLOATS = {
    "numpy": np.array,
    "numpy float32": lambda values: np.array(values, dtype=np.float32),
    "torch": torch.tensor,
    "torch bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
    "torch with a gradient": lambda values: torch.tensor(values, requires_grad=True),
    "list of tensors": lambda values: [
        torch.tensor(value, dtype=torch.bfloat16, requires_grad=True) for value in values
    ],
    "tuple": tuple,
}
as_sequence = pytest.mark.parametrize("of", SEQUENCES.values(), ids=SEQUENCES)
as_floats = pytest.mark.parametrize("of", FLOATS.values(), ids=FLOATS)
NO_IDS = [
    ([5.0, 6.0], "5.0"),
    ([5, None], "None"),
    ([True, 5], "True or False"),
    (np.array([True]), "True"),
    ("ab", "'ab'"),
    (5, "5"),
]
NO_IDS += [(np.array([0.5]), "0.5"), (torch.tensor([1.0]), "1.0"), (None, "None")]


def fields(p):
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(p).items()
    }


# Token ids and indices


@as_sequence
def test_scored_ids_become_plain(of, tokenizer, model):
    prompts, completions, scores = [[0, 7]], [[[5, 6, 0], [7, 0], [7, 0]]], [[2.0, 1.0, 0.0]]
    plain = from_scores(prompts, completions, scores, tokenizer, context=64)
    found = from_scores(
        [of(p) for p in prompts],
        [[of(c) for c in row] for row in completions],
        scores,
        tokenizer,
        context=64,
    )
    assert fields(found) == fields(plain) and found.report.identical == 1
    assert {type(token) for ids in found.prompts + found.completions for token in ids} == {int}
    assert (
        found.with_reference(model).reference_logps.tolist()
        == plain.with_reference(model).reference_logps.tolist()
    )


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_whole_arrays_are_taken_as_a_model_gives_them(of, tokenizer):
    prompts, completions, scores = (
        [[0, 7], [0, 8]],
        [[[5, 0], [6, 0]], [[5, 0], [9, 0]]],
        [[2.0, 1.0], [0.0, 1.0]],
    )
    plain = from_scores(prompts, completions, scores, tokenizer, context=64)
    assert fields(
        from_scores(of(prompts), of(completions), of(scores), tokenizer, context=64)
    ) == fields(plain)


@as_floats
def test_scores_become_float64(of, tokenizer):
    found = from_scores(["a"], [[" joy", " bore"]], [of([0.5, -1.0])], tokenizer, context=64)
    assert found.scores.tolist() == [0.5, -1.0] and found.scores.dtype == np.float64


def small(**changes):
    parts = {
        "prompts": [[0], [0, 1]],
        "completions": [[2, 0], [3, 0], [2, 0], [3, 0]],
        "prompt_of": [0, 0, 1, 1],
    }
    return Preferences(**parts | {"chosen": [0, 3], "rejected": [1, 2]} | changes)


@as_sequence
def test_preferences_built_by_hand_become_plain(of, model, tmp_path):
    plain = small()
    assert plain.prompt_of.dtype == plain.chosen.dtype == plain.rejected.dtype == np.int64
    ids = {name: [of(row) for row in getattr(plain, name)] for name in ("prompts", "completions")}
    found = small(
        **ids,
        **{name: of(getattr(plain, name).tolist()) for name in ("prompt_of", "chosen", "rejected")},
    )
    assert fields(found) == fields(plain) and found.tokens_hash() == plain.tokens_hash()
    assert found.pairs_by_prompt() == [[0], [1]]
    scored = found.with_reference(model)
    scored.save(str(tmp_path / "p"))
    assert fields(Preferences.load(str(tmp_path / "p"))) == fields(scored)


@as_floats
@pytest.mark.parametrize("name", ["scores", "reference_logps"])
def test_scores_and_log_probs_built_by_hand_become_float64(of, name):
    found = getattr(small(**{name: of([0.5, -1.0, 2.0, 0.25])}), name)
    assert found.dtype == np.float64 and found.tolist() == [0.5, -1.0, 2.0, 0.25]


@as_sequence
def test_batches_are_made_of_any_sequence(of, model):
    prompts, completions, prompt_of = (
        [[0, 1, 2], [3], [4, 5]],
        [[6, 0], [7, 8, 0], [9], [10, 11]],
        [0, 0, 2, 2],
    )
    given = [of(p) for p in prompts], [of(c) for c in completions], of(prompt_of)
    for share in (False, True):
        plain, found = (
            completion_batch(prompts, completions, prompt_of, compact=share),
            completion_batch(*given, compact=share),
        )
        for name in ("input_ids", "position_ids", "sources", "targets", "owners", "spread", "pack"):
            a, b = getattr(plain, name), getattr(found, name)
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert (
        score_completions(model, *given).tolist()
        == score_completions(model, prompts, completions, prompt_of).tolist()
    )


def test_a_batch_of_one_array_is_a_batch(model):
    prompts, completions = np.array([[0, 1], [0, 2]]), np.array([[3, 0], [4, 0]])
    found = completion_batch(prompts, completions, range(2))
    assert torch.equal(
        found.targets, completion_batch(prompts.tolist(), completions.tolist(), [0, 1]).targets
    )


ID_DOORS = {
    "completions[0]": lambda ids, t: completion_batch([[0]], [ids], [0]),
    "prompts[1]": lambda ids, t: completion_batch([[0], ids], [[1]], [1]),
    "prompt_of": lambda ids, t: completion_batch([[0]], [[1]], ids),
    "completions[0][1]": lambda ids, t: from_scores(
        [[0]], [[[5, 0], ids]], [[1, 0]], t, context=64
    ),
    "prompt 0": lambda ids, t: from_scores([ids], [[[5, 0], [6, 0]]], [[1, 0]], t, context=64),
    "prompts[1] ": lambda ids, t: small(prompts=[[0], ids]),
    "completions[2]": lambda ids, t: small(completions=[[2, 0], [3, 0], ids, [3, 0]]),
    "chosen": lambda ids, t: small(chosen=ids),
    "rejected": lambda ids, t: small(rejected=ids),
    "chosen ": lambda ids, t: fit_bradley_terry(ids, [0, 1], 2),
}


@pytest.mark.parametrize(
    "ids, shown", NO_IDS, ids=[f"{type(ids).__name__} {shown}" for ids, shown in NO_IDS]
)
@pytest.mark.parametrize("name", ID_DOORS)
def test_what_is_no_token_or_index_is_refused_by_name(name, ids, shown, tokenizer):
    if (
        isinstance(ids, str)
        and name == "completions[0][1]"
        or name == "prompt 0"
        and isinstance(ids, str)
    ):
        return  # a text, which these take
    with pytest.raises((TypeError, ValueError)) as caught:
        ID_DOORS[name](ids, tokenizer)
    one_each = name == "prompt_of" and "need one each" in str(caught.value)
    assert one_each or (name.strip() in str(caught.value) and shown in str(caught.value)), (
        caught.value
    )


@pytest.mark.parametrize("name", ["completions[0][1]", "prompt 0", "prompts[1] ", "completions[2]"])
def test_negative_ids_are_refused_by_name(name, tokenizer):
    with pytest.raises(
        ValueError, match=r"\[1\] is -100; a token id is an index into the vocabulary"
    ) as caught:
        ID_DOORS[name]([5, -100], tokenizer)
    assert name.strip() in str(caught.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda t: from_scores("ab", [[" a", " b"]] * 2, [[1, 0]] * 2, t, context=64),
            "prompts is 'ab' .str",
        ),
        (
            lambda t: from_scores(["a"], [" bore"], [[1, 0, 0, 0, 0]], t, context=64),
            r"completions\[0\] is one string, ' bore'",
        ),
        (
            lambda t: from_scores(["a"], [[" a", " b"]], [["x", "y"]], t, context=64),
            r"scores\[0\] holds 'x'",
        ),
        (lambda t: from_rankings("ab", [[" a", " b"]] * 2, t, context=64), "prompts is 'ab' .str"),
        (
            lambda t: from_rankings(["a"], [[" a", None]], t, context=64),
            "ranking 0 must hold at least two different",
        ),
        (lambda t: from_rows([ROW], t, context=64.0), "context is 64.0 .float"),
        (
            lambda t: from_rows([ROW], t, context=64, max_completion_tokens="9"),
            "max_completion_tokens is '9'",
        ),
        (lambda t: replace(small(), reference_precision="bf16"), "reference_precision is 'bf16'"),
        (lambda t: small(scores=["a"] * 4), "scores holds 'a'"),
    ],
)
def test_other_values_of_the_wrong_kind_are_named(make, words, tokenizer):
    with pytest.raises((TypeError, ValueError), match=words):
        make(tokenizer)


# Rows


@pytest.mark.parametrize(
    "rows, words",
    [
        (
            DatasetDict(train=Dataset.from_list([ROW])),
            ["rows is a DatasetDict", "['train']", "rows['train']"],
        ),
        (pandas.DataFrame([ROW]), ["rows is a DataFrame", "Dataset.from_pandas(rows)"]),
        (ROW, ["rows is a dict that is one row", "[row]"]),
        (
            {name: [text] for name, text in ROW.items()},
            ["rows is a dict of columns", "Dataset.from_dict(rows)"],
        ),
        ("rows.jsonl", ["rows is a str and no rows", "load_dataset"]),
        (3, ["rows is a int, 3", "holds no rows"]),
        (None, ["rows is a NoneType"]),
        ((row for row in [ROW, "text"]), ["row 1 is a str, 'text'", "mapping"]),
        ([[ROW]], ["row 0 is a list"]),
        ([tuple(ROW.values())], ["row 0 is a tuple", "mapping"]),
    ],
)
def test_what_holds_no_rows_is_named_with_what_to_pass(rows, words, tokenizer):
    with pytest.raises(ValueError) as caught:
        from_rows(rows, tokenizer, context=64)
    assert [
        word for word in [*words, "'chosen': ' was a joy.'"] if word not in str(caught.value)
    ] == [], caught.value


@pytest.mark.parametrize(
    "wrap",
    [iter, tuple, Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()],
)
def test_any_iterable_of_rows_is_read(wrap, tokenizer):
    rows = [ROW, ROW | {"prompt": "the plot"}]
    assert fields(from_rows(wrap(rows), tokenizer, context=np.int64(64))) == fields(
        from_rows(rows, tokenizer, context=64)
    )


# Settings

NUMBERS = {
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "torch": torch.tensor,
    "numpy array": np.array,
}
LOGPS = torch.tensor([-1.0, -2.0, -3.0])
CHOSEN, REJECTED = torch.tensor([0, 1]), torch.tensor([1, 2])
PROMPTS = log_linear.draw_prompts(torch.ones(1, 2), 3, 4, torch.Generator().manual_seed(0))
P, Q, R = (
    torch.tensor(row, dtype=torch.float64)
    for row in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1.0, 0.0, -1.0])
)
SETTINGS = {
    "dpo_loss beta": lambda x: dpo_loss(LOGPS, LOGPS - 1, CHOSEN, REJECTED, x),
    "dpo_loss label_smoothing": lambda x: dpo_loss(
        LOGPS, LOGPS - 1, CHOSEN, REJECTED, 0.1, label_smoothing=x
    ),
    "robust label_smoothing": lambda x: dpo_loss(
        LOGPS, LOGPS, CHOSEN, REJECTED, 0.1, loss_type="robust", label_smoothing=x
    ),
    "plackett_luce_loss beta": lambda x: plackett_luce_loss(
        LOGPS, LOGPS - 1, torch.stack([CHOSEN, REJECTED], 1), x
    ),
    "unlikelihood_loss alpha": lambda x: unlikelihood_loss(LOGPS, CHOSEN, REJECTED, x),
    "ppo_clip_loss clip": lambda x: ppo_clip_loss(LOGPS, LOGPS - 1, LOGPS, x),
    "clipped_value_loss clip": lambda x: clipped_value_loss(LOGPS, LOGPS - 1, LOGPS, x),
    "objective_value beta": lambda x: objective_value(P, Q, R, x),
    "log_partition beta": lambda x: log_partition(Q, R, x),
    "optimal_policy beta": lambda x: optimal_policy(Q, R, x),
    "implicit_reward beta": lambda x: implicit_reward(P, Q, x),
    "value_gap beta": lambda x: value_gap(P, Q, R, x),
    "exact_gradient beta": lambda x: bandit.exact_gradient(P, Q, R, x),
    "penalized_rewards beta": lambda x: bandit.penalized_rewards(P, Q, R, x),
    "descend learning_rate": lambda x: bandit.gradient_descent(
        lambda logps: -logps[0], Q, steps=2, learning_rate=x
    ),
    "log_linear_descent learning_rate": lambda x: log_linear.log_linear_descent(
        lambda logps: -logps[..., 0], PROMPTS, steps=2, learning_rate=x
    ),
    "policy_gradient learning_rate": lambda x: bandit.policy_gradient(
        Q,
        R,
        0.5,
        steps=2,
        samples=4,
        learning_rate=x,
        generator=torch.Generator().manual_seed(0),
        clip=0.25,
    ),
    "policy_gradient clip": lambda x: bandit.policy_gradient(
        Q,
        R,
        0.5,
        steps=2,
        samples=4,
        learning_rate=0.5,
        generator=torch.Generator().manual_seed(0),
        clip=x,
    ),
    "gae gamma": lambda x: gae(
        LOGPS[None], LOGPS[None], torch.ones(1, 3, dtype=torch.bool), x, 0.5
    ),
    "gae lam": lambda x: gae(LOGPS[None], LOGPS[None], torch.ones(1, 3, dtype=torch.bool), 0.5, x),
    "adapted_kl_coefficient coefficient": lambda x: adapted_kl_coefficient(x, 2.0, 1.0, 0.5),
    "adapted_kl_coefficient kl": lambda x: adapted_kl_coefficient(1.0, x, 1.0, 0.5),
}


def results(found):
    """What a function returned, as tensors of what dtype they are."""
    found = found if isinstance(found, tuple) else (found,)
    return [(getattr(part, "dtype", type(part)), torch.as_tensor(part).tolist()) for part in found]


@pytest.mark.parametrize("of", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("call", SETTINGS.values(), ids=SETTINGS)
def test_a_number_of_any_library_gives_what_a_float_gives(call, of):
    """0.25 is exact in every precision, so equality is exact; the result keeps its own dtype."""
    assert results(call(of(0.25))) == results(call(0.25))


@pytest.mark.parametrize(
    "value",
    ["0.25", None, True, [0.25], torch.tensor([0.25, 0.5]), torch.tensor(0.25, requires_grad=True)],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_no_number_is_refused_by_name(name, value):
    if name == "policy_gradient clip" and value is None:
        return  # no clip
    with pytest.raises((TypeError, ValueError), match=f"{name.split()[1]} is "):
        SETTINGS[name](value)


INTEGERS = {
    "all_pairs n": lambda n: [index.tolist() for index in bandit.all_pairs(n)],
    "fit_bradley_terry n": lambda n: fit_bradley_terry([0, 1], [1, 0], n).rewards.tolist(),
    "best_of_n n": lambda n: best_of_n(np.arange(12.0).reshape(3, 4), n).tolist(),
    "distinct_n n": lambda n: distinct_n([[1, 2, 1, 2, 3]], n),
    "sample_pairs n": lambda n: [
        x.tolist() for x in bandit.sample_pairs(Q, R, n, torch.Generator().manual_seed(0))
    ],
    "descend steps": lambda n: bandit.gradient_descent(
        lambda logps: -logps[0], Q, steps=n, learning_rate=0.5
    ).tolist(),
    "log_linear_descent steps": lambda n: log_linear.log_linear_descent(
        lambda logps: -logps[..., 0], PROMPTS, steps=n, learning_rate=0.5
    ).tolist(),
    "draw_prompts prompts": lambda n: log_linear.draw_prompts(
        torch.ones(1, 2), n, 3, torch.Generator().manual_seed(0)
    ).first.tolist(),
    "draw_prompts completions": lambda n: log_linear.draw_prompts(
        torch.ones(1, 2), 4, n, torch.Generator().manual_seed(0)
    ).first.tolist(),
    "label_pairs labels": lambda n: log_linear.label_pairs(
        PROMPTS, n, torch.Generator().manual_seed(0)
    ).tolist(),
    "minimize iterations": lambda n: bandit.minimize(
        lambda logps: (logps**2).sum(), Q, iterations=n
    ).tolist(),
    "frontier_band resamples": lambda n: [
        end.tolist()
        for end in frontier_band(
            np.linspace(0, 1, 24).reshape(2, 12), [1.0, 9.0], [0.01], resamples=n
        )
    ],
    "from_rows max_completion_tokens": lambda n: fields(
        from_rows([ROW | {"chosen": "joy"}], load_tokenizer(), context=64, max_completion_tokens=n)
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_of_any_library_gives_what_an_int_gives_and_a_float_is_refused(name):
    call = INTEGERS[name]
    for value in (np.int64(2), np.int32(2), torch.tensor(2)):
        assert str(call(value)) == str(call(2))
    for value in (2.0, "2", True):
        with pytest.raises(TypeError, match=f"{name.split()[1]} is {value!r}"):
            call(value)


def test_rewards_of_any_kind_are_evaluated(model, tokenizer):
    prompts = [[0, 5], [0, 6, 7]]
    kinds = (list, np.array, lambda r: np.array(r, dtype=np.float32), torch.tensor)
    found = [
        evaluate_policy(
            model,
            model,
            prompts,
            lambda texts, of=of: of([0.25, 0.75]),
            tokenizer,
            max_new_tokens=2,
        )
        for of in kinds
    ]
    assert all(one == found[0] for one in found) and json.dumps(vars(found[0]))
    with pytest.raises(ValueError, match=r"reward gave the shape \(1,\) for 2 texts"):
        evaluate_policy(model, model, prompts, lambda texts: [0.5], tokenizer, max_new_tokens=2)
    assert win_rate(torch.tensor([1.0, 0.0]), (0.0, 1.0)) == win_rate([1.0, 0.0], [0.0, 1.0])
    scores = torch.rand(4, 3)
    assert (
        optimal_frontier(scores, torch.tensor([1.0])).kl.tolist()
        == optimal_frontier(scores.numpy(), [1.0]).kl.tolist()
    )


@as_sequence
def test_completions_of_any_kind_are_counted_and_read(of, model, tokenizer):
    completions, prompts = [[1, 2, 1, 2], [1, 2]], [[0, 5], [0, 6]]
    assert distinct_n([of(ids) for ids in completions], 2) == distinct_n(completions, 2) == 0.5
    plain = texts_of(tokenizer, prompts, [[ids] for ids in completions])
    assert (
        texts_of(tokenizer, [of(ids) for ids in prompts], [[of(ids)] for ids in completions])
        == plain
    )
    found = [
        evaluate_policy(model, model, given, lambda texts: np.ones(2), tokenizer, max_new_tokens=2)
        for given in (prompts, [of(ids) for ids in prompts])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "of", [list, np.array, torch.tensor, lambda values: torch.tensor(values, requires_grad=True)]
)
def test_figures_take_arrays_of_any_kind(of):
    two, table = of([0.25, 0.75]), of([[1.0, 2.0], [3.0, 4.0]])
    figures = [
        plots.plot_distributions(["a", "b"], {"one": two}),
        plots.plot_beta_path([1.0, 2.0], table, ["a", "b"], two, two),
        plots.plot_lines("t", two, {"one": two}, "x", "y"),
        plots.plot_band("t", two, table, {"one": two}, "x", "y"),
        plots.plot_race("t", {"one": ([1, 2], table)}, "x", "y"),
        plots.plot_intervals(["a", "b"], two, two, two),
        plots.plot_calibration(two, two, of([4.0, 9.0])),
        plots.plot_pairs(two, [1], [0]),
    ]
    for figure in figures:
        figure.draw_without_rendering()
    assert figures[2].axes[0].get_lines()[0].get_xydata().tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert [bar.get_height() for bar in figures[0].axes[0].patches] == [0.25, 0.75]


def test_comparisons_of_any_kind_are_fitted():
    plain = fit_bradley_terry([0, 1, 0], [1, 0, 1], 2)
    for of in SEQUENCES.values():
        assert (
            fit_bradley_terry(of([0, 1, 0]), of([1, 0, 1]), 2).rewards.tolist()
            == plain.rewards.tolist()
        )
    nll = bradley_terry_nll(torch.from_numpy(plain.rewards), CHOSEN[:1], REJECTED[:1])
    assert nll.dtype == torch.float64


def test_ppo_writes_plain_numbers(model, tiny, tmp_path):
    config = PPOConfig(
        steps=np.int64(1), batch=2, minibatch=torch.tensor(2), max_new_tokens=2,
        kl_coefficient=np.float32(0.25),
        kl_target=np.float32(1.0), learning_rate=np.float32(1e-4),
    )  # fmt: skip
    value = ScalarModel(load_model(str(tiny)))
    prompts = [np.array([0, 5]), torch.tensor([0, 6])]
    reward = lambda prompts, completions: np.arange(len(completions))  # noqa: E731
    found = train_ppo(
        model,
        load_model(str(tiny)),
        value,
        reward,
        prompts,
        config,
        eos_token_id=0,
        run=str(tmp_path),
        progress=None,
    )
    assert read_metrics(tmp_path) == json.loads(json.dumps(found))
    with pytest.raises(TypeError, match="learning_rate is 'fast'"):
        train_ppo(
            model,
            model,
            value,
            reward,
            prompts,
            replace(config, learning_rate="fast"),
            eos_token_id=0,
        )


def test_folders_are_strings_or_paths(monkeypatch):
    monkeypatch.setenv("HOME", str(EMBEDDED.parent.parent))
    found = contenders.load_sweep(f"~/{EMBEDDED.parent.name}")
    assert found.rows == contenders.load_sweep(EMBEDDED.parent).rows == contenders.load_sweep().rows
    with pytest.raises(TypeError, match="folder is 3"):
        contenders.load_sweep(3)
