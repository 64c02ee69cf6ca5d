"""What a server tells balancers of its load."""

from dynamo_grpc.orca import LOAD_KEY, ORCA_KEY, LoadMeter
from dynamo_grpc.testing import FakeClock
from dynamo_grpc.v1 import orca_pb2


class Machine:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.used_s = 0.0
        self.load: tuple[dict[str, float], float | None] = ({"num_running": 3}, None)
        self.meter = LoadMeter(lambda: self.load, self.clock, lambda: self.used_s)


def test_rates_are_those_of_the_last_ten_seconds() -> None:
    machine = Machine()
    for second in range(30):
        for number in range(4):
            machine.meter.ended(failed=number == 0)
        report = machine.meter.report()
        seen = min(10, second + 1)
        assert report.rps_fractional == 4 * seen / min(10, max(1, second))
        assert report.eps == report.rps_fractional / 4
        machine.clock.advance(1.0)
    machine.clock.advance(60.0)
    assert machine.meter.report().rps_fractional == 0
    assert len(machine.meter._ended) <= 10


def test_how_full_it_is() -> None:
    machine = Machine()
    assert machine.meter.report().application_utilization == 0
    machine.load = ({"num_running": 3, "num_waiting": 2}, 1.25)
    report = machine.meter.report()
    assert (report.application_utilization, dict(report.named_metrics)) == (1.25, {"num_running": 3, "num_waiting": 2})


def test_processors(monkeypatch: object) -> None:
    machine = Machine()
    machine.used_s = 1.0
    machine.clock.advance(1.0)
    first = machine.meter.report().cpu_utilization
    assert 0 < first <= 1
    machine.clock.advance(0.01)  # too soon to measure anew
    assert machine.meter.report().cpu_utilization == first
    machine.clock.advance(1.0)
    assert machine.meter.report().cpu_utilization == 0


def test_a_report_is_made_ten_times_a_second_at_most() -> None:
    machine = Machine()
    (name, packed), (own_name, own) = machine.meter.trailers()
    assert (name, own_name, packed) == (ORCA_KEY, LOAD_KEY, own)
    machine.load = ({"num_running": 4}, None)
    assert machine.meter.trailers()[0][1] is packed
    machine.clock.advance(0.2)
    told = orca_pb2.OrcaLoadReport.FromString(machine.meter.trailers()[1][1])
    assert told.named_metrics["num_running"] == 4
