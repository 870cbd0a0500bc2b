"""Figures: that they are drawn, whole and always the same, and what the picture of the stages reads from their nets."""
from __future__ import annotations

import pytest

figures = pytest.importorskip("hintkd.results.figures", reason="matplotlib is not installed", exc_type=ImportError)

from hintkd.methods.method import Line, teacher_stages  # noqa: E402
from hintkd.methods.method import stages_of as made  # noqa: E402
from hintkd.results import pictures  # noqa: E402
from hintkd.study.table import find_table  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"
LINES = pictures.lines(dict.fromkeys(["kd", "new-method", "layerwise-hint", "hint-kd", "original", "kd-equal-iterations", "alone"]))
RISING = [(at, 0.5 * at) for at in range(0, 101, 10)]


def stages_of(table: str, row: str, **changed):
    x = find_table(table).changed(changed).experiment(row)
    return x, made(x)


def parts(stages) -> list[dict[str, dict[str, tuple[bool, str]]]]:
    """Per stage and network, the parts that are in the net: whether they are trained, and from which weights."""
    kept = {layer.name for stage in stages for layer in stage.net.layer if stage.keeps(layer.name) or layer.name.startswith("teacher/")}
    return [{role: {part.name: (part.is_trained, part.begun) for part in column.values()}
             for role, column in figures._columns(stage, stage.title == "teacher", kept).items()} for stage in stages]


def losses(stages) -> list[list[tuple[str, list[str]]]]:
    kept = {layer.name for stage in stages for layer in stage.net.layer if stage.keeps(layer.name) or layer.name.startswith("teacher/")}
    return [figures._losses(stage, figures._columns(stage, False, kept)) for stage in stages]


def test_every_figure_is_a_png_and_the_same_each_time(tmp_path):
    def draw(folder):
        accuracy = {"kd": [RISING, RISING], "new-method": [RISING]}
        hints = {"layerwise-hint": {"1": RISING, "2": RISING}, "hint-kd": {"": RISING}}
        bars = [figures.Bar("kd", [90.0, 91.0, 92.0], 90.5, [92.5]), figures.Bar("original", [89.0])]
        figures.draw_curves(folder / "curves.png", "title", accuracy, {"kd": [RISING]}, LINES, window=(30, 90))
        figures.draw_hint_losses(folder / "hints.png", "title", hints, LINES, (0.1, 0.6))
        figures.draw_bars(folder / "bars.png", "title", bars, LINES, teacher=93.0, axis=(88.0, 94.0))
        x, stages = stages_of("table1", "layerwise-hint")
        figures.draw_stages(folder / "stages.png", [*teacher_stages(x), *stages], "title")
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    first, second = draw(tmp_path / "one"), draw(tmp_path / "two")
    assert list(first) == ["bars.png", "curves.png", "hints.png", "stages.png"]
    assert all(content.startswith(PNG) for content in first.values())
    assert first == second


def test_a_curve_shows_the_iterations_that_all_nets_have():
    _, (axes,) = figures._figure(4, 3)
    shown = figures.band(axes, "kd", Line("#000000"), [[(0, 1.0), (10, 3.0), (20, 5.0)], [(10, 5.0), (20, 7.0), (30, 9.0)]], None)
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[10.0, 4.0], [20.0, 6.0]]
    assert sorted(shown) == [5.0, 7.0]                       # the early part does not set the range


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    found, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path, title: (found.append(figure), save(figure, path, title)))
    return found


def test_the_legend_names_what_either_panel_shows_and_the_figure_explains_its_bands(tmp_path, drawn):
    accuracy, loss = {"original": [RISING], "kd": [RISING, RISING]}, {"kd": [RISING], "alone": [RISING]}
    figures.draw_curves(tmp_path / "curves.png", "title", accuracy, loss, LINES, loss_label="test loss")
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["original", "kd", "alone"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2]
    assert "bands: from the lowest to the highest" in figure.get_supxlabel()
    assert figure.get_supxlabel().endswith("on the left alone, because trained under another loss: original")
    assert figure.axes[1].get_ylabel() == "test loss" and len(figure.axes[1].get_lines()[0].get_xdata()) == len(RISING)


def test_what_is_written_in_a_figure_lies_inside_it(tmp_path, drawn):
    bars = [figures.Bar("kd-equal-iterations", [90.0, 91.0, 99.0], 90.5, [99.5]), figures.Bar("original", [89.0])]
    hints = {"layerwise-hint": {"1": RISING, "2": RISING}, "hint-kd": {"": RISING}}
    title = "A long title that says what was measured, with which networks and schedule, and on which data: " * 2
    figures.draw_bars(tmp_path / "bars.png", title, bars, LINES, teacher=93.0, axis=(88.0, 94.0))
    figures.draw_hint_losses(tmp_path / "hints.png", title, hints, LINES, (0.1, 0.6))
    figures.draw_curves(tmp_path / "curves.png", title, {"kd-equal-iterations": [RISING]}, {"kd-equal-iterations": [RISING]},
                        LINES)
    for figure in drawn:
        figure.canvas.draw()
        of_axes = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts)]
        for text in [figure._suptitle, *figure.texts, *figure.legends[0].get_texts(), *of_axes]:
            box, whole = text.get_window_extent(), figure.bbox
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text.get_text()


def test_rows_are_drawn_as_their_methods_say_and_two_rows_of_one_method_apart():
    kd = find_table("table1").method("kd")
    found = pictures.lines({"kd": kd.line, "kd-again": kd.line, "new": None, "newer": None})
    assert found["kd"] == kd.line
    assert len({(line.colour, line.style) for line in found.values()}) == 4
    assert found["kd-again"].hints == kd.line.hints


def test_a_single_batchs_loss_does_not_show():
    curve = [(at, 9.0 if at == 50 else 1.0) for at in range(0, 100, 10)]
    assert figures.smoothed(curve) == [(at, 1.0) for at in range(20, 80, 10)]


def test_layerwise_stages_train_what_they_should():
    _, stages = stages_of("table1", "layerwise-hint")
    hint1, hint2, _, kd = parts(stages)
    learns, new = (True, "goes on learning"), (True, "new, random")
    assert hint1["teacher"] == dict.fromkeys(("first_conv", "group0"), (False, "goes on learning"))
    assert hint1["student"] == dict.fromkeys(("first_conv", "group0"), new)
    assert hint2["student"] == {"first_conv": learns, "group0": learns, "group1": new}
    assert list(kd["student"]) == ["first_conv", "group0", "group1", "group2", "fc"] and kd["student"]["fc"] == new
    assert losses(stages) == [[(f"hint{k} loss", [f"student/group{k - 1}", f"teacher/group{k - 1}"])] for k in (1, 2, 3)] + [
        [("kd loss", ["student/fc", "teacher/fc"])]]


def test_the_middle_of_a_group_leaves_it_in_part_new():
    _, stages = stages_of("table1", "hint-kd")
    assert parts(stages)[1]["student"]["group1"] == (True, "in part new")


def test_a_regressor_is_named_beside_its_loss():
    _, stages = stages_of("table5", "hint-kd")
    assert "regressor" not in parts(stages)[0]["student"]
    assert losses(stages)[0] == [("hint loss\nthrough regressor", ["student/group1", "teacher/group1"])]


def test_frozen_modules_are_shown_frozen():
    _, stages = stages_of("table4", "sl-resnet", sl_modules="frozen")
    second = parts(stages)[1]["student"]
    assert (second["group0"][0], second["group1"][0], second["fc"][0]) == (False, True, True)
    assert losses(stages)[1] == [("loss", ["student/fc"])]
