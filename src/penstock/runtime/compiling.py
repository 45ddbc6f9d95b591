"""Compiles the layers of a stage with ``torch.compile``."""

import torch
from torch import nn

from penstock._core.suggest import unknown_name
from penstock.pipe.layer_spec import callable_name
from penstock.pipe.local_stages import AnyStages
from penstock.pipe.module import PipelineModule
from penstock.runtime.config_sections import CompileSection


def check_compiling(section: CompileSection, model: PipelineModule | nn.Module) -> None:
    """Refuse a backend that torch does not know, and classes that the model does not have.

    Raises:
        ValueError: Either; the nearest name is told.
    """
    if not section.enabled:
        return
    backends = torch.compiler.list_backends(exclude_tags=None)
    if section.backend not in backends:
        raise ValueError(unknown_name("compile.backend", section.backend, backends))
    if isinstance(model, PipelineModule):
        names = {model.type_name(index) for index in range(model.num_layers)}
    else:
        names = {type(model).__name__}
    for name in section.layers:
        if name not in names:
            raise ValueError(unknown_name("compile.layers: layer class", name, sorted(names)))


def compile_layers(section: CompileSection, stage: AnyStages, *, split: bool) -> None:
    """Compile each layer in place, so that parameters keep their names.

    A layer is compiled when it is first called; where tokens are dropped, what is compiled lies inside, with a length
    that may change. A tied layer's ``forward_fn`` is called as it is.

    Args:
        section: What is compiled, and how.
        stage: Its layers.
        split: Whether backward passes are split. A compiled layer's are whole even so, but the graph around it is kept
            for the second half, so its buffers may not be given away in the first; torch has that setting for the
            process.
    """
    if not section.enabled:
        return
    if split:
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False
    for _, layer in stage.canonical_modules():
        if not section.layers or callable_name(layer) in section.layers:
            layer.compile(backend=section.backend, mode=section.mode)
