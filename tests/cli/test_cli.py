"""Commands on the tiny model: what they write, and how they refuse."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import tiny_initialization, tiny_model

from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.evaluate import _of_others
from regrad_qdrant import MetaInitialization
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.bank.stores.base import PayloadWrite
from regrad_qdrant.cli import app as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A base model, its initialization, a corpus and questions."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model(max_position_embeddings=2048)  # for questions of all texts
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tiny_initialization(model).save(folder / "init")
    tiny_initialization(model, "lora").save(folder / "lora")
    other = tiny_model(seed=4, max_position_embeddings=2048)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    world = generate("demo", 12, 1, questions_per_person=1)
    rows = [{"id": p.id, "text": p.text, "state": str(i % 2)} for i, p in enumerate(world.passages)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        {
            "id": q.id,
            "question": q.question,
            "answers": q.answers,
            "gold_ids": q.gold_ids,
            "split": "dev",
            "state": str(i % 2),
        }
        for i, q in enumerate(world.questions)
    ]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns its exit code, output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QDRANT_URL", raising=False)

    def run(*arguments, model="model", init=True):
        command = [str(argument) for argument in arguments]
        if command[0] in ("ingest", "ask", "eval"):
            command += ["--model", str(folder / model)]
        if init and command[0] in ("ingest", "ask", "eval", "status", "recode", "drop"):
            command += ["--init", str(folder / "init")]
        monkeypatch.setattr(sys, "argv", ["regrad-qdrant", *command])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def ingested(run, folder):
    return run(
        "ingest", "--corpus", folder / "corpus.jsonl", "--collection", "docs", "--path", "bank", "--json", "in.json"
    )


def ingest(run, folder):
    """A bank in the present folder: a copy of the first one."""
    if not (folder / "bank").exists():
        assert ingested(run, folder)[0] == 0
        shutil.copytree("bank", folder / "bank")
    elif not Path("bank").exists():
        shutil.copytree(folder / "bank", "bank")


def asked_of(folder):
    """The command that asks the folder's questions of its corpus."""
    return "eval", "--corpus", folder / "corpus.jsonl", "--qa", folder / "qa.jsonl"


def test_from_corpus_to_answers_and_back(run, folder, tmp_path):
    code, out, err = ingested(run, folder)
    assert code == 0 and "12 points added, 0 updated, 12 atoms written" in out, err
    report = json.loads((tmp_path / "in.json").read_text())
    assert report["atoms_written"] == 12 and report["documents_per_second"] > 0

    code, out, _ = ingested(run, folder)
    assert code == 0 and "0 points added, 0 updated, 0 atoms written, 12 present" in out

    code, out, _ = run("status", "--collection", "docs", "--path", "bank", "--json", "status.json")
    status = json.loads((tmp_path / "status.json").read_text())
    names = ["points", "atoms", "missing", "stale", "space", "codec", "bytes_per_atom"]
    assert code == 0 and list(status)[:7] == names
    assert [status[name] for name in ("without_text", "damaged", "orphans")] == [0, 0, 0]
    assert (status["points"], status["atoms"], status["missing"], status["codec"]) == (12, 12, 0, DEFAULT_CODEC)
    assert 0 < status["bytes_per_atom"]["median"] <= status["bytes_per_atom"]["max"]

    code, out, _ = run(
        "ask", "Who is Ida?", "--collection", "docs", "--path", "bank", "--mode", "regrad+icl", "--json", "ask.json"
    )
    answer = json.loads((tmp_path / "ask.json").read_text())
    assert code == 0 and answer["mode"] == "regrad+icl" and set(answer["timings"]) >= {"search", "generate", "restore"}

    code, out, _ = run("recode", "--collection", "docs", "--path", "bank", "--codec", "sparse", "--json", "recode.json")
    recoded = json.loads((tmp_path / "recode.json").read_text())
    assert code == 0 and "12 atoms recoded, 0 were as coarse already, 0 failed" in out
    assert recoded["after"]["codec"] == "sparse" and recoded["recoded"] == 12
    assert set(recoded["before"]) == {"atoms", "codec", "bytes_per_atom"}

    code, out, _ = run("drop", "--collection", "docs", "--path", "bank", "--yes")
    assert code == 0 and "12 atoms removed" in out
    run("status", "--collection", "docs", "--path", "bank", "--json", "status.json")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["points"], status["atoms"], status["missing"]) == (12, 0, 12)

    code, out, _ = run("ingest", "--from-collection", "docs", "--path", "bank", "--codec", "int8")
    assert code == 0 and "0 points added, 0 updated, 12 atoms written" in out


