"""The vocabulary in parts: consecutive layers, each with some of the tokens, that may lie on different stages.

A large vocabulary makes the output layer as heavy as many blocks, and the stage that holds it as slow. Cut by tokens,
it becomes layers like others, which a partition may put on several stages. Each gives what the loss needs of its own
logits, so no stage holds all of them and none waits for the others: with ``z`` the logits and ``y`` the label of one
place,

    loss = log(sum over all tokens of exp(z)) - z[y],

and both terms add up part by part, the first by ``logaddexp``. What travels on beside the hidden states is these two
numbers a place and, from the first stage on, the label. (Yeung et al., "Balancing Pipeline Parallelism with Vocabulary
Parallelism", arXiv:2411.05288, cut by tokens too, but give every rank a part and have all of them meet for each
micro-batch.)

The token embedding is cut alike: each part looks up its tokens and adds them to the hidden states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock._core.sequence_slice import takes_slices
from penstock.models.checks import check_labels
from penstock.models.gpt_config import GPTConfig
from penstock.models.token_inputs import TokenValue, token_inputs
from penstock.models.token_vectors import TokenVectors
from penstock.pipe.labels import IGNORED


@takes_slices
class VocabularyPart(TokenVectors):
    """Vectors of some of the tokens, as a part of the token embedding.

    The parts are called in order. The first one takes the batch's inputs.

    Args:
        config: The model's shape, of ``config.vocabulary_parts`` parts.
        part: Which, from 0.
    """

    takes_labels = True
    """A first layer that is to have the labels among its inputs, where there are some."""

    def __init__(self, config: GPTConfig, part: int) -> None:
        tokens = config.tokens_of_part(part)
        super().__init__(len(tokens), config.hidden_size, std=config.init_std)
        self.config = config
        self.tokens = tokens
        self.is_first = self.tokens.start == 0
        self.is_last = self.tokens.stop == config.vocab_size

    def forward(self, value: Any) -> Any:
        """Add this part's tokens to the hidden states.

        Args:
            value: Of the first part, int64 token ids ``[B, S]``, or a dict as :class:`TokenEmbedding
                <penstock.models.gpt_modules.TokenEmbedding>` takes it and, under ``"labels"``, the labels ``[B, S]``.
                Without them the output layer gives logits, and not losses.

        Returns:
            What a :class:`TokenEmbedding` returns; between two parts ``"input_ids"`` beside it.
        """
        config = self.config
        if self.is_first:
            value = token_inputs(value, context_length=config.context_length, vocab_size=config.vocab_size)
            check_labels(value.get("labels"), value["input_ids"], config.vocab_size)
        ids_BS = value["input_ids"]
        elsewhere_BS = self._elsewhere(ids_BS)
        x_BSD = self.lookup((ids_BS - self.tokens.start).masked_fill(elsewhere_BS, 0))
        x_BSD = x_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0.0)
        if not self.is_first:
            x_BSD = value["hidden"] + x_BSD
        if not self.is_last:
            return {**value, "hidden": x_BSD}
        if config.positions == "rope":  # learned positions are added by the next layer, which then drops
            x_BSD = F.dropout(x_BSD, config.dropout, self.training)
        return {**{name: item for name, item in value.items() if name != "input_ids"}, "hidden": x_BSD}

    def scores(self, value: TokenValue) -> TokenValue | Tensor:
        """As a part of the output layer: what these tokens bring to the loss, or to the logits.

        Args:
            value: ``{"hidden": x_BSD}``, ``"labels"`` if they are known, and what the part before returned.

        Returns:
            Of the last part: with labels the loss at each place in nats ``[B, S]`` (of no meaning where the label is
            -100), without them logits ``[B, S, V]``. Of the others, what the next one needs.
        """
        logits_BSP = self.logits(value["hidden"])
        labels_BS = value.get("labels")
        if labels_BS is None:
            parts = [*value.get("logits", ()), logits_BSP]
            return torch.cat(parts, dim=-1) if self.is_last else {**value, "logits": parts}
        if logits_BSP.element_size() < 4:
            logits_BSP = logits_BSP.float()
        elsewhere_BS = self._elsewhere(labels_BS) | (labels_BS == IGNORED)
        at_BS1 = (labels_BS - self.tokens.start).masked_fill(elsewhere_BS, 0).unsqueeze(-1)
        label_logit_BS = logits_BSP.gather(-1, at_BS1).squeeze(-1).masked_fill(elsewhere_BS, 0.0)
        log_sum_BS = logits_BSP.logsumexp(-1)
        if not self.is_first:
            label_logit_BS = value["label_logit"] + label_logit_BS
            log_sum_BS = torch.logaddexp(value["log_sum"], log_sum_BS)
        if self.is_last:
            return log_sum_BS - label_logit_BS
        return {**value, "label_logit": label_logit_BS, "log_sum": log_sum_BS}

    def _elsewhere(self, ids_BS: Tensor) -> Tensor:
        """Where another part has the token; one outside the vocabulary is left for the kernel to refuse."""
        before = (ids_BS >= 0) & (ids_BS < self.tokens.start)
        return before | ((ids_BS >= self.tokens.stop) & (ids_BS < self.config.vocab_size))


@takes_slices
class OutputPart(VocabularyPart):
    """A part of an output layer with a weight of its own; see :meth:`VocabularyPart.scores`."""

    def forward(self, value: Any) -> Any:
        """Its scores."""
        return self.scores(value)


@takes_slices
def part_scores(part: nn.Module, value: TokenValue) -> TokenValue | Tensor:
    """A part's scores by its token vectors: the ``forward_fn`` of a part of the tied output layer."""
    assert isinstance(part, VocabularyPart)
    return part.scores(value)


part_scores.divisible = True  # type: ignore[attr-defined]
