"""What determined a run's numbers besides its configuration: versions, machine, and hashes of what it read."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from codistill.config import Run
from codistill.data.corpus import Corpus
from codistill.data.tokenizers import special_tokens_of, tokenizer_hash
from codistill.files import sha256


def provenance(
    run: Run, corpora: list[Corpus], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> dict[str, Any]:
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("codistill", "torch", "transformers", "tokenizers")},
        },
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
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
    }


def pre_trained(run: Run) -> dict[str, str]:
    """The model folders that the run begins with: of each member's path, or of what it is initialised from."""
    paths = {name: m.path or (m.init.from_ if m.init else None) for name, m in run.members.items()}
    return {name: path for name, path in paths.items() if path is not None}


def _weights_hash(path: str) -> str:
    """Of a folder's weights, or the revision of a model of the hub."""
    if not Path(path).is_dir():
        return str(PreTrainedConfig.get_config_dict(path)[0].get("_commit_hash") or "from the hub")
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    return " ".join(sha256(file)[:16] for file in files)
