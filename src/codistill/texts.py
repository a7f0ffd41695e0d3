"""A run's text: found, prepared as the run wants it, and cut into batches."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerFast

from codistill.config import Data, Run
from codistill.data.batches import Batches, held_out
from codistill.data.corpus import Corpus
from codistill.data.prepare import cached
from codistill.data.sources import check_named
from codistill.data.tokenizers import Vocabulary, load_tokenizer, separator_of
from codistill.distributed import Ranks
from codistill.errors import UserError
from codistill.objectives import Batch, CausalLM, MaskedLM
from codistill.progress import preparing
from codistill.provenance import pre_trained

Part = Literal["train", "validation"]
_MUCH_UNKNOWN = 0.01  # a share of the tokens
_SEQUENCES_AT_ONCE = 64  # of the held-out text; has no influence on a score


def corpora(
    run: Run, ranks: Ranks, check: Callable[[PreTrainedTokenizerFast], None] = lambda _: None
) -> tuple[Corpus, Corpus]:
    """What is trained on and what is scored on; UserError for what cannot be had. `check` sees the tokenizer before any
    text is prepared with it, or as soon as it has been trained."""
    for part in get_args(Part):
        check_named(getattr(run.data, part), part)
    spec = tokenizer_spec(run)
    is_new = spec.startswith("train:")
    if not is_new:
        check(load_tokenizer(spec))
    train = _prepared(run, "train", spec, ranks)
    if is_new:
        check(train.tokenizer())
    validation = _prepared(_cut_alike(run, train), "validation", train.tokenizer(), ranks)
    if ranks.is_main:
        _warn_of_unknown_text({"train": train, "validation": validation})
        _warn_of_seen_text(train, validation)
        _warn_of_cut_units(run, train)
    return train, validation


def _cut_alike(run: Run, train: Corpus) -> Run:
    """With the unit of a prepared training text, where none is named, for raw text that is scored on."""
    unit = train.manifest["settings"]["unit"]
    is_prepared = any((Path(source) / "manifest.json").is_file() for source in run.data.validation)
    if is_prepared or run.data.unit != Data().unit:
        return run
    return replace(run, data=replace(run.data, unit=unit))


def corpus_of(
    data: Data, part: Part, tokenizer: str | PreTrainedTokenizerFast, progress: Callable | None = None
) -> Corpus:
    """One part of the text of a run, in the cache or a prepared folder. Of what is scored on every unit is kept."""
    every = data.keep_every if part == "train" else 1
    sources = getattr(data, part)
    return cached(sources, tokenizer, column=data.column, unit=data.unit, keep_every=every, progress=progress)


def batches_of(run: Run, corpus: Corpus) -> Batches:
    """What `run` trains on, step by step."""
    return Batches(
        corpus,
        objective_of(run),
        length=run.data.length,
        sequences=run.batch.sequences,
        accumulate=run.batch.accumulate,
        seed=run.seed,
        packing=run.data.packing,
        within_documents=run.data.within_documents,
        tokens=run.data.tokens,
    )


def held_out_of(
    run: Run, corpus: Corpus, *, within_documents: bool, sequences: int = _SEQUENCES_AT_ONCE
) -> list[Batch]:
    """What `run` is scored on, in batches of so many `sequences`."""
    return held_out(
        corpus,
        objective_of(run),
        length=run.data.length,
        sequences=sequences,
        seed=run.seed,
        limit=run.evaluate.sequences,
        packing=run.data.packing,
        within_documents=within_documents,
    )


def objective_of(run: Run) -> MaskedLM | CausalLM:
    """What makes the batches of `run`."""
    wanted = run.objective
    return CausalLM() if wanted.name == "clm" else MaskedLM(wanted.mask_rate, wanted.whole_word)


def tokenizer_spec(run: Run) -> str:
    """The tokenizer that `run` names, or that comes with its text or models; UserError where none does."""
    if run.data.tokenizer is not None:
        return run.data.tokenizer
    if len(run.data.train) == 1 and (own := Path(run.data.train[0]) / "tokenizer").is_dir():
        return str(own)  # of a prepared folder
    for path in pre_trained(run).values():
        return path
    raise UserError(
        "data.tokenizer: none is named and no member is pre-trained; give a tokenizer folder, a vocab.txt, or "
        "train:wordpiece:4096 to train one on data.train"
    )


def _prepared(run: Run, part: Part, tokenizer: str | PreTrainedTokenizerFast, ranks: Ranks) -> Corpus:
    if not ranks.is_main:
        # One rank of a node prepares the text, the others wait for it, and rank 0 shows how far it is.
        return corpus_of(run.data, part, tokenizer)
    with preparing(f"preparing data.{part}") as progress:
        return corpus_of(run.data, part, tokenizer, progress)


def _warn_of_seen_text(train: Corpus, validation: Corpus) -> None:
    seen = {source["sha256"] for source in train.manifest["sources"]}
    both = [source["name"] for source in validation.manifest["sources"] if source["sha256"] in seen]
    if both and train.manifest["part"] == validation.manifest["part"]:
        print(f"data.validation: {both[0]} is also trained on, so held-out scores are of seen text", file=sys.stderr)


def _warn_of_unknown_text(corpora: Mapping[Part, Corpus]) -> None:
    """Says where the tokenizer does not know much of the text: a model learns to say that, and its loss looks good."""
    for part, corpus in corpora.items():
        tokenizer = corpus.tokenizer()
        unknown = tokenizer.unk_token_id
        # GPT-2's is what ends its texts, for it knows every byte.
        if unknown is None or unknown == separator_of(tokenizer):
            continue
        share = corpus.unigram_counts()[unknown] / corpus.num_tokens
        if share > _MUCH_UNKNOWN:
            print(
                f"data.{part}: {share:.1%} of its tokens are {tokenizer.unk_token}: the tokenizer does not know that "
                "text; name one that does, or train one on it (data.tokenizer=train:bpe:32000 knows every byte)",
                file=sys.stderr,
            )


def _warn_of_cut_units(run: Run, corpus: Corpus) -> None:
    """Says how much of the text stands beyond the ends of padded rows, where any does."""
    if run.data.packing != "padded":
        return
    room = run.data.length - (Vocabulary.of(corpus.tokenizer()).start is not None)
    beyond = sum(
        int(np.maximum(np.diff(ends.astype(np.int64), prepend=0) - room, 0).sum()) for ends in corpus.unit_ends
    )
    if beyond:
        print(
            f"data.packing padded: {beyond / corpus.num_tokens:.1%} of the training text is not used; it stands beyond "
            f"the first {run.data.length} tokens of its {corpus.manifest['settings']['unit']}",
            file=sys.stderr,
        )
