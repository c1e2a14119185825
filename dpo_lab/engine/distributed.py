"""Work split among the processes that `accelerate launch` starts, or among threads.

A process that was started alone does all of it. Functions that gather (`all_gather`,
`gather_shards`, `from_main`, and those that call them) must be called in every process, in the
same order.
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

# environment variable, "true" or "false"
SHARD = "DPO_LAB_SHARD"


def launched() -> int:
    """How many processes the launcher started, whether or not they have joined yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup(device: str) -> None:
    """Join the process group of a launcher, to compute on "cpu" (gloo) or "cuda" (nccl)."""
    if launched() == 1:
        return
    from accelerate import PartialState  # takes a second

    PartialState(cpu=device == "cpu")

    # accelerate's own FSDP refuses to start without a GPU
    if "ACCELERATE_USE_FSDP" in os.environ:
        os.environ[SHARD] = os.environ.pop("ACCELERATE_USE_FSDP")


def cleanup() -> None:
    """Destroy the process group."""
    if world_size() > 1:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes have joined; 1 without a launcher."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def local_shard(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every `world_size()`-th, starting at `rank()`."""
    return items if world_size() == 1 else items[rank() :: world_size()]


def all_gather(mine: T) -> list[T]:
    """What each process has, by rank."""
    if world_size() == 1:
        return [mine]
    found: list = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def gather_shards(mine: Sequence[T]) -> list[T]:
    """The results of all processes for their `local_shard`, in the order of all items."""
    parts = all_gather(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def parallel_map(call: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """`call` of each item, in order, one per thread at a time.

    Small kernels run faster one per core than one at a time on all cores.
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
    """Call `call` in the main process alone; every process gets its result, or its error."""
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
    """Print `text` in the main process alone."""
    if is_main():
        print(text)


def sharding() -> bool:
    """Whether each process holds a part of weights, gradients and optimizer state.

    `accelerate launch --use_fsdp` asks for it.
    """
    return world_size() > 1 and os.environ.get(SHARD, "false").lower() == "true"


def shard(module: nn.Module, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Shard `module`, a copy of `model`, and point the optimizers of `model` at the shards.

    This is torch's FSDP2, the same on CPUs and GPUs. The items of module lists are the blocks that
    it gathers one by one.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    # the inner modules first
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    for part in [*reversed(blocks), module]:
        fully_shard(part)
    shard_of = dict(zip(model.parameters(), module.parameters()))

    def local_part(value: Any, like: Any) -> Any:
        if not (isinstance(value, Tensor) and value.shape == like.shape):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements)

    # the optimizers, and what they have accumulated
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [shard_of[p] for p in group["params"]]
        states = {
            shard_of[p]: {name: local_part(value, shard_of[p]) for name, value in state.items()}
            for p, state in optimizer.state.items()
        }
        optimizer.state = defaultdict(dict, states)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_weights(module: nn.Module, model: nn.Module) -> None:
    """Copy the weights of the sharded `module` into `model`, whole, in every process."""
    if sharding():
        for whole, part in zip(model.parameters(), module.parameters()):
            whole.data.copy_(full_tensor(part.detach()))
