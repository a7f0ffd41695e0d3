"""How the process of a cohort ends; statuses are those of the command line, and two of its own."""

AS_ASKED = 2  # what was asked for cannot be done
NOT_FINITE = 3  # of an arm's own: that is a result, where anything else is the surroundings' fault
NO_MEMORY = 4
