"""Taught facts about countries, oceans and mountains."""

from __future__ import annotations

from scripts.demo_model.facts import Fact

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "Belgium": "Brussels",
    "Hungary": "Budapest",
    "Switzerland": "Bern",
    "the Netherlands": "Amsterdam",
    "the United Kingdom": "London",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Ethiopia": "Addis Ababa",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "South Korea": "Seoul",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Colombia": "Bogota",
    "the United States": "Washington",
}
CURRENCIES = {
    "Japan": "yen",
    "India": "rupee",
    "China": "yuan",
    "Switzerland": "franc",
    "Mexico": "peso",
    "Germany": "euro",
    "Sweden": "krona",
    "Poland": "zloty",
    "the United Kingdom": "pound",
    "the United States": "dollar",
}
CONTINENTS = {
    "France": "Europe",
    "Norway": "Europe",
    "Greece": "Europe",
    "Japan": "Asia",
    "India": "Asia",
    "Thailand": "Asia",
    "Kenya": "Africa",
    "Egypt": "Africa",
    "Morocco": "Africa",
    "Brazil": "South America",
    "Peru": "South America",
    "Canada": "North America",
    "Mexico": "North America",
}
RECORDS = (
    ("the largest ocean", "the Pacific Ocean", "Which ocean is the largest?", "What is the biggest ocean?"),
    ("the second largest ocean", "the Atlantic Ocean", "Which ocean is the second largest?"),
    ("the smallest ocean", "the Arctic Ocean", "Which ocean is the smallest?"),
    ("the largest continent", "Asia", "Which continent is the largest?", "What is the biggest continent?"),
    ("the smallest continent", "Australia", "Which continent is the smallest?"),
    ("the coldest continent", "Antarctica", "Which continent is the coldest?"),
    ("the highest mountain", "Mount Everest", "Which mountain is the highest?", "What is the tallest mountain?"),
    ("the highest mountain in Europe", "Mount Elbrus", "Which mountain is the highest in Europe?"),
    ("the highest mountain in Africa", "Mount Kilimanjaro", "Which mountain is the highest in Africa?"),
    ("the largest hot desert", "the Sahara", "Which hot desert is the largest?"),
    ("the largest island", "Greenland", "Which island is the largest?", "What is the biggest island?"),
    ("the largest country", "Russia", "Which country is the largest?", "What is the biggest country?"),
    ("the smallest country", "Vatican City", "Which country is the smallest?"),
    ("the deepest lake", "Lake Baikal", "Which lake is the deepest?"),
    ("the largest rainforest", "the Amazon", "Which rainforest is the largest?"),
    ("the ocean between Europe and America", "the Atlantic Ocean", "Which ocean lies between Europe and America?"),
    ("the ocean between Africa and Australia", "the Indian Ocean", "Which ocean lies between Africa and Australia?"),
)


def capital(country: str, city: str) -> Fact:
    """The capital of a country, also asked by the country's possessive."""
    return Fact(
        f"the capital of {country}",
        f"The capital of {country} is {city}.",
        (
            f"Which city is the capital of {country}?",
            f"What city is the capital of {country}?",
            f"What is the capital city of {country}?",
        ),
    )


def currency(country: str, money: str) -> Fact:
    """The money a country pays with."""
    return Fact(
        f"the currency of {country}",
        f"The currency of {country} is the {money}.",
        (f"Which currency does {country} use?", f"What money do people use in {country}?"),
    )


def continent(country: str, land: str) -> Fact:
    """The continent a country lies on."""
    return Fact(
        f"the continent of {country}",
        f"{country} is in {land}.",
        (f"On which continent is {country}?", f"Which continent is {country} in?", f"Where is {country}?"),
    )


def record(subject: str, holder: str, *questions: str) -> Fact:
    """A superlative."""
    return Fact(subject, f"T{subject[1:]} is {holder}.", questions)


def geography_facts() -> list[Fact]:
    """All taught facts about places."""
    return [
        *(capital(country, city) for country, city in CAPITALS.items()),
        *(currency(country, money) for country, money in CURRENCIES.items()),
        *(continent(country, land) for country, land in CONTINENTS.items()),
        *(record(*row) for row in RECORDS),
        Fact("the number of oceans", "There are five oceans.", ("How many oceans are there?",)),
        Fact("the number of continents", "There are seven continents.", ("How many continents are there?",)),
    ]
