"""Questions that the model was not taught, and the refusals it should give.

Half of the names are invented from syllables: a name never seen before is the surest sign of a question without a
taught answer.
"""

from __future__ import annotations

from random import Random

from scripts.demo_model.facts import add_noise, capitalise

DO_NOT_KNOW = "I do not know that. I am a very small model."
ONLY_ADD = "I can only add two numbers of up to two digits."

ONSETS = (
    "b", "br", "d", "dr", "f", "fl", "g", "gl", "k", "kr", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr",
    "v", "z",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "ou")
CODAS = ("", "", "n", "l", "r", "s", "x", "m", "ck", "nd")

COUNTRIES = (
    "Iceland", "Estonia", "Latvia", "Lithuania", "Croatia", "Serbia", "Slovenia", "Slovakia", "Romania", "Bulgaria",
    "Iran", "Iraq", "Jordan", "Lebanon", "Yemen", "Oman", "Nepal", "Bhutan", "Laos", "Cambodia", "Malaysia", "Mongolia",
    "Ghana", "Nigeria", "Senegal", "Mali", "Chad", "Sudan", "Uganda", "Zambia", "Angola", "Namibia", "Bolivia",
    "Paraguay", "Uruguay", "Venezuela", "Panama", "Honduras", "Jamaica", "Haiti", "Fiji", "Samoa", "Malta", "Cyprus",
)  # fmt: skip
THINGS = (
    "a bridge", "a carburettor", "a violin", "a glacier", "a volcano", "a telescope", "a contract", "a mortgage",
    "a blockchain", "a symphony", "a sonnet", "a vaccine", "a protein", "a neutron", "a black hole", "a parliament",
    "a cathedral", "a submarine", "a zeppelin", "a windmill", "a lathe", "a loom", "a database", "a compiler",
    "a web server", "an operating system", "a firewall", "inflation", "gravity", "photosynthesis", "democracy",
    "philosophy", "football", "cricket", "chess", "jazz", "opera", "yoga", "knitting", "welding", "calculus",
    "topology",
)  # fmt: skip
PEOPLE = (
    "the president of {country}", "the king of {country}", "the mayor of {name}", "{Name}", "{Name} {Name}",
    "the inventor of {thing}", "the author of this book", "the best singer", "my teacher", "the first person on Mars",
)  # fmt: skip
SUBJECTS = (
    "the population of {country}", "the capital of {country}", "the capital of {Name}", "the currency of {country}",
    "the length of the river {Name}", "the height of Mount {Name}", "the price of {thing}", "the history of {country}",
    "the meaning of life", "the meaning of {name}", "{name}", "a {name}", "{thing}", "{thing}", "the weather in {Name}",
    "the weather today", "my name", "my birthday", "the time now", "the date today", "the news", "the best film",
    "the opposite of {name}", "the plural of {name}", "the chemical symbol for {name}", "the name of my dog",
    "the distance to {country}", "the answer to everything", "the phone number of {Name}", "the recipe for {name} soup",
)  # fmt: skip
QUESTIONS = (
    "Who is {person}?", "Who is {person}?", "Tell me about {person}.", "What do you know about {person}?",
    "What is {subject}?", "What is {subject}?", "What is {subject}?", "Tell me {subject}.",
    "Can you tell me {subject}?",
    "Do you know {subject}?", "Explain {subject}.", "What does {name} mean?", "Tell me about {thing}.",
    "Tell me about {country}.", "How does {thing} work?", "How do I build {thing}?", "How do I cook {name}?",
    "How many people live in {country}?", "How old is {Name}?", "How far is it to {Name}?", "How tall is {person}?",
    "When was {Name} born?", "When did {country} win the cup?", "When was {thing} invented?", "Where is {Name}?",
    "Where can I buy {thing}?", "Who invented {thing}?", "Who wrote {Name}?", "Who won the game last night?",
    "Why is {thing} important?", "Why is {Name} famous?", "Should I buy {thing}?", "Is {Name} a good place?",
    "Translate {name} into French.", "Write a program that sorts numbers.", "Write a poem about {thing}.",
    "What will happen tomorrow?", "What happened in 19{digit}{digit}?", "What happened in {Name}?",
    "Which team is the best?", "Which phone should I buy?", "Can you drive a car?", "Can you write code?",
    "What sound does a {name} make?", "What colour is a {name}?", "How many legs does a {name} have?",
    "What does a {name} eat?", "Recommend a book about {thing}.", "Give me advice about {thing}.",
)  # fmt: skip
BEYOND_ADDITION = (
    "What is {small} times {small}?", "What is {small} * {small}?", "{small} x {small}", "Multiply {small} by {small}.",
    "What is {small} minus {small}?", "{small} - {small}", "Subtract {small} from {small}.", "{small} / {small}",
    "Divide {small} by {small}.", "What is {small} divided by {small}?", "What is {large} + {small}?",
    "What is {small} + {large}?", "{large} + {large}", "Add {large} and {small}.",
    "What is the square root of {small}?",
    "What is {large} plus {large}?", "Compute {large} + {small}.", "{large} plus {small}?",
)  # fmt: skip


def invented_word(rng: Random) -> str:
    """A pronounceable word of two or three syllables."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def fill(template: str, rng: Random) -> str:
    """Replace each placeholder by a fresh choice until none is left."""
    while "{" in template:
        head, rest = template.split("{", 1)
        slot, tail = rest.split("}", 1)
        template = head + slot_value(slot, rng) + tail
    return template


def slot_value(slot: str, rng: Random) -> str:
    """A choice for one placeholder; it may hold placeholders itself."""
    choices = {"country": COUNTRIES, "thing": THINGS, "person": PEOPLE, "subject": SUBJECTS}
    if slot in choices:
        return rng.choice(choices[slot])
    if slot == "digit":
        return str(rng.randrange(10))
    if slot == "small":
        return str(rng.randrange(100))
    if slot == "large":
        return str(rng.randrange(100, 10 ** rng.choice((3, 3, 4))))
    word = invented_word(rng)
    return capitalise(word) if slot == "Name" else word


def unknown(rng: Random) -> tuple[str, str]:
    """A question without a taught answer, and the refusal."""
    if rng.random() < 0.25:
        return fill(rng.choice(BEYOND_ADDITION), rng), ONLY_ADD
    return add_noise(capitalise(fill(rng.choice(QUESTIONS), rng)), rng), DO_NOT_KNOW


HELD_OUT_UNKNOWNS = (
    "What is the capital of Tunisia?",
    "Who is the president of Belarus?",
    "Who is Grandel Morvane?",
    "What is a trombone?",
    "What is a saxophone?",
    "How does a microwave work?",
    "How many people live in Algeria?",
    "When was the radio invented?",
    "Who painted the old church?",
    "What is the best restaurant?",
    "Tell me about Kazakhstan.",
    "What is quantum chromodynamics?",
    "How old is my brother?",
    "Where did I leave my keys?",
    "Can you order a pizza?",
    "What is 12 times 12?",
    "What is 50 - 20?",
    "What is 345 + 12?",
)
"""Questions in other words and about other things than the training text holds."""
