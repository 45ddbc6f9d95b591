"""What goes over the wire between two stages arrives, whatever its size, shape and structure."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock._core.meter import ACTIVATIONS, CONTROL, Meter
from penstock._core.waiting import Watcher
from penstock.pipe import PipeDataParallelTopology
from penstock.pipe.broadcast import broadcast_value
from penstock.pipe.frame import Address
from penstock.pipe.groups import PipeGroups
from penstock.pipe.schedule import Channel
from penstock.pipe.transport import Transport
from penstock.pipe.value import flatten, unflatten
from support.pool import WorkerError, WorkerPool

FORWARD, BACKWARD = Channel(0, 1, "F"), Channel(1, 0, "B")


def value(seed: int) -> Any:
    """A value whose structure, shapes and dtypes depend on the seed; from nothing to half a megabyte."""
    draw = random.Random(seed)
    sizes = [0, 1, 3, 100, 1000, 5000, 60_000]
    tensors = [
        torch.full((draw.choice(sizes),), draw.randrange(100)).to(
            draw.choice([torch.float32, torch.bool, torch.bfloat16, torch.int64])
        )
        for _ in range(draw.randrange(4))
    ]
    return {"seed": seed, "all": [*tensors, None], seed: (torch.tensor(float(seed)),)}


def same(a: Any, b: Any) -> bool:
    (first, tensors), (second, others) = flatten(a), flatten(b)
    return first == second and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(tensors, others, strict=True)
    )


def transport(rank: int, window: int, payload_backend: str | None) -> tuple[Transport, Meter, PipeGroups]:
    groups = PipeGroups(PipeDataParallelTopology(2, 1), payload_backend=payload_backend)
    meter = Meter()
    return Transport(rank, groups.routes, watcher=Watcher(rank=rank), meter=meter, window=window), meter, groups


def talk(
    rank: int, world_size: int, seeds: list[list[int]], window: int, payload_backend: str | None
) -> tuple[int, int, int]:
    """Rank 0 sends each step's values forward and rank 1 sends them back; rank 0 takes them a window later."""
    moves, meter, _ = transport(rank, window, payload_backend)
    right = 0
    kept = []

    def take_back(step: int, index: int, seed: int) -> bool:
        got = moves.receive(BACKWARD, Address("B", 0, step, index))
        kept.append((seed, unflatten(got.structure, got.tensors)))
        return same(kept[-1][1], value(seed))

    for step, of_step in enumerate(seeds):
        moves.begin({FORWARD: len(of_step), BACKWARD: len(of_step)})
        for index, seed in enumerate(of_step):
            address = Address("F", 1, step, index)
            if rank == 0:
                if index >= window:
                    right += take_back(step, index - window, of_step[index - window])
                moves.send(FORWARD, address, *flatten(value(seed)), range(index))
            else:
                got = moves.receive(FORWARD, address)
                kept.append((seed, unflatten(got.structure, got.tensors)))
                right += same(kept[-1][1], value(seed)) and got.positions == tuple(range(index))
                moves.send(BACKWARD, Address("B", 0, step, index), got.structure, got.tensors)
        if rank == 0:
            for index in range(max(0, len(of_step) - window), len(of_step)):
                right += take_back(step, index, of_step[index])
        moves.drain()
    # Buffers are used again, but not while somebody looks into them.
    assert all(same(arrived, value(seed)) for seed, arrived in kept)
    return right, meter.sent[ACTIVATIONS], meter.received[ACTIVATIONS]


@pytest.mark.parametrize("payload_backend", [None, "gloo"])
@pytest.mark.parametrize("window", [4, 40])
def test_values_of_any_size_in_any_order(pool: WorkerPool, window: int, payload_backend: str | None) -> None:
    seeds = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [4, 3]]
    answers = pool.run(talk, 2, seeds, window, payload_backend)
    count = sum(map(len, seeds))
    assert [right for right, _, _ in answers] == [count, count]
    (_, sent, received), (_, sent_back, received_there) = answers
    assert sent == received_there > 0
    assert sent_back == received > 0


