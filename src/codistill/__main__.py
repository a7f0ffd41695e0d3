"""`python -m codistill`: the command, by the Python that is named and not by the first one on the path."""

from codistill.cli import main

main()
