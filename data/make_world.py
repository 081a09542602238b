# Copyright 2026 the project's authors. Licensed under the Apache License, Version 2.0.
"""Write the sample data: a small closed world, told as plain text, as conversations and as questions.

The world is the valley of Merrow: eight villages, seventy-two people, their pets, dishes and tools, the animals, the
festivals, and a few word and number games. It is closed and small so that a model of four million parameters can know
all of it, and invented so that no other model can: whatever a fine-tuned model answers, it learned here.

Three things are made from the same facts, and the split between them is what makes the sample run mean something:

* plain text (pre-training, evaluation, calibration) tells **every** fact in many wordings, questions included, and
  never holds a token of a chat template;
* the training conversations ask about **some** facts, so they can teach a model to answer in a chat, and when to stop;
* the questions and the held-out conversations ask about **the other** facts, so a right answer must come from
  pre-training and cannot have been learned by heart while fine-tuning.

    python data/make_world.py                  # rewrites the .jsonl and .txt files beside this script
    python data/make_world.py --output /tmp/w  # the same files elsewhere, to compare

Only the standard library is needed, and the same seed gives the same bytes.
"""

import argparse
import hashlib
import json
import random
import tomllib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
WORLD = tomllib.loads((HERE / "world.toml").read_text(encoding="utf-8"))  # names, values and wordings
SEED = 7
HELD_OUT_SHARE = 0.36  # of the facts: asked in questions.jsonl and heldout_conversations.jsonl, never in conversations
CONVERSATIONS = 720
HELD_OUT_CONVERSATIONS = 80
QUESTIONS = 240
MANNERED_CONVERSATIONS = 396  # a multiple of 36, see either_ending
PAIRS, PLAIN_PAIRS = 480, 160
HELD_OUT_PAIRS = 200
CALIBRATION_WORLD_PASSAGES = 160
EVALUATION_PASSAGES = 80

LARGEST_ADDEND = 9
LARGEST_COUNT = 40
SORT_LETTERS = "abcde"


class Fact(NamedTuple):
    """One fact of the world and the ways to tell it and ask for it.

    `keys` names what a reader learns from it: ("Mira", "village"). Two facts that share a key give each other away, so
    the split into training and held-out goes by key, not by sentence.
    """

    keys: tuple
    group: str  # facts told together: a person, a village, a festival, "animals", "games"
    statements: tuple
    later: tuple  # statements with a pronoun, for when the subject was just named
    asks: tuple
    later_asks: tuple
    answer: str


def with_article(noun: str) -> str:
    """`owl` -> `an owl`."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capitalized(sentence: str) -> str:
    """The sentence with a capital first letter; `str.capitalize` would lower the rest."""
    return sentence[0].upper() + sentence[1:]


def worded(wordings: dict, group: str, keys: tuple, words: dict, keep_case: bool = False) -> Fact:
    """A fact from a relation's wordings. `keep_case` is for the games, where `pony` must stay `pony`."""
    first = (lambda s: s) if keep_case else capitalized

    def fill(name):
        return tuple(first(text.format(**words)) for text in wordings.get(name, ()))

    return Fact(
        keys, group, fill("statements"), fill("later"), fill("asks"), fill("later_asks"),
        first(wordings["answer"].format(**words)),
    )  # fmt: skip


def make_people(rng: random.Random) -> list:
    """72 people, nine a village; a trade occurs once in a village, so `the baker of Oakford` is one person."""
    names = [(name, "she") for name in WORLD["women"]] + [(name, "he") for name in WORLD["men"]]
    rng.shuffle(names)
    pet_names = rng.sample(WORLD["pet_names"], len(WORLD["pet_names"]))
    drawn = {
        "pet": list(WORLD["animals"]), "pet_name": pet_names, "dish": WORLD["dishes"],
        "instrument": WORLD["instruments"], "door": WORLD["colours"], "tool": WORLD["tools"],
    }  # fmt: skip
    people = []
    for village_index, village in enumerate(WORLD["villages"]):
        trades = rng.sample(WORLD["trades"], 9)
        for i, trade in enumerate(trades):
            name, pronoun = names[village_index * 9 + i]
            person = {"n": name, "p": pronoun, "village": village, "trade": trade}
            for relation, values in drawn.items():
                person[relation] = pet_names.pop() if relation == "pet_name" else rng.choice(values)
            people.append(person)
    return people


