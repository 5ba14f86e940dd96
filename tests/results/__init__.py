"""Tests of the outgoing formats."""
