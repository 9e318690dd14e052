"""The plots and the cast of the generated stories.

A plot is a list of steps; each step offers several wordings of the same event, so any choice of wordings tells one
consistent story. Slots: ``{name}`` and ``{kind}`` of the hero, ``{he} {him} {his}`` of the hero, ``{friend}`` and
``{friend_kind}`` of the helper, and ``{spot} {time} {place} {hobby}``.
"""

from __future__ import annotations

from dataclasses import dataclass

Step = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """What goes wrong, how it is put right, and what the hero learns.

    helpers: who comes to help; the second one where the hero is of the first one's kind.
    """

    steps: tuple[Step, ...]
    moral: Step
    helpers: tuple[str, str]


GIRLS = {
    "fox": "Ruby", "mouse": "Mia", "owl": "Luna", "duck": "Daisy", "cat": "Holly", "squirrel": "Nora", "goat": "Rosie",
    "deer": "Ella", "penguin": "Lily", "lion": "Clara", "otter": "Poppy", "girl": "Anna", "robot": "Stella",
}  # fmt: skip
BOYS = {
    "rabbit": "Tom", "bear": "Max", "frog": "Ben", "hedgehog": "Oscar", "dog": "Leo", "turtle": "Sam",
    "badger": "Finn", "wolf": "Toby", "beaver": "Hugo", "elephant": "Milo", "monkey": "Jack", "boy": "Theo",
    "dragon": "Felix",
}  # fmt: skip
CAST = GIRLS | BOYS
"""One name for each kind: a small model keeps a cast in mind better than it copies a name from far above."""
TRAITS = ("little", "young", "curious", "clever", "shy", "cheerful", "brave", "kind", "small", "busy")
PLACES = (
    "in a green forest", "near a wide river", "on a quiet farm", "at the edge of a village", "under an old oak tree",
    "beside a blue lake", "on a windy hill", "in a sunny valley", "by the sea", "in a house with a red door",
)  # fmt: skip
HOBBIES = (
    "singing songs", "climbing trees", "painting pictures", "baking bread", "reading books", "collecting shells",
    "growing flowers", "looking at the stars", "swimming", "building towers", "playing the drum", "making kites",
)  # fmt: skip
SPOTS = (
    "under a bush", "behind a big stone", "in a hollow log", "at the bottom of a basket", "on a high branch",
    "next to the well", "in the tall grass", "beneath the bridge",
)  # fmt: skip
TIMES = ("One morning", "One day", "One sunny afternoon", "One cold evening", "One spring day", "One rainy day")

MEETING = (
    "A {friend_kind} named {friend} came by and asked what was wrong.",
    "Just then, a {friend_kind} named {friend} walked past and stopped to help.",
    "Luckily, a kind {friend_kind} named {friend} heard {him}.",
)
ENDINGS = (
    "From that day on, {name} and {friend} were best friends.",
    "{name} thanked {friend}, and they laughed all the way home.",
    "That night, {name} fell asleep with a smile.",
    "{name} and {friend} shared a warm supper and told each other stories.",
)

