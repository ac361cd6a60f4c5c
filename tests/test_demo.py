"""The demo runs from data to figures, and says so when the network has not learned enough."""

import pytest

from cover import demo, presets


def test_the_demo_ends_with_table_figures_and_verdict(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    summary, settings = presets.PRESETS["demo-3d"]
    tiny = dict(crop=(16, 16, 8), channels=(4, 8), heads=(1, 1), steps=3, val_samples=2, device="cpu")
    monkeypatch.setitem(presets.PRESETS, "demo-3d", (summary, settings | tiny))
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path / "run")])
    for _ in range(2):  # the second time the finished run is only evaluated
        with pytest.raises(SystemExit, match="does not halve the error"):
            demo.main()
        output = capsys.readouterr().out
        assert "predicting zero" in output
        figures = sorted((tmp_path / "run" / "figures").iterdir())
        assert [figure.name for figure in figures] == ["training.png", "views.png"]
        assert all(str(figure) in output and figure.stat().st_size > 10_000 for figure in figures)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_smoothing_is_a_running_mean():
    assert demo.smooth([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]
