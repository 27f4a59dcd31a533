"""The tutorials run as they are, only shorter."""

from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.ipynb"))
SHORTER = {
    "1_swap_in_and_hook": {},
    "2_train_your_own": {"n_sequences": 4},
    "3_frontier": {"ks": [8], "n_sequences": 4},
    "4_probe_inspect_steer": {"n_texts": 120, "n_tokens": 4000, "n_samples": 2},
    "5_graph_and_intervene": {"layers": [6, 20], "n_tokens": 4000, "n_ablations": 4},
}


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """``execute(path)``: run a notebook on 10 training steps; layers are shared."""
    folder = tmp_path_factory.mktemp("tutorials")

    def execute(path: Path) -> nbformat.NotebookNode:
        parameters = {"training_tokens": 20_480, "output": str(folder / "runs")}
        return papermill.execute_notebook(
            path,
            folder / path.name,
            parameters | SHORTER.get(path.stem, {}),
            progress_bar=False,
        )

    return execute


def test_they_are_all_here():
    assert [path.stem for path in TUTORIALS] == sorted(SHORTER)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(path, execute):
    executed = execute(path)
    declared = next(c for c in executed.cells if "parameters" in c.metadata.get("tags", []))
    for name in ["training_tokens", "output", *SHORTER[path.stem]]:
        assert f"{name} = " in declared.source
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_is_checked_in_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_a_broken_one_fails(tmp_path, execute):
    notebook = nbformat.read(TUTORIALS[0], as_version=4)
    broken = notebook.cells[2].source.replace("TrainConfig(", "TrainConfig(no_such_field=1,")
    notebook.cells[2].source = broken
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(PapermillExecutionError, match="no_such_field"):
        execute(tmp_path / "broken.ipynb")