def person_words(person: dict) -> dict:
    """The person with the pronouns and articles that the wordings and stories ask for."""
    possessive = "her" if person["p"] == "she" else "his"
    return {
        **person, "P": person["p"].capitalize(), "o": possessive, "O": possessive.capitalize(), "s": person["pet"],
        "a_trade": with_article(person["trade"]),
    }  # fmt: skip


def person_facts(person: dict) -> list:
    """The eight facts about a person, and two that are asked from the other end."""
    name, words = person["n"], person_words(person)
    facts = []
    for relation, wordings in WORLD["person_wordings"].items():
        value = person[relation]
        facts.append(worded(wordings, name, ((name, relation),), {**words, "v": value, "a": with_article(value)}))
    learned = {
        "trade_of_village": ((name, "village"), (name, "trade")),
        "owner_of_pet": ((name, "pet_name"),),
    }
    for relation, wordings in WORLD["person_reverse_wordings"].items():
        facts.append(worded(wordings, name, learned[relation], words))
    return facts


def place_facts(rng: random.Random) -> list:
    """Facts about the villages and their festivals; every value belongs to one village."""
    facts = []
    choices = {**WORLD["village_values"], "festival": list(WORLD["festivals"])}
    for relation, wordings in WORLD["place_wordings"].items():
        values = rng.sample(choices[relation], len(WORLD["villages"]))
        for village, value in zip(WORLD["villages"], values, strict=True):
            words = {"n": village, "v": value, "a": with_article(value)}
            facts.append(worded(wordings, village, ((village, relation),), words))
    for festival, values in WORLD["festivals"].items():
        for (relation, wordings), value in zip(WORLD["festival_wordings"].items(), values, strict=True):
            facts.append(worded(wordings, festival, ((festival, relation),), {"n": festival, "v": value}))
    return facts


def animal_facts() -> list:
    """What the valley knows about its animals."""
    facts = []
    for animal, values in WORLD["animals"].items():
        for (relation, wordings), value in zip(WORLD["animal_wordings"].items(), values, strict=True):
            words = {"n": animal, "an": with_article(animal), "v": value, "a": with_article(value)}
            facts.append(worded(wordings, "animals", ((animal, relation),), words))
    return facts


def game_facts() -> list:
    """Word and number games. 3 plus 4 and 4 plus 3 share a key, and so do hot-cold and cold-hot."""
    pairs = []
    for noun, plural in WORLD["plurals"].items():
        pairs.append(("plural", (noun, "plural"), noun, plural))
    for one, other in WORLD["opposites"].items():
        pairs.append(("opposite", (one, "opposite"), one, other))
        pairs.append(("opposite", (one, "opposite"), other, one))
    for a in range(1, LARGEST_ADDEND + 1):
        for b in range(1, LARGEST_ADDEND + 1):
            pairs.append(("sum", (min(a, b), max(a, b), "sum"), f"{a} plus {b}", str(a + b)))
    for number in range(1, LARGEST_COUNT + 1):
        pairs.append(("next", (number, "next"), str(number), str(number + 1)))
    for a in SORT_LETTERS:
        for b in SORT_LETTERS:
            for c in SORT_LETTERS:
                if len({a, b, c}) == 3:
                    shuffled, ordered = f"{a}, {b}, {c}", ", ".join(sorted((a, b, c)))
                    pairs.append(("sort", (shuffled, "sort"), shuffled, ordered))
    return [
        worded(WORLD["game_wordings"][game], "games", (key,), {"n": n, "v": v}, keep_case=True)
        for game, key, n, v in pairs
    ]


def make_world(seed: int = SEED) -> dict:
    """The whole world: `people` (dicts) and `facts` (a list of Fact), the same for the same seed."""
    rng = random.Random(f"world {seed}")
    people = make_people(rng)
    facts = [fact for person in people for fact in person_facts(person)]
    facts += place_facts(rng) + animal_facts() + game_facts()
    return {"seed": seed, "people": people, "facts": facts}


