"""RESULTS.md from records: targets met, missed and not measured, tables, plots; and how turns are taken."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.machine import alternate, save, spread, take_turns
from benchmarks.suite import SUITES, Claim, Plot, Record, Settings, Table


def record(**parts) -> dict:
    return dataclasses.asdict(Record(options={"full": False, "threads": 2}, versions={"torch": "2.13"}, **parts))


def written(folder: Path, **suites: dict) -> str:
    for name, each in suites.items():
        save(name.replace("_", "-"), each, folder=folder / "results")
    return report.write(folder / "RESULTS.md", folder / "results").read_text("utf-8")


def line(text: str, beginning: str) -> list[str]:
    row = next(row for row in text.splitlines() if row.startswith(beginning))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_target_is_reached_at_its_bound_and_missed_just_outside(tmp_path):
    claims = [
        Claim("speed", 2.0, 2.0, "at least", "×"),
        Claim("slow", 1.9999, 2.0, "at least", "×"),
        Claim("loss", 1.53, 1.53, "at most", "nats"),
        Claim("high", 1.5301, 1.53, "at most", "nats"),
        Claim("gone", None, 2.0, "at least", "×", "nanoGPT is not here"),
    ]
    text = written(tmp_path, training=record(claims=claims))
    verdicts = {name: line(text, f"| training | {name} ")[4] for name in ("speed", "slow", "loss", "high", "gone")}
    assert verdicts == {
        "speed": "met", "slow": "**missed**", "loss": "met", "high": "**missed**", "gone": "not measured"
    }  # fmt: skip
    assert line(text, "| training | gone")[-1] == "nanoGPT is not here"


def test_a_target_with_an_alternative_is_reached_by_either(tmp_path):
    share = {"what": "share of the matmul peak", "value": 0.71, "target": 0.7}
    claims = [
        Claim("by share", 1.2, 1.8, "at least", "×", "", share),
        Claim("by none", 1.2, 1.8, "at least", "×", "", {**share, "value": 0.5}),
    ]
    text = written(tmp_path, training=record(claims=claims))
    wanted = "at least 1.800 ×, or 0.7000 share of the matmul peak"
    assert line(text, "| training | by share")[2:5] == [wanted, "1.200 ×; 0.7100", "met"]
    assert line(text, "| training | by none")[4] == "**missed**"


def test_the_newest_record_of_a_suite_counts(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for name, date, value in (("a", "2026-01-02T00:00:00", 7.0), ("b", "2026-01-01T00:00:00", 1.0)):
        each = record(claims=[Claim("speed", value, 2.0, "at least")])
        head = {"benchmark": "decoding", "date": date, "commit": "c", "machine": {"cpu": "x", "cores": 2}}
        (folder / f"{name}.json").write_text(json.dumps({**head, **each}), "utf-8")
    text = written(tmp_path)
    assert line(text, "| decoding | speed")[3:5] == ["7", "met"]
    assert "No record yet of: training, time-to-loss" in text


def test_a_record_that_is_no_suites_is_passed_over(tmp_path):
    save("serving", {"results": []}, folder=tmp_path / "results")
    assert report.newest(tmp_path / "results") == {}


def test_tables_missing_peers_and_notes_are_shown(tmp_path):
    rows = [
        {"contender": "ours", "median": 12345.6, "share": 0.51234},
        {"contender": "peer", "median": None, "share": 0.01},
    ]
    each = record(tables=[Table("Speed", rows, "tokens/s")], missing=["nanoGPT: git clone …"], notes=["Rough."])
    text = written(tmp_path, time_to_loss=each)
    assert "## time-to-loss: " in text
    assert "slices, " in text and "torch 2.13" in text
    assert "Not here: nanoGPT: git clone …\n" in text
    assert "\nRough.\n" in text
    assert "**Speed** (tokens/s)\n\n| contender | median | share |\n| --- | ---: | ---: |\n" in text
    assert "| ours | 12,346 | 0.5123 |\n| peer | – | 0.01000 |\n" in text


def test_a_plot_is_drawn_next_to_the_records_and_the_same_each_time(tmp_path):
    lines = {"ours": [(1.0, 2.0), (10.0, 1.5)], "nothing yet": []}
    each = record(plots=[Plot("quality", "loss against time", "seconds", "nats", lines, ("floor", 1.69))])
    text = written(tmp_path, quality=each)
    assert "![loss against time](results/quality.svg)" in text
    first = (tmp_path / "results" / "quality.svg").read_bytes()
    assert b"floor: 1.690" in first
    report.write(tmp_path / "RESULTS.md", tmp_path / "results")
    assert (tmp_path / "results" / "quality.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (3, "3"),
        (1234.5, "1,234"),
        (1.23456, "1.235"),
        (98.76, "98.76"),
        (0.0123, "0.01230"),
        ("a|b", r"a\|b"),
    ],
)
def test_a_figure_keeps_four_digits(value, shown):
    assert report.number(value) == shown


def test_contenders_take_turns_and_the_first_turn_of_each_does_not_count():
    order: list[str] = []
    figures = {"ours": iter([100.0, 3.0, 1.0, 2.0]), "peer": iter([100.0, 6.0, 5.0, 4.0])}

    def turn(name: str) -> float:
        order.append(name)
        return next(figures[name])

    found = take_turns({name: lambda name=name: turn(name) for name in figures}, 3)
    assert order == ["ours", "peer"] * 4
    assert found == {
        "ours": {"median": 2.0, "least": 1.0, "most": 3.0}, "peer": {"median": 5.0, "least": 4.0, "most": 6.0}
    }  # fmt: skip


def test_work_is_counted_by_the_second(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("benchmarks.machine.time.perf_counter", lambda: next(clock))
    # 8 in 2 seconds, then 8 in 4; the first turn, 8 in 9, does not count.
    assert alternate({"ours": lambda: 8.0}, 2) == {"ours": {"median": 3.0, "least": 2.0, "most": 4.0}}


def test_a_spread_of_one_is_that_one():
    assert spread([2.5]) == {"median": 2.5, "least": 2.5, "most": 2.5}


def test_every_suite_is_a_file_with_a_run():
    folder = Path(report.__file__).parent
    for suite in SUITES:
        assert "def run(settings: Settings) -> Record:" in (folder / f"{suite.replace('-', '_')}.py").read_text("utf-8")


def test_a_peers_program_has_as_many_threads_as_any_other_and_no_gpu():
    environment = Settings(threads=3).environment(INKLING_CACHE="x")
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("3", "-1")
    assert environment["INKLING_CACHE"] == "x"
