"""Where a worker is in its life: one state, one door that checks legal moves."""

from __future__ import annotations

import enum

from dynamo_grpc.v1 import control_pb2


class State(enum.Enum):
    """STARTING → READY → DRAINING → STOPPED."""

    STARTING = control_pb2.WORKER_STATE_STARTING
    READY = control_pb2.WORKER_STATE_READY
    DRAINING = control_pb2.WORKER_STATE_DRAINING
    STOPPED = control_pb2.WORKER_STATE_STOPPED


_MOVES = {
    State.STARTING: {State.READY, State.DRAINING, State.STOPPED},
    State.READY: {State.STARTING, State.DRAINING, State.STOPPED},
    State.DRAINING: {State.STOPPED},
    State.STOPPED: set(),
}


class Lifecycle:
    """Holds the state."""

    def __init__(self) -> None:
        self.state = State.STARTING

    def move(self, state: State) -> bool:
        """Go to `state`; False if we are there already or it can't be reached any more."""
        if state is self.state or state not in _MOVES[self.state]:
            return False
        self.state = state
        return True