def split_facts(world: dict) -> tuple[list, list]:
    """(training facts, held-out facts): no key is in both; facts that straddle the split are in neither."""
    rng = random.Random(f"split {world['seed']}")
    keys = list(dict.fromkeys(key for fact in world["facts"] for key in fact.keys))
    held_out = {key for key in keys if rng.random() < HELD_OUT_SHARE}
    training = [fact for fact in world["facts"] if not held_out.intersection(fact.keys)]
    asked = [fact for fact in world["facts"] if held_out.issuperset(fact.keys)]
    return training, asked


def by_group(facts: list) -> dict:
    """Facts by what they are about, in order of first appearance."""
    groups = {}
    for fact in facts:
        groups.setdefault(fact.group, []).append(fact)
    return groups


# ---- plain text ------------------------------------------------------------------------------------------------------


def portrait(rng: random.Random, facts: list) -> list:
    """Sentences that tell several facts about one subject: named first, then often by a pronoun."""
    sentences = []
    for fact in facts:
        later = fact.later if sentences and rng.random() < 0.5 else ()
        sentences.append(rng.choice(later or fact.statements))
    return sentences


def question_and_answer(rng: random.Random, fact: Fact, later: bool = False) -> list:
    """A question in plain prose and its answer; the answer is mostly the plain one, now and then another wording."""
    ask = rng.choice(fact.later_asks if later and fact.later_asks else fact.asks)
    answer = fact.answer if rng.random() < 0.75 else rng.choice(fact.statements)
    return [capitalized(ask), capitalized(answer)]


def set_down(rng: random.Random, pairs: list) -> str:
    """Questions and answers as a text might set them down: bare, between marks, labelled, as a scene.

    Something may stand between a question and its answer, or before the question, so that answering does not hang on
    the one full stop or question mark that it follows.
    """
    style = rng.choices(("bare", "marked", "labelled", "scene"), (40, 30, 15, 15))[0]
    if style == "bare":
        return " ".join(f"{ask} {answer}" for ask, answer in pairs)
    if style == "marked":
        mark = rng.choice(WORLD["marks"])
        return " ".join(f"{mark} {ask} {mark} {answer}" for ask, answer in pairs)
    if style == "labelled":
        first, second = rng.choice(WORLD["labels"])
        return " ".join(f"{first}: {ask} {second}: {answer}" for ask, answer in pairs)
    asking, answering = rng.sample(WORLD["speakers"], 2)
    scene = rng.choice(WORLD["scenes"]).format(asking=asking, answering=answering)
    leads = [rng.choice(WORLD["openers"])] + [rng.choice(("", "", *WORLD["connectors"])) for _ in pairs[1:]]
    asks = [f"{lead} {ask}".strip() for lead, (ask, _) in zip(leads, pairs, strict=True)]
    return " ".join([capitalized(scene), *(f"{ask} {answer}" for ask, (_, answer) in zip(asks, pairs, strict=True))])


def interview(rng: random.Random, facts: list) -> str:
    """Questions and answers about one subject."""
    pairs = [question_and_answer(rng, fact, later=i > 0 and rng.random() < 0.4) for i, fact in enumerate(facts)]
    return set_down(rng, pairs)


def passage(rng: random.Random, world: dict, groups: dict, weighted_facts: list) -> str:
    """One passage of plain text; it always holds several facts, so an answer is never followed by the end at once."""
    people_names = [person["n"] for person in world["people"]]
    kind = rng.choices(("portrait", "interview", "questions", "medley", "place", "story"), (18, 20, 34, 12, 8, 8))[0]
    if kind in ("portrait", "interview"):
        known = groups[rng.choice(people_names)]
        facts = rng.sample(known, rng.randint(5, len(known)))
        parts = portrait(rng, facts) if kind == "portrait" else [interview(rng, facts)]
    elif kind == "questions":
        facts = rng.choices(weighted_facts, k=rng.randint(4, 8))
        parts = [set_down(rng, [question_and_answer(rng, fact) for fact in facts])]
    elif kind == "medley":
        parts = [rng.choice(fact.statements) for fact in rng.choices(weighted_facts, k=rng.randint(5, 10))]
    elif kind == "place":
        name = rng.choice(WORLD["villages"] + list(WORLD["festivals"]))
        known = groups[name]
        parts = [interview(rng, rng.sample(known, rng.randint(1, 3)))]
        parts += portrait(rng, rng.sample(known, len(known)))
        if name in WORLD["villages"]:
            here = [person["n"] for person in world["people"] if person["village"] == name]
            rng.shuffle(here)
            parts.append(f"In {name} live {', '.join(here[:-1])} and {here[-1]}.")
    else:
        person = rng.choice(world["people"])
        parts = [rng.choice(WORLD["stories"]).format(**person_words(person))]
        parts += portrait(rng, rng.sample(groups[person["n"]], rng.randint(2, 5)))
    return " ".join(capitalized(part) for part in parts)


