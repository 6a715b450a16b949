"""What operators see: log lines, metrics, the dashboard."""
