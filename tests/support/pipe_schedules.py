"""Schedules for tests: any placement, split backwards, in random orders."""

import random

from penstock.pipe.schedule import Action, Schedule


def v_shaped(num_ranks: int, micro_batches: int, rng: random.Random) -> Schedule:
    """A random *runnable* schedule with two chunks per rank in a V, some backwards split.

    Made by running it: time after time, an action whose inputs exist is given to its rank. Some ranks have a taste for
    their early stages and some for their late ones, so that messages pile up between them.
    """
    num_stages = 2 * num_ranks
    placement = tuple(min(stage, num_stages - 1 - stage) for stage in range(num_stages))
    split = {(s, i): rng.random() < 0.5 for s in range(num_stages) for i in range(micro_batches)}
    tastes = [rng.choice([-1, 0, 1]) for _ in range(num_ranks)]
    ranks: list[list[Action]] = [[] for _ in range(num_ranks)]
    ready = [Action(0, "F", i) for i in range(micro_batches)]
    done: set[Action] = set()
    while ready:
        chosen = rng.choice(ready)
        mates = [a for a in ready if placement[a.stage] == placement[chosen.stage] and a.op == chosen.op]
        action = min(mates, key=lambda a: (tastes[placement[a.stage]] * a.stage, a.micro_batch))
        ready.remove(action)
        stage, op, i = action
        ranks[placement[stage]].append(action)
        done.add(action)
        if op == "F":
            ready.append(Action(stage + 1, "F", i) if stage < num_stages - 1 else _backward(stage, i, split))
        elif op != "W":
            if op == "I":
                ready.append(Action(stage, "W", i))
            if stage:
                ready.append(_backward(stage - 1, i, split))
    return Schedule("v", num_stages, micro_batches, tuple(map(tuple, ranks)), placement)


def _backward(stage: int, i: int, split: dict[tuple[int, int], bool]) -> Action:
    return Action(stage, "I" if split[stage, i] else "B", i)


def shuffled(schedule: Schedule, swaps: int, rng: random.Random) -> Schedule:
    """The schedule with some neighbouring actions of a rank swapped; it may no longer be runnable."""
    ranks = [list(actions) for actions in schedule.ranks]
    for _ in range(swaps):
        actions = rng.choice(ranks)
        if len(actions) > 1:
            a = rng.randrange(len(actions) - 1)
            actions[a], actions[a + 1] = actions[a + 1], actions[a]
    return Schedule(
        schedule.name,
        schedule.num_stages,
        schedule.micro_batches,
        tuple(map(tuple, ranks)),
        schedule.placement,
        schedule.forward_only,
        schedule.slices,
    )