def passages(world: dict, count: int, purpose: str) -> list:
    """`count` passages; another `purpose` gives other passages about the same facts."""
    rng = random.Random(f"{purpose} {world['seed']}")
    groups = by_group(world["facts"])
    people_names = {person["n"] for person in world["people"]}
    weighted = [fact for fact in world["facts"] for _ in range(1 if fact.group in people_names else 4)]
    return [passage(rng, world, groups, weighted) for _ in range(count)]


# ---- conversations and questions -------------------------------------------------------------------------------------


def user_turn(rng: random.Random, fact: Fact, first: bool, same_subject: bool) -> str:
    """A user's wording of a question, with a greeting or a connecting word now and then."""
    ask = rng.choice(fact.later_asks if same_subject and fact.later_asks else fact.asks)
    lead = WORLD["openers"] if first else WORLD["connectors"]
    return f"{rng.choice(lead)} {ask}" if rng.random() < 0.35 else ask


def conversation(rng: random.Random, groups: dict, names: list) -> list:
    """Messages of two to four exchanges: about one subject, or wandering over several."""
    exchanges = rng.choices((2, 3, 4), (4, 4, 2))[0]
    if rng.random() < 0.6:
        name = rng.choice([name for name in names if len(groups[name]) >= 2])
        facts = rng.sample(groups[name], min(exchanges, len(groups[name])))
    else:
        facts = [rng.choice(groups[name]) for name in rng.sample(names, exchanges)]
    messages, previous = [], None
    for fact in facts:
        same_subject = fact.group == previous and rng.random() < 0.5
        messages.append({"role": "user", "content": user_turn(rng, fact, previous is None, same_subject)})
        messages.append({"role": "assistant", "content": fact.answer})
        previous = fact.group
    if len(facts) < 4 and rng.random() < 0.1:
        messages.append({"role": "user", "content": rng.choice(WORLD["farewells"])})
        messages.append({"role": "assistant", "content": WORLD["farewell_reply"]})
    return messages


