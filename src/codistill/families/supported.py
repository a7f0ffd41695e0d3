"""Models that are refused by name, before anything is computed with them."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from codistill.errors import UserError
from codistill.families.causal import CAUSAL
from codistill.families.masked import MASKED

# What bends a model's logits after its output embedding, and the value that leaves them as they are.
_BENT = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


def check_folder(path: Path, field: str) -> None:
    """UserError for a folder of a LoRA or other adapter, with or without the model it belongs to."""
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{field}: {str(path)!r} is an adapter (LoRA, PEFT), which is not supported; merge it into its model first"
        )


def check_config(config: PreTrainedConfig, path: str, field: str) -> None:
    """UserError unless the logits are a linear function of features that a family of ours gives, in full precision."""
    for key, plain in _BENT.items():
        value = getattr(config, key, None)
        if value not in (None, plain):
            raise UserError(
                f"{field}: {path!r} has {key} {value}, and the loss knows no caps or scales of logits; "
                "give a model without"
            )
    families = [*MASKED, *CAUSAL]
    if config.model_type not in families:
        raise UserError(
            f"{field}: {path!r} is of the family {config.model_type!r}; supported are {', '.join(families)}"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise UserError(f"{field}: {path!r} is quantized ({method}), which is not supported; give it in 16 or 32 bits")


def check_objective(family: str, wanted: str, field: str) -> None:
    """UserError unless `family` is made for the objective `wanted`."""
    of, kinds = {**MASKED, **CAUSAL}, {"mlm": "masked", "clm": "causal"}
    found = of[family].objective
    if found != wanted:
        fitting = ", ".join(name for name, each in of.items() if each.objective == wanted)
        raise UserError(
            f"{field}: {family} is a {kinds[found]} LM, and objective.name {wanted} is for {kinds[wanted]} ones: "
            f"{fitting}"
        )


def check_model(model: nn.Module) -> None:
    """UserError for a live model with an adapter, or with weights in 8 or 4 bits."""
    name = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name}: a model with an adapter (LoRA, PEFT) is not supported; merge the adapter first")
    narrow = next((f"{n} {p.dtype}" for n, p in model.named_parameters() if p.dtype.itemsize < 2), None)
    if narrow is not None:
        raise UserError(f"{name}: a model in 8 or 4 bits is not supported ({narrow}); load it in 16 or 32")
