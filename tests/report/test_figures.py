"""What the report's figures plot, read from the Figure objects."""

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from aura_jax.report import diagram, figures, theme

WIDTHS = [theme.WIDE, theme.NARROW]


def floats(values):
    return np.array([np.nan if value is None else value for value in values], float)


def panels(figure):
    return {ax.get_label(): ax for ax in figure.axes}


def texts(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


@pytest.mark.parametrize("width", WIDTHS)
def test_learning_curves_are_the_metrics(report_data, width):
    metrics, stages = report_data["metrics"], report_data["stages"]
    found = panels(figures.learning_curves(metrics, stages, report_data["validation"], width))
    assert list(found) == ["loss", "loss/distill", "loss/lm", "grad_norm", "learning_rate", "wer"]
    for name, ax in found.items():
        source = report_data["validation"] if name == "wer" else metrics
        [line] = ax.lines
        np.testing.assert_array_equal(line.get_xdata(), floats(source["step"]))
        np.testing.assert_array_equal(line.get_ydata(), floats(source[name]))
        [band] = [patch for patch in ax.patches if patch.get_gid() == "stage"]
        assert (band.get_x(), band.get_x() + band.get_width()) == (stages[1]["first"], metrics["step"][-1])
        low, high = ax.get_ylim()
        assert low <= np.nanmin(line.get_ydata()) and high >= np.nanmax(line.get_ydata())
        assert {"distil", "joint"} <= set(texts(ax))
    assert "0.25" in texts(found["loss/distill"])  # the last that was recorded


def test_losses_of_blocks_and_unrecorded_ones_are_no_objectives():
    metrics = {"step": [1, 2], "loss/lm": [None, 1.0], "loss/text_kd": [None, None], "loss": [1.0, 2.0]}
    assert figures.objectives(metrics | {"loss/distill/block_02": [1.0, 1.0]}) == ["loss", "loss/lm"]


def test_one_validation_is_no_curve(report_data):
    validation = {"step": [5], "wer": [0.1], "exact_match": [0.5]}
    assert "wer" not in panels(figures.learning_curves(report_data["metrics"], report_data["stages"], validation))


def test_a_run_of_one_step_is_drawn(report_data):
    metrics = {"step": [1], "loss": [1.0], "grad_norm": [0.0], "learning_rate": [0.0]}
    part = {"step": [1], "blocks": [0], "loss_kind": "cosine", "value": [[None]]}
    for figure in (
        figures.learning_curves(metrics, report_data["stages"]),
        figures.alignment(part, report_data["stages"]),
    ):
        theme.inline_svg(figure, "one", "one step")


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("width", WIDTHS)
def test_alignment_map_is_the_dictionarys(report_data, kind, width):
    part = report_data["alignment"] | {"loss_kind": kind}
    ax = panels(figures.alignment(part, report_data["stages"], width))["alignment"]
    [mesh] = ax.collections
    np.testing.assert_array_equal(
        np.ma.filled(mesh.get_array(), np.nan), np.array([floats(row) for row in part["value"]])
    )
    low, high = mesh.get_clim()
    assert low <= np.nanmin(mesh.get_array()) + 0.05 and high >= np.nanmax(mesh.get_array())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["block 2", "block 5"]
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges[0] == part["step"][0] and edges[-1] == part["step"][-1] and (np.diff(edges) > 0).all()
    upright = {line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1}
    assert report_data["stages"][1]["first"] in upright


@pytest.mark.parametrize("width", WIDTHS)
def test_cosines_before_and_after(report_data, width):
    part, pairs = report_data["similarity"], report_data["model"]["pairs"]
    ax = panels(figures.cosine(part, pairs, width))["cosine"]
    found = {line.get_label(): line.get_xdata() for line in ax.lines}
    np.testing.assert_array_equal(found["before"], part["before"]["cosine"])
    np.testing.assert_array_equal(found["after"], part["after"]["cosine"])
    assert [label.get_text().split() for label in ax.get_yticklabels()] == [
        ["block", str(student), "·", "teacher", str(teacher)] for student, teacher in pairs
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_cka_of_blocks_is_of_the_nearest_teacher_block_and_of_the_pairs(report_data, width):
    part, pairs = report_data["similarity"], report_data["model"]["pairs"]
    ax = panels(figures.cka_blocks(part, pairs, 6, width))["cka"]
    for name in ("before", "after"):
        cka = np.array(part[name]["cka"])
        [line] = [line for line in ax.lines if line.get_label() == name]
        np.testing.assert_array_equal(line.get_ydata(), cka.max(axis=1))
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_label() == "pair"]
    assert dots == [(s, part[name]["cka"][s][t]) for name in ("before", "after") for s, t in pairs]


@pytest.mark.parametrize("width", WIDTHS)
def test_cka_maps_are_the_dictionarys_with_the_pairs_outlined(report_data, width):
    part, pairs = report_data["similarity"], report_data["model"]["pairs"]
    found = panels(figures.cka_maps(part, pairs, 6, width))
    for name in ("before", "after"):
        [image] = found[name].images
        np.testing.assert_array_equal(image.get_array(), np.array(part[name]["cka"]).T)
        assert image.get_clim() == (0, 1) and image.origin == "lower"
        boxes = [patch for patch in found[name].patches if isinstance(patch, Rectangle)]
        assert [[box.get_x() + 0.5, box.get_y() + 0.5] for box in boxes] == pairs


@pytest.mark.parametrize("width", WIDTHS)
def test_word_error_rates_with_their_intervals(report_data, width):
    sets = report_data["scores"]["sets"]
    ax = panels(figures.word_errors(sets, width))["wer"]
    [line], [bars] = ax.lines, ax.collections
    np.testing.assert_allclose(line.get_xdata(), [100 * scores["wer"]["value"] for scores in sets.values()])
    ends = [segment[:, 0] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[100 * s["wer"]["low"], 100 * s["wer"]["high"]] for s in sets.values()])
    low, high = ax.get_xlim()
    assert low == 0 and high >= np.max(ends)