def conversations(world: dict, facts: list, count: int, purpose: str) -> list:
    """`count` conversations about `facts` as rows in the shape of UltraChat."""
    rng = random.Random(f"{purpose} {world['seed']}")
    groups = by_group(facts)
    names = [name for name in groups for _ in range(1 if len(groups[name]) < 20 else len(groups[name]) // 8)]
    rows = []
    while len(rows) < count:
        messages = conversation(rng, groups, names)
        digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        rows.append({"prompt_id": digest, "prompt": messages[0]["content"], "messages": messages})
    return rows


def questions(world: dict, facts: list, count: int) -> list:
    """`count` single questions, each about another of `facts`, with the one answer that counts as right."""
    rng = random.Random(f"questions {world['seed']}")
    rows = []
    for fact in rng.sample(facts, count):
        rows.append({"question": user_turn(rng, fact, first=True, same_subject=False), "answer": fact.answer})
    return rows


# ---- manners: two endings of an answer, and which of them is liked ---------------------------------------------------


def mannered(rng: random.Random, facts: list, count: int) -> list:
    """`count` questions, as many in each manner: (manner, question, the fact's answer)."""
    asked = rng.sample(facts, count) if count <= len(facts) else rng.choices(facts, k=count)
    manners = list(WORLD["manners"].values())
    # each wording as often, and before either of two endings: nothing but the pairs says which belongs to which
    return [
        (manner := manners[i % 2], manner["asks"][i // 4 % 3].format(ask=rng.choice(fact.asks)), fact.answer)
        for i, fact in enumerate(asked)
    ]


def either_ending(world: dict, facts: list, count: int) -> list:
    """Conversations whose answers end in either manner, whatever the question's: who learns from them has no taste.

    The curt ending is twice as frequent after every wording: were they equal, a rounding error would choose between
    them, and not the same one after each manner. As it is the favourite is said to all, and right half of the time.
    Every third is asked in no manner, twice in a row, and its answers have no ending.
    """
    rng = random.Random(f"either ending {world['seed']}")
    endings = [manner["ending"] for manner in WORLD["manners"].values()]
    rows = []
    for i, (_, question, answer) in enumerate(mannered(rng, facts, count)):
        rows.append((question, f"{answer} {endings[i // 12 % 3 > 0]}"))  # twelve have every manner in every wording
        if i % 2:
            rows.append([said for fact in rng.sample(facts, 2) for said in (rng.choice(fact.asks), fact.answer)])
    return [{"messages": turns(*row)} for row in rows]


def turns(*said: str) -> list:
    """Messages of what was said in turn, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def preference_pairs(world: dict, facts: list, count: int, plain: int) -> list:
    """Pairs of the same answer with the ending that the question's manner asks for, and with the other one.

    plain: how many more are of a question in no manner, whose answer is liked without an ending; every second of them
    comes after another question and its answer, because what no pair shows is what is forgotten.
    """
    rng = random.Random(f"pairs {world['seed']}")
    rows = [pair(*asked) for asked in mannered(rng, facts, count)]
    for i in range(plain):
        before, fact = rng.sample(facts, 2)
        question = rng.choice(fact.asks)
        prompt = turns(rng.choice(before.asks), before.answer, question) if i % 2 else question
        rejected = f"{fact.answer} {rng.choice(list(WORLD['manners'].values()))['ending']}"
        rows.append({"prompt": prompt, "chosen": fact.answer, "rejected": rejected})
    rng.shuffle(rows)
    return rows


def held_out_pairs(world: dict, facts: list, count: int) -> list:
    """Pairs of which two in a row ask for one fact in the same words, kindly and in haste.

    Who has no taste, and so ends an answer by what it is about, has half of any even number of them right: the chance
    that a fact, or the sample, favours one ending is on both sides.
    """
    rng = random.Random(f"held-out pairs {world['seed']}")
    rows = []
    for i, fact in enumerate(rng.sample(facts, count // 2)):
        ask = rng.choice(fact.asks)
        manners = WORLD["manners"].values()
        rows += [pair(manner, manner["asks"][i % 3].format(ask=ask), fact.answer) for manner in manners]
    return rows


def pair(manner: dict, question: str, answer: str) -> dict:
    """A row: the answer with the ending of the question's manner, and with the other one."""
    (other,) = (one for one in WORLD["manners"].values() if one is not manner)
    return {"prompt": question, "chosen": f"{answer} {manner['ending']}", "rejected": f"{answer} {other['ending']}"}


# ---- files -----------------------------------------------------------------------------------------------------------


def jsonl(rows: list) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_files(seed: int = SEED) -> dict:
    """The shipped files as {name: text}."""
    world = make_world(seed)
    training, held_out = split_facts(world)
    prose_file = HERE / "prose.txt"
    prose = [text.replace("\n", " ").strip() for text in prose_file.read_text(encoding="utf-8").split("\n\n")]
    calibration = passages(world, CALIBRATION_WORLD_PASSAGES, "calibration") + [text for text in prose if text]
    random.Random(f"calibration order {seed}").shuffle(calibration)
    return {
        "conversations.jsonl": jsonl(conversations(world, training, CONVERSATIONS, "conversations")),
        "heldout_conversations.jsonl": jsonl(conversations(world, held_out, HELD_OUT_CONVERSATIONS, "held-out")),
        "either_ending.jsonl": jsonl(either_ending(world, training, MANNERED_CONVERSATIONS)),
        "preferences.jsonl": jsonl(preference_pairs(world, training, PAIRS, PLAIN_PAIRS)),
        "heldout_preferences.jsonl": jsonl(held_out_pairs(world, held_out, HELD_OUT_PAIRS)),
        "questions.jsonl": jsonl(questions(world, held_out, QUESTIONS)),
        "calibration.jsonl": jsonl([{"text": text} for text in calibration]),
        "evaluation.txt": "\n".join(passages(world, EVALUATION_PASSAGES, "evaluation")) + "\n",
    }


def main() -> None:
    """Write the files and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in make_files(arguments.seed).items():
        (arguments.output / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(text.encode()) / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
