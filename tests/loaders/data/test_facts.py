from regrad_loaders.data.facts import ATTRIBUTES, generate


def test_a_world_is_the_same_each_time_and_another_with_another_seed():
    assert generate("demo", 10, 1) == generate("demo", 10, 1) != generate("demo", 10, 2)


def test_every_answer_stands_in_its_gold_passage_and_nowhere_with_that_name():
    world = generate("demo", 60, 1)
    texts = {passage.id: passage.text for passage in world.passages}
    for question in world.questions:
        [answer], [gold] = question.answers, question.gold_ids
        assert answer in texts[gold]
    names = [text.split(" ")[0:2] for text in texts.values()]
    assert len(names) == 60


def test_the_worlds_share_no_family_name_and_the_demo_has_values_of_its_own():
    def words(world):
        return {word.strip(".,?'s") for p in generate(world, 300, 1).passages for word in p.text.split()}

    from regrad_loaders.data.facts import _families

    assert not set(_families("train")) & set(_families("demo"))
    held_out = {value for attribute in ATTRIBUTES for value in attribute.values[::5] if " " not in value}
    assert not held_out & words("train") and held_out & words("demo")


def test_people_share_names_so_that_retrieval_has_near_misses():
    families = [p.text.split(" ") for p in generate("demo", 60, 1).passages]
    assert len(families) == 60
    questions = generate("demo", 60, 1).questions
    surnames = [q.question.split("?")[0].replace("'s", "").split(" ") for q in questions]
    assert len({tuple(words) for words in surnames}) > 60
