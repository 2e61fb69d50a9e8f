"""Every notebook runs from top to bottom, and its last cell asserts what it claims."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, defaults, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names = {}
    for number, cell in enumerate(code_cells(path)):
        lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
        exec(compile("".join(lines), f"{path.name}, code cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_tidy(path):
    cells = code_cells(path)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert "assert " in "".join(cells[-1]["source"])
    assert "pip install" in "".join(cells[0]["source"])


def test_there_is_a_notebook():
    assert NOTEBOOKS
