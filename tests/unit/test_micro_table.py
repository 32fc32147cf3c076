"""The micro benchmarks' table: medians, ratios inside a round, and how a duration is spelled."""

import pytest

from benchmarks.load.render import replace_between
from benchmarks.micro.table import END, PAGE, START, duration, lines, provenance, ratio, render


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.25e-7, "125 ns"),
        (9.996e-7, "1.00 us"),
        (1e-6, "1.00 us"),
        (4.2e-10, "0.42 ns"),
        (3.33e-5, "33.3 us"),
        (1.5e-3, "1.50 ms"),
        (12.0, "12.0 s"),
    ],
)
def test_a_duration_has_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_ratio_is_taken_inside_a_round() -> None:
    # The machine was three times slower in the second round; the ratio does not see it.
    assert ratio([2.0, 6.0, 2.2], [1.0, 3.0, 1.0]) == 2.0


def test_rounds_that_differ_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 rounds"):
        ratio([], [])


def test_a_group_is_divided_by_its_first_row() -> None:
    rounds = {"parse: ours": [1e-7, 3e-7, 2e-7], "parse: theirs": [4e-7, 6e-7, 8e-7]}
    first, second = lines(rounds, {"parse": ["parse: ours", "parse: theirs"]})
    assert (first.median, first.low, first.high, first.ratio) == (2e-7, 1e-7, 3e-7, 1.0)
    assert second.ratio == pytest.approx(4.0)


def test_what_was_not_measured_has_no_line() -> None:
    rounds = {"b: theirs": [1.0]}
    found = lines(rounds, {"a": ["a: ours"], "b": ["b: ours", "b: theirs"]})
    assert [(line.name, line.ratio) for line in found] == [("b: theirs", 1.0)]


def test_the_table_names_a_group_once_and_gives_no_ratio_to_one_alone() -> None:
    rounds = {"a: ours": [1e-6], "a: theirs": [2e-6], "b: ours": [1.0]}
    text = render(lines(rounds, {"a": ["a: ours", "a: theirs"], "b": ["b: ours"]}))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    assert rows[0] == ["what", "which", "median", "range of rounds", "ratio"]
    assert rows[2:] == [
        ["a", "ours", "1.00 us", "1.00 us - 1.00 us", "1.00x"],
        ["", "theirs", "2.00 us", "2.00 us - 2.00 us", "2.00x"],
        ["b", "ours", "1.00 s", "1.00 s - 1.00 s", ""],
    ]
    assert len({len(row) for row in text.splitlines()}) == 1


def facts(load: float, clean: bool = True) -> dict[str, object]:
    machine = {"virtual": True, "cores": 2, "cpu": "a processor", "kernel": "6.1", "load_average": load}
    return {"date": "2030-01-02T03:04:05Z", "commit": "0123456789ab", "clean_tree": clean, "machine": machine, "versions": {"python": "3.11"}}


def test_above_the_table_stands_where_it_comes_from() -> None:
    quiet = provenance(facts(0.2), 5)
    assert quiet == "2030-01-02, commit 0123456789ab: 5 rounds on a 2-core virtual machine (a processor), Linux 6.1, Python 3.11."
    assert "load average 6.0" in provenance(facts(6.0), 5) and "One short round" in provenance(facts(0.2), 1)
    assert "changes that are not in it" in provenance(facts(0.2, clean=False), 5)


def test_the_page_has_the_place_for_the_table() -> None:
    page = PAGE.read_text("utf-8")
    assert f"{START}\n\nnew\n\n{END}" in replace_between(page, "new", PAGE.name, START, END)
