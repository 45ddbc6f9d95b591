"""What the sections of a configuration must agree on, checked before anything is built."""

from typing import TYPE_CHECKING

from penstock.data_pipeline.configuration import validate_config
from penstock.data_pipeline.data_sampling.mixture import MixtureConfig
from penstock.runtime.config_sections import FP16Section

if TYPE_CHECKING:
    from penstock.runtime.config import TrainConfig


def check_sections(config: "TrainConfig") -> None:
    """Check the sections together.

    Raises:
        ValueError: Two of them contradict each other; the message has both, and the remedy.
    """
    if config.fp16 != FP16Section() and config.precision != "fp16":
        raise ValueError(
            f"fp16 sets loss scaling, which precision={config.precision} does not use; "
            "set precision: fp16, or remove the section"
        )
    if config.pipe.record_timeline and config.output is None:
        raise ValueError(
            f"pipe.record_timeline={config.pipe.record_timeline} writes timelines to the run's directory, which is "
            "not known; set output, or record_timeline: 0"
        )
    _check_batches(config)
    _check_batching(config)
    _check_mixture(config)
    _check_lengths(config)
    _check_exchange(config)
    check_tensor_parallel(config)
    _check_local_updates(config)
    _check_dropping(config)


def _check_batches(config: "TrainConfig") -> None:
    if config.data_parallel.replicas is not None:
        config.micro_batches(config.data_parallel.replicas)


def _check_batching(config: "TrainConfig") -> None:
    batching, train = config.batching, config.train
    micro_batches = train.global_batch_size // train.micro_batch_size
    for _, size in batching.sizes:
        if size % micro_batches:
            below, above = size // micro_batches * micro_batches, -(-size // micro_batches) * micro_batches
            raise ValueError(
                f"batching.sizes: {size} samples cannot be divided into a step's {micro_batches} micro-batches "
                f"(global_batch_size / micro_batch_size), whose rows grow; take {below or above} or {above}"
            )
    if batching.sizes and config.sequence_length is None:
        raise ValueError("batching.sizes are keyed by tokens; set data.sequence_length")
    if config.data.cut in ("documents", "powers") and batching.token_budget is None:
        raise ValueError(
            f"data.cut={config.data.cut} gives samples of different lengths; set batching.token_budget to batch them"
        )
    if config.data.cut == "packed" and (batching.token_budget or batching.sequence_length):
        raise ValueError(
            "data.cut=packed gives rows of one length whose documents know their places; leave out "
            "batching.token_budget and batching.sequence_length, or take another data.cut"
        )
    varied = bool(batching.sizes) or batching.sequence_length is not None
    if varied and config.schedule.by == "layer_tokens" and config.schedule.total_tokens is None:
        raise ValueError(
            "schedule.by=layer_tokens does not know how many a run computes whose steps differ (batching.sizes, "
            "batching.sequence_length); set schedule.total_tokens, or schedule.by: tokens"
        )
    if batching.token_budget is not None:
        if config.train.loss_weighting != "tokens":
            raise ValueError(
                f"train.loss_weighting={config.train.loss_weighting} counts micro-batches alike, but those of "
                "batching.token_budget differ in rows and may repeat some; set train.loss_weighting: tokens"
            )
        if config.random_ltd_enabled:
            raise ValueError(
                "random_ltd keeps a number of tokens of sequences of one length, and batching.token_budget makes "
                "batches of different lengths; keep one of them"
            )
        if (config.sampling.get("curriculum") or {}).get("pacing") is not None:
            raise ValueError(
                "batching.token_budget sorts samples ahead of the step at which a paced curriculum decides about "
                "them; keep one of batching.token_budget and sampling.curriculum.pacing"
            )


def _check_mixture(config: "TrainConfig") -> None:
    mixture = config.sampling.get("mixture")
    if isinstance(config.data.train, dict) and mixture is None:
        raise ValueError("data.train names several corpora; give their weights in sampling.mixture.corpora")
    if mixture is None:
        return
    if isinstance(config.data.train, str):
        raise ValueError("sampling.mixture needs data.train to be a table of paths by the corpora's names")
    if config.batching.token_budget is not None:
        raise ValueError(
            "sampling.mixture counts samples, and batching.token_budget sorts them by length first, so no step "
            "would have the shares that were asked for; keep one of them"
        )
    settings = validate_config(MixtureConfig, mixture, "sampling.mixture")
    if settings.by == "steps" and settings.places != [0] and config.batching.sizes:
        raise ValueError(
            "sampling.mixture changes weights by steps, but batching.sizes changes how many samples a step has; "
            "set sampling.mixture.by: tokens or samples"
        )


