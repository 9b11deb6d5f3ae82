"""Metrics, sinks, and what ends a run early."""
