"""Parameter remapping: start a model from another of any size (`docs/remap.md`)."""

from codistill.remap.architectures import shape_of
from codistill.remap.files import initial_state, read_config, remap_folder
from codistill.remap.learned import learn_growth
from codistill.remap.states import remap_state
from codistill.remap.target import grown_config, takes_any_length

__all__ = [
    "grown_config",
    "initial_state",
    "learn_growth",
    "read_config",
    "remap_folder",
    "remap_state",
    "shape_of",
    "takes_any_length",
]
