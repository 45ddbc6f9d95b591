"""The model over devices: topology, layers, stages, schedules and the engine that runs them."""

from penstock._core.sequence_slice import SequenceSlice, current_slice, takes_slices
from penstock.pipe.layer_spec import LayerSpec, TiedLayerSpec
from penstock.pipe.micro_batch import MicroBatch
from penstock.pipe.module import PipelineModule
from penstock.pipe.stage import Stage
from penstock.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

__all__ = [
    "LayerSpec",
    "MicroBatch",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "ProcessTopology",
    "SequenceSlice",
    "Stage",
    "TiedLayerSpec",
    "current_slice",
    "takes_slices",
]
