"""Layers divided over the ranks of a ``model`` axis, each of which computes its part of every product.

The scheme is that of Megatron-LM (Shoeybi et al., arXiv:1909.08053): a matrix divided by its output features feeds one
divided by its input features, so a pair of products needs one sum over the ranks in the forward pass and one in the
backward pass. Attention is divided by heads, the vocabulary by tokens; whatever has no plan is computed alike on every
rank, from the same numbers.
"""
