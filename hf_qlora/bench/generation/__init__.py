"""The cost of generating token by token on a CPU: what LoRA adds to its base, unmerged and merged.

    time        all arms in one process, in turn, round after round: what disturbs one disturbs all. Ratios of medians,
                to the base of the same kind: dense, NF4, NF4 within `fast_generation`, or stock bitsandbytes'
    agreement   how many tokens are those of the exact arm before the first that differs; weights are random, so that
                this tells broken arms from whole ones, and nothing of what a trained model would say

Arms start from the same weights, adapters among them, and continue the same prompt greedily.
"""
