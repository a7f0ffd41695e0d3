"""The models under evaluation: found by name, loaded once, known by their content."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from codistill.attention import use_short_attention
from codistill.data.tokenizers import tokenizer_hash, vocabulary_size
from codistill.errors import UserError
from codistill.families import is_causal, longest
from codistill.folders import members_of
from codistill.models import Predictor, load_model, load_own_tokenizer, train_all_tokens


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode on its device, its tokenizer, and a hash of both that says whether it is the same."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    content: str

    @property
    def is_causal(self) -> bool:
        return is_causal(self.model)

    @property
    def positions(self) -> int:
        """The longest text it takes, in tokens."""
        return longest(self.model) or sys.maxsize

    @property
    def has_types(self) -> bool:
        """Whether it is told which of two texts a token is of."""
        return getattr(self.model.config, "type_vocab_size", 1) > 1

    def predictor(self) -> Predictor:
        return Predictor(self.model, vocabulary_size(self.tokenizer))


def find_models(names: Sequence[str]) -> dict[str, str]:
    """Paths (or hub names) by the names they are shown under: a run folder gives all its members, as RUN/MEMBER.

    Raises UserError for a run folder without members, and for two models of one name.
    """
    found: dict[str, str] = {}
    for name in names:
        for shown, path in _members(name):
            if shown in found and found[shown] != path:
                raise UserError(f"models: {path} and {found[shown]} would both be called {shown}; rename one folder")
            found[shown] = path
    if not found:
        raise UserError("models: none is named; give model folders, hub names or run folders")
    return found


def load_subject(name: str, path: str, device: torch.device, *, needs_head: bool = True) -> Subject:
    """The model at `path` with its tokenizer; UserError when one of them is missing or they do not fit together.

    Without `needs_head` a model without its language-model head will do, which is enough to fine-tune it.
    """
    model = load_model(path, "models", needs_head=needs_head)
    tokenizer = load_own_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"models: {path} has no tokenizer beside it; save the one it was trained with there")
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"models: {path} knows {model.config.vocab_size} tokens, its tokenizer {vocabulary_size(tokenizer)}: it "
            "is another model's; save the one it was trained with there"
        )
    train_all_tokens(model, tokenizer)
    use_short_attention(model)
    cast(nn.Module, model).to(device).eval()
    known = model if needs_head else model.base_model
    return Subject(name, model, tokenizer, _content(known, model.config.to_json_string(), tokenizer))


def _members(name: str) -> list[tuple[str, str]]:
    folder = Path(name).expanduser()
    if not (folder / "run.yaml").is_file():
        return [(name.rstrip("/") if not folder.is_dir() else _short(folder), str(folder) if folder.is_dir() else name)]
    return [(f"{folder.resolve().name}/{member}", str(place)) for member, place in members_of(folder).items()]


def _short(folder: Path) -> str:
    """run/member for a member of a run, else the folder's own name."""
    folder = folder.resolve()
    is_member = folder.parent.name == "members" and (folder.parents[1] / "run.yaml").is_file()
    return f"{folder.parents[1].name}/{folder.name}" if is_member else folder.name


def _content(model: nn.Module, config: str, tokenizer: PreTrainedTokenizerFast) -> str:
    digest = hashlib.sha256(f"{config}{tokenizer_hash(tokenizer)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:32]
