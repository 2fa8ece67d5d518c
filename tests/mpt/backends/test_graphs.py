"""Which graphs are captured, when, and which one a step runs in; shapes counted by hand, captures by a stand-in."""

import pytest
import torch

from mpt.backends import compilations
from mpt.backends.graphs import Graphs, Shape, rows_for, shapes
from mpt.errors import DeviceLost


class Machine:
    """Captures in a second each, on a clock of its own; refuses some shapes, or all for a while."""

    def __init__(self, planned: list[Shape], refused: tuple[Shape, ...] = ()) -> None:
        self.now, self.tried, self.refused = 1000.0, [], set(refused)
        self.has_memory = True
        self.graphs = Graphs(self.capture, planned, lambda: self.now)

    def capture(self, shape: Shape) -> str:
        self.now += 1
        self.tried.append(shape)
        if shape in self.refused or not self.has_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"{shape.n_rows}x{shape.width}"

    def runs_in(self, n_rows: int, width: int) -> str | None:
        found = self.graphs.find(Shape(n_rows, width))
        assert found is None or found[1] == f"{found[0].n_rows}x{found[0].width}"
        return None if found is None else found[1]


@pytest.mark.parametrize(
    ("rows", "pages", "expected"),
    [
        (1, 1, [(1, 8)]),
        (5, 9, [(8, 32), (8, 8), (4, 32), (4, 8), (2, 32), (2, 8), (1, 32), (1, 8)]),
        (65, 8, [(96, 8), (64, 8), (32, 8), (16, 8), (8, 8), (4, 8), (2, 8), (1, 8)]),
        (300, 8, [(n, 8) for n in (384, 256, 192, 128, 96, 64, 32, 16, 8, 4, 2, 1)]),
        (1, 256, [(1, 512), (1, 128), (1, 32), (1, 8)]),  # 65,536 tokens
    ],
)
def test_the_largest_shape_comes_first(rows, pages, expected):
    assert shapes(rows, pages) == expected


@pytest.mark.parametrize("most", [1, 64, 65, 100, 256, 257, 300, 1000, 1536])
def test_every_number_of_rows_is_padded_to_one_of_the_start(most):
    """To no more than twice as many, and from 64 on to no more than half as many again."""
    planned = {shape.n_rows for shape in shapes(most, 1)}
    for n in range(1, most + 1):
        assert rows_for(n) in planned and n <= rows_for(n) < (2 * n if n < 64 else 1.5 * n + 1)
    assert max(planned) == rows_for(most)


def test_every_step_has_a_graph_of_its_own_when_all_are_captured():
    machine = Machine(shapes(4, 9))
    before = compilations.of_this_thread()
    machine.graphs.capture_all(30)
    assert machine.tried == shapes(4, 9) and compilations.of_this_thread() - before == {"graph": 6}
    assert [machine.runs_in(*shape) for shape in shapes(4, 9)] == ["4x32", "4x8", "2x32", "2x8", "1x32", "1x8"]
    assert machine.runs_in(8, 8) == "8x8" and machine.tried[6:] == [(8, 8)]  # nobody foresaw it
    assert compilations.of_this_thread() - before == {"graph": 7}


def test_time_that_is_over_leaves_the_small_ones_to_the_large():
    machine = Machine(shapes(4, 9))
    machine.graphs.capture_all(2.5)
    assert machine.tried == [(4, 32), (4, 8), (2, 32)]
    assert [machine.runs_in(1, 8), machine.runs_in(2, 8), machine.runs_in(1, 32)] == ["2x32", "2x32", "2x32"]
    assert [machine.runs_in(4, 8), machine.runs_in(4, 32)] == ["4x8", "4x32"]
    assert len(machine.tried) == 3  # nothing while requests wait


def test_one_failure_costs_one_graph():
    machine = Machine(shapes(4, 1), refused=(Shape(4, 8),))
    machine.graphs.capture_all(30)
    assert set(machine.graphs) == {(2, 8), (1, 8)}
    assert machine.runs_in(2, 8) == "2x8"
    assert machine.runs_in(4, 8) is None and len(machine.tried) == 3  # it was tried a moment ago
    machine.now += 60
    assert machine.runs_in(4, 8) is None and len(machine.tried) == 4
    machine.refused.clear()
    assert machine.runs_in(4, 8) is None and len(machine.tried) == 4
    machine.now += 60
    assert machine.runs_in(4, 8) == "4x8" and len(machine.tried) == 5


def test_without_any_memory_three_are_tried_and_later_all_come():
    machine = Machine(shapes(32, 1))
    machine.has_memory = False
    machine.graphs.capture_all(30)
    assert len(machine.tried) == 3 and not len(machine.graphs)
    machine.has_memory = True
    machine.now += 60
    assert machine.runs_in(1, 8) == "1x8" and machine.runs_in(32, 8) == "32x8"
    machine.graphs.clear()  # whoever lets go of them has them captured again
    assert machine.runs_in(1, 8) == "1x8"


def test_a_lost_device_is_no_failed_capture():
    def lost(shape: Shape) -> str:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost):
        Graphs(lost, shapes(1, 1)).capture_all()
