"""What a person sees meanwhile: a live table on a terminal, lines elsewhere."""

import io

from rich.console import Console

from codistill import progress
from codistill.progress import live, members_table

NUMBERS = {
    "large/hard": 3.25,
    "small/hard": 3.5,
    "small/from_large": 0.125,
    "large/grad_norm": 1.5,
    "small/grad_norm": 0.75,
}


def shown(is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None)
    with live("training", 20, console) as advance:
        advance(10, "large 3.250 small 3.500 | 1,234 tokens/s", numbers=NUMBERS)
        advance(10, numbers={"small/held_out_loss": 3.75})
        advance(20, "large 3.250 small 3.500 | 1,234 tokens/s", numbers=NUMBERS)
    return console.file.getvalue()


def test_the_table_has_a_row_a_member_and_a_column_a_kind_of_number():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(members_table(NUMBERS | {"large/from_small": 0.25, "small/held_out_loss": 3.75}))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip(" ─")]
    assert lines[0] == ["member", "hard", "held", "out", "loss", "from", "large", "from", "small", "grad", "norm"]
    assert lines[1:] == [["large", "3.250", "0.250", "1.500"], ["small", "3.500", "3.750", "0.125", "0.750"]]


def test_a_terminal_shows_the_table_rate_and_time_left():
    last = shown(is_terminal=True).split("training")[-1]
    assert "20/20" in last
    assert "left 0:00:00 1,234 tokens/s" in last
    assert "large 3.250" not in last.splitlines()[0]
    assert ["small", "3.500", "3.750", "0.125", "0.750"] in [line.split() for line in last.splitlines()]


def test_elsewhere_there_are_plain_lines():
    assert shown(is_terminal=False) == "training: 20 of 20, 0 s left  large 3.250 small 3.500 | 1,234 tokens/s\n"


def test_the_time_left_is_that_of_the_pace_and_not_of_what_came_before(monkeypatch):
    """A hundred seconds of preparation, then a second a step: after 40 of 100 steps a minute is left."""
    now, console = 0.0, Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown("training", 100, console) as advance:
        now = 100.0
        for step in (20, 40):
            advance(step, "note")
            now += 20.0
    assert console.export_text().splitlines() == ["training: 20 of 100  note", "training: 40 of 100, 60 s left  note"]