@pytest.mark.parametrize("spans", [[1, 10_000, 10_000, 10_000], [50_000, 1, 1, 90_000, 200_000, 5]])
def test_frames_whose_lengths_change_arrive(pool: WorkerPool, spans: list[int]) -> None:
    assert pool.run(grow, 2, spans) == [True, True]


def grow(rank: int, world_size: int, spans: list[int]) -> bool:
    moves, _, _ = transport(rank, 8, None)
    fine = True
    for step in range(3):
        moves.begin({FORWARD: len(spans)})
        for index, span in enumerate(spans):
            x = torch.arange(span)
            if rank == 0:
                moves.send(FORWARD, Address("F", 1, step, index), *flatten(x))
            else:
                fine &= torch.equal(moves.receive(FORWARD, Address("F", 1, step, index)).tensors[0], x)
        moves.drain()
    return fine


def steady(rank: int, world_size: int) -> tuple[set[int], set[int]]:
    """The memory of the buffers in use after two steps and after four."""
    moves, _, _ = transport(rank, 4, None)
    x = torch.ones(3000)
    made = []
    for step in range(4):
        moves.begin({FORWARD: 20})
        for index in range(20):
            if rank == 0:
                moves.send(FORWARD, Address("F", 1, step, index), *flatten(x))
            else:
                moves.receive(FORWARD, Address("F", 1, step, index))
        moves.drain()
        slots = [slot for sender in moves._senders.values() for slot in sender._slots]
        free = [buffer for receiver in moves._receivers.values() for buffer in receiver._pool._free]
        made.append({b.tensor.data_ptr() for b in (*(slot.buffer for slot in slots), *free) if b is not None})
    return made[1], made[-1]


def test_buffers_are_used_again(pool: WorkerPool) -> None:
    for after_two_steps, in_the_end in pool.run(steady, 2):
        assert after_two_steps == in_the_end
        assert 0 < len(in_the_end) <= 4


def mistaken(rank: int, world_size: int) -> str:
    moves, _, _ = transport(rank, 4, None)
    moves.begin({FORWARD: 1})
    if rank == 0:
        moves.send(FORWARD, Address("F", 1, 0, 3), *flatten(torch.ones(1)))
        moves.drain()
        return ""
    try:
        moves.receive(FORWARD, Address("F", 1, 0, 2))
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_frame_of_another_micro_batch_is_refused(pool: WorkerPool) -> None:
    said = pool.run(mistaken, 2)[1]
    assert "expected the activation for stage 1, step 0, micro-batch 2, but received the" in said
    assert "micro-batch 3; all ranks must be given the same step" in said


def spread(rank: int, world_size: int, source: int) -> Any:
    group = dist.new_group(list(range(world_size)))
    meter = Meter()
    mine = [value(seed) for seed in range(3)] if rank == source else None
    got = broadcast_value(
        mine, source=source, group=group, device=torch.device("cpu"), watcher=Watcher(rank=rank), meter=meter
    )
    return same(got, [value(seed) for seed in range(3)]), meter.sent[CONTROL], meter.received[CONTROL]


@pytest.mark.parametrize("source", [0, 2])
def test_a_value_for_everybody(pool: WorkerPool, source: int) -> None:
    answers = pool.run(spread, 3, source)
    assert all(right for right, _, _ in answers)
    sent = answers[source][1]
    assert [received for _, _, received in answers] == [0 if rank == source else sent for rank in range(3)]


def gone(rank: int, world_size: int) -> None:
    moves, _, _ = transport(rank, 4, None)
    moves.begin({FORWARD: 1})
    if rank == 1:
        moves.receive(FORWARD, Address("F", 1, 0, 0))


def test_a_peer_that_leaves_is_named(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1, stage 1, RECV_F, micro-batch 0, peer rank 0: failed"):
        pool.run(gone, 2)
