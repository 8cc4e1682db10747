"""What was gained and lost: exact counts, measured latency, and the metric of the task."""
