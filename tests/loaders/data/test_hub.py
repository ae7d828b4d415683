import json

import pytest

from regrad_loaders.data.hub import read_hub
from regrad_loaders.training.recipe import Recipe
from regrad_loaders.training.trainer import load_sources
from regrad_qdrant.errors import DataError

FIELDS = {"question": "question", "answers": "answers.text", "passages": "context", "id": "id"}
ROWS = [
    {"id": "a", "question": "Who bakes?", "answers": {"text": ["Ida", "Ida"]}, "context": "Ida is a baker."},
    {"id": "b", "question": "Who rows?", "answers": {"text": []}, "context": "Ida is a baker."},
    {"id": "c", "question": "What is Ida?", "answers": {"text": ["a baker"]}, "context": "Ida is a baker."},
    {"id": "d", "question": "Who sings?", "answers": {"text": ["Tom"]}, "context": "Tom is a singer of old songs."},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "data"


def test_a_dataset_is_read_by_its_fields(folder):
    data = read_hub(str(folder), "train", FIELDS)
    assert [question.id for question in data.questions] == ["a", "c", "d"]  # b has no answer
    assert data.questions[0].answers == ("Ida",) and data.questions[0].split == "train"
    texts = {passage.id: passage.text for passage in data.passages}
    assert sorted(texts.values()) == ["Ida is a baker.", "Tom is a singer of old songs."]
    assert [texts[question.gold_ids[0]] for question in data.questions][2].startswith("Tom")


def test_a_field_may_lie_in_a_list_of_objects(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    row = {"q": "Who?", "answer": "Ida", "ctxs": [{"title": "x", "text": "Ida."}, {"title": "y", "text": "Tom."}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = read_hub(str(tmp_path), "train", {"question": "q", "answers": "answer", "passages": "ctxs.text"})
    assert [passage.text for passage in data.passages] == ["Ida.", "Tom."] and len(data.questions[0].gold_ids) == 2


def test_a_recipe_takes_it_and_never_trains_on_dev(folder, tokenizer, tmp_path):
    path = tmp_path / "recipe.yaml"
    settings = "name: a\nbase_model: b\nspace: core\nrank: 4\nbasis_rank: 4\nlora_alpha: 8\ntargets: [up_proj]\n"
    mapped = ", ".join(f"{field}: {at}" for field, at in FIELDS.items())
    source = f"{{hub: {folder}, fields: {{{mapped}}}, weight: 1.0"
    path.write_text(f"{settings}layers: [0, 1]\ndata:\n  - {source}}}\n")
    sources, weights = load_sources(Recipe.load(path), tokenizer)
    assert len(sources[0].entries) == 3 and weights == [1.0]
    path.write_text(f"{settings}layers: [0, 1]\ndata:\n  - {source}, split: validation}}\n")
    with pytest.raises(DataError, match="never for training"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "question", "answers": "answers"}, "missing .'passages'"),
        (FIELDS | {"answers": "answers.texts"}, "no field 'answers.texts'; at 'texts' there is text"),
        (FIELDS | {"answer": "answers"}, "unknown .'answer'"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(folder, fields, message):
    with pytest.raises(DataError, match=message):
        read_hub(str(folder), "train", fields)


def test_an_id_that_several_rows_share_is_no_id(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row | {"id": "art"}) + "\n" for row in ROWS))
    with pytest.raises(DataError, match="row 2: the id 'art' is an earlier row's"):
        read_hub(str(folder), "train", FIELDS)


def test_what_can_not_be_loaded_is_named(folder):
    with pytest.raises(DataError, match="can't load .*split 'tests'"):
        read_hub(str(folder), "tests", FIELDS)
