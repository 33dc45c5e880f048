from __future__ import annotations

import pytest
from driver import Finished, Nest, World, in_process, select_arguments, tune_arguments
from tiny_models import save_checkpoint, write_data


@pytest.fixture
def nest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nest:
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = save_checkpoint(folder / "model")
    data = write_data(folder / "data")
    selection, patch = folder / "selection", folder / "patch"
    made = []
    for arguments in (
        select_arguments(model, data, selection),
        tune_arguments(model, selection, data, patch),
    ):
        with pytest.MonkeyPatch.context() as monkeypatch:
            made.append(_captured(monkeypatch, [*arguments, "--json"]))
    return World(folder, model, data, selection, patch, *made)


def _captured(monkeypatch: pytest.MonkeyPatch, arguments: list[object]) -> Finished:
    """As `in_process`; capsys is a single test's, this fixture is not."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    out, err = io.StringIO(), io.StringIO()

    class Streams:
        def readouterr(self) -> tuple[str, str]:
            return out.getvalue(), err.getvalue()

    with redirect_stdout(out), redirect_stderr(err):
        return in_process(monkeypatch, Streams())(*arguments)
