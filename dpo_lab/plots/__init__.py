"""Figures from arrays: each function returns a matplotlib Figure, without pyplot.

Names and labels are shown letter by letter (`escaping.for_figure`); titles and axis labels may hold
matplotlib's mathematics. Everything that is given is drawn, within the axes, or refused. Names are
imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for editors and type checkers, which do not run `__getattr__`
if TYPE_CHECKING:
    from dpo_lab.plots.curves import (
        plot_band,
        plot_lines,
        plot_loss,
        plot_margins,
        plot_race,
        plot_rewards,
    )
    from dpo_lab.plots.failures import (
        plot_confusion,
        plot_failures,
    )
    from dpo_lab.plots.frontier import (
        plot_betas,
        plot_frontier,
        plot_memory,
        plot_sweep,
    )
    from dpo_lab.plots.judges import (
        count_ticks,
        plot_judges,
        plot_prompts,
        plot_win_rates,
    )
    from dpo_lab.plots.online import (
        plot_coverage,
        plot_means,
        plot_online,
        plot_relatives,
    )
    from dpo_lab.plots.style import (
        ABOVE,
        BELOW,
        CHOSEN,
        COLORS,
        METHODS,
        OPTIMUM,
        POLICY,
        REJECTED,
        ROOT_TICKS,
        STROKES,
        check_labels,
        labeled_figure,
        legend,
        looks,
        palette,
        root_scale,
    )
    from dpo_lab.plots.tax import (
        plot_coefficients,
        plot_rudeness,
        plot_tax,
        plot_trade_off,
    )
    from dpo_lab.plots.theory import (
        plot_beta_path,
        plot_calibration,
        plot_distributions,
        plot_intervals,
        plot_kl,
        plot_simplex,
        plot_tangent,
    )
    from dpo_lab.plots.tokens import (
        plot_pairs,
        plot_token_logps,
        plot_tokens,
        token_html,
    )

__all__ = [
    "ABOVE",
    "BELOW",
    "CHOSEN",
    "COLORS",
    "METHODS",
    "OPTIMUM",
    "POLICY",
    "REJECTED",
    "ROOT_TICKS",
    "STROKES",
    "check_labels",
    "count_ticks",
    "labeled_figure",
    "legend",
    "looks",
    "palette",
    "plot_band",
    "plot_beta_path",
    "plot_betas",
    "plot_calibration",
    "plot_coefficients",
    "plot_confusion",
    "plot_coverage",
    "plot_distributions",
    "plot_failures",
    "plot_frontier",
    "plot_intervals",
    "plot_judges",
    "plot_kl",
    "plot_lines",
    "plot_loss",
    "plot_margins",
    "plot_means",
    "plot_memory",
    "plot_online",
    "plot_pairs",
    "plot_prompts",
    "plot_race",
    "plot_relatives",
    "plot_rewards",
    "plot_rudeness",
    "plot_simplex",
    "plot_sweep",
    "plot_tangent",
    "plot_tax",
    "plot_token_logps",
    "plot_tokens",
    "plot_trade_off",
    "plot_win_rates",
    "root_scale",
    "token_html",
]

# where each name lives
_HOME = {
    "ABOVE": "style",
    "BELOW": "style",
    "CHOSEN": "style",
    "COLORS": "style",
    "METHODS": "style",
    "OPTIMUM": "style",
    "POLICY": "style",
    "REJECTED": "style",
    "ROOT_TICKS": "style",
    "STROKES": "style",
    "check_labels": "style",
    "count_ticks": "judges",
    "labeled_figure": "style",
    "legend": "style",
    "looks": "style",
    "palette": "style",
    "plot_band": "curves",
    "plot_beta_path": "theory",
    "plot_betas": "frontier",
    "plot_calibration": "theory",
    "plot_coefficients": "tax",
    "plot_confusion": "failures",
    "plot_coverage": "online",
    "plot_distributions": "theory",
    "plot_failures": "failures",
    "plot_frontier": "frontier",
    "plot_intervals": "theory",
    "plot_judges": "judges",
    "plot_kl": "theory",
    "plot_lines": "curves",
    "plot_loss": "curves",
    "plot_margins": "curves",
    "plot_means": "online",
    "plot_memory": "frontier",
    "plot_online": "online",
    "plot_pairs": "tokens",
    "plot_prompts": "judges",
    "plot_race": "curves",
    "plot_relatives": "online",
    "plot_rewards": "curves",
    "plot_rudeness": "tax",
    "plot_simplex": "theory",
    "plot_sweep": "frontier",
    "plot_tangent": "theory",
    "plot_tax": "tax",
    "plot_token_logps": "tokens",
    "plot_tokens": "tokens",
    "plot_trade_off": "tax",
    "plot_win_rates": "judges",
    "root_scale": "style",
    "token_html": "tokens",
}


def __getattr__(name: str) -> Any:
    """Import the module in which a public name lives, and keep the name here."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'dpo_lab.plots' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = found = getattr(import_module(f"dpo_lab.plots.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
