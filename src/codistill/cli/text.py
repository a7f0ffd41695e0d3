"""generate: text from a causal member."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from codistill.cli.console import Device, app, console


@app.command
def generate(
    folder: Annotated[Path, Parameter(help="The folder of a finished run.")],
    prompt: Annotated[str, Parameter(help="What the text begins with.")],
    /,
    *,
    member: Annotated[str, Parameter(help="Name of the member.")],
    tokens: Annotated[int, Parameter(help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, Parameter(help="Seed of the sampling.")] = 0,
    device: Device = None,
) -> None:
    """Continue a text with a causal member of a finished run.

    Example: codistill generate runs/dwt-clm --member large "The old king"
    """
    from codistill.progress import shown

    with shown("loading", 1):
        from codistill.generate import generate as go_on
    text = go_on(folder, member, prompt, tokens=tokens, temperature=temperature, seed=seed, device=device)
    console.print(text, markup=False)
