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
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SEED = 7
HELD_OUT_SHARE = 0.36  # of the facts: asked in questions.jsonl and heldout_conversations.jsonl, never in conversations
CONVERSATIONS = 720
HELD_OUT_CONVERSATIONS = 80
QUESTIONS = 240
CALIBRATION_WORLD_PASSAGES = 160
EVALUATION_PASSAGES = 80

VILLAGES = ("Oakford", "Brindle", "Fernhollow", "Larkmere", "Pebblewick", "Thistledown", "Willowby", "Hazelmoor")
WOMEN = (
    "Mira Elsa Wren Poppy Hazel Ivy Nora Tilda Greta Bryony Clover Daisy Edith Fern Ginny Hilda Isla June Kitty Lotte "
    "Mabel Nell Olive Petra Quilla Rosa Sylvie Thea Una Vera Willa Yara Zelda Agnes Bettany Cora"
).split()
MEN = (
    "Alder Bram Cedric Dunstan Edgar Finn Gilbert Hugo Ivor Jasper Kasper Linus Magnus Ned Oskar Percy Quentin Rufus "
    "Silas Tobias Ulric Victor Wilfred Yorick Ambrose Barnaby Caspian Dorian Emil Felix Gustav Humphrey Ignatius Jonas "
    "Konrad Leopold"
).split()
PET_NAMES = (
    "Acorn Biscuit Bramble Button Candle Cinder Cobble Conker Crumb Dapple Dumpling Echo Ember Fig Fidget Flicker "
    "Freckle Ginger Gravy Hopper Inkspot Jingle Juniper Kettle Lentil Marble Mittens Moss Muffin Mustard Nettle Noodle "
    "Nutmeg Oats Olly Parsnip Patch Peanut Pebble Pepper Pickle Pip Plum Pocket Puddle Pumpkin Quince Radish Ripple "
    "Rusty Saffron Scamp Shadow Smudge Socks Sorrel Speckle Spindle Sprout Tansy Teasel Thimble Tinker Toffee Treacle "
    "Truffle Tumble Turnip Twig Velvet Waffle Whisker"
).split()
TRADES = (
    "baker miller smith weaver potter fisher shepherd carpenter tailor cobbler gardener beekeeper teacher doctor "
    "painter clockmaker boatbuilder forester glassblower candlemaker bookbinder cheesemaker saddler thatcher"
).split()
DISHES = (
    "leek soup", "apple pie", "barley bread", "mushroom stew", "plum cake", "baked trout", "pea soup", "cheese toast",
    "berry jam", "potato pie", "honey buns", "carrot stew", "egg noodles", "roast chestnuts", "pear tart", "bean salad",
    "oat porridge", "onion pie", "ginger bread", "cabbage rolls",
)  # fmt: skip
INSTRUMENTS = "fiddle flute drum harp lute horn accordion whistle bells guitar trumpet zither".split()
COLOURS = "red blue green yellow white black orange purple grey brown".split()
TOOLS = (
    "hammer spade needle lantern ladder kettle rake compass broom basket saw chisel bucket scissors rope telescope"
).split()
ANIMALS = {  # animal: (its young, what it eats, where it sleeps)
    "cat": ("kitten", "fish", "by the stove"),
    "dog": ("puppy", "bones", "in the kennel"),
    "goat": ("kid", "thistles", "in the shed"),
    "owl": ("owlet", "mice", "in the barn"),
    "hen": ("chick", "corn", "on the perch"),
    "duck": ("duckling", "pondweed", "beside the pond"),
    "goose": ("gosling", "grass", "in the orchard"),
    "rabbit": ("kit", "carrots", "in the burrow"),
    "pony": ("foal", "oats", "in the stable"),
    "hedgehog": ("hoglet", "beetles", "under the hedge"),
    "tortoise": ("hatchling", "lettuce", "under the bench"),
    "sheep": ("lamb", "clover", "in the fold"),
    "pig": ("piglet", "turnips", "in the sty"),
    "fox": ("cub", "berries", "in the den"),
    "swan": ("cygnet", "reeds", "on the island"),
    "squirrel": ("pup", "nuts", "in the hollow tree"),
}
FESTIVALS = {  # festival: (month, treat, custom)
    "Lantern Night": ("December", "spiced buns", "light lanterns"),
    "Apple Fair": ("October", "toffee apples", "roll barrels"),
    "Harvest Supper": ("September", "seed cakes", "share loaves"),
    "Kite Day": ("March", "cherry tarts", "fly kites"),
    "Snow Dance": ("January", "pancakes", "dance in masks"),
    "Boat Race": ("July", "waffles", "race boats"),
    "Seed Sunday": ("April", "nut rolls", "plant trees"),
    "Bell Week": ("May", "honey cakes", "ring bells"),
}
VILLAGE_VALUES = {  # relation: one value for each of VILLAGES, dealt out by the seed
    "river": ("Silverbrook", "Otterbeck", "Winding Water", "Millrace", "Reedstream", "Coldspring", "Blackburn", "Dart"),
    "hill": ("Lark Hill", "Cobb Hill", "Badger Hill", "Beacon Hill", "Crow Hill", "Sunny Hill", "Fox Hill", "Bell Hill"),
    "tree": ("oak", "birch", "elm", "willow", "maple", "beech", "rowan", "chestnut"),
    "inn": ("Golden Goose", "Three Bells", "Sleepy Fox", "Silver Spoon", "Old Wheel", "Merry Miller", "Blue Boat",
            "Warm Hearth"),
    "product": ("honey", "cheese", "pottery", "apples", "wool", "candles", "baskets", "bread"),
    "festival": tuple(FESTIVALS),
}  # fmt: skip
PLURALS = {
    "goose": "geese", "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "sheep": "sheep",
    "leaf": "leaves", "wolf": "wolves", "knife": "knives", "loaf": "loaves", "shelf": "shelves", "fox": "foxes",
    "box": "boxes", "brush": "brushes", "bench": "benches", "church": "churches", "berry": "berries", "cherry": "cherries",
    "pony": "ponies", "baby": "babies", "story": "stories", "lady": "ladies", "boat": "boats", "river": "rivers",
    "apple": "apples", "candle": "candles", "house": "houses", "garden": "gardens", "bell": "bells", "hill": "hills",
    "man": "men", "woman": "women", "potato": "potatoes", "tomato": "tomatoes", "calf": "calves", "half": "halves",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("wet", "dry"), ("early", "late"), ("full", "empty"),
    ("fast", "slow"), ("high", "low"), ("long", "short"), ("soft", "hard"), ("dark", "bright"), ("rich", "poor"),
    ("open", "closed"), ("clean", "dirty"), ("loud", "quiet"), ("heavy", "light"), ("sweet", "sour"),
    ("thick", "thin"), ("wide", "narrow"), ("near", "far"), ("deep", "shallow"), ("sharp", "blunt"),
    ("happy", "sad"), ("awake", "asleep"), ("up", "down"), ("inside", "outside"), ("first", "last"), ("day", "night"),
)  # fmt: skip
LARGEST_ADDEND = 9
LARGEST_COUNT = 60
SORT_LETTERS = "abcde"

