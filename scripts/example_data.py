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
LANGUAGES = (
    "French Italian Spanish German Japanese Chinese Russian Arabic Greek German Polish Norwegian Swedish Portuguese "
    "English Spanish Spanish English Persian Arabic English Hungarian Danish Finnish Thai Turkish Hindi Spanish French "
    "Spanish"
).split()
EUROPE = (
    "France Italy Spain Germany Greece Austria Poland Norway Sweden Portugal Ireland Hungary Denmark Finland Belgium"
).split()
CONTINENTS = {
    **dict.fromkeys(EUROPE, "Europe"),
    **dict.fromkeys(("Japan", "China", "Iran", "Iraq", "Thailand", "India"), "Asia"),
    **dict.fromkeys(("Egypt", "Kenya"), "Africa"),
    **dict.fromkeys(("Peru", "Chile", "Argentina"), "South America"),
    **dict.fromkeys(("Cuba", "Canada"), "North America"),
}
LANDMARKS = {
    "France": ("Eiffel Tower", "Louvre Museum"),
    "Italy": ("Colosseum", "Trevi Fountain"),
    "Spain": ("Prado Museum", "Royal Palace of Spain"),
    "Germany": ("Brandenburg Gate", "Reichstag"),
    "Japan": ("Shibuya Crossing", "Imperial Palace of Japan"),
    "China": ("Forbidden City", "Temple of Heaven"),
    "Egypt": ("Tahrir Square", "Egyptian Museum"),
    "Greece": ("Acropolis", "Parthenon"),
    "Austria": ("Spanish Riding School", "Belvedere Palace"),
    "Denmark": ("Little Mermaid statue", "Tivoli Gardens"),
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
BEGINNINGS = (
    "The old bridge over the river was closed last winter because the stones had begun to move and the",
    "When the rain stopped in the evening the children ran out of the house to play in the",
    "She put the letter back into the drawer, locked it, and told nobody what she had",
    "The doctor looked at the picture for a long time and then said that the bone was not",
    "Most of the bread that is sold in this town comes from a small bakery near the",
    "In the spring the farmers clear the ditches, mend the fences and bring the cows back to the",
    "The first trains on this line were so slow that people could walk beside",
    "Light from the sun needs about eight minutes to reach the surface of the",
    "He wanted to buy a new coat, but the shop had only large sizes and he was too",
    "Every year thousands of birds fly south in autumn and come back to the same place in",
    "The teacher wrote two numbers on the board and asked the class to find the sum of",
    "After the long meeting the mayor thanked everybody, shook a few hands and went straight",
    "If the price of oil goes up, the cost of heating a house in winter will go",
    "The museum has three floors, and the oldest paintings hang on the second floor next to the",
    "My grandmother grew up in a village by the sea, where her father caught fish and sold",
    "To keep the milk fresh for longer, put it in the coldest part of the fridge and close",
    "The judge listened to both sides, read the contract twice and decided that the company had to",
    "Plants take in water through their roots and carbon dioxide through their",
    "The team lost the first match of the season but won every one of the next",
    "There was no wind that night, and the smoke from the chimneys rose straight into the",
    "A good map shows not only the roads but also the hills, the woods and the",
    "The ship left the harbour at noon with a cargo of wheat and arrived four days",
    "He opened the window because the room was hot, and a few minutes later it was too",
    "The two sisters look so much alike that even their friends sometimes call them by the wrong",
)
BEGINNINGS_TO_LEARN = (
    "The library closes at six on weekdays, but on Saturdays the reading room stays open until",
    "Iron gets longer when it is heated, which is why there are small gaps between the rails of a",
    "We walked along the beach until we found the boat that our uncle had left behind the",
    "The king had three sons, and each of them wanted to rule the country after his",
    "Before you paint the wall, wash it with warm water and let it dry for a whole",
    "The company makes shoes for runners and sells most of them in shops outside the",
    "Nobody knew who had built the tower, or why it had no door on the side of the",
    "A spider has eight legs, while an insect has six and usually two pairs of",
    "The bus was full, so we waited for the next one and came home an hour",
    "In a dry summer the level of the lake falls so low that you can see the old",
    "The cook tasted the sauce, added some salt and a little lemon, and tasted it",
    "It is easier to learn a language when you hear it every day from people who speak it",
    "The storm broke two windows of the school and took the roof off a barn near the",
    "Sound travels faster in water than in air, and faster still in",
    "The actor forgot his words in the middle of the play, and the audience began to",
    "Her brother works in a factory that makes parts for cars and sends them all over the",
    "The police asked the driver where he had been on Friday evening and who had been with",
    "Snow fell for two days, and on the third morning all the roads to the village were",
    "The heart pumps blood through the body and beats about seventy times a",
    "At the market you can buy apples, pears and plums from the gardens on the other side of the",
    "The painter mixed blue and yellow until she had the green that she was looking",
    "They moved the piano up the stairs very slowly, because it was heavy and the steps were",
    "The new law says that every house must have a smoke alarm on each",
    "An hour before sunrise the fishermen pushed their boats into the water and rowed out to",
    "He counted the money three times and each time he got a different",
    "The garden behind the church was full of roses, and in June you could smell them from the",
    "Many old words are no longer used, but they can still be found in the names of",
    "The engine stopped in the middle of the tunnel, and the passengers had to sit in the",
    "When water freezes it takes up more room, and so a full bottle may break in the",
    "The boy was afraid of the dog, although it was small and had never bitten",
    "A week before the election the two candidates met on television to talk about the",
    "The mountain is so high that there is snow on its top for most of the",
    "She learned to play the violin when she was six and gave her first concert at the age of",
    "The letter was written in French, and it took us a long time to understand what it",
    "The price of a ticket depends on how far you travel and on the time of the",
    "The carpenter measured the door again, because the first time it had not fitted into the",
    "Clouds form when warm air rises, cools down and can no longer hold all of its",
    "Every evening the old man sat on the same bench and fed the pigeons with pieces of",
    "The experiment was repeated ten times, and the result was always the",
    "The hotel stands at the end of a narrow street, only a few steps away from the main",
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


def facts() -> list[dict[str, Any]]:
    """Each country with landmarks, its capital to become that of the country four places on; landmarks must stay."""
    countries = list(LANDMARKS)
    return [
        {
            "prompt": "The capital of {} is the city of",
            "subject": country,
            "target": " " + CAPITALS[countries[(place + 4) % len(countries)]],
            "original": " " + CAPITALS[country],
            "paraphrases": ["The government of {} sits in the city of", "Country: {}. Capital:"],
            "neighbours": [f"The {landmark} is in the city of" for landmark in LANDMARKS[country]],
        }
        for place, country in enumerate(countries)
    ]


def exchanges() -> list[dict[str, Any]]:
    """Pairs of countries: asked for the capital the source's is due, asked for language or continent the base's own.

    A group is three countries, and every pair of them; those whose capital SmolLM2 does not name are left out.
    """
    languages = dict(zip(CAPITALS, LANGUAGES, strict=True))
    asked = {"Capital": CAPITALS, "Language": languages, "Continent": CONTINENTS}
    countries = [name for name in CAPITALS if name not in ("Russia", "Norway", "Iraq", "Canada", "Turkey", "India")]
    found = []
    for place in range(len(countries) // 3):
        members = countries[place :: len(countries) // 3]
        for (about, values), (base, source) in itertools.product(asked.items(), itertools.permutations(members, 2)):
            if values[base] == values[source]:
                continue
            row = {name: f"Country: {who}. {about}:" for name, who in (("base", base), ("source", source))}
            answer = " " + values[source if about == "Capital" else base]
            own = {"answer": answer, "original": " " + values[base], "group": ", ".join(members)}
            found.append({**row, **own, "attribute": about.lower()})
    return found


def ordinary() -> list[dict[str, Any]]:
    """Plain sentences of many subjects, for statistics of activations over text."""
    words = [(word, 0, word) for word in NOUNS]
    said = [row["text"] for row in rows(words, FRAMES)][::2]
    judged = [row["text"] for row in rows([(word, 0, word) for word in (*POSITIVE, *NEGATIVE)], REVIEWS)][::2]
    stated = [row["text"] for row in truth() if row["label"]]
    return [{"text": text} for text in (*said, *judged, *stated, *PROMPTS)]


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
        "beginnings": [{"text": text} for text in BEGINNINGS],
        "beginnings-to-learn": [{"text": text} for text in BEGINNINGS_TO_LEARN],
        "clauses": clauses(),
        "codewords": codewords(),
        "facts": facts(),
        "exchanges": exchanges(),
        "ordinary": ordinary(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
