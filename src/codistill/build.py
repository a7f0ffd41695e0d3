"""From a configuration to live objects: tokenizer, text, models, optimizers, and the cohort they form."""

import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from codistill import schedules
from codistill.cohort import Cohort, Distillation, Member
from codistill.config import MemberConfig, Run
from codistill.data.batches import Batches, held_out
from codistill.data.corpus import Corpus
from codistill.data.prepare import cached
from codistill.data.tokenizers import tokenizer_hash, vocabulary_size
from codistill.distributed import ALONE, Ranks
from codistill.errors import UserError
from codistill.files import sha256
from codistill.members import Predictor, load_model, load_own_tokenizer, new_model
from codistill.objectives import Batch, MaskedLM
from codistill.progress import preparing
from codistill.scores import unigram_cross_entropy

_SEQUENCES_AT_ONCE = 64  # of the held-out text; has no influence on a score


@dataclass
class Built:
    """A run's live objects. `provenance` says what determined its numbers besides the configuration."""

    cohort: Cohort
    batches: Batches
    held_out: list[Batch]
    unigram: float
    tokenizer: PreTrainedTokenizerFast
    provenance: dict[str, Any]
    models: dict[str, PreTrainedModel] = field(default_factory=dict)


def build(run: Run, device: torch.device, ranks: Ranks = ALONE) -> Built:
    """The live objects of `run`; raises UserError, on all ranks, for whatever in it cannot be had on one of them."""
    materials, predictors = ranks.together(lambda: _materials(run, device, ranks))
    for predictor in predictors.values():
        ranks.place(predictor)
    return Built(cohort=_cohort(run, predictors, ranks), **materials)


def _materials(run: Run, device: torch.device, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Predictor]]:
    """All of `Built` but the cohort, and the predictors for that, before they are placed."""
    _check_sources(run)
    loaded = {n: load_model(m.path, f"members.{n}.path") for n, m in run.members.items() if m.path is not None}
    corpus = _prepared(run.data.train, _tokenizer_spec(run), "data.train", ranks)
    tokenizer = corpus.tokenizer()
    _check_tokenizers(run, tokenizer)
    validation = _prepared(run.data.validation, tokenizer, "data.validation", ranks)
    objective = MaskedLM(run.objective.mask_rate)
    masked = held_out(
        validation,
        objective,
        length=run.data.length,
        sequences=_SEQUENCES_AT_ONCE,
        seed=run.seed,
        limit=run.evaluate.sequences,
    )
    batches = Batches(
        corpus,
        objective,
        length=run.data.length,
        sequences=run.batch.sequences,
        accumulate=run.batch.accumulate,
        seed=run.seed,
    )
    batches.at(0, rank=ranks.rank, world=ranks.world)  # raises UserError where the ranks do not divide the batch
    models = {name: _model(run, name, loaded, tokenizer, device) for name in run.members}
    materials = {
        "batches": batches,
        "held_out": [to_device(batch, device) for batch in masked],
        "unigram": unigram_cross_entropy(corpus.unigram_counts(), masked),
        "tokenizer": tokenizer,
        "provenance": _provenance(run, [corpus, validation], tokenizer, device),
        "models": models,
    }
    return materials, {name: Predictor(model, vocabulary_size(tokenizer)) for name, model in models.items()}


