"""The notebooks run from top to bottom, with the real model and some of their documents."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's own start


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r'generate\("demo", \d+,', 'generate("demo", 6,', cell.source)
    here = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("atoms" in text or "bytes" in text for text in printed)


def test_there_are_four():
    assert len(NOTEBOOKS) == 4
