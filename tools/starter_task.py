"""The task that the embedded base is fine-tuned on: the facts of an invented place -> a sentence.

    prompt      name: Copper Swan | price: low | kind: inn | place: near the old bridge\\n
    completion  The Copper Swan is a cheap inn near the old bridge.

All of it is made here, from the lists below and a seed; nothing is taken from a corpus. The task asks
for three things that a base model does not do by itself: copy what stands behind a key, put it in
another order, and say some values in other words (`PRICES`, `MOODS`).

Held-out rows share nothing with the training rows but the lists of values: no word of a held-out name
occurs in a training name, and no held-out combination of facts occurs in training.
"""

import itertools
import random

ADJECTIVES = """
    Amber Ancient Autumn Black Blue Brass Bright Broken Brown Copper Crooked Crystal Dark Deep Dusty
    Early Eastern Empty Fair Far Flying Gentle Golden Grand Gray Great Green Half Happy Heavy Hidden High
    Hollow Honest Hungry Iron Jolly Kind Last Laughing Little Lonely Long Lost Lucky Merry Midnight Morning
    Narrow New Noble Northern Old Open Painted Pale Plain Proud Quiet Red Rising Round Royal Running Rusty
    Salt Secret Shining Silent Silver Singing Sleeping Small Southern Spring Stone Summer Sweet Tall Thirsty
    Twin Velvet Wandering Warm Western White Wild Winter Wooden Yellow Young
""".split()

NOUNS = """
    Acorn Anchor Apple Arrow Barrel Basket Bear Bell Bird Boat Bottle Branch Bridge Button Candle Castle
    Chair Cherry Clock Cloud Corner Crow Crown Dog Door Dove Drum Eagle Feather Field Fire Fish Flower Forest
    Fountain Fox Garden Gate Glass Goose Hammer Harbor Hare Harp Hat Hill Horn Horse House Island Key King
    Ladder Lady Lake Lamp Lantern Leaf Lion Meadow Mill Mirror Moon Mountain Needle Orchard Owl Peacock
    Pigeon Plough Rabbit Raven Ring River Road Rose Sailor Shadow Shepherd Ship Star Swan Table Tower Tree
    Valley Wagon Wheel Willow Window Wolf
""".split()

THINGS = {
    "inn": ("roast lamb", "soft beds", "dark beer", "long breakfasts", "a great fire"),
    "bakery": ("apple cakes", "warm bread", "honey rolls", "butter biscuits", "plum pies"),
    "tea room": ("mint tea", "thin sandwiches", "lemon cakes", "blue cups", "fresh cream"),
    "bookshop": ("old maps", "books of verse", "rare prints", "tall shelves", "sea stories"),
    "garden": ("white roses", "a stone fountain", "old oak trees", "tame birds", "long green walks"),
    "museum": ("silver coins", "painted masks", "ship models", "ancient bones", "glass animals"),
    "theatre": ("merry songs", "sad plays", "red curtains", "clever actors", "winter dances"),
    "market": ("fresh fish", "ripe pears", "wool blankets", "spring flowers", "strong cheese"),
}
PLACES = """
    near the old bridge, by the river, on the hill, at the north gate, behind the church, in the high street,
    next to the mill, under the castle, at the edge of the wood, across the square, on the harbour wall,
    beside the school
"""
PLACES = tuple(place.strip() for place in PLACES.split(","))
PRICES = {"low": "cheap", "fair": "fairly priced", "high": "expensive"}
MOODS = {"calm": "quiet", "noisy": "lively", "aged": "old"}
DAYS = ("every morning", "all week", "on Sundays", "in the evening", "from May to October")

# A template may use {the} (the name with its article), {a_kind} (adjectives, kind and the right article),
# {where}, {thing} and {when}. Each begins with an ordinary word, so that a name always follows a
# space, in the completion as in the prompt: to a byte-level tokenizer those are the same pieces.
TEMPLATES = (
    "The {name} is {a_kind} {where}, known for {thing} and open {when}.",
    "You will find the {name}, {a_kind} with {thing}, {where}; it is open {when}.",
    "There is {a_kind} {where}: the {name}, which is known for {thing} and is open {when}.",
    "Open {when}, the {name} {where} is {a_kind} known for {thing}.",
)
TEMPLATES_WITHOUT_DAYS = (
    "The {name} is {a_kind} {where}, known for {thing}.",
    "You will find the {name}, {a_kind} with {thing}, {where}.",
    "There is {a_kind} {where}: the {name}, which is known for {thing}.",
)


def make_task(seed: int, num_train: int, num_held_out: int) -> tuple[list[dict], list[dict]]:
    """Return (training rows, held-out rows), each a list of {"prompt", "completion"}."""
    rng = random.Random(f"task-{seed}")
    facts = all_facts()
    rng.shuffle(facts)
    train_names, held_out_names = split_names(rng)
    held_out = zip(held_out_names[:num_held_out], facts[:num_held_out], strict=True)
    train_facts = facts[num_held_out : num_held_out + num_train]
    train = zip(train_names[:num_train], train_facts, strict=True)
    return [make_row(rng, *item) for item in train], [make_row(rng, *item) for item in held_out]


def all_facts() -> list[dict]:
    """Every combination of facts that makes sense, without names; `open` may be missing."""
    combinations = itertools.product(THINGS, PLACES, PRICES, MOODS, (*DAYS, None))
    return [
        {"kind": kind, "place": place, "price": price, "mood": mood, "open": day, "known for": thing}
        for kind, place, price, mood, day in combinations
        for thing in THINGS[kind]
    ]


def split_names(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return shuffled (training names, held-out names) that have no word in common."""
    adjectives, nouns = rng.sample(ADJECTIVES, len(ADJECTIVES)), rng.sample(NOUNS, len(NOUNS))
    held_out = [f"{a} {n}" for a in adjectives[:16] for n in nouns[:16]]
    train = [f"{a} {n}" for a in adjectives[16:] for n in nouns[16:]]
    rng.shuffle(held_out)
    rng.shuffle(train)
    return train, held_out


def make_row(rng: random.Random, name: str, facts: dict) -> dict:
    """One row: the facts in random order behind the name, and a sentence that says all of them."""
    given = [(key, value) for key, value in facts.items() if value is not None]
    rng.shuffle(given)
    prompt = " | ".join(f"{key}: {value}" for key, value in [("name", name), *given])
    template = rng.choice(TEMPLATES if facts["open"] else TEMPLATES_WITHOUT_DAYS)
    return {"prompt": prompt + "\n", "completion": fill(template, name, facts)}


def fill(template: str, name: str, facts: dict) -> str:
    """The template with the facts in it; price and mood in other words than the prompt's."""
    kind = f"{MOODS[facts['mood']]} and {PRICES[facts['price']]} {facts['kind']}"
    article = "an" if kind[0] in "aeiou" else "a"
    return template.format(
        name=name,
        a_kind=f"{article} {kind}",
        where=facts["place"],
        thing=facts["known for"],
        when=facts["open"],
    )
