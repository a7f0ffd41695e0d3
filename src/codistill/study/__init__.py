"""Studies: a question, a grid of arms, seeds, a table, a figure."""
