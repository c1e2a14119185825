"""Checks of homework: `check_kl(my_kl)` says that it is right, or what is wrong with it.

There is one check per exercise of `notebooks/exercises`. A wrong answer raises `Wrong`, whose first
line names the mistakes; `seed` draws the inputs, and `seconds` limits each call.
"""

from collections.abc import Callable
from typing import Any

from dpo_lab.checks import dpo, objective, other_losses, ppo, preferences, sequence
from dpo_lab.checks.attempt import Wrong
from dpo_lab.checks.diagnosis import check, diagnose, solved
from dpo_lab.checks.exercise import Exercise, Slip, mistakes

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for module in (objective, preferences, dpo, other_losses, ppo, sequence)
    for exercise in module.EXERCISES
}
"""By name, without the my_ of the student's function."""


def _check_of(name: str) -> Callable[..., None]:
    """The check of one exercise."""

    def checking(
        function: Callable[..., Any], *, seed: int | None = None, seconds: float | None = None
    ) -> None:
        check(EXERCISES[name], function, seed=seed, seconds=seconds)

    checking.__name__ = checking.__qualname__ = f"check_{name}"
    checking.__doc__ = f"Print that `my_{name}` is right, or raise `Wrong` with its mistakes."
    return checking


check_kl = _check_of("kl")
check_optimal_policy = _check_of("optimal_policy")
check_log_partition = _check_of("log_partition")
check_implicit_reward = _check_of("implicit_reward")
check_bt_nll = _check_of("bt_nll")
check_bt_gradient = _check_of("bt_gradient")
check_plackett_luce_nll = _check_of("plackett_luce_nll")
check_pairs = _check_of("pairs")
check_dpo_loss = _check_of("dpo_loss")
check_gradient_weights = _check_of("gradient_weights")
check_dpo_gradient = _check_of("dpo_gradient")
check_ipo_loss = _check_of("ipo_loss")
check_smoothed_loss = _check_of("smoothed_loss")
check_reinforce_gradient = _check_of("reinforce_gradient")
check_gae = _check_of("gae")
check_ppo_clip = _check_of("ppo_clip")
check_sequence_logps = _check_of("sequence_logps")
check_sequence_kl = _check_of("sequence_kl")
check_dpo_step = _check_of("dpo_step")

__all__ = ["EXERCISES", "Exercise", "Slip", "Wrong", "check", "diagnose", "mistakes", "solved"]
__all__ += [f"check_{name}" for name in EXERCISES]
