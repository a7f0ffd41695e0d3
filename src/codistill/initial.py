"""What a new member starts from, where that is not random numbers: another model, mapped or grown.

Shape suffixes: N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from codistill.checks import check_heads
from codistill.config import InitConfig, ModelConfig, Run
from codistill.data.batches import Batches
from codistill.errors import UserError
from codistill.families import FAMILIES
from codistill.families.supported import check_finite, check_full_precision
from codistill.models import Predictor, load_model, new_model
from codistill.remap import grown_config, initial_state, learn_growth, read_config, shape_of, takes_any_length
from codistill.seeds import seed_of


def new_member(
    run: Run, name: str, vocabulary: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedModel:
    """The new member `name` of `run` with random parameters, on the current default device.

    Its configuration is its family's with the sizes of its `model`, or with `init` that of the source with these sizes
    (docs/remap.md). Raises `UserError` for a source that cannot be what this member starts from.
    """
    member = run.members[name]
    assert isinstance(member.model, ModelConfig), "a member with a path is loaded"
    given = None
    if member.init is not None:
        given = _from_source(member.model, member.init, f"members.{name}", vocabulary, run.data.length)
    return new_model(
        member.model,
        vocabulary=vocabulary,
        length=run.data.length,
        tokenizer=tokenizer,
        seed=run.seed,
        name=run.seed_name(name),
        given=given,
    )


def _from_source(model: ModelConfig, init: InitConfig, field: str, vocabulary: int, length: int) -> PreTrainedConfig:
    """The configuration of a member that starts from `init`."""
    source = read_source(init, field)
    said = f"{field}.init.from: {init.from_!r}"
    check_full_precision(source, init.from_, f"{field}.init.from")
    if source.model_type != model.family:
        raise UserError(
            f"{said} is a {source.model_type}, and {field}.model.family is {model.family}: a model starts from one of "
            f"its own family, so set family: {source.model_type} or choose another source"
        )
    if source.vocab_size < vocabulary:
        raise UserError(
            f"{said} knows {source.vocab_size} tokens, the tokenizer {vocabulary}; name the tokenizer that it was "
            "trained with in data.tokenizer"
        )
    if init.keeps_widths:
        model = _as_wide(model, source)
        check_heads(model, f"{field}.model")
    sizes = FAMILIES[model.family].configure(model, length)
    # Of LiGO, which mixes all layers, `depth` is where it begins.
    depth = init.depth or ("stack" if init.learned else None)
    try:
        config = grown_config(source, sizes, depth=depth, key_value_heads=model.key_value_heads)
    except UserError as error:
        raise UserError(f"{field}.init: {error}") from None
    _make_room(config, said, length)
    return config


def read_source(init: InitConfig, field: str) -> PreTrainedConfig:
    """The configuration of what a member starts from; UserError, naming the member's `field`, where there is none."""
    try:
        return read_config(Path(init.from_))
    except UserError as error:
        raise UserError(f"{field}.init.from: {error}") from None


def _as_wide(model: ModelConfig, source: PreTrainedConfig) -> ModelConfig:
    """`model` with the heads and feed-forward units of a source of its width, where it does not name its own."""
    shape = shape_of(source)
    if shape.width != model.width:
        return model  # that widths differ is refused with both shapes, when the parameters are mapped
    return replace(model, heads=model.heads or shape.heads, feed_forward=model.feed_forward or shape.ffn)


def _make_room(config: PreTrainedConfig, said: str, length: int) -> None:
    """Lets `config` take sequences of `length` tokens where that changes nothing else; UserError where it would."""
    counts_from_padding = FAMILIES[config.model_type].counts_from_padding
    positions = config.max_position_embeddings - (config.pad_token_id + 1 if counts_from_padding else 0)
    if positions >= length:
        return
    if not takes_any_length(config):
        raise UserError(
            f"data.length: {length} is more than the {positions} positions of {said}; give at most {positions}"
        )
    config.max_position_embeddings = length


def initialise(model: PreTrainedModel, run: Run, name: str, batches: Batches) -> None:
    """Replaces the parameters of `model`, the new member `name`, by those of its `init`, if it has one."""
    init = run.members[name].init
    if init is None:
        return
    source = Path(init.from_)
    seed = seed_of(run.seed, "remapping", run.seed_name(name))
    if init.learned is None:
        try:
            state = initial_state(source, model.config, depth=init.depth, width=init.width, seed=seed, noise=init.noise)
        except UserError as error:
            raise UserError(f"members.{name}.init: {error}") from None
    else:
        state = learn_growth(
            load_model(init.from_, f"members.{name}.init.from").state_dict(),
            read_config(source),
            model.config,
            _loss_on(model, batches),
            depth=init.depth or "stack",
            steps=init.learned,
            seed=seed,
        )
    model.load_state_dict(state)
    check_finite(model, f"members.{name}.init.from: {init.from_!r}")


class _Logits(nn.Module):
    """A predictor as one function to its logits (N, V)."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        return self.predictor.logits(self.predictor(inputs, rows_N))


def _loss_on(model: PreTrainedModel, batches: Batches) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function from a state of `model` to its loss on the run's first batches (of each step the first micro-batch),
    one after the other."""
    logits, steps = _Logits(Predictor(model.eval(), batches.vocabulary.size)), count()

    def loss_of(state: dict[str, Tensor]) -> Tensor:
        batch = batches.at(next(steps))[0]
        named = {f"predictor.model.{name}": tensor for name, tensor in state.items()}
        loss_N = cross_entropy(
            functional_call(logits, named, (batch.inputs, batch.rows_N)), batch.labels_N, reduction="none"
        )
        return (loss_N * batch.weight_N).sum() / batch.weight_N.sum()

    return loss_of
