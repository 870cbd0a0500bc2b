"""The log parser, against logs rendered here in both of Caffe's wordings from known events."""
from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintkd.stage.log import START_LINE, Log, Tail, parse

PLAIN, WITH_RATE = "Iteration {}, loss = {:g}", "Iteration {} ({:g} iter/s, 2.5s/100 iters), loss = {:g}"
BVLC = """I1120 21:05:28.123456 12345 solver.cpp:48] Initializing solver from parameters:
test_iter: 100
I1120 21:05:29.000000 12345 solver.cpp:330] Iteration 0, Testing net (#0)
I1120 21:05:30.000000 12345 solver.cpp:397]     Test net output #0: Accuracy = 0.0991
I1120 21:05:30.000001 12345 solver.cpp:397]     Test net output #1: loss = 2.37 (* 1 = 2.37 loss)
I1120 21:05:31.000000 12345 solver.cpp:218] Iteration 0 (-1.4e-45 iter/s, 2s/100 iters), loss = 2.5
I1120 21:05:31.000001 12345 solver.cpp:237]     Train net output #0: loss = 2.25 (* 1 = 2.25 loss)
I1120 21:05:31.000002 12345 sgd_solver.cpp:105] Iteration 0, lr = 0.01
I1120 21:05:41.000000 12345 solver.cpp:218] Iteration 100 (10 iter/s, 10s/100 iters), loss = 0.5
I1120 21:05:41.000001 12345 solver.cpp:237]     Train net output #0: loss = 0.25 (* 1 = 0.25 loss)
I1120 21:05:41.000002 12345 sgd_solver.cpp:105] Iteration 100, lr = 0.001
I1120 21:05:51.000000 12345 solver.cpp:315] Optimization Done.
"""


def line(text: str, second: float = 0, where: str = "solver.cpp:1") -> str:
    minutes, seconds = divmod(second, 60)
    return f"I1120 21:{int(minutes):02d}:{seconds:09.6f} 12345 {where}] {text}\n"


def test_a_log_of_caffe_is_read_whole() -> None:
    log = parse(BVLC)
    assert log.loss == [(0, 2.5), (100, 0.5)]
    assert log.lr == [(0, 0.01), (100, 0.001)]
    assert log.train == {"loss": [(0, 2.25), (100, 0.25)]}
    assert log.test == {"Accuracy": [(0, 0.0991)], "loss": [(0, 2.37)]}
    assert (log.iteration, log.done, log.rate) == (100, True, 10.0)
    assert log.seconds == pytest.approx(22.876544)


def test_glogs_later_prefix_has_a_year() -> None:
    log = parse("I20201120 21:05:28.123456 12345 solver.cpp:218] Iteration 7, loss = 1.5\n")
    assert log.loss == [(7, 1.5)]


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e-08", "1.5E+10", "-3"])
def test_every_number_that_c_prints_is_read(value: str) -> None:
    (_, read), = parse(line(f"Iteration 3, loss = {value}")).loss
    assert read == float(value) or (math.isnan(read) and "nan" in value)


def test_elements_of_an_output_and_second_test_nets_have_names_of_their_own() -> None:
    lines = ["Iteration 5, Testing net (#0)", "    Test net output #0: acc = 0.5", "    Test net output #1: per_class = 0.25",
             "    Test net output #2: per_class = 0.75", "Iteration 5, Testing net (#1)", "    Test net output #0: acc = 1"]
    log = parse("".join(map(line, lines)))
    assert log.test == {"acc": [(5, 0.5)], "per_class": [(5, 0.25)], "per_class[1]": [(5, 0.75)], "net1/acc": [(5, 1.0)]}


def test_a_resumed_run_replaces_what_it_runs_again() -> None:
    log = Log()
    for iteration in (0, 100, 200, 300):
        log.feed(line(PLAIN.format(iteration, iteration), iteration / 10))
        log.feed(line(f"Iteration {iteration}, lr = 0.1", iteration / 10))
    log.feed(line(START_LINE.format("kd", 150), 600))
    log.feed(line(PLAIN.format(200, -1), 605))
    assert log.loss == [(0, 0), (100, 100), (200, -1)]
    assert log.lr == [(0, 0.1), (100, 0.1)]
    assert log.rate is None                                  # one display since the pause
    assert log.seconds == pytest.approx(35)                  # 30 before it and 5 after, not the 570 between


def test_a_run_that_starts_again_from_nothing_is_seen_without_a_start_line() -> None:
    log = parse("".join(line(PLAIN.format(i, 1), n) for n, i in enumerate([0, 10, 20, 0, 10])))
    assert [iteration for iteration, _ in log.loss] == [0, 10]


def test_new_year_does_not_turn_time_back() -> None:
    log = parse("I1231 23:59:59.000000 1 solver.cpp:1] Iteration 0, loss = 1\n"
                "I0101 00:00:01.000000 1 solver.cpp:1] Iteration 1, loss = 1\n")
    assert log.seconds == 0


@st.composite
def runs(draw: st.DrawFn) -> tuple[list, str]:
    """Displays of a run as (iteration, loss, lr, output or None), and the log Caffe would write of them."""
    values = st.floats(-1e6, 1e6, allow_nan=False, width=32)
    events = [(i, draw(values), draw(values), draw(st.none() | values)) for i in sorted(draw(st.sets(st.integers(0, 10**6), max_size=8)))]
    text = ""
    for iteration, loss, lr, output in events:
        rate = draw(values)
        text += line(PLAIN.format(iteration, loss) if draw(st.booleans()) else WITH_RATE.format(iteration, rate, loss))
        if output is not None:
            text += line(f"    Train net output #0: out = {output:g} (* 1 = {output:g} loss)")
        text += draw(st.sampled_from(["", line("Snapshotting to binary proto file x_iter_3.caffemodel"), "not a log line\n", "\n"]))
        text += line(f"Iteration {iteration}, lr = {lr:g}", where="sgd_solver.cpp:105")
    return events, text


def shown(value: float) -> float:
    return float(f"{value:g}")


@given(runs())
def test_what_was_written_is_read_back(run: tuple[list, str]) -> None:
    events, text = run
    log = parse(text)
    assert log.loss == [(i, shown(loss)) for i, loss, _, _ in events]
    assert log.lr == [(i, shown(lr)) for i, _, lr, _ in events]
    assert log.train.get("out", []) == [(i, shown(out)) for i, _, _, out in events if out is not None]


@given(runs(), st.lists(st.integers(0, 2000), max_size=6))
def test_reading_in_pieces_gives_the_same(run: tuple[list, str], cuts: list[int]) -> None:
    text, log = run[1], Log()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        log.feed(text[start:end])
    assert log == parse(text)


def test_a_growing_file_is_followed_and_a_new_one_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    tail = Tail(str(path))
    assert tail.poll().iteration is None                     # not there yet
    path.write_text(BVLC[:700])
    tail.poll()
    with path.open("a") as file:
        file.write(BVLC[700:])
    assert tail.poll() == parse(BVLC)
    path.write_text(line(PLAIN.format(3, 1)))
    assert tail.poll().loss == [(3, 1.0)]
