"""How many tokens, states and unknowns computing takes: bounds that what computes shares with estimates of it.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

# states to fit and to measure on
FEWEST_STATES = 16
HELD_OUT = 8  # every eighth image
FEWEST_TOKENS, MOST_TOKENS = 20_480, 65_536  # bounds of the default number of tokens to fit on
MEASURED_TOKENS = 16_384  # tokens of all branches that errors are measured on
REPLAYED_TOKENS = 8_192  # those of them that formats of mixtures are replayed on
SENT_TOKENS, FEWEST_SENT = 4_096, 8  # tokens that pass attention and modulation for each format, and a mix's trial
JUDGED_TOKENS, FEWEST_JUDGED = 16_384, 64  # tokens of all branches, and states, that judge a plan that is carried out
FEWEST_TO_JUDGE = 4  # images of which some are kept from every fit
SENT_POSITIONS = 64  # tokens of an image at which errors of its modulation are measured
FEWEST_CARRYING = 4  # states of each stream that carries an error to the prediction
EMBEDDING_TOKENS, FEWEST_EMBEDDED = 512, 2  # tokens that pass the model for each format of the time embedding
ANCHORS = 4  # blocks from which such streams start, for each kind of weight
EXPERT_DRAWS = 256  # guided tokens that are drawn for each expert
EXPERT_TOKENS = 2_048  # largest number of guided tokens of one expert, where evenly spaced ones are taken

# eliminating neurons
TOKENS_PER_NEURON, ELIMINATION_TOKENS = 16, 32_768  # of one branch, for each neuron of a block's experts, and at most

# compressing
MOST_TRIED = 4  # weights of structure against bits; beside them one plan in two stages
SEARCH_TOKENS = 20_480  # that plans are compared on: as many as a small system is fitted on

# refitting
TOKENS_PER_UNKNOWN = 32
LARGEST_WHOLE = 8192  # unknowns of an output that are solved at once, where these are all
LARGEST_SYSTEM = 6144  # unknowns of an output that are solved at once, where there are more
SWEEPS = 2  # over systems that are solved one after the other
DOUBLE_FEATURES = 3072  # unknowns of an output up to which a system is summed and solved in float64
TRIAL_OUTPUTS = 128  # directions of the output on which strengths are tried
KEPT_FEATURES = 1_000_000_000  # bytes of neurons that are kept from one use to the next

# GPTQ
TOKENS_PER_INPUT = 8
POOLED_TOKENS = 4_096  # tokens of a block in the Hessian that those of its experts are shrunk towards
DAMPINGS = (0.01, 0.1, 1.0)  # that are tried
TRIED_ROWS = 128  # of a matrix, at least, that tell whether more damping is better
ROUNDED_BYTES = 512 << 20  # of memory for matrices of one shape that are rounded together on a CPU
ROUNDED_BYTES_ON_DEVICES = 4 << 30  # the same on a GPU, whose kernels take as long for one matrix as for some


def judged_images(images: int) -> range:
    """Return which of so many calibration images judge a plan: every eighth, on which nothing is fitted.

    Of fewer than `FEWEST_TO_JUDGE` images it is the last, which is fitted on too.
    """
    return range(HELD_OUT // 2 - 1, images, HELD_OUT) if images >= FEWEST_TO_JUDGE else range(images - 1, images)


def carrying_tokens(patches: int) -> int:
    """Return the tokens of a stream that carries an error: half of those sent where an image of 256 or more is dear."""
    return SENT_TOKENS // 2 if patches >= 256 else SENT_TOKENS


def systems(sizes: Sequence[int], largest: int) -> list[slice]:
    """Return slices of terms with these sizes that are solved together: few, in order, at most `largest` unknowns each.

    A term larger than that is alone.
    """
    groups, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > largest:
            groups.append(slice(start, stop))
            start = stop
    return groups


def most_unknowns(sizes: Sequence[int]) -> int:
    """Return the most unknowns of a system, for terms of these sizes."""
    return LARGEST_WHOLE if sum(sizes) <= LARGEST_WHOLE else LARGEST_SYSTEM
