import pytest

from penstock.pipe import PipeDataParallelTopology, ProcessTopology
from penstock.pipe.groups import PipeGroups, tied_ranks
from support.pipe_models import language_model


def test_one_process_needs_no_group() -> None:
    groups = PipeGroups(PipeDataParallelTopology(1, 1), tied={"embedding": (0,)})
    assert (groups.pipe_rank, groups.num_pipe_ranks, groups.replica, groups.num_replicas) == (0, 1, 0, 1)
    assert (groups.control, groups.pipeline, groups.replicas, groups.store) == (None, None, None, None)
    assert not groups.routes
    assert not groups.tied


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 4 processes, but 1 is running"):
        PipeGroups(PipeDataParallelTopology(2, 2))


def test_a_topology_needs_a_pipe_axis() -> None:
    with pytest.raises(ValueError, match="no 'pipe' axis"):
        PipeGroups(ProcessTopology(["data"], [1]))


def test_ties_must_lie_inside_the_pipeline() -> None:
    with pytest.raises(ValueError, match="'embedding' lies on pipeline rank 1, but the pipeline has 1 ranks"):
        PipeGroups(PipeDataParallelTopology(1, 1), tied={"embedding": (0, 1)})


def test_owners_of_tied_weights() -> None:
    assert tied_ranks(language_model(1)) == {"embedding": (0,)}
    assert tied_ranks(language_model(4)) == {"embedding": (0, 3)}
    assert tied_ranks(language_model(4), placement=(0, 1, 1, 0)) == {"embedding": (0,)}
