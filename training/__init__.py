"""Phantoms, data, fine-tuning, preferences and evaluation of μ²LLM."""
