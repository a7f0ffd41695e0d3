"""The tokenizer that is saved beside a model: it knows what that takes, and leaves a causal model's prompts open."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from codistill.data.tokenizers import encoder_of, starts_and_ends, template

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def tokenizer_to_save(
    tokenizer: PreTrainedTokenizerFast, *, is_causal: bool, positions: int | None = None
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` for the folder of a model that takes so many `positions`; None leaves that open.

    A causal model goes on with a text. So a tokenizer that closes texts gives them as rows begin, with the start token
    alone, and the tokens that begin and end texts get the names that `generate` knows, where they have none. Ids stay,
    and so does what masking and packing know of the tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    saved = copy.deepcopy(tokenizer)
    if positions is not None:
        saved.model_max_length = positions
    if is_causal:
        start, end = starts_and_ends(tokenizer)
        if _closes(tokenizer):
            # Classes of their own, such as BERT's, would close texts again when they are loaded.
            saved.__class__ = PreTrainedTokenizerFast
            saved.backend_tokenizer.post_processor = template(start, end, is_closed=False)
        if start is not None and saved.bos_token is None:
            saved.bos_token = start[0]
        if saved.eos_token is None:
            saved.eos_token = end[0]
    return saved


def closing_encoder_of(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """As `encoder_of`, of what `tokenizer` was before `tokenizer_to_save` left its texts open."""
    encoder, (start, end) = encoder_of(tokenizer), starts_and_ends(tokenizer)
    if encoder.post_processor.__getstate__() == template(start, end, is_closed=False).__getstate__():
        encoder.post_processor = template(start, end)
    return encoder


def _closes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a token is put after a single text."""
    encoder = encoder_of(tokenizer)
    bare = encoder.encode("a", add_special_tokens=False).ids
    return encoder.encode("a").ids[-len(bare) :] != bare
