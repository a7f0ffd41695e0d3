"""Text from a causal member of a finished run."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

from codistill import distributed
from codistill.data.tokenizers import Vocabulary, load_tokenizer
from codistill.errors import UserError
from codistill.families import family_of, longest
from codistill.folders import member_of
from codistill.models import load_model


def generate(
    folder: Path,
    member: str,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """`prompt` and what the member goes on with, at most `tokens` tokens, until a text ends.

    `temperature` 0 takes the likeliest token each time, another draws from all; the member's own generation_config.json
    has no say. Raises UserError where there is no such member, for a masked
    language model, and for more tokens than the model has positions.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: at least one is needed")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: a number of at least 0 is needed")
    place = member_of(folder, member)
    config = AutoConfig.from_pretrained(place)
    family = family_of(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (family is not None and family.objective != "clm"):
        raise UserError(f"{place}: {config.model_type} is not a causal language model, and only those continue a text")
    tokenizer = load_tokenizer(place)
    vocabulary = Vocabulary.of(tokenizer)
    start = [] if vocabulary.start is None else [vocabulary.start]
    ids = start + tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no token to begin with; give a word")
    model = load_model(str(place), f"--member {member}", "clm").eval()
    positions = longest(model)
    if positions is not None and len(ids) + tokens > positions:
        raise UserError(
            f"--tokens {tokens}: with the prompt's {len(ids)} that exceeds the {positions} positions of {member}; "
            "ask for fewer"
        )
    where = distributed.start("single", device).device
    cast(nn.Module, model).to(where)
    torch.manual_seed(seed)
    shown_T = torch.tensor([ids], device=where)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    asked = GenerationConfig(
        max_new_tokens=tokens,
        eos_token_id=vocabulary.separator,
        pad_token_id=vocabulary.separator if vocabulary.pad is None else vocabulary.pad,
        suppress_tokens=_padding(model.config.vocab_size, vocabulary.size),
        **drawn,
    )
    # In the place of what a member may bring, such as a repetition penalty: transformers fills gaps from there.
    cast(Any, model).generation_config = asked
    made_T = model.generate(shown_T, attention_mask=torch.ones_like(shown_T), generation_config=asked)[0]
    return str(tokenizer.decode(made_T, skip_special_tokens=True))


def _padding(rows: int, vocabulary: int) -> list[int] | None:
    """Ids beyond the tokenizer's, which a model may have for alignment."""
    return list(range(vocabulary, rows)) or None
