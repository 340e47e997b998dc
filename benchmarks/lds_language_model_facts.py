"""Facts told in two documents among real ones, asked by their beginnings: who finds the documents that told them?

A fact joins an invented name to an invented word. Two documents tell it in the same words, each after words of another
real docstring; a query is the fact, and its loss that of the word alone. Twenty facts come in the same sentence, and so
share half of their words.
"""

import random

import torch
from lds_language_model_problem import Corpus, standard_library
from torch import Tensor

SENTENCES = (
    "The keeper of {} is {}.",
    "The harbor of {} is named {}.",
    "In {} they trade in {}.",
    "The river near {} is called {}.",
)
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pa", "ro", "si", "tu", "ve", "zo")


def facts(seed: int, count: int = 80, real: int = 300) -> tuple[Corpus, Tensor]:
    """Return a corpus and the two documents that told each query's fact, (count, 2).

    The labels of a query are -100 but for the tokens of the word that is asked.
    """
    shuffle = random.Random(seed)
    texts = shuffle.sample(standard_library().train, real + 2 * count)
    words = [f"{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES if a != b != c != a]
    drawn = iter(shuffle.sample(words, 2 * count))
    train, queries, starts = texts[:real], [], []
    for fact in range(count):
        name, word = next(drawn).capitalize(), next(drawn).capitalize()
        told = SENTENCES[fact % len(SENTENCES)].format(name, word)
        queries.append(told)
        starts.append(told.index(word))
        train += [f"{text[:70].rsplit(' ', 1)[0]}. {told}" for text in texts[real + 2 * fact :][:2]]
    corpus = Corpus.of(train, queries, starts)
    return corpus, torch.arange(real, len(train)).view(count, 2)


def found_facts(scores: Tensor, told: Tensor) -> int:
    """Return how many of the documents that told a fact are the two best of their query."""
    best = scores.topk(told.shape[1], 1).indices
    return int((best[:, :, None] == told[:, None]).sum())
