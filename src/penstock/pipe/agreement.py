"""All ranks state what they were started with; where they differ, every one of them says who differs in what.

Goes through the rendezvous store, before any collective could hang over the difference, and also finds ranks that
never arrive. Rank 0 collects the statements and publishes a verdict.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from penstock._core.waiting import WaitError, Watcher

if TYPE_CHECKING:  # a compiled type: torch.distributed exports it at run time only
    from torch._C._distributed_c10d import Store

Facts = Mapping[str, Any]
"""JSON values by label. A label must have the same value on every rank that states it; not every rank need state it."""

_POLL_S: Final = 0.01
_GRACE_S: Final = 1.0


def agree(name: str, facts: Facts, *, store: "Store", rank: int, world_size: int, watcher: Watcher) -> None:
    """Compare ``facts`` over all ranks. Collective; may be called again under the same name.

    Args:
        name: What is being agreed on, for keys and messages.
        facts: What this rank states.
        store: The rendezvous store, shared by all ranks.
        rank: This rank.
        world_size: How many ranks take part.
        watcher: Its deadline is how long ranks may take to arrive.

    Raises:
        ValueError: Ranks differ; the same message on every rank.
        WaitError: Ranks did not arrive within the deadline.
    """
    round_number = store.add(f"penstock/agree/{name}/{rank}/rounds", 1)
    prefix = f"penstock/agree/{name}/{round_number}"
    store.set(f"{prefix}/{rank}", json.dumps(facts))
    until = time.monotonic() + watcher.deadline_s
    # The limits below come before the watcher's: they can say who is missing.
    with watcher.waiting(f"agreement on {name}", deadline_s=watcher.deadline_s + 2 * _GRACE_S):
        if rank == 0:
            missing = _wait_for([f"{prefix}/{other}" for other in range(world_size)], store, until)
            if missing:
                verdict = f"{_ranks(missing)} did not arrive within {watcher.deadline_s:g} s"
            else:
                verdict = compare([json.loads(store.get(f"{prefix}/{other}")) for other in range(world_size)]) or ""
            store.set(f"{prefix}/verdict", json.dumps([bool(missing), verdict]))
        # A rank 0 that did arrive may be about to say who did not.
        if _wait_for([f"{prefix}/0"], store, until) or _wait_for([f"{prefix}/verdict"], store, until + _GRACE_S):
            raise WaitError(f"rank {rank}, agreement on {name}: rank 0 did not arrive within {watcher.deadline_s:g} s")
        late, verdict = json.loads(store.get(f"{prefix}/verdict"))
        if late:
            raise WaitError(f"rank {rank}, agreement on {name}: {verdict}")
    if verdict:
        raise ValueError(f"the ranks were started with different settings: {verdict}. Start all with the same ones")


def compare(stated: Sequence[Facts]) -> str | None:
    """Say who differs in what, or None where all agree.

    Args:
        stated: The facts of each rank.
    """
    labels = dict.fromkeys(label for facts in stated for label in facts)
    for label in labels:
        values = {rank: json.dumps(facts[label], sort_keys=True) for rank, facts in enumerate(stated) if label in facts}
        if len(set(values.values())) == 1:
            continue
        counts = Counter(values.values())
        # Counter keeps the order of first appearance: where votes are equal, the lowest rank is taken to be right.
        usual = max(counts, key=lambda value: counts[value])
        others = [rank for rank, value in values.items() if value == usual]
        differing = "; ".join(f"rank {rank} has {value}" for rank, value in values.items() if value != usual)
        has = "has" if len(others) == 1 else "have"
        return f"{label}: {differing}, but {_ranks(others)} {has} {usual}"
    return None


def _wait_for(keys: Sequence[str], store: "Store", until: float) -> list[int]:
    """Wait until the store has all keys; returns the indices of those that it still lacks when time is up."""
    missing = list(range(len(keys)))
    while True:
        if store.check([keys[index] for index in missing]):
            return []
        missing = [index for index in missing if not store.check([keys[index]])]
        if not missing or time.monotonic() >= until:
            return missing
        time.sleep(_POLL_S)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
