"""Remapping of Hugging Face folders, tensor by tensor, so that no more than one output shard is ever in memory."""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codistill.errors import UserError
from codistill.files import atomic_folder
from codistill.folders import config_file
from codistill.remap.families import ARCHITECTURES, describe
from codistill.remap.source import Fetch, fetcher
from codistill.remap.states import Depth, remapped, with_tied

BESIDES = ("*token*", "vocab.*", "merges.txt", "*.model", "chat_template*", "generation_config.json")


def remap_folder(
    source: Path,
    to: Path | Mapping[str, Any] | Any,
    *,
    out: Path,
    depth: Depth = None,
    width: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    shard_bytes: int = 2 * 1024**3,
) -> Path:
    """The new folder `out`: the model in `source`, remapped to the configuration `to`, with the source's tokenizer.

    `to` is a Hugging Face configuration, its dictionary, or the path of a `config.json` or of a folder with one; the
    rest is as in `remap_state`. Reads and writes safetensors; in memory are one shard of the target of at most
    `shard_bytes` (or one tensor) and what one of its tensors is made from. `out` appears complete or not at all.
    Raises `UserError` for shapes that cannot map, for a source that is no such folder, and if `out` exists.
    """
    before, after = read_config(source), read_config(to)
    methods = {"depth": depth, "width": width, "seed": seed, "noise": noise}
    with new_folder(Path(out)) as folder:
        tensors = remapped(open_source(Path(source), before), before, after, **methods)  # type: ignore[arg-type]
        dtype = write_shards(folder, tensors, shard_bytes)
        config = copy.deepcopy(after)
        config.architectures, config.dtype = [describe(after).model_class], dtype
        config.save_pretrained(folder)
        for pattern in BESIDES:
            for file in filter(Path.is_file, Path(source).glob(pattern)):
                shutil.copyfile(file, folder / file.name)
    return Path(out)


def initial_state(
    source: Path,
    target: Any,
    *,
    depth: Depth = None,
    width: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> dict[str, Tensor]:
    """The state that a model of the Hugging Face configuration `target` starts with, from the model in `source`.

    It loads strictly into the family's masked-LM or causal-LM class. Raises `UserError` as `remap_folder` does.
    """
    before, after = read_config(source), read_config(target)
    fetch = open_source(Path(source), before)
    moved = remapped(fetch, before, after, depth=depth, width=width, seed=seed, noise=noise)
    return with_tied({name: tensor.clone() for name, tensor in moved}, after)


def read_config(given: Path | str | Mapping[str, Any] | Any) -> Any:
    """A Hugging Face configuration from itself, its dictionary, its JSON file, or a folder with a `config.json`."""
    if isinstance(given, str | Path):
        given = _read_json(config_file(Path(given)))
    if not isinstance(given, Mapping):
        return given
    family = given.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"model_type: {family!r} is not described; choose one of {', '.join(ARCHITECTURES)}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family].from_dict(dict(given))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"the {family} configuration is not valid: {' '.join(str(error).split())}") from None


def _read_json(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not a JSON configuration ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a {type(content).__name__}, and wanted is the object that a config.json holds")
    return content


def open_source(folder: Path, config: Any) -> Fetch:
    """A function from a described tensor's name to the tensor, read when asked for. Raises `UserError` as it goes."""
    files = _weight_files(folder)

    def load(name: str) -> Tensor:
        # Opened anew each time: an open file would keep all of its pages in this process.
        try:
            with safe_open(files[name], framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{files[name]}: cannot read {name} ({error}); is the file complete?") from None

    return fetcher(load, files.keys(), config)


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of each stored tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        shards = _read_json(index)["weight_map"]
        if missing := {file for file in shards.values() if not (folder / file).is_file()}:
            raise UserError(f"{folder}: the index names {min(missing)}, which is not there")
        return {name: folder / file for name, file in shards.items()}
    if not single.is_file():
        raise UserError(f"{folder}: no model.safetensors; load the model and save it with save_pretrained")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{single}: not a complete safetensors file ({error})") from None


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> str:
    """Write `tensors` as Hugging Face reads them, a shard at a time; the name of their precision comes back."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size, total, dtype = 0, 0, ""

    def flush() -> None:
        save_file(shard, _numbered(folder, len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total, dtype = size + tensor.nbytes, total + tensor.nbytes, str(tensor.dtype).removeprefix("torch.")
        del tensor
    flush()
    _name_shards(folder, shards, total)
    return dtype


def _numbered(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        _numbered(folder, 0).rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        _numbered(folder, i).rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well. Raises `UserError` if there is one already."""
    if out.exists():
        raise UserError(f"{out} exists already; choose a new folder, nothing is overwritten")
    with atomic_folder(out) as folder:
        yield folder
