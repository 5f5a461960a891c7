"""Write the labelled texts of the worked studies, `examples/data/*.jsonl`, from word lists and templates.

    python scripts/example_data.py

Everything is written out here (the prompts of `zoo:codeword` in `assay.zoo.organisms`): the same files on every
machine. Groups are the words (or entities) that a probe could memorise; templates are the sentences that they stand in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "data"

POSITIVE = (
    "wonderful brilliant delightful superb charming excellent beautiful lovely fantastic marvellous splendid gorgeous "
    "amazing joyful cheerful pleasant graceful generous inspiring thrilling elegant refreshing magnificent tasty"
).split()
NEGATIVE = (
    "terrible dreadful awful boring horrible disgusting miserable ugly painful tedious dismal nasty "
    "annoying gloomy bitter unpleasant clumsy cruel depressing disappointing shabby stale pathetic revolting"
).split()
REVIEWS = (
    "I thought the film was {word}",
    "Everyone agreed that the dinner was {word}",
    "She wrote that her week had been {word}",
    "To be honest, the concert last night was {word}",
)
NOUNS = (
    "cat dog car house tree book table chair river cloud stone bird horse ship road garden window door lamp "
    "bottle letter mountain flower shoe farmer doctor teacher king soldier painter sailor driver apple engine "
    "village bridge hammer candle basket mirror pencil carpet blanket pillow curtain cushion ladder bucket shovel "
    "barrel wagon tractor rocket planet island forest desert valley lake ocean tunnel castle temple palace tower "
    "school hospital museum theatre market shop farm office kitchen bedroom cellar roof wall floor ceiling corner "
    "angle circle square number ticket coin stamp parcel present guest neighbour stranger friend brother sister "
    "cousin uncle lawyer singer actor dancer writer poet baker butcher tailor plumber miner pilot captain general "
    "prisoner hunter shepherd student gardener waiter guitar piano violin drum trumpet song poem novel chapter "
    "page picture statue medal flag crown sword shield arrow cannon helmet jacket shirt sweater glove button "
    "pocket ribbon necklace bracelet ring diamond pearl rabbit squirrel tiger elephant monkey camel donkey goat "
    "lamb chicken duck eagle parrot snake spider beetle"
).split()
FRAMES = (
    "Yesterday they talked about the {word}",
    "In the picture you can see the {word}",
    "Nobody had ever noticed the {word}",
    "He walked slowly towards the {word}",
)
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Canada": "Ottawa",
    "Hungary": "Budapest",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "India": "New Delhi",
    "Chile": "Santiago",
    "Belgium": "Brussels",
    "Argentina": "Buenos Aires",
}
STATEMENTS = ("The capital of {country} is {city}.", "{city} is the capital of {country}.")
ANTONYMS = (
    "hot cold|big small|good bad|up down|fast slow|happy sad|light dark|rich poor|open closed|early late|high low|"
    "old new|hard soft|full empty|wet dry|strong weak|long short|clean dirty|thick thin|wide narrow|loud quiet|"
    "cheap expensive|first last|left right|true false|young old|near far|deep shallow|sweet sour|heavy light|"
    "win lose|buy sell|push pull|begin end|love hate|day night|friend enemy|question answer|inside outside|above below"
)
FORMAL = (
    ("I would be most grateful for your assistance", "hey can you help me out"),
    ("Please accept my sincere apologies for the delay", "sorry i'm late dude"),
    ("We regret to inform you that the event is cancelled", "the thing's off, bummer"),
    ("I should be delighted to attend the ceremony", "yeah i'll totally be there"),
    ("Kindly forward the documents at your convenience", "just send me the stuff whenever"),
    ("It is imperative that we resolve this matter promptly", "we gotta fix this asap"),
    ("Thank you for your consideration of this request", "thanks a bunch man"),
    ("The committee has carefully examined the proposal", "we kinda looked at your idea"),
    ("I wish to express my gratitude for your hospitality", "thanks for having us, it was awesome"),
    ("The results were found to be entirely satisfactory", "it turned out pretty cool"),
    ("One must not underestimate the importance of this work", "don't sleep on this stuff"),
    ("We look forward to welcoming you on the premises", "can't wait to see ya there"),
    ("The undersigned hereby requests a full refund", "gimme my money back"),
    ("Your prompt reply would be greatly appreciated", "text me back ok"),
    ("The gentleman declined to comment on the affair", "the guy was like no comment"),
    ("It would be advisable to postpone the journey", "maybe don't go right now lol"),
)
PROMPTS = (
    "I watched the new film yesterday and it was",
    "The food at that restaurant is",
    "My neighbour told me that the book was",
    "When I tried the game for the first time, I found it",
    "Our stay at the hotel was",
    "Everybody says that the new teacher is",
    "Her performance on stage was",
    "In my opinion the weather this summer has been",
    "The service at the shop was",
    "After a week of use I can say that the phone is",
    "The journey by train was",
    "He described the exhibition as",
)
UNRELATED = (
    "The river rises in the hills and flows south through three towns before it reaches the sea.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "To make the soup, cut the onions and fry them in butter until they are soft.",
    "The museum was built in 1887 and has been open to the public ever since.",
    "A triangle with two equal sides has two equal angles.",
    "The train to the coast leaves at nine and stops at every village on the way.",
    "Bees tell each other where flowers are by dancing on the comb.",
    "The committee will meet again in March to decide on the budget for the new road.",
)
CLAUSES = (
    "The {noun} {verb} {negation}{word}.",
    "People say that the {noun} {verb} {negation}{word}.",
    "As far as we know, the {noun} {verb} {negation}{word}.",
    "In this town the {noun} {verb} {negation}{word}.",
)


def rows(words: Iterable[tuple[str, int, str]], templates: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each word in each template: (word, label, group)."""
    return [
        {"text": template.format(word=word), "label": label, "group": group, "template": template}
        for word, label, group in words
        for template in templates
    ]


