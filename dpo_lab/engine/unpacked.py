"""A GGUF file as a folder of float32 safetensors and a tokenizer, unpacked once and kept."""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab.engine.distributed import from_main
from dpo_lab.engine.runs import atomic_write, file_hash, quiet_bars, require_space

# float32 weights take about this many times the bytes of weights of four bits and more
TIMES_LARGER = 8

# larger files are unpacked anew each time: their float32 weights would fill a cache
KEPT_BYTES = 2**29


def cache_directory() -> Path:
    """Where classifiers and unpacked models are kept: $DPO_LAB_CACHE, or ~/.cache/dpo-lab."""
    return Path(os.path.expanduser(os.environ.get("DPO_LAB_CACHE") or "~/.cache/dpo-lab"))


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """In the block, a folder that `from_pretrained` reads in place of the GGUF file `path`.

    It is kept in `cache_directory()` under the file's hash, so that the next call takes no time,
    unless the file is large or the cache cannot be written.

    Raises:
        ValueError: the file is damaged, or its architecture unknown to transformers.
    """
    kept = _kept(path) if path.stat().st_size <= KEPT_BYTES else None
    if kept is not None:
        yield kept
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        unpack(path, Path(folder))
        yield Path(folder)


def _kept(path: Path) -> Path | None:
    """The folder in the cache, unpacked now where it is not there; None where it cannot be."""
    folder = cache_directory() / f"gguf-{file_hash(path)[:16]}-{transformers.__version__}"

    def keep() -> None:
        if folder.exists():
            return
        require_space(folder, TIMES_LARGER * path.stat().st_size)
        with atomic_write(folder, directory=True) as temporary:
            unpack(path, temporary)

    try:
        from_main(keep)
    except OSError as error:
        warnings.warn(
            f"the unpacked weights of {path.name} are not kept, and will be unpacked again next "
            f"time: {error}. Set DPO_LAB_CACHE to a directory that can be written",
            stacklevel=2,
        )
        return None
    return folder


def unpack(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder`, as transformers reads them.

    transformers alone reads the file's metadata once for the config, once for the weights and once
    for the tokenizer, and makes the table of its tensors' names for every module; here each once.
    """
    found = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with quiet_bars(), _read_once():
            tokenizer = AutoTokenizer.from_pretrained(**found)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **found, dtype=torch.float32, output_loading_info=True
            )
    # each kind of damage fails in its own way
    except (IndexError, KeyError, NotImplementedError, ValueError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a GGUF file ({error}); it is truncated or altered, "
            "or transformers does not know its architecture"
        ) from error

    # what the file holds, each tensor once
    weights: dict[str, Tensor] = {}
    seen = set()
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in seen and name not in loaded["missing_keys"]:
            weights[name] = weight.contiguous()
        seen.add(weight.data_ptr())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    # in a config that does not ask for quantized weights
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """In the block, the package gguf reads each file, and makes each table of names, once."""
    import gguf

    class Reader(gguf.GGUFReader):
        """The same bytes as a plain array, of which a slice costs a third of a memmap's."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = mapped.view(np.ndarray)

    old = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(old[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = old
