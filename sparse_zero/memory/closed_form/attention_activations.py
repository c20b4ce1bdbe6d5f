"""What does the attention of one layer keep and hold, by torch's kernels or eager, with rope or alibi?"""

from __future__ import annotations

from sparse_zero.memory.closed_form.steps import Beside, Sizes, Step

# What is kept, in the words of the docs.
ATTENTION = "attention"
# Steps that belong to the module itself.
_MODULE = "attention"


def attention_steps(sizes: Sizes, beside: Beside, *, has_graph: bool) -> list[Step]:
    """From the outputs of q, k and v to the input of the output's projection.

    Args:
        sizes: of the micro-batch.
        beside: the residual stream, its gradient, and the input of q, k and v.
        has_graph: whether q, k or v requires grad.
    """
    if sizes.shape.positions == "alibi":
        return _alibi(sizes, beside, has_graph)
    steps = _normalized(sizes, beside, has_graph) if sizes.shape.has_qk_norm else []
    return [*steps, _rope(sizes, beside, has_graph), *_products(sizes, beside, has_graph)]


def _normalized(sizes: Sizes, beside: Beside, has_graph: bool) -> list[Step]:
    """Queries and keys, each head normalized in fp32."""
    tokens, found = sizes.tokens, []
    outer = sizes.queries + 2 * sizes.keys
    for name, num_heads in (("q_norm", sizes.shape.num_heads), ("k_norm", sizes.shape.num_kv_heads)):
        wide = 4 * tokens * num_heads * sizes.shape.head_dim
        found.append(
            Step(
                name=f"self_attn.{name}",
                kept={ATTENTION: wide + 4 * tokens * num_heads} if has_graph else {},
                forward=beside.forward + outer + wide,
                alone=beside.alone + outer + 2 * wide,
                backward=beside.backward + outer + 5 * wide if has_graph else None,
            )
        )
    return found


def _rope(sizes: Sizes, beside: Beside, has_graph: bool) -> Step:
    """Queries and keys turned by their positions: nothing is kept but cosines and sines, which all layers share."""
    outer = sizes.queries + 2 * sizes.keys
    return Step(
        name="self_attn",
        # The two products and their sum; a half is negated and joined to the other before the second.
        forward=beside.forward + outer + sizes.keys + 3 * sizes.queries,
        alone=beside.alone + outer + sizes.keys + 3 * sizes.queries,
        backward=beside.backward + outer + 3 * sizes.queries if has_graph else None,
    )


def _products(sizes: Sizes, beside: Beside, has_graph: bool) -> list[Step]:
    shape, is_eager = sizes.shape, sizes.attention == "eager"
    queries, keys = sizes.queries, sizes.keys
    # Of grouped heads, keys and values are repeated for each query head where there is a mask; what the projections
    # gave is held in forward beside the copies. One head for all needs no copy: torch's kernels read it many times.
    is_repeated = shape.num_kv_heads < shape.num_heads and (is_eager or sizes.has_mask)
    is_copied = is_repeated and (is_eager or shape.num_kv_heads > 1)
    repeated, first = (queries, 2 * keys) if is_copied else (keys, 0)
    beside = beside.plus(first)
    if is_eager:
        return _eager(sizes, beside, has_graph, repeated)
    # Masks are bool; each call of the kernel makes numbers of them, which its backward reads.
    mask = sizes.positions_squared * sizes.element if sizes.has_mask else 0
    log_sums = 4 * sizes.tokens * shape.num_heads
    kept = queries + 2 * repeated + mask + queries + log_sums
    return [
        Step(
            name="self_attn",
            kept={ATTENTION: kept} if has_graph else {},
            forward=beside.forward,
            alone=beside.alone + kept,
            # The gradient of the output, and those of queries, keys and values.
            backward=beside.backward + 2 * queries + 2 * (queries if is_repeated else keys) if has_graph else None,
        )
    ]


def _eager(sizes: Sizes, beside: Beside, has_graph: bool, repeated: int) -> list[Step]:
    """Scores, their softmax in fp32, and the product with the values, each a tensor of its own."""
    queries, narrow, wide = sizes.queries, sizes.scores * sizes.element, 4 * sizes.scores
    # In fp32 the softmax needs no copy, neither of what it reads nor of what it gives.
    copy = wide if sizes.is_low else 0
    probabilities = narrow if sizes.is_low else 0
    # The queries that the product reads lie in memory of their own where several heads share keys.
    held = beside.plus(queries, alone=queries + 2 * repeated)
    return [
        Step(
            name="self_attn",
            kept={ATTENTION: queries + repeated} if has_graph else {},
            forward=held.forward + repeated + 2 * narrow,
            alone=held.alone + queries + 2 * narrow,
            backward=beside.backward + 2 * repeated + narrow + queries if has_graph else None,
        ),
        Step(
            name="self_attn",
            kept={ATTENTION: wide} if has_graph else {},
            forward=held.forward + repeated + narrow + copy,
            alone=held.alone + narrow + copy + wide,
            backward=beside.backward + repeated + 2 * wide if has_graph else None,
        ),
        Step(
            name="self_attn",
            kept={ATTENTION: probabilities + repeated} if has_graph else {},
            forward=held.forward + 2 * queries,
            alone=held.alone + wide + probabilities + queries,
            backward=beside.backward + repeated + narrow + queries if has_graph else None,
        ),
    ]


def _alibi(sizes: Sizes, beside: Beside, has_graph: bool) -> list[Step]:
    """Bloom's: q, k and v from one matrix, a bias that grows with the distance, eager products."""
    queries, narrow, wide = sizes.queries, sizes.scores * sizes.element, 4 * sizes.scores
    copy = wide if sizes.is_low else 0
    probabilities = narrow if sizes.is_low else 0
    # The fused output, until the layer's attention returns; so do the scores, with and without the mask.
    held = beside.plus(3 * queries)
    return [
        Step(
            name="self_attention",
            kept={ATTENTION: 2 * queries} if has_graph else {},
            forward=held.forward + queries + 2 * narrow,
            alone=held.alone + 3 * queries + 2 * narrow,
            # Gradients of queries, keys and values, each spread into one of the fused output's size, and their sum.
            backward=beside.backward + 3 * queries + max(2 * narrow, 6 * queries) if has_graph else None,
        ),
        Step(
            name="self_attention",
            kept={ATTENTION: wide} if has_graph else {},
            forward=held.forward + queries + 2 * narrow + copy,
            alone=held.alone + 3 * queries + 2 * narrow + copy + wide,
            backward=beside.backward + queries + 2 * wide if has_graph else None,
        ),
        Step(
            name="self_attention",
            kept={ATTENTION: probabilities + queries} if has_graph else {},
            forward=held.forward + 2 * narrow + 2 * queries,
            alone=held.alone + 5 * queries + 2 * narrow + wide + probabilities,
            backward=beside.backward + 2 * queries + narrow if has_graph else None,
        ),
    ]