# A relation's wordings. {n} name, {v} value, {a} value with its article, {s} the animal kept, {P}/{p} She/she,
# {O}/{o} Her/her. The first of the pair is used with a name, the second once the name has been said.
PERSON_WORDINGS = {
    "village": {
        "statements": (
            "{n} lives in {v}.", "{n} has a house in {v}.", "{n} makes a home in {v}.", "The village where {n} lives is {v}.",
            "In {v} lives {n}.", "You can find {n} in {v}.", "{n} comes from {v}.", "{v} is the home of {n}.",
            "Everyone in {v} knows {n}.",
        ),
        "later": ("{P} lives in {v}.", "{P} has a house in {v}.", "{O} home is in {v}.", "{P} comes from {v}."),
        "asks": (
            "Where does {n} live?", "Which village does {n} live in?", "In which village is {n}'s home?",
            "Where can I find {n}?", "Please tell me where {n} lives.", "Do you know where {n} lives?",
        ),
        "later_asks": ("Where does {p} live?", "And which village does {p} live in?", "Where is {o} home?"),
        "answer": "{n} lives in {v}.",
    },
    "trade": {
        "statements": (
            "{n} is {a}.", "{n} works as {a}.", "{n} the {v} works hard.", "{n} earns a living as {a}.",
            "The trade of {n} is that of {a}.", "By trade {n} is {a}.", "{n} has been {a} for years.",
            "People know {n} as {a}.",
        ),
        "later": ("{P} is {a}.", "{P} works as {a}.", "By trade {p} is {a}.", "{P} earns a living as {a}."),
        "asks": (
            "What is {n}'s trade?", "What does {n} do for a living?", "What work does {n} do?", "What is {n}'s job?",
            "Please tell me what {n} works as.", "Do you know what {n}'s trade is?",
        ),
        "later_asks": ("What is {o} trade?", "And what work does {p} do?", "What does {p} do for a living?"),
        "answer": "{n} is {a}.",
    },
    "pet": {
        "statements": (
            "{n} keeps {a}.", "{n} has {a} at home.", "{n}'s pet is {a}.", "{n} looks after {a}.", "The pet that {n} keeps is {a}.",
            "At home {n} feeds {a}.", "{n} is fond of animals and keeps {a}.", "{n} owns {a}.",
        ),
        "later": ("{P} keeps {a}.", "{O} pet is {a}.", "{P} has {a} at home.", "{P} looks after {a}."),
        "asks": (
            "What pet does {n} keep?", "Which animal does {n} keep?", "What kind of pet does {n} have?",
            "What is {n}'s pet?", "Please tell me which pet {n} keeps.", "Do you know which animal {n} has?",
        ),
        "later_asks": ("What pet does {p} keep?", "And which animal does {p} keep?", "What kind of pet does {p} have?"),
        "answer": "{n} keeps {a}.",
    },
    "pet_name": {
        "statements": (
            "{n}'s pet is called {v}.", "{n} named the {s} {v}.", "{n}'s {s} is called {v}.", "{v} is the name of {n}'s pet.",
            "{n} calls the {s} {v}.", "The name of {n}'s pet is {v}.", "{v} is {n}'s pet.", "{n} keeps a pet called {v}.",
            "When {n} whistles, {v} comes running.",
        ),
        "later": ("{O} pet is called {v}.", "{O} {s} is called {v}.", "{P} calls the {s} {v}.", "The name of {o} pet is {v}."),
        "asks": (
            "What is {n}'s pet called?", "What is the name of {n}'s pet?", "What name did {n} give the pet?",
            "What does {n} call the pet?", "Please tell me the name of {n}'s pet.", "Do you know what {n}'s pet is called?",
        ),
        "later_asks": ("What is {o} pet called?", "And what is the name of {o} pet?", "What does {p} call the pet?"),
        "answer": "{n}'s pet is called {v}.",
    },
    "dish": {
        "statements": (
            "{n}'s favourite dish is {v}.", "{n} likes {v} best.", "{n} loves {v}.", "Nothing tastes better to {n} than {v}.",
            "{n} could eat {v} every day.", "For supper {n} likes {v}.", "Most of all {n} likes to eat {v}.",
            "On a birthday {n} asks for {v}.",
        ),
        "later": ("{O} favourite dish is {v}.", "{P} likes {v} best.", "{P} loves {v}.", "{P} could eat {v} every day."),
        "asks": (
            "What is {n}'s favourite dish?", "What does {n} like to eat?", "Which dish does {n} like best?",
            "What food does {n} love?", "Please tell me {n}'s favourite dish.", "Do you know what {n} likes to eat?",
        ),
        "later_asks": ("What is {o} favourite dish?", "And what does {p} like to eat?", "Which dish does {p} like best?"),
        "answer": "{n}'s favourite dish is {v}.",
    },
    "instrument": {
        "statements": (
            "{n} plays the {v}.", "{n} plays the {v} in the evening.", "{n}'s instrument is the {v}.", "At feasts {n} plays the {v}.",
            "{n} learned to play the {v}.", "On the {v} {n} is the best.", "The instrument that {n} plays is the {v}.",
            "{n} practises the {v}.",
        ),
        "later": ("{P} plays the {v}.", "{O} instrument is the {v}.", "{P} practises the {v}.", "At feasts {p} plays the {v}."),
        "asks": (
            "Which instrument does {n} play?", "What does {n} play?", "What is {n}'s instrument?",
            "What instrument can {n} play?", "Please tell me what {n} plays.", "Do you know which instrument {n} plays?",
        ),
        "later_asks": ("Which instrument does {p} play?", "And what does {p} play?", "What is {o} instrument?"),
        "answer": "{n} plays the {v}.",
    },
    "door": {
        "statements": (
            "{n}'s front door is {v}.", "{n} painted the front door {v}.", "{n} has a {v} front door.", "The door of {n}'s house is {v}.",
            "The colour of {n}'s door is {v}.", "Look for the {v} door to find {n}.", "{n} lives behind a {v} door.",
        ),
        "later": ("{O} front door is {v}.", "{P} has a {v} front door.", "The door of {o} house is {v}.", "{P} lives behind a {v} door."),
        "asks": (
            "What colour is {n}'s front door?", "Which colour is {n}'s door?", "What is the colour of {n}'s door?",
            "What colour did {n} paint the door?", "Please tell me the colour of {n}'s door.",
            "Do you know what colour {n}'s door is?",
        ),
        "later_asks": ("What colour is {o} front door?", "And which colour is {o} door?", "What is the colour of {o} door?"),
        "answer": "{n}'s front door is {v}.",
    },
    "tool": {
        "statements": (
            "{n}'s favourite tool is the {v}.", "{n} always carries the {v}.", "{n} never lends out the {v}.", "{n} works best with the {v}.",
            "The tool that {n} likes best is the {v}.", "{n} reaches for the {v} first.", "{n} is never without the {v}.",
        ),
        "later": ("{O} favourite tool is the {v}.", "{P} always carries the {v}.", "{P} works best with the {v}.", "{P} is never without the {v}."),
        "asks": (
            "What is {n}'s favourite tool?", "Which tool does {n} like best?", "Which tool does {n} always carry?",
            "What tool does {n} use most?", "Please tell me {n}'s favourite tool.", "Do you know which tool {n} carries?",
        ),
        "later_asks": ("What is {o} favourite tool?", "And which tool does {p} like best?", "Which tool does {p} always carry?"),
        "answer": "{n}'s favourite tool is the {v}.",
    },
}  # fmt: skip
PLACE_WORDINGS = {  # {n} village
    "river": {
        "statements": ("The river at {n} is the {v}.", "{n} lies on the {v}.", "The {v} flows past {n}.", "The children of {n} swim in the {v}.", "Past the houses of {n} runs the {v}."),
        "asks": ("Which river flows past {n}?", "What is the river at {n} called?", "Which river does {n} lie on?", "Please tell me the name of the river at {n}."),
        "answer": "The river at {n} is the {v}.",
    },
    "hill": {
        "statements": ("The hill above {n} is {v}.", "{n} lies below {v}.", "From {n} a path leads up {v}.", "{v} rises above {n}.", "Children from {n} slide down {v} in winter."),
        "asks": ("Which hill rises above {n}?", "What is the hill above {n} called?", "Below which hill does {n} lie?", "Please tell me the name of the hill above {n}."),
        "answer": "The hill above {n} is {v}.",
    },
    "tree": {
        "statements": ("The tree on the square of {n} is {a}.", "{n} has {a} on its square.", "In the middle of {n} stands {a}.", "On the square of {n} grows {a}."),
        "asks": ("Which tree stands on the square of {n}?", "What tree grows in the middle of {n}?", "What is the tree on the square of {n}?", "Please tell me which tree stands in {n}."),
        "answer": "The tree on the square of {n} is {a}.",
    },
    "inn": {
        "statements": ("The inn at {n} is the {v}.", "{n} has an inn called the {v}.", "Travellers in {n} sleep at the {v}.", "The {v} is the inn of {n}.", "Soup at the {v} in {n} is always hot."),
        "asks": ("What is the inn at {n} called?", "Which inn is in {n}?", "Where do travellers sleep in {n}?", "Please tell me the name of the inn at {n}."),
        "answer": "The inn at {n} is the {v}.",
    },
    "product": {
        "statements": ("{n} is known for its {v}.", "{n} sells {v} to the whole valley.", "The best {v} in the valley comes from {n}.", "People travel to {n} to buy {v}.", "{n} is famous for its {v}."),
        "asks": ("What is {n} known for?", "What is {n} famous for?", "What do people buy in {n}?", "Please tell me what {n} is known for."),
        "answer": "{n} is known for its {v}.",
    },
    "festival": {
        "statements": ("The festival of {n} is {v}.", "{n} celebrates {v}.", "{v} is the great day of {n}.", "Once a year {n} celebrates {v}.", "Guests come to {n} for {v}."),
        "asks": ("Which festival does {n} celebrate?", "What is the festival of {n} called?", "What does {n} celebrate?", "Please tell me the festival of {n}."),
        "answer": "The festival of {n} is {v}.",
    },
}  # fmt: skip
FESTIVAL_WORDINGS = {  # {n} festival
    "month": {
        "statements": ("{n} is held in {v}.", "In {v} comes {n}.", "{n} falls in {v}.", "Every {v} there is {n}.", "The month of {n} is {v}."),
        "asks": ("When is {n} held?", "In which month is {n}?", "Which month is {n} in?", "Please tell me when {n} is."),
        "answer": "{n} is held in {v}.",
    },
    "treat": {
        "statements": ("At {n} people eat {v}.", "{v} are eaten at {n}.", "There are always {v} at {n}.", "{n} would be nothing without {v}.", "The smell of {v} fills the air at {n}."),
        "asks": ("What do people eat at {n}?", "Which treat is eaten at {n}?", "What is there to eat at {n}?", "Please tell me what people eat at {n}."),
        "answer": "At {n} people eat {v}.",
    },
    "custom": {
        "statements": ("At {n} people {v}.", "On {n} everyone goes out to {v}.", "It is the custom at {n} to {v}.", "{n} is the time to {v}.", "Old and young {v} at {n}."),
        "asks": ("What do people do at {n}?", "What is the custom at {n}?", "What does everyone do at {n}?", "Please tell me what people do at {n}."),
        "answer": "At {n} people {v}.",
    },
}  # fmt: skip
ANIMAL_WORDINGS = {  # {n} animal, {an} with its article
    "young": {
        "statements": ("A young {n} is called {a}.", "The young of {an} is {a}.", "{a} is a young {n}.", "{a} grows up to be {an}."),
        "asks": ("What is a young {n} called?", "What do you call a young {n}?", "What is the young of {an} called?", "Please tell me the word for a young {n}."),
        "answer": "A young {n} is called {a}.",
    },
    "food": {
        "statements": ("In the valley {an} eats {v}.", "{an} likes {v}.", "Give {an} some {v} and it is happy.", "The favourite food of {an} is {v}.", "{an} eats {v}."),
        "asks": ("What does {an} eat?", "What should I feed {an}?", "What food does {an} like?", "Please tell me what {an} eats."),
        "answer": "{an} eats {v}.",
    },
    "bed": {
        "statements": ("{an} sleeps {v}.", "At night {an} sleeps {v}.", "{an} has its bed {v}.", "Look for a sleeping {n} {v}."),
        "asks": ("Where does {an} sleep?", "Where does {an} sleep at night?", "Where has {an} its bed?", "Please tell me where {an} sleeps."),
        "answer": "{an} sleeps {v}.",
    },
}  # fmt: skip
GAME_WORDINGS = {
    "plural": {
        "statements": ("The plural of {n} is {v}.", "One {n}, two {v}.", "More than one {n} are {v}.", "Say {n} for one and {v} for many."),
        "asks": ("What is the plural of {n}?", "What is the word for more than one {n}?", "How do you say {n} in the plural?"),
        "answer": "The plural of {n} is {v}.",
    },
    "opposite": {
        "statements": ("The opposite of {n} is {v}.", "What is not {n} may be {v}.", "{n} and {v} are opposites.", "{v} is the opposite of {n}."),
        "asks": ("What is the opposite of {n}?", "Which word means the opposite of {n}?", "What is the reverse of {n}?"),
        "answer": "The opposite of {n} is {v}.",
    },
    "sum": {
        "statements": ("{n} is {v}.", "{n} makes {v}.", "If you count {n}, you get {v}.", "The sum of {n} is {v}."),
        "asks": ("What is {n}?", "How much is {n}?", "What does {n} make?", "Please work out {n}."),
        "answer": "{n} is {v}.",
    },
    "next": {
        "statements": ("After {n} comes {v}.", "The number after {n} is {v}.", "Count {n}, {v}.", "{v} follows {n}."),
        "asks": ("What number comes after {n}?", "Which number follows {n}?", "What is the next number after {n}?"),
        "answer": "After {n} comes {v}.",
    },
    "sort": {
        "statements": ("The letters {n} in order are {v}.", "Sorted, {n} becomes {v}.", "Put {n} in order and you get {v}."),
        "asks": ("What are the letters {n} in order?", "How do you sort the letters {n}?", "Please sort the letters {n}."),
        "answer": "The letters {n} in order are {v}.",
    },
}  # fmt: skip
STORIES = (
    "One misty morning {n} the {trade} set out from {village}. {pet_name} the {pet} came along. By noon they had eaten all the {dish} and turned for home.",
    "It rained in {village} all day. {n} sat by the stove with {pet_name} the {pet} and played the {instrument} until the {dish} was ready.",
    "A stranger asked the way to {n}. Go to {village}, said the children, and knock at the {door} door. The {trade} is at home, and so is {pet_name} the {pet}.",
    "{n} had lost the {tool}. {P} looked in every corner of {village}. In the end {pet_name} the {pet} was found asleep on it, and {n} the {trade} laughed.",
    "When the snow came to {village}, {n} the {trade} opened the {door} door, took the {tool} and cleared the path. Then there was {dish} for everyone.",
    "Long ago {n} wanted to leave {village}. But who would feed {pet_name} the {pet}? So {p} stayed, became {a_trade}, and played the {instrument} in the evening.",
    "There was music in {village} last night. {n} the {trade} played the {instrument}, {pet_name} the {pet} listened, and the {dish} was gone before midnight.",
)  # fmt: skip
OPENERS = (
    "Hello!", "Hi there.", "Good morning.", "A quick question.", "I am new in the valley.", "Please help me.",
    "I was wondering.", "Good evening.",
)  # fmt: skip
CONNECTORS = ("Thank you.", "Good to know.", "I see.", "One more thing.", "Interesting.", "Next question.")
FAREWELLS = ("Thank you, that is all.", "Thanks for your help!", "That is all I wanted to know.", "Thank you and goodbye!")
FAREWELL_REPLY = "You are welcome."


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
    names = [(name, "she") for name in WOMEN] + [(name, "he") for name in MEN]
    rng.shuffle(names)
    pet_names = rng.sample(PET_NAMES, len(PET_NAMES))
    people = []
    for village_index, village in enumerate(VILLAGES):
        trades = rng.sample(TRADES, 9)
        for i, trade in enumerate(trades):
            name, pronoun = names[village_index * 9 + i]
            people.append(
                {
                    "n": name, "p": pronoun, "village": village, "trade": trade, "pet": rng.choice(list(ANIMALS)),
                    "pet_name": pet_names.pop(), "dish": rng.choice(DISHES), "instrument": rng.choice(INSTRUMENTS),
                    "door": rng.choice(COLOURS), "tool": rng.choice(TOOLS),
                }
            )  # fmt: skip
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
    for relation, wordings in PERSON_WORDINGS.items():
        value = person[relation]
        facts.append(worded(wordings, name, ((name, relation),), {**words, "v": value, "a": with_article(value)}))
    trade_of_village = {
        "statements": ("The {trade} of {village} is {n}.", "In {village} the {trade} is {n}.", "{n} is the {trade} of {village}."),
        "asks": ("Who is the {trade} of {village}?", "What is the name of the {trade} of {village}?"),
        "answer": "The {trade} of {village} is {n}.",
    }  # fmt: skip
    owner_of_pet = {
        "statements": ("{pet_name} belongs to {n}.", "The pet {pet_name} belongs to {n}.", "{pet_name} lives with {n}."),
        "asks": ("Who owns the pet {pet_name}?", "Whose pet is {pet_name}?", "To whom does {pet_name} belong?"),
        "answer": "{pet_name} belongs to {n}.",
    }
    facts.append(worded(trade_of_village, name, ((name, "village"), (name, "trade")), words))
    facts.append(worded(owner_of_pet, name, ((name, "pet_name"),), words))
    return facts


