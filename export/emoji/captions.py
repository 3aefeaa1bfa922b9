"""The grammar of captions, from which prompts are made.

Knows words, not images. The wordings of `UNSEEN` are used by the evaluation alone, never in training.
"""

from __future__ import annotations

from random import Random

WITH_COLOUR = (
    "{a} {name} on {a_colour} background",
    "{a} {name} on {colour}",
    "{name} on {colour}",
    "{name}, {colour} background",
    "{name}, {colour}",
    "{colour} background, {name}",
    "{colour} background with {a} {name}",
    "on {a_colour} background, {a} {name}",
    "{a} {name} in front of {a_colour} background",
    "{a} {name} against {a_colour} backdrop",
    "{a} {name} with {a_colour} background",
    "{name}; the background is {colour}",
    "the background is {colour} and there is {a} {name}",
    "{a_colour} picture of {a} {name}",
)
WITHOUT_COLOUR = ("{name}", "{a} {name}", "{a} {name}", "{a} {name} on a plain background", "the {name}")
ONLY_COLOUR = ("{colour}", "{a_colour} background", "{colour} background")
UNSEEN = (
    "please show me {a} {name}, and behind it everything should be {colour}",
    "background in {colour}. subject: {name}",
    "i would like {a} {name} over {a_colour} wall",
    "{colour} all around, {a} {name} in the middle",
    "could you paint {a} {name} standing before a plain {colour} backdrop?",
)
LEADS = ("", "", "", "", "a picture of ", "a drawing of ", "an emoji of ", "an icon of ", "draw ", "a photo of ")
TAILS = ("", "", "", "", ", high quality", ", cute", ", emoji style", ", simple", ", centred", ".", "!")
COLOUR_SYNONYMS = {"purple": ("purple", "purple", "violet"), "black": ("black", "black", "dark black")}

# Words that mean nothing to this model; they teach it to read past what it does not know.
_MEANINGLESS = """
the of and to in is it that for was on are as with they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my
made over did down only way find use may water long little very after words called just where most know get
through back much before also around another came come work three word must because does part even place well
such here take why things help put years different away again off went old number great tell men say small
every found still between name should mr big give air line set own under read last never us left end
along while might next sound below saw something thought both few those always looked large often
together asked turned nice beautiful bright sharp detailed modern funny happy lovely shiny soft
sitting alone centre image scene view colour color
front top clean flat
"""
FILLERS = tuple(_MEANINGLESS.split())


PLURALS = ("grapes", "cherries", "french fries", "fries", "heart eyes")


def article(words: str) -> str:
    if words in PLURALS:
        return "some"
    return "an" if words[:1] in tuple("aeiou") else "a"


def fill(template: str, name: str, colour: str) -> str:
    return template.format(a=article(name), name=name, a_colour=f"{article(colour)} {colour}", colour=colour)


def plain_caption(name: str, colour: str) -> str:
    """The usual wording, as somebody would type it."""
    return fill("{name} on {a_colour} background", name, colour)


def _noise_word(random: Random) -> str:
    """A word without meaning: mostly an English one, sometimes letters."""
    if random.random() < 0.8:
        return random.choice(FILLERS)
    return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(1, 5)))


def _scatter(random: Random, name: str, colour: str) -> str:
    """Name and colour in any order among meaningless words."""
    colour_phrase = random.choice(("{} background", "{}", "on {}", "background {}", "background: {}", "{} backdrop"))
    parts = [name] + ([colour_phrase.format(colour)] if colour else [])
    random.shuffle(parts)
    words: list[str] = []
    for part in parts:
        words += [_noise_word(random) for _ in range(random.randint(0, 4))] + [part]
    return " ".join(words + [_noise_word(random) for _ in range(random.randint(0, 3))])


def caption(random: Random, names: tuple[str, ...], colour: str) -> str:
    """A caption of the training grammar; an empty `colour` is not said, without names only the colour is."""
    spoken = random.choice(COLOUR_SYNONYMS.get(colour, (colour,)))
    if not names:
        return fill(random.choice(ONLY_COLOUR), "x", spoken)
    name = names[0] if random.random() < 0.5 else random.choice(names)
    if random.random() < 0.3:
        return _scatter(random, name, spoken)
    template = random.choice(WITH_COLOUR if colour else WITHOUT_COLOUR)
    return random.choice(LEADS) + fill(template, name, spoken) + random.choice(TAILS)


def unseen_caption(random: Random, name: str, colour: str) -> str:
    """A caption worded as no training caption is."""
    return fill(random.choice(UNSEEN), name, colour)
