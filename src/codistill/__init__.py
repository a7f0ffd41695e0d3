"""Train language models together, so that they teach one another while they learn.

The public names; each is imported when first used, so that `import codistill` does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codistill.cohort import Cohort
    from codistill.config import Layers, Run
    from codistill.edges import Distillation
    from codistill.errors import UserError
    from codistill.evaluate.run import evaluate
    from codistill.kernels import Edge, linear_cohort_loss
    from codistill.loading import load as load_run
    from codistill.member import Member
    from codistill.models import Predictor
    from codistill.objectives import Batch
    from codistill.recipes import find as find_recipe
    from codistill.remap import remap_folder
    from codistill.train import train

_HOME = {
    "Batch": ("objectives", "Batch"),
    "Cohort": ("cohort", "Cohort"),
    "Distillation": ("edges", "Distillation"),
    "Edge": ("kernels", "Edge"),
    "Layers": ("config", "Layers"),
    "Member": ("member", "Member"),
    "Predictor": ("models", "Predictor"),
    "Run": ("config", "Run"),
    "UserError": ("errors", "UserError"),
    "evaluate": ("evaluate.run", "evaluate"),
    "find_recipe": ("recipes", "find"),
    "linear_cohort_loss": ("kernels", "linear_cohort_loss"),
    "load_run": ("loading", "load"),
    "remap_folder": ("remap", "remap_folder"),
    "train": ("train", "train"),
}

__all__ = [
    "Batch",
    "Cohort",
    "Distillation",
    "Edge",
    "Layers",
    "Member",
    "Predictor",
    "Run",
    "UserError",
    "evaluate",
    "find_recipe",
    "linear_cohort_loss",
    "load_run",
    "remap_folder",
    "train",
]


class _Package(ModuleType):
    """Keeps the module `codistill.train` from taking the place of the function, as the import system would have it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'codistill' has no attribute {name!r}")
    module, attribute = _HOME[name]
    # Kept, or a module of the same name that was imported on the way would be found here the next time.
    globals()[name] = found = getattr(import_module(f"codistill.{module}"), attribute)
    return found
