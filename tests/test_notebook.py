"""The notebook runs top to bottom in its smoke setting, and is the pair of its source."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

COLAB = Path(__file__).parents[1] / "colab"


def test_the_pair_has_the_same_cells():
    source, notebook = jupytext.read(COLAB / "distill_small.py"), nbformat.read(COLAB / "distill_small.ipynb", 4)
    assert [cell.source for cell in source.cells] == [cell.source for cell in notebook.cells]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("AURA_JAX_WORKDIR", str(tmp_path / "run"))
    notebook = jupytext.read(COLAB / "distill_small.py")
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(COLAB.parent)}}
    )
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "12 steps" in printed and printed.count("said:") == 3
