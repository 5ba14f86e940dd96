"""Volumes to sentences: the protocol, the model behind it and canned text for tests."""
