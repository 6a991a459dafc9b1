"""Shared code: units, files, JSON records, threads, signals, the cluster and progress; nothing here knows a model."""