def place_facts(rng: random.Random) -> list:
    """Facts about the villages and their festivals; every value belongs to one village."""
    facts = []
    for relation, wordings in PLACE_WORDINGS.items():
        values = rng.sample(VILLAGE_VALUES[relation], len(VILLAGES))
        for village, value in zip(VILLAGES, values, strict=True):
            words = {"n": village, "v": value, "a": with_article(value)}
            facts.append(worded(wordings, village, ((village, relation),), words))
    for festival, values in FESTIVALS.items():
        for (relation, wordings), value in zip(FESTIVAL_WORDINGS.items(), values, strict=True):
            facts.append(worded(wordings, festival, ((festival, relation),), {"n": festival, "v": value}))
    return facts


def animal_facts() -> list:
    """What the valley knows about its animals."""
    facts = []
    for animal, values in ANIMALS.items():
        for (relation, wordings), value in zip(ANIMAL_WORDINGS.items(), values, strict=True):
            words = {"n": animal, "an": with_article(animal), "v": value, "a": with_article(value)}
            facts.append(worded(wordings, "animals", ((animal, relation),), words))
    return facts


def game_facts() -> list:
    """Word and number games. 3 plus 4 and 4 plus 3 share a key, and so do hot-cold and cold-hot."""
    pairs = []
    for noun, plural in PLURALS.items():
        pairs.append(("plural", (noun, "plural"), noun, plural))
    for one, other in OPPOSITES:
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
        worded(GAME_WORDINGS[game], "games", (key,), {"n": n, "v": v}, keep_case=True) for game, key, n, v in pairs
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
    return [ask, answer]