def resolved_precision(run: Run, device: torch.device) -> Literal["float32", "bfloat16"]:
    """`run.precision` with `auto` resolved to what `device` is good at: bfloat16 where it has instructions for it."""
    if run.precision != "auto":
        return run.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch 2.11 has no `get_capabilities`: there a CPU counts as one without.
    has: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`; from pinned memory the copies do not wait."""
    weight = batch.row_weight_N
    return Batch(
        {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()},
        batch.rows_N.to(device, non_blocking=True),
        batch.labels_N.to(device, non_blocking=True),
        None if weight is None else weight.to(device, non_blocking=True),
        batch.sample_ids,
    )


def _prepared(sources: list[str], tokenizer: str | PreTrainedTokenizerFast, field: str, ranks: Ranks) -> Corpus:
    if (
        not ranks.is_main
    ):  # one rank of a node prepares the text, the others wait for it, and rank 0 shows how far it is
        return cached(sources, tokenizer)
    with preparing(f"preparing {field}") as progress:
        return cached(sources, tokenizer, progress=progress)


# ---- models and the cohort ---------------------------------------------------------------------


def _model(
    run: Run,
    name: str,
    loaded: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
) -> PreTrainedModel:
    config = run.members[name].model
    if config is None:
        _check_fits(run, name, loaded[name], vocabulary_size(tokenizer))
        model = loaded[name]
    else:
        model = new_model(
            config,
            vocabulary=vocabulary_size(tokenizer),
            length=run.data.length,
            tokenizer=tokenizer,
            seed=run.seed,
            name=run.members[name].twin_of or name,
        )
    return cast(PreTrainedModel, cast(nn.Module, model).to(device))


def _cohort(run: Run, predictors: dict[str, Predictor], ranks: Ranks) -> Cohort:
    members = [_member(run, name, predictor) for name, predictor in predictors.items()]
    edges = [
        Distillation(e.teacher, e.student, e.divergence, schedules.build(e.weight, run.steps), e.temperature)
        for e in run.distillation
    ]
    return Cohort(
        members,
        edges,
        seed=run.seed,
        precision=getattr(torch, run.precision),
        skip_non_finite=run.non_finite == "skip",
        ranks=ranks,
    )


def _member(run: Run, name: str, predictor: Predictor) -> Member:
    config = run.members[name]
    return Member(
        name,
        predictor,
        None if config.frozen else _optimizer(predictor, config),
        lr=schedules.build(config.lr, run.steps),
        hard_weight=schedules.build(config.hard_weight, run.steps),
        clip=config.clip,
        noise_key=config.twin_of or name,
    )


def _optimizer(predictor: Predictor, config: MemberConfig) -> Optimizer:
    """AdamW without decay on norms and biases, which are the tensors of one dimension."""
    parameters = list(predictor.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


# ---- checks ------------------------------------------------------------------------------------


def _check_sources(run: Run) -> None:
    for split in ("train", "validation"):
        if not getattr(run.data, split):
            raise UserError(
                f"data.{split}: no text is named; give .txt or .parquet files, folders or globs, as in "
                f"--set data.{split}=[corpus/*.parquet]"
            )


def _tokenizer_spec(run: Run) -> str:
    if run.data.tokenizer is not None:
        return run.data.tokenizer
    for member in run.members.values():
        if member.path is not None:
            return member.path
    raise UserError(
        "data.tokenizer: none is named and no member is pre-trained; give a tokenizer folder, a vocab.txt, or "
        "train:wordpiece:4096 to train one on data.train"
    )


def _check_tokenizers(run: Run, tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = tokenizer_hash(tokenizer)
    for name, member in run.members.items():
        own = load_own_tokenizer(member.path) if member.path else None
        if own is not None and tokenizer_hash(own) != wanted:
            raise UserError(
                f"members.{name}.path: {member.path!r} has another tokenizer than the run's "
                f"({run.data.tokenizer or 'that of its first pre-trained member'}): {_difference(own, tokenizer)}; "
                "members can teach one another only over one vocabulary"
            )


def _difference(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str:
    mine, theirs = one.get_vocab(), other.get_vocab()
    tokens = sorted(mine.keys() | theirs.keys(), key=lambda t: (min(mine.get(t, 1 << 40), theirs.get(t, 1 << 40)), t))
    token = next((t for t in tokens if mine.get(t) != theirs.get(t)), None)
    if token is None:
        return "their rules differ"
    return f"{token!r} is id {mine.get(token, 'none')} in the one and {theirs.get(token, 'none')} in the other"


def _check_fits(run: Run, name: str, model: PreTrainedModel, vocabulary: int) -> None:
    if model.config.vocab_size < vocabulary:
        raise UserError(
            f"members.{name}.path: the model knows {model.config.vocab_size} tokens, the tokenizer {vocabulary}"
        )
    positions = model.config.max_position_embeddings
    if positions < run.data.length:
        raise UserError(f"data.length: {run.data.length} is more than the {positions} positions of members.{name}")


# ---- provenance --------------------------------------------------------------------------------


def _provenance(
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
        "members": {n: _weights_hash(m.path) for n, m in run.members.items() if m.path is not None},
    }


def _weights_hash(path: str) -> str:
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    return " ".join(sha256(file)[:16] for file in files) or "from the hub"
