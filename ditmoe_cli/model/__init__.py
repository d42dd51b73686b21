"""The DiT-MoE: configuration, opened checkpoints, network, loading, offloading."""
