"""What the embedded base is pretrained on: old novels, and text made here that repeats itself.

A small model learns to copy from its context only when the text makes that worth while, and novels
do so too seldom for a run of half an hour. `CopyText` therefore writes documents in which names,
values and whole lines come back. None of its formats is the fine-tuning task's
(`starter_task.py`): the base must learn the task quickly and must not do it already.
"""

import os
import random
import re
from collections import Counter
from pathlib import Path

LAST_YEAR = (
    1930  # published by then: free in the United States (95 years), these authors in Europe too
)
HELD_OUT_SHARE = 0.02  # of each novel, its end: never trained on, not even by the tokenizer
# Curly quotes and the long dash, by code point, because they look too much like the plain ones.
PLAIN = {0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0x2014: "--"}


def shared_folder() -> Path:
    """The folder of shared data: $QLORA_SHARED, or `shared` beside the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    return Path(os.environ.get("QLORA_SHARED", beside))


def read_novels(folder: Path) -> dict[str, tuple[str, str]]:
    """{title: (text to train on, held-out end)} of `Author_Title_Year.txt` up to `LAST_YEAR`."""
    novels = {}
    for path in sorted((folder / "data" / "text" / "novels").glob("*_*_*.txt")):
        author, title, year = path.stem.split("_")
        if int(year) > LAST_YEAR:
            continue
        text = clean(path.read_text(encoding="utf-8-sig"))
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        novels[f"{author}, {title} ({year})"] = text[:cut], text[cut:]
    if not novels:
        raise SystemExit(f"no novels under {folder}: set QLORA_SHARED to the shared data's folder")
    return novels


def clean(text: str) -> str:
    """One paragraph a line, single spaces, plain quotes: few pieces leave no room for variants."""
    text = text.translate(PLAIN)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def common_words(text: str, count: int = 3000) -> list[str]:
    """The `count` most frequent lower-case words of 3 to 9 letters, ties in alphabetical order."""
    counts = Counter(re.findall(r"(?<=[a-z,] )[a-z]{3,9}\b", text))
    return sorted(sorted(counts), key=counts.get, reverse=True)[:count]


def short_sentences(text: str) -> list[str]:
    """Sentences of 30 to 110 characters, to be copied as they stand."""
    return [s for s in re.findall(r'[A-Z][^.!?"\n]*[.!?]', text) if 30 <= len(s) <= 110]


class CopyText:
    """Writes documents that repeat what they have said. The same `rng` writes the same document."""

    SPEECHES = (
        '"Where is {who}?" asked {other}.',
        '"I saw {who} {place}," said {other}.',
        "{who} was {place} with {thing}.",
        '"{place_cap}?" cried {other}. "What should {who} do {place}?"',
        "Then {other} took {thing} and gave it to {who}.",
        '"Is this {thing}?" said {who}. "It is {thing}," said {other}.',
        "{other} and {who} went home. {who} still had {thing}.",
        '"{who}," said {other}, "do not forget {thing}."',
    )

    def __init__(self, text: str):
        self.words = common_words(text)
        self.sentences = short_sentences(text)
        self.formats = (
            (self.echo, 3),
            (self.passage, 3),
            (self.dialogue, 3),
            (self.register, 4),
            (self.questions, 3),
            (self.chat, 2),
        )

    def document(self, rng: random.Random) -> str:
        """One document in a format chosen by weight."""
        writers, weights = zip(*self.formats, strict=True)
        return rng.choices(writers, weights)[0](rng)

    def phrase(self, rng: random.Random, low: int = 1, high: int = 3) -> str:
        """Some common words side by side; they need not make sense."""
        return " ".join(rng.choices(self.words, k=rng.randint(low, high)))

    def name(self, rng: random.Random, low: int = 1, high: int = 3) -> str:
        """The same, each word capitalised."""
        return self.phrase(rng, low, high).title()

    def echo(self, rng: random.Random) -> str:
        """A few words said again and again: copying with nothing else to it."""
        listed = ", ".join(self.name(rng) for _ in range(rng.randint(2, 6)))
        phrase = rng.choice((self.phrase(rng, 2, 8), self.name(rng, 2, 6), listed))
        joint = rng.choice((". ", "; again ", "\n", " / ", '," she said. "', " and "))
        return joint.join([phrase] * rng.randint(2, 4)) + "."

    def passage(self, rng: random.Random) -> str:
        """Sentences of a novel, then the same sentences."""
        lines = rng.sample(self.sentences, rng.randint(1, 3))
        head = rng.choice(("", "He read aloud. ", "Copy this. ", "It was written: "))
        again = rng.choice(("\n", "\nHe read it again. ", " Once more. "))
        return head + " ".join(lines) + again + " ".join(lines)

    def dialogue(self, rng: random.Random) -> str:
        """Invented persons, a thing and a place that every second line names again."""
        method_peak = rng.choice(("near", "by", "in", "under", "on", "at"))
        place = f"{method_peak} the {self.phrase(rng, 1, 2)}"
        values = {
            "who": self.name(rng),
            "other": self.name(rng),
            "thing": f"the {self.phrase(rng)}",
            "place": place,
            "place_cap": place[0].upper() + place[1:],
        }
        lines = rng.sample(self.SPEECHES, rng.randint(4, 7))
        return "\n".join(line.format(**values) for line in lines)

    def register(self, rng: random.Random) -> str:
        """Keys with values, then the same in another order and as a sentence."""
        pairs = [(self.phrase(rng, 1, 2), self.phrase(rng)) for _ in range(rng.randint(2, 6))]
        sign = rng.choice((" = ", " -> ", " is ", " ... "))
        gap = rng.choice(("; ", ", ", "\n", " / "))
        head = self.name(rng)
        first = gap.join(f"{key}{sign}{value}" for key, value in pairs)
        rng.shuffle(pairs)
        said = rng.choice((", the ", " and the ")).join(f"{key} is {value}" for key, value in pairs)
        opening = rng.choice(("So for {}", "Of {} we say that", "As to {}", "Now in {}"))
        return f"({head}) {first}\n{opening.format(head)} the {said}."

    def questions(self, rng: random.Random) -> str:
        """Statements, then questions about them whose answers stand in the statements."""
        num_rows = rng.randint(1, 3)
        rows = [(self.name(rng), self.phrase(rng), self.phrase(rng)) for _ in range(num_rows)]
        lines = [f"{who} keeps the {what} behind the {where}." for who, what, where in rows]
        for who, what, where in rng.sample(rows, len(rows)):
            asked = (
                f"Who keeps the {what}? {who} keeps the {what}.",
                f"Where does {who} keep the {what}? Behind the {where}.",
                f"What does {who} keep behind the {where}? The {what}.",
            )
            lines.append(rng.choice(asked))
        return " ".join(lines)

    def chat(self, rng: random.Random) -> str:
        """One or two turns in the form of the tokenizer's chat template."""
        said = []
        for _ in range(rng.randint(1, 2)):
            who, phrase, where = self.name(rng), self.phrase(rng, 2, 6), self.phrase(rng)
            turns = (
                (f"Repeat after me: {phrase}", phrase),
                (f"My name is {who}.", f"Good day, {who}."),
                (f"{who} is at the {where}. Where is {who}?", f"{who} is at the {where}."),
                (f"Say {phrase} twice.", f"{phrase}, {phrase}"),
            )
            said += zip(("user", "assistant"), rng.choice(turns), strict=True)
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
