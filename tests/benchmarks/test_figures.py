"""No figure without a row, no row without the code that it was measured on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import figures
import numpy as np
import pytest
from bench import charts, plots, report
from bench.environment import ROOT, digest_of
from bench.page import page
from bench.results import Machine, groups, in_history, no_history, read_machines, untraceable
from bench.rows import RESULTS, Store
from bench.table import bytes_, number, seconds
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from PIL import Image
from rows_for_figures import cpu_rows, gpu_rows

REMEDY = "run `make figures` and commit what it writes"
CPU = Machine("cpu", tuple(cpu_rows()))
GPU = Machine("h200", tuple(gpu_rows()))


# --- what is committed -----------------------------------------------------------------------------------------------


def test_every_committed_figure_is_that_of_a_row():
    found = figures.differences(ROOT, read_machines(RESULTS))
    assert [f"{one.path.relative_to(ROOT)} {one.why}: {REMEDY}" for one in found] == []


def test_every_row_leads_to_the_code_it_was_measured_on():
    if reason := no_history():
        pytest.skip(reason)
    assert untraceable(read_machines(RESULTS), in_history, digest_of) == []


FIGURE = re.compile(
    r"\d+\.\d+ ?[x×]|(?<!\d)\d+[x×](?!\d)|\d ?(?:img|images?)/s|\d ?[GT](?:B/s|FLOP/s|FLOPS)|\d ?(?:ms|us|µs)\b|\d ?GiB"
)


def test_there_is_no_figure_of_performance_outside_of_the_generated_part():
    text = (ROOT / "README.md").read_text()
    outside = text[: text.index(figures.BEGIN)] + text[text.index(figures.END) :]
    assert [match.group() for match in FIGURE.finditer(outside)] == []


@pytest.mark.parametrize(
    "claim", ["1.52×", "2.0 x", "3× as fast", "12.3 img/s", "8 images/s", "900 GB/s", "5 ms", "2 GiB"]
)
def test_such_a_figure_would_be_noticed(claim):
    assert FIGURE.search(f"It is {claim}, they say.")


@pytest.mark.parametrize("text", ["ViT-S/16 with a 512×8 decoder", "149 s of training", "94.5 %", "12,000 images"])
def test_other_numbers_may_stand_there(text):
    assert not FIGURE.search(text)


# --- a copy of the project with rows of its own ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A README, a page and charts from two machines' rows."""
    root = tmp_path_factory.mktemp("project")
    (root / "README.md").write_text(f"Before.\n\n{figures.BEGIN}\n{figures.END}\n\nAfter.\n")
    for machine in (CPU, GPU):
        Store(root / "benchmarks/results" / machine.name).put(machine.rows)
    assert figures.main(["--root", str(root)]) == 0
    return root


@pytest.fixture
def project(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "project"))


