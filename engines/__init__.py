"""Engines: processes that run models. Knows processes, weights and memory; knows nothing of HTTP routing."""