def test_the_rise_of_text_losses(report_data):
    loss = report_data["scores"]["text"]["loss"]
    ax = panels(figures.text_rise(loss))["rise"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [kind["rise"] for kind in loss.values()])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(loss)


def test_parts_are_stacked_in_order(report_data):
    parts = report_data["speed"]["breakdown"]
    bars = panels(figures.parts(parts))["parts"].patches
    seconds = [part["seconds"] for part in parts]
    np.testing.assert_allclose([bar.get_width() for bar in bars], seconds)
    np.testing.assert_allclose([bar.get_x() for bar in bars], np.cumsum([0, *seconds[:-1]]))
    assert [to_hex(bar.get_facecolor()) for bar in bars] == theme.shades(len(parts))


def test_the_mel_picture_is_the_mel_upright():
    mel = np.linspace(0, 1, 12).reshape(4, 3)  # louder with time and with pitch
    pixels = matplotlib.image.imread(io.BytesIO(figures.mel_picture(mel.tolist())))
    assert pixels.shape == (3, 4, 4)
    np.testing.assert_allclose(pixels[0, 3], theme.HEAT(1.0), atol=1 / 255)
    np.testing.assert_allclose(pixels[2, 0], theme.HEAT(0.0), atol=1 / 255)


def test_the_map_grows_evenly_lighter():
    linear = lambda c: np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    colours = linear(theme.HEAT(np.linspace(0, 1, 64))[:, :3])
    lightness = np.cbrt(colours @ [0.2126, 0.7152, 0.0722])
    steps = np.diff(lightness)
    assert (steps > 0).all() and steps.max() < 1.6 * steps.mean()


def boxes_and_pairs(figure):
    patches = figure.axes[0].patches
    boxes = {patch.get_gid() for patch in patches if isinstance(patch, FancyBboxPatch)} - {None}
    return boxes, {patch.get_gid() for patch in patches if isinstance(patch, FancyArrowPatch)} - {None}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_method_has_the_runs_blocks_and_pairs(report_data, width):
    model = report_data["model"]
    figure = diagram.method(model, width)
    boxes, pairs = boxes_and_pairs(figure)
    adapted, teacher = range(model["n_adapted"]), range(model["teacher_blocks"])
    assert boxes == {f"adapted-{i}" for i in adapted} | {f"teacher-{i}" for i in teacher}
    assert pairs == {f"pair-{student}-{of}" for student, of in model["pairs"]}
    shown = " ".join(texts(figure.axes[0]))
    for part in (model["llm"], model["teacher"], "rank 8", "6 to 9", "12.5 tokens/s", "80 mel", "64", "48"):
        assert part in shown, part


@pytest.mark.parametrize("width", WIDTHS)
def test_the_method_without_a_teacher(report_data, width):
    model = report_data["model"] | {"teacher": None, "pairs": []}
    figure = diagram.method(model, width)
    boxes, pairs = boxes_and_pairs(figure)
    assert boxes == {f"adapted-{i}" for i in range(6)} and not pairs
    assert "dropped" not in " ".join(texts(figure.axes[0]))


@pytest.mark.parametrize("width", WIDTHS)
def test_all_that_the_method_draws_is_inside_its_figure(report_data, width):
    sizes = {"llm_blocks": 48, "n_adapted": 48, "teacher_blocks": 32, "pairs": [[i, i // 2] for i in range(48)]}
    for model in (
        report_data["model"],
        report_data["model"] | sizes,
        report_data["model"] | {"n_adapted": 1, "pairs": [[0, 3]]},
    ):
        figure = diagram.method(model, width)
        figure.draw_without_rendering()
        for artist in (*figure.axes[0].texts, *figure.axes[0].patches):
            box = artist.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (
                artist
            )
