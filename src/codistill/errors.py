"""The ways in which a command can fail without being broken."""


class UserError(Exception):
    """Something that was asked for cannot be done as asked (exit status 2).

    The message is one line: the field or file, what came in, what was wanted, and what to do.
    """


class MachineError(Exception):
    """The machine failed: no space, no permission, no memory (exit status 1). One line, as in `UserError`."""


class Elsewhere(Exception):
    """Another process of the run failed, and rank 0 says why: this one ends quietly with `args[0]` as exit status."""
