"""Work shared among the processes that `accelerate launch` starts, or among threads; alone, a process does all of it.

What gathers (`gathered`, `whole`, `from_main`, and what calls them) must be called in every process, in the same order.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

T, S = TypeVar("T"), TypeVar("S")

SHARD = "DPO_LAB_SHARD"  # environment variable, "true" or "false"


def launched() -> int:
    """How many processes the launcher started, whether or not they have joined yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup(device: str) -> None:
    """Join the other processes that a launcher started, to compute on "cpu" (gloo) or "cuda" (nccl)."""
    if launched() > 1:
        from accelerate import PartialState  # takes a second, which a process alone need not spend

        PartialState(cpu=device == "cpu")
        if (
            "ACCELERATE_USE_FSDP" in os.environ
        ):  # accelerate's own FSDP refuses to start without a GPU
            os.environ[SHARD] = os.environ.pop("ACCELERATE_USE_FSDP")


def cleanup() -> None:
    """Part from the others at the end of the work."""
    if world_size() > 1:
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that have joined; 1 where there is no launcher."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def local_shard(items: Sequence[T]) -> Sequence[T]:
    """Every `count()`-th of `items`, from the `rank()`-th on: what this process takes."""
    return items[rank() :: world_size()]


def all_gather(mine: T) -> list[T]:
    """What each process has, in the order of the processes."""
    if world_size() == 1:
        return [mine]
    found: list = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def gather_shards(mine: Sequence[T]) -> list[T]:
    """What all processes made of their shares, in the order of the items that were shared."""
    parts = all_gather(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def parallel_map(call: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """`call` of each of the items, in their order, as many at a time as torch has threads, each on one of them.

    Where kernels are small, as many of them as there are cores finish sooner than one after the other on all cores.
    """
    threads = torch.get_num_threads()
    if min(threads, len(items)) < 2:
        yield from map(call, items)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads that start later, too


def from_main(call: Callable[..., T], *arguments: Any) -> T:
    """Call `call` in the main process alone; every process waits, and gets its result or its error."""
    if world_size() == 1:
        return call(*arguments)
    found: list = [None, None]
    if is_main():
        try:
            found[0] = call(*arguments)
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def print0(text: object) -> None:
    """Print `text`, once however many processes say it."""
    if is_main():
        print(text)


def sharding() -> bool:
    """Whether each process holds a part of the weights, gradients and optimizer state (`accelerate launch --use_fsdp`)."""
    return world_size() > 1 and os.environ.get(SHARD, "false").lower() == "true"


def shard(module: nn.Module, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Leave each process its part of `module`, a copy of `model`, and let the optimizers of `model` step that instead.

    torch's FSDP2, the same on CPUs and GPUs; the blocks that it gathers one by one are the items of module lists.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    blocks = [
        block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part
    ]
    for part in [*reversed(blocks), module]:  # the inner ones first
        fully_shard(part)
    parts = dict(zip(model.parameters(), module.parameters()))

    def cut(value: Any, part: Any) -> Any:
        fits = isinstance(value, Tensor) and value.shape == part.shape
        return distribute_tensor(value, part.device_mesh, part.placements) if fits else value

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parts[p] for p in group["params"]]
        states = {
            parts[p]: {k: cut(v, parts[p]) for k, v in state.items()}
            for p, state in optimizer.state.items()
        }
        optimizer.state = defaultdict(dict, states)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_weights(module: nn.Module, model: nn.Module) -> None:
    """Bring the weights of the sharded `module` into `model`, whole, in every process."""
    if sharding():
        for gather_shards, part in zip(model.parameters(), module.parameters()):
            gather_shards.data.copy_(full_tensor(part.detach()))
