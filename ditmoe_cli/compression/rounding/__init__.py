"""Round weights to their formats: GPTQ, smoothing."""
