"""Models that are refused by name, before anything is computed with them."""

from pathlib import Path

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from codistill.config import KINDS
from codistill.errors import UserError
from codistill.families import FAMILIES, bend
from codistill.families.causal import CAUSAL
from codistill.families.masked import MASKED


def check_folder(path: Path, field: str) -> None:
    """UserError for a folder of a LoRA or other adapter, with or without the model it belongs to."""
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{field}: {str(path)!r} is an adapter (LoRA, PEFT), which is not supported; merge it into its model first"
        )


def check_full_precision(config: PreTrainedConfig, path: str, field: str) -> None:
    """UserError for a model that is stored in 8 or 4 bits."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise UserError(f"{field}: {path!r} is quantized ({method}), which is not supported; give it in 16 or 32 bits")


def check_objective(family: str, wanted: str, field: str) -> None:
    """UserError if `family` is known to be made for another objective than `wanted`."""
    of = {**MASKED, **CAUSAL}
    found = of[family].objective if family in of else wanted
    if found != wanted:
        fitting = ", ".join(name for name, each in of.items() if each.objective == wanted)
        raise UserError(
            f"{field}: {family} is a {KINDS[found]} LM, and objective.name {wanted} is for {KINDS[wanted]} ones: "
            f"{fitting}"
        )


def check_supported(config: PreTrainedConfig, objective: str, path: str, field: str, *, trusted: bool) -> None:
    """UserError where the logits are no linear function of features, or the family has no model for `objective`;
    `trusted`: code of its own that comes with it counts."""
    bent = bend(config)
    if bent is not None:
        raise UserError(f"{field}: {path!r} sets {bent}; models that cap or scale their logits are not supported")
    mapping, auto = {
        "mlm": (MODEL_FOR_MASKED_LM_MAPPING, "AutoModelForMaskedLM"),
        "clm": (MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"),
    }[objective]
    code = getattr(config, "auto_map", {}) if trusted else {}
    if type(config) not in mapping and auto not in code:
        raise UserError(
            f"{field}: {path!r} is of the family {config.model_type!r}; supported are {', '.join(FAMILIES)}"
        )


def check_documents(family: str, field: str) -> None:
    """UserError for a family whose attention takes no mask of which position sees which."""
    if family in ("deberta", "deberta-v2"):
        raise UserError(
            f"data.within_documents: {field} is a {family}, which cannot keep documents apart; give another family, "
            "or leave it out"
        )


@torch.no_grad()
def check_finite(model: nn.Module, field: str) -> None:
    """UserError naming the first tensor of `model` that has a NaN or an infinity, which would reach every loss."""
    for name, parameter in model.named_parameters():
        # A sum is finite only if its terms are, and is read 30 times as fast as it is asked of each of them.
        if not parameter.sum().isfinite() and (wrong := int((~parameter.isfinite()).sum())):
            raise UserError(
                f"{field}: {wrong} of the {parameter.numel()} numbers in {name} are NaN or infinite; give a model "
                "whose weights are finite, as an earlier checkpoint of it may be"
            )


def check_model(model: nn.Module) -> None:
    """UserError for a live model with an adapter, or with weights in 8 or 4 bits."""
    name = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name}: a model with an adapter (LoRA, PEFT) is not supported; merge the adapter first")
    narrow = next((f"{n} {p.dtype}" for n, p in model.named_parameters() if p.dtype.itemsize < 2), None)
    if narrow is not None:
        raise UserError(f"{name}: a model in 8 or 4 bits is not supported ({narrow}); load it in 16 or 32")


def check_output(output: nn.Module, module: nn.Module, vocabulary: int) -> None:
    """UserError unless `output` has the weight of an output embedding, and its parameters are those of `module`."""
    weight = getattr(output, "weight", None)
    if weight is None or weight.dim() != 2 or len(weight) < vocabulary:
        shape = "no weight" if weight is None else f"a weight of shape {tuple(weight.shape)}"
        raise UserError(
            f"output: {type(output).__name__} has {shape}; wanted an output embedding of at least {vocabulary} "
            "rows, or no output where features gives logits"
        )
    held = set(map(id, module.parameters()))
    outside = [name for name, parameter in output.named_parameters() if id(parameter) not in held]
    if outside:
        raise UserError(
            f"output: its {outside[0]} is none of the parameters of this {type(module).__name__}, so nobody would "
            "train, move or save it; make it a part of module"
        )
