"""Scores of drafted reports: words (text), meaning (bertscore), findings, and the statistics around them."""