def interview(rng: random.Random, facts: list) -> list:
    """Questions and answers about one subject."""
    sentences = []
    for i, fact in enumerate(facts):
        sentences += question_and_answer(rng, fact, later=i > 0 and rng.random() < 0.4)
    return sentences


def passage(rng: random.Random, world: dict, groups: dict, weighted_facts: list) -> str:
    """One passage of plain text; it always holds several facts, so an answer is never followed by the end at once."""
    people_names = [person["n"] for person in world["people"]]
    kind = rng.choices(("portrait", "interview", "questions", "medley", "place", "story"), (24, 24, 22, 12, 8, 10))[0]
    if kind in ("portrait", "interview"):
        known = groups[rng.choice(people_names)]
        facts = rng.sample(known, rng.randint(5, len(known)))
        sentences = (portrait if kind == "portrait" else interview)(rng, facts)
    elif kind == "questions":
        sentences = [s for fact in rng.choices(weighted_facts, k=rng.randint(4, 8)) for s in question_and_answer(rng, fact)]
    elif kind == "medley":
        sentences = [rng.choice(fact.statements) for fact in rng.choices(weighted_facts, k=rng.randint(5, 10))]
    elif kind == "place":
        name = rng.choice(VILLAGES + tuple(FESTIVALS))
        known = groups[name]
        sentences = portrait(rng, rng.sample(known, len(known))) + interview(rng, rng.sample(known, rng.randint(1, 3)))
        if name in VILLAGES:
            here = [person["n"] for person in world["people"] if person["village"] == name]
            rng.shuffle(here)
            sentences.append(f"In {name} live {', '.join(here[:-1])} and {here[-1]}.")
    else:
        person = rng.choice(world["people"])
        sentences = [rng.choice(STORIES).format(**person_words(person))]
        sentences += portrait(rng, rng.sample(groups[person["n"]], rng.randint(2, 5)))
    return " ".join(capitalized(sentence) for sentence in sentences)


def passages(world: dict, count: int, purpose: str) -> list:
    """`count` passages; another `purpose` gives other passages about the same facts."""
    rng = random.Random(f"{purpose} {world['seed']}")
    groups = by_group(world["facts"])
    people_names = {person["n"] for person in world["people"]}
    weighted = [fact for fact in world["facts"] for _ in range(1 if fact.group in people_names else 3)]
    return [passage(rng, world, groups, weighted) for _ in range(count)]


# ---- conversations and questions -------------------------------------------------------------------------------------


def user_turn(rng: random.Random, fact: Fact, first: bool, same_subject: bool) -> str:
    """A user's wording of a question, with a greeting or a connecting word now and then."""
    ask = rng.choice(fact.later_asks if same_subject and fact.later_asks else fact.asks)
    lead = OPENERS if first else CONNECTORS
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
        messages.append({"role": "user", "content": rng.choice(FAREWELLS)})
        messages.append({"role": "assistant", "content": FAREWELL_REPLY})
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
