"""The files of a public data set: in a folder, in the Hugging Face cache, or on the hub.

Only data files are read, JSON lines and Parquet: no loading script of a data set is ever run.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download

from dpo_lab.engine.runs import quiet_bars

PARQUET = "refs/convert/parquet"
"""The branch on which the hub keeps a Parquet copy of data sets that have a script alone."""


@quiet_bars()
def read_files(
    hub: str, patterns: Sequence[str], *, folder: Path | None, revision: str = "main"
) -> Dataset:
    """The rows of the files that `patterns` name in the data set `hub`.

    Args:
        hub: id on the Hugging Face hub.
        patterns: paths in its repository, in which `*` stands for any part of a name.
        folder: laid out as the repository; None for the cache of the hub, and then the hub.
        revision: branch, tag or commit.

    Raises:
        FileNotFoundError: a file is not in the folder, or neither in the cache nor on the hub.
        ValueError: a file does not hold rows.
    """
    place = folder
    if folder is None and (cached := _cached(hub, revision)):
        if all(any(cached.glob(pattern)) for pattern in patterns):
            place = cached

    # from the hub, into its cache
    if place is None:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(_how_to_get(hub, revision, "HF_HUB_OFFLINE is set"))
        try:
            return _loaded([f"hf://datasets/{hub}@{revision}/{pattern}" for pattern in patterns])
        except ValueError:
            raise
        # the libraries on the way to the hub each have errors of their own
        except Exception as error:
            raise FileNotFoundError(_how_to_get(hub, revision, str(error))) from error

    # from this machine
    files = [str(path) for pattern in patterns for path in sorted(place.glob(pattern))]
    missing = [pattern for pattern in patterns if not any(place.glob(pattern))]
    if missing:
        raise FileNotFoundError(
            f"{place} holds no {' and no '.join(missing)}; it must be laid out as {hub} is on the "
            f"hub, such as by `{_download(hub, revision)} --local-dir {place}`"
        )
    return _loaded(files)


def _loaded(files: list[str]) -> Dataset:
    """The rows of files of one kind."""
    wanted = {"data_files": files, "split": "train"}
    kind = "parquet" if files[0].endswith(".parquet") else "json"
    try:
        return load_dataset(kind, **wanted)
    except DatasetGenerationError as error:
        raise ValueError(
            f"{', '.join(files)} cannot be read as rows ({error.__cause__ or error}); "
            "it is truncated, altered, or another file; get it again"
        ) from error
    except PermissionError:
        # the cache cannot be written, which is no reason to stop
        with tempfile.TemporaryDirectory() as elsewhere:
            return load_dataset(kind, **wanted, cache_dir=elsewhere, keep_in_memory=True)


def _cached(hub: str, revision: str) -> Path | None:
    """The copy of a data set in the cache of the hub, of which files may be missing."""
    where = {"repo_type": "dataset", "revision": revision}
    try:
        return Path(snapshot_download(hub, **where, local_files_only=True))
    except (OSError, ValueError):
        return None


def _how_to_get(hub: str, revision: str, why: str) -> str:
    return (
        f"{hub} is neither in the Hugging Face cache nor to be had from the hub ({why}). Where "
        f"there is a connection run `{_download(hub, revision)}` and copy the cache, or "
        "give a folder that is laid out as it is on the hub"
    )


def _download(hub: str, revision: str) -> str:
    """The command that fetches a data set."""
    branch = "" if revision == "main" else f" --revision {revision}"
    return f"hf download --repo-type dataset {hub}{branch}"