def _check_lengths(config: "TrainConfig") -> None:
    length = config.sequence_length
    context = None if config.model is None else config.model.context
    if context is not None and length is not None and length > context:
        raise ValueError(
            f"data.sequence_length={length} is longer than model.context={context}; "
            f"lower the former or raise the latter to {length}"
        )
    if config.train.total_tokens is not None:
        if config.tokens_per_step is None:
            raise ValueError(
                "train.total_tokens needs a sequence length to be turned into steps; "
                "set data.sequence_length or model.context, or give train.steps"
            )
        if config.train.total_tokens < config.tokens_per_step:
            raise ValueError(
                f"train.total_tokens={config.train.total_tokens} is less than one step reads: "
                f"{config.train.global_batch_size} samples of {length} tokens = {config.tokens_per_step}"
            )


def _check_exchange(config: "TrainConfig") -> None:
    optimizer, compression = config.optimizer, config.compression
    if config.data_parallel.sharded:
        if optimizer.owns_exchange:
            raise ValueError(
                f"optimizer.name={optimizer.name} exchanges whole momenta, but data_parallel.sharding="
                f"{config.data_parallel.sharding} leaves each replica a part; set sharding: none or name: adamw"
            )
        if config.local_updates is not None:
            raise ValueError(
                "local_updates lets replicas train apart, each with whole weights, but data_parallel.sharding="
                f"{config.data_parallel.sharding} leaves each a part; remove one of the two"
            )
        compression.check_sharded(config.data_parallel.sharding)
    elif compression.weights != "none":
        raise ValueError(
            f"compression.weights={compression.weights} is for weights that replicas gather from one another, but with "
            f"data_parallel.sharding={config.data_parallel.sharding} each holds all of them; set sharding: fsdp2, or "
            "weights: none"
        )
    apart = optimizer.owns_exchange or config.local_updates is not None
    if apart and compression.replicas_per_machine > 1:
        who = f"optimizer.name={optimizer.name} exchanges" if optimizer.owns_exchange else "local_updates exchange"
        raise ValueError(
            f"compression.replicas_per_machine={compression.replicas_per_machine} is for gradients, but {who} "
            "something else, over all replicas alike; set replicas_per_machine: 1"
        )
    if optimizer.owns_exchange and compression.algorithm != "none":
        raise ValueError(
            f"compression.algorithm={compression.algorithm} and optimizer.name={optimizer.name} would both "
            f"exchange gradients; keep one: compression.algorithm: none with {optimizer.name}, "
            "or optimizer.name: adamw"
        )
    if optimizer.post_validation:
        reasons = {
            "precision: fp16 must know whether gradients overflowed to scale the next step's loss": (
                config.precision == "fp16",
                "take precision: bf16",
            ),
            "local_updates leave no norm over the replicas to wait for": (
                config.local_updates is not None,
                "remove local_updates",
            ),
            f"data_parallel.sharding: {config.data_parallel.sharding} gathers weights in forward passes": (
                config.data_parallel.sharded,
                "set sharding: none",
            ),
        }
        for reason, (holds, remedy) in reasons.items():
            if holds:
                raise ValueError(
                    f"optimizer.post_validation does not go with this run: {reason}; {remedy}, or post_validation: "
                    "false"
                )
    for name, value in (
        ("optimizer.freeze_step", optimizer.freeze_step),
        ("compression.warmup_steps", compression.warmup_steps),
    ):
        if value is not None and value > config.total_steps:
            raise ValueError(
                f"{name}={value} is more than the run's {config.total_steps} steps, so nothing would be compressed; "
                f"lower it (for example to {max(1, config.total_steps // 5)}) or train longer"
            )


