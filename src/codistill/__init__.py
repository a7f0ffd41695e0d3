"""Train language models together, so that they teach one another while they learn."""
