"""Tables of an evaluation, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from regrad_loaders.evaluation.results import Evaluation

TYPES_SHOWN = 4  # of a set's own types of questions in a table of scores; where it has more, the JSON alone has them


def answers_table(result: Evaluation, modes: list[Any]) -> Table:
    table = Table(title="The same questions in every mode; what is right is green")
    for name in ("question", "gold", *modes):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width={"question": 34, "gold": 22}.get(name, 15))
    rows: dict[str, dict[str, Any]] = {}
    for prediction in result.predictions:
        rows.setdefault(prediction.id, {})[prediction.mode] = prediction
    for by_mode in rows.values():
        first = next(iter(by_mode.values()))
        cells = [
            f"[green]{_escape(p.prediction)}[/green]" if p.em else _escape(p.prediction)
            for p in (by_mode[mode] for mode in modes)
        ]
        table.add_row(_escape(first.question), _escape(first.answers[0]), *cells)
    return table


def scores_table(result: Evaluation) -> Table:
    by_words = result.of_sentences
    table = Table(
        "mode",
        "type",
        "n",
        "F1",
        "95 %",
        "EM",
        *(["words found"] if by_words else []),
        "accuracy",
        "seconds per answer",
        "prompt tokens",
        title="Scores, 0 to 100",
    )
    ends = {row["mode"]: row["f1_interval"] for row in result.intervals()}
    types = result.types()
    shown = types if len({row["type"] for row in types}) <= TYPES_SHOWN else []
    for row in result.results() + shown:
        table.add_row(
            row["mode"],
            row["type"],
            str(row["n"]),
            f"{100 * row['f1']:.1f}",
            " … ".join(f"{100 * end:.1f}" for end in ends.get(row["mode"], [])) if row["type"] == "all" else "",
            f"{100 * row['em']:.1f}",
            *([f"{100 * row['words_found']:.1f}"] if by_words else []),
            "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}",
            f"{row['seconds'] / row['n']:.2f}",
            f"{row['prompt_tokens']:.0f}",
        )
    if result.recall_at_k is not None:
        table.caption = f"retrieval recall at k: {100 * result.recall_at_k:.1f}"
    return table


def differences_table(result: Evaluation) -> Table:
    table = Table("mode", "minus", "F1", "95 %", title="Paired over the same questions")
    for row in result.differences():
        low, high = (100 * end for end in row["f1_interval"])
        table.add_row(
            _escape(row["mode"]), _escape(row["minus"]), f"{100 * row['f1']:+.1f}", f"{low:+.1f} … {high:+.1f}"
        )
    return table


def sweep_table(result: Evaluation) -> Table:
    """F1 of each mode at every k that it was asked with."""
    by_k = {int(result.settings["top_k"]): result.intervals()} | {k: other.intervals() for k, other in result.sweep}
    modes = [row["mode"] for row in result.sweep[0][1].intervals()]
    table = Table("mode", *(f"k = {k}" for k in sorted(by_k)), title="F1 and k")
    for mode in modes:
        found = [next(row for row in by_k[k] if row["mode"] == mode) for k in sorted(by_k)]
        rows = [[100 * value for value in (row["f1"], *row["f1_interval"])] for row in found]
        table.add_row(_escape(mode), *(f"{f1:.1f} ({low:.1f} … {high:.1f})" for f1, low, high in rows))
    return table


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
