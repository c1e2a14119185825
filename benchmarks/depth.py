"""How deep a step of training is: the functions of dpo_lab that one pair passes through.

    python benchmarks/depth.py

Counted are the named functions that are entered between two optimizer steps of `train_dpo` on a
GPT-2, once each: those of the files that a student reads, and those of the engine below.
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import dpo_lab
from dpo_lab.loop import LoopConfig
from dpo_lab.models import prepare_model
from dpo_lab.preferences import Preferences
from dpo_lab.train import DPOConfig, train_dpo

PACKAGE = Path(dpo_lab.__file__).parent


def functions_of_a_step() -> dict[str, set[str]]:
    """By file, the functions entered between the first optimizer step and the second."""
    set_seed(0)
    shape = {"vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 1}
    policy = prepare_model(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))

    # one pair, as long as a sentence of a review
    rng = np.random.default_rng(0)
    completions = [[*rng.integers(1, 512, n).tolist(), 0] for n in (24, 20)]
    pair = Preferences([[0, 5, 6]], completions, [0, 0], [0], [1]).with_reference(policy)

    steps, found = [], defaultdict(set)

    def note(frame: FrameType, event: str, _: object) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        named = not code.co_name.startswith("<")
        if event == "call" and len(steps) == 1 and named and path.is_relative_to(PACKAGE):
            found[path.relative_to(PACKAGE).as_posix()].add(code.co_qualname)

    # the second of two epochs, each a step
    config = DPOConfig(epochs=2, batch_pairs=1, loop=LoopConfig(warmup_steps=0))
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    sys.setprofile(note)
    try:
        train_dpo(policy, pair, config, progress=None)
    finally:
        sys.setprofile(None)
        hook.remove()
    return dict(found)


def main() -> None:
    """Print the files with their functions, and the sums."""
    found = functions_of_a_step()
    engine = {name for name in found if name.startswith("engine/")}
    for title, names in (("read by a student", found.keys() - engine), ("engine", engine)):
        print(f"{title}: {sum(len(found[n]) for n in names)} functions in {len(names)} files")
        for name in sorted(names):
            print(f"  {name}: {', '.join(sorted(found[name]))}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