def check(root, capsys) -> str:
    """What `--check` says, empty if it finds nothing."""
    capsys.readouterr()
    status = figures.main(["--root", str(root), "--check"])
    said = capsys.readouterr().out
    assert status == (1 if said else 0)
    return said


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_what_was_written_is_what_would_be_written(project, capsys):
    assert check(project, capsys) == ""
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    assert figures.main(["--root", str(project)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}


def test_text_around_the_markers_is_left_alone(project):
    text = (project / "README.md").read_text()
    assert text.startswith("Before.\n\n<!--")
    assert text.endswith("-->\n\nAfter.\n")


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_a_changed_number_is_noticed_and_put_right(project, capsys, name):
    right = (project / name).read_text()
    change(project / name, "1.50×", "1.60×")
    said = check(project, capsys)
    assert said.startswith(f"{name} line ")
    assert "1.60×" in said
    figures.main(["--root", str(project)])
    assert (project / name).read_text() == right


def test_another_row_changes_text_and_charts(project, capsys):
    change(project / "benchmarks/results/cpu/loss.json", '"timm": [3.5', '"timm": [3.25')
    said = check(project, capsys)
    assert "README.md line" in said
    assert "3.25× timm" in said
    assert "docs/images/benchmarks/cpu/kernels.png is not drawn from these rows" in said
    assert "cpu/loader.png" not in said
    assert "h200" not in said


def test_a_chart_that_was_painted_over_is_noticed(project, capsys):
    path = project / "docs/images/benchmarks/cpu/kernels.png"
    with Image.open(path) as image:
        painted, info = image.convert("RGB"), {**image.info}
    painted.putpixel((50, 50), (1, 2, 3))
    text = charts.PngImagePlugin.PngInfo()
    for key, value in info.items():
        text.add_text(key, value)
    painted.save(path, pnginfo=text)
    assert check(project, capsys) == "docs/images/benchmarks/cpu/kernels.png is not drawn from these rows\n"


def test_a_chart_without_rows_is_noticed_and_removed(project, capsys):
    shutil.rmtree(project / "benchmarks/results/h200")
    left = project / "docs/images/benchmarks/h200/kernels.png"
    assert "h200/kernels.png has no rows" in check(project, capsys)
    assert left.exists()
    figures.main(["--root", str(project)])
    assert not left.exists()
    assert check(project, capsys) == ""


@pytest.mark.parametrize("text", ["none", figures.END + figures.BEGIN, figures.BEGIN * 2 + figures.END])
def test_markers_must_be_there_once_and_in_order(text):
    with pytest.raises(ValueError, match="once and in this order"):
        figures.splice(text, "")


# --- what the text says ----------------------------------------------------------------------------------------------


def test_where_vitrail_is_slower_the_readme_says_so_in_words():
    text = report.section([CPU], {"cpu": []})
    assert "**slower than compiled: 0.250×**" in text  # in the row of the case
    assert "| `gather` | slower than compiled: 0.250× (0.233–0.268) | ViT-B/16, bfloat16, forward, hot |" in text
    assert "| `loss` | 3.50× timm (3.25–3.75) | ViT-B/16, bfloat16, forward, hot |" in text
    assert "slower in 1 of 6 comparisons" in " ".join(text.split())  # wherever the line breaks
    assert "| transformers compiled | 16.8 | slower than transformers compiled: 0.950× (0.883–1.02) |" in text


def test_the_readme_says_what_was_not_measured():
    text = report.section([CPU], {"cpu": []})
    assert "Absent: xformers (runs on CUDA only)." in text
    assert "Not measured here: parts of the engine (`pytest benchmarks/engine`)." in text
    assert report.NO_GPU in text
    assert report.NO_GPU not in report.section([GPU, CPU], {"cpu": [], "h200": []})
    assert report.NOTHING in report.section([], {})


def test_the_readme_takes_a_cold_cache_where_there_is_one():
    text = report.section([GPU], {"h200": []})
    assert "(dtype bfloat16, cache cold)" in text
    assert "3.00× eager" in text
    assert "7.00×" not in text


def test_every_row_is_on_the_page():
    for machine in (CPU, GPU):
        text = page([machine], {machine.name: charts.drawn(machine)})
        for row in machine.rows:
            identity = [row.case, row.dtype, row.direction, row.cache, row.implementation]
            start = f"| {row.case} | {row.dtype} | " if row.op == "roofline" else f"| {' | '.join(identity)} | "
            chapter = text.split("### What the machine can do" if row.op == "roofline" else f"#### {row.op}\n")[1]
            lines = [line for line in chapter.split("\n#")[0].splitlines() if line.startswith(start)]
            assert len(lines) == 1, start
            expected = "out of memory (limit 4.00 GiB)" if row.median_s is None else seconds(row.median_s)
            assert expected in lines[0]


def test_every_comparison_is_on_the_page():
    text = page([CPU], {"cpu": []})
    for group in groups(CPU.rows):
        for one in group.comparisons:
            assert f"{number(one.ratio)}× ({number(one.low)}–{number(one.high)})" in text
            assert not one.slower or f"slower than {one.peer}: {number(one.ratio)}×" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.5, "1.50"),
        (9.996, "10.0"),
        (0.9996, "1.00"),
        (0.0476, "0.0476"),
        (99.96, "100"),
        (1234.6, "1235"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


def test_units_suit_the_value():
    assert [seconds(value) for value in (2.0, 0.0123, 4.5e-5, 8e-9)] == ["2.00 s", "12.3 ms", "45.0 us", "8.00 ns"]
    assert [bytes_(value) for value in (5 << 30, 3 << 20, 2048, 7)] == ["5.00 GiB", "3.00 MiB", "2.00 KiB", "7 B"]


# --- rows and their code ---------------------------------------------------------------------------------------------


def test_rows_of_known_code_pass():
    assert untraceable([CPU, GPU], lambda commit: commit == "a" * 40, lambda commit: "c" * 16) == []


def test_an_unknown_commit_is_noticed():
    found = untraceable([CPU], lambda commit: False, lambda commit: "c" * 16)
    assert len(found) == len({row.op for row in CPU.rows})
    assert found[0].startswith("cpu/gather.json: ViT-B/16, vitrail, bfloat16, forward, hot; ViT-B/16, eager, ")
    assert found[0].endswith(f"commit {'a' * 40} is not in this history: measure again on committed code")


def test_another_digest_is_noticed():
    (found,) = untraceable([GPU], lambda commit: True, lambda commit: "d" * 16)
    assert found.startswith("h200/loss.json: ViT-B/16, vitrail, bfloat16, forward, cold; ")
    assert found.endswith(
        f"measured on sources {'c' * 16}, but commit {'a' * 10} has {'d' * 16}: measure again on committed code"
    )


def test_a_row_without_an_environment_is_noticed():
    rows = [replace(row, environment={}) for row in GPU.rows]
    (found,) = untraceable([Machine("h200", tuple(rows))], lambda commit: commit != "None", lambda commit: None)
    assert "commit None is not in this history" in found


def test_a_case_measured_half_on_other_code_is_noticed():
    other = {**CPU.rows[1].environment, "code": "d" * 16, "commit": "b" * 40}
    rows = (CPU.rows[0], replace(CPU.rows[1], environment=other))
    (found,) = untraceable(
        [Machine("cpu", rows)], lambda commit: True, lambda commit: commit.translate({97: 99, 98: 100})[:16]
    )
    assert found.startswith("cpu/gather.json: ViT-B/16: eager measured on other code or versions than the rest: ")
    assert found.endswith("measure the case again or delete them")


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    return {name: charts.png(name, CPU) for name in charts.drawn(CPU)}


def test_charts_are_drawn_where_there_are_rows(pictures):
    assert list(pictures) == ["steps", "batch", "cost", "kernels", "kernels-roofline", "loader"]
    assert charts.drawn(GPU) == ["kernels", "kernels-roofline"]
    assert charts.drawn(Machine("cpu", tuple(row for row in CPU.rows if row.op == "roofline"))) == []


def test_the_same_rows_give_the_same_bytes(pictures):
    assert {name: charts.png(name, CPU) for name in pictures} == pictures


def test_charts_show_something(pictures, tmp_path):
    for name, content in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[0] > 150
        assert (pixels != 255).any(-1).mean() > 0.02, name


def test_bars_of_slower_cases_go_left_in_another_colour():
    rows = [row for row in CPU.rows if row.op == "gather"]
    (axis,) = plots.ratios(rows).axes
    bars = [bar for drawn in axis.containers if isinstance(drawn, BarContainer) for bar in drawn]
    ends = {(round(1 + float(bar.get_width()), 3), to_hex(bar.get_facecolor()).upper()) for bar in bars}
    assert ends == {(1.5, plots.BLUE), (0.25, plots.VERMILION), (1.25, plots.BLUE), (2.0, plots.BLUE)}
    assert "0.250× slower" in {text.get_text().strip() for text in axis.texts}


def test_a_batch_out_of_memory_is_a_cross():
    memory, speed = plots.batches([row for row in CPU.rows if row.op == "mae_batch"]).axes
    assert [list(line.get_ydata()) for line in memory.lines if line.get_linestyle() == ":"] == [[4, 4]]
    for axis in (memory, speed):
        (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
        assert list(cross.get_xdata()) == [32]
        lengths = sorted(len(line.get_xdata()) for line in axis.lines if line.get_marker() in "os")
        assert lengths == [2, 3]  # transformers, vitrail


def test_cost_is_drawn_against_patches_and_against_the_mask():
    patches, mask = plots.costs([row for row in CPU.rows if row.op == "mae_cost"]).axes
    assert [list(line.get_xdata()) for line in patches.lines] == [[100, 196]] * 2
    assert [list(line.get_xdata()) for line in mask.lines] == [[0.75, 0.9]] * 2


def test_the_roofline_shows_every_implementation_where_it_stands():
    (axis,) = plots.roofline([row for row in CPU.rows if row.op == "gather"]).axes
    points = [float(line.get_xdata()[0]) for line in axis.lines if len(line.get_xdata()) == 1]
    assert sorted(points) == pytest.approx(sorted(100 * 1e-4 / time for time in (4e-3, 6e-3, 1e-3, 4e-3, 5e-3, 8e-3)))


def test_rows_survive_the_file(written):
    again = {machine.name: machine.rows for machine in read_machines(written / "benchmarks/results")}
    assert {row.key for row in again["cpu"]} == {row.key for row in CPU.rows}
    assert json.loads((written / "benchmarks/results/h200/loss.json").read_text()) == [
        row.to_json() for row in GPU.rows
    ]