PLOTS = (
    Plot(
        (
            ("{time}, {name} could not find {his} red scarf.", "{time}, {name} lost {his} red scarf."),
            (
                "{He} looked everywhere at home, but it was gone.",
                "{He} searched in every corner, but {he} could not find it.",
            ),
            MEETING,
            (
                '"Let us look together," said {friend}.',
                '"Two pairs of eyes see more than one," said {friend}.',
            ),
            (
                "They followed the path step by step, and at last they found the red scarf {spot}.",
                "They looked {spot}, and there was the red scarf!",
            ),
        ),
        (
            "{name} learned that searching is easier with a friend.",
            "{name} learned to ask for help when {he} needs it.",
        ),
        ("squirrel", "dog"),
    ),
    Plot(
        (
            (
                "{time}, {name} walked too far and lost {his} way home.",
                "{time}, {name} went for a long walk and forgot the way back.",
            ),
            ("It was getting dark, and {he} was afraid.", "The sun went down, and {he} began to cry."),
            MEETING,
            (
                '"Follow the river," said {friend}. "It always leads home."',
                '"Do you see that bright star?" said {friend}. "It shows the way."',
            ),
            ("They walked side by side until {name} saw the lights of home.", "Soon {name} saw {his} own front door."),
        ),
        (
            "{name} learned to look back now and then when {he} walks somewhere new.",
            "{name} learned that it is wise to remember the way.",
        ),
        ("turtle", "goat"),
    ),
    Plot(
        (
            (
                "{time}, a storm blew the roof off {name}'s house.",
                "{time}, strong wind broke the roof of {name}'s house.",
            ),
            (
                "{He} tried to fix it alone, but the wood was too heavy.",
                "{name} was cold and wet and did not know what to do.",
            ),
            MEETING,
            (
                "{friend} called all the neighbours, and each of them brought some wood.",
                "{friend} held the ladder while {name} put on new wood.",
            ),
            ("Before night came, the house had a strong new roof.", "In the evening the new roof was ready."),
        ),
        (
            "{name} learned that many hands make light work.",
            "{name} learned that good neighbours are better than strong walls.",
        ),
        ("beaver", "bear"),
    ),
    Plot(
        (
            (
                "{time}, {name} fell into a deep hole.",
                "{time}, {name} did not look where {he} was going and fell into a hole.",
            ),
            ("{He} jumped and jumped, but the hole was too deep.", "{He} called for help as loudly as {he} could."),
            MEETING,
            (
                "{friend} found a long rope and threw one end into the hole.",
                "{friend} pushed a long branch into the hole.",
            ),
            (
                "{name} held on tight, and {friend} pulled until {he} was out.",
                "{name} climbed up slowly, and soon {he} was safe again.",
            ),
        ),
        ("{name} learned to watch {his} steps.", "{name} learned to stay calm and call for help."),
        ("monkey", "deer"),
    ),
    Plot(
        (
            ("Winter came early, and {name} had nothing left to eat.", "{time}, {name} saw that {his} food was gone."),
            ("{He} was hungry, and the snow was deep.", "{He} was too proud to ask anyone for food."),
            MEETING,
            (
                '"I have enough for two," said {friend}, and opened a big basket.',
                "{friend} shared a loaf of bread and a pot of hot soup.",
            ),
            (
                "In spring, {name} planted a garden and gave half of it to {friend}.",
                "When summer came, {name} brought {friend} the first berries.",
            ),
        ),
        ("{name} learned that sharing makes everyone richer.", "{name} learned that kindness comes back."),
        ("hedgehog", "mouse"),
    ),
    Plot(
        (
            (
                "{time}, {name} wanted to bring a cake to {his} grandmother, but the bridge was broken.",
                "{time}, {name} wanted to visit {his} grandmother, but the river had washed the bridge away.",
            ),
            ("The water was fast and cold.", "{He} sat down by the water and did not know what to do."),
            MEETING,
            (
                "{friend} knew where a fallen tree lay across the river.",
                "Together they tied some logs into a raft.",
            ),
            ("They crossed slowly and carefully.", "Step by step, they reached the other side."),
            ("The happy grandmother made tea for both of them.",),
        ),
        ("{name} learned that there is more than one way to cross a river.", "{name} learned not to give up too soon."),
        ("frog", "duck"),
    ),
    Plot(
        (
            ("{name} was afraid of the dark.", "Every night, {name} was afraid of the dark."),
            (
                "{time}, the lamp went out, and {he} hid under the bed.",
                "{time}, {he} heard a strange noise and could not sleep.",
            ),
            MEETING,
            (
                '"Come outside with me," said {friend}. "The dark is full of lights."',
                '"Take my hand," said {friend}, and they went outside together.',
            ),
            (
                "{name} saw the moon, the stars and a hundred fireflies.",
                "The noise was only the wind, and the sky was full of stars.",
            ),
        ),
        ("{name} learned that the dark can be beautiful.", "{name} learned that fear gets small when you look at it."),
        ("cat", "badger"),
    ),
    Plot(
        (
            ("{time}, {name} took part in a big race.", "{time}, there was a race, and {name} wanted to win it."),
            ("{He} ran faster than all the others.", "Soon {he} was ahead of everyone."),
            (
                "Then {he} saw a {friend_kind} named {friend} who had hurt a foot.",
                "But beside the road sat a {friend_kind} named {friend} who could not walk.",
            ),
            (
                "{name} stopped and carried {friend} on {his} back.",
                "{name} turned back and helped {friend} to stand up.",
            ),
            (
                "They came in last, but everyone cheered for them.",
                "They did not win, but everyone clapped when they arrived.",
            ),
        ),
        (
            "{name} learned that a friend is worth more than a prize.",
            "{name} learned that helping is better than winning.",
        ),
        ("rabbit", "penguin"),
    ),
    Plot(
        (
            (
                "{time}, {name} broke the wooden boat that belonged to a {friend_kind} named {friend}.",
                "{time}, {name} borrowed a wooden boat from a {friend_kind} named {friend} and broke it.",
            ),
            ("{He} was ashamed and hid it {spot}.", "{He} did not dare to say a word and hid it {spot}."),
            ("But {he} could not eat and could not sleep.", "But all day {he} felt bad."),
            (
                'At last {name} told the truth and said, "I am sorry."',
                'The next day, {name} went to {friend} and said, "It was my fault."',
            ),
            (
                "{friend} was not angry, and they mended the wooden boat together.",
                '"Thank you for telling me," said {friend}, and they mended the wooden boat together.',
            ),
        ),
        ("{name} learned that the truth makes the heart light.", "{name} learned that it is brave to say sorry."),
        ("bear", "lion"),
    ),
    Plot(
        (
            ("{time}, {name} planted a small seed.", "{time}, {name} put a seed in the ground and gave it water."),
            (
                "{He} waited for three days, but nothing grew.",
                "Every day {he} looked at it, but there was only brown earth.",
            ),
            ("{He} wanted to dig it up.", "{He} was so angry that {he} wanted to throw it away."),
            MEETING,
            ('"Give it time," said {friend}. "Good things grow slowly."', '"Wait a little longer," said {friend}.'),
            (
                "A week later, a green leaf came out, and then a tall sunflower.",
                "After many days, a beautiful flower opened in the sun.",
            ),
        ),
        ("{name} learned to be patient.", "{name} learned that good things need time."),
        ("fox", "otter"),
    ),
)
