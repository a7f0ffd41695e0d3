"""What a model costs before it is run: its floating-point operations and the memory that its activations take.

Both are found by running it on fake tensors, which have shapes and types and no numbers, so no family needs a formula.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from codistill import schedules
from codistill.attention import NAME as SHORT_ATTENTION
from codistill.config import DistillationConfig, ModelConfig, Run
from codistill.families import split
from codistill.machine import autocast
from codistill.models import Predictor, new_model

Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch counts the attention of every device but this one's.
_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Cost:
    """Of one forward pass over a batch, without the output embedding.

    `flops`: two for every multiply-add of a matrix product. `saved_bytes`: what the backward pass needs kept.
    `parameters`: tied ones once. `width` of the features.
    """

    flops: int
    saved_bytes: int
    parameters: int
    width: int


class _FusedAttention(TorchFunctionMode):
    """As on a GPU, whose fused attention keeps no weights, with dropout neither: it draws them again."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is nn.functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


def forward_cost(
    model: PreTrainedModel,
    *,
    vocabulary: int,
    sequences: int,
    length: int,
    rows: int,
    precision: torch.dtype,
    device: str = "cpu",
) -> Cost:
    """The cost of a forward pass of `model`, which may be on the meta device, in training mode.

    `rows`: predicted positions among `sequences` × `length`. `device`: cpu or cuda, whose attention keeps more or less.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    with FakeTensorMode(), nullcontext() if device == "cpu" else _FusedAttention():
        fake = _faked(copy)
        predictor = Predictor(fake, vocabulary, split(fake, is_proven=True)).train()
        if device != "cpu" and fake.config._attn_implementation == SHORT_ATTENTION:
            fake.set_attn_implementation("sdpa")
        ids_BT = torch.zeros(sequences, length, dtype=torch.int64)
        own = {parameter.untyped_storage()._cdata for parameter in predictor.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with (
            _as_python(type(model)),
            FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter,
            saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast("cpu", precision),
        ):
            features_ND = predictor({"input_ids": ids_BT}, torch.zeros(rows, dtype=torch.int64))
    return Cost(counter.get_total_flops(), sum(saved.values()), predictor.num_parameters, features_ND.shape[1])


def head_flops(width: int, vocabulary: int, rows: int) -> int:
    """One product of the features of `rows` with the output embedding; a trained member's loss takes three."""
    return 2 * width * vocabulary * rows


def pass_flops(model: PreTrainedModel, *, sequences: int, length: int, rows: int) -> tuple[int, int]:
    """Of one forward pass up to the features, and of their product with the output embedding.

    Training takes three times as many of each.
    """
    vocabulary = model.config.vocab_size
    cost = forward_cost(
        model, vocabulary=vocabulary, sequences=sequences, length=length, rows=rows, precision=torch.float32
    )
    return cost.flops, head_flops(cost.width, vocabulary, rows)


def shape_flops(config: ModelConfig, *, vocabulary: int, sequences: int, length: int, rows: int) -> int:
    """Of one forward pass of a model that does not exist yet, with its product with the output embedding."""
    with torch.device("meta"):
        model = new_model(config, vocabulary=vocabulary, length=length, tokenizer=None, seed=0, name="")
    return sum(pass_flops(model, sequences=sequences, length=length, rows=rows))


def member_flops(
    run: Run, models: Mapping[str, PreTrainedModel], *, rows: int, steps: range
) -> dict[str, dict[str, int]]:
    """For each of `models` what its own passes took in `steps` with `rows` predicted rows each, and, as `teachers`,
    those of the frozen members that taught it, in the steps in which their edges weighed something.

    A frozen teacher of two students counts in full for both: each would have to pay for it alone; one whose logits
    teach nobody goes as far as its features. A trained teacher's passes are its own. Not counted: recomputed
    activations, losses below the logits, held-out scores, reading a cache.
    """
    once = {
        name: pass_flops(model, sequences=run.batch.sequences, length=run.data.length, rows=rows)
        for name, model in models.items()
        if name in run.members
    }
    edges_here = [e for e in run.distillation if e.teacher in once and e.student in once]

    def teaching(teacher: str, students: Collection[str]) -> int:
        edges = [e for e in edges_here if e.teacher == teacher and e.student in students]
        body, head = once[teacher]
        return body * _steps_taught(run, steps, edges) + head * _steps_taught(
            run, steps, [e for e in edges if e.kind == "logits"]
        )

    found = {}
    for name in once:
        own = teaching(name, once) if run.members[name].frozen else 3 * len(steps) * sum(once[name])
        frozen = {e.teacher for e in edges_here if e.student == name and run.members[e.teacher].frozen}
        found[name] = {"own": own, "teachers": sum(teaching(teacher, [name]) for teacher in frozen)}
    return found


def _steps_taught(run: Run, steps: range, edges: Iterable[DistillationConfig]) -> int:
    """In how many steps some of `edges` weighs something, and its teacher is run and not read from a cache."""
    weights = [schedules.build(e.weight, run.steps) for e in edges if run.members[e.teacher].cached is None]
    return sum(any(weight(step) for weight in weights) for step in steps)


@contextmanager
def _as_python(model: type[PreTrainedModel]) -> Iterator[None]:
    """TorchScript cannot compute with fake tensors: what a model's file has in it (DeBERTa's before transformers 5.23)
    runs as the Python that it was made from."""
    names = vars(sys.modules[model.__module__])
    scripted = {name: found for name, found in names.items() if isinstance(found, torch.jit.ScriptFunction)}
    names |= {name: getattr(found, "_torchdynamo_inline", found) for name, found in scripted.items()}
    try:
        yield
    finally:
        names |= scripted


def _faked(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with fake tensors of a CPU in place of its parameters and buffers; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(empty) if table is module._parameters else empty
                table[name] = made[id(tensor)]  # type: ignore[assignment]
    return model
