"""Common deployment: units, files, JSON records, threads, signals, the cluster and progress; none of it knows a model."""
