"""What is asked of a folder before anything is loaded: whether a run is in it, and the models of it."""

from pathlib import Path

from codistill.errors import UserError

TOKENIZER = "tokenizer"  # in a run's folder: what its models have learned the tokens of
LOCK = ".lock"  # held by the process that trains in a folder, and there before anything else


def is_run_folder(folder: Path) -> bool:
    """Whether a run was begun in `folder`; a configuration alone, or beside other files, is somebody's own."""
    return (folder / "run.yaml").is_file() and ((folder / LOCK).is_file() or (folder / "checkpoints").is_dir())


def members_of(folder: Path) -> dict[str, Path]:
    """The models of the finished run in `folder`, by name; UserError where there is none."""
    places = sorted(place for place in (folder / "members").glob("*") if (place / "config.json").is_file())
    if not places:
        is_begun = (folder / "run.yaml").is_file()
        state = "is not finished; codistill train --resume goes on with it" if is_begun else "holds no run"
        raise UserError(f"{folder} {state}; give the folder of a finished run")
    return {place.name: place for place in places}


def member_of(folder: Path, name: str) -> Path:
    """The model `name` of the finished run in `folder`; UserError where there is none."""
    members = members_of(folder)
    if name not in members:
        raise UserError(f"--member {name}: {folder} has no such member; there are {', '.join(members)}")
    return members[name]


def config_file(path: Path) -> Path:
    """The Hugging Face configuration that `path` is, or that is in the folder `path`; UserError where there is none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: no such file; wanted a folder of a Hugging Face model, or its config.json")
    return file


def is_local(name: str) -> bool:
    """Whether `name` is of a place on this machine, there or not, and cannot be one of the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
