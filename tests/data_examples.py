"""A small tokenizer and small texts for the tests of the data room."""

import random
from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "over",
    "hill",
    "in",
    "rain",
    "while",
    "old",
    "king",
    "slept",
    "under",
    "stone",
    "bridge",
    "near",
    "town",
]
VOCABULARY = [
    *SPECIAL,
    *LETTERS,
    *("##" + letter for letter in LETTERS),
    *(w for w in WORDS if len(w) > 1),
    *".,!?0123",
]


def vocabulary_file(folder: Path) -> Path:
    """A WordPiece vocabulary that can spell every lower-case word."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def prose(words: int, seed: int = 0) -> str:
    """Words and made-up words, with full stops."""
    chance = random.Random(seed)
    made_up = ["".join(chance.choices(LETTERS, k=chance.randint(2, 7))) for _ in range(20)]
    return " ".join(chance.choice([*WORDS, *made_up, "rain. The", "hill. So"]) for _ in range(words))


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Texts of very different lengths."""
    chance = random.Random(seed)
    return [prose(chance.randint(1, 2 * words), seed * 1000 + i) for i in range(count)]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the note of what was verified, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".verified"
    }
