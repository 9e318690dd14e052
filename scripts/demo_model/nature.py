"""Taught facts about planets, animals, substances and colours."""

from __future__ import annotations

from scripts.demo_model.facts import Fact, capitalise

PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
SUPERLATIVES = (
    ("the largest planet", "Jupiter", "Which planet is the largest?", "What is the biggest planet?"),
    ("the smallest planet", "Mercury", "Which planet is the smallest?"),
    ("the hottest planet", "Venus", "Which planet is the hottest?"),
    ("the red planet", "Mars", "Which planet is called the red planet?"),
    ("the planet with the bright rings", "Saturn", "Which planet has bright rings?"),
    ("the star closest to Earth", "the Sun", "Which star is closest to Earth?"),
    ("the largest animal", "the blue whale", "Which animal is the largest?", "What is the biggest animal?"),
    ("the largest land animal", "the elephant", "Which land animal is the largest?"),
    ("the tallest animal", "the giraffe", "Which animal is the tallest?"),
    ("the fastest land animal", "the cheetah", "Which land animal is the fastest?"),
    ("the largest bird", "the ostrich", "Which bird is the largest?", "What is the biggest bird?"),
    ("the hardest natural material", "diamond", "Which natural material is the hardest?"),
    ("the lightest gas", "hydrogen", "Which gas is the lightest?"),
    ("the gas that we need to breathe", "oxygen", "Which gas do we need to breathe?"),
)
SOUNDS = {
    "a dog": "barks",
    "a cat": "meows",
    "a cow": "moos",
    "a sheep": "bleats",
    "a horse": "neighs",
    "a lion": "roars",
    "a duck": "quacks",
    "a frog": "croaks",
    "an owl": "hoots",
    "a wolf": "howls",
    "a bee": "buzzes",
    "a snake": "hisses",
}
YOUNG = {
    "a dog": "a puppy",
    "a cat": "a kitten",
    "a cow": "a calf",
    "a sheep": "a lamb",
    "a horse": "a foal",
    "a pig": "a piglet",
    "a lion": "a cub",
    "a duck": "a duckling",
    "a goat": "a kid",
    "a kangaroo": "a joey",
    "a deer": "a fawn",
    "a swan": "a cygnet",
}
LEGS = {"a spider": "eight", "an ant": "six", "a dog": "four", "a bird": "two", "a snake": "no", "a crab": "ten"}
FOODS = {
    "a cow": "grass",
    "a panda": "bamboo",
    "a koala": "eucalyptus leaves",
    "a lion": "meat",
    "a squirrel": "nuts",
    "an anteater": "ants",
}
COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "a banana": "yellow",
    "snow": "white",
    "coal": "black",
    "a carrot": "orange",
    "a ripe tomato": "red",
    "a flamingo": "pink",
    "an elephant": "grey",
    "chocolate": "brown",
    "a lemon": "yellow",
    "blood": "red",
}
MIXTURES = {
    ("blue", "yellow"): "green",
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("black", "white"): "grey",
    ("red", "white"): "pink",
}
SYMBOLS = {
    "gold": "Au",
    "silver": "Ag",
    "iron": "Fe",
    "oxygen": "O",
    "hydrogen": "H",
    "carbon": "C",
    "helium": "He",
    "copper": "Cu",
    "lead": "Pb",
    "sodium": "Na",
    "nitrogen": "N",
}


def superlative(subject: str, holder: str, *questions: str) -> Fact:
    """A record holder."""
    return Fact(subject, f"{capitalise(subject)} is {holder}.", questions)


def planet_facts() -> list[Fact]:
    """The order of the planets."""
    order = [
        Fact(
            f"the {ordinal} planet from the Sun",
            f"The {ordinal} planet from the Sun is {planet}.",
            (f"Which planet is {ordinal} from the Sun?",),
        )
        for ordinal, planet in zip(ORDINALS, PLANETS, strict=True)
    ]
    return [*order, Fact("the number of planets", "There are eight planets.", ("How many planets are there?",))]


def animal_facts() -> list[Fact]:
    """Sounds, young, legs and food."""
    sounds = [
        Fact(f"the sound of {animal}", f"{capitalise(animal)} {verb}.", (f"What sound does {animal} make?",))
        for animal, verb in SOUNDS.items()
    ]
    young = [
        Fact(
            f"the young of {animal}",
            f"The young of {animal} is called {child}.",
            (f"What is the young of {animal} called?", f"What do you call the young of {animal}?"),
        )
        for animal, child in YOUNG.items()
    ]
    legs = [
        Fact(
            f"the number of legs of {animal}",
            f"{capitalise(animal)} has {count} legs.",
            (f"How many legs does {animal} have?",),
        )
        for animal, count in LEGS.items()
    ]
    food = [
        Fact(f"the food of {animal}", f"{capitalise(animal)} eats {food}.", (f"What does {animal} eat?",))
        for animal, food in FOODS.items()
    ]
    return [*sounds, *young, *legs, *food]


def colour_facts() -> list[Fact]:
    """Colours of things, and of mixed paints."""
    things = [
        Fact(
            f"the colour of {thing}",
            f"{capitalise(thing)} is {colour}.",
            (f"What colour is {thing}?", f"What color is {thing}?", f"Which colour is {thing}?"),
        )
        for thing, colour in COLOURS.items()
    ]
    mixtures = [
        Fact(
            f"the mixture of {one} and {other}",
            f"{capitalise(one)} and {other} make {result}.",
            (f"What colour do {one} and {other} make?", f"What do you get when you mix {one} and {other}?"),
        )
        for (one, other), result in MIXTURES.items()
    ]
    return [*things, *mixtures]


def substance_facts() -> list[Fact]:
    """Chemical symbols and water."""
    symbols = [
        Fact(
            f"the chemical symbol for {element}",
            f"The chemical symbol for {element} is {symbol}.",
            (f"What is the symbol of {element}?", f"Which chemical symbol does {element} have?"),
        )
        for element, symbol in SYMBOLS.items()
    ]
    return [
        *symbols,
        Fact("the chemical formula of water", "The chemical formula of water is H2O.", ("What is water made of?",)),
        Fact("the freezing point of water", "Water freezes at 0 degrees Celsius.", ("When does water freeze?",)),
        Fact("the boiling point of water", "Water boils at 100 degrees Celsius.", ("When does water boil?",)),
    ]


def nature_facts() -> list[Fact]:
    """All taught facts about nature."""
    records = [superlative(*row) for row in SUPERLATIVES]
    return [*records, *planet_facts(), *animal_facts(), *colour_facts(), *substance_facts()]
