"""Questions with their retrieved passages, as the paper's authors keep them."""

import json
import random

import pytest

from regrad_loaders.data.augmented import read_augmented
from regrad_loaders.training.mixture import load_sources
from regrad_loaders.training.recipe import Recipe, Source
from regrad_qdrant.errors import DataError

ROWS = [
    {"question": "Where does Ada live?", "answer": "Oslo", "passages": ["Ada lives in Oslo.", "Bo lives in Rome."]},
    {"qid": 7, "question": "Who rows?", "answer": ["Bo", "Bo Berg"], "passages": [{"passage": "Bo Berg rows at dawn."}],
     "choices": {"A": "Bo", "B": "Ada"}},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "set" / f"{name}.json").write_text(json.dumps(ROWS))
    return tmp_path / "set"


def test_rows_become_questions_and_one_corpus(folder):
    found = read_augmented(folder)
    assert [len(found.split(name)) for name in ("train", "dev")] == [2, 2]
    assert sorted(passage.text for passage in found.passages) == sorted(
        ["Ada lives in Oslo.", "Bo lives in Rome.", "Bo Berg rows at dawn."]
    )
    texts = {passage.id: passage.text for passage in found.passages}
    first, second = found.split("dev")
    assert [texts[key] for key in first.fields["retrieved"]] == ROWS[0]["passages"]
    assert second.answers == ("Bo", "Bo Berg")
    assert (second.kind, second.choices) == ("choice", ("Bo", "Ada"))
    assert len({question.id for question in found.questions}) == 4


def test_files_of_one_split_have_ids_of_their_own_and_an_id_twice_in_a_file_is_refused(folder):
    for name in ("bridge", "comparison"):
        (folder / f"{name}.json").write_text(json.dumps(ROWS))
    found = read_augmented(folder)
    assert len({question.id for question in found.questions}) == len(found.questions) == 8
    (folder / "bridge.json").write_text(json.dumps([ROWS[1], ROWS[1]]))
    with pytest.raises(DataError, match="two questions have the id 'bridge-7'"):
        read_augmented(folder)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"question": "Where?"}, "passages"), ({"passages": ["a"], "question": "Where?"}, "answer"), ("x", "object"),
     ({"question": "Where?", "answer": "a", "passages": [3]}, "a passage is a text")],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_place(folder, wrong, says):
    (folder / "dev.json").write_text(json.dumps([ROWS[0], wrong]))
    with pytest.raises(DataError, match=rf"dev.json, object 1: .*{says}"):
        read_augmented(folder)
    (folder / "dev.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list"):
        read_augmented(folder / "dev.json")


def test_a_recipe_learns_from_them_in_the_order_in_which_they_were_found(folder, tmp_path, tokenizer):
    recipe = Recipe(
        "tiny", "tiny", "lora", 4, 8, ("up_proj",), (1, 2), data=(Source(1.0, data_aug="set"),),
        data_dir=str(tmp_path), passages="retrieved", top_k=(3,),
    )  # fmt: skip
    [source], _ = load_sources(recipe, tokenizer)
    episode = next(iter(source.each(3)))
    assert [tokenizer.decode(ids) for ids in episode.passages] == ROWS[0]["passages"]
    assert source.episode(random.Random(0), 3, 1, [3]).source == "set"
    with pytest.raises(DataError, match="set: the split 'dev' is for evaluation"):
        Source(1.0, data_aug="set", split="dev")
