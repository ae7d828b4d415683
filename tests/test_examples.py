"""The notebooks run from top to bottom, with the real model and some of their documents."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's own start


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Those of each notebook, run one notebook after the other in one kernel, which forgets all names in between."""
    whole, cells_of = nbformat.v4.new_notebook(), {}
    for path in NOTEBOOKS:
        cells_of[path] = nbformat.read(path, as_version=4).cells
        for cell in cells_of[path]:
            cell.source = re.sub(r'generate\("demo", \d+,', 'generate("demo", 6,', cell.source)
        whole.cells += [nbformat.v4.new_code_cell(f"%reset -f\n# {path.name}"), *cells_of[path]]
    here = {"metadata": {"path": str(tmp_path_factory.mktemp("notebooks"))}}
    NotebookClient(whole, timeout=600, kernel_name="python3", resources=here).execute()
    return cells_of


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, cells):
    printed = [output.get("text", "") for cell in cells[path] for output in cell.get("outputs", [])]
    assert any("atoms" in text or "bytes" in text for text in printed)


def test_there_are_four():
    assert len(NOTEBOOKS) == 4
