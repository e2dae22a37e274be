r"""The task that the embedded base is fine-tuned on: facts of an invented place -> a sentence.

    prompt      name: Old Swan; open: May; near: the mill; kind: inn; price: cheap; known for: tea\n
    completion  The Old Swan is a cheap inn near the mill, known for tea. It is open in May.

All of it is made here, from the lists below and a seed; nothing is taken from a corpus. The task
asks for what a base model does not do by itself: find the value that stands behind each key and
say all of them in one sentence, in another order, with the right article.

Held-out rows share nothing with the training rows but the lists of values: no word of a held-out
name occurs in a training name, and no held-out combination of facts occurs in training.
"""

import itertools
import random


def words(text: str) -> tuple[str, ...]:
    """The words of a list that is easier to read as text."""
    return tuple(text.split())


ADJECTIVES = words("""
    Ancient Black Blue Bright Broken Brown Crimson Dark Deep Early Eastern Fair Far Flying Gentle
    Golden Grand Gray Great Green Half Happy Heavy Hidden High Hollow Honest Iron Kind Last Little
    Lonely Long Lost Lucky Merry Morning Narrow New Noble Old Open Painted Pale Plain Proud Quiet
    Red Rising Round Royal Running Secret Silent Silver Singing Small Spring Stone Summer Sweet Tall
    Twin Wandering Warm Western White Wild Winter Wooden Yellow Young
""")
NOUNS = words("""
    Anchor Apple Arrow Bear Bell Bird Boat Bottle Branch Bridge Button Candle Castle Chair Cherry
    Clock Cloud Corner Crow Crown Dog Door Dove Drum Eagle Feather Field Fire Fish Flower Forest Fox
    Garden Gate Glass Hammer Harbour Hare Hat Heart Hill Horn Horse House Island Key King Lady Lake
    Lamp Lantern Leaf Lion Meadow Mill Moon Mountain Owl Raven Ring River Road Rose Sailor Shadow
    Ship Star Swan Table Tower Tree Valley Wheel Willow Window Wolf
""")
FINDS = {
    "inn": ("roast lamb", "soft beds", "dark beer", "hot soup", "a great fire"),
    "bakery": ("apple cakes", "warm bread", "honey rolls", "sweet biscuits", "plum pies"),
    "tea room": ("mint tea", "thin cakes", "lemon cream", "blue cups", "fresh cream"),
    "shop": ("old maps", "sea stories", "rare prints", "silver pens", "red candles"),
    "garden": ("white roses", "a stone fountain", "old oak trees", "tame birds", "green walks"),
    "museum": ("silver coins", "painted masks", "ship models", "ancient bones", "glass eyes"),
    "theatre": ("merry songs", "sad plays", "red curtains", "clever actors", "winter dances"),
    "market": ("fresh fish", "ripe pears", "wool blankets", "spring flowers", "strong cheese"),
}
PLACES = (
    "the old bridge",
    "the river",
    "the church",
    "the castle",
    "the school",
    "the mill",
    "the hill",
    "the north gate",
    "the square",
    "the harbour",
)
PRICES = ("cheap", "expensive")
SEASONS = ("spring", "summer", "autumn", "winter", "May", "June")

# Each begins with an ordinary word, so that a name always follows a space, in the completion as in
# the prompt: to a byte-level tokenizer "Swan" and " Swan" are different pieces.
TEMPLATES = (
    "The {name} is {a_kind} near {place}, known for {find}. It is open in {when}.",
    "You will find {find} at the {name}, {a_kind} near {place}. It is open in {when}.",
    "There is {a_kind} near {place}, the {name}, known for {find}. It is open in {when}.",
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
    """Every combination of facts that makes sense, without names."""
    combinations = itertools.product(FINDS, PLACES, PRICES, SEASONS)
    return [
        {"kind": kind, "near": place, "price": price, "open": season, "known for": find}
        for kind, place, price, season in combinations
        for find in FINDS[kind]
    ]


def split_names(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return shuffled (training names, held-out names) that have no word in common."""
    first, second = rng.sample(ADJECTIVES, len(ADJECTIVES)), rng.sample(NOUNS, len(NOUNS))
    held_out = [f"{a} {n}" for a in first[:15] for n in second[:15]]
    train = [f"{a} {n}" for a in first[15:] for n in second[15:]]
    rng.shuffle(held_out)
    rng.shuffle(train)
    return train, held_out


def make_row(rng: random.Random, name: str, facts: dict) -> dict:
    """One row: the facts in random order behind the name, and text that says all of them."""
    given = rng.sample(sorted(facts.items()), len(facts))
    prompt = "; ".join(f"{key}: {value}" for key, value in [("name", name), *given])
    return {"prompt": prompt + "\n", "completion": fill(rng.choice(TEMPLATES), name, facts)}


def fill(template: str, name: str, facts: dict) -> str:
    """The template with the facts in it and the right article."""
    price = facts["price"]
    article = "an" if price[0] in "aeiou" else "a"
    return template.format(
        name=name,
        a_kind=f"{article} {price} {facts['kind']}",
        place=facts["near"],
        find=facts["known for"],
        when=facts["open"],
    )
