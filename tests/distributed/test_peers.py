"""Who is missing, when ranks are asked over real connections."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from distgan.distributed.peers import PeerAddress, PeerProbe, ask, describe
from distgan.distributed.runtime import Runtime
from tests.ranks import RankPool, free_port

ADDRESSES = [PeerAddress(host, "127.0.0.1", 1) for host in ("n1", "n1", "n2", "n2", "n3", "n3", "n4")]


def test_a_process_that_has_ended_refuses_and_a_stopped_one_is_silent() -> None:
    assert "ended" in ask(PeerAddress("here", "127.0.0.1", free_port()))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "stopped" in ask(PeerAddress("here", "127.0.0.1", silent.getsockname()[1]))


def test_a_host_that_is_not_there_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    # With a real cut link: tests/cluster/test_two_hosts.py.
    monkeypatch.setattr(socket, "create_connection", never)
    assert ask(PeerAddress("nowhere", "192.0.2.1", 9)).endswith("not reachable: timed out")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({1: 7, 2: "gone", 3: 6}, "waited at step 7 for rank 2 on n2 (gone)"),
        ({1: 7, 2: 6, 3: 7}, "waited at step 7 for rank 2 on n2 (at step 6)"),
        ({1: 7, 2: 7, 3: 8}, "waited at step 7, and so did all other ranks"),
        (dict.fromkeys(range(1, 7), "x"), "rank 4 on n3 (x) and 2 more"),
    ],
)
def test_whom_a_rank_waited_for(answers: dict[int, int | str], said: str) -> None:
    assert said in describe(7, ADDRESSES, answers)


def answer(step: int) -> str:
    runtime = Runtime()
    runtime.step = step - runtime.rank
    roll = PeerProbe(runtime)
    runtime.barrier()
    said = roll.missing()
    runtime.barrier()
    roll.close()
    return said


def test_ranks_answer_with_their_steps(tmp_path: Path, ranks: RankPool) -> None:
    host = socket.gethostname()
    assert ranks.run(3, answer, 50)[:2] == [
        f"waited at step 50 for rank 1 on {host} (at step 49), rank 2 on {host} (at step 48)",
        f"waited at step 49 for rank 2 on {host} (at step 48)",
    ]
