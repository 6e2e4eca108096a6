"""The things that a prompt names, for detectors: a list of words that part phrases, and no language model."""

from __future__ import annotations

import re

WORDS = re.compile(r"\w[\w'-]*|[^\w\s]")

# Words that belong to no noun phrase. A thing that is not wanted ("without a hat") is named all the same: if it is
# there, that bears on the prompt.
PARTING = """
    a an the this that these those some any each every no another other both all several many few
    one two three four five six seven eight nine ten eleven twelve dozen
    and or but nor while as than
    of in on at to by for from with without into onto over under above below behind beside besides between among
    around near along across through inside outside beneath underneath against upon within toward towards off up down
    left right top bottom front back side next middle center centre close far opposite
    is are was were be been being has have had does do there here who which whose where when what
    it its he him his she her they them their i me my we us our you your
    wearing holding standing sitting riding eating playing running walking looking flying lying hanging carrying using
    sleeping reading drinking jumping swimming driving resting leaning floating facing covered filled surrounded made
    placed parked featuring containing showing depicting
    very not only also together
"""
# Words for the picture, or for a number of things, that name nothing where "of" follows.
HOLDERS = """
    photo photograph picture image painting drawing sketch illustration render rendering portrait view close-up closeup
    shot group pair couple bunch row stack pile set number lot lots kind type
"""


def noun_phrases(prompt: str) -> list[str]:
    """The phrases of an English ``prompt`` that name things, in lower case and order, each once; perhaps none.

    Words are parted at articles, numbers, prepositions, common verbs and punctuation; what an unknown verb joins stays
    one phrase, and an adjective that stands alone becomes one.

    >>> noun_phrases("A photo of two red apples to the left of a wooden bowl")
    ['red apples', 'wooden bowl']
    """
    phrases: list[str] = []
    words: list[str] = []
    for word in [*WORDS.findall(prompt.lower()), "."]:
        if word[0].isalpha() and word not in PARTING.split():
            words.append(word)
            continue
        if words and not (word == "of" and words[-1] in HOLDERS.split()):
            phrases.append(" ".join(words))
        words = []
    return list(dict.fromkeys(phrases))
