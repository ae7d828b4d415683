import re
from collections import Counter

import pytest

from regrad_loaders.data.facts import ATTRIBUTES, _families, generate
from regrad_qdrant.errors import DataError


def names_of(world):
    """First and family name of whom each passage is about."""
    family = "|".join(_families("demo"))
    return [re.search(rf"(\w+) ({family})\b", passage.text).groups() for passage in world.passages]


def test_a_world_is_the_same_each_time_and_another_with_another_seed():
    assert generate("demo", 10, 1) == generate("demo", 10, 1) != generate("demo", 10, 2)


def test_every_answer_stands_in_its_gold_passage_and_nowhere_with_that_name():
    world = generate("demo", 60, 1)
    texts = {passage.id: passage.text for passage in world.passages}
    for question in world.questions:
        [answer], [gold] = question.answers, question.gold_ids
        assert answer in texts[gold]
    assert len(set(names_of(world))) == 60


def test_the_worlds_share_no_family_name_and_the_demo_has_values_of_its_own():
    def words(world):
        return {word.strip(".,?'s") for p in generate(world, 300, 1).passages for word in p.text.split()}

    assert not set(_families("train")) & set(_families("demo"))
    held_out = {value for attribute in ATTRIBUTES for value in attribute.values[::5] if " " not in value}
    assert not held_out & words("train") and held_out & words("demo")


def test_people_share_names_so_that_retrieval_has_near_misses():
    first, family = (Counter(column) for column in zip(*names_of(generate("demo", 60, 1)), strict=True))
    assert max(first.values()) > 1 and max(family.values()) > 1


def test_a_world_has_no_more_people_than_names():
    with pytest.raises(DataError, match="at most 58,?800 people, found 70000"):
        generate("train", 70_000, 1)
    with pytest.raises(DataError, match="at least 1 person"):
        generate("train", 0, 1)
