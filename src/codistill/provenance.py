"""What determined a run's numbers besides its configuration: versions, machine, and hashes of what it read."""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from codistill.config import Run
from codistill.data.corpus import Corpus
from codistill.data.tokenizers import special_tokens_of, tokenizer_hash
from codistill.files import sha256
from codistill.machine import device_name, versions
from codistill.own_code import file_of, is_own

_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def provenance(
    run: Run, corpora: list[Corpus], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> dict[str, Any]:
    return {
        "versions": {
            "python": platform.python_version(),
            **versions(("codistill", "torch", "transformers", "tokenizers")),
        },
        "machine": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "system": sys.platform,
        },
        "data": {
            name: {key: corpus.manifest[key] for key in ("identity", "documents", "tokens")}
            for name, corpus in zip(("train", "validation"), corpora, strict=True)
        },
        "tokenizer": tokenizer_hash(tokenizer),
        "special_tokens": special_tokens_of(tokenizer),
        "members": {name: _weights_hash(path) for name, path in pre_trained(run).items()},
        # By themselves, so that a run from before they were recorded goes on.
        "divergences": {spec: file_hash(file_of(spec)) for spec in own_divergences(run)},
        "configurations": {name: _config_hash(path) for name, path in pre_trained(run).items()},
    }


def file_hash(file: Path) -> str:
    """A short name for the content of `file`."""
    return sha256(file)[:16]


def own_divergences(run: Run) -> list[str]:
    """The edges' divergences that are functions of the user's own, FILE.py:FUNCTION."""
    return list(dict.fromkeys(edge.divergence for edge in run.distillation if is_own(edge.divergence)))


def pre_trained(run: Run) -> dict[str, str]:
    """The model folders that the run begins with: of each member's path, or of what it is initialised from."""
    paths = {name: m.path or (m.init.from_ if m.init else None) for name, m in run.members.items()}
    return {name: path for name, path in paths.items() if path is not None}


def model_hash(path: str) -> str:
    """A model folder's content, weights and configuration, or the revision of a model of the hub; as `recorded_model`.

    OSError or ValueError where there is none.
    """
    return f"{_weights_hash(path)} {_config_hash(path)}"


def recorded_model(facts: Mapping[str, Any], name: str) -> str:
    """`model_hash` of what the member `name` began with, as a run's provenance `facts` say it."""
    return f"{facts['members'][name]} {facts.get('configurations', {}).get(name)}"


def _config_hash(path: str) -> str:
    """Of what a folder's config.json says of the model, or the revision of a model of the hub."""
    if not Path(path).is_dir():
        return _revision(path)
    text = json.dumps(lasting(json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lasting(config: Any) -> Any:
    """`config` without what is another each time that the same model is saved: versions, places, and the type that the
    weights themselves have."""
    if isinstance(config, Mapping):
        kept = (key for key in config if not key.startswith("_") and key not in _NOT_OF_THE_MODEL)
        return {key: lasting(config[key]) for key in kept}
    return [lasting(value) for value in config] if isinstance(config, list) else config


def _revision(path: str) -> str:
    return str(PreTrainedConfig.get_config_dict(path)[0].get("_commit_hash") or "from the hub")


def _weights_hash(path: str) -> str:
    """Of a folder's weights, or the revision of a model of the hub."""
    if not Path(path).is_dir():
        return _revision(path)
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    return " ".join(sha256(file)[:16] for file in files)