def test_eval_writes_the_contract(run, folder, tmp_path):
    code, out, err = run(
        *asked_of(folder), "--split", "dev", "--limit", "3",
        "--modes", "direct,rag,regrad,random", "--filter-field", "state", "--json", "out.json",
        "--predictions", "lines.jsonl",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result) == {"settings", "results", "recall_at_k", "intervals"} and 0 <= result["recall_at_k"] <= 1
    rows = {(row["mode"], row["type"]): row for row in result["results"]}
    assert {mode for mode, _ in rows} == {"direct", "rag", "regrad", "random"}
    for row in rows.values():
        assert set(row) == {"mode", "type", "n", "f1", "em", "accuracy", "seconds", "prompt_tokens"}
        assert row["n"] == 3 and 0 <= row["f1"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert set(lines[0]) == {"id", "mode", "question", "answers", "prediction", "f1", "em", "hits"}
    assert not (tmp_path / "regrad_bank").exists()


def test_eval_compares_modes_with_controls_and_draws_them(run, folder, tmp_path):
    modes = "rag,pe-rag,regrad,regrad+icl,ft-direct,ft-rag,raw"
    code, out, err = run(
        *asked_of(folder), "--limit", "4", "--modes", modes,
        "--icl-init", folder / "init", "--ft-direct", folder / "init", "--ft-rag", folder / "init",
        "--against", "raw,rag", "--distractors", "2", "--top-k", "1",
        "--json", "out.json", "--plot", "bars.png", "--predictions", "lines.jsonl",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in result["intervals"]] == modes.split(",")
    pairs = [(mode, other) for other in ("raw", "rag") for mode in modes.split(",") if mode != other]
    assert [(row["mode"], row["minus"]) for row in result["differences"]] == pairs
    for row in result["differences"]:
        assert row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1]
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert all(len(line["hits"]) == (0 if line["mode"] == "ft-direct" else 3) for line in lines)
    assert "Paired over the same questions" in out
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_eval_runs_what_gradients_are_compared_with(run, folder, tmp_path):
    modes = "cpt,instruction-cpt,ft-cpt,prag,ft-prag,rag-kv,ft-rag-kv,ft-rag-64,ft-rag-128/grounded"
    code, out, err = run(
        *asked_of(folder), "--limit", "3", "--modes", modes,
        "--ft-direct", folder / "lora", "--ft-rag", folder / "init", "--json", "out.json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in result["intervals"]] == modes.split(",")
    assert set(result["stored"]) == {"prag", "ft-prag", "rag-kv", "ft-rag-kv"}
    few = [mode for mode, kept in result["stored"].items() if kept["documents"] < 4 or kept["bytes"] < 1000]
    assert few == []
    assert "ft-rag-kv: " in out and " s each to make" in out
    code, _, err = run("eval", "--collection", "docs", "--qa", folder / "qa.jsonl", "--modes", "cpt")
    assert code == 2 and "no collection" in err
    code, _, err = run(*asked_of(folder), "--modes", "rag-kv/auto")
    assert code == 2 and "unknown modes" in err


def test_a_new_bank_is_filled_for_the_gradients_and_not_for_a_baseline(run, folder, tmp_path):
    shorter = replace(MetaInitialization.load(folder / "init"), max_length=64)  # another space, so other atoms
    shorter.save(tmp_path / "baseline")
    code, _, err = run(
        *asked_of(folder), "--limit", "3",
        "--collection", "docs", "--modes", "ft-rag,regrad+icl", "--ft-rag", "baseline", "--json", "out.json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in result["intervals"]] == ["ft-rag", "regrad+icl"]
    assert result["settings"]["codec"] == DEFAULT_CODEC
    code, _, err = run("status", "--collection", "docs", "--json", "status.json")
    assert code == 0, err
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["atoms"] == status["points"] == 12


def test_a_passage_that_can_have_no_atom_does_not_end_an_eval(run, folder, tmp_path):
    rows = (folder / "corpus.jsonl").read_text() + "\n" + json.dumps({"id": "title", "text": "Ida"})
    (tmp_path / "with_title.jsonl").write_text(rows)
    code, _, err = run(
        "eval", "--corpus", "with_title.jsonl", "--qa", folder / "qa.jsonl", "--limit", "4", "--top-k", "13",
        "--modes", "regrad,random", "--json", "out.json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "out.json").read_text())["recall_at_k"] == 1


def test_eval_asks_with_further_k(run, folder, tmp_path):
    code, out, err = run(
        *asked_of(folder), "--limit", "3", "--top-k", "2",
        "--modes", "direct,regrad", "--sweep", "4,1", "--json", "out.json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["top_k"], row["mode"]) for row in result["sweep"]] == [(1, "regrad"), (4, "regrad")]
    assert {row["mode"] for row in result["results"]} == {"direct", "regrad"} and "F1 and k" in out
    code, _, err = run("eval", "--qa", "qa.jsonl", "--corpus", "c.jsonl", "--sweep", "0,3")
    assert code == 2 and "--sweep wants positive whole numbers" in err


def test_eval_goes_on_from_what_was_answered_before_it_was_stopped(run, folder, tmp_path):
    shared = (*asked_of(folder), "--limit", "4")
    whole = (*shared, "--modes", "direct,regrad", "--sweep", "1", "--json")
    code, _, err = run(*whole, "one.json", "--resume", "kept.jsonl")
    assert code == 0, err
    lines = (tmp_path / "kept.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4 * 3  # the settings; direct and regrad, and regrad with the other k
    cut = b"".join(lines[:7]) + lines[7][:20]  # stopped in the middle of a line
    (tmp_path / "kept.jsonl").write_bytes(cut)
    code, _, err = run(*whole, "two.json", "--resume", "kept.jsonl")
    assert code == 0, err
    again = (tmp_path / "kept.jsonl").read_bytes()
    assert again.startswith(b"".join(lines[:7])) and len(again.splitlines()) == len(lines)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["intervals"] == two["intervals"] and one["sweep"] == two["sweep"]
    code, _, _ = run(*shared, "--modes", "regrad", "--resume", "kept.jsonl")  # fewer modes: all of it is there
    assert code == 0 and (tmp_path / "kept.jsonl").read_bytes() == again
    code, _, err = run(*shared, "--modes", "regrad", "--codec", "fp32", "--resume", "kept.jsonl")
    assert code == 2 and "of other settings (asked_codec)" in err
    for other in ("{}\n", '{"my": "data"}'):
        (tmp_path / "other.jsonl").write_text(other)
        code, _, err = run(*shared, "--modes", "regrad", "--resume", "other.jsonl")
        assert code == 2 and "is no journal" in err and (tmp_path / "other.jsonl").read_text() == other


def test_what_was_made_of_the_corpus_is_not_made_again_for_answers_that_are_there(run, folder, tmp_path, monkeypatch):
    asked = (*asked_of(folder), "--limit", "2", "--modes",
             "cpt,rag-kv", "--resume", "kept.jsonl", "--json")  # fmt: skip
    code, _, err = run(*asked, "one.json")
    assert code == 0, err
    monkeypatch.setattr("regrad_loaders.evaluation.making.continued", None)
    code, out, err = run(*asked, "two.json")
    assert code == 0, err
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["intervals"] == two["intervals"] and one["stored"] == two["stored"] and "rag-kv" in two["stored"]
    assert "rag-kv: " in out


def test_eval_answers_from_the_passages_that_were_retrieved_for_each_question(run, tmp_path):
    passages = ["Ada lives in Oslo by the sea.", "Bo lives in Rome.", "Cy sells tea."]
    rows = [
        {"question": f"Where does {name} live?", "answer": "Oslo", "passages": passages[::-1]} for name in ("Ada", "Bo")
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    asked = ("eval", "--qa", "dev.json", "--modes", "rag,regrad", "--top-k", "2", "--retrieved", "--predictions",
             "lines.jsonl")  # fmt: skip
    code, _, err = run(*asked)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    expected = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in passages[::-1][:2]]
    assert len(lines) == 4 and all(line["hits"] == expected for line in lines)
    code, _, err = run(*asked, "--oracle")
    assert code == 2 and "either --oracle or --retrieved" in err


@pytest.mark.parametrize("faster", [True, False])
def test_a_type_that_the_processor_is_slow_in_is_warned_of(run, folder, monkeypatch, faster):
    monkeypatch.setattr("regrad_qdrant.model.base_model.multiplies_16_bits_faster", lambda: faster)
    code, out, err = run(*asked_of(folder), "--limit", "2", "--modes", "direct", "--dtype", "bfloat16")
    assert code == 0 and ("more slowly than in float32" in out) is not faster, err


def test_eval_warns_of_a_codec_that_no_training_has_seen(run, folder):
    code, out, err = run(*asked_of(folder), "--limit", "2", "--codec", "ternary", "--modes", "regrad")
    assert code == 0 and "not through ternary" in out, err


def test_eval_does_not_go_on_with_other_contents(run, folder, tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes((folder / "corpus.jsonl").read_bytes())
    asked = ("eval", "--corpus", "corpus.jsonl", "--qa", folder / "qa.jsonl", "--limit", "2", "--modes", "direct",
             "--resume", "kept.jsonl")  # fmt: skip
    assert run(*asked)[0] == 0
    kept = tmp_path / "kept.jsonl"
    kept.write_text(kept.read_text().replace('"retrieved": false, ', "", 1))  # as before there was that option
    assert "retrieved" not in kept.read_text()
    assert run(*asked)[0] == 0
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('\n{"id": "more", "text": "One more."}')
    code, _, err = run(*asked)
    assert code == 2 and "of other settings (contents)" in err


def test_random_atoms_are_of_documents_that_other_questions_found(run, folder, tmp_path):
    code, _, err = run(
        *asked_of(folder), "--limit", "4", "--top-k", "2",
        "--modes", "regrad,random", "--predictions", "lines.jsonl",
    )  # fmt: skip
    assert code == 0, err
    gold = {row["id"]: row["gold_ids"] for row in map(json.loads, (folder / "qa.jsonl").read_text().splitlines())}
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    found = {line["id"]: line["hits"] for line in lines if line["mode"] == "regrad"}
    drawn = {line["id"]: line["hits"] for line in lines if line["mode"] == "random"}
    everything = {key for keys in found.values() for key in keys}
    assert list(found) == list(drawn) and all(len(keys) == 2 for keys in drawn.values())
    for question, keys in drawn.items():
        assert not set(keys) & {*found[question], *gold[question]} and set(keys) <= everything


def test_the_draw_of_random_documents_does_not_depend_on_the_order_of_equal_hits():
    questions = [Question(f"q{i}", "?", ("a",)) for i in range(4)]
    used = [{f"{letter}{i}": 1.0 for letter in "abc"} for i in range(4)]
    turned = [dict(reversed(points.items())) for points in used]
    assert _of_others(None, questions, used) == _of_others(None, questions, turned)


def test_eval_samples_questions_and_takes_one_type(run, folder, tmp_path):
    asked = []
    for _ in range(2):
        code, _, err = run(
            *asked_of(folder), "--modes", "init",
            "--sample", "3", "--predictions", "lines.jsonl",
        )  # fmt: skip
        assert code == 0, err
        asked.append([json.loads(line)["id"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()])
    every = [json.loads(line)["id"] for line in (folder / "qa.jsonl").read_text().splitlines()]
    assert asked[0] == asked[1] and len(set(asked[0])) == 3 and asked[0] != every[:3]
    assert asked[0] == [key for key in every if key in asked[0]]


def test_eval_tells_types_of_questions_apart(run, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()][:4]
    for row, of_type in zip(rows, ("place", "place", "yesno", "open"), strict=True):
        row["type"] = of_type
    (tmp_path / "typed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    typed = ["eval", "--corpus", folder / "corpus.jsonl", "--qa", tmp_path / "typed.jsonl", "--modes", "init"]
    code, out, err = run(*typed, "--json", "out.json")
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["type"], row["n"]) for row in result["types"]] == [("place", 2)]
    found = {row["type"]: row for row in result["results"]}
    assert {name: row["n"] for name, row in found.items()} == {"all": 4, "open": 3, "yesno": 1}
    assert found["yesno"]["accuracy"] is not None and found["open"]["accuracy"] is None and "place" in out
    code, _, err = run(*typed, "--type", "place", "--json", "out.json")
    assert code == 0 and json.loads((tmp_path / "out.json").read_text())["results"][0]["n"] == 2
    code, _, err = run(*typed, "--type", "poem")
    assert code == 2 and "no questions of type 'poem'; types found: ['open', 'place', 'yesno']" in err


def test_gradients_of_others_stand_for_as_many_as_the_gold_passages(run, folder, tmp_path):
    code, _, err = run(
        *asked_of(folder), "--limit", "1", "--oracle",
        "--modes", "regrad,random", "--predictions", "lines.jsonl",
    )  # fmt: skip
    assert code == 0, err
    right, wrong = (json.loads(line)["hits"] for line in (tmp_path / "lines.jsonl").read_text().splitlines())
    assert len(right) == len(wrong) == 1 and right != wrong  # from the whole bank: there is no other question


def test_eval_can_be_given_the_gold_passages(run, folder, tmp_path):
    code, _, err = run(
        *asked_of(folder), "--limit", "4", "--modes", "regrad",
        "--oracle", "--predictions", "lines.jsonl",
    )  # fmt: skip
    assert code == 0, err
    gold = {row["id"]: row["gold_ids"] for row in map(json.loads, (folder / "qa.jsonl").read_text().splitlines())}
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert all(line["hits"] == list(gold[line["id"]]) for line in lines)


def test_help_teaches_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "ingest", "status", "ask", "eval", "train", "drop"):
        assert command in out
        assert run(command, "--help")[0] == 0
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, version("regrad-qdrant"))


def test_a_bank_is_copied_to_another_folder(run, folder, tmp_path):
    ingest(run, folder)
    place = ("migrate", "--collection", "docs", "--path", "bank")
    code, out, err = run(*place, "--to-path", "other", "--json", "copy.json")
    assert code == 0 and "12 points: 12 written, 0 there already, 0 not as they were" in out, err
    code, out, _ = run(*place, "--to-path", "other")
    assert code == 0 and "0 written, 12 there already" in out
    run("status", "--collection", "docs", "--path", "other", "--json", "status.json")
    assert json.loads((tmp_path / "status.json").read_text())["atoms"] == 12
    for wrong, message in (((), "either --to-url or --to-path"), (("--to-path", "bank"), "the same collection")):
        code, _, err = run(*place, *wrong)
        assert code == 2 and message in err


def test_atoms_beside_the_documents(run, folder, tmp_path):
    place = ("--collection", "docs", "--path", "bank")
    code, out, err = run("ingest", "--corpus", folder / "corpus.jsonl", *place, "--sidecar", "atoms")
    assert code == 0 and "12 atoms written" in out, err
    code, out, _ = run("ask", "Who is Ida?", *place, "--sidecar", "atoms")
    assert code == 0
    run("status", *place, "--json", "found.json")  # by itself
    run("status", *place, "--sidecar", "atoms", "--json", "beside.json")
    run("status", *place, "--sidecar", "others", "--json", "others.json")
    found = [json.loads((tmp_path / f"{name}.json").read_text())["atoms"] for name in ("found", "beside", "others")]
    assert found == [12, 12, 0]
    code, out, _ = run("migrate", *place, "--to-path", "copy")
    assert code == 0 and "its atoms are in 'atoms': migrate that too" in out


def test_a_servers_large_collection_gets_a_sidecar_unless_told_otherwise(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("regrad_qdrant.cli.ingest.IN_PLACE", 10)
    monkeypatch.setattr("regrad_qdrant.bank.stores.edge.EdgeStore.copies_points", True)
    ingest(run, folder)
    run("drop", "--collection", "docs", "--path", "bank", "--yes")
    place = ("ingest", "--from-collection", "docs", "--path", "bank")
    code, out, err = run(*place, "--dry-run")
    assert code == 0 and "sidecar 'docs-regrad'" in out and not (tmp_path / "bank" / "docs-regrad").exists(), err
    code, out, err = run(*place)
    assert code == 0 and "sidecar 'docs-regrad'" in out and "12 atoms written" in out, err
    code, out, _ = run(*place)
    assert code == 0 and "0 atoms written, 12 present" in out
    code, out, _ = run(*place, "--in-place")
    assert code == 0 and "12 atoms written" in out
    code, out, _ = run(*place)
    assert code == 0 and "Consider --sidecar docs-regrad" in out and "12 present" in out


def test_atoms_of_another_initialization_are_replaced_where_they_are(run, folder, tmp_path, monkeypatch):
    ingest(run, folder)
    monkeypatch.setattr("regrad_qdrant.cli.ingest.IN_PLACE", 10)
    monkeypatch.setattr("regrad_qdrant.bank.stores.edge.EdgeStore.copies_points", True)
    monkeypatch.setattr("regrad_qdrant.bank.collection.AtomCollection.count_atoms", lambda self: 0)
    monkeypatch.setattr("regrad_qdrant.bank.collection.AtomCollection.notes_other_spaces", lambda self: True)
    code, out, err = run("ingest", "--from-collection", "docs", "--path", "bank", "--replace")
    assert code == 0 and "Consider --sidecar docs-regrad" in out, err
    assert not (tmp_path / "bank" / "docs-regrad").exists()


def test_a_cluster_warns_and_reports_as_one_process_does(run, folder, tmp_path, monkeypatch):
    from regrad_qdrant.bank.cluster import ClusterReport

    def done(bank, initialization, load, opening, codec, cluster, advance, **options):
        return ClusterReport(atoms_written=11, skipped={"p3": "can't be computed"}, workers=2, waiting=0.25, restarts=1)

    monkeypatch.setattr("regrad_qdrant.bank.cluster.attach_on_cluster", done)
    (tmp_path / "fewer.jsonl").write_text("\n".join((folder / "corpus.jsonl").read_text().splitlines()[:10]))
    ingest(run, folder)
    filled = ("--corpus", "fewer.jsonl", "--collection", "docs", "--path", "bank")
    code, out, err = run("ingest", *filled, "--ray", "local", "--workers", "2", "--codec", "ternary")
    assert code == 1, err
    assert "2 other points of the collection stay" in out
    assert "not through ternary" in out and "11 atoms written" in out
    assert "2 workers, which had nothing to do 25% of the time; 1 batches begun anew" in out


def test_a_repeated_using_searches_by_several_vectors(run, folder):
    ingest(run, folder)
    asked = ("ask", "Who is Ida?", "--collection", "docs", "--path", "bank")
    code, out, err = run(*asked, "--using", "bm25", "--using", "bm25")
    assert code == 0, err
    code, _, err = run(*asked, "--using", "bm25", "--using", "dense")
    assert code == 2 and "no vector 'dense'" in err


CORPUS_ERRORS = [
    ('{"id": 7, "text": "x"}', "field 'id' must be a string; found 7"),
    ('{"id": "a"}', "field 'text' must be a string; found the fields id"),
    ('{"id": "a", "text": " "}', "is empty"),
    ('{"id": "a", "text": "a"}', "1 token"),
    ("{", "not valid JSON"),
    ('{"id": "a", "text": "x \\ud800 y"}', "no valid Unicode"),
    (b'{"id": "a", "text": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), CORPUS_ERRORS)
def test_a_bad_corpus_is_one_line_and_changes_nothing(run, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    code, _, err = run("ingest", "--corpus", "bad.jsonl", "--collection", "docs", "--path", "bank")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "bank" / "docs").exists()


def test_a_corpus_is_refused_with_all_that_is_wrong_and_leaves_no_collection(run, folder, tmp_path):
    rows = [{"id": f"p{i}", "text": text} for i, text in enumerate(["Ida is a baker", "a", "b", "c", "d", "e", "f"])]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run("ingest", "--corpus", "short.jsonl", "--collection", "few", "--path", "bank")
    assert code == 2 and all(f"'p{i}'" in err for i in (1, 5)) and "and 1 more" in err
    arguments = ("--corpus", folder / "corpus.jsonl", "--collection", "few", "--path", "bank")
    code, _, err = run("ingest", "--corpus", folder / "corpus.jsonl", "--collection", "", "--path", "bank")
    assert code == 2 and "'' is no collection name" in err
    code, _, err = run("ingest", *arguments, "--language", "klingon")
    assert code == 2 and "klingon" in err and not (tmp_path / "bank" / "few").exists()


def test_two_shards_fill_a_collection(run, folder):
    run("ingest", "--corpus", folder / "corpus.jsonl", "--collection", "docs", "--path", "bank")
    run("drop", "--collection", "docs", "--path", "bank", "--yes")
    found = [run("ingest", "--from-collection", "docs", "--path", "bank", "--shard", f"{i}/2") for i in range(2)]
    assert [code for code, _, _ in found] == [0, 0] and all(" 0 present" in out for _, out, _ in found)
    code, out, _ = run("ingest", "--from-collection", "docs", "--path", "bank")
    assert " 0 atoms written" in out


def test_the_command_starts_without_torch():
    """A help text, or an error of use, is there at once."""
    code = "import sys, regrad_qdrant.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_model_is_refused(run, folder, tmp_path):
    arguments = ("--corpus", folder / "corpus.jsonl", "--collection", "docs", "--path", "bank")
    code, _, err = run("ingest", *arguments, model="other")
    assert code == 2 and "was trained for tiny" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "bank" / "docs").exists()


def test_a_long_text_gets_its_windows_or_is_truncated_and_counted(run, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "a", "text": "Ida works as a baker. " * 60}))
    code, out, _ = run("ingest", "--corpus", "long.jsonl", "--collection", "docs", "--path", "bank")
    assert code == 0 and "1 in windows" in out
    code, out, _ = run(
        "ingest", "--corpus", "long.jsonl", "--collection", "other", "--path", "bank", "--long-texts", "truncate"
    )
    assert code == 0 and "1 truncated" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ask", "x", "--collection", "docs", "--url", "http://127.0.0.1:9"], "can't reach the Qdrant server"),
        (["status", "--collection", "docs", "--url", "http://127.0.0.1:9"], "can't reach the Qdrant server"),
        (["status", "--collection", "none", "--path", "bank"], "no collection 'none'"),
        (["ask", "x", "--collection", "docs", "--path", "bank", "--mode", "magic"], "mode 'magic' is not one of"),
        (
            ["ask", "x", "--collection", "docs", "--path", "bank", "--using", "dense"],
            "no vector 'dense'; search one that it has with --using bm25",
        ),
        (["ask", "x", "--collection", "docs", "--path", "bank", "--type", "choice"], "0 choices"),
        (["ask", " ", "--collection", "docs", "--path", "bank"], "question is empty"),
        (["ask", "x", "--collection", "docs", "--path", "bank", "--merge", "mean"], "merge rule 'mean'"),
        (["ingest", "--collection", "docs"], "give either --corpus"),
        (["ingest", "--corpus", "none.jsonl", "--collection", "docs"], "no such file"),
        (["ingest", "--from-collection", "none", "--path", "bank"], "no collection 'none'"),
        (["ingest", "--from-collection", "docs", "--path", "bank", "--shard", "4/4"], "a shard is I/N"),
        (
            ["ingest", "--corpus", "corpus.jsonl", "--collection", "docs", "--shard", "0/2"],
            "goes with --from-collection",
        ),
        (["ingest", "--from-collection", "docs", "--path", "bank", "--ray", "local", "--dry-run"], "without --ray"),
        (["ingest", "--from-collection", "docs", "--path", "bank", "--workers", "2"], "go with --ray"),
        (["ingest", "--from-collection", "docs", "--collection", "b", "--path", "bank"], "goes with --corpus"),
        (["models", "nonesuch"], "no model 'nonesuch' is known"),
        (["eval", "--qa", "none.jsonl", "--collection", "docs"], "no such file"),
        (["eval", "--qa", "qa.jsonl", "--modes", "regrad", "--against", "rag"], "not among the modes"),
        (["train", "--recipe", "none.yaml"], "can't read the recipe"),
        (["ask", "x", "--collection", "docs", "--path", "bank", "--payload-key", "text"], "payload key 'text'"),
        (["status", "--collection", "..", "--path", "bank"], "must not contain a path"),
        (["ingest", "--from-collection", "docs", "--path", "bank", "--json", "no/such/out.json"], "can't write"),
        (["status", "--collection", "docs", "--path", "bank", "--json", "no/such/out.json"], "can't write"),
        (["ask", "x", "--collection", "docs", "--path", "bank", "--json", "."], "can't write"),
        (
            ["ingest", "--from-collection", "docs", "--path", "bank", "--text-path", "nope"],
            "none of the points has a text",
        ),
        (
            ["ingest", "--from-collection", "docs", "--path", "bank", "--text-path", "nope", "--dry-run"],
            "none of the points has a text",
        ),
        (["ingest", "--corpus", ".", "--collection", "docs"], "a folder, where a file was expected"),
        (["status", "--collection", "none", "--path", "bank"], "in the folder bank"),
        (["status", "--collection", "docs", "--path", "bank", "--text-path", "nope"], "none of the points has a text"),
        (["ingest", "--from-collection", "docs", "--path", "bank", "--language", "klingon"], "klingon"),
        (["eval", "--qa", "qa.jsonl", "--modes", "direct", "--plot", "bars.gif2"], "ends in .png, .svg or .pdf"),
        (["bench", "atoms", "--top-k", ""], "--top-k wants positive whole numbers"),
    ],
)
def test_errors_of_use_are_one_line_and_exit_code_2(run, folder, command, message):
    ingest(run, folder)
    code, _, err = run(*command)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    _, out, _ = run("status", "--collection", "docs", "--path", "bank")
    assert "│ 12     │ 12    │ 0       │ 0" in out


def evaluated(run, tmp_path, *options):
    common = ("--limit", "3", "--json", "eval.json", "--predictions", "said.jsonl")
    modes = () if "--modes" in options else ("--modes", "rag")
    code, out, err = run("eval", *options, *modes, *common)
    assert code == 0, err
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    return json.loads((tmp_path / "eval.json").read_text()), said


def test_gold_passages_are_found_by_a_field_of_ones_own(run, folder, tmp_path):
    """A collection whose documents are named in a field of their own, and whose points are numbered."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    named = [{"id": f"n{i}", "text": row["text"], "meta": {"source": row["id"]}} for i, row in enumerate(rows)]
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, named)))
    files = ("--corpus", tmp_path / "named.jsonl", "--qa", folder / "qa.jsonl")
    unknown, _ = evaluated(run, tmp_path, *files)
    assert unknown["recall_at_k"] is None  # and not 0: no gold id is known there
    known, said = evaluated(run, tmp_path, *files, "--id-field", "meta.source")
    assert known["recall_at_k"] > 0.5 and all(key.startswith("demo-p") for row in said for key in row["hits"])
    evaluated(run, tmp_path, *files, "--id-field", "meta.source", "--oracle")
    code, _, err = run("eval", *files, "--oracle", "--modes", "rag")
    assert code == 2 and "is not in the collection" in err and "--id-field" in err


def test_a_filter_on_a_field_that_is_not_there_is_refused_and_a_nested_one_works(run, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    nested = [{"id": row["id"], "text": row["text"], "meta": {"state": row["state"]}} for row in rows]
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, nested)))
    asked = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    asked = [row | {"meta": {"state": row["state"]}} for row in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    files = ("--corpus", tmp_path / "nested.jsonl", "--qa", tmp_path / "asked.jsonl")
    code, _, err = run("eval", *files, "--filter-field", "state", "--modes", "rag")
    assert code == 2 and "no passage has that field" in err
    _, said = evaluated(run, tmp_path, *files, "--filter-field", "meta.state", "--modes", "random")
    state_of = {row["id"]: row["state"] for row in rows}
    wanted = {row["id"]: row["state"] for row in asked}
    assert said and all(state_of[key] == wanted[row["id"]] for row in said for key in row["hits"])


def test_what_status_advises_is_a_command_that_runs(run, folder):
    ingest(run, folder)
    run("drop", "--collection", "docs", "--path", "bank", "--yes")
    _, out, _ = run("status", "--collection", "docs", "--path", "bank")
    [advice] = [line for line in out.splitlines() if "Attach what is missing" in line]
    program, *command = shlex.split(advice.partition(": ")[2])
    assert program == "regrad-qdrant" and "12 atoms written" in run(*command)[1]


def test_atoms_of_another_initialization_are_told_of(run, folder):
    ingest(run, folder)
    _, out, _ = run("status", "--collection", "docs", "--path", "bank", "--init", folder / "lora", init=False)
    assert "12 points carry atoms of another initialization" in out
    _, out, _ = run("drop", "--collection", "docs", "--path", "bank", "--init", folder / "lora", "--yes", init=False)
    assert "0 atoms removed" in out and "12 points carry atoms of another initialization, which stay" in out


def test_points_that_are_not_in_the_corpus_stay_and_are_told_of(run, folder, tmp_path):
    ingest(run, folder)
    fewer = (folder / "corpus.jsonl").read_text().splitlines()[:10]
    (tmp_path / "fewer.jsonl").write_text("\n".join(fewer))
    _, out, _ = run("ingest", "--corpus", "fewer.jsonl", "--collection", "docs", "--path", "bank")
    assert "0 points added, 0 updated, 0 atoms written" in out and "2 other points of the collection stay" in out


def test_drop_asks_and_where_it_can_not_ask_it_refuses(run, folder):
    ingest(run, folder)
    code, _, err = run("drop", "--collection", "docs", "--path", "bank")
    assert code == 2 and "drop removes 12 atoms: give --yes" in err
    assert "12 atoms removed" in run("drop", "--collection", "docs", "--path", "bank", "--yes")[1]
    assert run("drop", "--collection", "docs", "--path", "bank")[0] == 0  # there is nothing to ask about


def test_documents_without_an_atom_make_exit_code_1(run, folder, tmp_path):
    from regrad_qdrant.bank.documents import point_id
    from regrad_qdrant.bank.stores.edge import EdgeStore

    ingest(run, folder)
    run("drop", "--collection", "docs", "--path", "bank", "--yes")
    store = EdgeStore(tmp_path / "bank" / "docs")
    store.set_payload([PayloadWrite(point_id("demo-p3"), {"text": "a"})])
    store.set_payload([PayloadWrite(point_id("demo-p4"), {"text": ""})])
    store.close()
    code, out, err = run("ingest", "--from-collection", "docs", "--path", "bank")
    assert code == 1 and "10 atoms written" in out and "skipped demo-p3" in err
    assert "1 without text" in out and "demo-p4" not in err
    code, out, err = run("ingest", "--from-collection", "docs", "--path", "bank", "--dry-run")
    assert code == 0 and "1 atoms to write" in out, err


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(run, folder, tmp_path):
    corpus = ("--corpus", folder / "corpus.jsonl", "--collection", "docs", "--path", "bank", "--json", "dry.json")
    code, out, _ = run("ingest", *corpus, "--dry-run")
    said = json.loads((tmp_path / "dry.json").read_text())
    assert code == 0 and "nothing was changed" in out and not (tmp_path / "bank").exists()
    assert (said["points_to_add"], said["atoms_to_write"]) == (12, 12) and said["bytes_to_write"] > 12 * 100
    ingest(run, folder)
    run("ingest", "--from-collection", "docs", "--path", "bank", "--dry-run", "--json", "dry.json")
    assert json.loads((tmp_path / "dry.json").read_text())["atoms_to_write"] == 0
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    rows[0]["text"] += " Later a judge."
    rows.append({"id": "new", "text": "Una is a diver."})
    (tmp_path / "changed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changed = ("--corpus", "changed.jsonl", "--collection", "docs", "--path", "bank", "--json", "dry.json")
    run("ingest", *changed, "--dry-run")
    said = json.loads((tmp_path / "dry.json").read_text())
    assert (said["points_to_add"], said["atoms_to_write"]) == (1, 2) and said["seconds"] > 0


def test_a_dry_run_is_of_the_run_with_these_options(run, folder, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "text": "Una is a diver. " * 60}))
    place, corpus = ("--collection", "docs", "--path", "bank"), ("--corpus", "long.jsonl")
    sizes = {}
    for long_texts in ("window", "truncate", "skip"):
        run("ingest", *corpus, *place, "--dry-run", "--long-texts", long_texts, "--json", "dry.json")
        sizes[long_texts] = json.loads((tmp_path / "dry.json").read_text())["bytes_to_write"]
    assert sizes["window"] > sizes["truncate"] > sizes["skip"] == 0
    ingest(run, folder)
    other = ("ingest", "--from-collection", "docs", "--path", "bank", "--init", folder / "lora", "--dry-run")
    code, _, err = run(*other, init=False)
    assert code == 2 and "12 points carry atoms of another space" in err
    code, _, err = run(*other, "--replace", "--shard", "0/4", "--json", "dry.json", init=False)
    assert code == 0 and json.loads((tmp_path / "dry.json").read_text())["atoms_to_write"] == 3, err


def test_a_refused_corpus_changes_nothing(run, folder, tmp_path):
    wrong = ("ingest", "--corpus", folder / "corpus.jsonl", "--collection", "docs", "--path", "bank")
    assert run(*wrong, "--long-texts", "windw")[0] == 2 and not (tmp_path / "bank").exists()
    ingest(run, folder)
    row = json.loads((folder / "corpus.jsonl").read_text().splitlines()[0])
    (tmp_path / "changed.jsonl").write_text(json.dumps(row | {"text": "Another text altogether."}))
    place = ("--collection", "docs", "--path", "bank")
    code, _, err = run("ingest", "--corpus", "changed.jsonl", *place, "--init", folder / "lora", init=False)
    assert code == 2 and "12 points carry atoms of another space" in err
    run("status", *place, "--json", "status.json")
    assert json.loads((tmp_path / "status.json").read_text())["stale"] == 0


def test_what_is_printed_is_what_was_said(run, folder, tmp_path):
    text = "Una::100:5 is a diver at 10:on:5, " + "and a baker, " * 30
    (tmp_path / "odd.jsonl").write_text(json.dumps({"id": "doc:id:7", "text": text}))
    run("ingest", "--corpus", "odd.jsonl", "--collection", "docs", "--path", "bank")
    _, out, _ = run("ask", "Who is Una?", "-c", "docs", "--path", "bank", "--json", "a.json")
    first, *hits = out.splitlines()
    assert first == json.loads((tmp_path / "a.json").read_text())["answer"]
    assert any("doc:id:7" in line and "10:on:5" in line for line in hits)


def test_a_number_in_a_filter_matches_as_a_number():
    from qdrant_client import QdrantClient, models

    from regrad_qdrant.cli.ask import _filter_of

    client = QdrantClient(":memory:")
    client.create_collection("docs", vectors_config={})
    payloads = [{"n": 3, "x": 2.0, "price": 1.5, "id": 2**60 + 1}, {"n": "3", "x": "2", "price": "1.5", "id": 2**60}]
    client.upsert("docs", [models.PointStruct(id=i, vector={}, payload=payload) for i, payload in enumerate(payloads)])
    for condition, expected in {
        "n=3": [0, 1], "x=2": [0, 1], "x=2.0": [0], "price=1.5": [0, 1], f"id={2**60 + 1}": [0], f"id={2**70}": [],
        "n=nan": [], "n=1e400": [],
    }.items():  # fmt: skip
        found, _ = client.scroll("docs", _filter_of([condition]))
        assert [point.id for point in found] == expected, condition


@pytest.mark.filterwarnings("default:nothing was retrieved")
def test_ask_takes_a_filter(run, folder, tmp_path):
    ingest(run, folder)
    rows = {row["id"]: row for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())}
    everything = " ".join(row["text"] for row in rows.values())
    for state in "01":
        only = ("--filter", f"state={state}", "--json", "a.json")
        code, _, err = run("ask", everything, "-c", "docs", "--path", "bank", *only)
        found = json.loads((tmp_path / "a.json").read_text())
        assert code == 0 and {rows[hit["id"]]["state"] for hit in found["hits"]} == {state}, err
        assert len(found["weights"]) == len(found["hits"]) == 3 and found["notes"] == []
    code, _, err = run("ask", "Who works?", "-c", "docs", "--path", "bank", "--filter", "nosuch=1")
    assert code == 0 and "no point has the filter's field nosuch" in " ".join(err.split())
    assert run("ask", "Who?", "-c", "docs", "--path", "bank", "--filter", "state")[0] == 2
    for text in ("--5", "²"):
        code, _, err = run("ask", "Who works?", "-c", "docs", "--path", "bank", "--filter", f"state={text}")
        assert code == 0 and "no document passes the filter" in " ".join(err.split())
