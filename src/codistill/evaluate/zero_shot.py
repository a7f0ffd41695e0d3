"""Scores that need no training: held-out text (`mlm`) and minimal pairs (`blimp`)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill import objectives
from codistill.data.batches import held_out
from codistill.data.prepare import cached
from codistill.data.sources import find_sources, fingerprint
from codistill.data.tokenizers import tokenizer_hash
from codistill.errors import UserError
from codistill.evaluate.blimp import Pairs, encode_sentences, likelihoods, score_pairs
from codistill.evaluate.jobs import Content, Job, Progress
from codistill.evaluate.protocol import Protocol
from codistill.evaluate.results import Cell, key_of
from codistill.evaluate.subjects import Subject
from codistill.scores import Score
from codistill.scores import held_out as score_batches

_SEQUENCES_AT_ONCE = 64
_TEXT_COST = 2000  # of a source of text, in examples: for the time left, and nothing else


def find_text(text: Sequence[str], data: Path | None) -> list[str]:
    """The named sources, or every test file of DATA/text; UserError when there are none."""
    found = list(text) or [str(file) for file in sorted((data / "text").rglob("test*.parquet"))] if data else list(text)
    if not found:
        raise UserError(
            "mlm: no held-out text; name some with --text, or give a --data folder with text/*/test.parquet"
        )
    return found


def mlm_job(subject: Subject, text: Sequence[str], protocol: Protocol, precision: torch.dtype) -> Job:
    """Loss, perplexity and accuracy of all the text together, and the loss of each source."""
    length = min(protocol.held_out_length, subject.positions)
    objective = "clm" if subject.is_causal else "mlm"
    how = {
        "tokens_a_row": length,
        "objective": objective,
        "tokenizer": tokenizer_hash(subject.tokenizer),
        "column": protocol.held_out_column,
    }
    key = key_of(
        task="mlm",
        model=subject.content,
        text=[[fingerprint(source) for source in find_sources([name])] for name in text],
        scored_as=how,
        mask_rate=protocol.mask_rate,
        precision=str(precision),
        device=subject.model.device.type,
    )

    def compute(progress: Progress) -> list[Content]:
        scores = {}
        for source in text:
            scores[source] = _score_text(subject, source, length, protocol, precision)
            progress(_TEXT_COST)
        return [_summary(scores, how)]

    return Job([Cell(subject.name, "mlm", None)], [key], _TEXT_COST * len(text), compute)


def blimp_job(subject: Subject, pairs: Pairs, limit: int | None, protocol: Protocol, precision: torch.dtype) -> Job:
    """The share of pairs whose good sentence is the likelier one, over all, by field and by paradigm."""
    max_length = min(protocol.max_length, subject.positions)
    key = key_of(
        task="blimp",
        model=subject.content,
        pairs=hashlib.sha256("\n".join([*pairs.good, *pairs.bad, *pairs.paradigm]).encode()).hexdigest(),
        max_length=max_length,
        precision=str(precision),
        device=subject.model.device.type,
    )

    def compute(progress: Progress) -> list[Content]:
        sentences = encode_sentences(
            [*pairs.good, *pairs.bad], subject.tokenizer, is_causal=subject.is_causal, max_length=max_length
        )
        mask = None if subject.is_causal else subject.tokenizer.mask_token_id
        found_S = likelihoods(subject.predictor(), sentences, mask=mask, precision=precision, advance=progress)
        good_P, bad_P = np.split(found_S, 2)
        scores = score_pairs(pairs, good_P, bad_P)
        return [
            {
                "score": scores["score"],
                "scores": scores,
                "predictions": (good_P > bad_P).astype(int).tolist(),
                "labels": [1] * len(pairs),
                "counted": {
                    "pairs": len(pairs),
                    "pairs_a_paradigm": limit or "all",
                    "method": "log-likelihood" if subject.is_causal else "pseudo-log-likelihood",
                    "truncated": sentences.num_truncated,
                },
            }
        ]

    return Job([Cell(subject.name, "blimp", None)], [key], 2 * len(pairs), compute)


def _score_text(subject: Subject, source: str, length: int, protocol: Protocol, precision: torch.dtype) -> Score:
    objective = _objective(subject, protocol)
    corpus = cached([source], subject.tokenizer, column=protocol.held_out_column)
    batches = held_out(corpus, objective, length=length, sequences=_SEQUENCES_AT_ONCE, seed=0)
    device = subject.model.device
    return score_batches(subject.predictor(), [batch.to(device) for batch in batches], precision)


def _objective(subject: Subject, protocol: Protocol) -> Any:
    if subject.is_causal:
        return objectives.CausalLM()
    return objectives.MaskedLM(protocol.mask_rate)


def _summary(scores: dict[str, Score], how: dict[str, Any]) -> Content:
    """`how`: what must be alike for two such scores to be compared."""
    rows = sum(score.rows for score in scores.values())
    loss, accuracy = (
        sum(getattr(score, of) * score.rows for score in scores.values()) / rows for of in ("loss", "accuracy")
    )
    whole = Score(loss, accuracy, rows)
    return {
        "score": loss,
        "scores": {"loss": loss, "perplexity": whole.perplexity, "accuracy": accuracy},
        "counted": {
            "rows": rows,
            "scored_as": how,
            "loss_by_source": {short_name(name, list(scores)): score.loss for name, score in scores.items()},
        },
    }


def short_name(source: str, others: Sequence[str]) -> str:
    """The end of a path: two parts, or as many as tell it apart from `others`; nothing more about the machine."""
    parts = Path(source).parts
    for count in range(2, len(parts)):
        if sum(Path(other).parts[-count:] == parts[-count:] for other in others) == 1:
            return "/".join(parts[-count:])
    return "/".join(parts[-2:])