def check_tensor_parallel(config: "TrainConfig") -> None:
    """Refuse what cannot be done with parts of layers.

    Raises:
        ValueError: ``tensor_parallel.size`` does not go with another section.
    """
    size, optimizer = config.tensor_parallel.size, config.optimizer
    if config.compile.enabled and (size > 1 or config.data_parallel.sharded):
        raise ValueError(
            "compile.enabled takes layers that communicate nothing inside, but those of tensor_parallel and of "
            "data_parallel.sharding do; set compile.enabled: false, or tensor_parallel.size: 1 and sharding: none"
        )
    if size == 1:
        return
    if config.data_parallel.sharded and config.compression.algorithm != "none":
        raise ValueError(
            f"compression.algorithm={config.compression.algorithm} with data_parallel.sharding="
            f"{config.data_parallel.sharding} compresses a layer as one, and with tensor_parallel.size={size} weights "
            "that all ranks hold would share scales with parts that differ, and drift apart; set "
            "compression.algorithm: none, sharding: none, or tensor_parallel.size: 1"
        )
    if config.local_updates is not None:
        raise ValueError(
            f"tensor_parallel.size={size} divides layers, but local_updates exchanges whole ones; set "
            "tensor_parallel.size: 1, or remove local_updates"
        )
    if optimizer.post_validation:
        raise ValueError(
            f"optimizer.post_validation adds up norms along pipelines, and tensor_parallel.size={size} divides "
            "them over more ranks; set post_validation: false, or tensor_parallel.size: 1"
        )
    if config.pipe.partition_method == "profile":
        raise ValueError(
            "pipe.partition_method=profile measures whole layers, which no rank computes with "
            f"tensor_parallel.size={size}; take parameters, uniform or explicit bounds"
        )
    if optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name={optimizer.name} looks at whole matrices or compresses them, of which each rank has a "
            f"part with tensor_parallel.size={size}; take name: adamw, or tensor_parallel.size: 1"
        )


def _check_local_updates(config: "TrainConfig") -> None:
    section = config.local_updates
    if section is None:
        return
    if config.optimizer.owns_exchange:
        raise ValueError(
            f"local_updates and optimizer.name={config.optimizer.name} would both exchange; keep one: "
            "optimizer.name: adamw with local_updates, or no local_updates"
        )
    if config.compression.algorithm != "none":
        raise ValueError(
            f"compression.algorithm={config.compression.algorithm} is about gradients, of which none are exchanged "
            f"with local_updates; name it there: local_updates.algorithm: {config.compression.algorithm}"
        )
    steps, period, fragments = config.total_steps, section.period, section.number_of_fragments
    if period > steps:
        raise ValueError(
            f"local_updates.period={period} is more than the run's {steps} steps, so nothing would be exchanged; "
            "lower it or train longer"
        )
    if fragments > period:
        raise ValueError(
            f"local_updates.fragments={fragments} take turns within period={period} steps, one after a step at "
            f"most; take fewer fragments or a period of at least {fragments}"
        )
    if section.overlap is not None and section.overlap >= period:
        raise ValueError(
            f"local_updates.overlap={section.overlap} must be less than period={period}: a fragment is received "
            "before it is sent again"
        )
    if fragments == 1 and not section.overlap and steps % period:
        below, above = steps // period * period, -(-steps // period) * period
        raise ValueError(
            f"the run's {steps} steps are not a multiple of local_updates.period={period}: what the replicas learn "
            f"in the last {steps - below} would be lost; train {below} or {above} steps"
        )


def _check_dropping(config: "TrainConfig") -> None:
    section, length = config.random_ltd, config.sequence_length
    by_layer_tokens = config.schedule.by == "layer_tokens"
    if section is None or not section.enabled:
        if by_layer_tokens:
            raise ValueError(
                "schedule.by: layer_tokens counts what layers compute while tokens are dropped, but this run has "
                "no random_ltd; set schedule.by: tokens, which is the same curve without dropping"
            )
        return
    if config.lr_by_deepspeeds_section and "schedule" in config.model_fields_set:
        raise ValueError(
            "random_ltd.layer_token_lr_schedule and schedule both set the learning rate; keep one of them "
            "(schedule.by: layer_tokens is the same in the run's own words)"
        )
    for name, value in (("min_tokens", section.min_tokens), ("max_tokens", section.max_tokens)):
        if value is not None and length is not None and value > length:
            raise ValueError(
                f"random_ltd.{name}={value} is more than the sequence length {length} "
                "(data.sequence_length or model.context); lower it"
            )
    if config.model is not None:
        section.layer_ids(config.model.num_layers)
