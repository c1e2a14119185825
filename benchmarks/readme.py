"""Write the measured figures into the README's marked blocks: python benchmarks/readme.py

The test suite holds the README to what this file makes of benchmarks/results/ and the model card.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main_job() -> str:
    """The table of `benchmarks/main_job.py`."""
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text())
    lines = [
        "| seed | reward before | reward after | sequence KL (nats) | seconds, cold | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        before, after = row["before"], row["after"]
        lines.append(
            f"| {row['seed']} | {before['reward']:.3f} ± {before['reward_se']:.3f} | {after['reward']:.3f} ± {after['reward_se']:.3f} "
            f"| {after['kl']:.2f} ± {after['kl_se']:.2f} | {row['process_seconds']:.0f} | {row['peak_memory_mb']:,} MB |"
        )
    origin = result["provenance"]
    return (
        "\n".join(lines)
        + f"\n\n± is one standard error. Measured by `python benchmarks/main_job.py` on {origin['machine']}; {origin['versions']}."
    )


def embedded_model() -> str:
    """A sentence from the card of the embedded model."""
    folder = ROOT / "dpo_lab" / "assets" / "gpt2-imdb"
    card = json.loads((folder / "card.json").read_text())
    held_out, size = card["held_out"], (folder / "model.safetensors").stat().st_size
    return (
        f"{card['parameters'] / 1e6:.1f} M parameters ({size / 1e6:.1f} MB), GPT-2 architecture, byte-level BPE of "
        f"{card['config']['vocabulary']:,} tokens, trained from scratch on the 22,500 training reviews in {card['minutes']:.0f} "
        f"minutes on two CPU cores. On the {held_out['reviews']:,} held-out reviews it needs {held_out['bits_per_byte']:.3f} bits "
        f"a byte ({held_out['nats_per_token']:.3f} nats a token)."
    )


def sweep() -> str:
    """The grid of `benchmarks/sweep.py`, best reward within 4 nats first."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sweep.json").read_text())["rows"]
    lines = ["| beta | learning rate | epochs | reward | sequence KL (nats) | seconds |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["after"]["kl"] > 4, -row["after"]["reward"])):
        after = row["after"]
        lines.append(
            f"| {row['beta']} | {row['learning_rate']} | {row['epochs']} | {after['reward']:.3f} ± {after['reward_se']:.3f} "
            f"| {after['kl']:.2f} ± {after['kl_se']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def render(text: str) -> str:
    """The README with its blocks filled."""
    for name, block in (("main job", main_job()), ("sweep", sweep()), ("embedded model", embedded_model())):
        start, end = text.index(f"<!-- {name} -->"), text.index("<!-- end -->", text.index(f"<!-- {name} -->"))
        text = f"{text[:start]}<!-- {name} -->\n{block}\n{text[end:]}"
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
