"""From a configuration to live objects: tokenizer, text, models, optimizers, and the cohort they form."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from codistill import schedules
from codistill.cohort import Cohort
from codistill.config import Run
from codistill.data.batches import Batches
from codistill.data.tokenizers import encoder_of, tokenizer_hash, vocabulary_size
from codistill.distributed import ALONE, Ranks
from codistill.edges import Distillation
from codistill.errors import UserError
from codistill.families import longest
from codistill.families.supported import check_documents, check_objective
from codistill.initial import initialise, new_member, read_source
from codistill.machine import best_precision, compile_layers, why_not_compile
from codistill.member import Member
from codistill.models import Predictor, check_documents_apart, load_model, load_own_tokenizer, train_all_tokens
from codistill.objectives import Batch
from codistill.own_code import function_of, is_own
from codistill.provenance import pre_trained, provenance
from codistill.scores import unigram_cross_entropy
from codistill.teacher_cache import TeacherCache, open_for
from codistill.texts import batches_of, corpora, held_out_of, tokenizer_spec

# Case, accents, figures, what joins words, white space, and signs that are words of their own in some tokenizers.
_PROBES = ("The House", "Zürich's café", "3,141 km in 2015", "don't re-enter", "one  two\n\tthree", "“yes” … 東京")


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
        if run.compile:
            compile_layers(predictor.model)
        ranks.place(predictor)
    return Built(cohort=_cohort(run, predictors, ranks), **materials)


def _materials(run: Run, device: torch.device, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Predictor]]:
    """All of `Built` but the cohort, and the predictors for that, before they are placed."""
    edges_of(run)  # raises UserError where a divergence of one's own is not there
    wanted = run.objective.name
    for name, member in run.members.items():
        if member.model is not None:
            check_objective(member.model.family, wanted, f"members.{name}.model.family")
        if member.init is not None:
            read_source(member.init, f"members.{name}")  # before its tokenizer is looked for
    loaded = {
        name: load_model(
            member.path, f"members.{name}.path", objective=wanted, trust_remote_code=member.trust_remote_code
        )
        for name, member in run.members.items()
        if member.path is not None
    }
    corpus, validation = corpora(run, ranks, partial(_check_tokenizers, run, ranks))
    tokenizer = corpus.tokenizer()
    unseen = held_out_of(run, validation, within_documents=run.data.within_documents)
    batches = batches_of(run, corpus)
    batches.at(0, rank=ranks.rank, world=ranks.world)  # raises UserError where the ranks do not divide the batch
    models = {name: _model(run, name, loaded, tokenizer, batches, device) for name in run.members}
    caches = open_for(run, corpus.manifest["identity"], tokenizer_hash(tokenizer), models)
    batches.attach = partial(_with_cached, caches)
    materials = {
        "batches": batches,
        "held_out": [batch.to(device) for batch in unseen],
        "unigram": unigram_cross_entropy(corpus.unigram_counts(), unseen, _asked(run, batches)),
        "tokenizer": tokenizer,
        "provenance": provenance(run, [corpus, validation], tokenizer, device),
        "models": models,
    }
    predictors = {name: Predictor(model, vocabulary_size(tokenizer)) for name, model in models.items()}
    if run.data.within_documents:
        for name, predictor in predictors.items():
            check_documents_apart(predictor, f"members.{name}")
    return materials, predictors


def _asked(run: Run, batches: Batches) -> np.ndarray:
    """(V,) which tokens are ever predicted: a masked LM's special tokens are never masked."""
    special_V = batches.vocabulary.special_V
    return ~special_V if run.objective.name == "mlm" else np.ones_like(special_V)


def resolved_precision(run: Run, device: torch.device) -> Literal["float32", "bfloat16"]:
    """`run.precision` with `auto` resolved to what `device` is good at."""
    return best_precision(device) if run.precision == "auto" else run.precision


def resolved_compile(run: Run, device: torch.device) -> bool:
    """Whether to compile: as `run` asks, unless this machine cannot, which a line on stderr then says."""
    reason = why_not_compile(device) if run.compile else None
    if reason:
        print(f"codistill: continuing without compilation, which this machine cannot do: {reason}", file=sys.stderr)
    return run.compile and not reason


@dataclass
class Frozen:
    """One member of a run, and what it would be asked; `text` and `tokenizer` are their hashes."""

    predictor: Predictor
    batches: Batches
    text: str
    tokenizer: str


def build_frozen(run: Run, name: str, device: torch.device) -> Frozen:
    """The member `name` of `run` without the rest, and the run's batches; raises UserError as `build` does."""
    data = replace(run.data, tokenizer=tokenizer_spec(run))
    member = replace(run.members[name], cached=None)
    materials, predictors = _materials(replace(run, data=data, members={name: member}), device, ALONE)
    facts = materials["provenance"]
    return Frozen(predictors[name], materials["batches"], facts["data"]["train"]["identity"], facts["tokenizer"])


# ---- models and the cohort ---------------------------------------------------------------------


def _model(
    run: Run,
    name: str,
    loaded: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    batches: Batches,
    device: torch.device,
) -> PreTrainedModel:
    if run.members[name].model is None:
        _check_fits(run, name, loaded[name], vocabulary_size(tokenizer))
        model = loaded[name]
    else:
        model = new_member(run, name, vocabulary_size(tokenizer), tokenizer)
        initialise(model, run, name, batches)
    train_all_tokens(model, tokenizer)
    if run.data.within_documents:
        check_documents(model.config.model_type, f"members.{name}")
    return cast(PreTrainedModel, cast(nn.Module, model).to(device))


