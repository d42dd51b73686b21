"""The DiT-MoE itself: configuration, network, loading."""