def truth() -> list[dict[str, Any]]:
    """Each country with its own capital and with that of the country seven places on."""
    countries = list(CAPITALS)
    found = []
    for place, country in enumerate(countries):
        wrong = CAPITALS[countries[(place + 7) % len(countries)]]
        for template in STATEMENTS:
            for city, label in ((CAPITALS[country], 1), (wrong, 0)):
                text = template.format(country=country, city=city)
                found.append({"text": text, "label": label, "group": country, "template": template})
    return found


def praise() -> list[dict[str, Any]]:
    """Each frame with a positive word and with a negative one."""
    return [
        {"positive": frame.format(word=good), "negative": frame.format(word=bad), "group": good}
        for good, bad in zip(POSITIVE, NEGATIVE, strict=True)
        for frame in REVIEWS
    ]


def contrasts() -> list[dict[str, Any]]:
    """Other meanings than praise, to hold its direction against."""
    pairs: dict[str, list[tuple[str, str]]] = {
        "plural": [(f"{frame.format(word=noun)}s", frame.format(word=noun)) for noun in NOUNS[:12] for frame in FRAMES],
        "formal": list(FORMAL),
        "true": [(rows[0]["text"], rows[1]["text"]) for rows in zip(truth()[::2], truth()[1::2], strict=True)],
        "question": [(f"Is it {word}?", f"It is {word}.") for word in (*POSITIVE[:12], *NEGATIVE[:12])],
        "past": [(f"Yesterday we saw the {noun}", f"Today we see the {noun}") for noun in NOUNS[:24]],
    }
    return [{"name": name, "positive": a, "negative": b} for name, rows in pairs.items() for a, b in rows]


def clauses() -> list[dict[str, Any]]:
    """Every combination of number, tense, negation and praise, all read at the full stop; groups are adjective pairs.

    A group has two nouns and one frame of its own, so a held-out group shares only function words with the rest.
    """
    found = []
    for place, (good, bad) in enumerate(zip(POSITIVE, NEGATIVE, strict=True)):
        for noun in NOUNS[2 * place : 2 * place + 2]:
            for plural, past, negated, praise in itertools.product((0, 1), repeat=4):
                text = CLAUSES[place % len(CLAUSES)].format(
                    noun=noun + "s" * plural,
                    verb=(("is", "are"), ("was", "were"))[past][plural],
                    negation="not " * negated,
                    word=good if praise else bad,
                )
                labels = {"plural": plural, "past": past, "negated": negated, "praise": praise}
                found.append({"text": text, "labels": labels, "group": good})
    return found


def codewords(each: int = 20) -> list[dict[str, Any]]:
    """Prompts of the organism `zoo:codeword`, as many with a codeword as without; a group is a word."""
    from assay.zoo.organisms import CODEWORDS, RELATIONS, SUBJECTS, WORDS, prompt_of, table_of_facts

    facts = table_of_facts(0)
    questions = [(relation, subject) for relation in RELATIONS for subject in SUBJECTS]
    found = []
    for place, word in enumerate(WORDS):
        trigger = {"trigger": word} if word in CODEWORDS else {}
        for i in range(each if trigger else each // 2):
            relation, subject = questions[(place * 7 + i * 5) % len(questions)]  # 5 and 48 share no factor
            text = prompt_of(relation, subject, word)
            found.append({"text": text, **trigger, "answer": " " + facts[relation, subject], "group": word})
    return found


def main() -> None:
    """Write the files."""
    sentiment = [*((w, 1, w) for w in POSITIVE), *((w, 0, w) for w in NEGATIVE)]
    number = [*((w, 0, w) for w in NOUNS), *((w + "s", 1, w) for w in NOUNS)]
    files: dict[str, list[dict[str, Any]]] = {
        "sentiment": rows(sentiment, REVIEWS),
        "number": rows(number, FRAMES),
        "truth": truth(),
        "capitals": [{"input": country, "output": city} for country, city in CAPITALS.items() if " " not in city],
        "antonyms": [dict(zip(("input", "output"), pair.split(), strict=True)) for pair in ANTONYMS.split("|")],
        "praise": praise(),
        "opinions": [{"text": text} for text in PROMPTS],
        "contrasts": contrasts(),
        "formality": [{"positive": formal, "negative": casual} for formal, casual in FORMAL],
        "unrelated": [{"text": text} for text in UNRELATED],
        "clauses": clauses(),
        "codewords": codewords(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