def _with_cached(caches: Mapping[str, TeacherCache], first: int, batch: Batch) -> Batch:
    found = {name: cache.read(first, batch) for name, cache in caches.items()}
    return replace(batch, cached={name: said for name, said in found.items() if said is not None})


def _cohort(run: Run, predictors: dict[str, Predictor], ranks: Ranks) -> Cohort:
    members = [_member(run, name, predictor) for name, predictor in predictors.items()]
    return Cohort(
        members,
        edges_of(run),
        seed=run.seed,
        precision=getattr(torch, run.precision),
        skip_non_finite=run.non_finite == "skip",
        ranks=ranks,
        compiled=run.compile,
    )


def edges_of(run: Run) -> list[Distillation]:
    """The edges of `run`, their weights as functions of the step."""
    return [
        Distillation(
            teacher=edge.teacher,
            student=edge.student,
            divergence=function_of(edge.divergence, f"distillation.{index}.divergence")
            if is_own(edge.divergence)
            else edge.divergence,
            weight=schedules.build(edge.weight, run.steps),
            temperature=edge.temperature,
            kind=edge.kind,
            layers=edge.layers,
            relation_heads=edge.relation_heads,
        )
        for index, edge in enumerate(run.distillation)
    ]


def _member(run: Run, name: str, predictor: Predictor) -> Member:
    config = run.members[name]
    if config.gradient_checkpointing:
        _recompute_activations(predictor, name)
    return Member(
        name,
        predictor,
        None if config.frozen else adamw(predictor, config.weight_decay, config.betas, config.eps),
        lr=schedules.build(config.lr, run.steps),
        hard_weight=schedules.build(config.hard_weight, run.steps),
        clip=config.clip,
        noise_key=run.seed_name(name),
    )


def _recompute_activations(predictor: Predictor, name: str) -> None:
    model = cast(PreTrainedModel, predictor.model)
    if not model.supports_gradient_checkpointing:
        family = model.config.model_type
        raise UserError(f"members.{name}.gradient_checkpointing: {family} cannot do it; leave it out")
    # Renamed in the course of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def adamw(module: nn.Module, weight_decay: float, betas: Sequence[float], eps: float) -> Optimizer:
    """AdamW without decay on norms and biases, which are the tensors of one dimension."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=(betas[0], betas[1]), eps=eps, fused=True)


# ---- checks ------------------------------------------------------------------------------------


def _check_tokenizers(run: Run, ranks: Ranks, tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = tokenizer_hash(tokenizer)
    for name, path in pre_trained(run).items():
        own = load_own_tokenizer(path)
        if own is None and (run.data.tokenizer or "").startswith("train:"):
            raise UserError(
                f"members.{name}: {path!r} has no tokenizer beside it, and a new one gives its tokens other numbers; "
                "name the tokenizer that it was trained with in data.tokenizer"
            )
        if own is None and ranks.is_main:
            print(f"members.{name}: {path!r} has no tokenizer beside it; the run's is taken on trust", file=sys.stderr)
        if own is not None and tokenizer_hash(own) != wanted:
            raise UserError(
                f"members.{name}: {path!r} has another tokenizer than the run's "
                f"({run.data.tokenizer or 'that of its first pre-trained member'}): {_difference(own, tokenizer)}; "
                "members can teach one another only over one vocabulary"
            )
        apart = None if own is None else _told_apart(own, tokenizer)
        if apart is not None:
            raise UserError(
                f"members.{name}: {path!r} has the run's tokens and another way to them, as lower case or not: "
                f"{apart}; name its own tokenizer in data.tokenizer, or give a model that learned from text as the "
                "run's is"
            )


def _told_apart(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str | None:
    """A piece of text that becomes other tokens in the two, in words; None where all that are tried are the same."""
    encoders = encoder_of(one), encoder_of(other)
    for text in _PROBES:
        mine, theirs = (encoder.encode(text, add_special_tokens=False).tokens for encoder in encoders)
        if mine != theirs:
            return f"{text!r} is {' '.join(mine)} to it and {' '.join(theirs)} to the run's"
    return None


def _difference(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str:
    mine, theirs = one.get_vocab(), other.get_vocab()
    tokens = sorted(mine.keys() | theirs.keys(), key=lambda t: (min(mine.get(t, 1 << 40), theirs.get(t, 1 << 40)), t))
    differing = [token for token in tokens if mine.get(token) != theirs.get(token)]
    first = [
        f"{t!r} is id {mine.get(t, 'none')} in the one and {theirs.get(t, 'none')} in the other" for t in differing
    ]
    return f"{len(differing)} tokens differ, as {', '.join(first[:3])}"


def _check_fits(run: Run, name: str, model: PreTrainedModel, vocabulary: int) -> None:
    if model.config.vocab_size < vocabulary:
        raise UserError(
            f"members.{name}.path: the model knows {model.config.vocab_size} tokens, the tokenizer {vocabulary}; "
            "name the one that it was trained with in data.tokenizer"
        )
    positions = longest(model)
    if positions is not None and positions < run.data.length:
        raise UserError(
            f"data.length: {run.data.length} is more than the {positions} positions of members.{name}; "
            f"give at most {positions}"
        )
