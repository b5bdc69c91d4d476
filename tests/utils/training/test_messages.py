"""What a user watches where there is no terminal."""

import pytest

from utils.core import console


@pytest.mark.parametrize("shown", [True, False])
def test_a_log_file_gets_lines_instead_of_a_bar(shown, monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Progress(1500, "ask, text", "text", shown) as bar:
        for _ in range(3):
            bar.update(500)
            now[0] += 15
    out, err = capfd.readouterr()
    assert out == ("ask, text 1,500 of 1,500\n" if shown else "") and err == ""
