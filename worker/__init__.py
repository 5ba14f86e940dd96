"""The hospital side of μ²LLM: queue, pipeline, results, delivery and the `mu2` command."""
